"""Datasets on the Hugging Face Hub, through `huggingface_hub` and its cache (HF_HOME, HF_TOKEN, HF_ENDPOINT,
HF_HUB_OFFLINE apply).

    lerobot/libero_10_image                                   the main branch
    hf://datasets/lerobot/libero_10_image@v3.0                a branch, tag or commit
    hf://datasets/OWNER/NAME@main/libero_goal                 a folder of it

`open_hub` reads a LeRobotDataset file by file: only meta/ is downloaded when it is opened, data and video files when a
frame of theirs is first asked for. Datasets of other formats are downloaded whole, because every file must be looked
into. `vla.finetune.formats.hub_source` keeps no more files than it is told to.

A file lies in the cache whole or not at all. A connection that breaks is taken up again where it broke; when that fails
too, the next run begins with the file that was cut.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from huggingface_hub import HfApi, constants, hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from vla.finetune.data.open_folder import open_folder
from vla.finetune.formats.hub_cache import CachedFiles
from vla.finetune.formats.lerobot_reader import LeRobotReader
from vla.finetune.formats.source import FrameSource, Unreachable
from vla.types import VlaError, problem

PREFIX = "hf://datasets/"
_ADDRESS = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(?:@(?P<revision>[^/]+))?(?:/(?P<folder>.+?))?/?")
_UNREAD = ("meta/stats.json", "meta/episodes_stats.jsonl")  # our readers never use stored statistics
INFO = "meta/info.json"
RLDS = "dataset_info.json"
HDF5 = (".hdf5", ".h5")
_HTTP_ERROR = cast(type[Exception], HfHubHTTPError.__bases__[0])  # of the HTTP library that this version of it uses


@dataclass(frozen=True)
class HubAddress:
    """A dataset repository at a revision, or a folder of it."""

    repo: str
    """OWNER/NAME."""
    revision: str = "main"
    folder: str = ""

    def __str__(self) -> str:
        return f"{PREFIX}{self.repo}@{self.revision}" + (f"/{self.folder}" if self.folder else "")

    @property
    def name(self) -> str:
        """The last part of the folder, else of the repository."""
        return (self.folder or self.repo).split("/")[-1]

    def path(self, name: str) -> str:
        """A file of the dataset as a path in the repository."""
        return f"{self.folder}/{name}" if self.folder else name


@dataclass(frozen=True)
class HubFiles:
    """Called with the local path of a file of a dataset, downloads it there unless it is there. Picklable without `cached`."""

    address: HubAddress
    commit: str
    root: Path
    """Where the dataset's folder lies in the cache, in the snapshot of `commit`."""
    cached: CachedFiles | None = None
    """What decides which files are kept; None: all are."""

    def __call__(self, path: Path) -> None:
        if self.cached is not None:
            self.cached.take(path, lambda: self.fetch(path.relative_to(self.root).as_posix()))
        elif not path.exists():
            self.fetch(path.relative_to(self.root).as_posix())

    def fetch(self, name: str) -> Path:
        """The local path of a file, downloaded if need be."""
        return download(self.address, name, self.commit)


@dataclass(frozen=True)
class Listing:
    """The files of a dataset at one commit, as paths inside its folder."""

    commit: str
    names: tuple[str, ...]


def parse_address(text: str) -> HubAddress:
    """`OWNER/NAME[@REVISION][/FOLDER]`, with or without `hf://datasets/` before it."""
    found = _ADDRESS.fullmatch(text.removeprefix(PREFIX))
    folder = (found["folder"] or "") if found else ""
    if not found or ".." in folder.split("/") or text.startswith("hf://") != text.startswith(PREFIX):
        raise problem(f"address {text!r}", f"{PREFIX}OWNER/NAME[@REVISION][/FOLDER], or OWNER/NAME", "correct it")
    return HubAddress(found["repo"], found["revision"] or "main", folder)


def open_hub(text: str, name: str | None = None, skip_bad: bool = False) -> FrameSource:
    """The dataset at this address. `name` is its `unnorm_key`; None: the folder's or repository's name.

    With `skip_bad` every data file of a LeRobotDataset is downloaded now, to be looked into.

    Raises:
        VlaError: no such dataset, no access, no connection and not in the cache, or no format that is known.
    """
    address = parse_address(text)
    listing = list_files(address)
    if INFO in listing.names:
        found: FrameSource = open_lerobot(address, listing, name, skip_bad)
        found.revision = listing.commit
        return found
    paths = [download(address, file, listing.commit) for file in _wanted(address, listing)]
    found = open_folder(_root_of(address, listing, paths[0]), name=name or address.name, skip_bad=skip_bad)
    found.revision = listing.commit
    return found


def list_files(address: HubAddress) -> Listing:
    """What there is at an address. Without a connection: what the cache has of it."""
    try:
        info = HfApi().dataset_info(address.repo, revision=address.revision)
    except (_HTTP_ERROR, OSError, ValueError) as error:
        if _is_answer(error):
            raise _explained(error, address, "") from error
        return _cached_listing(address, error)
    prefix = f"{address.folder}/" if address.folder else ""
    files = [sibling.rfilename for sibling in info.siblings or ()]
    names = tuple(sorted(file.removeprefix(prefix) for file in files if file.startswith(prefix)))
    if not names or info.sha is None:
        raise problem(f"no file in {address} (it has {some_of(files)})", "a dataset's folder", "correct the address")
    return Listing(info.sha, names)


