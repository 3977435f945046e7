"""Exact order statistics of more numbers than fit in memory, by radix selection on the bits of floats.

A float's bits, read as an unsigned integer (with the sign bit turned, and all bits turned for negative numbers), are in
the order of the floats. Counting the upper 16 bits finds the bucket that holds a rank; counting the next 16 bits inside
the bucket finds the next part, until the number is known: two readings of float32, four of float64.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from vla.types import problem

BLOCK_ROWS = 1 << 18
Blocks = Callable[[], Iterable[np.ndarray]]
"""Gives the same (n, D) blocks of one dtype, float32 or float64, each time it is called."""


class RowStore:
    """Rows that come one block at a time and are read several times: in memory up to `memory_mb`, then in a temporary
    file without a name, which the system removes even after a crash."""

    def __init__(self, memory_mb: float = 256.0, folder: Path | None = None) -> None:
        self._limit, self._folder = int(memory_mb * 2**20), folder
        self._kept: list[np.ndarray] = []
        self._n_bytes, self._file, self.n_rows = 0, None, 0
        self._dtype, self._dim = np.dtype(np.float32), -1

    def add(self, rows: np.ndarray) -> None:
        """(n, D) numbers; float32 stays float32, everything else becomes float64."""
        rows = np.ascontiguousarray(rows, np.float32 if rows.dtype == np.float32 else np.float64)
        if self._dim < 0:
            self._dtype, self._dim = rows.dtype, rows.shape[1] if rows.ndim == 2 else -1
        if rows.ndim != 2 or rows.shape[1] != self._dim or rows.dtype != self._dtype:
            raise problem(f"rows of shape {rows.shape}, {rows.dtype}", f"(n, {self._dim}) {self._dtype}, as the first rows",
                          "give rows of one size")  # fmt: skip
        self.n_rows += len(rows)
        self._n_bytes += rows.nbytes
        self._kept.append(rows.copy())  # the caller may use its buffer again
        if self._n_bytes > self._limit:
            self._spill()

    def blocks(self) -> Iterator[np.ndarray]:
        """All rows in order, at most `BLOCK_ROWS` at a time."""
        if self._file is not None:
            n_spilled = self._file.seek(0, 2) // (self._dtype.itemsize * self._dim)
            if n_spilled:
                spilled = np.memmap(self._file, self._dtype, "r", shape=(n_spilled, self._dim))
                for start in range(0, n_spilled, BLOCK_ROWS):
                    yield spilled[start : start + BLOCK_ROWS]
        if self._kept:
            self._kept = [np.concatenate(self._kept)]
            yield from row_blocks(self._kept[0])

    def _spill(self) -> None:
        if self._file is None:
            self._file = tempfile.TemporaryFile(dir=self._folder)
        self._file.seek(0, 2)
        for rows in self._kept:
            self._file.write(rows.data)
        self._file.flush()
        self._kept, self._n_bytes = [], 0


def row_blocks(rows: np.ndarray) -> Iterator[np.ndarray]:
    """(N, D) -> views of at most `BLOCK_ROWS` rows."""
    for start in range(0, len(rows), BLOCK_ROWS):
        yield rows[start : start + BLOCK_ROWS]


def quantiles(blocks: Blocks, n_rows: int, dim: int, shares: Sequence[float]) -> np.ndarray:
    """float64 (len(shares), D): `np.quantile(rows, shares, axis=0)` of the same rows as float64, bit for bit (but for the
    sign of a zero: -0.0 comes out as 0.0). Needs `n_rows` >= 1 finite rows."""
    places = [(n_rows - 1) * share for share in shares]
    below = [int(place) for place in places]
    above = [min(place + 1, n_rows - 1) for place in below]
    ranks = sorted({*below, *above})
    found = order_statistics(blocks, dim, ranks) + 0.0  # -0.0 + 0.0 is 0.0
    out = np.empty((len(shares), dim))
    for row, (place, low, high) in enumerate(zip(places, below, above, strict=True)):
        out[row] = _between(found[ranks.index(low)], found[ranks.index(high)], place - low)
    return out


def order_statistics(blocks: Blocks, dim: int, ranks: Sequence[int]) -> np.ndarray:
    """float64 (len(ranks), D): the numbers at these places (0 is the smallest) of each sorted column."""
    left = np.tile(np.asarray(ranks, np.int64)[:, None], (1, dim))  # rank inside the bucket known so far
    prefix = np.zeros((len(ranks), dim), np.uint64)
    bits, dtype = 0, np.dtype(np.float64)
    for digit in range(4):
        counts: dict[tuple[int, int], np.ndarray] = {}
        for block in blocks():
            dtype, bits = block.dtype, 8 * block.dtype.itemsize
            for column in range(dim):
                _count(_keys(block[:, column]), bits, digit, column, prefix, counts)
        for column in range(dim):
            for row in range(len(ranks)):
                total = np.cumsum(counts[column, int(prefix[row, column])])
                bucket = int(np.searchsorted(total, left[row, column], side="right"))
                left[row, column] -= total[bucket - 1] if bucket else 0
                prefix[row, column] = (int(prefix[row, column]) << 16) | bucket
        if bits == 16 * (digit + 1):
            break
    return _floats(prefix, dtype).astype(np.float64)


def _count(keys: np.ndarray, bits: int, digit: int, column: int, prefix: np.ndarray, counts: dict) -> None:
    """Add one column's keys to the histograms of this 16-bit digit, one for each prefix that is looked for."""
    shift = bits - 16 * (digit + 1)
    digits = ((keys >> keys.dtype.type(shift)) & keys.dtype.type(0xFFFF)).astype(np.int64)
    heads = keys >> keys.dtype.type(shift + 16) if digit else None
    for wanted in {int(p) for p in prefix[:, column]}:
        chosen = digits if heads is None else digits[heads == wanted]
        found = np.bincount(chosen, minlength=1 << 16)
        counts[column, wanted] = counts[column, wanted] + found if (column, wanted) in counts else found


def _keys(values: np.ndarray) -> np.ndarray:
    """Floats -> unsigned integers in the same order."""
    unsigned = np.dtype(f"u{values.dtype.itemsize}").type
    bits = np.ascontiguousarray(values).view(unsigned)
    sign = unsigned(1 << (8 * values.dtype.itemsize - 1))
    return np.where(bits & sign, ~bits, bits | sign)


def _floats(keys: np.ndarray, dtype: np.dtype) -> np.ndarray:
    unsigned = np.dtype(f"u{dtype.itemsize}").type
    keys = keys.astype(unsigned)
    sign = unsigned(1 << (8 * dtype.itemsize - 1))
    return np.where(keys & sign, keys ^ sign, ~keys).view(dtype)


def _between(low: np.ndarray, high: np.ndarray, share: float) -> np.ndarray:
    """numpy's `_lerp`, which is exact at both ends."""
    step = high - low
    return high - step * (1 - share) if share >= 0.5 else low + step * share
