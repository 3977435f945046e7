"""One image out of a parquet file, without reading the row group around it.

pyarrow reads whole column chunks, and what writes datasets puts an episode's images of one camera into one chunk and
one page: tens of MB for one frame. Here a list of where each image lies is made once for each chunk, from the sizes
that stand before the images, and then only the image is read.

What is not written the usual way (data page v1, snappy or no compression, PLAIN or dictionary encoding, images that
hardly compress) is left to pyarrow: `image_index` returns None. Format: apache/parquet-format, parquet.thrift
(PageHeader, in Thrift's compact protocol) and Encodings.md (RLE / bit-packing hybrid).
"""

from __future__ import annotations

import mmap
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from vla.finetune.formats.snappy_slices import SnappySlices, varint
from vla.types import VlaError, problem

DATA_PAGE, DICTIONARY_PAGE = 0, 2
PLAIN, PLAIN_DICTIONARY, RLE_DICTIONARY = 0, 2, 8


@dataclass(frozen=True)
class Page:
    """Where the body of a page lies in its file, and what is in it."""

    offset: int
    compressed: int
    """Bytes."""
    uncompressed: int
    kind: int
    encoding: int
    n_values: int
    slices: SnappySlices | None
    """None: not compressed."""

    def read(self, path: Path, start: int, stop: int) -> bytes:
        """Bytes start .. stop - 1 of the uncompressed body."""
        descriptor = os.open(path, os.O_RDONLY)
        try:
            if self.slices is None:
                found = os.pread(descriptor, stop - start, self.offset + start)
            else:
                found = self.slices.slice(lambda at, n: os.pread(descriptor, n, self.offset + at), start, stop)
        finally:
            os.close(descriptor)
        if len(found) != stop - start:
            raise ValueError("the file ends in this page")
        return found


@dataclass(frozen=True)
class ImageIndex:
    """Where the images of one column in one row group lie."""

    path: Path
    pages: tuple[Page, ...]
    places: np.ndarray
    """int64 (rows, 3): page, first byte and end in its uncompressed body; page -1 where there is no image."""

    def image(self, row: int) -> bytes | None:
        """The bytes of an image; None if the cell has none."""
        page, start, stop = self.places[row].tolist()
        if page < 0:
            return None
        try:
            return self.pages[page].read(self.path, start, stop)
        except (OSError, ValueError) as error:
            raise _damaged(self.path, self.pages[page].offset, error) from error


