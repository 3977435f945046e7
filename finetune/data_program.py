"""`vla data collect | stats`: make a dataset of demonstrations, and its statistics."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from vla.finetune import collect
from vla.finetune.data_inspect import ranges_table
from vla.finetune.lerobot_reader import LeRobotReader
from vla.finetune.statistics import FILE, dataset_statistics, write_statistics
from vla.normalize import Statistics
from vla.types import Suite, problem

CollectSettings = collect.Settings


@dataclass(frozen=True)
class StatsSettings:
    """Compute exact statistics of actions and state, in OpenVLA's dataset_statistics.json format."""

    data: tuple[Path, ...]
    """Folders of LeRobot datasets; each goes by its folder's name."""
    out: Path | None = None
    """File to write; not given: dataset_statistics.json in the dataset's folder, if there is one dataset."""
    gripper: str | None = None
    """Name of the action dimension that is left un-normalised; not given: the one called "gripper", if there is one."""


def run_collect(settings: CollectSettings, suite: Suite) -> collect.Collected:
    """See `vla.finetune.collect`."""
    return collect.run(settings, suite)


def run_stats(settings: StatsSettings) -> Statistics:
    """Compute, print and write the statistics."""
    if not settings.data or (settings.out is None and len(settings.data) > 1):
        raise problem(f"{len(settings.data)} datasets and no --out", "one dataset, or a file to write", "pass --out")
    readers = [LeRobotReader(root) for root in settings.data]
    names = [reader.name for reader in readers]
    if len(set(names)) < len(names):
        raise problem(f"datasets named {', '.join(names)}", "different folder names", "rename one of the folders")
    value = {}
    for reader in readers:
        value[reader.name] = dataset_statistics(reader, _gripper_dim(reader, settings.gripper))
        print(f"{reader.name}: {value[reader.name]['num_trajectories']} episodes, "
              f"{value[reader.name]['num_transitions']} frames")  # fmt: skip
        Console().print(ranges_table(value[reader.name]["action"], reader.action_names))
    out = settings.out or readers[0].root / FILE
    write_statistics(out, value)
    print(f"statistics: {out}")
    return value


def _gripper_dim(reader: LeRobotReader, name: str | None) -> int | None:
    names = reader.action_names
    if name is not None and name not in names:
        raise problem(f"gripper {name!r}", f"one of {', '.join(names)}", "name an action dimension of the data")
    wanted = name or "gripper"
    return names.index(wanted) if wanted in names else None
