"""The index of an RLDS dataset, kept so that the next opening does not read the dataset.

It lies in a cache folder (`$VLA_CACHE`, else ~/.cache/vla), never beside the data, and is used only if its checksum holds,
the files and the rule are those it was made from, and three episodes read again give what it says.
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np

from vla.files import write_bytes
from vla.finetune.data.standard import Standardizer
from vla.finetune.formats.index_file import packed, unpacked
from vla.finetune.formats.rlds_index import Index, Plan, Rows, build, read_episode
from vla.finetune.formats.source import BadEpisode
from vla.finetune.formats.tfds_info import DATASET_INFO, FEATURES
from vla.finetune.formats.tfrecord import Record, read_record
from vla.types import VlaError, problem

FORMAT = 2  # raise it when the arrays or the way they are made change


def load_or_build(plan: Plan) -> Index:
    """The index from the cache, or from the dataset (with a progress bar) if there is none that can be trusted."""
    path, state = _cache_path(plan), _state(plan)
    index = _load(path, state, plan)
    if index is None:
        _check_writable(path.parent)
        index = build(plan)
        write_bytes(path, _packed(index, state))
    return index


def cache_folder() -> Path:
    """`$VLA_CACHE`, else ~/.cache/vla."""
    named = os.environ.get("VLA_CACHE")
    return Path(named).expanduser() if named else Path.home() / ".cache" / "vla"


def _check_writable(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise problem(
            f"{folder}: {error.strerror}", "a folder for the index of the dataset", "set VLA_CACHE to one"
        ) from error
    if not os.access(folder, os.W_OK):
        raise problem(
            f"{folder}, which cannot be written", "a folder for the index", "set VLA_CACHE to one that can be"
        )


def _cache_path(plan: Plan) -> Path:
    """One file for each dataset folder, split, rule and `skip_bad`: a stale one is written over, not left behind."""
    parts = [(part.path.name, part.skip, part.take) for part in plan.slices]
    asked = [str(plan.root.resolve()), parts, _rule_hash(plan.rule), plan.skip_bad]
    return cache_folder() / "rlds" / f"{hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:24]}.index"


def _rule_hash(rule: Standardizer) -> str:
    try:
        return hashlib.sha256(pickle.dumps(rule, protocol=4)).hexdigest()
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise problem(f"a standardizer that cannot be pickled ({error})", "one made of functions at the top of a module",
                      "move its functions there") from error  # fmt: skip


def _state(plan: Plan) -> bytes:
    """32 bytes that change with any file of the dataset."""
    rows: list[Any] = [FORMAT, plan.keys, plan.cameras]
    for path in [plan.root / FEATURES, plan.root / DATASET_INFO, *(part.path for part in plan.slices)]:
        stat = path.stat() if path.is_file() else None
        rows.append([path.name, stat and stat.st_size, stat and stat.st_mtime_ns])
    return hashlib.sha256(json.dumps(rows).encode()).digest()


def _packed(index: Index, state: bytes) -> bytes:
    bad = [[row.file, row.record, row.why] for row in index.bad]
    return packed(vars(index.rows), {"instructions": index.instructions, "bad": bad}, state)


def _load(path: Path, state: bytes, plan: Plan) -> Index | None:
    """The index of that file; None if there is none, or it is damaged, stale, or does not say what the dataset says."""
    found = unpacked(path, state)
    if found is None or found[0].keys() != {field.name for field in fields(Rows)}:
        return None
    arrays, text = found
    rows = Rows(**arrays)
    index = Index(rows, tuple(text["instructions"]), tuple(BadEpisode(*row) for row in text["bad"]))
    return index if _agrees(index, plan) else None


def _agrees(index: Index, plan: Plan) -> bool:
    """Whether the first, middle and last episode, read again, give what the index says: code may have changed."""
    n, stops = len(index.rows.lengths), np.cumsum(index.rows.lengths)
    try:
        return all(_episode_agrees(index, plan, e, int(stops[e])) for e in sorted({0, n // 2, n - 1}))
    except VlaError:  # building the index anew will say what is wrong
        return False


def _episode_agrees(index: Index, plan: Plan, episode: int, stop: int) -> bool:
    number, record, offset, length = (int(x) for x in index.rows.places[episode])
    data = read_record(plan.slices[number].path, record, offset, length)
    texts: dict[str, int] = {}
    rows = read_episode(plan, number, Record(record, offset, data), texts)
    mine, names = slice(stop - int(index.rows.lengths[episode]), stop), list(texts)
    numbers = ("actions", "states", "spans", "steps", *(("rewards",) if plan.has_reward else ()))
    same = all(
        np.array_equal(vars(rows)[name], vars(index.rows)[name][mine], equal_nan=name == "rewards") for name in numbers
    )
    return same and [names[k] for k in rows.texts] == [index.instructions[k] for k in index.rows.texts[mine]]
