"""TFRecord files: the framing, and the CRC32C that guards it.

A record is `uint64 length, uint32 masked CRC of the length, data, uint32 masked CRC of the data`, little endian
(TensorFlow, core/lib/io/record_writer.h). The mask is `(crc rotated right by 15) + 0xa282ead8` (core/lib/hash/crc32c.h).

The CRC is computed with numpy, some 0.6 GB/s on one core, so that no compiled package is needed: the data is cut into
lanes whose CRCs are computed side by side, and the lanes are joined in a tree.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import BinaryIO

import numpy as np

from vla.types import VlaError, problem

POLYNOMIAL = 0x82F63B78  # Castagnoli's, reflected
MASK_DELTA = 0xA282EAD8
HEADER_BYTES, FOOTER_BYTES = 12, 4
WORD_BYTES = 8  # bytes each lane takes per step
LANES = 4096


@dataclass(frozen=True)
class Record:
    """One record of a file, or what is wrong with it."""

    index: int
    """Number in the file, from 0."""
    offset: int
    """Of `data`, in bytes from the start of the file."""
    data: bytes
    """Empty if the record is faulty."""
    fault: VlaError | None = None


def read_records(path: Path, skip: int = 0, take: int | None = None) -> Iterator[Record]:
    """Records `skip` .. `skip + take - 1` of a file (all that follow by default), checked.

    A faulty record is given with its `fault`; nothing follows one whose end cannot be found (a damaged length, a file
    that is cut off). Records that are skipped are passed over by their lengths.
    """
    index = 0
    with _open(path) as file:
        size = path.stat().st_size
        while file.tell() < size and (take is None or index < skip + take):
            start = file.tell()
            length, fault = _read_length(file, path, index, start, size)
            if fault is not None:
                yield Record(index, start + HEADER_BYTES, b"", fault)
                return
            if index < skip:
                file.seek(length + FOOTER_BYTES, 1)
            else:
                yield _read_data(file, path, index, start + HEADER_BYTES, length)
            index += 1


def read_record(path: Path, index: int, offset: int, length: int) -> bytes:
    """The data of a record whose place is known, checked. VlaError if it is not (or no longer) there."""
    with _open(path) as file:
        file.seek(offset)
        record = _read_data(file, path, index, offset, length)
    if record.fault is not None:
        raise record.fault
    return record.data


def crc32c(data: bytes | bytearray | memoryview) -> int:
    """CRC-32C (Castagnoli; RFC 3720, appendix B.4)."""
    raw = np.frombuffer(data, np.uint8)
    if len(raw) < 512:
        return _crc_bytewise(raw.tobytes())
    return int(_crc_lanes(raw)) ^ 0xFFFFFFFF


def masked_crc32c(data: bytes | bytearray | memoryview) -> int:
    """`crc32c` as TFRecord files hold it."""
    crc = crc32c(data)
    return (((crc >> 15) | (crc << 17)) + MASK_DELTA) & 0xFFFFFFFF


def _open(path: Path) -> BinaryIO:
    try:
        return open(path, "rb")
    except OSError as error:
        raise problem(f"{path}: {error.strerror}", "a shard of the dataset", "copy the dataset again") from error


def _read_length(file: BinaryIO, path: Path, index: int, start: int, size: int) -> tuple[int, VlaError | None]:
    header = file.read(HEADER_BYTES)
    if len(header) < HEADER_BYTES:
        return 0, _truncated(path, index, start, size)
    (length, crc) = struct.unpack("<QI", header)
    if masked_crc32c(header[:8]) != crc:
        return 0, problem(f"{path}: record {index} at byte {start}: the CRC of its length does not match", "an undamaged record",
                          "copy the file again; what follows in it cannot be read")  # fmt: skip
    if start + HEADER_BYTES + length + FOOTER_BYTES > size:
        return 0, _truncated(path, index, start, size)
    return length, None


def _read_data(file: BinaryIO, path: Path, index: int, offset: int, length: int) -> Record:
    data, footer = file.read(length), file.read(FOOTER_BYTES)
    start = offset - HEADER_BYTES
    if len(footer) < FOOTER_BYTES:
        return Record(index, offset, b"", _truncated(path, index, start, path.stat().st_size))
    if masked_crc32c(data) != int.from_bytes(footer, "little"):
        fault = problem(f"{path}: record {index} at byte {start}: the CRC of its data does not match", "an undamaged record",
                        "copy the file again, or leave the record out with --skip-bad")  # fmt: skip
        return Record(index, offset, b"", fault)
    return Record(index, offset, data)


def _truncated(path: Path, index: int, start: int, size: int) -> VlaError:
    return problem(f"{path}: record {index} at byte {start} is cut off, the file ends at byte {size}", "a whole file",
                   "copy the file again")  # fmt: skip


@cache
def _byte_table() -> np.ndarray:
    """uint32 (256,): the state after one byte."""
    table = np.arange(256, dtype=np.uint32)
    for _ in range(8):
        table = (table >> 1) ^ np.where(table & 1, np.uint32(POLYNOMIAL), np.uint32(0))
    return table


def _crc_bytewise(data: bytes) -> int:
    table, state = _byte_list(), 0xFFFFFFFF
    for byte in data:
        state = (state >> 8) ^ table[(state ^ byte) & 255]
    return state ^ 0xFFFFFFFF


@cache
def _byte_list() -> list[int]:
    return _byte_table().tolist()


@cache
def _word_tables() -> tuple[np.ndarray, ...]:
    """uint32 (65536,) each: the state after 16 bits followed by 6, 4, 2 and 0 zero bytes."""
    bytes_ = _byte_table()
    state, tables = np.arange(65536, dtype=np.uint32), []
    for _ in range(4):
        for _ in range(2):
            state = (state >> 8) ^ bytes_[state & 255]
        tables.append(state)
    return tuple(reversed(tables))


@cache
def _zeros_table(n_bytes: int) -> np.ndarray:
    """uint32 (4, 256): what each byte of a state becomes after `n_bytes` zero bytes; `n_bytes` is WORD_BYTES times 2^k."""
    if n_bytes > WORD_BYTES:
        half = _zeros_table(n_bytes // 2)
        return _after_zeros(half, half)
    state = (np.arange(256, dtype=np.uint32) << (8 * np.arange(4, dtype=np.uint32)[:, None])).astype(np.uint32)
    for _ in range(n_bytes):
        state = (state >> 8) ^ _byte_table()[state & 255]
    return state


def _after_zeros(state: np.ndarray, table: np.ndarray) -> np.ndarray:
    return table[0][state & 255] ^ table[1][(state >> 8) & 255] ^ table[2][(state >> 16) & 255] ^ table[3][state >> 24]


def _crc_lanes(raw: np.ndarray) -> np.uint32:
    """State of the CRC, before its last inversion, of at least 4 bytes."""
    steps = 1 << max(len(raw) // (WORD_BYTES * LANES), 1).bit_length() - 1  # a power of two, for `_zeros_table`
    lane = steps * WORD_BYTES
    n_lanes = -(-len(raw) // lane)
    padded = np.zeros(n_lanes * lane, np.uint8)  # zeros in front of a zero state change nothing
    padded[-len(raw) :] = raw
    padded[len(padded) - len(raw) :][:4] ^= 0xFF  # the state begins as all ones
    words = padded.view("<u2").reshape(n_lanes, steps * 4).T.astype(np.intp, order="C")
    t0, t1, t2, t3 = _word_tables()
    state = np.zeros(n_lanes, np.uint32)
    for i in range(0, 4 * steps, 4):
        low, high = words[i] ^ (state & 0xFFFF), words[i + 1] ^ (state >> 16)
        state = t0.take(low, mode="wrap") ^ t1.take(high, mode="wrap")
        state ^= t2.take(words[i + 2], mode="wrap") ^ t3.take(words[i + 3], mode="wrap")
    while len(state) > 1:
        if len(state) % 2:
            state = np.concatenate([np.zeros(1, np.uint32), state])
        state, lane = _after_zeros(state[::2], _zeros_table(lane)) ^ state[1::2], lane * 2
    return state[0]
