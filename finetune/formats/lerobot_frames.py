"""Frames out of a dataset's files, with the caches that make random access cheap."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pyarrow as pa

from vla.finetune.formats.lerobot_format import open_parquet, read_columns
from vla.finetune.formats.lerobot_video import VideoFile
from vla.finetune.formats.parquet_pages import ImageIndex, image_index
from vla.types import problem

OPEN_VIDEOS = 8
OPEN_TABLES = 1024

_INHERITED: list[Any] = []  # decoders of a parent process, kept so that a fork never frees threads it does not have


class FrameFiles:
    """Images from parquet and MP4 files. Keeps up to `cache_mb` MiB of encoded images and a few open decoders.

    Of a parquet file only the image asked for is read, where the file is written the usual way; otherwise the row group
    around it (in native datasets: one episode), which is what the cache is for.
    """

    def __init__(self, cache_mb: int) -> None:
        self.cache_mb = cache_mb
        self._forget()

    def video(self, path: Path, time_s: float, tolerance_s: float) -> np.ndarray:
        """uint8 (height, width, 3): the frame of an MP4 at `time_s`."""
        self._forget_after_fork()
        if path not in self._videos:
            self._videos[path] = VideoFile(path)
            if len(self._videos) > OPEN_VIDEOS:
                self._videos.popitem(last=False)[1].close()
        self._videos.move_to_end(path)
        return self._videos[path].frame_at(time_s, tolerance_s)

    def encoded(self, path: Path, row: int, column: str, folders: Sequence[Path] = ()) -> bytes | None:
        """The PNG or JPEG in `row` of a parquet file's `column`. A cell that holds a path and no bytes stands for the
        file of that path in one of `folders`; None if that is missing too."""
        self._forget_after_fork()
        if path not in self._row_groups:
            self._row_groups[path] = _row_group_starts(path)
            if len(self._row_groups) > OPEN_TABLES:
                self._row_groups.popitem(last=False)
        starts = self._row_groups[path]
        if row >= starts[-1]:
            raise problem(f"{path} with {starts[-1]} rows", f"at least {row + 1}", "copy the dataset again")
        group = int(np.searchsorted(starts, row, side="right")) - 1
        place, key = row - int(starts[group]), (path, group, column)
        if key not in self._indexes:
            self._indexes[key] = image_index(open_parquet(path), path, group, column)
            if len(self._indexes) > OPEN_TABLES:
                self._indexes.popitem(last=False)
        index = self._indexes[key]
        data = None if index is None else index.image(place)
        if data:
            return data
        value = self._column(path, group, column)[place].as_py() or {}
        return value.get("bytes") or _image_file(value.get("path"), folders)

    def _column(self, path: Path, group: int, column: str) -> pa.ChunkedArray:
        found = self._images.get((path, group, column))
        if found is None:
            found = self._images[path, group, column] = read_columns(path, [column], group).column(column)
            self._images_bytes += found.nbytes
            while self._images_bytes > self.cache_mb * 2**20 and len(self._images) > 1:
                self._images_bytes -= self._images.popitem(last=False)[1].nbytes
        self._images.move_to_end((path, group, column))
        return found

    def _forget_after_fork(self) -> None:
        """A child process shares file positions with its parent: it must open its own files."""
        if self._pid != os.getpid():
            _INHERITED.append(self._videos)
            self._forget()

    def _forget(self) -> None:
        self._pid = os.getpid()
        self._videos: OrderedDict[Path, VideoFile] = OrderedDict()
        self._row_groups: OrderedDict[Path, np.ndarray] = OrderedDict()  # first row of each row group, and the end
        self._indexes: OrderedDict[tuple[Path, int, str], ImageIndex | None] = OrderedDict()
        self._images: OrderedDict[tuple[Path, int, str], pa.ChunkedArray] = OrderedDict()
        self._images_bytes = 0


def _image_file(name: str | None, folders: Sequence[Path]) -> bytes | None:
    """The bytes of an image beside the parquet file; None if there is no such file. The name comes with the data: it
    may not leave the folders."""
    relative = PurePosixPath(name or "..")
    if relative.is_absolute() or ".." in relative.parts:
        return None
    found = [folder / relative for folder in folders if (folder / relative).is_file()]
    return found[0].read_bytes() if found else None


def _row_group_starts(path: Path) -> np.ndarray:
    file = open_parquet(path)
    rows = [file.metadata.row_group(g).num_rows for g in range(file.num_row_groups)]
    return np.concatenate([[0], np.cumsum(rows)]).astype(np.int64)
