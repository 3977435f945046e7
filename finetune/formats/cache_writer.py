"""Write our own cache, episode by episode, safe against a crash at any moment.

An episode counts from the moment its row is in episodes.jsonl; frames beyond the last row are cut off when the writer
opens the folder again. `cache.json`, with a checksum of every file, comes last.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import BinaryIO

import numpy as np

from vla.files import append_jsonl, read_jsonl, write_bytes, write_json, write_text
from vla.finetune.formats.cache_format import (
    CACHE_JSON,
    EPISODES_JSONL,
    FORMAT,
    HEADER_BYTES,
    VERSION,
    WRITING_JSON,
    CacheSettings,
    Decoder,
    camera_folder,
    encode_frame,
    file_entry,
    jpeg_decoder,
    npy_header,
    shard_files,
    source_hash,
)
from vla.finetune.formats.source import FrameSource
from vla.finetune.formats.unfinished import is_new, read_object
from vla.types import VlaError, problem


class CacheWriter:
    """Append episodes of one source with `add_episode`, in its order, then `finish`.

    Raises:
        VlaError: the folder holds anything but the beginning of this very cache.
    """

    def __init__(self, root: Path | str, source: FrameSource, settings: CacheSettings) -> None:
        self.root, self.source, self.settings = Path(root), source, settings
        self._head = {"format": FORMAT, "version": VERSION, "source_hash": source_hash(source),
                      "cameras": list(source.cameras), "settings": asdict(settings)}  # fmt: skip
        self.decoder: Decoder | None = jpeg_decoder(source) if settings.kind == "jpeg" else None
        self._claim()
        self.rows = read_jsonl(self.root / EPISODES_JSONL)
        # A line cut by a crash would swallow the next one.
        write_text(self.root / EPISODES_JSONL, "".join(json.dumps(row) + "\n" for row in self.rows))
        self._shards = {
            camera: ImageShards(
                camera_folder(self.root, k, camera), settings, source.image_shape(camera), self.n_frames
            )
            for k, camera in enumerate(source.cameras)
        }

    @property
    def n_frames(self) -> int:
        return self.rows[-1]["stop"] if self.rows else 0

    def add_episode(self, episode: int, each_frame: Callable[[], None] = lambda: None) -> None:
        """Append the source's episode of this number. `each_frame` is called after every frame, for progress.

        Raises:
            VlaError: a frame or number of it cannot be used; nothing of the episode is kept.
        """
        span, start = self.source.episodes[episode], self.n_frames
        try:
            check_numbers(self.source, episode)
            for i in range(span.start, span.stop):
                for camera, shards in self._shards.items():
                    shards.append(encode_frame(self.source, i, camera, self.settings, self.decoder))
                each_frame()
        except VlaError:
            for shards in self._shards.values():
                shards.cut(start)
            raise
        for shards in self._shards.values():
            shards.flush()
        row = {
            "start": start, "stop": start + span.stop - span.start, "source_episode": episode,
            "success": self.source.success_of(episode), "seed": self.source.seed_of(episode),
            "task": self.source.task_of(episode),
        }  # fmt: skip
        append_jsonl(self.root / EPISODES_JSONL, row)
        self.rows.append(row)

    def close(self) -> None:
        """Let go of the files; what is there can be continued."""
        for shards in self._shards.values():
            shards.close()

    def finish(self) -> None:
        """Write the numbers, the checksums and cache.json. The cache can be read from here on."""
        if not self.rows:
            raise problem(f"no episode of {self.source.where} to write", "at least one", "choose other episodes")
        for shards in self._shards.values():
            shards.finish()
        instructions, has_rewards = self._write_columns()
        files = [path for folder in ("columns", "images") for path in sorted((self.root / folder).rglob("*"))]
        listed = [
            *(path for path in files if path.is_file() and not path.name.startswith(".")),
            self.root / EPISODES_JSONL,
        ]
        source = self.source
        cameras = {camera: {"shape": list(shards.shape), "frames_per_shard": shards.per_shard}
                   for camera, shards in self._shards.items()}  # fmt: skip
        write_json(self.root / CACHE_JSON, self._head | {
            "name": source.name, "source": source.where, "fps": source.fps, "cameras": cameras,
            "action_names": list(source.action_names), "state_names": list(source.state_names),
            "n_frames": self.n_frames, "n_episodes": len(self.rows), "has_rewards": has_rewards,
            "instructions": instructions, "jpeg_decoder": self.decoder,
            "files": {path.relative_to(self.root).as_posix(): file_entry(path) for path in listed},
        })  # fmt: skip
        (self.root / WRITING_JSON).unlink()

    def _claim(self) -> None:
        path = self.root / WRITING_JSON
        if path.is_file():
            found = read_object(path, "remove the folder and convert anew")
            for name, value in self._head.items():
                if found.get(name) != value:
                    raise problem(f"{name} {value}", f"{found.get(name)}, as the cache in {self.root} was begun",
                                  "use the same source and settings, or another folder")  # fmt: skip
        elif not is_new(self.root):
            raise problem(f"{self.root} is not empty", "a new folder, or a cache to continue", "choose another folder")
        else:
            write_json(path, self._head)

    def _write_columns(self) -> tuple[list[str], bool]:
        """(instructions, whether there are rewards)."""
        source = self.source
        spans = [source.episodes[row["source_episode"]] for row in self.rows]
        frames = np.concatenate([np.arange(span.start, span.stop) for span in spans])
        columns = {"action": source.actions(), "state": source.states(), "reward": source.rewards()}
        for name, values in columns.items():
            if values is not None:
                _write_npy(self.root / "columns" / f"{name}.npy", np.ascontiguousarray(values[frames], np.float32))
        known: dict[str, int] = {}
        numbers = [known.setdefault(source.instruction_of(int(i)), len(known)) for i in frames]
        _write_npy(self.root / "columns/instruction.npy", np.array(numbers, np.int32))
        return list(known), columns["reward"] is not None


class ImageShards:
    """The image files of one camera, appended to frame by frame."""

    def __init__(self, folder: Path, settings: CacheSettings, shape: tuple[int, int, int], n_done: int) -> None:
        """`shape`: of the source's frames. `n_done`: frames that count; anything beyond is removed."""
        self.folder, self.kind = folder, settings.kind
        self.shape = settings.shape(shape)
        self.per_shard = settings.frames_per_shard(self.shape)
        self._frame_bytes = int(np.prod(self.shape))
        self._files: list[BinaryIO] = []
        folder.mkdir(parents=True, exist_ok=True)
        self.cut(n_done)

    def append(self, record: bytes) -> None:
        """One more frame: the pixels of a raw shard, a JPEG file of the other."""
        number, row = divmod(self.n, self.per_shard)
        if row == 0:
            self._close_shard()
            self._open(number, 0)
        self._files[0].write(record)
        if self.kind == "jpeg":
            self._end += len(record)
            self._files[1].write(self._end.to_bytes(8, "little"))
        self.n += 1

    def cut(self, n: int) -> None:
        """Back to `n` frames."""
        self.close()
        self.n, keep = n, -(-n // self.per_shard)
        for path in sorted(self.folder.glob("shard-*")):
            if int(path.name[6:11]) >= keep:
                path.unlink()
        if n:
            self._open(keep - 1, n - (keep - 1) * self.per_shard)

    def flush(self) -> None:
        """All frames so far are on disk when this returns."""
        for file in self._files:
            file.flush()
            os.fsync(file.fileno())

    def finish(self) -> None:
        self._close_shard()

    def close(self) -> None:
        for file in self._files:
            file.close()
        self._files = []

    def _open(self, number: int, rows: int) -> None:
        """Open a shard for writing after its first `rows` frames."""
        paths = shard_files(self.folder, number, self.kind)
        self._files = [open(path, "r+b" if rows else "w+b") for path in paths]
        if self.kind == "raw":
            self._fit(self._files[0], paths[0], HEADER_BYTES + rows * self._frame_bytes)
            return
        self._end = 0
        if rows:
            self._files[1].seek(HEADER_BYTES + 8 * rows)
            self._end = int.from_bytes(self._files[1].read(8), "little")
        self._fit(self._files[0], paths[0], self._end)
        self._fit(self._files[1], paths[1], HEADER_BYTES + 8 * (rows + 1))

    def _fit(self, file: BinaryIO, path: Path, size: int) -> None:
        """Cut a file to `size` and stand at its end. A new one is grown by its header, which is filled in later."""
        got = os.fstat(file.fileno()).st_size
        if 0 < got < size:
            raise problem(f"{path} of {got} bytes", f"at least {size}, for the episodes in {EPISODES_JSONL}",
                          "the disk lost data: remove the folder and start again")  # fmt: skip
        file.truncate(size)
        file.seek(size)

    def _close_shard(self) -> None:
        """Fill in the number of rows, now that it is known."""
        if not self._files:
            return
        rows = (self.n - 1) % self.per_shard + 1
        header = npy_header("|u1", (rows, *self.shape)) if self.kind == "raw" else npy_header("<i8", (rows + 1,))
        self._files[-1].seek(0)
        self._files[-1].write(header)
        self.flush()
        self.close()

    _end = 0
    n = 0


def check_numbers(source: FrameSource, episode: int) -> None:
    """VlaError naming the first frame of an episode whose action or state is not finite."""
    span = source.episodes[episode]
    for name, values in (("action", source.actions()), ("state", source.states())):
        if values is None:
            continue
        bad = np.argwhere(~np.isfinite(values[span.start : span.stop]))
        if len(bad):
            frame, dim = (int(k) for k in bad[0])
            raise problem(f"{name} {values[span.start + frame, dim]} at frame {frame} of episode {episode}, dimension {dim}, "
                          f"in {source.where}", "finite numbers", "mend the data, or pass --skip-bad")  # fmt: skip


def _write_npy(path: Path, values: np.ndarray) -> None:
    write_bytes(path, npy_header(values.dtype.str, values.shape) + values.tobytes())
