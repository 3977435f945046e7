"""Integers as text: the actions of VLA-0 (arXiv 2510.13054), written in the model's own digits.

VLA-0 maps [-1, 1] to the integers 0 .. 1000 (half to even) and writes a chunk row-major, separated by single spaces. No
token is added to the vocabulary: the symbols here are characters, and `character_ids` finds the tokens that a model's
tokenizer has for them.

A row is the characters and then a newline: without a mark for its end, "1" could be the last number or the start of
"10". VLA-0 marks it with the model's end of text.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np

from vla.files import write_json
from vla.tokenizers.rows import finite_chunks, padded, whole_rows
from vla.tokenizers.schemes import FILE, field_of, read_scheme
from vla.types import problem

CHARACTERS = "0123456789 \n"
"""Symbol -> character."""
SPACE, END = 10, 11
SPELLINGS = {" ": ("\u2581", "\u0120", " "), "\n": ("\n", "<0x0A>", "\u010a")}
"""Character -> how vocabularies write it: SentencePiece, bytes as GPT-2 (each space as \u0120), plain; a newline plain, as
a byte of SentencePiece, as GPT-2."""


@dataclass(frozen=True)
class IntegerTextTokenizer:
    """Rows of different lengths."""

    highest: int = 1000
    """The integer that stands for +1; 0 stands for -1."""

    def __post_init__(self) -> None:
        if self.highest < 1:
            raise problem(f"highest={self.highest}", "at least 1", "check the tokenizer's settings")

    @property
    def vocab_size(self) -> int:
        """Ten digits, the space and the newline."""
        return len(CHARACTERS)

    @property
    def bound(self) -> float:
        """Largest error of a value inside [-1, 1], apart from float32 rounding."""
        return 1 / self.highest

    def fit(self, chunks: np.ndarray) -> Self:
        """Nothing is learned; checks that `chunks` could be encoded."""
        finite_chunks(chunks)
        return self

    def to_integers(self, chunks: np.ndarray) -> np.ndarray:
        """Normalised actions (B, H, D), clipped to [-1, 1] -> int64 (B, H, D) in 0 .. highest.

        The arithmetic is VLA-0's in the dtype of `chunks`: float32 chunks give its integers where its statistics are
        -1 and 1. `ActionEncodeError` for NaN or infinity."""
        values = finite_chunks(chunks)
        unit = (values.clip(-1, 1) - values.dtype.type(-1)) / values.dtype.type(2)
        return np.around(unit * values.dtype.type(self.highest)).astype(np.int64)

    def text(self, chunks: np.ndarray) -> list[str]:
        """Normalised actions (B, H, D) -> B texts such as "500 0 1000", the same as VLA-0's."""
        integers = self.to_integers(chunks)
        rows = integers.reshape(len(integers), integers.shape[1] * integers.shape[2])
        return [" ".join(map(str, row)) for row in rows.tolist()]

    def parse(self, texts: Sequence[str], horizon: int, dim: int) -> tuple[np.ndarray, np.ndarray, list[str | None]]:
        """Texts a model wrote -> (float32 normalised actions (B, H, D), bool ok (B,), what is wrong or None).

        Space around a text is left out, as VLA-0 does. Anything else that is not H * D integers 0 .. highest makes the
        row NaN; VLA-0 cuts rows that are too long, repeats the last action of those too short, and answers the middle
        of the range for the rest.
        """
        n = horizon * dim
        values, errors = np.full((len(texts), n), np.nan, np.float32), []
        for i, text in enumerate(texts):
            error, words = None, text.strip().split(" ")
            wrong = next((k for k, word in enumerate(words) if not re.fullmatch("0|[1-9][0-9]*", word, re.ASCII)), None)
            if wrong is not None:
                error = f"number {wrong + 1} is {words[wrong]!r}, not an integer"
            elif len(words) != n:
                error = f"{len(words)} numbers, not {horizon} x {dim} = {n}"
            else:
                high = next((k for k, word in enumerate(words) if len(word) > 18 or int(word) > self.highest), None)
                if high is not None:
                    error = f"number {high + 1} is {words[high]}, above {self.highest}"
            if error is None:
                values[i] = self._values(np.array(words, np.int64))
            errors.append(error)
        ok = np.array([error is None for error in errors], bool)
        return values.reshape(-1, horizon, dim), ok, errors

    def encode(self, chunks: np.ndarray) -> np.ndarray:
        """Normalised actions (B, H, D) -> int64 symbols (B, T), padded with PAD: `text` and the newline."""
        symbol_of = {character: i for i, character in enumerate(CHARACTERS)}
        return padded([[symbol_of[character] for character in text] + [END] for text in self.text(chunks)])

    def decode(self, symbols: np.ndarray, horizon: int, dim: int) -> tuple[np.ndarray, np.ndarray]:
        """Symbols (B, T) -> (float32 normalised actions (B, H, D), bool ok (B,)). Only what `encode` could have written
        is ok; `parse` takes a model's free text and says what is wrong."""
        symbols, lengths, ok = whole_rows(symbols, self.vocab_size)
        texts = []
        for row, length, good in zip(symbols.tolist(), lengths.tolist(), ok.tolist(), strict=True):
            text = "".join(CHARACTERS[s] for s in row[:length]) if good else ""
            texts.append(text[:-1] if text.endswith("\n") and text[:-1] == text.strip() else "")
        actions, ok, _ = self.parse(texts, horizon, dim)
        return actions, ok

    def grammar(self, horizon: int, dim: int) -> IntegerGrammar:
        """horizon * dim integers 0 .. highest without leading zeros, separated by spaces, ended by a newline."""
        n = horizon * dim
        return IntegerGrammar(n, self.highest, n * (len(str(self.highest)) + 1))

    def save(self, folder: Path) -> None:
        """Write scheme.json."""
        write_json(folder / FILE, {"scheme": "integer_text", "highest": self.highest})

    @classmethod
    def load(cls, folder: Path) -> Self:
        """From a folder that `save` wrote."""
        return cls(field_of(read_scheme(folder), "highest", int, folder))

    def _values(self, integers: np.ndarray) -> np.ndarray:
        """Integers (...) -> float32 (...), VLA-0's inverse in its float32 arithmetic."""
        return integers.astype(np.float32) / np.float32(self.highest) * np.float32(2) + np.float32(-1)


