"""Read our own cache: a frame is one slice of a memory-mapped file, or one JPEG."""

from __future__ import annotations

import tokenize
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vla.files import read_jsonl
from vla.finetune.formats.cache_format import (
    EPISODES_JSONL,
    camera_folder,
    decode_jpeg,
    file_entry,
    read_cache_json,
    shard_files,
    wrong_files,
)
from vla.finetune.formats.source import BadEpisode, EpisodeSpan, FrameSource, Span
from vla.types import VlaError, problem


class CacheReader(FrameSource):
    """A folder that `vla data convert --to cache` has finished. Opening it compares every file's length, not its content:
    see `damaged_files`.

    Args:
        skip_bad: leave out, and list in `bad`, the episodes whose image files are missing or of another length.
    """

    def __init__(self, root: Path | str, name: str | None = None, skip_bad: bool = False) -> None:
        self.root = Path(root)
        self.info = read_cache_json(self.root, check_files=not skip_bad)
        self._arguments = (self.root, name, skip_bad)
        self.name = name or self.info["name"]
        self.where = str(self.root)
        self.fps = float(self.info["fps"])
        self.cameras = tuple(self.info["cameras"])
        self.action_names = tuple(self.info["action_names"])
        self.state_names = tuple(self.info["state_names"])
        self.kind: str = self.info["settings"]["kind"]
        self.rows = read_jsonl(self.root / EPISODES_JSONL)
        self.episodes = [Span(k, row["start"], row["stop"]) for k, row in enumerate(self.rows)]
        if (self.n_episodes, len(self)) != (self.info["n_episodes"], self.info["n_frames"]):
            raise problem(f"{self.n_episodes} episodes, {len(self)} frames in {self.root / EPISODES_JSONL}",
                          f"{self.info['n_episodes']} and {self.info['n_frames']}", "write the cache again")  # fmt: skip
        self._folders = {camera: camera_folder(self.root, k, camera) for k, camera in enumerate(self.cameras)}
        self._columns: dict[str, np.ndarray] = {}
        self._shards: dict[tuple[str, int], tuple[np.ndarray, ...]] = {}
        self._kept: np.ndarray | None = None
        """int64 (N,): where each frame lies, if episodes are left out."""
        self._numbers: Sequence[int] = range(self.n_episodes)
        if skip_bad:
            self._leave_out_bad()

    def __reduce__(self) -> tuple[Any, ...]:
        return CacheReader, self._arguments

    def actions(self) -> np.ndarray:
        return self._column("action")

    def states(self) -> np.ndarray | None:
        return self._column("state") if self.state_names else None

    def rewards(self) -> np.ndarray | None:
        return self._column("reward") if self.info["has_rewards"] else None

    def images(self, i: int, cameras: Sequence[str] | None = None) -> dict[str, np.ndarray]:
        self.check_frame(i)
        found = {}
        for camera in self.cameras if cameras is None else cameras:
            if self.kind == "raw":
                shard, row = self._shard(camera, i)
                found[camera] = shard[0][row].copy()
            else:
                decoder = self.info["jpeg_decoder"] or "pillow"
                where = f"{self._folders[camera]}, frame {i}"
                found[camera] = decode_jpeg(self._jpeg(i, camera), where, self.image_shape(camera), decoder)
        return found

    def jpeg(self, i: int, camera: str) -> bytes | None:
        self.check_frame(i)
        return self._jpeg(i, camera) if self.kind == "jpeg" else None

    def image_shape(self, camera: str) -> tuple[int, int, int]:
        self.check_camera(camera)
        height, width, channels = self.info["cameras"][camera]["shape"]
        return height, width, channels

    def instruction_of(self, i: int) -> str:
        self.check_frame(i)
        return self.info["instructions"][int(self._column("instruction")[i])]

    def success_of(self, episode: int) -> bool | None:
        return self.rows[episode]["success"]

    def seed_of(self, episode: int) -> int | None:
        return self.rows[episode]["seed"]

    def task_of(self, episode: int) -> str | None:
        return self.rows[episode]["task"]

    def place_of(self, episode: int) -> tuple[str, int]:
        return self.where, self._numbers[episode]

    def damaged_files(self) -> list[Path]:
        """Files whose content is not what was written: every byte is read and compared with the checksums."""
        return [self.root / name for name, entry in self.info["files"].items() if file_entry(self.root / name) != entry]

    def record(self, i: int, camera: str) -> bytes:
        """Frame `i` as stored: pixels of a raw cache, a JPEG file otherwise."""
        if self.kind == "jpeg":
            return self._jpeg(i, camera)
        shard, row = self._shard(camera, i)
        return shard[0][row].tobytes()

    def _jpeg(self, i: int, camera: str) -> bytes:
        (data, offsets), row = self._shard(camera, i)
        if offsets.ndim != 1 or row + 1 >= len(offsets) or not 0 <= offsets[row] <= offsets[row + 1] <= len(data):
            raise problem(f"{self._folders[camera]}, frame {i}: places that are not in its shard", "those of a JPEG image",
                          "copy the cache again, or write it again")  # fmt: skip
        return data[offsets[row] : offsets[row + 1]].tobytes()

    def _column(self, name: str) -> np.ndarray:
        if name not in self._columns:
            values = _mapped(self.root / "columns" / f"{name}.npy")
            self._columns[name] = values if self._kept is None else values[self._kept]
        return self._columns[name]

    def _leave_out_bad(self) -> None:
        """Forget the episodes with frames in a damaged image file; VlaError if another file is damaged, or none is left."""
        faults = wrong_files(self.root, self.info)
        for path, fault in faults.items():
            if path.parent.parent != self.root / "images":  # the numbers of all episodes are in it
                raise fault
        kept, frames = [], []
        for k, span in enumerate(self.episodes):
            found = [faults[path] for path in self._image_files(span) if path in faults]
            if found:
                self.bad += (BadEpisode(str(self.root), k, str(found[0])),)
            else:
                kept.append(k)
                frames.append(np.arange(span.start, span.stop))
        if not self.bad:
            return
        if not kept:
            raise problem(f"{self.root} without one usable episode (first: {self.bad[0].why})", "at least one",
                          "copy the cache again, or write it again")  # fmt: skip
        stops = np.cumsum([len(rows) for rows in frames]).tolist()
        self._kept, self._numbers, self.rows = np.concatenate(frames), kept, [self.rows[k] for k in kept]
        self.episodes = [
            Span(k, stop - len(rows), stop) for k, (rows, stop) in enumerate(zip(frames, stops, strict=True))
        ]

    def _image_files(self, span: EpisodeSpan) -> list[Path]:
        """The shards that hold frames of an episode of the whole cache."""
        found = []
        for camera in self.cameras:
            per_shard = self.info["cameras"][camera]["frames_per_shard"]
            for number in range(span.start // per_shard, (max(span.stop, span.start + 1) - 1) // per_shard + 1):
                found += shard_files(self._folders[camera], number, self.kind)
        return found

    def _shard(self, camera: str, i: int) -> tuple[tuple[np.ndarray, ...], int]:
        """The arrays of the shard that holds frame `i`, and the frame's row in it."""
        self.check_camera(camera)
        number, row = divmod(
            i if self._kept is None else int(self._kept[i]), self.info["cameras"][camera]["frames_per_shard"]
        )
        found = self._shards.get((camera, number))
        if found is None:
            files = shard_files(self._folders[camera], number, self.kind)
            if self.kind == "raw":
                found = (_mapped(files[0]),)
            else:
                found = (np.asarray(np.memmap(files[0], np.uint8, mode="r")), _mapped(files[1]))
            self._shards[camera, number] = found
        return found, row


def _mapped(path: Path) -> np.ndarray:
    """A .npy, memory-mapped, as a plain array (slices of `np.memmap` itself are several times slower)."""
    try:
        return np.asarray(np.load(path, mmap_mode="r", allow_pickle=False))
    except (OSError, ValueError, EOFError, SyntaxError, tokenize.TokenError) as error:  # NumPy's, of a damaged header
        raise VlaError(f"got {path}: {error}; expected a whole .npy file; fix: copy it again, or write the cache again") from error  # fmt: skip
