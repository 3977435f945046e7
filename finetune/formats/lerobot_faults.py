"""Which episodes of a LeRobotDataset have numbers that cannot be used."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa

from vla.finetune.formats.lerobot_format import column_array, read_columns
from vla.finetune.formats.lerobot_tables import EpisodeRow
from vla.finetune.formats.source import BadEpisode, Unreachable
from vla.types import VlaError, problem

FINITE = ("action", "observation.state", "timestamp")
READ = (*FINITE, "task_index", "seed", "task_name", "next.success", "next.reward")
"""The columns that the reader reads."""


class Reader(Protocol):
    """What is asked of a `LeRobotReader`."""

    where: str
    features: dict[str, dict[str, Any]]
    tasks: dict[int, str]
    episodes: Sequence[EpisodeRow]
    stored_at: Sequence[tuple[int, int]]

    def data_path(self, file: tuple[int, int]) -> Path: ...
    def there(self, path: Path) -> Path: ...
    def place_of(self, episode: int) -> tuple[str, int]: ...
    def keep(self, episodes: Sequence[int]) -> None: ...


def leave_out_bad(reader: Reader) -> tuple[BadEpisode, ...]:
    """Make a reader forget the episodes whose data file or numbers are bad.

    Raises:
        VlaError: no other episode is there, or a file cannot be had now.
    """
    bad: dict[int, BadEpisode] = {}
    by_file: dict[tuple[int, int], list[EpisodeRow]] = {}
    for row in reader.episodes:
        by_file.setdefault(row.data_file, []).append(row)
    for rows in by_file.values():
        for row, fault in zip(rows, _faults(reader, rows), strict=True):
            if fault is not None:
                bad[row.index] = BadEpisode(*reader.place_of(row.index), str(fault))
    kept = [row.index for row in reader.episodes if row.index not in bad]
    if bad and not kept:
        raise problem(f"{reader.where} without one usable episode (first: {bad[0].why})", "at least one",
                      "copy the dataset again")  # fmt: skip
    if bad:
        reader.keep(kept)
    return tuple(bad.values())


def _faults(reader: Reader, rows: list[EpisodeRow]) -> list[VlaError | None]:
    """What is wrong with each of the episodes in one data file."""
    path = reader.data_path(rows[0].data_file)
    keys = [key for key in READ if key in reader.features]
    expected = sum(len(row) for row in rows)
    try:
        table = read_columns(reader.there(path), keys)
        if len(table) != expected:  # then the rows of an episode may be those of another: they must say whose they are
            table = read_columns(path, [*keys, "episode_index"])
    except Unreachable:
        raise
    except VlaError as error:
        return [error] * len(rows)
    found: list[VlaError | None] = []
    for row in rows:
        begin, number = reader.stored_at[row.index]
        try:
            _check(reader, table.slice(begin, len(row)), row, f"{path}: episode {number}")
            found.append(None)
        except VlaError as error:
            found.append(error)
    return found


def _check(reader: Reader, table: pa.Table, row: EpisodeRow, where: str) -> None:
    if len(table) != len(row):
        raise problem(f"{where} with {len(table)} rows", f"{len(row)}, as the table of episodes says", "copy it again")
    values: dict[str, Any] = {}
    for key in table.column_names:
        values[key] = column_array(table.column(key), reader.features[key], f"{where}: {key}")
    owner, number = values.get("episode_index"), reader.stored_at[row.index][1]
    if owner is not None and (owner != number).any():
        raise problem(f"{where} with rows of episode {owner[owner != number][0]}", "its own", "copy the file again")
    for key in FINITE:
        if key in values and not np.isfinite(values[key]).all():
            place = np.argwhere(~np.isfinite(values[key]))[0]
            at = f" dimension {place[1]}," if len(place) > 1 else ""
            raise problem(f"{where}: {values[key][tuple(place)]} in {key},{at} step {place[0]}", "finite numbers",
                          "mend the data, or leave the episode out")  # fmt: skip
    for task in set(values.get("task_index", np.zeros(0)).reshape(-1).tolist()) - set(reader.tasks):
        raise problem(f"{where}: task_index {task}", f"one of {sorted(reader.tasks)}", "add it to the table of tasks")
