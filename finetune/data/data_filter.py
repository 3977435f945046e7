"""`vla data filter`: the part of a dataset that is worth training on, as LeRobot v3.0 or as a list of episodes.

vla data filter data/demos --success-only --drop-idle --out data/clean
vla data check --data data/demos --json > findings.json
vla data filter data/demos --drop-found findings.json --out kept.json
"""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import tyro

from vla.files import write_json
from vla.finetune.data.data_convert import Settings as ConvertSettings
from vla.finetune.data.data_convert import convert
from vla.finetune.data.dataset_lint import ARM_ACTION_DIM, CHECKS, idle_frames, state_ranges
from vla.finetune.data.gripper_lint import gripper_dim
from vla.finetune.data.open_source import open_source
from vla.finetune.data.subset_source import SubsetSource
from vla.finetune.demonstrate import noops
from vla.finetune.formats.source import FrameSource
from vla.finetune.formats.unfinished import command_of
from vla.types import problem

OTHER_CHECKS = ("files", "leaks", "quality")


@dataclass(frozen=True)
class Settings:
    """Keep the episodes and frames of a dataset that fit the rules; rules that are not given keep everything."""

    source: tyro.conf.Positional[str]
    """The dataset: a folder or file of any format."""
    out: Path
    """Folder of the LeRobot dataset to write, or a .json for a list of the episodes that are kept."""
    success_only: bool = False
    """Drop episodes that did not succeed, or do not say so."""
    drop_noops: bool = False
    """Drop frames whose action asks for no motion, by OpenVLA's rule; for arms (6 displacements and a gripper)."""
    drop_idle: bool = False
    """Drop frames in which neither the state nor the action changes."""
    min_frames: int = 1
    """Drop episodes that are shorter, after frames have been dropped."""
    max_frames: int | None = None
    """Drop episodes that are longer, after frames have been dropped."""
    instruction: str | None = None
    """Keep only episodes whose instruction this regular expression is found in (case does not matter)."""
    drop: tuple[int, ...] = ()
    """Episodes to drop."""
    drop_found: Path | None = None
    """Drop the episodes named in this output of `vla data check --json`."""
    checks: tuple[str, ...] = ()
    """With --drop-found: only what these checks found (noops, idle, gripper, outliers, ...); not given: all."""
    images: Literal["png", "video"] = "png"
    """How the LeRobot dataset stores frames."""
    fps: int | None = None
    """Control rate to write, where the data has none or not a whole one."""
    dry_run: bool = False
    """Print what would be kept and stop."""


@dataclass(frozen=True)
class Chosen:
    """What a filter keeps."""

    kept: list[int]
    dropped: dict[int, str]
    """Episode -> why."""
    keep: dict[int, np.ndarray]
    """Episode -> bool (length,), the frames to keep, for episodes that lose some."""


def run(settings: Settings) -> Chosen:
    """Print what is kept and why the rest is not; write it."""
    source = open_source(settings.source)
    chosen = choose(source, settings)
    part = SubsetSource(source, chosen.kept, keep=chosen.keep)
    print(f"{len(chosen.kept)} of {source.n_episodes} episodes, {len(part)} of {len(source)} frames kept")
    for reason, n in Counter(why.split(":")[0] for why in chosen.dropped.values()).most_common():
        print(f"  {n} dropped: {reason}")
    if not chosen.kept:
        raise problem(f"no episode of {source.where} left", "at least one", "loosen the rules")
    if settings.out.suffix == ".json":
        if settings.out.exists():
            raise problem(f"{settings.out}, which exists", "a new file", "choose another --out")
        if not settings.dry_run:
            write_list(settings.out, source, chosen)
            print(f"list: {settings.out}")
    else:
        convert(part, ConvertSettings(settings.source, "lerobot", settings.out, settings.images, fps=settings.fps,
                                      dry_run=settings.dry_run), command_of("data filter", settings))  # fmt: skip
    return chosen


