"""`tf.train.Example` read from its wire format, without protobuf and without copying what is long.

The messages (tensorflow/core/example/{example,feature}.proto), with their field numbers:

    Example   1: Features               Feature    1: BytesList | 2: FloatList | 3: Int64List
    Features  1: map entries            *List      1: repeated bytes | float | int64 (the last two packed or not)
    entry     1: string key  2: Feature

A field is a varint `number << 3 | wire type` and then, by wire type, 0: a varint, 1: 8 bytes, 2: a varint length and as
many bytes, 5: 4 bytes (protobuf, "Encoding").
"""

from __future__ import annotations

from collections.abc import Container, Iterator
from dataclasses import dataclass

import numpy as np

from vla.types import VlaError, problem

VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5
KINDS = {1: "bytes", 2: "float", 3: "int"}
MAX_VARINT_BYTES = 10


@dataclass(frozen=True)
class Feature:
    """The values of one feature, in the order of the record."""

    kind: str
    """"bytes", "float", "int", or "" for a feature without a list."""
    values: np.ndarray
    """bytes: int64 (n, 2), offset in the record and length of each. float: float32 (n,). int: int64 (n,)."""


class _Damaged(Exception):
    """The bytes are not an Example; the argument is the place of the field at fault."""


def parse_example(record: bytes, where: str, keys: Container[str] | None = None) -> dict[str, Feature]:
    """The features of a record by name; only those named in `keys`, if it is given.

    Args:
        where: file and record, for messages.

    Raises:
        VlaError: the record is not a `tf.train.Example`; `where` and the byte at fault are named.
    """
    found: dict[str, Feature] = {}
    try:
        for number, wire, start, stop in _fields(record, 0, len(record)):
            if number == 1 and wire == BYTES:
                for inner, inner_wire, entry, end in _fields(record, start, stop):
                    if inner == 1 and inner_wire == BYTES:
                        _entry(record, entry, end, keys, found)
    except _Damaged as error:
        raise _not_an_example(where, error) from error
    return found


def _not_an_example(where: str, error: _Damaged) -> VlaError:
    return problem(f"{where}: no tf.train.Example, byte {error} of it is damaged", "a dataset written by tensorflow_datasets",
                   "copy the file again, or leave the record out with --skip-bad")  # fmt: skip


def _entry(record: bytes, start: int, stop: int, keys: Container[str] | None, found: dict[str, Feature]) -> None:
    """One map entry into `found`. An entry without a key or value has the default, as in protobuf."""
    key, value = "", (stop, stop)
    for number, wire, first, last in _fields(record, start, stop):
        if number == 1 and wire == BYTES:
            key = record[first:last].decode("utf-8", "replace")
        elif number == 2 and wire == BYTES:
            value = (first, last)
    if keys is None or key in keys:
        found[key] = _feature(record, *value)


def _feature(record: bytes, start: int, stop: int) -> Feature:
    feature = Feature("", np.zeros(0, np.int64))
    for number, wire, first, last in _fields(record, start, stop):
        if number in KINDS and wire == BYTES:
            read = (_byte_spans, _floats, _ints)[number - 1]
            feature = Feature(KINDS[number], read(record, first, last))
    return feature


def _byte_spans(record: bytes, start: int, stop: int) -> np.ndarray:
    spans = [
        (first, last - first)
        for number, wire, first, last in _fields(record, start, stop)
        if (number, wire) == (1, BYTES)
    ]
    return np.array(spans, np.int64).reshape(-1, 2)


def _floats(record: bytes, start: int, stop: int) -> np.ndarray:
    parts = []
    for number, wire, first, last in _fields(record, start, stop):
        if number == 1 and wire in (BYTES, FIXED32):
            if (last - first) % 4:
                raise _Damaged(first)
            parts.append(np.frombuffer(record, "<f4", (last - first) // 4, first))
    return parts[0] if len(parts) == 1 else np.concatenate(parts or [np.zeros(0, np.float32)])


def _ints(record: bytes, start: int, stop: int) -> np.ndarray:
    parts = []
    for number, wire, first, last in _fields(record, start, stop):
        if number == 1 and wire in (BYTES, VARINT):
            parts.append(_varints(np.frombuffer(record, np.uint8, last - first, first), first))
    return parts[0] if len(parts) == 1 else np.concatenate(parts or [np.zeros(0, np.int64)])


def _varints(raw: np.ndarray, where: int) -> np.ndarray:
    """int64 of packed varints: 7 bits a byte, low ones first; the high bit says that more follow."""
    more = raw >= 0x80
    if not more.any():
        return raw.astype(np.int64)
    if more[-1]:
        raise _Damaged(where + len(raw))
    stops = np.flatnonzero(~more) + 1
    starts = np.concatenate([[0], stops[:-1]])
    lengths = stops - starts
    if lengths.max() > MAX_VARINT_BYTES:
        raise _Damaged(where + int(starts[lengths.argmax()]))
    shifts = (7 * (np.arange(len(raw)) - np.repeat(starts, lengths))).astype(np.uint64)
    bits = (raw & 0x7F).astype(np.uint64) << shifts
    return np.bitwise_or.reduceat(bits, starts).view(np.int64)


def _fields(record: bytes, start: int, stop: int) -> Iterator[tuple[int, int, int, int]]:
    """(number, wire type, first byte, byte after the last) of each field of a message."""
    at = start
    while at < stop:
        tag, first = _varint(record, at, stop)
        wire = tag & 7
        if wire == BYTES:
            length, first = _varint(record, first, stop)
            last = first + length
        elif wire == VARINT:
            last = _varint(record, first, stop)[1]
        elif wire in (FIXED32, FIXED64):
            last = first + (4 if wire == FIXED32 else 8)
        else:
            raise _Damaged(at)
        if last > stop or tag < 8:
            raise _Damaged(at)
        yield tag >> 3, wire, first, last
        at = last


def _varint(record: bytes, at: int, stop: int) -> tuple[int, int]:
    """(value, byte after it)."""
    value = shift = 0
    while at < stop and shift < 7 * MAX_VARINT_BYTES:
        byte = record[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
    raise _Damaged(at)
