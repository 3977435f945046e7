"""What every action-tokenization scheme offers, whatever it does inside.

A scheme turns normalised actions into *symbols*, the integers 0 .. vocab_size - 1. Which ids of a model's vocabulary
stand for those symbols is decided elsewhere (`vla.tokenizers.placement`), so one scheme serves every backbone.
"""

from __future__ import annotations

from typing import Any, Protocol, Self

import numpy as np

from vla.types import VlaError


class ActionEncodeError(VlaError, ValueError):
    """Actions that have no symbols: NaN, infinite, or not numbers."""


class ActionTokenizer(Protocol):
    """One token per action dimension. Stateless after `fit`: rows are independent and batching changes nothing."""

    @property
    def vocab_size(self) -> int:
        """Number of symbols."""
        ...

    def n_tokens_per_action(self, dim: int) -> int:
        """Tokens that one action of `dim` dimensions becomes."""
        ...

    def fit(self, actions: np.ndarray) -> Self:
        """Learn from normalised actions float (..., D) and return the fitted tokenizer."""
        ...

    def encode(self, actions: np.ndarray) -> np.ndarray:
        """Normalised actions float (..., D) -> int64 symbols (..., D). `ActionEncodeError` for NaN or infinity."""
        ...

    def decode(self, symbols: np.ndarray) -> np.ndarray:
        """Symbols (..., D) -> float64 normalised actions (..., D). `ActionDecodeError` for anything not a symbol."""
        ...

    def save(self) -> dict[str, Any]:
        """Everything `load` needs, as JSON."""
        ...

    @classmethod
    def load(cls, data: dict[str, Any]) -> Self: ...