def image_index(file: pq.ParquetFile, path: Path, group: int, column: str) -> ImageIndex | None:
    """Where the bytes of `column`'s images in a row group lie; None if pyarrow has to read them."""
    meta = file.metadata.row_group(group)
    names = [meta.column(c).path_in_schema for c in range(meta.num_columns)]
    if f"{column}.bytes" not in names:
        return None
    place = names.index(f"{column}.bytes")
    about, schema = meta.column(place), file.schema.column(place)
    if schema.max_repetition_level or about.compression not in ("SNAPPY", "UNCOMPRESSED"):
        return None
    start = about.dictionary_page_offset or about.data_page_offset
    with open(path, "rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        data = memoryview(mapped)
        try:
            pages = _walk(data, start, start + about.total_compressed_size, about.compression == "SNAPPY")
            places = _places(data, pages, schema.max_definition_level)
        except (IndexError, KeyError, ValueError, pa.ArrowException):
            return None  # damaged or unusual: pyarrow can tell
        finally:
            data.release()
    return ImageIndex(path, tuple(pages), places) if len(places) == meta.num_rows else None


def _places(data: memoryview, pages: list[Page], max_level: int) -> np.ndarray:
    """See `ImageIndex.places`."""
    dictionary = np.zeros((0, 3), np.int64)
    parts = [dictionary]
    for k, page in enumerate(pages):
        if page.kind == DICTIONARY_PAGE:
            dictionary = _plain(data, page, k, 0, page.n_values)
            continue
        at, there = 0, np.ones(page.n_values, bool)
        if max_level:
            at = 4 + int.from_bytes(_part(data, page, 0, 4), "little")
            there = _hybrid(_part(data, page, 4, at), max_level.bit_length(), page.n_values) == max_level
        n, rows = int(there.sum()), np.full((page.n_values, 3), -1, np.int64)
        if page.encoding == PLAIN:
            rows[there] = _plain(data, page, k, at, n)
        elif n:
            body = _part(data, page, at, page.uncompressed)
            rows[there] = dictionary[_hybrid(body[1:], body[0], n)]
        parts.append(rows)
    return np.concatenate(parts)


def _plain(data: memoryview, page: Page, k: int, at: int, n: int) -> np.ndarray:
    """Places of PLAIN byte arrays: a length of 4 bytes stands before each."""
    rows = np.zeros((n, 3), np.int64)
    for row in range(n):
        end = at + 4 + int.from_bytes(_part(data, page, at, at + 4), "little")
        rows[row] = k, at + 4, end
        at = end
    if at != page.uncompressed:
        raise ValueError(f"values of {at} bytes in a page of {page.uncompressed}")
    return rows


def _part(data: memoryview, page: Page, start: int, stop: int) -> bytes:
    if page.slices is None:
        return bytes(data[page.offset + start : page.offset + stop])
    return page.slices.slice(lambda at, n: bytes(data[page.offset + at : page.offset + at + n]), start, stop)


def _damaged(path: Path, offset: int, error: Exception) -> VlaError:
    return problem(f"{path}, page at byte {offset}: {error}", "a whole page", "the file is damaged: copy it again")


def _hybrid(data: bytes, width: int, n: int) -> np.ndarray:
    """int64 (n,): integers of `width` bits as runs, each repeated or bit-packed in groups of 8 (lowest bit first)."""
    parts, at, left = [np.zeros(0, np.int64)], 0, n
    while left > 0:
        header, at = varint(data, at)
        if header & 1:
            count, size = (header >> 1) * 8, (header >> 1) * width
            bits = np.unpackbits(np.frombuffer(data[at : at + size], np.uint8), bitorder="little")
            parts.append(bits[: count * width].reshape(count, width) @ (1 << np.arange(width)))
        else:
            count, size = header >> 1, (width + 7) // 8
            parts.append(np.full(min(count, left), int.from_bytes(data[at : at + size], "little"), np.int64))
        if count == 0:
            raise ValueError("an empty run in a parquet page")
        at, left = at + size, left - count
    return np.concatenate(parts)[:n]


def _walk(data: memoryview, start: int, end: int, is_snappy: bool) -> list[Page]:
    """All pages between two bytes of a file. ValueError for what `image_index` leaves to pyarrow."""
    pages: list[Page] = []
    while start < end:
        fields, length = _struct(data, start)
        kind, size, uncompressed = fields[1], fields[3], fields[2]
        about = fields[5] if kind == DATA_PAGE else fields[7] if kind == DICTIONARY_PAGE and not pages else None
        if about is None or about[2] not in (PLAIN, PLAIN_DICTIONARY, RLE_DICTIONARY) or not 0 <= size <= end - length:
            raise ValueError("a page of another kind")
        slices = SnappySlices(data[length : length + size]) if is_snappy else None
        if uncompressed != (slices.size if slices else size):
            raise ValueError("a page of another size")
        pages.append(Page(length, size, uncompressed, kind, about[2], about[1], slices))
        start = length + size
    return pages


def _struct(data: memoryview, at: int) -> tuple[dict[int, Any], int]:
    """A Thrift struct in the compact protocol: field number -> value (integers and structs; others are skipped)."""
    fields: dict[int, Any] = {}
    number = 0
    while (byte := data[at]) != 0:
        at += 1
        if byte >> 4:
            number += byte >> 4
        else:
            zigzag, at = varint(data, at)
            number = (zigzag >> 1) ^ -(zigzag & 1)
        fields[number], at = _field(data, at, byte & 15)
    return fields, at + 1


def _field(data: memoryview, at: int, kind: int) -> tuple[Any, int]:
    if kind in (1, 2):  # true, false
        return kind == 1, at
    if kind == 3:  # a byte
        return data[at], at + 1
    if kind in (4, 5, 6):  # integers, zigzag
        value, at = varint(data, at)
        return (value >> 1) ^ -(value & 1), at
    if kind == 7:  # double
        return None, at + 8
    if kind == 8:  # bytes
        size, at = varint(data, at)
        return None, at + size
    if kind == 12:
        return _struct(data, at)
    raise ValueError(f"Thrift type {kind} in a parquet page header")
