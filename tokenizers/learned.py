"""What the learned codecs share: a small network on each side of a quantiser, trained here with torch, used with numpy.

The chunk, flattened, goes through three linear layers with ReLU between them to the latents; the quantiser turns these into
symbols; three layers lead back. Weights are a few hundred kilobytes, kept as safetensors beside scheme.json: whoever has
the policy has the decoder.

A learned codec promises less than the others. There is no bound on the error: `rms_error` and `max_error` are those on the
data it was fitted to, and chunks unlike those can be far worse. And encode(decode(s)) need not be s: the decoded chunk is a
new chunk, which may lie nearer to other codes.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np

from vla.files import write_bytes, write_json
from vla.tokenizers.grammar import FixedGrammar
from vla.tokenizers.rows import finite_chunks, whole_rows
from vla.tokenizers.schemes import FILE, field_of, read_scheme
from vla.types import ActionDecodeError, VlaError, problem

WEIGHTS_FILE = "weights.safetensors"
Progress = Callable[[int, int, float], None]
"""Called with (steps done, steps in all, loss)."""


@dataclass(frozen=True, eq=False)
class LearnedCodec(ABC):
    """Unfitted until `fit` or `load`. Rows have a fixed length, `n_tokens`."""

    name: ClassVar[str]

    hidden: int = 256
    """Width of the hidden layers."""
    steps: int = 3000
    batch: int = 256
    learning_rate: float = 1e-3
    """Adam's; falls to 0 along a cosine."""
    seed: int = 0
    """Same seed, data, machine and number of threads: same weights."""
    horizon: int = 0
    """H of the data; 0 while unfitted. So `dim`."""
    dim: int = 0
    rms_error: float = 0.0
    """Of the actions in the data it was fitted to; so `max_error`."""
    max_error: float = 0.0
    weights: dict[str, np.ndarray] = field(default_factory=dict, repr=False)
    """float32: {encoder,decoder}.{0,1,2}.{weight,bias}, weights (inputs, outputs), and the quantiser's own."""

    def __post_init__(self) -> None:
        if min(self.hidden, self.steps, self.batch) < 1 or not 0 < self.learning_rate < 1 or self.seed < 0:
            got = f"hidden={self.hidden}, steps={self.steps}, batch={self.batch}, learning_rate={self.learning_rate}"
            raise problem(got, "sizes of at least 1 and a rate in (0, 1)", "check the tokenizer's settings")

    @property
    @abstractmethod
    def vocab_size(self) -> int:
        """Number of symbols."""

    @property
    @abstractmethod
    def n_tokens(self) -> int:
        """Symbols of a chunk."""

    @property
    @abstractmethod
    def n_latents(self) -> int:
        """Numbers between the networks."""

    @abstractmethod
    def quantise(self, latents: np.ndarray) -> np.ndarray:
        """float32 (B, n_latents) -> int64 symbols (B, n_tokens). Rows are independent to the last bit."""

    @abstractmethod
    def dequantise(self, symbols: np.ndarray) -> np.ndarray:
        """int64 symbols (B, n_tokens) -> float32 (B, n_latents)."""

    @abstractmethod
    def trainable(self, latents: Any) -> Any:
        """A `learned_training.Quantiser`, from the encoder's latents of some chunks after the warm-up."""

    @property
    def warm_up(self) -> int:
        """Steps of training before the latents are quantised."""
        return 0

    def quantiser_shapes(self) -> dict[str, tuple[int, ...]]:
        """Names and shapes of the quantiser's own weights."""
        return {}

    def fit(self, chunks: np.ndarray, progress: Progress | None = None) -> Self:
        """Train on normalised chunks (N, H, D)."""
        from vla.tokenizers.learned_training import train

        data = finite_chunks(chunks).astype(np.float32)
        if not data.size:
            raise problem(f"chunks of shape {data.shape}", "at least one chunk", "give the training data's chunks")
        shaped = replace(self, horizon=data.shape[1], dim=data.shape[2], weights={})
        weights = train(
            data.reshape(len(data), -1), layer_shapes(shaped), self.trainable, steps=self.steps, batch=self.batch,
            learning_rate=self.learning_rate, seed=self.seed, warm_up=self.warm_up, progress=progress,
        )  # fmt: skip
        fitted = replace(shaped, weights=weights)
        error = fitted.decode(fitted.encode(data), *data.shape[1:])[0].astype(np.float64) - data
        return replace(fitted, rms_error=float(np.sqrt((error**2).mean())), max_error=float(np.abs(error).max()))

    def encode(self, chunks: np.ndarray) -> np.ndarray:
        """Normalised actions (B, H, D) -> int64 symbols (B, n_tokens). `ActionEncodeError` for NaN, infinity, or an H or
        D that is not the data's."""
        self._check_fitted()
        values = finite_chunks(chunks, self.horizon, self.dim).astype(np.float32)
        return self.quantise(_forward(self.weights, "encoder", values.reshape(len(values), self.horizon * self.dim)))

    def decode(self, symbols: np.ndarray, horizon: int, dim: int) -> tuple[np.ndarray, np.ndarray]:
        """Symbols (B, T) -> (float32 normalised actions (B, H, D), bool ok (B,)); rows that are no chunk are NaN."""
        self._check_fitted(horizon, dim)
        symbols, lengths, ok = whole_rows(symbols, self.vocab_size)
        ok &= lengths == self.n_tokens
        actions = np.full((len(symbols), horizon, dim), np.nan, np.float32)
        if ok.any():
            latents = self.dequantise(symbols[ok, : self.n_tokens])
            actions[ok] = _forward(self.weights, "decoder", latents).reshape(-1, horizon, dim)
        return actions, ok

    def grammar(self, horizon: int, dim: int) -> FixedGrammar:
        """Every symbol at each of n_tokens places."""
        self._check_fitted(horizon, dim)
        return FixedGrammar(self.n_tokens, self.vocab_size)

    def save(self, folder: Path) -> None:
        """Write weights.safetensors and scheme.json."""
        from safetensors.numpy import save

        self._check_fitted()
        settings = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "weights"}
        write_bytes(folder / WEIGHTS_FILE, save({name: np.ascontiguousarray(w) for name, w in self.weights.items()}))
        write_json(folder / FILE, {"scheme": self.name, **settings})

    @classmethod
    def load(cls, folder: Path) -> Self:
        """From a folder that `save` wrote."""
        from safetensors import SafetensorError
        from safetensors.numpy import load

        data, path = read_scheme(folder), folder / WEIGHTS_FILE
        defaults = cls()
        values: dict[str, Any] = {}
        for f in fields(cls):
            if f.name != "weights":
                default = getattr(defaults, f.name)
                values[f.name] = field_of(data, f.name, list if isinstance(default, tuple) else type(default), folder)
                if isinstance(default, tuple):
                    values[f.name] = tuple(values[f.name])
        try:
            weights = load(path.read_bytes())
        except (OSError, SafetensorError) as error:
            raise problem(f"{path}: {error}", "the weights of the codec", "restore the file from a copy") from error
        codec = cls(**values, weights=weights)
        wanted = {**layer_shapes(codec), **codec.quantiser_shapes()}
        for name in sorted(wanted.keys() | weights.keys()):
            found = weights.get(name)
            if found is None or found.shape != wanted.get(name) or found.dtype != np.float32:
                got = "nothing" if found is None else f"{found.dtype} {found.shape}"
                raise problem(f"{path}: {name}: {got}", f"float32 {wanted.get(name, 'no such tensor')}",
                              "restore scheme.json and the weights from the same copy")  # fmt: skip
        return codec

    def _check_fitted(self, horizon: int | None = None, dim: int | None = None) -> None:
        if not self.weights:
            raise VlaError(
                f"got a {self.name} codec that was not fitted; expected weights; fix: call fit(chunks) or load"
            )
        if (horizon or self.horizon) != self.horizon or (dim or self.dim) != self.dim:
            raise ActionDecodeError(
                f"got chunks of {horizon} x {dim}; expected {self.horizon} x {self.dim}, those of the data; fix: fit again"
            )


