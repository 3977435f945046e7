"""Read a LeRobotDataset v3.0, v2.1 or v2.0 with pyarrow and PyAV; neither `lerobot` nor `datasets` is needed.

The table of episodes (meta/episodes) says what belongs to the dataset: files it does not name are ignored. Stored
statistics are never read: their quantiles are merged approximately (see `vla.finetune.data.statistics`).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from vla.finetune.formats import lerobot_v21
from vla.finetune.formats.lerobot_faults import leave_out_bad
from vla.finetune.formats.lerobot_format import (
    DATA_PATH,
    INFO_PATH,
    TASKS_PATH,
    VIDEO_PATH,
    camera_of,
    column_array,
    decode_image,
    file_path,
    image_shape_of,
    names_of,
    read_columns,
    read_info,
)
from vla.finetune.formats.lerobot_frames import FrameFiles
from vla.finetune.formats.lerobot_tables import EpisodeRow, read_episodes, read_tasks
from vla.finetune.formats.source import FrameSource
from vla.types import Episode, problem

JPEG_START = b"\xff\xd8\xff"
TOLERANCE_S = 1e-4  # lerobot's: a decoded frame further than this from its timestamp is a fault


class LeRobotReader(FrameSource):
    """Random access to frames and episodes.

    Encoded frames of up to `cache_mb` MiB are kept per process. Picklable: a copy opens its own files, and a forked
    child reopens them.

    Args:
        root: folder that holds meta/ and data/.
        name: the `unnorm_key` of its statistics; the folder's name if None.
        need: called with the path of each data or video file before it is opened, so that it can be put there first
            (see `vla.finetune.formats.hub`). Must be picklable.
        skip_bad: read the numbers of every episode now and leave out those where they cannot be read or used.
    """

    def __init__(
        self,
        root: Path | str,
        name: str | None = None,
        cache_mb: int = 256,
        need: Callable[[Path], object] | None = None,
        skip_bad: bool = False,
    ) -> None:
        self.root = Path(root)
        self.where = str(self.root)
        self.name = name or self.root.resolve().name
        self.cache_mb = cache_mb
        self.info = read_info(self.root)
        self.is_v2 = self.info["codebase_version"].startswith("v2.")
        self.features: dict[str, dict[str, Any]] = self.info["features"]
        self.fps = float(self.info["fps"])
        self.camera_keys = {camera_of(key) or key: key for key, feature in self.features.items()
                            if feature["dtype"] in ("image", "video")}  # fmt: skip
        self.cameras = tuple(self.camera_keys)  # without `observation.images.`, in the order of the data
        self.state_key = "observation.state" if "observation.state" in self.features else None
        self.state_names = names_of(self.features[self.state_key]) if self.state_key else ()
        self.action_names = names_of(self._feature("action"))
        keys = [key for key in self.camera_keys.values() if self.features[key]["dtype"] == "video"]
        if self.is_v2:
            self.tasks = lerobot_v21.read_tasks(self.root)
            rows = lerobot_v21.read_episodes(self.root, self.info, keys)
        else:
            self.tasks, rows = read_tasks(self.root), read_episodes(self.root, keys)
        self._need = need
        self._hold(rows)
        self._check_totals()
        if skip_bad:
            self.bad = leave_out_bad(self)

    def __getstate__(self) -> dict[str, Any]:
        """Without what was read: columns and open files."""
        left_out = ("_columns", "_frames", "_actions", "_states", "_timestamps", "_stops")
        return {name: value for name, value in self.__dict__.items() if name not in left_out}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._hold(self.episodes, self.stored_at)

    def _hold(self, rows: Sequence[EpisodeRow], stored_at: Sequence[tuple[int, int]] | None = None) -> None:
        """These episodes, nothing of them read yet. `stored_at` is given for a part of the dataset."""
        self.episodes: Sequence[EpisodeRow] = rows
        if stored_at is None:
            self._n_rows: dict[tuple[int, int], int] = {}
            stored_at = []
            for row in rows:
                stored_at.append((self._n_rows.get(row.data_file, 0), row.index))
                self._n_rows[row.data_file] = stored_at[-1][0] + len(row)
        self.stored_at = stored_at
        """For each episode: the row of its data file where it begins, and its number in the dataset."""
        self._slices: dict[tuple[int, int], list[tuple[int, int]]] = {}
        for row, (begin, _) in zip(rows, stored_at, strict=True):
            self._slices.setdefault(row.data_file, []).append((begin, len(row)))
        self._columns: dict[str, np.ndarray] = {}
        self._frames = FrameFiles(self.cache_mb)

    def parts(self) -> Iterator[LeRobotReader]:
        """One reader per data file, its frames and episodes counted from 0: what a stream holds at a time."""
        rows: dict[tuple[int, int], list[EpisodeRow]] = {}
        for row in self.episodes:
            rows.setdefault(row.data_file, []).append(row)
        for found in rows.values():
            part = copy.copy(self)
            part.keep([row.index for row in found])
            yield part

    def keep(self, episodes: Sequence[int]) -> None:
        """Forget all other episodes; these are counted from 0."""
        rows: list[EpisodeRow] = []
        for k in episodes:
            row, start = self.episodes[k], rows[-1].stop if rows else 0
            rows.append(replace(row, index=len(rows), start=start, stop=start + len(row)))
        self._hold(rows, [self.stored_at[k] for k in episodes])

    def files(self) -> list[Path]:
        """The data and video files of the episodes, in order."""
        paths = [self.data_path(file) for file in self.data_files]
        videos = [self.video_path(v[:2], key) for row in self.episodes for key, v in row.videos.items()]
        return list(dict.fromkeys(paths + videos))

    def column(self, key: str) -> np.ndarray:
        """Every row of a feature that is not an image: (N, D) or (N,), the dtype as stored."""
        if key not in self._columns:
            feature = self._feature(key)
            width = int(np.prod(feature["shape"]))
            parts = [self.file_column(file, key) for file in self.data_files]
            if not parts:
                shape = (0, width) if width > 1 else (0,)
                parts = [np.zeros(shape, object if feature["dtype"] == "string" else feature["dtype"])]
            self._columns[key] = np.concatenate(parts)
        return self._columns[key]

    def file_column(self, file: tuple[int, int], key: str) -> np.ndarray:
        """The rows of `column(key)` that one data file holds."""
        path = self.there(self.data_path(file))
        column, slices, expected = read_columns(path, [key]).column(key), self._slices[file], self._n_rows[file]
        if sum(length for _, length in slices) < expected:  # of some of its episodes
            chunks = [chunk for begin, length in slices for chunk in column.slice(begin, length).chunks]
            column = pa.chunked_array(chunks, type=column.type)
        elif len(column) != expected:
            raise problem(
                f"{path} with {len(column)} rows", f"{expected}, as the table of episodes says", "copy it again"
            )
        return column_array(column, self._feature(key), f"{path}: {key}")

    @property
    def data_files(self) -> tuple[tuple[int, int], ...]:
        """Chunk and file index of every data file, in the order of their frames."""
        return tuple(self._slices)

    def actions(self) -> np.ndarray:
        """float32 (N, D), un-normalised."""
        return self._actions

    def states(self) -> np.ndarray | None:
        """float32 (N, S), un-normalised; None if the data has no proprioception."""
        return self._states

    def timestamps(self) -> np.ndarray:
        """float64 (N,) seconds since the episode began, as stored; frame_index / fps if there is no such column."""
        return self._timestamps

    def instruction_of(self, i: int) -> str:
        """The instruction at frame `i`."""
        if "task_index" not in self.features:
            tasks = self.episodes[self.episode_of(i)].tasks
            return tasks[0] if tasks else ""
        task = int(self.column("task_index").reshape(-1)[i])
        if task not in self.tasks:
            raise problem(f"task_index {task} at frame {i} of {self.root}", f"one of {sorted(self.tasks)}",
                          f"add the task to {lerobot_v21.TASKS_PATH if self.is_v2 else TASKS_PATH}")  # fmt: skip
        return self.tasks[task]

    def images(self, i: int, cameras: Sequence[str] | None = None) -> dict[str, np.ndarray]:
        """Camera name -> uint8 (height, width, 3) RGB of frame `i`; all cameras by default."""
        self.check_frame(i)
        found = {}
        for name in self.cameras if cameras is None else cameras:
            key = self.camera_key(name)
            found[name] = self._video_frame(i, key) if self.features[key]["dtype"] == "video" else self._image(i, key)
        return found

    def jpeg(self, i: int, camera: str) -> bytes | None:
        """The JPEG file that frame `i` is stored as; None for PNG and video."""
        self.check_frame(i)
        key = self.camera_key(camera)
        data = self._stored(i, key)[0] if self.features[key]["dtype"] == "image" else None
        return data if data and data.startswith(JPEG_START) else None

    def encoded(self, i: int, camera: str) -> bytes | None:
        self.check_frame(i)
        key = self.camera_key(camera)
        return self._stored(i, key)[0] if self.features[key]["dtype"] == "image" else None

    def image_shape(self, camera: str) -> tuple[int, int, int]:
        """(height, width, 3) of a camera's frames, as info.json says."""
        return image_shape_of(self.features[self.camera_key(camera)])

    def camera_key(self, name: str) -> str:
        """Feature key of a camera; VlaError listing the cameras there are."""
        self.check_camera(name)
        return self.camera_keys[name]

    def frame(self, i: int, cameras: Sequence[str] | None = None) -> dict[str, Any]:
        """Frame `i`: images, state, action, timestamp, episode_index, frame_index, instruction."""
        episode, states = self.episode_of(i), self.states()
        return {
            "images": self.images(i, cameras),
            "state": None if states is None else states[i],
            "action": self.actions()[i],
            "timestamp": float(self.timestamps()[i]),
            "episode_index": episode,
            "frame_index": i - self.episodes[episode].start,
            "instruction": self.instruction_of(i),
        }

    def seed_of(self, episode: int) -> int | None:
        """`Env.reset` seed of an episode, None if the data does not say (-1)."""
        seed = self._first_value("seed", episode)
        return None if seed is None or int(seed) < 0 else int(seed)

    def task_of(self, episode: int) -> str | None:
        """The simulator's name of an episode's task, None if the data does not say."""
        return self._first_value("task_name", episode) or None

    def success_of(self, episode: int) -> bool | None:
        """Whether any step was a success, None if the data does not say."""
        if "next.success" not in self.features:
            return None
        row = self.episodes[episode]
        return bool(self.column("next.success").reshape(-1)[row.start : row.stop].any())

    def rewards(self) -> np.ndarray | None:
        """float32 (N,), None if the data does not say."""
        if "next.reward" not in self.features:
            return None
        return self.column("next.reward").reshape(-1).astype(np.float32, copy=False)

    def episode(self, i: int, cameras: Sequence[str] | None = None) -> Episode:
        """Episode `i` with its frames decoded; `cameras=()` leaves them out."""
        if not 0 <= i < self.n_episodes:
            raise problem(
                f"episode {i}", f"0..{self.n_episodes - 1} in {self.root}", "choose an episode of this dataset"
            )
        episode = super().episode(i, cameras)
        if "next.success" not in self.features:
            return episode
        success = self.column("next.success").reshape(-1)[self.episodes[i].start : self.episodes[i].stop]
        return replace(
            episode, steps=[replace(step, success=bool(s)) for step, s in zip(episode.steps, success, strict=True)]
        )

    def data_path(self, file: tuple[int, int]) -> Path:
        default = lerobot_v21.DATA_PATH if self.is_v2 else DATA_PATH
        return file_path(self.root, self.info.get("data_path") or default, *file)

    def video_path(self, file: tuple[int, int], key: str) -> Path:
        default = lerobot_v21.VIDEO_PATH if self.is_v2 else VIDEO_PATH
        return file_path(self.root, self.info.get("video_path") or default, *file, video_key=key)

    @cached_property
    def _actions(self) -> np.ndarray:
        return self.column("action").reshape(len(self), self.action_dim).astype(np.float32, copy=False)

    @cached_property
    def _states(self) -> np.ndarray | None:
        if self.state_key is None:
            return None
        return self.column(self.state_key).reshape(len(self), len(self.state_names)).astype(np.float32, copy=False)

    @cached_property
    def _timestamps(self) -> np.ndarray:
        if "timestamp" in self.features:
            return self.column("timestamp").reshape(-1).astype(np.float64)
        return np.concatenate([np.arange(len(row)) for row in self.episodes] or [np.zeros(0)]) / self.fps

    def _feature(self, key: str) -> dict[str, Any]:
        if key not in self.features:
            raise problem(f"no feature {key!r} in {self.root / INFO_PATH}", f"one of {', '.join(self.features)}",
                          "choose a dataset that has it")  # fmt: skip
        return self.features[key]

    def _first_value(self, key: str, episode: int) -> Any:
        return self.column(key).reshape(-1)[self.episodes[episode].start] if key in self.features else None

    def place_of(self, episode: int) -> tuple[str, int]:
        return str(self.data_path(self.episodes[episode].data_file)), self.stored_at[episode][1]

    def there(self, path: Path) -> Path:
        """The same path, its file put there if need be."""
        if self._need is not None:
            self._need(path)
        return path

    def _check_totals(self) -> None:
        for name, got in (("total_episodes", self.n_episodes), ("total_frames", len(self))):
            if self.info[name] != got:
                raise problem(f"{self.root / INFO_PATH}: {name} is {self.info[name]} but the table of episodes has {got}",
                              "the same number", "a writer was interrupted: start it again, it repairs this")  # fmt: skip

    def _video_frame(self, i: int, key: str) -> np.ndarray:
        row, seconds = self.episodes[self.episode_of(i)], float(self.timestamps()[i])
        chunk, file, from_s = row.videos[key]
        rounding_s = float(np.spacing(np.float32(seconds)))  # timestamps are float32: coarse in long episodes
        path = self.there(self.video_path((chunk, file), key))
        return self._frames.video(path, from_s + seconds, TOLERANCE_S + rounding_s)

    def _image(self, i: int, key: str) -> np.ndarray:
        return decode_image(*self._stored(i, key))

    def _stored(self, i: int, key: str) -> tuple[bytes | None, str]:
        """The encoded image of a frame, and where it is for messages."""
        episode = self.episode_of(i)
        row, (begin, number) = self.episodes[episode], self.stored_at[episode]
        path = self.there(self.data_path(row.data_file))
        folders = (self.root, self.root / lerobot_v21.image_folder(key, number)) if self.is_v2 else ()
        place = begin + i - row.start
        return self._frames.encoded(path, place, key, folders), f"{path}: {key} in row {place}"
