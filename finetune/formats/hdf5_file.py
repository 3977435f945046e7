"""One HDF5 file of LIBERO's demonstrations: opening it, and what its attributes say."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import h5py

from vla.types import problem

HDF5_ERRORS = (OSError, RuntimeError, KeyError)
"""What h5py raises for a damaged file."""


def signature(demo: Any) -> tuple[tuple[str, tuple[int, ...]], ...]:
    """Name and shape per step of each dataset that a reader looks at; equal for demonstrations of one layout."""
    names = ["actions", "rewards", "dones", *(f"obs/{key}" for key in demo["obs"])]
    return tuple(sorted((name, demo[name].shape[1:]) for name in names if name in demo))


def hdf5_files(path: Path) -> tuple[Path, ...]:
    """The file, or all .hdf5 and .h5 files in a folder and below, by name."""
    if path.is_dir():
        found = sorted(p for p in path.rglob("*") if p.suffix in (".hdf5", ".h5") and p.is_file())
        if not found:
            raise problem(f"no .hdf5 file in {path}", "LIBERO's demonstrations", "pass the folder that holds them")
        return tuple(found)
    return (path,)


def open_hdf5(path: Path) -> h5py.File:
    """An HDF5 file for reading."""
    if not path.is_file():
        raise problem(f"no file {path}", "an HDF5 file", "copy the dataset again")
    try:
        return h5py.File(path, "r")
    except (OSError, RuntimeError) as error:
        fix = "the file is cut short or of another kind: copy it again"
        raise problem(f"{path} ({path.stat().st_size} bytes): {error}", "a whole HDF5 file", fix) from error


def instruction_in(data: h5py.Group, file: Path) -> str:
    """The instruction in `problem_info`; where there is none, what LIBERO makes of the task's name."""
    info = _json(data, "problem_info", file)
    found = info.get("language_instruction", "")
    text = (found if isinstance(found, str) else " ".join(found)).strip().strip('"').strip()
    return text or instruction_from_name(file.stem.removesuffix("_demo"))


def instruction_from_name(task: str) -> str:
    """`KITCHEN_SCENE10_put_the_bowl_away` -> "put the bowl away" (LIBERO's `grab_language_from_filename`)."""
    return re.sub(r"^[A-Z].*?SCENE\d+_", "", task).replace("_", " ")


def control_hz(data: h5py.Group, file: Path) -> float:
    """Steps a second, from `env_args`; 0 if the file does not say."""
    kwargs = _json(data, "env_args", file).get("env_kwargs")
    return float(kwargs.get("control_freq", 0.0)) if isinstance(kwargs, dict) else 0.0


def _json(data: h5py.Group, name: str, file: Path) -> dict[str, Any]:
    text = data.attrs.get(name, "{}")
    try:
        value = json.loads(text)
    except (TypeError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise problem(f"{file}: attribute {name} of data: {error}", "a JSON object", "mend the attribute") from error
    return value if isinstance(value, dict) else {}


def frames_upright(data: h5py.Group) -> bool:
    """Whether frames are stored top row first. robosuite's convention "opengl", its default, stores the bottom row
    first; "opencv" the other way round (robosuite/utils/observables and macros.IMAGE_CONVENTION)."""
    return str(data.attrs.get("macros_image_convention", "opengl")) == "opencv"


def demo_order(key: str) -> tuple[int, str]:
    """demo_2 before demo_10."""
    number = re.fullmatch(r"\D*(\d+)", key)
    return (int(number[1]) if number else -1, key)


def child(group: h5py.Group, key: str, kind: Any, file: Path) -> Any:
    """A group or dataset inside a group; VlaError naming file, group and key if it is not there."""
    found = group.get(key)
    if not isinstance(found, kind):
        names = ", ".join(list(group)[:12]) or "nothing"
        place = f"{file}: {str(group.name).removeprefix('/data/')}"
        raise problem(f"{place} without {key} (it has {names})", "LIBERO's layout, data/demo_0/obs/agentview_rgb and so on",
                      "pass a file of LIBERO's demonstrations, or copy it again")  # fmt: skip
    return found
