"""A suite's scripted experts as one policy, told apart by the instruction."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vla.types import ActionChunk, Observation, Policy, Suite, problem


class SuiteExpert:
    """The upper bound of a suite. Reads `Observation.privileged`; see `vla.types.Policy`."""

    def __init__(self, suite: Suite) -> None:
        self._experts: dict[str, Policy] = {}
        for task in suite.tasks:
            expert = suite.expert(task.name)
            if self._experts.setdefault(task.instruction, expert) is not expert:
                got = f"tasks that share the instruction {task.instruction!r}"
                raise problem(got, "one instruction per task", "evaluate them one at a time")
        self._suite = suite.name

    @property
    def metadata(self) -> dict[str, Any]:
        every = [expert.metadata for expert in self._experts.values()]
        reads_images = any(metadata.get("reads_images", True) for metadata in every)
        return {"name": f"expert/{self._suite}", "horizon": every[0]["horizon"], "action_dim": every[0]["action_dim"],
                "reads_images": reads_images}  # fmt: skip

    def act(self, observations: Sequence[Observation]) -> list[ActionChunk]:
        return [self._experts[observation.instruction].act([observation])[0] for observation in observations]

    def reset(self) -> None:
        for expert in self._experts.values():
            expert.reset()
