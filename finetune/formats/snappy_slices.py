"""Any part of a snappy-compressed block without decompressing what is before it.

A snappy block is a row of elements, each a run of literal bytes or a copy of earlier output (google/snappy,
format_description.txt). PNG and JPEG hardly compress, so that a block of images is a few literals of 64 KiB each for
every image: a list of where the elements begin is short and quick to make, and a slice is then read from the file.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable

MIN_BYTES_PER_ELEMENT = 1024
"""Blocks of smaller elements on average are not worth a list: they compress well, and are better read whole."""

Read = Callable[[int, int], bytes]
"""(offset, size) -> bytes of the compressed block."""


class SnappySlices:
    """The elements of one block."""

    def __init__(self, block: memoryview | bytes) -> None:
        """Raises ValueError if the block is damaged, or its elements are small."""
        self.size, at = varint(block, 0)
        self.starts: list[int] = []
        """Where each element's output begins."""
        self.sources: list[int] = []
        """A literal's place in the block; for a copy of output `back` bytes earlier, -back."""
        done, most = 0, 512 + self.size // MIN_BYTES_PER_ELEMENT
        while at < len(block):
            length, source, at = _element(block, at)
            self.starts.append(done)
            self.sources.append(source)
            done += length
            if len(self.starts) > most:
                raise ValueError("a snappy block of small elements")
        if done != self.size or at != len(block):
            raise ValueError(f"a snappy block with {done} bytes of output where it says {self.size}")

    def slice(self, read: Read, start: int, stop: int) -> bytes:
        """Bytes start .. stop - 1 of the output."""
        if not 0 <= start <= stop <= self.size:
            raise ValueError(f"bytes {start}..{stop} of {self.size}")
        parts = []
        k = bisect_right(self.starts, start) - 1
        while start < stop:
            end = self.starts[k + 1] if k + 1 < len(self.starts) else self.size
            size, source = min(stop, end) - start, self.sources[k]
            if source >= 0:
                parts.append(read(source + start - self.starts[k], size))
            else:
                parts.append(self._copied(read, self.starts[k], -source, start, size))
            start, k = start + size, k + 1
        return b"".join(parts)

    def _copied(self, read: Read, begin: int, back: int, start: int, size: int) -> bytes:
        """Part of a copy that begins at `begin`. One that is longer than it goes back repeats itself."""
        if back > begin:
            raise ValueError("a snappy copy of what is before the block")
        pattern = self.slice(read, begin - back, begin if start + size - begin > back else start + size - back)
        shift = start - begin
        return (pattern * (2 + (shift + size) // max(1, len(pattern))))[shift : shift + size]


def varint(data: memoryview | bytes, at: int) -> tuple[int, int]:
    """A number of 7 bits a byte, lowest first, and where it ends."""
    value = shift = 0
    while True:
        byte = data[at]
        value, shift, at = value | (byte & 127) << shift, shift + 7, at + 1
        if byte < 128:
            return value, at


def _element(block: memoryview | bytes, at: int) -> tuple[int, int, int]:
    """Length of the output, source as in `SnappySlices.sources`, where the next element begins."""
    tag, kind = block[at], block[at] & 3
    if kind == 0:
        length, at = tag >> 2, at + 1
        if length >= 60:
            extra = length - 59
            length, at = int.from_bytes(block[at : at + extra], "little"), at + extra
        return length + 1, at, at + length + 1
    if kind == 1:
        return (tag >> 2 & 7) + 4, -((tag >> 5) << 8 | block[at + 1]) or _nowhere(), at + 2
    width = 2 if kind == 2 else 4
    back = int.from_bytes(block[at + 1 : at + 1 + width], "little")
    return (tag >> 2) + 1, -back or _nowhere(), at + 1 + width


def _nowhere() -> int:
    raise ValueError("a snappy copy from no distance")