def download(address: HubAddress, name: str, commit: str | None = None) -> Path:
    """A file of the dataset in the cache. Without `commit` the address's revision is looked up and remembered."""
    try:
        return Path(hf_hub_download(address.repo, address.path(name), repo_type="dataset",
                                    revision=commit or address.revision))  # fmt: skip
    except (_HTTP_ERROR, OSError, ValueError) as error:
        raise _explained(error, address, address.path(name)) from error


def open_lerobot(
    address: HubAddress, listing: Listing, name: str | None, skip_bad: bool = False, cached: CachedFiles | None = None
) -> LeRobotReader:
    """A LeRobotDataset whose tables are downloaded now and whose other files when they are read."""
    info = download(address, INFO)  # by its revision, so that the cache remembers which commit that was
    root = _root_of(address, listing, info, INFO)
    for file in listing.names:
        if file.startswith("meta/") and file not in _UNREAD:
            download(address, file, listing.commit)
    need = HubFiles(address, listing.commit, root, cached)
    return LeRobotReader(root, name or address.name, need=need, skip_bad=skip_bad)


def _wanted(address: HubAddress, listing: Listing) -> list[str]:
    """The files of a dataset that is not LeRobot's: HDF5, or TFDS with its metadata."""
    is_rlds = any(name.split("/")[-1] == RLDS for name in listing.names)
    kinds = (".json", ".labels.txt") if is_rlds else HDF5
    found = [name for name in listing.names if name.endswith(kinds) or (is_rlds and ".tfrecord-" in name)]
    if not found:
        raise problem(f"{address} with {some_of(listing.names)}", f"{INFO} (LeRobot), *.hdf5 (LIBERO) or dataset_info.json "
                      "(RLDS)", f"name the folder that holds one dataset: {PREFIX}OWNER/NAME/FOLDER")  # fmt: skip
    return found


def snapshot_folder(address: HubAddress, commit: str) -> Path:
    """Where the dataset's folder lies in the cache."""
    folder = f"datasets--{address.repo.replace('/', '--')}"
    return Path(constants.HF_HUB_CACHE) / folder / "snapshots" / commit / address.folder


def _root_of(address: HubAddress, listing: Listing, path: Path, name: str | None = None) -> Path:
    """The dataset's folder in the snapshot."""
    if name is not None and listing.commit not in path.parts:
        raise problem(
            f"{address} at another commit than {listing.commit}", "one commit", "it has just changed: try again"
        )
    return path.parents[len(name.split("/")) - 1] if name is not None else snapshot_folder(address, listing.commit)


def _cached_listing(address: HubAddress, error: Exception) -> Listing:
    info = try_to_load_from_cache(address.repo, address.path(INFO), revision=address.revision, repo_type="dataset")
    if not isinstance(info, str):
        raise _explained(error, address, "") from error
    root = Path(info).parents[1]
    commit = root.parts[root.parts.index("snapshots") + 1]
    return Listing(commit, tuple(sorted(p.relative_to(root).as_posix() for p in root.rglob("*") if p.is_file())))


def _is_answer(error: Exception) -> bool:
    """Whether the Hub answered that it will not, so that looking into the cache instead would hide something."""
    return isinstance(error, HfHubHTTPError) and error.response.status_code < 500


def _explained(error: Exception, address: HubAddress, file: str) -> VlaError:
    """What to tell the user; `Unreachable` unless the Hub says that there is no such file."""
    said = _said(error, address, file)
    missing = isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError)
    return said if missing else Unreachable(str(said))


def _said(error: Exception, address: HubAddress, file: str) -> VlaError:
    what = f"{file} of {address}" if file else str(address)
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    status = error.response.status_code if isinstance(error, HfHubHTTPError) else 0
    if isinstance(error, RepositoryNotFoundError) or status in (401, 403):
        return problem(f"no access to {what}: {reason}", "a dataset that exists and that you may read",
                       "correct the name; for a private or gated dataset accept its terms and run `hf auth login`")  # fmt: skip
    if isinstance(error, RevisionNotFoundError):
        return problem(
            f"no revision {address.revision!r}: {what}", "a branch, tag or commit of it", "correct what follows @"
        )
    if isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError):
        return problem(
            f"no {what}", "every file that the dataset's tables name", "the dataset on the Hub is incomplete"
        )
    if isinstance(error, HfHubHTTPError):
        return problem(f"{what}: {reason}", "an answer with the file", "the Hub has a fault: try again later")
    if isinstance(error, ValueError) or (isinstance(error, OSError) and error.errno is not None):
        return problem(f"{what}: {reason}", "a file in the cache", f"see to {constants.HF_HUB_CACHE} and start again")
    return problem(f"{what} is not in the cache and the Hub cannot be reached ({type(error).__name__}: {reason})",
                   f"a connection to {constants.ENDPOINT}, or the dataset in {constants.HF_HUB_CACHE}",
                   "connect (HF_HUB_OFFLINE unset) and start again: files that are there already are kept")  # fmt: skip


def some_of(names: Sequence[str]) -> str:
    """The first names of a list, for messages."""
    return ", ".join(names[:6]) + (", ..." if len(names) > 6 else "") or "nothing"
