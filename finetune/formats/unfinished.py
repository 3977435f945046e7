"""A folder while it is being written: who writes it, and how what was begun is finished.

unfinished.json    {"command": ...}; from the first moment to the last, of a LeRobot dataset (a cache has writing.json)
.convert.lock      empty; held by the process that writes, and let go by the system when that process is killed
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import os
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vla.files import write_json
from vla.types import problem

UNFINISHED_JSON, LOCK = "unfinished.json", ".convert.lock"


def begin(folder: Path, command: str) -> None:
    """From here on `check_finished` refuses the folder and names `command`."""
    write_json(folder / UNFINISHED_JSON, {"command": command})


def end(folder: Path) -> None:
    """The folder is whole."""
    (folder / UNFINISHED_JSON).unlink(missing_ok=True)


def check_finished(folder: Path) -> None:
    """VlaError naming the command that continues, if the folder was begun and not finished."""
    path = folder / UNFINISHED_JSON
    if path.is_file():
        command = read_object(path, "remove the folder and begin anew").get("command", "the command that began it")
        raise problem(f"an unfinished dataset in {folder}", f"one without {UNFINISHED_JSON}, which is removed last",
                      f"run `{command}` again: it continues")  # fmt: skip


def is_new(folder: Path) -> bool:
    """Whether nothing has been written there: no folder, or one with no more than what this module puts there."""
    if not folder.exists():
        return True
    return folder.is_dir() and all(path.name in (UNFINISHED_JSON, LOCK) for path in folder.iterdir())


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """One process at a time. The folder is made; it is removed again if nothing was written into it.

    Raises:
        VlaError: another process is writing the folder, or it cannot be written at all.
    """
    made = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = _locked_file(folder / LOCK)
    except FileExistsError as error:
        raise problem(f"{folder}, a file", "a folder", "choose another --out") from error
    except BlockingIOError as error:
        raise problem(f"{folder}, which another process is writing", "one at a time",
                      "wait for it or stop it, or choose another --out") from error  # fmt: skip
    except OSError as error:
        raise problem(f"{folder}: {error.strerror}", "a folder that can be written", "choose another --out") from error
    try:
        yield
    finally:
        (folder / LOCK).unlink(missing_ok=True)
        os.close(file)
        if made:
            with contextlib.suppress(OSError):  # it is not empty, as a rule
                folder.rmdir()


def _locked_file(path: Path) -> int:
    """Descriptor of the locked file that is at `path`, not of one that its last holder has just removed."""
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if path.exists() and os.path.samestat(os.fstat(file), path.stat()):
                return file
        except BaseException:
            os.close(file)
            raise
        os.close(file)


def command_of(program: str, settings: Any) -> str:
    """The command line of these settings: the words without a flag are the field `source`, defaults are left out."""
    words, flags = ["vla", *program.split()], []
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        flag = f"--{field.name.replace('_', '-')}"
        if field.name == "source":
            words.append(str(value))
        elif value == field.default:
            continue
        elif isinstance(value, bool):
            flags.append(flag if value else f"--no-{flag[2:]}")
        else:
            flags += [flag, *map(str, value if isinstance(value, tuple) else (value,))]
    return shlex.join([*words, *flags])


def read_object(path: Path, fix: str) -> dict[str, Any]:
    """A JSON object; VlaError naming the file if it is damaged."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise problem(f"{path}: {error}", "JSON", fix) from error
    if not isinstance(value, dict):
        raise problem(f"{path}: {type(value).__name__}", "a JSON object", fix)
    return value
