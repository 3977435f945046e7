"""Is a LeRobot dataset what its source is? Everything is read again, on both sides."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vla.finetune.data.dataset_check import check_dataset
from vla.finetune.formats.lerobot_reader import LeRobotReader
from vla.finetune.formats.source import FrameSource
from vla.progress import Progress
from vla.types import Episode, VlaError, problem

VIDEO_GREY_LEVELS = 12.0
"""Mean absolute difference, of 0..255 over the pixels of one frame, that compression may make. Measured at the writer's
settings: at most 3.3 for MetaWorld's and LIBERO's frames, which turned over differ by 43 and more. Frames of noise can
exceed it."""


def verify_lerobot(root: Path, source: FrameSource, episodes: Sequence[int], prepare: Callable[[Episode], Episode],
                   fps: float) -> None:  # fmt: skip
    """Compare a written dataset with its source: its own files, then frames, numbers, instructions, success, seed, task.

    Frames stored as images must be equal bit for bit, those of videos to `VIDEO_GREY_LEVELS`. What the source does not say
    (success, seed, task, rewards) is not compared.

    Args:
        episodes: those of `source` that were written, in order.
        prepare: what was done to an episode before it was written.
        fps: the control rate that was written.

    Raises:
        VlaError: naming the first fault.
    """
    errors = [finding.text for finding in check_dataset(root) if finding.level == "error"]
    if errors:
        raise VlaError(f"{root}: {len(errors)} errors; the first: {errors[0]}; fix: write it again")
    reader = LeRobotReader(root)
    if (reader.n_episodes, reader.fps) != (len(episodes), fps):
        raise _differs(
            reader, source, f"{reader.n_episodes} episodes at {reader.fps:g} fps", f"{len(episodes)} at {fps:g}"
        )
    with Progress("verified frames", len(reader)) as progress:
        for k, number in enumerate(episodes):
            _verify_facts(reader, source, k, number)
            original = prepare(source.episode(number))
            _verify_episode(reader, source, k, original, progress.advance)
    print(f"verified: {len(reader)} frames, {reader.n_episodes} episodes, as in {source.where}")


def _verify_facts(reader: LeRobotReader, source: FrameSource, k: int, number: int) -> None:
    seed = source.seed_of(number)
    facts = {
        "success": (reader.success_of(k), source.success_of(number)),
        "seed": (reader.seed_of(k), None if seed is None or seed < 0 else seed),
        "task": (reader.task_of(k), source.task_of(number) or None),
    }
    for name, (mine, theirs) in facts.items():
        if mine != theirs and theirs is not None and (name != "success" or reader.success_of(0) is not None):
            raise _differs(reader, source, f"{name} {mine!r} of episode {k}", f"{theirs!r}, of episode {number}")


def _verify_episode(
    reader: LeRobotReader, source: FrameSource, k: int, original: Episode, tick: Callable[[], None]
) -> None:
    span, steps = reader.episodes[k], original.steps
    if len(span) != len(steps):
        raise _differs(reader, source, f"{len(span)} frames in episode {k}", f"{len(steps)}")
    if reader.instruction_of(span.start) != original.instruction:
        raise _differs(reader, source, f"instruction {reader.instruction_of(span.start)!r} of episode {k}",
                       repr(original.instruction))  # fmt: skip
    states, rewards = reader.states(), reader.rewards()
    pairs: dict[str, tuple[np.ndarray, list[Any]]] = {
        "actions": (reader.actions()[span.start : span.stop], [step.action for step in steps])
    }
    if states is not None:
        pairs["states"] = (states[span.start : span.stop], [step.observation.state for step in steps])
    if rewards is not None and source.rewards() is not None:
        pairs["rewards"] = (rewards[span.start : span.stop], [step.reward for step in steps])
    for name, (mine, theirs) in pairs.items():
        if not np.array_equal(mine, np.asarray(theirs, np.float32)):
            raise _differs(reader, source, f"{name} of episode {k}", "the same numbers")
    for i, step in enumerate(steps):
        for camera, image in reader.images(span.start + i).items():
            is_video = reader.features[reader.camera_key(camera)]["dtype"] == "video"
            _verify_frame(reader, source, f"frame {i} of episode {k}, camera {camera}", image,
                          step.observation.images[camera], VIDEO_GREY_LEVELS if is_video else 0.0)  # fmt: skip
        tick()


def _verify_frame(
    reader: LeRobotReader, source: FrameSource, at: str, image: np.ndarray, original: np.ndarray, tolerance: float
) -> None:
    if image.shape != original.shape:
        raise _differs(reader, source, f"{at}: {image.shape}", f"{original.shape}")
    off = float(np.abs(image.astype(np.int16) - original).mean())
    if off > tolerance:
        raise _differs(reader, source, f"{at}: {off:.3g} grey levels from the source", f"at most {tolerance:g}")


def _differs(reader: LeRobotReader, source: FrameSource, got: str, expected: str) -> VlaError:
    return problem(f"{got} in {reader.where}", f"{expected}, as in {source.where}", "write it again in another folder")
