"""`vla data collect | inspect | stats | check`: make a dataset of demonstrations and look at one."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from vla.files import write_text
from vla.finetune import collect
from vla.finetune.dataset_check import Finding, check_dataset
from vla.finetune.inspect_page import by_instruction, inspect_page
from vla.finetune.lerobot_reader import LeRobotReader
from vla.finetune.statistics import FILE, dataset_statistics, write_statistics
from vla.normalize import Statistics
from vla.types import Suite, VlaError, problem

CollectSettings = collect.Settings


@dataclass(frozen=True)
class InspectSettings:
    """Print what a dataset holds and write a page with sample frames and action histograms."""

    data: Path
    """Folder of a LeRobot dataset (v3.0)."""
    out: Path | None = None
    """HTML page to write; not given: none."""
    samples: int = 4
    """Episodes to show frames of on the page."""


@dataclass(frozen=True)
class StatsSettings:
    """Compute exact statistics of actions and state, in OpenVLA's dataset_statistics.json format."""

    data: tuple[Path, ...]
    """Folders of LeRobot datasets; each goes by its folder's name."""
    out: Path | None = None
    """File to write; not given: dataset_statistics.json in the dataset's folder, if there is one dataset."""
    gripper: str | None = None
    """Name of the action dimension that is left un-normalised; not given: the one called "gripper", if there is one."""


@dataclass(frozen=True)
class CheckSettings:
    """Read a whole dataset and report what is wrong with it."""

    data: Path
    """Folder of a LeRobot dataset (v3.0)."""
    all_frames: bool = False
    """Decode every image, not only the first and the last of each episode."""


def run_collect(settings: CollectSettings, suite: Suite) -> collect.Collected:
    """See `vla.finetune.collect`."""
    return collect.run(settings, suite)


def run_inspect(settings: InspectSettings) -> LeRobotReader:
    """Print instructions, lengths and action ranges; write the page if asked to."""
    reader = LeRobotReader(settings.data)
    if not reader.n_episodes:
        raise problem(f"{settings.data} without episodes", "at least one", "collect demonstrations first")
    console = Console()
    console.print(f"{reader.name}: {reader.n_episodes} episodes, {len(reader)} frames, {reader.fps:g} fps, "
                  f"cameras {', '.join(reader.cameras) or 'none'}, state {reader.state_dim}, action {reader.action_dim}",
                  markup=False, highlight=False)  # fmt: skip
    tasks = Table("instruction", "episodes", "frames (min, mean, max)")
    for instruction, episodes in by_instruction(reader).items():
        n = [len(reader.episodes[i]) for i in episodes]
        tasks.add_row(instruction, str(len(n)), f"{min(n)}, {np.mean(n):.1f}, {max(n)}")
    console.print(tasks)
    entry = dataset_statistics(reader)["action"]
    console.print(_ranges(entry, reader.action_names))
    if settings.out is not None:
        write_text(settings.out, inspect_page(reader, settings.samples))
        print(f"page: {settings.out}")
    return reader


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
        Console().print(_ranges(value[reader.name]["action"], reader.action_names))
    out = settings.out or readers[0].root / FILE
    write_statistics(out, value)
    print(f"statistics: {out}")
    return value


def run_check(settings: CheckSettings) -> list[Finding]:
    """Print every finding.

    Raises:
        VlaError: if one of them is an error.
    """
    findings = check_dataset(settings.data, settings.all_frames)
    for finding in findings:
        print(f"{finding.level}: {finding.text}")
    n_errors = sum(finding.level == "error" for finding in findings)
    if n_errors:
        raise VlaError(f"{settings.data}: {n_errors} errors, {len(findings) - n_errors} warnings")
    print(f"{settings.data}: no errors, {len(findings)} warnings")
    return findings


def _gripper_dim(reader: LeRobotReader, name: str | None) -> int | None:
    names = reader.action_names
    if name is not None and name not in names:
        raise problem(f"gripper {name!r}", f"one of {', '.join(names)}", "name an action dimension of the data")
    wanted = name or "gripper"
    return names.index(wanted) if wanted in names else None


def _ranges(entry: dict, names: tuple[str, ...]) -> Table:
    columns = ("min", "q01", "mean", "q99", "max", "std")
    table = Table("action", *columns, "normalised")
    for d, name in enumerate(names):
        table.add_row(name, *(f"{entry[c][d]:.4f}" for c in columns), "yes" if entry["mask"][d] else "no")
    return table
