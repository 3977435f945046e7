"""What datasets that are trained together must agree on, and what they should: checked before anything is trained."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from vla.finetune.formats.source import FrameSource
from vla.types import problem

LAST = -1
"""The setting `gripper_dim` by which the gripper is found in the data."""


def check_agreement(sources: Sequence[FrameSource], state: bool) -> None:
    """VlaError if the actions, or the states where they are shown, have different numbers of dimensions."""
    first = sources[0]
    for source in sources:
        if source.action_dim != first.action_dim:
            raise problem(f"{source.name} with {source.action_dim} action dimensions",
                          f"{first.action_dim}, as {first.name} has",
                          "train on datasets with the same action space")  # fmt: skip
        if state and source.state_dim != first.state_dim:
            raise problem(f"{source.state_dim} state dimensions in {source.name!r}",
                          f"{first.state_dim}, as {first.name!r} has", "pass --no-state to train without the state")  # fmt: skip


def common_cameras(sources: Sequence[FrameSource]) -> tuple[str, ...]:
    """The cameras that every dataset has by one name, in the order of the first. VlaError if there is none."""
    found = tuple(name for name in sources[0].cameras if all(name in source.cameras for source in sources))
    if not found:
        each = "; ".join(f"{source.name}: {', '.join(source.cameras) or 'none'}" for source in sources)
        raise problem(f"datasets without a camera of one name ({each})", "at least one camera that all have",
                      "say which ones belong together: --cameras NAME=KEY|KEY")  # fmt: skip
    return found


def gripper_index(wanted: int | None, sources: Sequence[FrameSource]) -> int | None:
    """The action dimension that is left un-normalised; None normalises all.

    Args:
        wanted: an index; None; or `LAST`: the dimension called "gripper", else the last one, in either case only if its
            values lie in [-1, 1] in every dataset, because tokens stand for nothing beyond.

    Raises:
        VlaError: an index that is no dimension, or one whose values leave [-1, 1].
    """
    names = sources[0].action_names
    if wanted is None:
        return None
    if wanted == LAST:
        index = names.index("gripper") if "gripper" in names else len(names) - 1
        return index if all(_reach(source, index) <= 1.0 for source in sources) else None
    if not 0 <= wanted < len(names):
        raise problem(f"gripper_dim {wanted}", f"0..{len(names) - 1}, or None", "correct the gripper's dimension")
    for source in sources:
        reach = _reach(source, wanted)
        if reach > 1.0:
            raise problem(f"gripper_dim {wanted} ({names[wanted]!r}) with values up to {reach:g} in {source.name!r}",
                          "values in [-1, 1], as it is left un-normalised", "pass --gripper-dim None")  # fmt: skip
    return wanted


def doubts(sources: Sequence[FrameSource], gripper: int | None, state: bool) -> list[str]:
    """Lines for the user: what the datasets have otherwise and nothing here can bring together."""
    first, found = sources[0], []
    for source in sources[1:]:
        if state and source.state_names != first.state_names:
            found.append(f"the state of {source.name} ({', '.join(source.state_names)}) is called otherwise than that of "
                         f"{first.name} ({', '.join(first.state_names)}); one prompt shows both")  # fmt: skip
        if gripper is not None and _range(source, gripper) != _range(first, gripper):
            found.append(f"the gripper of {source.name} runs over {_range(source, gripper)}, that of {first.name} over "
                         f"{_range(first, gripper)}: the policy will mix the two meanings")  # fmt: skip
        if "" not in (source.gripper, first.gripper) and source.gripper != first.gripper:
            found.append(
                f"the gripper of {source.name} means '{source.gripper}', that of {first.name} '{first.gripper}'"
            )
    return found


def _reach(source: FrameSource, dim: int) -> float:
    """Largest absolute value; 0 without frames."""
    values = source.actions()[:, dim]
    return float(np.abs(values).max()) if len(values) else 0.0


def _range(source: FrameSource, dim: int) -> str:
    return "0..1" if source.actions()[:, dim].min() >= 0 else "-1..1"
