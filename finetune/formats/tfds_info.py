"""`dataset_info.json` and `features.json` of tensorflow_datasets: what a dataset holds, in which files, and what a split is.

The rules of splits (`train[:95%]+val[10:20]`) are TFDS's own (tensorflow_datasets/core/splits.py): a percentage becomes
the nearest whole number of episodes, halves to the even one.
"""

from __future__ import annotations

import difflib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vla.types import VlaError, problem

DATASET_INFO, FEATURES = "dataset_info.json", "features.json"
FILENAME_TEMPLATE = "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"
SHARD_DIGITS = 5

PART = re.compile(r"(?P<name>[\w-]+)(\[(?P<selector>[\d\w%:.-]+)\])?")
BOUNDARY = re.compile(r"((?P<value>-?[\d_.]+)(?P<unit>%|shard)?)?")
SYNTAX = "a split such as 'train', 'train[:95%]', 'train[10:20]', 'train[:2shard]' or 'train+test'"


@dataclass(frozen=True)
class Split:
    """One named split: its shards, each with its number of episodes."""

    name: str
    files: tuple[Path, ...]
    lengths: tuple[int, ...]


@dataclass(frozen=True)
class ShardSlice:
    """Episodes `skip` .. `skip + take - 1` of a shard that holds `length`."""

    path: Path
    skip: int
    take: int
    length: int


@dataclass(frozen=True)
class Info:
    """A dataset as its `dataset_info.json` tells."""

    root: Path
    """The folder of the version."""
    name: str
    """The name in the file names."""
    version: str
    splits: dict[str, Split]


def dataset_root(root: Path | str) -> Path:
    """The folder of the version that a user means: it, or the only version below it. VlaError if there is none."""
    root = Path(root)
    if not root.is_dir():
        raise problem(f"{root}: no such folder", "the folder of an RLDS/TFDS dataset", "check the path")
    if (root / DATASET_INFO).is_file():
        return root
    found = sorted(file.parent for depth in ("*", "*/*") for file in root.glob(f"{depth}/{DATASET_INFO}"))
    if len(found) == 1:
        return found[0]
    if found:
        names = ", ".join(str(folder.relative_to(root)) for folder in found)
        raise problem(f"{root} with {len(found)} datasets or versions ({names})", "one", f"name one, e.g. {found[-1]}")
    raise problem(f"{root} without {DATASET_INFO}", f"a TFDS dataset: {DATASET_INFO}, {FEATURES} and *.tfrecord-* shards",
                  "give the folder of the version, e.g. bridge_orig/1.0.0")  # fmt: skip


def read_dataset_info(root: Path) -> Info:
    """`dataset_info.json` of a version's folder. VlaError if it is damaged or the files are not TFRecords."""
    path = root / DATASET_INFO
    content = read_json(path)
    kind = content.get("fileFormat", "tfrecord")
    if kind != "tfrecord":
        raise problem(f"{path}: fileFormat {kind!r}", "'tfrecord'", "write the dataset with file_format='tfrecord'")
    name = content.get("name")
    if not isinstance(name, str) or not isinstance(content.get("splits"), list):
        raise problem(f"{path} without a name or splits", "a file written by tensorflow_datasets", "copy it again")
    splits = {}
    for row in content["splits"]:
        split = _split(root, path, name, row)
        splits[split.name] = split
    return Info(root, name, str(content.get("version", "")), splits)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. VlaError naming the file if it is missing or not one."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise problem(f"{path}: {error.strerror}", "a file written by tensorflow_datasets", "copy it again") from error
    except ValueError as error:
        raise problem(f"{path}: {error}", "JSON", "the file is damaged: copy it again") from error
    if not isinstance(content, dict):
        raise problem(f"{path} that holds no object", "a JSON object", "the file is damaged: copy it again")
    return content


def select(info: Info, text: str) -> list[ShardSlice]:
    """The shards, in order, that a split string selects. VlaError if it is malformed, unknown or selects nothing."""
    slices = [part for piece in re.split(r"\s*\+\s*", text.strip()) for part in _select_one(info, piece)]
    if not slices:
        sizes = ", ".join(f"{split.name} has {sum(split.lengths)}" for split in info.splits.values())
        raise problem(f"split {text!r} of {info.root}, which selects no episode", f"one that does ({sizes})",
                      "choose a larger slice")  # fmt: skip
    return slices


