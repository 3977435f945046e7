"""A suite's scripted experts as one policy, told apart by the instruction."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vla.types import ActionChunk, Observation, Policy, Suite, problem


class SuiteExpert:
    """The upper bound of a suite. Reads `Observation.privileged`; see `vla.types.Policy`."""

    def __init__(self, suite: Suite) -> None:
        self._experts: dict[str, Policy] = {task.instruction: suite.expert(task.name) for task in suite.tasks}
        if len(self._experts) < len(suite.tasks):
            raise problem("tasks that share an instruction", "one instruction per task", "evaluate them one at a time")
        self._suite = suite.name

    @property
    def metadata(self) -> dict[str, Any]:
        first = next(iter(self._experts.values())).metadata
        return {"name": f"expert/{self._suite}", "horizon": first["horizon"], "action_dim": first["action_dim"]}

    def act(self, observations: Sequence[Observation]) -> list[ActionChunk]:
        return [self._experts[observation.instruction].act([observation])[0] for observation in observations]

    def reset(self) -> None:
        for expert in self._experts.values():
            expert.reset()
