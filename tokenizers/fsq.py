"""Finite scalar quantisation of chunks (Mentzer et al. 2023, arXiv 2309.15505), as QueST's skill tokens.

Every token is a few numbers, each squeezed by tanh and rounded to one of its `levels`; the grid of their values is the
codebook, of which nothing is learned and no code is lost. QueST's levels (8, 5, 5, 5) make 1000 symbols.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from vla.tokenizers.learned import LearnedCodec
from vla.types import problem

MARGIN = 1e-3
"""tanh is stretched by this much, so that the outermost levels can be reached (the paper's eps)."""


@dataclass(frozen=True, eq=False)
class FsqTokenizer(LearnedCodec):
    """`tokens` symbols a chunk."""

    name: ClassVar[str] = "fsq"
    whiten: ClassVar[bool] = True

    levels: tuple[int, ...] = (8, 5, 5, 5)
    tokens: int = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        whole = all(isinstance(level, int) and level >= 2 for level in self.levels)
        if not self.levels or not whole or self.tokens < 1:
            raise problem(f"levels {self.levels}, {self.tokens} tokens", "levels of at least 2 and at least 1 token",
                          "check the tokenizer's settings")  # fmt: skip

    @property
    def vocab_size(self) -> int:
        """Points of the grid."""
        return int(np.prod(self.levels))

    @property
    def n_tokens(self) -> int:
        return self.tokens

    @property
    def n_latents(self) -> int:
        return self.tokens * len(self.levels)

    def candidates(self, latents: np.ndarray) -> np.ndarray:
        """Every number rounded to the nearest level, and the neighbours of that code."""
        half, offset, shift = squeeze_constants(self.levels)
        numbers = latents.reshape(len(latents), self.tokens, len(self.levels)).astype(np.float64)
        rounded = np.rint(np.tanh(numbers + shift) * half - offset)
        return self.neighbours(((rounded + np.array(self.levels) // 2) @ self._basis).astype(np.int64))

    def neighbours(self, symbols: np.ndarray) -> np.ndarray:
        """Each, and all codes with one of its numbers a level higher or lower; beyond the last comes the first."""
        one = np.eye(self.n_latents, dtype=np.int64)
        steps = np.concatenate([0 * one[:1], -one, one]).reshape(-1, self.tokens, len(self.levels))
        return (self._digits(symbols)[:, None] + steps) % np.array(self.levels) @ self._basis

    def dequantise(self, symbols: np.ndarray) -> np.ndarray:
        widths = np.array(self.levels) // 2
        numbers = ((self._digits(symbols) - widths) / widths).astype(np.float32)
        return numbers.reshape(*symbols.shape[:-1], self.n_latents)

    def _digits(self, symbols: np.ndarray) -> np.ndarray:
        """Symbols (..., tokens) -> int64 (..., tokens, numbers), each from 0."""
        return symbols[..., None] // self._basis % np.array(self.levels)

    def trainable(self, latents: Any) -> Any:
        from vla.tokenizers.fsq_training import ScalarGrid

        return ScalarGrid(self.levels, squeeze_constants(self.levels))

    @property
    def _basis(self) -> np.ndarray:
        return np.cumprod([1, *self.levels[:-1]])


def squeeze_constants(levels: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(half range, offset, shift), float64 (n,) each: tanh(x + shift) * half - offset rounds to one of the levels
    -(L // 2) .. (L - 1) // 2, and is 0 at x = 0."""
    half = (np.array(levels) - 1) * (1 + MARGIN) / 2
    offset = np.where(np.array(levels) % 2 == 0, 0.5, 0.0)
    return half, offset, np.arctanh(offset / half)
