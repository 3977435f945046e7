"""Every value equals what pyarrow reads, for each way it writes a column of images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from vla.finetune.formats.lerobot_frames import FrameFiles
from vla.finetune.formats.parquet_pages import PLAIN, ImageIndex, image_index
from vla.finetune.formats.snappy_slices import SnappySlices
from vla.types import VlaError

CELL = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def cells(n: int, seed: int, nulls: float, kinds: int | None) -> list[dict[str, Any] | None]:
    """`kinds`: so many different values; None: all differ."""
    rng = np.random.default_rng(seed)
    pool = [rng.bytes(int(rng.integers(0, 3000))) for _ in range(kinds or n)]
    rows: list[dict[str, Any] | None] = []
    for k in range(n):
        draw = rng.random()
        data = pool[int(rng.integers(kinds)) if kinds else k]
        rows.append(None if draw < nulls / 2 else {"bytes": None if draw < nulls else data, "path": f"{k}.png"})
    return rows


def write(path: Path, rows: list[dict[str, Any] | None], **options: Any) -> list[bytes | None]:
    pq.write_table(pa.table({"x": list(range(len(rows))), "image": pa.array(rows, CELL)}), path, **options)
    return [row["bytes"] if row else None for row in rows]


def indexes(path: Path) -> list[ImageIndex | None]:
    file = pq.ParquetFile(path)
    return [image_index(file, path, group, "image") for group in range(file.num_row_groups)]


def read_all(path: Path) -> list[bytes | None]:
    found = []
    for index in indexes(path):
        assert index is not None
        found += [index.image(row) for row in range(len(index.places))]
    return found


@pytest.mark.parametrize("compression", ["snappy", "none"])
@pytest.mark.parametrize("use_dictionary", [True, False])
@pytest.mark.parametrize(("nulls", "kinds"), [(0.0, None), (0.0, 5), (0.3, None), (0.3, 40), (1.0, None)])
def test_values_are_pyarrows(tmp_path, compression, use_dictionary, nulls, kinds):
    path = tmp_path / "a.parquet"
    options = {"compression": compression, "use_dictionary": use_dictionary, "data_page_size": 9000}
    rows = cells(137, 1, nulls, kinds)
    wanted = write(path, rows, row_group_size=50, dictionary_pagesize_limit=20000, write_batch_size=10, **options)
    assert read_all(path) == wanted


def test_both_encodings_in_one_column(tmp_path):
    """pyarrow begins with a dictionary and gives it up when that grows too large."""
    path = tmp_path / "a.parquet"
    wanted = write(path, cells(300, 2, 0.0, None), dictionary_pagesize_limit=40000, write_batch_size=10)
    index = indexes(path)[0]
    assert index is not None and {page.encoding == PLAIN for page in index.pages if page.kind == 0} == {True, False}
    assert read_all(path) == wanted


@pytest.mark.parametrize(
    "options", [{"data_page_version": "2.0"}, {"compression": "zstd"}, {"compression": "brotli"}, {"text": True}]
)
def test_what_is_left_to_pyarrow_is_read_all_the_same(tmp_path, options):
    path, rows = tmp_path / "a.parquet", cells(60, 3, 0.0, None)
    if options.pop("text", None):  # compresses well: many small elements
        words = np.random.default_rng(0).choice([b"red ", b"green ", b"blue "], (60, 9000))
        rows = [{"bytes": b"".join(row), "path": None} for row in words.tolist()]
    wanted = write(path, rows, row_group_size=25, **options)
    assert indexes(path) == [None] * 3
    frames = FrameFiles(cache_mb=1)
    assert [frames.encoded(path, k, "image") for k in range(60)] == wanted


def test_random_access_reads_no_row_group(tmp_path):
    path = tmp_path / "a.parquet"
    wanted = write(path, cells(3000, 4, 0.0, None), row_group_size=700)
    frames = FrameFiles(cache_mb=1)
    for k in np.random.default_rng(0).integers(0, 3000, 400):
        assert (frames.encoded(path, int(k), "image") or b"") == wanted[int(k)]
    assert frames._images_bytes < 2**23  # only for images of no bytes


def test_a_column_that_is_not_an_image(tmp_path):
    path = tmp_path / "a.parquet"
    write(path, cells(3, 0, 0.0, None))
    assert image_index(pq.ParquetFile(path), path, 0, "x") is None


@pytest.mark.parametrize("kind", ["noise", "runs", "mixed", "short", "empty"])
def test_slices_are_those_of_the_whole_block(kind):
    rng = np.random.default_rng(7)
    noise = rng.bytes(200_000)
    data = {"noise": noise, "runs": b"ab" * 60 + noise + b"x" * 900 + noise[:70_000] + noise[1000:3000],
            "mixed": noise[:5000] * 2 + bytes(200) + noise[:90_000], "short": b"abcabcabcabcd", "empty": b""}[kind]  # fmt: skip
    block = pa.Codec("snappy").compress(data, asbytes=True)
    slices = SnappySlices(block)
    assert slices.size == len(data)
    for _ in range(300):
        start, stop = sorted(rng.integers(0, len(data) + 1, 2).tolist())
        assert slices.slice(lambda at, n: block[at : at + n], start, stop) == data[start:stop]
    with pytest.raises(ValueError, match="bytes 0"):
        slices.slice(lambda at, n: block[at : at + n], 0, len(data) + 1)


def test_damage(tmp_path):
    path = tmp_path / "a.parquet"
    write(path, cells(50, 5, 0.0, None), use_dictionary=False)
    index, whole = indexes(path)[0], path.read_bytes()
    assert index is not None
    path.write_bytes(whole[: index.pages[0].offset + 100])
    with pytest.raises(VlaError, match=r"a.parquet, page at byte \d+: the file ends in this page; .*copy it again"):
        index.image(40)
    for seed in range(300):  # whatever is in a header or an element, nothing but pyarrow's or our own errors
        rng = np.random.default_rng(seed)
        at = index.pages[0].offset - 20 + int(rng.integers(0, 60))
        path.write_bytes(whole[:at] + rng.bytes(3) + whole[at + 3 :])
        frames = FrameFiles(cache_mb=1)
        for row in (0, 49):
            try:
                frames.encoded(path, row, "image")
            except VlaError:
                continue
