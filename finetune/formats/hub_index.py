"""The numbers of a dataset on the Hub, taken in one pass over its parts and kept in `$VLA_CACHE`."""

from __future__ import annotations

import fcntl
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from vla.files import write_bytes
from vla.finetune.data.without_bad import check_episode
from vla.finetune.formats.hub_cache import CachedFiles
from vla.finetune.formats.hub_parts import Part
from vla.finetune.formats.index_file import packed, unpacked
from vla.finetune.formats.source import FrameSource, Unreachable
from vla.progress import Progress
from vla.types import VlaError, problem

FORMAT = 1  # raise it when the arrays or the way they are made change
STATE = bytes(32)  # the file's name holds all that the index depends on

Facts = dict[str, Any]
"""JSON: what the parts have in common (fps, cameras, ...), `texts`, `bad`, `empty`, and of each episode in `episodes`: file,
record, success, seed, task."""


@dataclass(frozen=True)
class Numbers:
    """N frames of E episodes."""

    actions: np.ndarray
    """float32 (N, D)."""
    states: np.ndarray
    """float32 (N, S); (N, 0) if there is none."""
    rewards: np.ndarray
    """float32 (N,); (0,) if there is none."""
    texts: np.ndarray
    """int32 (N,): the instruction, as an index."""
    lengths: np.ndarray
    """int64 (E,): frames of each episode."""
    places: np.ndarray
    """int64 (E, 2): part, and episode of its reader."""


def load_or_build(
    path: Path, parts: Sequence[Part], where: str, cached: CachedFiles, skip_bad: bool
) -> tuple[Numbers, Facts]:
    """The index at `path`, made first if there is none. Of several processes one makes it and the others wait."""
    with path.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        found = _load(path, STATE)
        if found is None:
            found = _build(parts, where, cached, skip_bad)
            write_bytes(path, packed(vars(found[0]), found[1], STATE))
    return found


def _build(parts: Sequence[Part], where: str, cached: CachedFiles, skip_bad: bool) -> tuple[Numbers, Facts]:
    """The pass. With `skip_bad`, what is bad is listed and left out."""
    rows: dict[str, list[np.ndarray]] = {field.name: [] for field in fields(Numbers)}
    facts: Facts = {"texts": [], "episodes": [], "bad": [], "empty": []}
    texts: dict[str, int] = {}
    with Progress(f"indexing {where}", len(parts)) as progress:
        for number, part in enumerate(parts):
            try:
                _take(part.open(), number, skip_bad, rows, texts, facts)
            except Unreachable:
                raise
            except VlaError as error:
                if not skip_bad:
                    raise
                facts["bad"].append([str(part.files[0]), None, str(error)])
            cached.release(part.files)
            cached.shrink()
            progress.advance()
    if not rows["lengths"]:
        first = f" (first: {facts['bad'][0][2]})" if facts["bad"] else ""
        raise problem(f"{where} without one usable episode{first}", "at least one", "name another dataset")
    facts["texts"] = list(texts)
    return Numbers(**{name: np.concatenate(arrays) for name, arrays in rows.items()}), facts


def _take(
    reader: FrameSource,
    number: int,
    skip_bad: bool,
    rows: dict[str, list[np.ndarray]],
    texts: dict[str, int],
    facts: Facts,
) -> None:
    """Append what part `number` has."""
    rewards = reader.rewards()
    same = {
        "fps": reader.fps, "gripper": reader.gripper, "cameras": list(reader.cameras), "has_rewards": rewards is not None,
        "action_names": list(reader.action_names), "state_names": list(reader.state_names),
        "shapes": {camera: list(reader.image_shape(camera)) for camera in reader.cameras},
    }  # fmt: skip
    for name, value in same.items():
        if facts.setdefault(name, value) != value:
            raise problem(f"{reader.where} with {name} {value}", f"{facts[name]}, as the first file has",
                          "name the folder of one dataset")  # fmt: skip
    facts["empty"] += reader.empty
    facts["bad"] += [[row.file, row.record, row.why] for row in reader.bad]
    states, actions = reader.states(), reader.actions()
    for k, span in enumerate(reader.episodes):
        try:
            if skip_bad:
                check_episode(reader, k)
        except Unreachable:
            raise
        except VlaError as error:
            facts["bad"].append([*reader.place_of(k), str(error)])
            continue
        mine, n = slice(span.start, span.stop), span.stop - span.start
        said = [texts.setdefault(reader.instruction_of(i), len(texts)) for i in range(span.start, span.stop)]
        for name, values in (
            ("actions", actions[mine]), ("states", np.zeros((n, 0), np.float32) if states is None else states[mine]),
            ("rewards", np.zeros(0, np.float32) if rewards is None else rewards[mine]),
            ("texts", np.array(said, np.int32)), ("lengths", np.array([n], np.int64)),
            ("places", np.array([[number, k]], np.int64)),
        ):  # fmt: skip
            rows[name].append(np.array(values))  # a copy: the part's own is let go
        facts["episodes"].append([*reader.place_of(k), reader.success_of(k), reader.seed_of(k), reader.task_of(k)])


def _load(path: Path, state: bytes) -> tuple[Numbers, Facts] | None:
    """None if there is no index, or it is damaged."""
    found = unpacked(path, state)
    if found is None or found[0].keys() != {field.name for field in fields(Numbers)}:
        return None
    return Numbers(**found[0]), found[1]
