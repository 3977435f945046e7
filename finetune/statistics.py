"""Statistics of actions and proprioception, in the form of OpenVLA's `dataset_statistics.json`.

    {dataset: {"action": {mean, std, max, min, q01, q99, mask}, "proprio": {mean, std, max, min, q01, q99},
               "num_transitions": int, "num_trajectories": int}}

Quantiles are `np.quantile` over every row, in float64. The quantiles stored with LeRobot datasets are merged per
episode and can be far off (-0.736 where the truth was -0.999), so they are never used.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from vla.files import write_json
from vla.finetune.lerobot_reader import LeRobotReader
from vla.normalize import Statistics
from vla.types import problem

FILE = "dataset_statistics.json"
GRIPPER = "gripper"
_FIELDS = ("mean", "std", "max", "min", "q01", "q99")


def vector_statistics(rows: np.ndarray, where: str) -> dict[str, list[float]]:
    """mean, std (ddof 0), max, min, q01, q99 of (N, D) rows, each a list of D numbers.

    Raises:
        VlaError: no rows, or a value that is not finite (`where` is named in the message).
    """
    if not len(rows):
        raise problem(f"{where} without rows", "at least one frame", "collect demonstrations first")
    bad = np.argwhere(~np.isfinite(rows))
    if len(bad):
        raise problem(f"{where}: {rows[tuple(bad[0])]} at frame {bad[0][0]}, dimension {bad[0][1]}", "finite numbers",
                      "`vla data check` lists all of them; remove those episodes")  # fmt: skip
    exact = rows.astype(np.float64)
    values = (exact.mean(0), exact.std(0), exact.max(0), exact.min(0), *np.quantile(exact, [0.01, 0.99], axis=0))
    return {name: value.tolist() for name, value in zip(_FIELDS, values, strict=True)}


def action_mask(names: Sequence[str], gripper_dim: int | None | Literal["named"] = "named") -> list[bool]:
    """Which dimensions are normalised: all but the gripper. "named": the one called "gripper", if there is one."""
    if gripper_dim == "named":
        return [name != GRIPPER for name in names]
    if gripper_dim is not None and not 0 <= gripper_dim < len(names):
        raise problem(f"gripper_dim {gripper_dim}", f"0..{len(names) - 1}, or None", "correct the gripper's dimension")
    return [i != gripper_dim for i in range(len(names))]


def dataset_statistics(
    reader: LeRobotReader,
    gripper_dim: int | None | Literal["named"] = "named",
    episodes: Sequence[int] | None = None,
) -> dict[str, Any]:
    """One dataset's entry. `episodes` limits it, e.g. to those trained on; `gripper_dim` as in `action_mask`."""
    rows = [reader.episodes[i] for i in (range(reader.n_episodes) if episodes is None else episodes)]
    frames = np.concatenate([np.arange(row.start, row.stop) for row in rows] or [np.zeros(0, np.int64)])
    mask = action_mask(reader.action_names, gripper_dim)
    entry: dict[str, Any] = {"action": vector_statistics(reader.actions()[frames], f"action of {reader.root}")}
    entry["action"]["mask"] = mask
    states = reader.states()
    if states is not None:
        entry["proprio"] = vector_statistics(states[frames], f"{reader.state_key} of {reader.root}")
    return entry | {"num_transitions": len(frames), "num_trajectories": len(rows)}


def write_statistics(path: Path, value: Statistics) -> None:
    """Write `value` to `path` after the checks of `read_statistics`."""
    check_statistics(value, str(path))
    write_json(path, value)


def read_statistics(path: Path) -> Statistics:
    """Read and check a `dataset_statistics.json`. `path` may also be the folder that holds it.

    Raises:
        VlaError: no such file, not JSON, or a field that is missing or malformed, each named.
    """
    file = path / FILE if path.is_dir() else path
    if not file.is_file():
        raise problem(f"no {file}", "the statistics of the training data", "make them with `vla data stats`")
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise problem(f"{file}: {error}", "JSON", "make it again with `vla data stats`") from error
    check_statistics(value, str(file))
    return value


def check_statistics(value: Any, where: str) -> None:
    """VlaError unless `value` has OpenVLA's form. `proprio`, the mask and the counts may be missing."""
    if not isinstance(value, dict) or not value:
        raise problem(f"{where}: {type(value).__name__} without datasets", "{dataset: {action: ...}}", "make it again")
    for dataset, entry in value.items():
        if not isinstance(entry, dict) or "action" not in entry:
            raise problem(f"{where}: no {dataset}.action", "action statistics for every dataset", "make it again")
        for group in ("action", "proprio"):
            if group in entry:
                _check_group(entry[group], f"{where}: {dataset}.{group}")


def _check_group(group: Any, where: str) -> None:
    if not isinstance(group, dict):
        raise problem(f"{where} is {group!r}", ", ".join(_FIELDS), "make the file again with `vla data stats`")
    missing = [name for name in _FIELDS if name not in group]
    if missing:
        raise problem(
            f"{where} without {', '.join(missing)}", ", ".join(_FIELDS), "make it again with `vla data stats`"
        )
    try:
        table = np.array([group[name] for name in _FIELDS], np.float64)
    except (TypeError, ValueError) as error:
        raise problem(f"{where}: {error}", "lists of numbers, all of one length", "make the file again") from error
    if table.ndim != 2 or not np.isfinite(table).all():
        raise problem(f"{where} of shape {table.shape} with {(~np.isfinite(table)).sum()} values not finite",
                      "finite lists of one length", "make the file again")  # fmt: skip
    mask = group.get("mask", [True] * table.shape[1])
    if not isinstance(mask, list) or len(mask) != table.shape[1]:
        raise problem(f"{where}.mask {mask!r}", f"{table.shape[1]} booleans", "make the file again")
