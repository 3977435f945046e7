"""A scheme whose rows differ in length, as small as one can be: values, then a mark that the rest are like the last."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np

from vla.files import write_json
from vla.tokenizers.protocol import PAD
from vla.tokenizers.rows import finite_chunks, padded
from vla.tokenizers.schemes import FILE, field_of, read_scheme
from vla.tokenizers.uniform import UniformTokenizer

WHERE = "toy_scheme:ToyTokenizer"


@dataclass(frozen=True)
class ToyTokenizer:
    levels: int = 16

    @property
    def values(self) -> UniformTokenizer:
        return UniformTokenizer(self.levels, mode="edges")

    @property
    def vocab_size(self) -> int:
        return self.levels + 1

    @property
    def bound(self) -> float:
        return self.values.bound

    def fit(self, chunks: np.ndarray) -> Self:
        return self

    def encode(self, chunks: np.ndarray) -> np.ndarray:
        rows = []
        for row in self.values.encode(finite_chunks(chunks)).tolist():
            n = len(row)
            while n > 1 and row[n - 1] == row[n - 2]:
                n -= 1
            rows.append(row[:n] + [self.levels] * (n < len(row)))
        return padded(rows)

    def decode(self, symbols: np.ndarray, horizon: int, dim: int) -> tuple[np.ndarray, np.ndarray]:
        n, grammar = horizon * dim, self.grammar(horizon, dim)
        whole, ok = np.zeros((len(symbols), n), np.int64), np.zeros(len(symbols), bool)
        for i, row in enumerate(symbols.tolist()):
            state, values = 0, []
            for k, symbol in enumerate(row):
                if symbol not in grammar.legal(state):
                    ok[i] = not len(grammar.legal(state)) and set(row[k:]) == {PAD}
                    break
                values.append(symbol)
                state = grammar.advance(state, symbol)
            else:
                ok[i] = not len(grammar.legal(state))
            if ok[i]:
                values = [v for v in values if v < self.levels]
                whole[i] = values + values[-1:] * (n - len(values))
        actions = self.values.decode(whole, horizon, dim)[0]
        actions[~ok] = np.nan
        return actions, ok

    def grammar(self, horizon: int, dim: int) -> ToyGrammar:
        return ToyGrammar(self.levels, horizon * dim)

    def save(self, folder: Path) -> None:
        write_json(folder / FILE, {"scheme": "toy", "levels": self.levels})

    @classmethod
    def load(cls, folder: Path) -> Self:
        return cls(field_of(read_scheme(folder), "levels", int, folder))


@dataclass(frozen=True)
class ToyGrammar:
    """The state is the number of values so far, and -1 after the mark."""

    levels: int
    max_tokens: int
    start: int = 0

    def legal(self, state: int) -> np.ndarray:
        done = state in (-1, self.max_tokens)
        return np.arange(0 if done else self.levels + (state > 0))

    def advance(self, state: int, symbol: int) -> int:
        return -1 if symbol == self.levels else state + 1
