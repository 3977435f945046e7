"""`vla data inspect`: what a dataset holds, on the terminal and as a page."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from rich.console import Console
from rich.table import Table

from vla.files import write_text
from vla.finetune.data.agreement import LAST, gripper_index
from vla.finetune.data.inspect_page import by_instruction, inspect_page
from vla.finetune.data.language_motion import Labels, MotionRule, label_frames
from vla.finetune.data.open_source import open_source
from vla.finetune.data.statistics import dataset_statistics
from vla.finetune.formats.source import FrameSource
from vla.types import problem


@dataclass(frozen=True)
class Settings:
    """Print what a dataset holds and write a page with sample frames and histograms."""

    data: str
    """The dataset: a folder or file of any format."""
    out: Path | None = None
    """HTML page to write; not given: none."""
    samples: int = 4
    """Episodes to show frames of on the page."""
    rotation_deg: Literal[0, 90, 180, 270] = 0
    """Turn the page's frames counter-clockwise: 180 for LIBERO's, which are stored upside down."""
    motions: int = 0
    """Also count the language motions of `vla finetune --language-motion`, over so many steps; 0: not."""
    motion_words: tuple[str, ...] = ()
    """Words for them, as in `vla finetune`."""
    gripper_convention: str = ""
    """Which values open and close the gripper, in words, where the data do not say: '+1 closes, -1 opens'."""
    delta: bool = True
    """The data's actions are displacements (False: absolute targets)."""

    def __post_init__(self) -> None:
        if self.samples < 0:
            raise problem(f"samples {self.samples}", "0 or more", "correct --samples")
        if self.motions < 0:
            raise problem(f"motions {self.motions}", "a number of steps, or 0", "correct --motions")


def run(settings: Settings) -> FrameSource:
    """Print instructions, lengths and action ranges; write the page if asked to."""
    source = open_source(settings.data)
    if not source.n_episodes:
        raise problem(f"{settings.data} without episodes", "at least one", "collect demonstrations first")
    console = Console()
    console.print(f"{source.name}: {source.n_episodes} episodes, {len(source)} frames, {source.fps:g} fps, "
                  f"cameras {', '.join(source.cameras) or 'none'}, state {source.state_dim}, action {source.action_dim}",
                  markup=False, highlight=False)  # fmt: skip
    if source.empty:
        console.print(f"{len(source.empty)} demonstrations without a step left out: {', '.join(source.empty[:4])}"
                      f"{', ...' if len(source.empty) > 4 else ''}", markup=False, highlight=False, soft_wrap=True)  # fmt: skip
    tasks = Table("instruction", "episodes", "frames (min, mean, max)")
    for instruction, episodes in by_instruction(source).items():
        n = [source.episodes[i].stop - source.episodes[i].start for i in episodes]
        tasks.add_row(instruction, str(len(n)), f"{min(n)}, {np.mean(n):.1f}, {max(n)}")
    console.print(tasks)
    entry = dataset_statistics(source, gripper_index(LAST, [source]))["action"]
    console.print(ranges_table(entry, source.action_names))
    if settings.motions:
        rule = MotionRule(settings.motions, delta=settings.delta, words=settings.motion_words)
        labels = label_frames(source, rule, gripper_convention=settings.gripper_convention)
        console.print(motions_table(labels, settings.motions))
    if settings.out is not None:
        write_text(settings.out, inspect_page(source, settings.samples, settings.rotation_deg))
        print(f"page: {settings.out}")
    return source


def motions_table(labels: Labels, n_steps: int, most: int = 30) -> Table:
    """The most frequent phrases and how often they begin."""
    table, counts = Table(f"motion of the next {n_steps} steps", "frames", "share"), labels.counts()
    total = max(1, sum(counts.values()))
    rows = list(counts.items())
    for phrase, n in rows[:most]:
        table.add_row(phrase, str(n), f"{n / total:.1%}")
    if rows[most:]:
        rest = sum(n for _, n in rows[most:])
        table.add_row(f"{len(rows) - most} others", str(rest), f"{rest / total:.1%}")
    return table


def ranges_table(entry: dict[str, Any], names: tuple[str, ...]) -> Table:
    """Of one "action" entry of `dataset_statistics`."""
    columns = ("min", "q01", "mean", "q99", "max", "std")
    table = Table("action", *columns, "normalised")
    for d, name in enumerate(names):
        table.add_row(name, *(f"{entry[c][d]:.4f}" for c in columns), "yes" if entry["mask"][d] else "no")
    return table
