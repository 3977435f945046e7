"""In which order samples are drawn: a function of a seed, never of what was read before."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def epoch_order(n: int, seed: int, epoch: int) -> np.ndarray:
    """int64 (n,): the permutation of `n` samples in one epoch."""
    return np.random.default_rng([seed, epoch]).permutation(n)


def windowed_order(bounds: np.ndarray, window: int, seed: Sequence[int]) -> np.ndarray:
    """A shuffle that stays close to the order of storage, as a shuffle buffer of `window` samples gives it.

    Files come in random order. Within that, sample number k is sorted by k + u, with u uniform in [0, window): it stands
    less than `window` places from k, and what is drawn about one place was stored within a stretch of `window` samples.

    Args:
        bounds: int64 (F + 1,), ascending from 0: samples `bounds[f]` .. `bounds[f + 1]` lie in file f.
        window: at least 1, which leaves each file in order.

    Returns:
        int64 (bounds[-1],): each sample once.
    """
    rng = np.random.default_rng(seed)
    files = rng.permutation(len(bounds) - 1)
    lengths = np.diff(bounds)[files]
    begins = np.cumsum(lengths) - lengths
    places = np.arange(int(bounds[-1]))
    stored = np.repeat(bounds[:-1][files] - begins, lengths) + places
    return stored[np.argsort(places + rng.random(len(places)) * window, kind="stable")]
