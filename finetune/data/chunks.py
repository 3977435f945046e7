"""Training samples: one frame and the H actions that follow it, in an order that depends on nothing but the seed.

A position is a number of samples consumed. The order of samples is a function of (seed, epoch) alone, so training that
stops at a position continues with exactly the samples it would have seen, with any number of workers. What is kept in
memory is 8 bytes a frame (24 while an epoch of a weighted mixture is drawn) and four numbers an episode.

With a `window` the data is read almost in the order it is stored in, as from a shuffle buffer, but nothing is held: where a
frame stands in the stream is arithmetic then too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from vla.finetune.data.camera_map import camera_map, policy_name
from vla.finetune.data.image_cache import decode_all
from vla.finetune.data.order import epoch_order, windowed_order
from vla.finetune.formats.source import FrameSource, Unreachable
from vla.types import VlaError, problem


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
    past_actions: np.ndarray | None = None
    """As in `vla.types.Observation`: the n <= K before this frame, as the robot is given them. None: not shown."""
    motion: str = ""
    """The language motion that begins at this frame; empty unless `show_motions` was called."""


def holdout_split(n_episodes: int, n_holdout: int, seed: int = 0, of: str = "") -> frozenset[int]:
    """The episodes that are kept from training: `n_holdout` of `n_episodes`, the same for every run with this seed."""
    if not 0 <= n_holdout < n_episodes:
        raise problem(
            f"{n_holdout} held-out episodes of {n_episodes}{of}",
            f"0..{n_episodes - 1}",
            "hold out fewer: --holdout-episodes",
        )
    chosen = np.random.default_rng([seed, n_episodes]).permutation(n_episodes)[:n_holdout]
    return frozenset(int(i) for i in chosen)


class ChunkDataset:
    """Map-style dataset over several sources; also accepted by `torch.utils.data.DataLoader`.

    Args:
        sources: (dataset name, its frames); the name is the one its statistics go by.
        horizon: H, actions per sample.
        cameras: what every source must have, each "NAME" or "NAME=KEY|KEY" as in `camera_map`; all cameras of the first
            source if None.
        weights: how often samples of each source are drawn, relative to one another; None: every frame once per epoch.
            A source is walked through completely before it repeats.
        balance: weights are per frame, as OpenVLA's mixtures: a source is drawn in proportion to weight x frames. An epoch
            is then as long as OpenVLA's: until every source of weight 1 (if there is none, of any weight above 0) has been
            drawn as often as it has frames. Without, it is as long as without weights.
        cache_images: decode every frame now, once, and keep it as uint8.
        holdout_episodes: of each source, as chosen by `holdout_split`. Samples 0 <= i < len(self) are for training, the
            held-out ones follow: `holdout_indices`.
        skip_unlabelled: leave out episodes that begin without an instruction, as OpenVLA does; `n_unlabelled` counts them.
        window: 0 shuffles all samples. Above, each source is read file by file, files in random order, and a sample stands
            less than `window` places from where its frame is stored: for data that is far away or too large for the disk.
        skip_bad: a sample whose images cannot be decoded is replaced by the one after it, that of the next frame (after the
            last training sample, or the last held-out one, the first of them); `bad_frames` lists what was met.
    """

    def __init__(
        self,
        sources: Sequence[tuple[str, FrameSource]],
        horizon: int,
        cameras: Sequence[str] | None = None,
        weights: Sequence[float] | None = None,
        cache_images: bool = False,
        holdout_episodes: int = 0,
        seed: int = 0,
        balance: bool = False,
        skip_unlabelled: bool = False,
        skip_bad: bool = False,
        window: int = 0,
    ) -> None:
        if not sources or horizon < 1 or window < 0:
            raise problem(f"{len(sources)} sources, horizon {horizon}, window {window}",
                          "at least one source, horizon >= 1, window >= 0", "name a dataset, or correct it")  # fmt: skip
        self.sources, self.horizon, self.seed, self.window = list(sources), horizon, seed, window
        self._history, self._as_given = 0, _unchanged
        self._motion_of: Callable[[int, int], str] | None = None
        wanted = sources[0][1].cameras if cameras is None else cameras
        self.cameras = tuple(policy_name(text) for text in wanted)
        self._keys = [camera_map(wanted, name, source) for name, source in self.sources]
        self.skip_bad, self.bad_frames = skip_bad, dict[tuple[int, int], str]()
        """(Source, frame) -> why its images cannot be decoded."""
        self._check_actions()
        self._place_episodes(holdout_episodes, skip_unlabelled)
        self._first = np.concatenate([[0], np.cumsum(self._sizes)])
        self._order: tuple[int, np.ndarray] | None = None  # the epoch at hand
        self._files = [self._file_bounds(s) for s in range(len(self.sources))] if window else []
        self._draws = self._draws_per_epoch(weights, balance)
        bad = self.bad_frames if skip_bad else None
        self._cache = decode_all(self.sources, self._keys, self._decode, bad) if cache_images else None

    def __len__(self) -> int:
        """Training samples: one per frame that is not held out."""
        return int(self._sizes.sum())

    @property
    def epoch_size(self) -> int:
        """Samples in one epoch; `len(self)` unless `balance` makes it longer."""
        return len(self) if self._draws is None else int(self._draws.sum())

    @property
    def readers(self) -> list[FrameSource]:
        return [source for _, source in self.sources]

    @property
    def holdout_indices(self) -> np.ndarray:
        """int64: the samples of held-out episodes, in order."""
        return np.arange(len(self), self._n_samples)

    def locate(self, index: int) -> tuple[int, int, int]:
        """Of a sample: its source's number, its frame in it, and where the frame's episode stops."""
        if not 0 <= index < self._n_samples:
            raise IndexError(f"sample {index} of {self._n_samples}")
        k = int(np.searchsorted(self._begins, index, side="right")) - 1
        source, start, stop = self._episodes[k].tolist()
        return source, start + index - int(self._begins[k]), stop

    def __getitem__(self, index: int) -> Sample:
        s, frame, stop, images = self._decodable(int(index))
        name, source = self.sources[s]
        wanted = np.arange(frame, frame + self.horizon)
        states = source.states()
        return Sample(
            images=images,
            state=None if states is None else states[frame],
            instruction=source.instruction_of(frame),
            actions=source.actions()[np.minimum(wanted, stop - 1)],
            is_pad=wanted >= stop,
            dataset=name,
            past_actions=self._past_actions(source, frame) if self._history else None,
            motion=self._motion_of(s, frame) if self._motion_of else "",
        )

    def show_motions(self, motion_of: Callable[[int, int], str]) -> None:
        """From now on samples have a `motion`. `motion_of`: (number of the source, its frame) -> phrase; picklable."""
        self._motion_of = motion_of

    def show_past_actions(self, history: int, as_given: Callable[[np.ndarray], np.ndarray]) -> None:
        """From now on samples have `past_actions`. `as_given`: recorded actions (n, D) -> as the robot is given them."""
        self._history, self._as_given = history, as_given

    def _past_actions(self, source: FrameSource, frame: int) -> np.ndarray:
        start = source.episodes[source.episode_of(frame)].start
        return self._as_given(source.actions()[max(start, frame - self._history) : frame])

    def order(self, epoch: int) -> np.ndarray:
        """int64 (epoch_size,): the samples of one epoch in order."""
        mix = epoch_order(self.epoch_size, self.seed, epoch)
        if self._draws is None and not self.window:
            return mix
        draws = self._sizes if self._draws is None else self._draws
        picked, ends = np.empty(len(mix), np.int64), np.cumsum(draws)
        for s, (n, end) in enumerate(zip(draws.tolist(), ends.tolist(), strict=True)):
            drawn = self._draw(s, epoch * n, n)
            if self.window:  # the source's own order is kept: `mix` only says whose turn it is
                picked[(mix >= end - n) & (mix < end)] = drawn
            else:
                picked[end - n : end] = drawn
        return picked if self.window else picked[mix]

    def indices(self, position: int, n: int) -> np.ndarray:
        """int64 (n,): the training samples `position` .. `position + n` of the endless stream of epochs."""
        size, found = self.epoch_size, []
        for epoch in range(position // size, (position + n - 1) // size + 1):
            if self._order is None or self._order[0] != epoch:
                self._order = None  # freed before the next one is made
                self._order = (epoch, self.order(epoch))
            found.append(self._order[1][max(position - epoch * size, 0) : position + n - epoch * size])
        return np.concatenate(found or [np.zeros(0, np.int64)])

    def _check_actions(self) -> None:
        first = self.sources[0][1]
        for name, source in self.sources:
            if source.action_dim != first.action_dim:
                raise problem(f"{source.action_dim} action dimensions in {name!r}", f"{first.action_dim}, as in the first",
                              "train on datasets of one action space")  # fmt: skip

    def _place_episodes(self, holdout_episodes: int, skip_unlabelled: bool) -> None:
        """Which samples each episode is: all training samples first, then the held-out ones, both source by source."""
        tables, held, self.n_unlabelled = [], [], 0
        for s, (_, source) in enumerate(self.sources):
            spans = [e for e in source.episodes if not skip_unlabelled or source.instruction_of(e.start).strip()]
            self.n_unlabelled += source.n_episodes - len(spans)
            rows = np.array([(s, e.start, e.stop, e.index) for e in spans], np.int64).reshape(-1, 4)
            tables.append(rows[:, :3])
            kept = sorted(holdout_split(source.n_episodes, holdout_episodes, self.seed, f" in {source.name!r}"))
            held.append(np.isin(rows[:, 3], np.array(kept, np.int64)))
        train = [rows[~mask] for rows, mask in zip(tables, held, strict=True)]
        rest = [rows[mask] for rows, mask in zip(tables, held, strict=True)]
        self._sizes = np.array([int((rows[:, 2] - rows[:, 1]).sum()) for rows in train])
        self._n_train = sum(len(rows) for rows in train)
        """Episodes that are trained on: the first ones of `_episodes`."""
        self._episodes = np.concatenate(train + rest)
        """int64 (E, 3): source, first frame, end."""
        if not self._sizes.sum():
            left_out = f", {self.n_unlabelled} episodes left out that have no instruction" if self.n_unlabelled else ""
            raise problem(f"no frame to train on in {', '.join(name for name, _ in self.sources)}{left_out}", "some",
                          "hold out fewer episodes, or choose other data")  # fmt: skip
        ends = np.cumsum(self._episodes[:, 2] - self._episodes[:, 1])
        self._n_samples = int(ends[-1])
        self._begins = np.concatenate([[0], ends[:-1]])

    def _draws_per_epoch(self, weights: Sequence[float] | None, balance: bool) -> np.ndarray | None:
        if weights is None:
            return None
        w = np.asarray(weights, np.float64)
        if w.shape != (len(self.sources),) or not np.isfinite(w).all() or (w < 0).any() or w.sum() == 0:
            raise problem(f"weights {list(weights)}", f"{len(self.sources)} numbers >= 0, not all 0", "one per dataset")
        if ((w > 0) & (self._sizes == 0)).any():
            raise problem("a weight on a dataset without frames to train on", "weight 0", "drop the dataset")
        share = w * self._sizes if balance else w
        share, size = share / share.sum(), len(self)
        if balance:
            primary = w == 1.0 if (w == 1.0).any() else w > 0
            size = int((self._sizes[primary] / share[primary]).max() + 1e-6)
        exact = share * size
        draws = np.floor(exact).astype(np.int64)
        draws[np.argsort(draws - exact, kind="stable")[: size - draws.sum()]] += 1  # largest remainders
        return draws

    def _draw(self, source: int, begin: int, n: int) -> np.ndarray:
        """Draws `begin` <= k < `begin + n` from a source that is shuffled anew each time it has been walked through."""
        size = int(self._sizes[source])
        if n == 0:
            return np.zeros(0, np.int64)
        passes = range(begin // size, (begin + n - 1) // size + 1)
        shuffled = np.concatenate([self._pass(source, k) for k in passes])
        skip = begin - passes.start * size
        return self._first[source] + shuffled[skip : skip + n]

    def _pass(self, source: int, k: int) -> np.ndarray:
        """int64 (its samples,): the order of walk `k` through a source."""
        seed = [self.seed, k, source, 1]
        if self.window:
            return windowed_order(self._files[source], self.window, seed)
        return np.random.default_rng(seed).permutation(int(self._sizes[source]))

    def _file_bounds(self, source: int) -> np.ndarray:
        """int64 (files + 1,): the training samples of a source at which another file begins, and their number."""
        reader, sizes, bounds, last = self.sources[source][1], self._episodes[: self._n_train], [0], None
        total = 0
        for _, start, stop in sizes[sizes[:, 0] == source].tolist():
            file = reader.place_of(reader.episode_of(start))[0]
            if file != last and total:
                bounds.append(total)
            last, total = file, total + stop - start
        return np.array([*bounds, total], np.int64)

    def _decodable(self, index: int) -> tuple[int, int, int, dict[str, np.ndarray]]:
        """`locate` and the images of a sample; with `skip_bad`, of the first from there on that can be decoded."""
        begin, end = (0, len(self)) if index < len(self) else (len(self), self._n_samples)
        for k in range(max(1, end - begin)):
            s, frame, stop = self.locate(index if k == 0 else begin + (index - begin + k) % (end - begin))
            if (s, frame) in self.bad_frames:
                continue
            try:
                return s, frame, stop, self._images(s, frame)
            except Unreachable:
                raise
            except VlaError as error:
                if not self.skip_bad:
                    raise
                self.bad_frames[s, frame] = str(error)
        raise problem(f"{len(self.bad_frames)} frames that cannot be decoded", "at least one that can",
                      "copy the dataset again")  # fmt: skip

    def _images(self, source: int, frame: int) -> dict[str, np.ndarray]:
        if self._cache is None:
            return self._decode(source, frame)
        return {camera: pixels[frame] for camera, pixels in self._cache[source].items()}

    def _decode(self, source: int, frame: int) -> dict[str, np.ndarray]:
        keys = self._keys[source]
        found = self.sources[source][1].images(frame, tuple(dict.fromkeys(keys.values())))
        return {camera: found[key] for camera, key in keys.items()}


def _unchanged(actions: np.ndarray) -> np.ndarray:
    return actions
