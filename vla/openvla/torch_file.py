"""The tensors in a file that `torch.save` wrote, without unpickling it.

Such a file is a zip archive: `data.pkl` is a program for Python's pickle machine, `data/0`, `data/1`, ... are raw numbers.
Unpickling runs whatever the program names. Here the program is only *read* (`pickletools.genops` executes nothing) by a
machine that knows the instructions and the three functions a state dict needs, and stops at anything else.
"""

from __future__ import annotations

import pickletools
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from vla.types import problem

DTYPES = {
    "FloatStorage": torch.float32, "BFloat16Storage": torch.bfloat16, "HalfStorage": torch.float16,
    "DoubleStorage": torch.float64, "LongStorage": torch.int64, "IntStorage": torch.int32, "BoolStorage": torch.bool,
}  # fmt: skip
ORDERED_DICT, TENSOR, PARAMETER = (
    "collections OrderedDict", "torch._utils _rebuild_tensor_v2", "torch._utils _rebuild_parameter",
)  # fmt: skip
CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
NUMBERS_AND_TEXT = ("BININT", "BININT1", "BININT2", "LONG1", "BINUNICODE", "SHORT_BINUNICODE")
TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


@dataclass(frozen=True)
class Name:
    """A function or class that the program names; it is never looked up."""

    text: str


@dataclass(frozen=True)
class Storage:
    """Raw numbers of the archive."""

    dtype: torch.dtype
    key: str
    n: int


MARK = object()


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Name -> tensor of a file that holds a flat state dict.

    Raises:
        VlaError: it is no such archive, is damaged, or its program asks for anything that a state dict does not need.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            program = [name for name in archive.namelist() if name.endswith("/data.pkl")]
            if len(program) != 1:
                raise problem(f"{path} without one data.pkl", "a file of torch.save", "check the path")
            folder = program[0].removesuffix("data.pkl")
            if f"{folder}byteorder" in archive.namelist() and archive.read(f"{folder}byteorder") != b"little":
                raise problem(f"{path} in another byte order", "little", "save it again on an ordinary machine")
            value = _Machine(archive, folder).run(archive.read(program[0]))
    except (zipfile.BadZipFile, OSError, KeyError, IndexError, ValueError, TypeError, RuntimeError) as error:
        raise problem(f"{path}: {error}", "a state dict that torch.save wrote", "fetch the file again") from error
    if not isinstance(value, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in value.values()):
        raise problem(f"{path} with more than tensors", "a flat state dict", "save `module.state_dict()` alone")
    return {str(name).removeprefix("module."): tensor for name, tensor in value.items()}  # the prefix is DDP's


class _Machine:
    """Follows the program over a stack of plain values."""

    def __init__(self, archive: zipfile.ZipFile, folder: str) -> None:
        self.archive, self.folder = archive, folder
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}

    def run(self, program: bytes) -> Any:
        for instruction, argument, _ in pickletools.genops(program):
            if instruction.name == "STOP":
                return self.stack.pop()
            self._step(instruction.name, argument)
        raise ValueError("the program does not end")

    def _step(self, name: str, argument: Any) -> None:
        stack = self.stack
        if name in ("PROTO", "FRAME"):
            return
        if name in CONSTANTS:
            stack.append(CONSTANTS[name])
        elif name in NUMBERS_AND_TEXT:
            stack.append(argument)
        elif name == "GLOBAL":
            stack.append(Name(argument))
        elif name in ("BINPUT", "LONG_BINPUT"):
            self.memo[argument] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(self.memo[argument])
        elif name in ("EMPTY_DICT", "EMPTY_TUPLE"):
            stack.append({} if name == "EMPTY_DICT" else ())
        elif name == "MARK":
            stack.append(MARK)
        elif name in TUPLES:
            stack[-TUPLES[name] :] = [tuple(stack[-TUPLES[name] :])]
        elif name == "TUPLE":
            stack.append(tuple(self._to_mark()))
        elif name in ("SETITEM", "SETITEMS"):
            items = self._to_mark() if name == "SETITEMS" else [stack.pop(-2), stack.pop()]
            stack[-1].update(zip(items[::2], items[1::2], strict=True))
        elif name == "BUILD":  # an OrderedDict's `_metadata`: versions of modules
            stack.pop()
        elif name == "BINPERSID":
            stack.append(_storage(stack.pop()))
        elif name == "REDUCE":
            arguments, function = stack.pop(), stack.pop()
            stack.append(self._call(function, arguments))
        else:
            raise ValueError(f"instruction {name}, which a state dict does not need")

    def _to_mark(self) -> list[Any]:
        place = len(self.stack) - 1 - self.stack[::-1].index(MARK)
        items = self.stack[place + 1 :]
        del self.stack[place:]
        return items

    def _call(self, function: Any, arguments: tuple[Any, ...]) -> Any:
        if function == Name(ORDERED_DICT) and arguments == ():
            return {}
        if function == Name(PARAMETER):
            return arguments[0]
        if function == Name(TENSOR):
            return self._tensor(*arguments[:4])
        named = function.text if isinstance(function, Name) else function
        raise problem(
            f"a pickle that calls {named!r}", "tensors and nothing else", "do not trust the file, get another"
        )

    def _tensor(self, storage: Any, offset: int, size: tuple[int, ...], stride: tuple[int, ...]) -> torch.Tensor:
        if not isinstance(storage, Storage):
            raise ValueError("a tensor without numbers")
        entry = self.archive.getinfo(f"{self.folder}data/{storage.key}")
        if entry.compress_type != zipfile.ZIP_STORED or entry.file_size != storage.n * storage.dtype.itemsize:
            raise ValueError(f"{entry.filename} has {entry.file_size} bytes for {storage.n} of {storage.dtype}")
        end = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True)) + 1
        if min((*size, *stride, offset), default=0) < 0 or (0 not in size and end > storage.n):
            raise ValueError(f"a tensor of {size} outside its {storage.n} numbers")
        if storage.n == 0 or 0 in size:
            return torch.empty(size, dtype=storage.dtype)
        numbers = torch.frombuffer(bytearray(self.archive.read(entry)), dtype=storage.dtype)
        return numbers.as_strided(size, stride, offset).clone()


def _storage(reference: Any) -> Storage:
    """('storage', its type, key in the archive, device, length)."""
    kind, type_, key, _, n = reference
    name = type_.text.removeprefix("torch ") if isinstance(type_, Name) else ""
    if kind != "storage" or name not in DTYPES or not str(key).isdigit():
        raise ValueError(f"a storage {reference}")
    return Storage(DTYPES[name], str(key), int(n))
