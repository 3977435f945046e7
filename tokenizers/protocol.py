"""What every action-tokenization scheme offers, whatever it does inside.

A scheme turns chunks of normalised actions into *symbols*, the integers 0 .. vocab_size - 1. Which ids of a model's
vocabulary stand for those symbols is decided elsewhere (`vla.tokenizers.placement`), so one scheme serves every backbone.

Rows of symbols may differ in length: a batch is int64 (B, T), each row padded at its end with `PAD` to the longest. A
scheme's `Grammar` says which symbols may follow a prefix, and when a row is complete, so that constrained decoding can
only produce rows that decode.
"""

from __future__ import annotations

from pathlib import Path
from typing import Protocol, Self

import numpy as np

from vla.types import VlaError

PAD = -1
"""Fills rows of symbols and of ids beyond their end."""


class ActionEncodeError(VlaError, ValueError):
    """Actions that have no symbols: NaN, infinite, of a wrong shape, or not numbers."""


class Grammar(Protocol):
    """The symbols that may stand at each place of a row. A state is an integer; every row starts in `start`."""

    @property
    def start(self) -> int: ...

    @property
    def max_tokens(self) -> int:
        """T of the longest complete row."""
        ...

    def legal(self, state: int) -> np.ndarray:
        """int64 symbols, ascending, that may come next; empty when the row is complete. From every state that can be
        reached by legal symbols a complete row can be reached."""
        ...

    def advance(self, state: int, symbol: int) -> int:
        """The state after a legal symbol."""
        ...


class ActionTokenizer(Protocol):
    """One scheme, for chunks of `horizon` (H) actions of `dim` (D) numbers. Stateless after `fit`: rows are independent,
    order and padding of a batch change nothing."""

    @property
    def vocab_size(self) -> int:
        """Number of symbols."""
        ...

    def fit(self, chunks: np.ndarray) -> Self:
        """Learn from normalised chunks float (N, H, D) and return the fitted tokenizer; itself where nothing is learned."""
        ...

    def encode(self, chunks: np.ndarray) -> np.ndarray:
        """Normalised actions float (B, H, D) -> int64 symbols (B, T), padded with PAD. `ActionEncodeError` for NaN or
        infinity."""
        ...

    def decode(self, symbols: np.ndarray, horizon: int, dim: int) -> tuple[np.ndarray, np.ndarray]:
        """Symbols (B, T), padded with PAD -> (float32 normalised actions (B, H, D), bool ok (B,)).

        A row that is not the encoding of a chunk of that shape is NaN and not ok; nothing is repaired."""
        ...

    def grammar(self, horizon: int, dim: int) -> Grammar:
        """Which rows encode a chunk of that shape."""
        ...

    def save(self, folder: Path) -> None:
        """Write `scheme.json` ({"scheme": name, ...}) and whatever else belongs to it into an existing folder; nothing
        is pickled. `vla.tokenizers.schemes.load_tokenizer(folder)` reads it back."""
        ...

    @classmethod
    def load(cls, folder: Path) -> Self:
        """From a folder that `save` wrote. VlaError naming the file and the field if anything is missing or wrong."""
        ...
