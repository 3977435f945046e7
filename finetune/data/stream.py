"""Training samples from data that is too large, or too far away, to be read in any order.

Episodes come one after another from each source; their frames go through a buffer of `buffer_size` from which one is drawn
at random for each that comes in. Frames wait in it as lossless PNG, so that memory stays flat. Everything follows from the
seed and a count: any rank of any number sees its share of one and the same stream, and a stream goes on from a saved state
exactly.

Where a dataset lies on a disk, `chunks.ChunkDataset` is better: it shuffles all of it and holds no frame.
"""

from __future__ import annotations

import io
import itertools
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from vla.finetune.data.chunks import Sample
from vla.finetune.formats.source import FrameSource
from vla.types import Episode, problem

EpisodesFrom = Callable[[int], Iterable[Episode]]
"""`f(first)`: the episodes of one pass over a dataset, in order, from number `first` on."""

_BLOCK = 4096


@dataclass(frozen=True)
class SourceEpisodes:
    """`EpisodesFrom` of a dataset that is at hand."""

    source: FrameSource
    cameras: tuple[str, ...] | None = None

    def __call__(self, first: int) -> Iterator[Episode]:
        return (self.source.episode(i, self.cameras) for i in range(first, self.source.n_episodes))


@dataclass(frozen=True)
class IterableEpisodes:
    """`EpisodesFrom` of what can only be read from its beginning, e.g. `lambda: hub.stream("OWNER/NAME")`."""

    start: Callable[[], Iterable[Episode]]

    def __call__(self, first: int) -> Iterator[Episode]:
        return itertools.islice(self.start(), first, None)


@dataclass(frozen=True)
class _Waiting:
    """One frame in the buffer."""

    source: int
    episode: int
    step: int
    sample: Sample
    """Without images."""
    images: dict[str, bytes]


class _Walk:
    """Where one source is: the frames of its episodes one after another, pass after pass."""

    def __init__(self, number: int, name: str, episodes: EpisodesFrom, horizon: int) -> None:
        self.number, self.name, self._episodes_from, self._horizon = number, name, episodes, horizon
        self.episode, self.step = 0, 0
        """The frame that comes next."""
        self._rest: Iterator[Episode] | None = None
        self._now: Episode | None = None

    def next(self) -> _Waiting:
        if self._now is None or self.step == len(self._now):
            self._advance()
        assert self._now is not None
        waiting = self.frame(self._now, self.episode, self.step)
        self.step += 1
        return waiting

    def frame(self, episode: Episode, number: int, step: int) -> _Waiting:
        """Step `step` of an episode, encoded."""
        seen = episode.steps[step].observation
        wanted = np.arange(step, step + self._horizon)
        actions = np.stack([episode.steps[min(k, len(episode) - 1)].action for k in wanted.tolist()])
        sample = Sample({}, seen.state, seen.instruction, actions, wanted >= len(episode), self.name)
        return _Waiting(self.number, number, step, sample, {c: _encoded(image) for c, image in seen.images.items()})

    def episodes_from(self, first: int) -> Iterable[Episode]:
        return self._episodes_from(first)

    def go_to(self, episode: int, step: int) -> None:
        self.episode, self.step, self._rest, self._now = episode, step, None, None
        if step:  # in the middle of an episode
            self._rest = iter(self._episodes_from(episode))
            self._now = next(self._rest)

    def _advance(self) -> None:
        """To the first step of the next episode that has any; after the last one, the first again."""
        first = self.episode if self._now is None else self.episode + 1
        rest = self._rest if self._rest is not None else iter(self._episodes_from(first))
        for _ in range(2):
            for number, episode in enumerate(rest, first):
                if len(episode):
                    self.episode, self.step, self._rest, self._now = number, 0, rest, episode
                    return
            first, rest = 0, iter(self._episodes_from(0))
        raise problem(f"no frame in {self.name!r}", "at least one episode", "leave the dataset out")


