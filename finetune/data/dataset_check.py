"""What is wrong with a dataset: every file is opened, every number read, frames at both ends of each episode decoded."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np

from vla.finetune.formats.lerobot_reader import TOLERANCE_S, LeRobotReader
from vla.finetune.formats.source import FrameSource
from vla.types import VlaError


@dataclass(frozen=True)
class Finding:
    """One fault. Errors make data unusable; warnings are worth a look."""

    level: Literal["error", "warning"]
    text: str
    check: str = "files"
    """Which check found it: "files", or a key of `vla.finetune.data.dataset_lint.CHECKS`."""
    episodes: tuple[int, ...] = ()
    """Those it is about; empty: the whole dataset."""
    fix: str = ""


def check_dataset(root: Path, all_frames: bool = False) -> list[Finding]:
    """Everything found; empty for a clean dataset. `all_frames` decodes every image instead of two per episode."""
    try:
        reader = LeRobotReader(root)
    except VlaError as error:
        return [Finding("error", str(error))]
    if not reader.n_episodes:
        return [Finding("error", f"{root} has no episodes")]
    findings, columns = _read_numbers(reader)
    findings += _check_values(reader, columns)
    findings += _check_order(reader, columns)
    findings += _check_instructions(reader, columns)
    if "next.success" not in reader.features:
        findings.append(Finding("warning", "no next.success: success of the episodes is not known"))
    findings += _check_images(reader, all_frames)
    return merged(findings)  # one damaged file is met again for each of its episodes


def merged(findings: Iterable[Finding]) -> list[Finding]:
    """Those with one text are one, about the episodes of all of them; the order is kept."""
    found: dict[Finding, list[int]] = {}
    for finding in findings:
        found.setdefault(replace(finding, episodes=()), []).extend(finding.episodes)
    return [replace(finding, episodes=tuple(sorted(set(episodes)))) for finding, episodes in found.items()]


def check_source(source: FrameSource, all_frames: bool = False) -> list[Finding]:
    """What can be said of any format: numbers are finite, frames at both ends of each episode (or all) can be decoded."""
    findings: list[Finding] = []
    if not source.n_episodes:
        return [Finding("error", f"{source.where} has no episodes")]
    findings += [Finding("warning", f"{place} has no step: it is left out") for place in source.empty]
    for key, read in (("action", source.actions), ("state", source.states), ("reward", source.rewards)):
        try:
            rows = read()
        except VlaError as error:  # a reader that refuses such numbers itself, or a damaged file
            findings.append(Finding("error", str(error)))
            continue
        rows = None if rows is None else rows.reshape(len(rows), -1)
        bad = np.argwhere(~np.isfinite(rows)) if rows is not None else np.zeros((0, 2), np.int64)
        if rows is not None and len(bad):
            episodes = sorted({source.episode_of(int(i)) for i in bad[:, 0]})
            text = f"{key}: {rows[tuple(bad[0])]} at frame {bad[0][0]}, dimension {bad[0][1]}; episodes with such values: {episodes}"
            findings.append(Finding("error", text, episodes=tuple(episodes), fix="drop these episodes"))
    for span in source.episodes:
        for i in range(span.start, span.stop) if all_frames else sorted({span.start, span.stop - 1}):
            try:
                images = source.images(i)
            except VlaError as error:
                findings.append(Finding("error", str(error), episodes=(span.index,), fix="drop the episode"))
                continue
            for camera, image in images.items():
                if image.shape != tuple(source.image_shape(camera)):
                    text = f"episode {span.index}: {camera} is {image.shape}, not {source.image_shape(camera)}"
                    findings.append(Finding("error", text, episodes=(span.index,), fix="drop the episode"))
        if span.stop - span.start == 1:
            findings.append(Finding("warning", f"episode {span.index} has a single frame", episodes=(span.index,)))
    return merged(findings)


def _read_numbers(reader: LeRobotReader) -> tuple[list[Finding], dict[str, np.ndarray]]:
    """Findings about files, and the columns that could be read whole."""
    keys = [k for k, feature in reader.features.items() if feature["dtype"] not in ("image", "video", "string")]
    findings, columns, broken = [], {}, set()
    for key in keys:
        parts = []
        for file in reader.data_files:
            if file in broken:
                continue
            try:
                parts.append(reader.file_column(file, key))
            except VlaError as error:
                broken.add(file)
                episodes = tuple(row.index for row in reader.episodes if row.data_file == file)
                findings.append(Finding("error", str(error), episodes=episodes))
        if not broken:
            columns[key] = np.concatenate(parts)
    return findings, columns if not broken else {}


def _check_values(reader: LeRobotReader, columns: dict[str, np.ndarray]) -> list[Finding]:
    findings = []
    for key, values in columns.items():
        rows = values.reshape(len(values), -1)
        if rows.dtype.kind == "f" and not np.isfinite(rows).all():
            frame, dim = np.argwhere(~np.isfinite(rows))[0]
            episodes = sorted({reader.episode_of(int(i)) for i in np.argwhere(~np.isfinite(rows))[:, 0]})
            text = f"{key}: {rows[frame, dim]} at frame {frame}, dimension {dim}; episodes with such values: {episodes}"
            findings.append(Finding("error", text, episodes=tuple(episodes), fix="drop these episodes"))
        names = {"action": reader.action_names, reader.state_key: reader.state_names}.get(key, ())
        for dim, name in enumerate(names):
            if (rows[:, dim] == rows[0, dim]).all():
                text = f"{key}: dimension {dim} ({name}) is {rows[0, dim]:g} in every frame"
                findings.append(Finding("warning", text))
    return findings


def _check_order(reader: LeRobotReader, columns: dict[str, np.ndarray]) -> list[Finding]:
    """Counters count and timestamps agree with the frame rate."""
    findings = []
    for row in reader.episodes:
        n = len(row)
        expected = {
            "frame_index": np.arange(n), "episode_index": np.full(n, row.index), "index": np.arange(row.start, row.stop),
        }  # fmt: skip
        for key, values in expected.items():
            if key in columns and (columns[key][row.start : row.stop].reshape(-1) != values).any():
                text = f"episode {row.index}: {key} does not count {values[0]}..{values[-1]}"
                findings.append(Finding("error", text, episodes=(row.index,)))
        if "timestamp" in columns:
            seconds = columns["timestamp"][row.start : row.stop].reshape(-1).astype(np.float64)
            late = np.abs(seconds - np.arange(n) / reader.fps)
            if late.max() > TOLERANCE_S + np.spacing(np.float32(n / reader.fps)):
                text = f"timestamp {seconds[late.argmax()]:.6f} s at frame {late.argmax()}, {late.argmax() / reader.fps:.6f} s"
                text = f"episode {row.index}: {text} by {reader.fps:g} fps"
                findings.append(Finding("error", text, episodes=(row.index,)))
        if n == 1:
            findings.append(Finding("warning", f"episode {row.index} has a single frame", episodes=(row.index,)))
    return findings


def _check_instructions(reader: LeRobotReader, columns: dict[str, np.ndarray]) -> list[Finding]:
    findings = []
    used: dict[int, set[int]] = {}
    for i, task in enumerate(columns["task_index"].reshape(-1).tolist() if "task_index" in columns else ()):
        used.setdefault(task, set()).add(i)
    for task in sorted(used):
        if (reader.tasks.get(task) or "").strip():
            continue
        why = "has no instruction" if task in reader.tasks else "meta/tasks.parquet does not have it"
        episodes = sorted({reader.episode_of(i) for i in used[task]})
        text = f"task_index {task} is used but {why}"
        findings.append(Finding("error", text, episodes=tuple(episodes), fix="drop these episodes"))
    return findings


def _check_images(reader: LeRobotReader, all_frames: bool) -> list[Finding]:
    findings = []
    for row in reader.episodes:
        for name in reader.cameras:
            shape = reader.image_shape(name)
            for i in range(row.start, row.stop) if all_frames else sorted({row.start, row.stop - 1}):
                try:
                    image = reader.images(i, [name])[name]
                except VlaError as error:
                    findings.append(Finding("error", str(error), episodes=(row.index,)))
                    continue
                if image.shape != shape:
                    text = f"episode {row.index}: {name} is {image.shape}, info.json says {shape}"
                    findings.append(Finding("error", text, episodes=(row.index,), fix="drop the episode"))
    return findings