@dataclass(frozen=True)
class IntegerGrammar:
    """State: numbers finished * (highest + 2) + what stands of the next, plus 1 (0: nothing yet)."""

    n_numbers: int
    highest: int
    max_tokens: int
    start: int = 0

    def legal(self, state: int) -> np.ndarray:
        finished, value = divmod(state, self.highest + 2)
        value -= 1
        if finished == self.n_numbers:
            return np.zeros(0, np.int64)
        base = 10 * max(value, 0)
        digits = [] if value == 0 else [d for d in range(10) if base + d <= self.highest]
        separator = [] if value < 0 else [END if finished == self.n_numbers - 1 else SPACE]
        return np.array(digits + separator, np.int64)

    def advance(self, state: int, symbol: int) -> int:
        finished, value = divmod(state, self.highest + 2)
        if symbol in (SPACE, END):
            return (finished + 1) * (self.highest + 2)
        return finished * (self.highest + 2) + 10 * max(value - 1, 0) + symbol + 1


def character_ids(vocabulary: Mapping[str, int]) -> list[int]:
    """The model's ids of the symbols, for `Placement.reserved`: its tokens of a single character.

    Text with numbers may be cut differently (numbers of several digits are one token in many vocabularies; Qwen's and
    Llama-2's write digits one by one): actions are ids from end to end, and never go through text.

    Args:
        vocabulary: token -> id, as `tokenizer.get_vocab()` of Hugging Face gives it.

    Raises:
        VlaError: characters without a token of their own.
    """
    found = {c: next((vocabulary[s] for s in SPELLINGS.get(c, (c,)) if s in vocabulary), None) for c in CHARACTERS}
    missing = [character for character, id_ in found.items() if id_ is None]
    if missing:
        raise problem(f"no single token for {', '.join(map(repr, missing))}",
                      "a token for each digit, the space and the newline",
                      "use a model whose tokenizer has them, or another action-token scheme or placement")  # fmt: skip
    return [id_ for id_ in found.values() if id_ is not None]
