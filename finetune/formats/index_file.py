"""The file in `$VLA_CACHE` that keeps the index of a dataset: arrays and facts, behind what says whether they can be trusted."""

from __future__ import annotations

import hashlib
import io
import json
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

FACTS = "text"
"""The array that holds the facts, as JSON."""


def packed(arrays: Mapping[str, np.ndarray], facts: Any, state: bytes) -> bytes:
    """`state` (32 bytes of what the index was made from), a checksum of the rest, and the rest as .npz."""
    named: dict[str, Any] = {FACTS: np.frombuffer(json.dumps(facts).encode(), np.uint8), **arrays}
    buffer = io.BytesIO()
    np.savez(buffer, **named)
    content = buffer.getvalue()
    return state + hashlib.sha256(content).digest() + content


def unpacked(path: Path, state: bytes) -> tuple[dict[str, np.ndarray], Any] | None:
    """The arrays and the facts; None if there is no such file, or it is damaged or of another state."""
    try:
        data = path.read_bytes()
    except OSError:
        return None
    content = memoryview(data)[64:]
    if data[:32] != state or hashlib.sha256(content).digest() != data[32:64]:
        return None
    try:
        with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
            return {name: arrays[name] for name in arrays.files if name != FACTS}, json.loads(arrays[FACTS].tobytes())
    except (KeyError, ValueError, zipfile.BadZipFile):
        return None
