"""Writing files so that a crash never leaves half of one."""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from vla.types import VlaError

_NO_PLACE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT, errno.ENOTDIR, errno.EEXIST, errno.EISDIR)


class UnwritableError(VlaError, OSError):
    """A file that the user named cannot be there. (A full disk stays an `OSError`.)"""


def write_bytes(path: Path, data: bytes) -> None:
    """Write to a temporary name beside `path`, fsync, rename over it. Creates the parent folder. What is no ordinary file,
    as /dev/null, stays what it is and is written to.

    Raises:
        UnwritableError: there is a folder of that name, or its folder cannot be made or written.
        OSError: anything else, such as a full disk.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        if path.exists() and not path.is_file():
            path.write_bytes(data)
            return
        opened = open(temporary, "wb")
    except OSError as error:
        if error.errno not in _NO_PLACE:
            raise
        raise UnwritableError(
            f"got {path}: {error.strerror}; expected a file that can be written; fix: choose another place"
        ) from error
    try:
        with opened as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:  # a full disk should not be fuller afterwards
        temporary.unlink(missing_ok=True)
        raise


def write_text(path: Path, text: str) -> None:
    """UTF-8 `write_bytes`."""
    write_bytes(path, text.encode())


def write_json(path: Path, value: Any) -> None:
    """Indented JSON; numpy arrays become lists, NaN is refused."""
    write_text(path, json.dumps(value, indent=2, default=_plain, allow_nan=False) + "\n")


def append_jsonl(path: Path, row: dict[str, Any]) -> None:
    """One JSON line, in a single write, so that readers never see half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(row, default=_plain) + "\n")


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """All whole lines; a last line cut by a crash is left out."""
    if not path.exists():
        return []
    rows = []
    lines = path.read_text(encoding="utf-8").split("\n")
    for line in lines[:-1]:  # the text after the last newline is empty or cut
        rows.append(json.loads(line))
    return rows


def swap_folder(new: Path, target: Path) -> None:
    """Fsync every file in `new`, then put it at `target`; what was there is removed afterwards."""
    for path in sorted(new.rglob("*")):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)
    old = target.with_name(f".{target.name}.{os.getpid()}.old")
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        os.replace(target, old)
    os.replace(new, target)
    shutil.rmtree(old, ignore_errors=True)


def _plain(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"{type(value).__name__} is not JSON")
