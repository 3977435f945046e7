"""Training samples: one frame and the H actions that follow it, in an order that depends on nothing but the seed.

A position is a number of samples consumed. The order of samples is a function of (seed, epoch) alone, so training that
stops at a position continues with exactly the samples it would have seen, with any number of workers.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from vla.finetune.lerobot_reader import LeRobotReader
from vla.types import problem


@dataclass(frozen=True)
class Sample:
    """One training sample."""

    images: dict[str, np.ndarray]
    """Camera name -> uint8 (height, width, 3) RGB."""
    state: np.ndarray | None
    """float32 (S,), un-normalised."""
    instruction: str
    actions: np.ndarray
    """float32 (H, D), un-normalised; beyond the end of the episode its last action is repeated."""
    is_pad: np.ndarray
    """bool (H,), True beyond the end of the episode."""
    dataset: str


def epoch_order(n: int, seed: int, epoch: int) -> np.ndarray:
    """int64 (n,): the permutation of `n` samples in one epoch."""
    return np.random.default_rng([seed, epoch]).permutation(n)


def holdout_split(n_episodes: int, n_holdout: int, seed: int = 0) -> frozenset[int]:
    """The episodes that are kept from training: `n_holdout` of `n_episodes`, the same for every run with this seed."""
    if not 0 <= n_holdout < n_episodes:
        raise problem(
            f"{n_holdout} held-out episodes of {n_episodes}", f"0..{n_episodes - 1}", "hold out fewer episodes"
        )
    chosen = np.random.default_rng([seed, n_episodes]).permutation(n_episodes)[:n_holdout]
    return frozenset(int(i) for i in chosen)


class ChunkDataset:
    """Map-style dataset over several sources; also accepted by `torch.utils.data.DataLoader`.

    Args:
        sources: (dataset name, reader); the name is the one its statistics go by.
        horizon: H, actions per sample.
        cameras: names every source must have; all cameras of the first source if None.
        weights: how often samples of each source are drawn, relative to one another; None: every frame once per epoch.
            With weights an epoch is as long as without, and a source is walked through completely before it repeats.
        cache_images: decode every frame now, once, and keep it as uint8.
        holdout_episodes: of each source, as chosen by `holdout_split`. Samples 0 <= i < len(self) are for training, the
            held-out ones follow: `holdout_indices`.
    """

    def __init__(
        self,
        sources: Sequence[tuple[str, LeRobotReader]],
        horizon: int,
        cameras: Sequence[str] | None = None,
        weights: Sequence[float] | None = None,
        cache_images: bool = False,
        holdout_episodes: int = 0,
        seed: int = 0,
    ) -> None:
        if not sources or horizon < 1:
            raise problem(f"{len(sources)} sources, horizon {horizon}", "at least one of each", "name a dataset")
        self.sources, self.horizon, self.seed = list(sources), horizon, seed
        self.cameras = tuple(sources[0][1].cameras if cameras is None else cameras)
        self._check_sources()
        held = [holdout_split(reader.n_episodes, holdout_episodes, seed) for _, reader in self.sources]
        parts = []  # (source, frame, end of its episode) of each sample: all training samples first
        for wanted in (False, True):
            for s, (_, reader) in enumerate(self.sources):
                rows = [row for row in reader.episodes if (row.index in held[s]) == wanted]
                parts += [np.array([(s, k, row.stop) for k in range(row.start, row.stop)]) for row in rows]
        self._source, self._frame, self._stop = np.concatenate(parts).T
        in_holdout = [sum(len(reader.episodes[i]) for i in held[s]) for s, (_, reader) in enumerate(self.sources)]
        self._sizes = np.array([len(reader) for _, reader in self.sources]) - in_holdout
        self._first = np.concatenate([[0], np.cumsum(self._sizes)])
        self._order: tuple[int, np.ndarray] | None = None  # the epoch at hand
        self._draws = self._draws_per_epoch(weights)
        self._cache = self._decode_all() if cache_images else None

    def __len__(self) -> int:
        """Training samples, which is one epoch: one per frame that is not held out."""
        return int(self._sizes.sum())

    @property
    def readers(self) -> list[LeRobotReader]:
        return [reader for _, reader in self.sources]

    @property
    def holdout_indices(self) -> np.ndarray:
        """int64: the samples of held-out episodes, in order."""
        return np.arange(len(self), len(self._frame))

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < len(self._frame):
            raise IndexError(f"sample {index} of {len(self._frame)}")
        name, reader = self.sources[self._source[index]]
        frame, stop = int(self._frame[index]), int(self._stop[index])
        wanted = np.arange(frame, frame + self.horizon)
        states = reader.states()
        if self._cache is None:
            images = reader.images(frame, self.cameras)
        else:
            images = {camera: pixels[index] for camera, pixels in self._cache.items()}
        return Sample(
            images=images,
            state=None if states is None else states[frame],
            instruction=reader.instruction_of(frame),
            actions=reader.actions()[np.minimum(wanted, stop - 1)],
            is_pad=wanted >= stop,
            dataset=name,
        )

    def order(self, epoch: int) -> np.ndarray:
        """int64 (len(self),): the samples of one epoch in order."""
        mix = epoch_order(len(self), self.seed, epoch)
        if self._draws is None:
            return mix
        picked = [self._draw(s, epoch * n, n) for s, n in enumerate(self._draws)]
        return np.concatenate(picked)[mix]

    def indices(self, position: int, n: int) -> np.ndarray:
        """int64 (n,): the training samples `position` .. `position + n` of the endless stream of epochs."""
        size, found = len(self), []
        for epoch in range(position // size, (position + n - 1) // size + 1):
            if self._order is None or self._order[0] != epoch:
                self._order = (epoch, self.order(epoch))
            found.append(self._order[1][max(position - epoch * size, 0) : position + n - epoch * size])
        return np.concatenate(found or [np.zeros(0, np.int64)])

    def batch_indices(self, position: int, batch_size: int) -> Iterator[np.ndarray]:
        """Sample numbers batch by batch without end, from `position` on; batches run on across epochs."""
        while True:
            yield self.indices(position, batch_size)
            position += batch_size

    def batches(self, position: int, batch_size: int, workers: int = 0) -> Iterator[list[Sample]]:
        """Batches without end from `position` (samples consumed); `workers` processes decode ahead, same order."""
        indices = self.batch_indices(position, batch_size)
        if workers == 0:
            while True:
                yield [self[i] for i in next(indices)]
        from torch.utils.data import DataLoader

        dataset: Any = self  # DataLoader takes any map-style object, whatever its annotation says
        batches = (batch.tolist() for batch in indices)
        yield from DataLoader(dataset, batch_sampler=batches, num_workers=workers, collate_fn=list)

    def _check_sources(self) -> None:
        first = self.sources[0][1]
        for name, reader in self.sources:
            for camera in self.cameras:
                reader.camera_key(camera)
            if reader.action_dim != first.action_dim:
                raise problem(f"{reader.action_dim} action dimensions in {name!r}", f"{first.action_dim}, as in the first",
                              "train on datasets of one action space")  # fmt: skip

    def _draws_per_epoch(self, weights: Sequence[float] | None) -> np.ndarray | None:
        if weights is None:
            return None
        w = np.asarray(weights, np.float64)
        if w.shape != (len(self.sources),) or not np.isfinite(w).all() or (w < 0).any() or w.sum() == 0:
            raise problem(f"weights {list(weights)}", f"{len(self.sources)} numbers >= 0, not all 0", "one per dataset")
        exact = w / w.sum() * len(self)
        draws = np.floor(exact).astype(np.int64)
        draws[np.argsort(draws - exact, kind="stable")[: len(self) - draws.sum()]] += 1  # largest remainders
        if ((draws > 0) & (self._sizes == 0)).any():
            raise problem("a weight on a dataset without frames to train on", "weight 0", "drop the dataset")
        return draws

    def _draw(self, source: int, begin: int, n: int) -> np.ndarray:
        """Draws `begin` <= k < `begin + n` from a source that is shuffled anew each time it has been walked through."""
        size = int(self._sizes[source])
        if n == 0:
            return np.zeros(0, np.int64)
        passes = range(begin // size, (begin + n - 1) // size + 1)
        shuffled = np.concatenate([np.random.default_rng([self.seed, k, source, 1]).permutation(size) for k in passes])
        skip = begin - passes.start * size
        return self._first[source] + shuffled[skip : skip + n]

    def _decode_all(self) -> dict[str, np.ndarray]:
        """Camera -> uint8 (samples, height, width, 3)."""
        sizes = {}
        for camera in self.cameras:
            shapes = {tuple(reader.features[reader.camera_key(camera)]["shape"]) for _, reader in self.sources}
            if len(shapes) != 1:
                raise problem(f"camera {camera!r} of sizes {sorted(shapes)}", "one size", "set cache_images to False")
            sizes[camera] = (len(self._frame), *shapes.pop())
        needed, free = sum(int(np.prod(s)) for s in sizes.values()), _available_bytes()
        if needed > 0.8 * free:
            raise problem(f"{needed / 2**30:.1f} GiB of images to cache", f"at most 80 % of the {free / 2**30:.1f} GiB free",
                          "pass --no-cache-images, or set cache_images to False")  # fmt: skip
        cache = {camera: np.empty(size, np.uint8) for camera, size in sizes.items()}
        for index in range(len(self._frame)):
            reader = self.sources[self._source[index]][1]
            for camera, image in reader.images(int(self._frame[index]), self.cameras).items():
                cache[camera][index] = image
        return cache


def _available_bytes() -> int:
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
