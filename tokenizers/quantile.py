"""Quantile bins: every dimension is cut where its own data have equal mass, so that no symbol is wasted on values that
hardly occur. Where the data are dense the bins are narrow.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self

import numpy as np

from vla.files import write_json
from vla.tokenizers.grammar import OnePerDimension
from vla.tokenizers.rows import finite_chunks, whole_rows
from vla.tokenizers.schemes import FILE, field_of, read_scheme
from vla.types import ActionDecodeError, problem


@dataclass(frozen=True)
class QuantileTokenizer:
    """One token per dimension, row-major: (step 0, dimension 0), (step 0, dimension 1), ... Unfitted until `fit`.

    Bin j of a dimension holds edge j - 1 < x <= edge j; values outside the data's range go to the first or last bin. An
    edge lies half-way between two neighbouring values of the data. Values that repeat cannot be split: where they are
    more than a bin's share, bins merge, and the dimension has fewer symbols than `bins`. A constant dimension has one.
    """

    bins: int = 256
    edges: tuple[np.ndarray, ...] = field(default=(), repr=False, compare=False)
    """D arrays float64 (n_d - 1,), ascending: the upper ends of all bins but the last."""
    values: tuple[np.ndarray, ...] = field(default=(), repr=False, compare=False)
    """D arrays float32 (n_d,), ascending: what the symbols decode to, the (lower) median of the data in each bin."""
    ranges: np.ndarray = field(default_factory=lambda: np.zeros((0, 2)), repr=False, compare=False)
    """float64 (D, 2): lowest and highest value of the data."""

    def __post_init__(self) -> None:
        if self.bins < 2:
            raise problem(f"bins={self.bins}", "at least 2 bins", "check the tokenizer's settings")

    @property
    def vocab_size(self) -> int:
        """Number of symbols. Every dimension uses the first n_d of them."""
        return self.bins

    @property
    def bound(self) -> np.ndarray:
        """float64 (D,): largest error of a value inside the data's range, the farthest that a bin's end is from its
        value."""
        self._check_fitted()
        largest = []
        for edges, values, (low, high) in zip(self.edges, self.values, self.ranges, strict=True):
            ends = np.concatenate([[low], edges, [high]])
            largest.append(max((values - ends[:-1]).max(), (ends[1:] - values).max()))
        return np.array(largest)

    def fit(self, chunks: np.ndarray) -> Self:
        """Cut each dimension of normalised chunks (N, H, D), taken as float32, into `bins` parts of equal mass."""
        data = finite_chunks(chunks).astype(np.float32)
        if not data.size:
            raise problem(f"chunks of shape {data.shape}", "at least one action", "give the training data's chunks")
        data = np.sort(data.reshape(-1, data.shape[2]), axis=0)
        cuts = [_cut(column, self.bins) for column in data.T]
        ranges = np.stack([data[0], data[-1]], axis=1).astype(np.float64)
        return replace(self, edges=tuple(c[0] for c in cuts), values=tuple(c[1] for c in cuts), ranges=ranges)

    def encode(self, chunks: np.ndarray) -> np.ndarray:
        """Normalised actions (B, H, D) -> int64 symbols (B, H * D). `ActionEncodeError` for NaN, infinity, another D."""
        self._check_fitted()
        values = finite_chunks(chunks, dim=len(self.edges))
        symbols = np.empty(values.shape, np.int64)
        for d, edges in enumerate(self.edges):
            symbols[..., d] = np.searchsorted(edges, values[..., d], side="left")
        return symbols.reshape(len(values), values.shape[1] * values.shape[2])

    def decode(self, symbols: np.ndarray, horizon: int, dim: int) -> tuple[np.ndarray, np.ndarray]:
        """Symbols (B, T) -> (float32 normalised actions (B, H, D), bool ok (B,)); rows that are no chunk are NaN."""
        self._check_fitted(dim)
        symbols, lengths, ok = whole_rows(symbols, self.bins)
        ok &= lengths == horizon * dim
        actions = np.full((len(symbols), horizon, dim), np.nan, np.float32)
        if ok.any():
            whole = symbols[:, : horizon * dim].reshape(-1, horizon, dim)
            ok &= (whole < [len(values) for values in self.values]).all(axis=(1, 2))
            for d, values in enumerate(self.values):
                actions[ok, :, d] = values[whole[ok, :, d]]
        return actions, ok

    def grammar(self, horizon: int, dim: int) -> QuantileGrammar:
        """One symbol of its dimension at each of horizon * dim places."""
        self._check_fitted(dim)
        return QuantileGrammar(horizon * dim, tuple(np.arange(len(values), dtype=np.int64) for values in self.values))

    def save(self, folder: Path) -> None:
        """Write scheme.json."""
        self._check_fitted()
        dimensions = [
            {"edges": edges, "values": [float(v) for v in values], "range": span}
            for edges, values, span in zip(self.edges, self.values, self.ranges, strict=True)
        ]
        write_json(folder / FILE, {"scheme": "quantile", "bins": self.bins, "dimensions": dimensions})

    @classmethod
    def load(cls, folder: Path) -> Self:
        """From a folder that `save` wrote."""
        data = read_scheme(folder)
        dimensions = field_of(data, "dimensions", list, folder)
        tables = [_read(row, f"{folder / FILE}: dimension {d}") for d, row in enumerate(dimensions)]
        edges, values = tuple(t[0] for t in tables), tuple(t[1].astype(np.float32) for t in tables)
        return cls(field_of(data, "bins", int, folder), edges, values, np.array([t[2] for t in tables]).reshape(-1, 2))

    def _check_fitted(self, dim: int | None = None) -> None:
        if not self.edges:
            raise problem("quantile bins that were not fitted", "bins of some data", "call fit(chunks) or load")
        if dim not in (None, len(self.edges)):
            raise ActionDecodeError(f"got dim {dim}; expected {len(self.edges)}, that of the data; fix: fit again")


@dataclass(frozen=True)
class QuantileGrammar(OnePerDimension):
    """Rows of `n_tokens`; place t takes the symbols of dimension t % D. The state is the number of tokens so far."""

    max_tokens: int
    symbols: tuple[np.ndarray, ...]
    start: int = 0

    def legal(self, state: int) -> np.ndarray:
        return self.symbols[state % len(self.symbols)] if state < self.max_tokens else np.zeros(0, np.int64)

    def advance(self, state: int, symbol: int) -> int:
        return state + 1


def _cut(column: np.ndarray, bins: int) -> tuple[np.ndarray, np.ndarray]:
    """Sorted float32 (N,) -> (float64 edges (n - 1,), float32 medians (n,)), n <= bins."""
    n = len(column)
    last = np.ceil(np.arange(1, bins) * (n / bins)).astype(np.int64).clip(1, n) - 1  # the last datum of each bin
    below = np.unique(column[last])
    below = below[below < column[-1]]
    stops = np.searchsorted(column, below, side="right")
    # A float64 half-way between two float32 numbers is exact, and so lies strictly between them.
    edges = (column[stops - 1].astype(np.float64) + column[stops]) / 2
    starts, stops = np.concatenate([[0], stops]), np.concatenate([stops, [n]])
    return edges, column[(starts + stops - 1) // 2]


def _read(row: Any, where: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(edges, values, range) of one dimension of a scheme.json."""
    try:
        edges, values, span = (np.array(row[name], np.float64) for name in ("edges", "values", "range"))
        good = edges.ndim == 1 and values.shape == (len(edges) + 1,) and span.shape == (2,)
        good = good and np.isfinite(np.concatenate([edges, values, span])).all()
        good = good and (np.diff(edges) > 0).all() and (np.diff(values) > 0).all()
    except (KeyError, TypeError, ValueError):
        good = False
    if not good:
        raise problem(where, "ascending edges, one more ascending values, and a range",
                      "restore the file from a copy")  # fmt: skip
    return edges, values, span