def choose(source: FrameSource, settings: Settings) -> Chosen:
    """Apply the rules, in the order of the settings; an episode is dropped for the first that it breaks."""
    pattern, found = _pattern(settings.instruction), _found(settings, source.n_episodes)
    unknown = [k for k in settings.drop if not 0 <= k < source.n_episodes]
    if unknown:
        raise problem(f"episode {unknown[0]} in --drop", f"0..{source.n_episodes - 1}", "correct it")
    if settings.drop_noops and (source.action_dim != ARM_ACTION_DIM or gripper_dim(source) != ARM_ACTION_DIM - 1):
        raise problem(f"--drop-noops and actions {', '.join(source.action_names)}", "6 displacements and a gripper",
                      "use --drop-idle, which looks at the state")  # fmt: skip
    if settings.drop_idle and not source.state_dim:
        raise problem(f"--drop-idle and no state in {source.where}", "proprioception", "use --drop-noops")
    kept, dropped, keep, ranges = [], {}, {}, state_ranges(source)
    for span in source.episodes:
        k, frames = span.index, _frames(source, span.index, settings, ranges)
        reason = _reason(source, k, int(frames.sum()), settings, pattern, found)
        if reason:
            dropped[k] = reason
            continue
        kept.append(k)
        if not frames.all():
            keep[k] = frames
    return Chosen(kept, dropped, keep)


def write_list(path: Path, source: FrameSource, chosen: Chosen) -> None:
    """{source, kept: [episode], dropped: {episode: why}, frames: {episode: [kept frame of the episode]}}."""
    write_json(path, {
        "source": source.where, "kept": chosen.kept, "dropped": {str(k): why for k, why in chosen.dropped.items()},
        "frames": {str(k): np.flatnonzero(flags) for k, flags in chosen.keep.items() if k not in chosen.dropped},
    })  # fmt: skip


def _frames(source: FrameSource, episode: int, settings: Settings, ranges: np.ndarray) -> np.ndarray:
    span = source.episodes[episode]
    keep = np.ones(span.stop - span.start, bool)
    if settings.drop_noops:
        keep &= ~noops(source.actions()[span.start : span.stop])
    if settings.drop_idle:
        keep &= ~idle_frames(source, episode, ranges)
    return keep


def _reason(
    source: FrameSource, k: int, n: int, settings: Settings, pattern: re.Pattern[str] | None, found: dict[int, str]
) -> str:
    """Why an episode of `n` frames is dropped; "" if it is not."""
    if settings.success_only and not source.success_of(k):
        return "failed" if source.success_of(k) is False else "success not known"
    if n < settings.min_frames:
        return f"too short: {n} frames"
    if settings.max_frames is not None and n > settings.max_frames:
        return f"too long: {n} frames"
    instruction = source.instruction_of(source.episodes[k].start)
    if pattern is not None and not pattern.search(instruction):
        return f"another instruction: {instruction}"
    if k in settings.drop:
        return "named in --drop"
    return found.get(k, "")


def _pattern(text: str | None) -> re.Pattern[str] | None:
    try:
        return None if text is None else re.compile(text, re.IGNORECASE)
    except re.error as error:
        raise problem(f"--instruction {text!r}: {error}", "a regular expression", "correct it") from error


def _found(settings: Settings, n_episodes: int) -> dict[int, str]:
    """Episode -> the first thing `vla data check` found in it."""
    unknown = sorted(set(settings.checks) - {*CHECKS, *OTHER_CHECKS})
    if unknown:
        raise problem(f"check {unknown[0]!r}", f"one of {', '.join([*CHECKS, *OTHER_CHECKS])}", "correct --checks")
    if settings.drop_found is None:
        return {}
    try:
        findings = json.loads(settings.drop_found.read_text(encoding="utf-8"))["findings"]
        named = [(int(k), f["check"], f["text"]) for f in findings for k in f["episodes"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise problem(
            f"{settings.drop_found}: {error!r}", "the output of `vla data check --json`", "make it again"
        ) from error
    if any(not 0 <= k < n_episodes for k, _, _ in named):
        raise problem(f"{settings.drop_found} about episode {max(k for k, _, _ in named)}", f"0..{n_episodes - 1}",
                      "check this very dataset")  # fmt: skip
    wanted = [row for row in named if not settings.checks or row[1] in settings.checks]
    return {k: f"{check}: {text}" for k, check, text in reversed(wanted)}
