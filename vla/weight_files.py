"""Checkpoints as safetensors files: which tensors are where, read and written one tensor at a time.

The format (https://github.com/huggingface/safetensors#format): the length of the header as 8 bytes little-endian, the
header as JSON (name -> dtype, shape, byte range), then the tensors' bytes. `safetensors.torch.save_file` wants all tensors
of a file in memory at once; `write_tensors` holds one.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from vla.types import problem

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
CODES = {
    torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2",
}  # fmt: skip
DTYPES = {code: dtype for dtype, code in CODES.items()}


@dataclass(frozen=True)
class Entry:
    """A tensor of a file, by its header."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def n_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


Files = dict[str, dict[str, Entry]]
"""File name -> tensor name -> entry, as the headers have it."""


def read_headers(folder: Path) -> Files:
    """The safetensors files of a checkpoint. VlaError if one is missing or damaged, or there are none."""
    return {name: _header(folder / name) for name in _file_names(folder)}


def read_tensor(path: Path, name: str) -> torch.Tensor:
    """One tensor. The file is opened and closed, so that no other page of it stays in memory."""
    with safe_open(path, framework="pt") as file:
        return file.get_tensor(name)


def write_tensors(path: Path, entries: Mapping[str, Entry], tensor_of: Callable[[str], torch.Tensor]) -> None:
    """Write a file whole or not at all, asking for one tensor after another.

    Raises:
        AssertionError: a tensor that is not of its entry's shape and dtype.
    """
    names = sorted(entries, key=lambda name: (-entries[name].dtype.itemsize, name))  # so that every one is aligned
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name in names:
        entry = entries[name]
        header[name] = {"dtype": CODES[entry.dtype], "shape": list(entry.shape), "data_offsets": [position, position + entry.n_bytes]}  # fmt: skip
        position += entry.n_bytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    temporary = path.with_name(f".{path.name}.tmp")
    with open(temporary, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            tensor = tensor_of(name)
            assert (tuple(tensor.shape), tensor.dtype) == (entries[name].shape, entries[name].dtype), name
            file.write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
            del tensor
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def _header(path: Path) -> dict[str, Entry]:
    try:
        with safe_open(path, framework="pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            codes = {name: part.get_dtype() for name, part in slices.items()}
            if unknown := sorted(set(codes.values()) - set(DTYPES)):
                raise problem(f"{path} with tensors of {', '.join(unknown)}", f"some of {', '.join(DTYPES)}",
                              "convert the checkpoint to bfloat16")  # fmt: skip
            return {name: Entry(tuple(part.get_shape()), DTYPES[codes[name]]) for name, part in slices.items()}
    except (SafetensorError, OSError) as error:
        raise problem(f"{path}: {error}", "a whole safetensors file", "fetch the file again") from error


def _file_names(folder: Path) -> Sequence[str]:
    if (folder / INDEX).is_file():
        try:
            weight_map = json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"]
            names = sorted({str(name) for name in weight_map.values()})
        except (json.JSONDecodeError, UnicodeDecodeError, KeyError, AttributeError, TypeError) as error:
            raise problem(f"{folder / INDEX}: {error}", 'JSON with a "weight_map"', "fetch the file again") from error
    elif (folder / SINGLE).is_file():
        names = [SINGLE]
    else:
        raise problem(f"no {SINGLE} in {folder}", "weights as safetensors; pickles are never opened",
                      "check the path, or convert them where they come from")  # fmt: skip
    if strange := [name for name in names if Path(name).name != name]:
        raise problem(f"{INDEX} with the file {strange[0]!r}", "files of the same folder", "fetch the index again")
    if absent := [name for name in names if not (folder / name).is_file()]:
        raise problem(f"no {', '.join(absent)} in {folder}", f"every file that {INDEX} names", "fetch them")
    return names
