"""The episodes of a dataset on the Hub one by one, for datasets larger than the disk: LeRobot, RLDS and HDF5."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from vla.finetune.data.open_folder import open_folder
from vla.finetune.formats.hdf5_reader import Hdf5Reader
from vla.finetune.formats.hub import (
    HDF5,
    INFO,
    RLDS,
    HubAddress,
    Listing,
    download,
    list_files,
    open_lerobot,
    parse_address,
    snapshot_folder,
    some_of,
)
from vla.finetune.formats.tfds_info import dataset_root, read_dataset_info
from vla.types import Episode, problem


def stream(
    text: str, name: str | None = None, cameras: Sequence[str] | None = None, max_cached_gb: float = 20.0
) -> Iterator[Episode]:
    """All episodes in order, one in memory at a time; of an RLDS dataset those of `train`.

    One data file (with the videos of its episodes) is downloaded at a time. When what this call has downloaded exceeds
    `max_cached_gb` (1e9 bytes), the files used longest ago are deleted from the cache; files that were there before
    are left alone, and so are tables.
    """
    address = parse_address(text)
    listing = list_files(address)
    cached = CachedFiles(max_cached_gb)
    name = name or address.name
    if INFO in listing.names:
        yield from _lerobot(address, listing, name, cameras, cached)
    elif any(file.split("/")[-1] == RLDS for file in listing.names):
        yield from _rlds(address, listing, name, cameras, cached)
    elif any(file.endswith(HDF5) for file in listing.names):
        yield from _hdf5(address, listing, name, cameras, cached)
    else:
        raise problem(f"{address} with {some_of(listing.names)}", f"{INFO} (LeRobot), {RLDS} (RLDS) or *.hdf5 (LIBERO)",
                      "name the folder that holds one dataset: OWNER/NAME/FOLDER")  # fmt: skip


class CachedFiles:
    """The files that a stream has downloaded, in the order of their last use."""

    def __init__(self, max_gb: float) -> None:
        if not max_gb >= 0:
            raise problem(f"max_cached_gb {max_gb}", "0 or more", "correct it")
        self.max_bytes = max_gb * 1e9
        self.paths: dict[Path, None] = {}

    def use(self, paths: Iterable[Path]) -> None:
        """These are about to be read; the ones that are not there yet will have been downloaded by us."""
        for path in paths:
            if path in self.paths or not path.exists():
                self.paths.pop(path, None)
                self.paths[path] = None

    def shrink(self, needed_next: Iterable[Path] = ()) -> None:
        """Delete the oldest until the rest fits, but not what is needed next."""
        sizes = {path: path.stat().st_size for path in self.paths if path.exists()}
        total, keep = sum(sizes.values()), set(needed_next)
        for path, size in sizes.items():
            if total > self.max_bytes and path not in keep:
                path.resolve().unlink(missing_ok=True)  # the blob that the snapshot's link points to
                path.unlink(missing_ok=True)
                del self.paths[path]
                total -= size


def _lerobot(
    address: HubAddress, listing: Listing, name: str, cameras: Sequence[str] | None, cached: CachedFiles
) -> Iterator[Episode]:
    parts = list(open_lerobot(address, listing, name).parts())
    for k, part in enumerate(parts):
        cached.use(part.files())
        yield from part.iter_episodes(cameras)
        cached.shrink(parts[k + 1].files() if k + 1 < len(parts) else ())


def _hdf5(
    address: HubAddress, listing: Listing, name: str, cameras: Sequence[str] | None, cached: CachedFiles
) -> Iterator[Episode]:
    for file in listing.names:
        if file.endswith(HDF5):
            cached.use([snapshot_folder(address, listing.commit) / file])
            yield from Hdf5Reader(download(address, file, listing.commit), name).iter_episodes(cameras)
            cached.shrink()


def _rlds(
    address: HubAddress, listing: Listing, name: str, cameras: Sequence[str] | None, cached: CachedFiles
) -> Iterator[Episode]:
    for file in listing.names:
        if file.endswith((".json", ".labels.txt")):
            download(address, file, listing.commit)
    top = snapshot_folder(address, listing.commit)
    root = dataset_root(top)
    splits = read_dataset_info(root).splits
    if "train" not in splits:
        raise problem(f"{address} with the splits {', '.join(splits)}", "a split named train", "open the dataset whole")
    start = 0
    for path, length in zip(splits["train"].files, splits["train"].lengths, strict=True):
        if length:
            cached.use([path])
            download(address, path.relative_to(top).as_posix(), listing.commit)
            shard = open_folder(root, f"train[{start}:{start + length}]", name=name)
            yield from shard.iter_episodes(cameras)
            cached.shrink()
        start += length
