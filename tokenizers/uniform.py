"""Uniform bins: the action tokenizer of RT-2 and OpenVLA, bin for bin.

OpenVLA (arXiv 2406.09246, `ActionTokenizer`) cuts [-1, 1] at 256 edges into 255 bins, clips, and calls
`np.digitize(action, edges)`, which answers d in 1 .. 256; d decodes to centre number clip(d - 1, 0, 254). So there are
256 symbols but 255 values: +1 itself is the only action with d = 256, and it decodes like d = 255.

The symbol here is d - 1, ascending with the action. OpenVLA's descending ids are a matter of placement
(`Placement.tail`).

The mode `edges` is the other convention in use: `bins` values spread evenly over [low, high], ends included, and every
action goes to the nearest. It reproduces -1 and +1 (and with an odd number of bins 0), which matters to a gripper.

Two things differ from OpenVLA, on purpose: NaN and infinity raise (OpenVLA encodes NaN as +1), and no symbol outside
0 .. 255 is ever decoded (OpenVLA answers with an extreme action).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Self, get_args

import numpy as np

from vla.files import write_json
from vla.tokenizers.grammar import FixedGrammar
from vla.tokenizers.protocol import PAD, ActionEncodeError
from vla.tokenizers.rows import check_finite
from vla.tokenizers.schemes import FILE, field_of, read_scheme
from vla.types import ActionDecodeError, problem

Mode = Literal["centres", "edges"]


@dataclass(frozen=True)
class UniformTokenizer:
    """One token per dimension, row-major: (step 0, dimension 0), (step 0, dimension 1), ...

    centres: `bins` edges spread evenly over [low, high], hence `bins` symbols and `bins - 1` decoded values.
    edges: `bins` symbols, each decoding to its own edge.
    """

    bins: int = 256
    low: float = -1.0
    high: float = 1.0
    mode: Mode = "centres"
    edges: np.ndarray = field(init=False, repr=False, compare=False)
    """float64 (bins,)."""
    centres: np.ndarray = field(init=False, repr=False, compare=False)
    """float64 (bins - 1,)."""
    _edges_float32: np.ndarray = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.bins < 2 or not np.isfinite([self.low, self.high]).all() or not self.low < self.high:
            got = f"bins={self.bins}, low={self.low}, high={self.high}"
            raise problem(got, "at least 2 bins and finite low < high", "check the tokenizer's settings")
        if self.mode not in get_args(Mode):
            raise problem(f"mode {self.mode!r}", "centres or edges", "correct the name")
        edges = np.linspace(self.low, self.high, self.bins)
        # `encode` guesses the nearest edge in float32; a guess half a bin off would be wrong.
        if (self.high - self.low) / (self.bins - 1) < 16 * np.spacing(np.float32(max(abs(self.low), abs(self.high)))):
            raise problem(
                f"{self.bins} bins over [{self.low}, {self.high}]",
                "bins that float32 can tell apart",
                "use fewer bins or normalise the actions",
            )
        # A float32 x reaches a float64 edge exactly if it reaches the first float32 that is not below the edge.
        edges_float32 = edges.astype(np.float32)
        edges_float32 = np.where(edges_float32 < edges, np.nextafter(edges_float32, np.float32(np.inf)), edges_float32)
        centres = (edges[:-1] + edges[1:]) / 2.0
        for name, table in (("edges", edges), ("centres", centres), ("_edges_float32", edges_float32)):
            table.setflags(write=False)
            object.__setattr__(self, name, table)

    @property
    def vocab_size(self) -> int:
        """Number of symbols."""
        return self.bins

    @property
    def bound(self) -> float:
        """Largest error of a value inside [low, high]: half a bin."""
        return (self.high - self.low) / (self.bins - 1) / 2

    def fit(self, chunks: np.ndarray) -> Self:
        """Uniform bins learn nothing; checks that `chunks` could be encoded."""
        self.encode(chunks)
        return self

    def encode(self, chunks: np.ndarray) -> np.ndarray:
        """Normalised actions (B, H, D) -> int64 symbols (B, H * D). `ActionEncodeError` as `to_symbols`."""
        chunks = np.asarray(chunks)
        if chunks.ndim != 3:
            raise ActionEncodeError(
                f"got actions of shape {chunks.shape}; expected (B, H, D); fix: chunk and batch the actions first"
            )
        return self.to_symbols(chunks).reshape(len(chunks), chunks.shape[1] * chunks.shape[2])

    def decode(self, symbols: np.ndarray, horizon: int, dim: int) -> tuple[np.ndarray, np.ndarray]:
        """Symbols (B, T) -> (float32 normalised actions (B, H, D), bool ok (B,)); rows that are no chunk are NaN."""
        symbols, n = np.asarray(symbols), horizon * dim
        whole = symbols[:, :n]
        ok = np.full(len(symbols), symbols.shape[1] >= n)
        if ok.any():
            ok = ((whole >= 0) & (whole < self.bins)).all(axis=1) & (symbols[:, n:] == PAD).all(axis=1)
        actions = np.full((len(symbols), n), np.nan, np.float32)
        actions[ok] = self.to_values(whole[ok])
        return actions.reshape(len(symbols), horizon, dim), ok

    def grammar(self, horizon: int, dim: int) -> FixedGrammar:
        """Every symbol at each of horizon * dim places."""
        return FixedGrammar(horizon * dim, self.bins, per_dimension=True)

    def to_symbols(self, actions: np.ndarray) -> np.ndarray:
        """Normalised actions (...), clipped to [low, high] -> int64 symbols (...) in 0 .. bins - 1.

        centres: `to_symbols(a) + 1` is `np.digitize(np.clip(a, low, high), edges)` for the dtype of `a`. The dtype is
        part of the definition: half of the 256 edges, rounded to float32, fall into the bin below. OpenVLA's data are
        float32. edges: the nearest edge, computed in float64; half-way goes up.

        Raises `ActionEncodeError` for NaN, infinity, or any dtype but integers and float16/32/64.
        """
        values = np.asarray(actions)
        if values.dtype == np.float32:
            edges = self._edges_float32
        elif values.dtype.kind in "iu" or values.dtype in (np.float16, np.float64):
            values, edges = values.astype(np.float64), self.edges
        else:
            raise ActionEncodeError(
                f"got actions of dtype {values.dtype}; expected float32 or float64; fix: convert them first"
            )
        check_finite(values)
        if self.mode == "edges":
            clipped = np.clip(values.astype(np.float64, copy=False), self.low, self.high)
            return np.floor((clipped - self.low) * ((self.bins - 1) / (self.high - self.low)) + 0.5).astype(np.int64)
        # The nearest edge n is safe to guess by arithmetic: a rounding error can only matter half-way between two
        # edges, and there both guesses lead to the same bin. One comparison with the true edge then decides.
        clipped = np.maximum(np.minimum(values, edges[-1]), edges[0])
        nearest = clipped - edges[0]
        nearest *= values.dtype.type((self.bins - 1) / (self.high - self.low))
        nearest += values.dtype.type(0.5)
        nearest = nearest.astype(np.intp)
        at_or_above = clipped >= edges.take(nearest, mode="clip")
        nearest += at_or_above
        nearest -= 1
        return nearest.astype(np.int64, copy=False)

    def to_values(self, symbols: np.ndarray) -> np.ndarray:
        """Symbols int (...) -> float64 values (...), at most half a bin (1/255 for 256) from what was encoded.

        Raises `ActionDecodeError` for a symbol outside 0 .. bins - 1.
        """
        symbols = np.asarray(symbols)
        if symbols.dtype.kind not in "iu":
            raise ActionDecodeError(
                f"got symbols of dtype {symbols.dtype}; expected integers; fix: pass what `encode` answered"
            )
        if symbols.size and not (0 <= symbols.min() and symbols.max() < self.bins):
            raise ActionDecodeError(
                f"got symbols {symbols.min()} .. {symbols.max()}; expected 0 .. {self.bins - 1}; "
                "fix: map model ids to symbols with the placement first and leave out rows that are not ok"
            )
        # The last symbol of `centres`, +1 itself, shares the last centre.
        return (self.centres if self.mode == "centres" else self.edges).take(symbols, mode="clip")

    def save(self, folder: Path) -> None:
        """Write scheme.json."""
        settings = {"bins": self.bins, "low": self.low, "high": self.high, "mode": self.mode}
        write_json(folder / FILE, {"scheme": "uniform", **settings})

    @classmethod
    def load(cls, folder: Path) -> Self:
        """From a folder that `save` wrote."""
        data = read_scheme(folder)
        low, high = (field_of(data, name, float, folder) for name in ("low", "high"))
        return cls(field_of(data, "bins", int, folder), low, high, field_of(data, "mode", str, folder))  # pyright: ignore[reportArgumentType]
