"""Action chunks ⇄ model ids: a scheme, its placement in a vocabulary, and the shape of a chunk."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from vla.tokenizers.grammar import IdGrammar
from vla.tokenizers.placement import Placement
from vla.tokenizers.protocol import PAD, ActionEncodeError, ActionTokenizer
from vla.tokenizers.uniform import UniformTokenizer
from vla.types import ActionDecodeError, problem


@dataclass(frozen=True)
class ActionCodec:
    """Rows of ids may differ in length: a batch is int64 (B, T), each row padded at its end with -1 to the longest."""

    tokenizer: ActionTokenizer
    placement: Placement
    horizon: int
    dim: int
    grammar: IdGrammar = field(init=False, repr=False, compare=False)
    """Which rows of ids encode a chunk."""
    _first_id: int = field(init=False, repr=False, compare=False)
    _value_of: np.ndarray | None = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.horizon < 1 or self.dim < 1:
            raise problem(f"horizon {self.horizon}, dim {self.dim}", "both at least 1", "check the action spec")
        if self.tokenizer.vocab_size != self.placement.n_symbols:
            raise problem(
                f"a placement of {self.placement.n_symbols} ids for a tokenizer of {self.tokenizer.vocab_size} symbols",
                "one id per symbol",
                "make the placement with n=tokenizer.vocab_size",
            )
        grammar = IdGrammar(self.tokenizer.grammar(self.horizon, self.dim), self.placement)
        first_id, value_of = 0, None
        if isinstance(self.tokenizer, UniformTokenizer):
            # Decoding is one look-up: id -> value, NaN for every id that is no action id, and for all beyond either end.
            ids = np.asarray(self.placement.ids)
            first_id = int(ids.min()) - 1
            value_of = np.full(ids.max() - first_id + 2, np.nan, np.float32)
            value_of[ids - first_id] = self.tokenizer.to_values(np.arange(ids.size))
            value_of.setflags(write=False)
        for name, value in (("grammar", grammar), ("_first_id", first_id), ("_value_of", value_of)):
            object.__setattr__(self, name, value)

    @property
    def max_tokens(self) -> int:
        """Tokens of the longest chunk; of every chunk, where a scheme has rows of fixed length."""
        return self.grammar.max_tokens

    @property
    def legal_ids(self) -> np.ndarray:
        """int64 (n_symbols,), ascending: the ids that may stand anywhere. `grammar` says which of them where."""
        return self.grammar.ids

    @property
    def per_dimension(self) -> bool:
        """One token per dimension, row-major: (step 0, dimension 0), (step 0, dimension 1), ..."""
        return self.grammar.per_dimension

    def encode(self, actions: np.ndarray) -> np.ndarray:
        """Normalised actions (B, H, D) -> int64 model ids (B, T), padded with -1.

        `ActionEncodeError` for NaN or a wrong shape.
        """
        actions = np.asarray(actions)
        if actions.ndim != 3 or actions.shape[1:] != (self.horizon, self.dim):
            raise ActionEncodeError(
                f"got actions of shape {actions.shape}; expected (B, {self.horizon}, {self.dim}); "
                "fix: chunk and batch the actions first, or correct horizon and dim in the action spec"
            )
        symbols = self.tokenizer.encode(actions)
        if self.grammar.free:
            return self.placement.encode(symbols)
        padded = symbols == PAD
        return np.where(padded, PAD, self.placement.encode(np.where(padded, 0, symbols)))

    def decode(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Model ids (B, T), padded with -1 -> (float32 normalised actions (B, H, D), bool ok (B,)).

        A row that is not the encoding of a chunk is NaN and not ok, first of all one with an id that is no action id;
        the caller counts such rows and must not execute them. `ActionDecodeError` if `ids` are not integers (B, T), or
        where all rows have one length and T is another.
        """
        ids = np.asarray(ids)
        fits = ids.ndim == 2 and (ids.shape[1] == self.max_tokens or not self.grammar.free)
        if not fits or ids.dtype.kind not in "iu":
            expected = self.max_tokens if self.grammar.free else "T"
            raise ActionDecodeError(
                f"got ids of shape {ids.shape} and dtype {ids.dtype}; expected integers (B, {expected}); "
                "fix: pass the generated tokens only, one chunk per row, short rows padded with -1"
            )
        if self._value_of is not None:
            return self._look_up(ids, self._value_of)
        padded = ids == PAD
        symbols = self.placement.decode(ids)[0]
        wrong = ((symbols < 0) & ~padded).any(axis=1) | (padded[:, :-1] & ~padded[:, 1:]).any(axis=1)
        symbols[wrong] = PAD
        actions, ok = self.tokenizer.decode(symbols, self.horizon, self.dim)
        ok = ok & ~wrong
        actions[~ok] = np.nan
        return actions, ok

    def token_mask(self, ids: np.ndarray, steps: np.ndarray) -> np.ndarray:
        """Which tokens stand for some actions of a chunk: ids (B, T), bool steps (B, H) -> bool (B, T).

        With one token per dimension, those of the chosen steps. Any other scheme encodes a chunk as a whole: then all
        tokens of a row with a chosen step, and never its padding.
        """
        if self.per_dimension:
            return np.repeat(np.asarray(steps), self.dim, axis=1)
        return (np.asarray(ids) != PAD) & np.asarray(steps).any(axis=1, keepdims=True)

    def _look_up(self, ids: np.ndarray, value_of: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        actions = value_of.take(ids.astype(np.int64, copy=False) - self._first_id, mode="clip")  # (B, T)
        if not np.isnan(actions.sum()):
            return actions.reshape(len(ids), self.horizon, self.dim), np.ones(len(ids), bool)
        ok = np.asarray(~np.isnan(actions).any(axis=1))
        actions[~ok] = np.nan
        return actions.reshape(len(ids), self.horizon, self.dim), ok
