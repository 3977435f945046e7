"""json_numpy's form of an array: `{"__numpy__": base64 of the C-order bytes, "dtype": "|u1", "shape": [h, w, 3]}`.

The form OpenVLA's server and clients speak (package `json_numpy` 2.1.1). This reader is stricter than that package:
only plain bool, integer and float arrays, sizes checked before anything is allocated, nothing is ever unpickled.
"""

from __future__ import annotations

import base64
import binascii
import json
import math
import re
from typing import Any

import numpy as np

from vla.types import problem

MAX_ARRAY_MB = 64.0
MAX_DIMS = 8
PLAIN_DTYPE = re.compile(r"[<>=|]?(b1|i[1248]|u[1248]|f[248])")
"""What numpy calls the dtypes we read: no object, void, string, date or complex ones."""

FIX = 'send {"__numpy__": base64 of the C-order bytes, "dtype": "|u1", "shape": [...]}, as json_numpy writes it'


def encode(array: Any) -> dict[str, Any]:
    """A numpy array or scalar in json_numpy's form. VlaError for dtypes that are not plain bool, integer or float."""
    value = np.asarray(array)
    if not PLAIN_DTYPE.fullmatch(value.dtype.str):
        raise problem(f"an array of dtype {value.dtype}", "bool, integer or float up to 64 bits", "convert it first")
    data = base64.b64encode(value.tobytes(order="C")).decode("ascii")
    return {"__numpy__": data, "dtype": value.dtype.str, "shape": list(value.shape)}


def decode(value: object, name: str = "array", max_mb: float = MAX_ARRAY_MB) -> np.ndarray:
    """The array behind json_numpy's form: native byte order, own writable memory. A scalar comes back as shape ().

    Raises VlaError, with `name` in its text, for anything else than the exact form, a dtype outside bool / integer /
    float, a byte count that contradicts dtype and shape, or more than `max_mb` MiB. All are checked before decoding.
    """
    if not isinstance(value, dict) or set(value) != {"__numpy__", "dtype", "shape"}:
        raise problem(f"{name}: {_describe(value)}", "a numpy array in json_numpy's form", FIX)
    data, dtype_text, shape = value["__numpy__"], value["dtype"], value["shape"]
    if not isinstance(dtype_text, str) or not PLAIN_DTYPE.fullmatch(dtype_text):
        raise problem(f"{name}: dtype {dtype_text!r}", "a plain bool, integer or float dtype such as '|u1', '<f4'", FIX)
    if not isinstance(shape, list | tuple) or len(shape) > MAX_DIMS or not all(_is_size(size) for size in shape):
        raise problem(f"{name}: shape {shape!r}", f"at most {MAX_DIMS} sizes, none negative", FIX)
    dtype = np.dtype(dtype_text)
    n_bytes = math.prod(shape) * dtype.itemsize
    if n_bytes > max_mb * 2**20:
        raise problem(f"{name}: shape {list(shape)} of {dtype}, {n_bytes} bytes", f"at most {max_mb:g} MiB",
                      "send a smaller array")  # fmt: skip
    if not isinstance(data, str) or len(data) != 4 * ((n_bytes + 2) // 3):
        got = f"{len(data)} base64 characters" if isinstance(data, str) else type(data).__name__
        raise problem(f"{name}: {got}", f"{4 * ((n_bytes + 2) // 3)} for shape {list(shape)} of {dtype}", FIX)
    return np.frombuffer(_bytes(data, n_bytes, name), dtype).astype(dtype.newbyteorder("=")).reshape(shape)


def dumps(value: Any) -> str:
    """JSON text with arrays, at any depth, in json_numpy's form; equal to `json_numpy.dumps` byte for byte."""
    return json.dumps(value, default=encode, allow_nan=False)


def _bytes(data: str, n_bytes: int, name: str) -> bytes:
    try:
        raw = binascii.a2b_base64(data, strict_mode=True)
    except (binascii.Error, ValueError) as error:
        raise problem(f"{name}: text that is not base64 ({error})", "base64", FIX) from error
    if len(raw) != n_bytes:
        raise problem(f"{name}: {len(raw)} bytes", f"{n_bytes} bytes by dtype and shape", FIX)
    return raw


def _is_size(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _describe(value: object) -> str:
    if isinstance(value, dict):
        return f"an object with the keys {sorted(map(str, value))[:8]}"
    if isinstance(value, list):
        return f"a JSON list of {len(value)}"
    if isinstance(value, str):
        return f"text of {len(value)} characters"
    return "null" if value is None else f"{value!r}"