def layer_shapes(codec: LearnedCodec) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the two networks' weights."""
    n = codec.horizon * codec.dim
    shapes: dict[str, tuple[int, ...]] = {}
    for side, first, last in (("encoder", n, codec.n_latents), ("decoder", codec.n_latents, n)):
        for i, pair in enumerate(((first, codec.hidden), (codec.hidden, codec.hidden), (codec.hidden, last))):
            shapes[f"{side}.{i}.weight"], shapes[f"{side}.{i}.bias"] = pair, (pair[1],)
    return shapes


def _forward(weights: dict[str, np.ndarray], side: str, inputs: np.ndarray) -> np.ndarray:
    """float32 (B, n) -> float32 (B, m). One row at a time: what a row becomes must not depend on its batch, and the
    rounding of a matrix product depends on its size."""
    x = inputs[:, None]
    for i in range(3):
        x = np.matmul(x, weights[f"{side}.{i}.weight"]) + weights[f"{side}.{i}.bias"]
        if i < 2:
            x = np.maximum(x, 0)
    return x[:, 0]


@dataclass(frozen=True)
class CodeLength:
    """One line of the table of error against code length."""

    settings: str
    tokens: int
    bits: float
    """Tokens times log2 of the symbols: what a chunk costs if all symbols are equally likely."""
    rms_error: float
    """On chunks that were held out."""
    max_error: float


def code_lengths(
    codecs: Sequence[LearnedCodec], chunks: np.ndarray, held_out: np.ndarray, progress: Progress | None = None
) -> list[CodeLength]:
    """Fit each codec to `chunks` (N, H, D) and measure it on `held_out` (M, H, D)."""
    table = []
    for codec in codecs:
        fitted = codec.fit(chunks, progress)
        error = fitted.decode(fitted.encode(held_out), *held_out.shape[1:])[0].astype(np.float64) - held_out
        own = {f.name: getattr(codec, f.name) for f in fields(codec) if f.name not in _SHARED}
        bits = codec.n_tokens * float(np.log2(codec.vocab_size))
        rms, largest = float(np.sqrt((error**2).mean())), float(np.abs(error).max())
        table.append(CodeLength(f"{codec.name} {json.dumps(own)}", codec.n_tokens, bits, rms, largest))
    return table


_SHARED = {f.name for f in fields(LearnedCodec)}
