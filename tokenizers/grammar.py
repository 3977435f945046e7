"""The grammar of rows of fixed length, and any grammar in a model's ids. See `vla.tokenizers.protocol.Grammar`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from vla.tokenizers.placement import Placement
from vla.tokenizers.protocol import PAD, Grammar
from vla.types import problem


class OnePerDimension:
    """Mark of grammars whose rows have one token per dimension, row-major: token t is dimension t % D of action t // D.
    Each action can then be masked, weighted and scored alone."""


@dataclass(frozen=True)
class FixedGrammar:
    """Rows of exactly `n_tokens`, every symbol legal at every place. The state is the number of tokens so far."""

    n_tokens: int
    vocab_size: int
    per_dimension: bool = False
    """As `OnePerDimension`."""
    start: int = field(init=False, default=0)
    _all: np.ndarray = field(init=False, repr=False, compare=False)
    _none: np.ndarray = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.n_tokens < 1 or self.vocab_size < 1:
            raise problem(f"{self.n_tokens} tokens of {self.vocab_size} symbols", "at least 1 of each",
                          "check the tokenizer's settings")  # fmt: skip
        for name, n in (("_all", self.vocab_size), ("_none", 0)):
            symbols = np.arange(n, dtype=np.int64)
            symbols.setflags(write=False)
            object.__setattr__(self, name, symbols)

    @property
    def max_tokens(self) -> int:
        """T, the same for every row."""
        return self.n_tokens

    def legal(self, state: int) -> np.ndarray:
        return self._all if state < self.n_tokens else self._none

    def advance(self, state: int, symbol: int) -> int:
        return state + 1


class IdGrammar:
    """A scheme's grammar over the ids of a model. The legal ids of a state are looked up once and kept.

    Ids are spoken of by *column*: their index in `ids`, all action ids in ascending order.
    """

    def __init__(self, grammar: Grammar, placement: Placement) -> None:
        self.grammar = grammar
        self.ids = placement.legal_ids(0)
        """int64 (n,), ascending."""
        self.start, self.max_tokens = grammar.start, grammar.max_tokens
        self.free = isinstance(grammar, FixedGrammar)
        """Every row has `max_tokens` ids, and any action id may stand at each place: there is nothing to look up."""
        fixed = isinstance(grammar, FixedGrammar) and grammar.per_dimension
        self.per_dimension = fixed or isinstance(grammar, OnePerDimension)
        """One token per dimension, row-major."""
        self._symbols = placement.decode(self.ids[None])[0][0]
        self._columns = np.argsort(self._symbols)
        self._masks: dict[int, np.ndarray] = {}

    def mask(self, state: int) -> np.ndarray:
        """bool (n,): the columns that may come next; none of them if the row is complete."""
        found = self._masks.get(state)
        if found is None:
            found = np.zeros(len(self.ids), bool)
            found[self._columns[self.grammar.legal(state)]] = True
            found.setflags(write=False)
            self._masks[state] = found
        return found

    def complete(self, state: int) -> bool:
        """Whether a row that got here is whole."""
        return not self.mask(state).any()

    def advance(self, state: int, column: int) -> int:
        """The state after a legal column."""
        return self.grammar.advance(state, int(self._symbols[column]))

    def row_masks(self, ids: np.ndarray) -> np.ndarray:
        """The columns that were legal at each place of complete rows: ids (B, T), padded with -1 -> bool (B, T, n).

        All columns are True at padded places. ValueError for a row that the grammar does not allow.
        """
        columns = np.searchsorted(self.ids, ids)
        masks = np.ones((*ids.shape, len(self.ids)), bool)
        if self.free:
            return masks
        for i, row in enumerate(ids):
            state = self.start
            for t, id_ in enumerate(row[: int((row != PAD).sum())]):
                legal, column = self.mask(state), min(int(columns[i, t]), len(self.ids) - 1)
                if self.ids[column] != id_ or not legal[column]:
                    raise ValueError(f"row {i}: id {id_} at place {t} is not legal there")
                masks[i, t] = legal
                state = self.advance(state, column)
            if not self.complete(state):
                raise ValueError(f"row {i} ends before it is complete")
        return masks


def free_grammar(ids: Sequence[int], n_tokens: int) -> IdGrammar:
    """Rows of exactly `n_tokens`, each of them any of `ids`."""
    ids = [int(i) for i in ids]
    return IdGrammar(FixedGrammar(n_tokens, len(ids)), Placement.reserved(ids, model_vocab_size=max(ids) + 1))