def boundaries(text: str, lengths: tuple[int, ...]) -> tuple[int, int]:
    """(first, stop) of a selector such as "10:20", ":95%" or "1shard" in a split whose shards have `lengths` episodes."""
    n, values, units = sum(lengths), [], []
    ends = text.split(":")
    for end in ends:
        match = BOUNDARY.fullmatch(end)
        if match is None or len(ends) > 2:
            raise problem(f"slice [{text}]", SYNTAX, "mend the slice")
        values.append(match["value"])
        units.append(match["unit"])
    unit = next((unit for unit in units if unit), "abs")
    if not any(values) or (len(ends) == 1 and unit != "shard"):
        raise problem(f"slice [{text}]", SYNTAX, "mend the slice")
    try:
        numbers = [None if value is None else float(value) if unit == "%" else int(value) for value in values]
    except ValueError as error:
        raise problem(f"slice [{text}]", SYNTAX, "mend the slice") from error
    first, stop = numbers if len(ends) == 2 else (numbers[0], int(numbers[0] or 0) + 1)
    if unit == "%" and max(abs(first or 0), abs(stop or 0)) > 100:
        raise problem(f"slice [{text}]", "percentages from -100 to 100", "mend the slice")
    if unit == "shard":
        stop = len(lengths) + stop if stop is not None and stop <= 0 else stop
        first, stop = (None if x is None else sum(lengths[: int(x)]) for x in (first, stop))
    elif unit == "%":
        first, stop = (None if x is None else round(x * n / 100.0) for x in (first, stop))
    first, stop = int(first or 0), n if stop is None else int(stop)
    if max(abs(first), abs(stop)) > n:
        raise problem(f"slice [{text}]", f"one within the {n} episodes of the split", "mend the slice")
    return first + n * (first < 0), stop + n * (stop < 0)


def _select_one(info: Info, text: str) -> list[ShardSlice]:
    match = PART.fullmatch(text)
    if match is None:
        raise problem(f"split {text!r}", SYNTAX, "mend the split")
    name, selector = match["name"], match["selector"]
    if name == "all" and "all" not in info.splits:
        if selector:
            raise problem(f"split {text!r}", "'all' without a slice", "slice the splits one by one")
        return [part for split in info.splits for part in _select_one(info, split)]
    if name not in info.splits:
        known = list(info.splits)
        near = difflib.get_close_matches(name, known, 1)
        raise problem(f"split {name!r} of {info.root}", f"one of {', '.join(known)}", f"use {(near or known)[0]!r}")
    split = info.splits[name]
    first, stop = (0, sum(split.lengths)) if selector is None else boundaries(selector, split.lengths)
    slices, start = [], 0
    for path, length in zip(split.files, split.lengths, strict=True):
        skip, end = max(first - start, 0), min(stop - start, length)
        if skip < end:
            slices.append(ShardSlice(path, skip, end - skip, length))
        start += length
    return slices


def _split(root: Path, path: Path, dataset: str, row: Any) -> Split:
    try:
        name, lengths = row["name"], tuple(int(n) for n in row.get("shardLengths", ()))
        template = row.get("filepathTemplate") or FILENAME_TEMPLATE
        files = tuple(root / _file_name(template, dataset, name, i, len(lengths)) for i in range(len(lengths)))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise problem(f"{path}: splits entry {row!r} ({error!r})", "name, shardLengths and filepathTemplate",
                      "copy the file again") from error  # fmt: skip
    if not lengths and "shardLengths" not in row:
        raise _no_lengths(path, name)
    return Split(name, files, lengths)


def _no_lengths(path: Path, name: str) -> VlaError:
    return problem(f"{path}: split {name!r} without shardLengths", "a dataset of tensorflow_datasets 4 or later",
                   "write dataset_info.json again: `tfds.folder_dataset.write_metadata`")  # fmt: skip


def _file_name(template: str, dataset: str, split: str, index: int, total: int) -> str:
    digits = max(SHARD_DIGITS, len(str(total)))
    shard, count = f"{index:0{digits}d}", f"{total:0{digits}d}"
    return template.format(DATASET=dataset, SPLIT=split, FILEFORMAT="tfrecord", SHARD_INDEX=shard, NUM_SHARDS=count,
                           SHARD_X_OF_Y=f"{shard}-of-{count}")  # fmt: skip
