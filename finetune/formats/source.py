"""What every dataset on disk looks like to the rest of the project, whatever its format.

A reader of one format gives the columns of its numbers, the spans of its episodes and the pixels of one frame; everything
else here follows from those. Readers: `lerobot_reader` (v2.1 and v3.0), `rlds_reader` (TFDS), `hdf5_reader` (LIBERO),
`cache_reader` (our own cache).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np

from vla.types import Episode, Observation, Step, VlaError, problem


class EpisodeSpan(Protocol):
    """Frames `start` .. `stop - 1` of a dataset are episode `index`."""

    @property
    def index(self) -> int: ...
    @property
    def start(self) -> int: ...
    @property
    def stop(self) -> int: ...


@dataclass(frozen=True)
class Span:
    """The simplest `EpisodeSpan`."""

    index: int
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True)
class BadEpisode:
    """An episode that was left out because it cannot be used."""

    file: str
    record: int | str | None
    """Its number in the dataset (LeRobot, our cache) or in the file (RLDS), or its name there (HDF5); None: a whole file,
    which does not say how many it has."""
    why: str


class Unreachable(VlaError):
    """The data may be whole but cannot be had now (no connection, a full disk): no reason to leave an episode out."""


class FrameSource(ABC):
    """Random access to the N frames of a dataset. Picklable: a copy in another process opens its own files.

    Numbers of all frames may be held in memory (some tens of bytes a frame); pixels never are.
    """

    name: str
    """The `unnorm_key` its statistics go by."""
    where: str
    """Folder, file or address, for messages."""
    fps: float
    """Control rate; 0 if the data does not say."""
    cameras: tuple[str, ...]
    action_names: tuple[str, ...]
    state_names: tuple[str, ...]
    """Empty if the data has no proprioception."""
    gripper: str = ""
    """What the gripper's numbers mean, in words, where the data's format says so."""
    empty: tuple[str, ...] = ()
    """Where the episodes are that have no step; they are left out of `episodes`."""
    episodes: Sequence[EpisodeSpan]
    """In order and without gaps: the first starts at 0, each starts where the one before stops."""
    revision: str = ""
    """Commit of a dataset on the Hub."""
    in_order: bool = False
    """Frames that lie far apart are slow to read: it wants `ChunkDataset(window=...)`."""
    bad: tuple[BadEpisode, ...] = ()
    """What was left out when it was opened with `skip_bad`; not among `episodes`."""

    @abstractmethod
    def actions(self) -> np.ndarray:
        """float32 (N, D), un-normalised."""

    @abstractmethod
    def states(self) -> np.ndarray | None:
        """float32 (N, S), un-normalised; None if the data has no proprioception."""

    @abstractmethod
    def images(self, i: int, cameras: Sequence[str] | None = None) -> dict[str, np.ndarray]:
        """Camera name -> uint8 (height, width, 3) RGB of frame `i`; all cameras by default.

        Raises:
            VlaError: no such camera or frame, or a frame that cannot be decoded (file and frame are named).
        """

    @abstractmethod
    def image_shape(self, camera: str) -> tuple[int, int, int]:
        """(height, width, 3) of a camera's frames. VlaError listing the cameras if there is no such one."""

    def jpeg(self, i: int, camera: str) -> bytes | None:
        """The JPEG file that frame `i` is stored as; None if it is stored some other way."""
        return None

    def encoded(self, i: int, camera: str) -> bytes | None:
        """The image file (JPEG, PNG) that frame `i` is stored as; None if it is stored some other way."""
        return self.jpeg(i, camera)

    def place_of(self, episode: int) -> tuple[str, int | str | None]:
        """The file an episode is in and what it is called there: see `BadEpisode`."""
        return self.where, episode

    @abstractmethod
    def instruction_of(self, i: int) -> str:
        """The instruction at frame `i`; "" if the data has none."""

    def success_of(self, episode: int) -> bool | None:
        """Whether any step was a success, None if the data does not say."""
        return None

    def seed_of(self, episode: int) -> int | None:
        """`Env.reset` seed of an episode, None if the data does not say."""
        return None

    def task_of(self, episode: int) -> str | None:
        """The simulator's name of an episode's task, None if the data does not say."""
        return None

    def rewards(self) -> np.ndarray | None:
        """float32 (N,), None if the data does not say."""
        return None

    def __len__(self) -> int:
        """Number of frames."""
        return self.episodes[-1].stop if self.episodes else 0

    @property
    def n_episodes(self) -> int:
        return len(self.episodes)

    @property
    def action_dim(self) -> int:
        """D."""
        return len(self.action_names)

    @property
    def state_dim(self) -> int:
        """S; 0 if the data has no proprioception."""
        return len(self.state_names)

    def episode_of(self, i: int) -> int:
        """Index of the episode that frame `i` belongs to."""
        self.check_frame(i)
        return int(np.searchsorted(self._stops, i, side="right"))

    def check_camera(self, camera: str) -> None:
        """VlaError listing the cameras there are, if `camera` is not one of them."""
        if camera not in self.cameras:
            raise problem(f"camera {camera!r}", f"one of {', '.join(self.cameras) or 'none'}, the cameras of {self.where}",
                          "choose a camera of this dataset")  # fmt: skip

    def check_frame(self, i: int) -> None:
        if not 0 <= i < len(self):
            raise problem(f"frame {i}", f"0..{len(self) - 1} in {self.where}", "choose a frame of this dataset")

    def episode(self, i: int, cameras: Sequence[str] | None = None) -> Episode:
        """One episode whole, its images decoded. `cameras=()` leaves the images out."""
        span, states, actions, rewards = self.episodes[i], self.states(), self.actions(), self.rewards()
        success = bool(self.success_of(i))
        steps = []
        for k in range(span.start, span.stop):
            state = None if states is None else states[k]
            seen = Observation(self.images(k, cameras), state, self.instruction_of(k))
            reward = 0.0 if rewards is None else float(rewards[k])
            steps.append(Step(seen, actions[k], reward, success and k == span.stop - 1))
        return Episode(steps, self.instruction_of(span.start), self.name, self.success_of(i), self.seed_of(i),
                       self.task_of(i))  # fmt: skip

    def iter_episodes(self, cameras: Sequence[str] | None = None) -> Iterator[Episode]:
        """All episodes in order, one in memory at a time."""
        for i in range(self.n_episodes):
            yield self.episode(i, cameras)

    @cached_property
    def _stops(self) -> np.ndarray:
        return np.array([span.stop for span in self.episodes], np.int64)
