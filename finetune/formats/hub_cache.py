"""Which downloaded files are kept, where several processes read one cache."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Callable, Iterable, Iterator
from io import TextIOWrapper
from pathlib import Path

from vla.types import problem

TRIES = 20


class CachedFiles:
    """The files of a dataset that its readers downloaded: those of all processes together are kept below `max_gb`.

    A file is locked (flock) while it is in use, so that no process deletes it under another. What was downloaded in some
    other way is not listed and never deleted.

    Args:
        listing: text file with the path of each downloaded file, for this process and those after it.
    """

    def __init__(self, max_gb: float, listing: Path) -> None:
        self.max_bytes, self.listing = max_gb * 1e9, listing
        self._locks: dict[Path, int] = {}
        self._released: dict[Path, None] = {}
        """In the order of their last use by this process."""

    def take(self, path: Path, fetch: Callable[[], object]) -> None:
        """From now on until `release` the file is there; `fetch` downloads it."""
        if path in self._locks:
            return
        for _ in range(TRIES):
            if not path.exists():
                with self._listed() as file:
                    file.write(f"{path}\n")
                fetch()
            with contextlib.suppress(FileNotFoundError):  # deleted in between
                lock = os.open(path, os.O_RDONLY)
                fcntl.flock(lock, fcntl.LOCK_SH)
                with contextlib.suppress(FileNotFoundError):
                    if os.path.samestat(os.fstat(lock), path.stat()):
                        self._locks[path] = lock
                        return
                os.close(lock)
        raise problem(f"{path}, deleted {TRIES} times while it was fetched", "a cache that is left alone",
                      "allow more with cache_gb")  # fmt: skip

    def release(self, paths: Iterable[Path]) -> None:
        """These are not read any more."""
        for path in paths:
            if path in self._locks:
                os.close(self._locks.pop(path))
                self._released.pop(path, None)
                self._released[path] = None

    def close(self) -> None:
        """Nothing is in use by this process: in a forked one, what its parent has in use."""
        for lock in self._locks.values():
            os.close(lock)
        self._locks.clear()

    def shrink(self) -> bool:
        """Delete the oldest files that nobody reads, until the rest fits. Returns whether it does."""
        with self._listed() as file:
            file.seek(0)
            there = [path for path in map(Path, dict.fromkeys(file.read().splitlines())) if path.exists()]
            ages = {path: age for age, path in enumerate(self._released)}
            there.sort(key=lambda path: ages.get(path, -1))  # stable: those of other processes come first, as listed
            sizes = {path: path.stat().st_size for path in there}
            total = sum(sizes.values())
            for path in there:
                if total > self.max_bytes and path not in self._locks and _delete(path):
                    total -= sizes.pop(path)
            file.seek(0)
            file.truncate()
            file.writelines(f"{path}\n" for path in sizes)
        return total <= self.max_bytes

    @contextlib.contextmanager
    def _listed(self) -> Iterator[TextIOWrapper]:
        """The listing, locked, at its end."""
        with self.listing.open("a+", encoding="utf-8") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield file
            file.flush()


def _delete(path: Path) -> bool:
    """False if another process reads it."""
    try:
        lock = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return True
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        blob = path.resolve()  # of huggingface_hub's cache: what the snapshot's link points to
        path.unlink(missing_ok=True)
        if not _in_other_snapshot(path, blob):
            blob.unlink(missing_ok=True)
        return True
    except BlockingIOError:
        return False
    finally:
        os.close(lock)


def _in_other_snapshot(path: Path, blob: Path) -> bool:
    """Whether another commit in huggingface_hub's cache has the same file: one that was downloaded in another way, say."""
    snapshots = next((folder for folder in path.parents if folder.name == "snapshots"), None)
    if snapshots is None:
        return False
    name = Path(*path.relative_to(snapshots).parts[1:])
    return any((commit / name).exists() and (commit / name).samefile(blob) for commit in snapshots.iterdir())
