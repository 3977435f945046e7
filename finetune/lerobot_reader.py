"""Read a LeRobotDataset v3.0 from a local folder with pyarrow and PyAV; neither `lerobot` nor `datasets` is needed.

The table of episodes (meta/episodes) says what belongs to the dataset: files it does not name are ignored. Stored
statistics are never read: their quantiles are merged approximately (see `vla.finetune.statistics`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from vla.finetune.lerobot_format import (
    DATA_PATH,
    INFO_PATH,
    TASKS_PATH,
    VIDEO_PATH,
    camera_of,
    column_array,
    file_path,
    names_of,
    read_columns,
    read_info,
)
from vla.finetune.lerobot_frames import FrameFiles
from vla.finetune.lerobot_tables import read_episodes, read_tasks
from vla.types import Episode, Observation, Step, problem

TOLERANCE_S = 1e-4  # lerobot's: a decoded frame further than this from its timestamp is a fault


class LeRobotReader:
    """Random access to frames and episodes.

    Encoded frames of up to `cache_mb` MiB are kept per process. Picklable: a copy opens its own files, and a forked
    child reopens them.
    """

    def __init__(self, root: Path | str, name: str | None = None, cache_mb: int = 256) -> None:
        self.root = Path(root)
        self.name = name or self.root.resolve().name
        self.cache_mb = cache_mb
        self.info = read_info(self.root)
        self.features: dict[str, dict[str, Any]] = self.info["features"]
        self.fps = float(self.info["fps"])
        self.camera_keys = {camera_of(key) or key: key for key, feature in self.features.items()
                            if feature["dtype"] in ("image", "video")}  # fmt: skip
        self.tasks = read_tasks(self.root)
        self.episodes = read_episodes(self.root, self._video_keys())
        self._check_totals()
        self._stops = np.array([row.stop for row in self.episodes], np.int64)
        self._first_row: dict[tuple[int, int], int] = {}
        self._n_rows: dict[tuple[int, int], int] = {}
        for row in self.episodes:
            self._first_row.setdefault(row.data_file, row.start)
            self._n_rows[row.data_file] = self._n_rows.get(row.data_file, 0) + len(row)
        self._columns: dict[str, np.ndarray] = {}
        self._frames = FrameFiles(cache_mb)

    def __reduce__(self) -> tuple[Any, ...]:
        return LeRobotReader, (self.root, self.name, self.cache_mb)

    def __len__(self) -> int:
        """Number of frames."""
        return self.episodes[-1].stop if self.episodes else 0

    @property
    def n_episodes(self) -> int:
        return len(self.episodes)

    @property
    def cameras(self) -> tuple[str, ...]:
        """Names without `observation.images.`, in the order of the data."""
        return tuple(self.camera_keys)

    @property
    def state_key(self) -> str | None:
        return "observation.state" if "observation.state" in self.features else None

    @property
    def state_names(self) -> tuple[str, ...]:
        return names_of(self.features[self.state_key]) if self.state_key else ()

    @property
    def state_dim(self) -> int:
        """S; 0 if the data has no proprioception."""
        return len(self.state_names)

    @property
    def action_names(self) -> tuple[str, ...]:
        return names_of(self._feature("action"))

    @property
    def action_dim(self) -> int:
        return len(self.action_names)

    def column(self, key: str) -> np.ndarray:
        """Every row of a feature that is not an image: (N, D) for vectors, (N,) for scalars, the dtype as stored."""
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
        path = self.data_path(file)
        values = column_array(read_columns(path, [key]).column(key), self._feature(key), f"{path}: {key}")
        if len(values) != self._n_rows[file]:
            raise problem(
                f"{path} with {len(values)} rows",
                f"{self._n_rows[file]}, as the table of episodes says",
                "copy it again",
            )
        return values

    @property
    def data_files(self) -> tuple[tuple[int, int], ...]:
        """Chunk and file index of every data file, in the order of their frames."""
        return tuple(self._first_row)

    def actions(self) -> np.ndarray:
        """float32 (N, D), un-normalised."""
        return self._actions

    def states(self) -> np.ndarray | None:
        """float32 (N, S), un-normalised; None if the data has no proprioception."""
        return self._states

    def timestamps(self) -> np.ndarray:
        """float64 (N,) seconds since the episode began, as stored; frame_index / fps if there is no such column."""
        return self._timestamps

    def episode_of(self, i: int) -> int:
        """Index of the episode that frame `i` belongs to."""
        self._check_frame(i)
        return int(np.searchsorted(self._stops, i, side="right"))

    def instruction_of(self, i: int) -> str:
        """The instruction at frame `i`."""
        if "task_index" not in self.features:
            return self.episodes[self.episode_of(i)].tasks[0]
        task = int(self.column("task_index").reshape(-1)[i])
        if task not in self.tasks:
            raise problem(f"task_index {task} at frame {i} of {self.root}", f"one of {sorted(self.tasks)}",
                          f"add the task to {TASKS_PATH}")  # fmt: skip
        return self.tasks[task]

    def images(self, i: int, cameras: Sequence[str] | None = None) -> dict[str, np.ndarray]:
        """Camera name -> uint8 (height, width, 3) RGB of frame `i`; all cameras by default."""
        self._check_frame(i)
        found = {}
        for name in self.cameras if cameras is None else cameras:
            key = self.camera_key(name)
            found[name] = self._video_frame(i, key) if self.features[key]["dtype"] == "video" else self._image(i, key)
        return found

    def camera_key(self, name: str) -> str:
        """Feature key of a camera; VlaError listing the cameras there are."""
        if name not in self.camera_keys:
            raise problem(f"camera {name!r}", f"one of {', '.join(self.cameras) or 'none'}, the cameras of {self.root}",
                          "choose a camera of this dataset")  # fmt: skip
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

    def episode(self, i: int, cameras: Sequence[str] | None = None) -> Episode:
        """Episode `i` with its frames decoded; `cameras=()` leaves them out."""
        if not 0 <= i < self.n_episodes:
            raise problem(
                f"episode {i}", f"0..{self.n_episodes - 1} in {self.root}", "choose an episode of this dataset"
            )
        row, states, actions = self.episodes[i], self.states(), self.actions()
        success = self.column("next.success").reshape(-1) if "next.success" in self.features else np.zeros(len(self))
        reward = self.column("next.reward").reshape(-1) if "next.reward" in self.features else np.zeros(len(self))
        steps = []
        for k in range(row.start, row.stop):
            state = None if states is None else states[k]
            seen = Observation(self.images(k, cameras), state, self.instruction_of(k))
            steps.append(Step(seen, actions[k], float(reward[k]), bool(success[k])))
        return Episode(steps, self.instruction_of(row.start), self.name, self.success_of(i), self.seed_of(i),
                       self.task_of(i))  # fmt: skip

    def iter_episodes(self, cameras: Sequence[str] | None = None) -> Iterator[Episode]:
        """All episodes in order, one in memory at a time."""
        for i in range(self.n_episodes):
            yield self.episode(i, cameras)

    def data_path(self, file: tuple[int, int]) -> Path:
        return file_path(self.root, self.info.get("data_path") or DATA_PATH, *file)

    def video_path(self, file: tuple[int, int], key: str) -> Path:
        return file_path(self.root, self.info.get("video_path") or VIDEO_PATH, *file, video_key=key)

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

    def _video_keys(self) -> list[str]:
        return [key for key in self.camera_keys.values() if self.features[key]["dtype"] == "video"]

    def _feature(self, key: str) -> dict[str, Any]:
        if key not in self.features:
            raise problem(f"no feature {key!r} in {self.root / INFO_PATH}", f"one of {', '.join(self.features)}",
                          "choose a dataset that has it")  # fmt: skip
        return self.features[key]

    def _first_value(self, key: str, episode: int) -> Any:
        return self.column(key).reshape(-1)[self.episodes[episode].start] if key in self.features else None

    def _check_frame(self, i: int) -> None:
        if not 0 <= i < len(self):
            raise problem(f"frame {i}", f"0..{len(self) - 1} in {self.root}", "choose a frame of this dataset")

    def _check_totals(self) -> None:
        for name, got in (("total_episodes", self.n_episodes), ("total_frames", len(self))):
            if self.info[name] != got:
                raise problem(f"{self.root / INFO_PATH}: {name} is {self.info[name]} but the table of episodes has {got}",
                              "the same number", "a writer was interrupted: start it again, it repairs this")  # fmt: skip

    def _video_frame(self, i: int, key: str) -> np.ndarray:
        row, seconds = self.episodes[self.episode_of(i)], float(self.timestamps()[i])
        chunk, file, from_s = row.videos[key]
        rounding_s = float(np.spacing(np.float32(seconds)))  # timestamps are float32: coarse in long episodes
        return self._frames.video(self.video_path((chunk, file), key), from_s + seconds, TOLERANCE_S + rounding_s)

    def _image(self, i: int, key: str) -> np.ndarray:
        file = self.episodes[self.episode_of(i)].data_file
        return self._frames.image(self.data_path(file), i - self._first_row[file], key)
