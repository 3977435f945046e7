"""Exact statistics in the form of LeRobot's `meta/stats.json`: {min, max, mean, std, count, q01, q10, q50, q90, q99}."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TypeVar

import numpy as np

QUANTILES = {"q01": 0.01, "q10": 0.10, "q50": 0.50, "q90": 0.90, "q99": 0.99}
IMAGE_SAMPLE = 32  # frames per episode that the image statistics look at

T = TypeVar("T")


def column_stats(values: np.ndarray) -> dict[str, np.ndarray]:
    """Statistics of (N, D) or (N,) rows: float64 (D,) each (D = 1 for scalars), `count` int64 (1,)."""
    rows = values.reshape(len(values), -1).astype(np.float64)
    stats = {"min": rows.min(0), "max": rows.max(0), "mean": rows.mean(0), "std": rows.std(0)}
    stats["count"] = np.array([len(rows)])
    return stats | {name: np.quantile(rows, q, axis=0) for name, q in QUANTILES.items()}


def sample_frames(frames: Sequence[T], n: int = IMAGE_SAMPLE) -> list[T]:
    """At most `n` evenly spaced items, the first and last among them."""
    if len(frames) <= n:
        return list(frames)
    return [frames[int(i)] for i in np.linspace(0, len(frames) - 1, n).round()]


def image_histogram(images: Iterable[np.ndarray]) -> np.ndarray:
    """int64 (3, 257): per channel the count of each of 256 levels, and in the last column the number of images."""
    total = np.zeros((3, 257), np.int64)
    for image in images:
        for channel in range(3):
            total[channel, :256] += np.bincount(image[..., channel].reshape(-1), minlength=256)
        total[:, 256] += 1
    return total


def histogram_stats(histogram: np.ndarray) -> dict[str, np.ndarray]:
    """The statistics of the pixels behind an `image_histogram`, scaled to [0, 1]: (3, 1, 1) each, `count` in images."""
    counts, levels = histogram[:, :256], np.arange(256) / 255.0
    n = counts.sum(1, keepdims=True)
    mean = (counts * levels).sum(1, keepdims=True) / n
    variance = (counts * (levels - mean) ** 2).sum(1, keepdims=True) / n
    seen = [np.flatnonzero(row) for row in counts]
    stats = {
        "min": np.array([levels[s[0]] for s in seen]), "max": np.array([levels[s[-1]] for s in seen]),
        "mean": mean, "std": np.sqrt(variance),
    }  # fmt: skip
    shaped = {name: value.reshape(3, 1, 1) for name, value in stats.items()} | {"count": histogram[0, 256:].copy()}
    for name, q in QUANTILES.items():
        shaped[name] = np.array([_quantile(row, q) for row in counts]).reshape(3, 1, 1) / 255.0
    return shaped


def _quantile(counts: np.ndarray, q: float) -> float:
    """`np.quantile` (linear) of the levels a histogram counts."""
    below, position = np.cumsum(counts), q * (counts.sum() - 1)
    low, high = np.searchsorted(below, [np.floor(position), np.ceil(position)], side="right")
    return float(low + (high - low) * (position - np.floor(position)))
