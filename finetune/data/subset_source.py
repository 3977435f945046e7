"""Some episodes, frames, cameras and state dimensions of a dataset, as a dataset."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property

import numpy as np

from vla.finetune.formats.source import FrameSource, Span
from vla.types import problem


class SubsetSource(FrameSource):
    """What is chosen of `source`, in the order it is chosen, renumbered from 0.

    Args:
        episodes: which ones; None: all.
        cameras: which ones; None: all.
        keep: episode of `source` -> bool (its length,), the frames to keep; episodes it does not name are kept whole.
        states: which dimensions of the state; None: all.
    """

    def __init__(
        self,
        source: FrameSource,
        episodes: Sequence[int] | None = None,
        cameras: Sequence[str] | None = None,
        keep: Mapping[int, np.ndarray] | None = None,
        states: Sequence[int] | None = None,
    ) -> None:
        self.source = source
        self.chosen = tuple(range(source.n_episodes) if episodes is None else episodes)
        for episode in self.chosen:
            if not 0 <= episode < source.n_episodes:
                raise problem(f"episode {episode}", f"0..{source.n_episodes - 1} in {source.where}", "choose others")
        for camera in cameras or ():
            source.check_camera(camera)
        self.cameras = source.cameras if cameras is None else tuple(cameras)
        self.name, self.where, self.fps, self.bad = source.name, source.where, source.fps, source.bad
        self.revision, self.in_order = source.revision, source.in_order
        self.gripper, self.empty, self.in_order = source.gripper, source.empty, source.in_order
        self._columns = list(range(source.state_dim) if states is None else states)
        self.action_names = source.action_names
        self.state_names = tuple(source.state_names[k] for k in self._columns)
        spans, parts, start = [], [], 0
        for k, episode in enumerate(self.chosen):
            frames = np.arange(source.episodes[episode].start, source.episodes[episode].stop)
            if keep is not None and episode in keep:
                frames = frames[keep[episode]]
            spans.append(Span(k, start, start + len(frames)))
            parts.append(frames)
            start += len(frames)
        self.episodes = spans
        self.frames = np.concatenate(parts) if parts else np.zeros(0, np.int64)
        """int64 (N,): the source's number of every frame."""

    def actions(self) -> np.ndarray:
        return self._actions

    def states(self) -> np.ndarray | None:
        return self._states

    def rewards(self) -> np.ndarray | None:
        return self._rewards

    def images(self, i: int, cameras: Sequence[str] | None = None) -> dict[str, np.ndarray]:
        self.check_frame(i)
        for camera in cameras or ():
            self.check_camera(camera)
        return self.source.images(int(self.frames[i]), self.cameras if cameras is None else cameras)

    def jpeg(self, i: int, camera: str) -> bytes | None:
        self.check_frame(i)
        return self.source.jpeg(int(self.frames[i]), camera)

    def encoded(self, i: int, camera: str) -> bytes | None:
        self.check_frame(i)
        return self.source.encoded(int(self.frames[i]), camera)

    def place_of(self, episode: int) -> tuple[str, int | str | None]:
        return self.source.place_of(self.chosen[episode])

    def image_shape(self, camera: str) -> tuple[int, int, int]:
        self.check_camera(camera)
        return self.source.image_shape(camera)

    def instruction_of(self, i: int) -> str:
        self.check_frame(i)
        return self.source.instruction_of(int(self.frames[i]))

    def success_of(self, episode: int) -> bool | None:
        return self.source.success_of(self.chosen[episode])

    def seed_of(self, episode: int) -> int | None:
        return self.source.seed_of(self.chosen[episode])

    def task_of(self, episode: int) -> str | None:
        return self.source.task_of(self.chosen[episode])

    @cached_property
    def _actions(self) -> np.ndarray:
        return self.source.actions()[self.frames]

    @cached_property
    def _states(self) -> np.ndarray | None:
        states = self.source.states()
        return None if states is None else states[self.frames][:, self._columns]

    @cached_property
    def _rewards(self) -> np.ndarray | None:
        rewards = self.source.rewards()
        return None if rewards is None else rewards[self.frames]


def without_padding(source: FrameSource) -> FrameSource:
    """Without the state's dimensions that only fill a place (OpenVLA's `pad`), as OpenVLA-OFT reads LIBERO's state."""
    kept = [k for k, name in enumerate(source.state_names) if not name.startswith("pad")]
    return source if len(kept) == source.state_dim else SubsetSource(source, states=kept)


def parse_range(text: str, n: int) -> list[int]:
    """Which of `n` episodes: "0:100", "5:", "-20:", "0:100:2", "3" or "1,4,10:20"; order kept, "" is all.

    Raises:
        VlaError: not of this form, beyond the end, or the same one twice.
    """
    chosen: list[int] = []
    for part in text.split(",") if text.strip() else [":"]:
        try:
            numbers = [int(word) if word.strip() else None for word in part.split(":")]
        except ValueError:
            numbers = []
        if not 1 <= len(numbers) <= 3 or (len(numbers) == 1 and numbers[0] is None) or numbers[2:] == [0]:
            raise problem(f"episodes {text!r}", "such as 0:100, 5:, -20:, 0:100:2 or 1,4,7", "correct --episodes")
        if len(numbers) > 1:
            chosen += range(n)[slice(*numbers)]
        elif not 0 <= (numbers[0] or 0) < n:
            raise problem(f"episode {numbers[0]}", f"0..{n - 1}", "correct --episodes")
        else:
            chosen.append(numbers[0] or 0)
    if not chosen or len(set(chosen)) < len(chosen):
        raise problem(f"episodes {text!r} of {n}: {len(chosen)}, {len(set(chosen))} different",
                      "at least one, none of them twice", "correct --episodes")  # fmt: skip
    return chosen
