"""The tables of a LeRobotDataset v2.1 or v2.0, which keeps one data file and one video per camera for each episode.

    meta/info.json  meta/episodes.jsonl  meta/tasks.jsonl  meta/episodes_stats.jsonl (v2.1; v2.0 has stats.json)
    data/chunk-000/episode_000000.parquet             one row per frame
    videos/chunk-000/{video_key}/episode_000000.mp4   only for features of dtype "video"
    images/{key}/episode_000000/frame_000000.png      only where the data files hold paths and not the images themselves

`chunks_size` is the most episodes one chunk folder may hold. Written after the files lerobot 0.3.3 itself makes.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from vla.finetune.formats.lerobot_format import INFO_PATH
from vla.finetune.formats.lerobot_tables import EpisodeRow
from vla.types import problem

TASKS_PATH = "meta/tasks.jsonl"
EPISODES_PATH = "meta/episodes.jsonl"
DATA_PATH = "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet"
VIDEO_PATH = "videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4"


def image_folder(key: str, episode: int) -> str:
    """Where the images of an episode lie if they are files of their own."""
    return f"images/{key}/episode_{episode:06d}"


def read_tasks(root: Path) -> dict[int, str]:
    """task_index -> instruction."""
    rows = _rows(root / TASKS_PATH, {"task_index": int, "task": str})
    return {row["task_index"]: row["task"] for row in rows}


def read_episodes(root: Path, info: dict[str, Any], video_keys: list[str]) -> list[EpisodeRow]:
    """Rows of meta/episodes.jsonl in order; the episodes must be numbered without gaps."""
    size = info.get("chunks_size")
    if not isinstance(size, int) or size < 1:
        raise problem(f"{root / INFO_PATH}: chunks_size is {size!r}", "a number of episodes, 1000 as a rule", "mend it")
    found = _rows(root / EPISODES_PATH, {"episode_index": int, "length": int, "tasks": list})
    rows: list[EpisodeRow] = []
    for k, row in enumerate(sorted(found, key=lambda row: row["episode_index"])):
        if row["episode_index"] != k or row["length"] < 1:
            raise problem(f"episode {row['episode_index']} of length {row['length']} in {root / EPISODES_PATH}",
                          f"episode {k} with frames", "part of the table is missing: copy it again")  # fmt: skip
        start, file = rows[-1].stop if rows else 0, (k // size, k)
        videos = {key: (*file, 0.0) for key in video_keys}
        rows.append(EpisodeRow(k, start, start + row["length"], tuple(row["tasks"]), file, videos))
    return rows


def _rows(path: Path, fields: dict[str, type]) -> list[dict[str, Any]]:
    """The lines of a table, each with these fields."""
    if not path.is_file():
        raise problem(f"no file {path}", "a LeRobotDataset v2.x with its tables", "copy the dataset again")
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise problem(f"{path}, line {number}: {error}", "a JSON object", "copy the dataset again") from error
        wrong = [f for f, kind in fields.items() if not (isinstance(row, dict) and isinstance(row.get(f), kind))]
        if wrong:
            raise problem(f"{path}, line {number}: {line[:80]}", f"{wrong[0]} of type {fields[wrong[0]].__name__}",
                          "copy the dataset again")  # fmt: skip
        rows.append(row)
    return rows
