"""The files of a dataset on the Hub, in parts that can be read one without the others."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from vla.finetune.data.open_folder import open_folder
from vla.finetune.formats.hdf5_reader import Hdf5Reader
from vla.finetune.formats.hub import (
    HDF5,
    INFO,
    PREFIX,
    RLDS,
    HubAddress,
    Listing,
    download,
    open_lerobot,
    snapshot_folder,
    some_of,
)
from vla.finetune.formats.hub_cache import CachedFiles
from vla.finetune.formats.lerobot_faults import leave_out_bad
from vla.finetune.formats.lerobot_reader import LeRobotReader
from vla.finetune.formats.source import FrameSource
from vla.finetune.formats.tfds_info import dataset_root, read_dataset_info
from vla.types import problem

PART_CACHE_MB = 32
"""Encoded frames that are kept of each part of a LeRobotDataset."""


@dataclass(frozen=True)
class Part:
    """Some whole episodes: a data file of a LeRobotDataset with the videos of its episodes, a shard, an HDF5 file."""

    files: tuple[Path, ...]
    """Where they are in the cache of huggingface_hub, or will be."""
    open: Callable[[], FrameSource]
    """Their reader, which downloads them as they are needed."""


def parts_of(address: HubAddress, listing: Listing, name: str, skip_bad: bool, cached: CachedFiles) -> list[Part]:
    """All parts, in order; of an RLDS dataset those of `train`. `cached` takes the files that they read.

    Raises:
        VlaError: no format that is known.
    """
    if INFO in listing.names:
        reader = open_lerobot(address, listing, name, cached=cached)
        reader.cache_mb = PART_CACHE_MB
        return [_lerobot(part, skip_bad) for part in reader.parts()]
    if any(file.split("/")[-1] == RLDS for file in listing.names):
        return _rlds(address, listing, name, skip_bad, cached)
    found = [file for file in listing.names if file.endswith(HDF5)]
    if not found:
        raise problem(f"{address} with {some_of(listing.names)}", f"{INFO} (LeRobot), {RLDS} (RLDS) or *.hdf5 (LIBERO)",
                      f"name the folder that holds one dataset: {PREFIX}OWNER/NAME/FOLDER")  # fmt: skip
    return [_hdf5(address, listing, name, file, skip_bad, cached) for file in found]


def _lerobot(part: LeRobotReader, skip_bad: bool) -> Part:
    def open_part() -> FrameSource:
        if skip_bad and not part.bad:
            part.bad = leave_out_bad(part)
        return part

    return Part(tuple(part.files()), open_part)


def _hdf5(address: HubAddress, listing: Listing, name: str, file: str, skip_bad: bool, cached: CachedFiles) -> Part:
    path = snapshot_folder(address, listing.commit) / file

    def open_part() -> FrameSource:
        cached.take(path, lambda: download(address, file, listing.commit))
        return Hdf5Reader(path, name, skip_bad)

    return Part((path,), open_part)


def _rlds(address: HubAddress, listing: Listing, name: str, skip_bad: bool, cached: CachedFiles) -> list[Part]:
    for file in listing.names:
        if file.endswith((".json", ".labels.txt")):
            download(address, file, listing.commit)
    top = snapshot_folder(address, listing.commit)
    root = dataset_root(top)
    splits = read_dataset_info(root).splits
    if "train" not in splits:
        raise problem(f"{address} with the splits {', '.join(splits)}", "a split named train", "open the dataset whole")
    found, start = [], 0
    for path, length in zip(splits["train"].files, splits["train"].lengths, strict=True):

        def open_part(path: Path = path, split: str = f"train[{start}:{start + length}]") -> FrameSource:
            cached.take(path, lambda: download(address, path.relative_to(top).as_posix(), listing.commit))
            return open_folder(root, split, name=name, skip_bad=skip_bad)

        if length:
            found.append(Part((path,), open_part))
        start += length
    return found
