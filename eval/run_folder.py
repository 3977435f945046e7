"""What makes a folder one evaluation's own, and how a run that has to stop says so."""

from __future__ import annotations

import errno
import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vla.eval.results import EPISODES_FILE, read_rows
from vla.files import write_json
from vla.types import VlaError, problem

SETTINGS_FILE = "settings.json"
SAMPLE_BYTES = 1 << 20
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)


def folder_digest(folder: Path) -> str:
    """sha256 over names, sizes and contents; of large files only the first and the last mebibyte are read."""
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        size = path.stat().st_size
        digest.update(f"{path.relative_to(folder)}\0{size}\0".encode())
        with open(path, "rb") as file:
            digest.update(file.read(SAMPLE_BYTES))
            file.seek(max(0, size - SAMPLE_BYTES))
            digest.update(file.read(SAMPLE_BYTES))
    return digest.hexdigest()


def claim(out: Path, identity: dict[str, Any]) -> None:
    """Make the folder this evaluation's own, or see that it is.

    Raises:
        VlaError: the folder holds another evaluation. Nothing is changed then.
    """
    path = out / SETTINGS_FILE
    if not path.exists():
        if (out / EPISODES_FILE).exists():
            raise problem(f"{out} with episodes but no {SETTINGS_FILE}", "both", "choose another --out")
        write_json(path, identity)
        return
    found = json.loads(path.read_text(encoding="utf-8"))
    for name, value in identity.items():
        if found.get(name) != value:
            raise problem(
                f"{name}={value!r} for {out}, which holds an evaluation with {name}={found.get(name)!r}",
                "the same settings", "choose another --out, or delete that folder to start afresh",
            )  # fmt: skip


def read_identity(folder: Path) -> dict[str, Any]:
    """What `claim` wrote. VlaError if there is none."""
    path = folder / SETTINGS_FILE
    if not path.exists():
        raise problem(f"no {SETTINGS_FILE} in {folder}", "the --out folder of a `vla eval`", "correct the name")
    return json.loads(path.read_text(encoding="utf-8"))


@contextmanager
def says_how_to_continue(out: Path, n_wanted: int) -> Iterator[None]:
    """Add to the user's mistakes, and to a full disk, what is kept and how to go on.

    Raises:
        VlaError: instead of the one that was raised inside, or of an OSError that says the disk takes no more.
    """
    try:
        yield
    except VlaError as error:
        raise VlaError(f"{error}. {_kept(out, n_wanted)}") from error
    except OSError as error:
        if error.errno not in DISK_ERRORS:
            raise
        where = error.filename or out
        got = f"{error.strerror} while writing {where}"
        raise VlaError(
            f"{problem(got, 'a disk that takes more', 'free some space')}. {_kept(out, n_wanted)}"
        ) from error


def _kept(out: Path, n_wanted: int) -> str:
    n_done = sum(row.fault is None for row in read_rows(out).values())
    return f"{n_done} of {n_wanted} episodes are finished and kept in {out}: once that is mended, run the same command again"
