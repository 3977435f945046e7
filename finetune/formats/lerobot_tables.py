"""The tables of a LeRobotDataset v3.0 that say which episodes and tasks there are, and what a crash left beside them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from vla.finetune.formats.lerobot_format import (
    DATA_PATH,
    INFO_PATH,
    TASKS_PATH,
    VIDEO_PATH,
    file_path,
    read_columns,
    read_info,
)
from vla.types import problem

EPISODES_PER_TABLE = 100
"""Rows per file of meta/episodes in what our writer makes; the last file is written again for each episode."""


@dataclass(frozen=True)
class EpisodeRow:
    """One row of the table of episodes. Frames `start` <= i < `stop` of the dataset."""

    index: int
    start: int
    stop: int
    tasks: tuple[str, ...]
    data_file: tuple[int, int]
    """Chunk and file index of its parquet file."""
    videos: dict[str, tuple[int, int, float]]
    """Feature key -> chunk index, file index, seconds at which the episode begins inside that MP4."""

    def __len__(self) -> int:
        return self.stop - self.start


def read_tasks(root: Path) -> dict[int, str]:
    """task_index -> instruction."""
    table = read_columns(root / TASKS_PATH)
    name = "task" if "task" in table.column_names else "__index_level_0__"  # pandas' name for an unnamed index
    if name not in table.column_names or "task_index" not in table.column_names:
        raise problem(f"{root / TASKS_PATH} with columns {table.column_names}", "task_index and task", "mend the file")
    return dict(zip(table.column("task_index").to_pylist(), table.column(name).to_pylist(), strict=True))


def read_episodes(root: Path, video_keys: list[str]) -> list[EpisodeRow]:
    """Rows of meta/episodes in order; the dataset's frames must be numbered without gaps."""
    wanted = ["episode_index", "tasks", "dataset_from_index", "dataset_to_index", "data/chunk_index", "data/file_index"]
    parts = ("chunk_index", "file_index", "from_timestamp")
    wanted += [f"videos/{key}/{part}" for key in video_keys for part in parts]
    rows = []
    for path in episode_tables(root):
        for r in read_columns(path, wanted).to_pylist():
            videos = {key: tuple(r[f"videos/{key}/{part}"] for part in parts) for key in video_keys}
            rows.append(EpisodeRow(r["episode_index"], r["dataset_from_index"], r["dataset_to_index"],
                                   tuple(r["tasks"]), (r["data/chunk_index"], r["data/file_index"]), videos))  # fmt: skip
    rows.sort(key=lambda row: row.index)
    for k, row in enumerate(rows):
        expected = rows[k - 1].stop if k else 0
        if row.index != k or row.start != expected or row.stop <= row.start:
            raise problem(f"episode {row.index} with frames {row.start}..{row.stop} in {root / 'meta/episodes'}",
                          f"episode {k} beginning at frame {expected}", "part of the table is missing: copy it again")  # fmt: skip
    return rows


def episode_tables(root: Path) -> list[Path]:
    """The files of meta/episodes in order."""
    return sorted((root / "meta/episodes").glob("chunk-*/file-*.parquet"))


@dataclass(frozen=True)
class Recovered:
    """What a dataset holds when a writer opens it again."""

    tasks: list[str]
    n_episodes: int
    n_frames: int
    last_table: pa.Table | None
    """Rows of the last file of meta/episodes."""
    leftovers: list[Path]
    """Files of an episode that never became part of the dataset, and temporary files."""


def is_unborn(root: Path) -> bool:
    """Whether a writer died here before it had written its first file."""
    folders = [root / name for name in ("meta", "data", "videos")]
    return all(_is_temporary(path) for folder in folders for path in folder.rglob("*") if path.is_file())


def recover(root: Path, info: dict[str, Any]) -> Recovered:
    """Check that the dataset in `root` is the one `info` describes; changes nothing.

    Raises:
        VlaError: another fps, robot, feature or layout, or a file the table of episodes names is missing.
    """
    found = read_info(root)
    for name in ("fps", "robot_type", "chunks_size", "data_path", "video_path", "features"):
        if found.get(name) != info[name]:
            got, expected = _difference(found.get(name), info[name])
            raise problem(f"{root / INFO_PATH} with {name} {got}", f"{expected}, as this writer has it",
                          "continue with the settings the dataset was begun with, or write to another folder")  # fmt: skip
    keys = [key for key, feature in info["features"].items() if feature["dtype"] == "video"]
    rows, tables = read_episodes(root, keys), episode_tables(root)
    keep = set()
    for row in rows:
        if row.data_file != divmod(row.index, info["chunks_size"]):
            raise problem(f"episode {row.index} of {root} in data file {row.data_file}", "one file per episode",
                          "another program wrote this dataset: write to a new folder")  # fmt: skip
        keep.add(file_path(root, DATA_PATH, *row.data_file))
        keep |= {file_path(root, VIDEO_PATH, *row.videos[key][:2], video_key=key) for key in keys}
    if len(tables) != -(-len(rows) // EPISODES_PER_TABLE):
        raise problem(f"{len(tables)} files in {root / 'meta/episodes'}", f"{EPISODES_PER_TABLE} episodes in each",
                      "another program wrote this dataset: write to a new folder")  # fmt: skip
    missing = sorted(path for path in keep if not path.is_file())
    if missing:
        raise problem(f"no file {missing[0]}", "every file the table of episodes names", "copy the dataset again")
    tasks = read_tasks(root) if (root / TASKS_PATH).exists() else {}
    folders = [root / name for name in ("meta", "data", "videos")]
    files = [path for folder in folders for path in sorted(folder.rglob("*")) if path.is_file()]
    leftovers = [path for path in files if _is_temporary(path) or (folders[0] not in path.parents and path not in keep)]
    last = read_columns(tables[-1]) if tables else None
    return Recovered([tasks[k] for k in sorted(tasks)], len(rows), rows[-1].stop if rows else 0, last, leftovers)


def _is_temporary(path: Path) -> bool:
    return path.name.startswith(".") and path.name.endswith(".tmp")


def _difference(got: Any, expected: Any) -> tuple[Any, Any]:
    """The first feature in which two feature tables differ, so that the message stays readable."""
    if not (isinstance(got, dict) and isinstance(expected, dict)):
        return repr(got), repr(expected)
    key = next((k for k in [*expected, *got] if got.get(k) != expected.get(k)), "(order)")
    return f"{key}: {got.get(key)}", f"{key}: {expected.get(key)}"
