"""`vla data collect | stats`: make a dataset of demonstrations, and its statistics."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from vla.finetune import collect
from vla.finetune.data.agreement import LAST, gripper_index
from vla.finetune.data.data_inspect import ranges_table
from vla.finetune.data.open_source import open_sources
from vla.finetune.data.statistics import FILE, dataset_statistics, write_statistics
from vla.finetune.formats.cache_format import CACHE_JSON
from vla.finetune.formats.lerobot_format import INFO_PATH
from vla.finetune.formats.source import FrameSource
from vla.normalize import Statistics
from vla.types import Suite, problem

CollectSettings = collect.Settings


@dataclass(frozen=True)
class StatsSettings:
    """Compute exact statistics of actions and state, in OpenVLA's dataset_statistics.json format."""

    data: tuple[str, ...]
    """The datasets: folders or files of any format, as `vla finetune --data` takes them; each goes by its name."""
    out: Path | None = None
    """File to write; not given: dataset_statistics.json in the dataset's folder, if it is one LeRobot dataset or cache."""
    gripper: str | None = None
    """Name of the action dimension that is left un-normalised; not given: as `vla finetune` finds it."""


def run_collect(settings: CollectSettings, suite: Suite) -> collect.Collected:
    """See `vla.finetune.collect`."""
    return collect.run(settings, suite)


def run_stats(settings: StatsSettings) -> Statistics:
    """Compute, print and write the statistics."""
    data = list(settings.data)
    if not data or (settings.out is None and len(data) > 1):
        raise problem(f"{len(data)} datasets and no --out", "one dataset, or a file to write", "pass --out")
    out = settings.out or _own_file(data[0])
    value = {}
    for source in open_sources(data)[0]:
        entry = value[source.name] = dataset_statistics(source, _gripper_dim(source, settings.gripper))
        print(f"{source.name}: {entry['num_trajectories']} episodes, {entry['num_transitions']} frames")
        Console().print(ranges_table(entry["action"], source.action_names))
    write_statistics(out, value)
    print(f"statistics: {out}")
    return value


def _own_file(data: str) -> Path:
    """Where a dataset's statistics go if nothing else is said."""
    folder = Path(data)
    if folder.is_dir() and not any((folder / name).is_file() for name in (INFO_PATH, CACHE_JSON)):
        raise problem(f"{data}, neither a LeRobot dataset nor a cache, and no --out", "a file to write", "pass --out")
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise problem(f"{data}, no folder that can be written, and no --out", "a file to write", "pass --out")
    return folder / FILE


def _gripper_dim(source: FrameSource, name: str | None) -> int | None:
    names = source.action_names
    if name is not None and name not in names:
        raise problem(f"gripper {name!r}", f"one of {', '.join(names)}", "name an action dimension of the data")
    return gripper_index(LAST if name is None else names.index(name), [source])