class StreamMixture:
    """An endless stream of samples of several sources. Iterate over it; `state_dict` says where it is.

    Args:
        sources: (dataset name, episodes, weight): of all frames, the share weight / sum of weights comes from it.
        horizon: H, actions per sample.
        buffer_size: frames in the shuffle buffer, over all sources.
        rank, world: this process's share: samples rank, rank + world, ... of the stream. Each rank reads all data.
    """

    def __init__(
        self, sources: Sequence[tuple[str, EpisodesFrom, float]], horizon: int, buffer_size: int = 1000, seed: int = 0,
        rank: int = 0, world: int = 1,
    ) -> None:  # fmt: skip
        weights = np.array([weight for _, _, weight in sources], np.float64)
        if not len(weights) or not np.isfinite(weights).all() or (weights < 0).any() or not weights.sum():
            raise problem(f"weights {weights.tolist()}", "numbers >= 0, not all 0", "one per dataset")
        if buffer_size < 1 or horizon < 1 or not 0 <= rank < world:
            raise problem(f"buffer_size {buffer_size}, horizon {horizon}, rank {rank} of {world}",
                          "buffer_size and horizon >= 1, 0 <= rank < world", "correct it")  # fmt: skip
        self.buffer_size, self.seed, self.rank, self.world = buffer_size, seed, rank, world
        self._bounds = np.cumsum(weights) / weights.sum()
        self._walks = [_Walk(k, name, make, horizon) for k, (name, make, _) in enumerate(sources)]
        self._buffer: list[_Waiting] = []
        self._n_in = 0
        """Frames that have come in."""
        self._draws = (-1, np.zeros((0, 2)))

    @property
    def position(self) -> int:
        """Samples of the whole stream that have been drawn, by all ranks together."""
        return max(0, self._n_in - self.buffer_size)

    def __iter__(self) -> Iterator[Sample]:
        """This rank's samples from `position` on, without end."""
        while True:
            drawn = self._draw()
            if (self.position - 1) % self.world == self.rank:
                yield _decoded(drawn)

    def state_dict(self) -> dict[str, Any]:
        """JSON: where each source is, and which frames wait in the buffer; no pixels."""
        return {
            "seed": self.seed, "buffer_size": self.buffer_size, "n_in": self._n_in,
            "names": [walk.name for walk in self._walks],
            "walks": [[walk.episode, walk.step] for walk in self._walks],
            "buffer": [[w.source, w.episode, w.step] for w in self._buffer],
        }  # fmt: skip

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there. The episodes of the waiting frames are read again, each once.

        Raises:
            VlaError: a state of other sources, seed or buffer size, or the data has changed.
        """
        mine = self.state_dict()
        for key in ("seed", "buffer_size", "names"):
            if state[key] != mine[key]:
                raise problem(f"a state with {key} {state[key]}", f"{mine[key]}", "use the settings of the saved run")
        wanted: dict[int, dict[int, list[tuple[int, int]]]] = defaultdict(lambda: defaultdict(list))
        for place, (source, episode, step) in enumerate(state["buffer"]):
            wanted[source][episode].append((place, step))
        found: dict[int, _Waiting] = {}
        for source, by_episode in wanted.items():
            found |= self._read_again(self._walks[source], by_episode)
        self._buffer = [found[place] for place in range(len(state["buffer"]))]
        self._n_in = state["n_in"]
        for walk, (episode, step) in zip(self._walks, state["walks"], strict=True):
            walk.go_to(episode, step)

    def _read_again(self, walk: _Walk, by_episode: dict[int, list[tuple[int, int]]]) -> dict[int, _Waiting]:
        """Place in the buffer -> its frame."""
        found, last = {}, max(by_episode)
        first = min(by_episode)
        for number, episode in enumerate(walk.episodes_from(first), first):
            for place, step in by_episode.get(number, ()):
                if step < len(episode):
                    found[place] = walk.frame(episode, number, step)
            if number == last:
                break
        missing = sum(len(places) for places in by_episode.values()) - len(found)
        if missing:
            raise problem(f"{missing} frames of the saved state that {walk.name!r} does not have", "the same data",
                          "restore the dataset, or begin a new run")  # fmt: skip
        return found

    def _draw(self) -> _Waiting:
        """The next sample of the stream; the frame that comes in takes its place."""
        while len(self._buffer) < self.buffer_size:
            self._buffer.append(self._come_in()[0])
        waiting, chance = self._come_in()
        place = int(chance * self.buffer_size)
        drawn, self._buffer[place] = self._buffer[place], waiting
        return drawn

    def _come_in(self) -> tuple[_Waiting, float]:
        """The next frame, and the number in [0, 1) that decides its place."""
        block = self._n_in // _BLOCK
        if self._draws[0] != block:
            self._draws = (block, np.random.default_rng([self.seed, block]).random((_BLOCK, 2)))
        which, chance = self._draws[1][self._n_in % _BLOCK].tolist()
        source = min(int(np.searchsorted(self._bounds, which, side="right")), len(self._walks) - 1)
        waiting = self._walks[source].next()
        self._n_in += 1
        return waiting, chance


def _encoded(image: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(image).save(file, "PNG", compress_level=1)
    return file.getvalue()


def _decoded(waiting: _Waiting) -> Sample:
    images = {camera: np.asarray(Image.open(io.BytesIO(data))) for camera, data in waiting.images.items()}
    s = waiting.sample
    return Sample(images, s.state, s.instruction, s.actions, s.is_pad, s.dataset)
