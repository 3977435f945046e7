"""Statistics of actions and proprioception, in the form of OpenVLA's `dataset_statistics.json`.

    {dataset: {"action": {mean, std, max, min, q01, q99, mask}, "proprio": {mean, std, max, min, q01, q99},
               "num_transitions": int, "num_trajectories": int}}

Quantiles are `np.quantile` over every row, in float64, found without holding the rows in memory (`quantiles`). The
quantiles stored with LeRobot datasets are merged per episode and can be far off (-0.736 where the truth was -0.999), so
they are never used.

A dimension that never changes is left as it is: `vla.normalize` maps its one value to -1 and back to that value, whatever
is predicted (OpenVLA sets such dimensions to 0 in training, even ones that its mask leaves alone).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from vla.files import write_json
from vla.finetune.data.quantiles import Blocks, RowStore, quantiles, row_blocks
from vla.finetune.formats.source import FrameSource
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
    kept = rows if rows.dtype in (np.float32, np.float64) else rows.astype(np.float64)
    return block_statistics(lambda: row_blocks(kept), where)


def stream_statistics(
    chunks: Iterable[np.ndarray], where: str, memory_mb: float = 256.0, folder: Path | None = None
) -> dict[str, list[float]]:
    """`vector_statistics` of rows that can be read only once, in chunks (n, D).

    Args:
        memory_mb: rows beyond this go to a temporary file.
        folder: of that file; the system's own if None.
    """
    store = RowStore(memory_mb, folder)
    for chunk in chunks:
        store.add(chunk)
    return block_statistics(store.blocks, where)


def block_statistics(blocks: Blocks, where: str) -> dict[str, list[float]]:
    """`vector_statistics` of rows that are read several times, one block in memory at a time."""
    n_rows, total, high, low = 0, np.zeros(0), np.zeros(0), np.zeros(0)
    for block in blocks():
        bad = np.argwhere(~np.isfinite(block))
        if len(bad):
            raise problem(f"{where}: {block[tuple(bad[0])]} at frame {n_rows + bad[0][0]}, dimension {bad[0][1]}",
                          "finite numbers", "`vla data check` lists all of them; remove those episodes")  # fmt: skip
        if len(block):
            part, top, bottom = block.astype(np.float64).sum(0), block.max(0), block.min(0)
            total = total + part if n_rows else part
            high, low = (np.maximum(high, top), np.minimum(low, bottom)) if n_rows else (top, bottom)
            n_rows += len(block)
    if not n_rows:
        raise problem(f"{where} without rows", "at least one frame", "collect demonstrations first")
    mean = total / n_rows
    spread = sum(np.square(block.astype(np.float64) - mean).sum(0) for block in blocks())
    marks = quantiles(blocks, n_rows, len(mean), (0.01, 0.99))
    values = (mean, np.sqrt(spread / n_rows), high.astype(np.float64), low.astype(np.float64), *marks)
    return {name: value.tolist() for name, value in zip(_FIELDS, values, strict=True)}


def action_mask(names: Sequence[str], gripper_dim: int | None | Literal["named"] = "named") -> list[bool]:
    """Which dimensions are normalised: all but the gripper. "named": the one called "gripper", if there is one."""
    if gripper_dim == "named":
        return [name != GRIPPER for name in names]
    if gripper_dim is not None and not 0 <= gripper_dim < len(names):
        raise problem(f"gripper_dim {gripper_dim}", f"0..{len(names) - 1}, or None", "correct the gripper's dimension")
    return [i != gripper_dim for i in range(len(names))]


def dataset_statistics(
    source: FrameSource,
    gripper_dim: int | None | Literal["named"] = "named",
    episodes: Sequence[int] | None = None,
) -> dict[str, Any]:
    """One dataset's entry. `episodes` limits it, e.g. to those trained on; `gripper_dim` as in `action_mask`."""
    spans = [source.episodes[i] for i in (range(source.n_episodes) if episodes is None else episodes)]
    mask = action_mask(source.action_names, gripper_dim)
    entry: dict[str, Any] = {"action": _of_spans(source.actions(), spans, f"action of {source.where}")}
    entry["action"]["mask"] = mask
    states = source.states()
    if states is not None:
        entry["proprio"] = _of_spans(states, spans, f"state of {source.where}")
    return entry | {"num_transitions": sum(s.stop - s.start for s in spans), "num_trajectories": len(spans)}


def _of_spans(rows: np.ndarray, spans: Sequence[Any], where: str) -> dict[str, list[float]]:
    """Of the rows of these episodes; all of them are not copied."""
    if spans and sum(s.stop - s.start for s in spans) == len(rows):
        return vector_statistics(rows, where)
    chosen = [rows[s.start : s.stop] for s in spans]
    return vector_statistics(np.concatenate(chosen) if chosen else rows[:0], where)


def constant_dimensions(entry: Mapping[str, Any]) -> dict[str, list[int]]:
    """Group ("action", "proprio") -> the dimensions that never change in the data; groups without any are left out."""
    found = {}
    for group in ("action", "proprio"):
        if group in entry:
            same = np.flatnonzero(np.equal(entry[group]["min"], entry[group]["max"])).tolist()
            found |= {group: same} if same else {}
    return found


def constant_warnings(statistics: Statistics) -> list[str]:
    """A line for each dataset and group with dimensions that never or hardly change, for printing."""
    found = []
    for dataset, entry in statistics.items():
        constant = constant_dimensions(entry)
        for group, dimensions in constant.items():
            found.append(f"{dataset}: {group} dimensions {', '.join(map(str, dimensions))} never change; they are kept at "
                         "their one value")  # fmt: skip
        action = entry["action"]
        flat = np.flatnonzero(np.equal(action["q01"], action["q99"]) & np.array(action.get("mask", True))).tolist()
        rare = [d for d in flat if d not in constant.get("action", ())]
        if rare:
            found.append(f"{dataset}: action dimensions {', '.join(map(str, rare))} have q01 = q99 but other values too, which "
                         "no token can tell apart; leave the dimension un-normalised, or mend the data")  # fmt: skip
    return found


def statistics_hash(source: FrameSource, declared: Mapping[str, Any] | None = None) -> str:
    """16 hex digits that tell data apart by what they declare: names, sizes, episode lengths, and whatever else decides
    the numbers, e.g. `declared={"split": "train[:95%]", "standardizer": row}`. The numbers themselves are not read."""
    stops = np.array([span.stop for span in source.episodes], np.int64)
    fields = {
        "name": source.name, "action_names": list(source.action_names), "state_names": list(source.state_names),
        "n_frames": len(source), "n_episodes": source.n_episodes, "fps": source.fps,
        "episodes": hashlib.sha256(stops.tobytes()).hexdigest(), "declared": dict(declared or {}),
    }  # fmt: skip
    return hashlib.sha256(json.dumps(fields, sort_keys=True, default=str).encode()).hexdigest()[:16]


def data_hash(source: FrameSource) -> str:
    """16 hex digits that change with the actions and states too, and with the commit of a dataset on the Hub."""
    found = hashlib.sha256(f"{statistics_hash(source)} {source.revision}".encode())
    for rows in (source.actions(), source.states()):
        if rows is not None:
            found.update(np.ascontiguousarray(rows).data)
    return found.hexdigest()[:16]


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
