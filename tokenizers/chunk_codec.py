"""Action chunks ⇄ model ids: a scheme, its placement in a vocabulary, and the shape of a chunk."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from vla.tokenizers.placement import Placement
from vla.tokenizers.protocol import ActionEncodeError, ActionTokenizer
from vla.types import ActionDecodeError, problem


@dataclass(frozen=True)
class ActionCodec:
    """Token order is row-major: (step 0, dimension 0), (step 0, dimension 1), ..."""

    tokenizer: ActionTokenizer
    placement: Placement
    horizon: int
    dim: int
    _first_id: int = field(init=False, repr=False, compare=False)
    _value_of: np.ndarray = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.horizon < 1 or self.dim < 1:
            raise problem(f"horizon {self.horizon}, dim {self.dim}", "both at least 1", "check the action spec")
        if self.tokenizer.vocab_size != self.placement.n_symbols:
            raise problem(
                f"a placement of {self.placement.n_symbols} ids for a tokenizer of {self.tokenizer.vocab_size} symbols",
                "one id per symbol",
                "make the placement with n=tokenizer.vocab_size",
            )
        # Decoding is one look-up: id -> value, NaN for every id that is no action id, and for all beyond either end.
        ids = np.asarray(self.placement.ids)
        first_id = int(ids.min()) - 1
        value_of = np.full(ids.max() - first_id + 2, np.nan, np.float32)
        value_of[ids - first_id] = self.tokenizer.decode(np.arange(ids.size))
        value_of.setflags(write=False)
        object.__setattr__(self, "_first_id", first_id)
        object.__setattr__(self, "_value_of", value_of)

    @property
    def n_tokens(self) -> int:
        """Tokens of one chunk."""
        return self.horizon * self.tokenizer.n_tokens_per_action(self.dim)

    def legal_ids(self, position: int) -> np.ndarray:
        """int64 ids, ascending, that may stand at token `position` (0 .. n_tokens - 1) of a chunk."""
        if not 0 <= position < self.n_tokens:
            raise IndexError(f"position {position} is outside a chunk of {self.n_tokens} tokens")
        return self.placement.legal_ids(position)

    def encode(self, actions: np.ndarray) -> np.ndarray:
        """Normalised actions (B, H, D) -> int64 model ids (B, T). `ActionEncodeError` for NaN or a wrong shape."""
        actions = np.asarray(actions)
        if actions.ndim != 3 or actions.shape[1:] != (self.horizon, self.dim):
            raise ActionEncodeError(
                f"got actions of shape {actions.shape}; expected (B, {self.horizon}, {self.dim}); "
                "fix: chunk and batch the actions first, or correct horizon and dim in the action spec"
            )
        symbols = self.tokenizer.encode(actions)
        return self.placement.encode(symbols.reshape(len(actions), self.n_tokens))

    def decode(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Model ids (B, T) -> (float32 normalised actions (B, H, D), bool ok (B,)).

        A row with any id that is no action id is NaN and not ok; the caller counts such rows and must not execute them.
        Rows that ended early are padded with -1 by the caller. `ActionDecodeError` if T is not `n_tokens`.
        """
        ids = np.asarray(ids)
        if ids.ndim != 2 or ids.shape[1] != self.n_tokens or ids.dtype.kind not in "iu":
            raise ActionDecodeError(
                f"got ids of shape {ids.shape} and dtype {ids.dtype}; expected integers (B, {self.n_tokens}); "
                "fix: pass the generated tokens only, one chunk per row, short rows padded with -1"
            )
        actions = self._value_of.take(ids.astype(np.int64, copy=False) - self._first_id, mode="clip")  # (B, T)
        if not np.isnan(actions.sum()):
            return actions.reshape(len(ids), self.horizon, self.dim), np.ones(len(ids), bool)
        ok = np.asarray(~np.isnan(actions).any(axis=1))
        actions[~ok] = np.nan
        return actions.reshape(len(ids), self.horizon, self.dim), ok
