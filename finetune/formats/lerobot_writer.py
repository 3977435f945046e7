"""Write a LeRobotDataset v3.0 that lerobot 0.6 opens, episode by episode, safe against a crash at any moment.

Every episode has a data file (and MP4 files) of its own. It becomes part of the dataset when its row appears in the
table of episodes, by one rename; files that no row names are removed by the next `resume=True`. `stats.json` comes last.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import pyarrow as pa

from vla.files import write_bytes, write_json
from vla.finetune.formats.lerobot_format import (
    AUTOMATIC,
    CHUNKS_SIZE,
    DATA_PATH,
    EPISODES_PATH,
    IMAGES_PREFIX,
    INFO_PATH,
    STATS_PATH,
    TASKS_PATH,
    VERSION,
    VIDEO_PATH,
    data_schema,
    encode_png,
    file_path,
    parquet_bytes,
    tasks_table,
)
from vla.finetune.formats.lerobot_reader import LeRobotReader
from vla.finetune.formats.lerobot_stats import column_stats, histogram_stats, image_histogram, sample_frames
from vla.finetune.formats.lerobot_tables import EPISODES_PER_TABLE, is_unborn, recover
from vla.finetune.formats.lerobot_video import choose_encoder, encode_video, video_info
from vla.types import Episode, problem

NO_SEED = -1


class LeRobotWriter:
    """Append episodes with `add_episode`, then `finalize` (or leave the `with` block without an error).

    Besides the usual columns it writes `next.reward`, `next.success`, `seed` (int64, -1 unknown: `Env.reset` seed) and
    `task_name` (the simulator's name of the task, "" unknown), so that initial states can be restored.
    `image_mode="image"` stores PNG and is exact; "video" is ten times smaller and lossy.
    """

    def __init__(
        self,
        root: Path | str,
        fps: int,
        cameras: dict[str, tuple[int, int]],
        state_names: tuple[str, ...],
        action_names: tuple[str, ...],
        robot_type: str,
        image_mode: Literal["image", "video"] = "image",
        resume: bool = False,
        chunks_size: int = CHUNKS_SIZE,
        record_success: bool = True,
    ) -> None:
        """`cameras`: name -> (height, width). Empty `state_names`: no proprioception. `record_success` False: the data
        does not say which episodes succeeded, and `next.success` is left out.

        Raises:
            VlaError: the folder is not empty and `resume` is False, or it holds other features or another fps.
        """
        self.root, self.fps, self.cameras, self.image_mode = Path(root), int(fps), dict(cameras), image_mode
        self._encoder = choose_encoder() if image_mode == "video" else None
        self._check_settings(fps)
        self.record_success = record_success
        features = self._features(tuple(state_names), tuple(action_names))
        self.info: dict[str, Any] = {
            "codebase_version": VERSION, "fps": self.fps, "features": features,
            "total_episodes": 0, "total_frames": 0, "total_tasks": 0,
            "chunks_size": chunks_size, "data_files_size_in_mb": 100, "video_files_size_in_mb": 200,
            "data_path": DATA_PATH, "video_path": VIDEO_PATH if image_mode == "video" else None,
            "robot_type": robot_type, "splits": {"train": "0:0"},
        }  # fmt: skip
        self._schema = data_schema(features)
        self._tasks: list[str] = []
        self._histograms: dict[int, dict[str, np.ndarray]] = {}
        self._table: pa.Table | None = None  # the rows of the last file of meta/episodes
        if self.root.exists() and (not self.root.is_dir() or any(self.root.iterdir())):
            if not (resume and is_unborn(self.root)):
                self._resume(resume)
        self._write_info()
        self._write_tasks()

    @property
    def n_episodes(self) -> int:
        return self.info["total_episodes"]

    @property
    def n_frames(self) -> int:
        return self.info["total_frames"]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: Any, error: Any, traceback: Any) -> None:
        if kind is None:
            self.finalize()

    def add_episode(self, episode: Episode) -> int:
        """Append one episode and return its index. When this returns it is on disk; before, nothing of it counts."""
        self._check_episode(episode)
        index, start, n = self.n_episodes, self.n_frames, len(episode)
        frames = {name: [step.observation.images[name] for step in episode.steps] for name in self.cameras}
        task = self._task_index(episode.instruction)
        rows, numbers = self._rows(episode, frames, index, start, task)
        histograms = {name: image_histogram(sample_frames(frames[name])) for name in self.cameras}
        chunk, file = divmod(index, self.info["chunks_size"])
        row: dict[str, Any] = {
            "episode_index": index, "tasks": [episode.instruction], "length": n,
            "data/chunk_index": chunk, "data/file_index": file,
            "dataset_from_index": start, "dataset_to_index": start + n,
        }  # fmt: skip
        for name in self.cameras if self._encoder else ():
            key = IMAGES_PREFIX + name
            video = encode_video(frames[name], self.fps, self._encoder or "")
            write_bytes(file_path(self.root, VIDEO_PATH, chunk, file, key), video)
            row |= {f"videos/{key}/chunk_index": chunk, f"videos/{key}/file_index": file,
                    f"videos/{key}/from_timestamp": 0.0, f"videos/{key}/to_timestamp": n / self.fps}  # fmt: skip
        write_bytes(file_path(self.root, DATA_PATH, chunk, file), parquet_bytes(rows))
        if task == len(self._tasks):
            self._tasks.append(episode.instruction)
            self._write_tasks()
        self._append_row(row | self._row_stats(numbers, histograms))  # from here on the episode counts
        if not self._encoder:  # of a lossy video, the global statistics describe what a reader will see
            self._histograms[index] = histograms
        self._set_totals(index + 1, start + n)
        self._write_info()
        return index

    def finalize(self) -> None:
        """Write `meta/stats.json` with exact statistics of every number and of a sample of the images."""
        if not self.n_episodes or self._stats_are_current():
            return
        reader = LeRobotReader(self.root)
        for index in set(range(self.n_episodes)) - set(self._histograms):  # of earlier runs, and videos
            row = reader.episodes[index]
            chosen = sample_frames(range(row.start, row.stop))
            self._histograms[index] = {
                name: image_histogram(reader.images(i, [name])[name] for i in chosen) for name in self.cameras
            }
        stats = {}
        for key, feature in self.info["features"].items():
            if feature["dtype"] in ("image", "video"):
                name = key.removeprefix(IMAGES_PREFIX)
                total = np.sum([self._histograms[i][name] for i in range(self.n_episodes)], axis=0)
                stats[key] = histogram_stats(total)
            elif feature["dtype"] != "string":
                stats[key] = column_stats(reader.column(key))
        write_json(self.root / STATS_PATH, stats)

    def _stats_are_current(self) -> bool:
        path = self.root / STATS_PATH
        return path.is_file() and json.loads(path.read_text())["index"]["count"] == [self.n_frames]

    def _features(self, state_names: tuple[str, ...], action_names: tuple[str, ...]) -> dict[str, Any]:
        features: dict[str, Any] = {}
        for name, (height, width) in self.cameras.items():
            feature = {"dtype": self.image_mode, "shape": [height, width, 3], "names": ["height", "width", "channels"]}
            if self._encoder:
                feature["info"] = video_info(self._encoder, height, width, self.fps)
            features[IMAGES_PREFIX + name] = feature
        if state_names:
            features["observation.state"] = _vector(state_names)
        features["action"] = _vector(action_names)
        for key, dtype in (
            ("next.reward", "float32"),
            ("next.success", "bool"),
            ("seed", "int64"),
            ("task_name", "string"),
        ):
            if key != "next.success" or self.record_success:
                features[key] = {"dtype": dtype, "shape": [1], "names": None}
        return features | json.loads(json.dumps(AUTOMATIC))

    def _check_settings(self, fps: float) -> None:
        if fps <= 0 or fps != int(fps):
            raise problem(f"fps {fps}", "a whole positive number, as info.json requires", "round the control rate")
        for name, (height, width) in self.cameras.items():
            if "/" in name or not name:
                raise problem(f"camera name {name!r}", "a name without '/'", "rename the camera")
            if self._encoder and (height % 2 or width % 2):
                raise problem(f"camera {name} of {height}x{width}", "even sides for video", "use image_mode='image'")

    def _check_episode(self, episode: Episode) -> None:
        if not len(episode) or not episode.instruction:
            raise problem(
                f"{len(episode)} steps, instruction {episode.instruction!r}", "at least one step, a text", "drop it"
            )
        if episode.success is None and self.record_success:
            raise problem("an episode without success", "True or False", "set Episode.success before writing it")
        dims = {"action": self.info["features"]["action"]["shape"][0],
                "state": self.info["features"].get("observation.state", {"shape": [0]})["shape"][0]}  # fmt: skip
        for k, step in enumerate(episode.steps):
            for name, value in (("action", step.action), ("state", step.observation.state)):
                if name == "state" and not dims["state"]:
                    continue
                if value is None or value.shape != (dims[name],) or not np.isfinite(value).all():
                    raise problem(f"{name} {value!r} at step {k}", f"{dims[name]} finite numbers", "mend the episode")
            for name, (height, width) in self.cameras.items():
                image = step.observation.images.get(name)
                if image is None or image.shape != (height, width, 3) or image.dtype != np.uint8:
                    got = "no image" if image is None else f"{image.dtype} {image.shape}"
                    raise problem(f"{got} of camera {name!r} at step {k} (there: {', '.join(step.observation.images)})",
                                  f"uint8 ({height}, {width}, 3)", "render every frame of a demonstration")  # fmt: skip

    def _task_index(self, instruction: str) -> int:
        return self._tasks.index(instruction) if instruction in self._tasks else len(self._tasks)

    def _rows(
        self, episode: Episode, frames: dict[str, list[np.ndarray]], index: int, start: int, task: int
    ) -> tuple[pa.Table, dict[str, np.ndarray]]:
        """The episode as an arrow table, and its numeric columns for the statistics."""
        n, steps = len(episode), episode.steps
        success = np.array([step.success for step in steps])
        success[-1] |= bool(episode.success) and not success.any()
        seed = NO_SEED if episode.seed is None else episode.seed
        numbers: dict[str, np.ndarray] = {}
        if "observation.state" in self.info["features"]:
            numbers["observation.state"] = np.stack([np.asarray(s.observation.state, np.float32) for s in steps])
        numbers |= {
            "action": np.stack([np.asarray(step.action, np.float32) for step in steps]),
            "next.reward": np.array([step.reward for step in steps], np.float32),
            "next.success": success,
            "seed": np.full(n, seed, np.int64),
            "timestamp": (np.arange(n) / self.fps).astype(np.float32),
            "frame_index": np.arange(n),
            "episode_index": np.full(n, index, np.int64),
            "index": np.arange(start, start + n),
            "task_index": np.full(n, task, np.int64),
        }
        columns: dict[str, Any] = dict(numbers, task_name=[episode.task or ""] * n)
        for name in self.cameras if not self._encoder else ():
            columns[IMAGES_PREFIX + name] = [
                {"bytes": encode_png(image), "path": f"frame-{k:06d}.png"} for k, image in enumerate(frames[name])
            ]
        arrays = []
        for field in self._schema:
            value = columns[field.name]
            if pa.types.is_fixed_size_list(field.type):
                arrays.append(pa.FixedSizeListArray.from_arrays(pa.array(value.reshape(-1)), type=field.type))
            else:
                scalars = value.reshape(n) if isinstance(value, np.ndarray) else value  # shape (1,) is stored flat
                arrays.append(pa.array(scalars, type=field.type))
        return pa.Table.from_arrays(arrays, schema=self._schema), numbers

    def _row_stats(self, numbers: dict[str, np.ndarray], histograms: dict[str, np.ndarray]) -> dict[str, Any]:
        row = {}
        for key, feature in self.info["features"].items():
            if feature["dtype"] in ("image", "video"):
                stats = histogram_stats(histograms[key.removeprefix(IMAGES_PREFIX)])
            elif feature["dtype"] != "string":
                stats = column_stats(numbers[key])
            else:
                continue
            row |= {f"stats/{key}/{name}": value.tolist() for name, value in stats.items()}
        return row

    def _append_row(self, row: dict[str, Any]) -> None:
        chunk, file = divmod(row["episode_index"] // EPISODES_PER_TABLE, self.info["chunks_size"])
        row |= {"meta/episodes/chunk_index": chunk, "meta/episodes/file_index": file}
        if self._table is None or row["episode_index"] % EPISODES_PER_TABLE == 0:
            table = pa.Table.from_pylist([row])
        else:
            table = pa.concat_tables([self._table, pa.Table.from_pylist([row], schema=self._table.schema)])
        write_bytes(file_path(self.root, EPISODES_PATH, chunk, file), parquet_bytes(table))
        self._table = table

    def _set_totals(self, episodes: int, frames: int) -> None:
        self.info |= {"total_episodes": episodes, "total_frames": frames, "total_tasks": len(self._tasks),
                      "splits": {"train": f"0:{episodes}"}}  # fmt: skip

    def _write_tasks(self) -> None:
        write_bytes(self.root / TASKS_PATH, parquet_bytes(tasks_table(self._tasks)))

    def _write_info(self) -> None:
        write_bytes(self.root / INFO_PATH, (json.dumps(self.info, indent=4, ensure_ascii=False) + "\n").encode())

    def _resume(self, resume: bool) -> None:
        """Continue the dataset in `root`: check first, then remove what an interrupted writer left."""
        if not resume:
            raise problem(f"{self.root} is not empty", "a new folder", "choose another folder, or continue with resume")
        found = recover(self.root, self.info)
        for path in found.leftovers:
            path.unlink()
        self._tasks, self._table = found.tasks, found.last_table
        self._set_totals(found.n_episodes, found.n_frames)


def _vector(names: tuple[str, ...]) -> dict[str, Any]:
    return {"dtype": "float32", "shape": [len(names)], "names": list(names)}
