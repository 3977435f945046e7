"""Vocabulary placement: which ids of a language model stand for an action scheme's symbols.

Placements are ids from end to end. Going through text is unsafe: byte-level vocabularies do not give the same ids back,
and a Unicode normaliser or log filter may drop some of the 256 last Llama tokens.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Self

import numpy as np

from vla.types import problem

Kind = Literal["tail", "reserved", "added"]
KINDS = ("tail", "reserved", "added")


@dataclass(frozen=True)
class Placement:
    """`ids[s]` is the model's id for symbol `s`."""

    kind: Kind
    ids: tuple[int, ...]
    _ids: np.ndarray = field(init=False, repr=False, compare=False)
    _legal: np.ndarray = field(init=False, repr=False, compare=False)
    _symbol_of: np.ndarray = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise problem(f"placement kind {self.kind!r}", f"one of {', '.join(KINDS)}", "correct the name")
        ids = np.asarray(self.ids)
        integers = ids.ndim == 1 and ids.size > 0 and ids.dtype.kind in "iu"
        if not integers or ids.min() < 0 or len(set(self.ids)) != ids.size:
            expected = "a list of different ids, none negative"
            raise problem(f"placement ids {_short(self.ids)}", expected, "give one id per symbol")
        ids = ids.astype(np.int64)
        legal = np.sort(ids)
        symbol_of = np.full(legal[-1] - legal[0] + 3, -1, np.int64)  # one more at each end, for ids beyond it
        symbol_of[ids - legal[0] + 1] = np.arange(ids.size)
        for name, table in (("_ids", ids), ("_legal", legal), ("_symbol_of", symbol_of)):
            table.setflags(write=False)
            object.__setattr__(self, name, table)

    @classmethod
    def tail(
        cls,
        tokenizer_vocab_size: int,
        n: int = 256,
        *,
        model_vocab_size: int,
        tokenizer_length: int | None = None,
        special_ids: Collection[int] = (),
        skip: int = 0,
    ) -> Self:
        """The `n` last ids of the tokenizer, descending: symbol s has id tokenizer_vocab_size - 1 - skip - s.

        This is OpenVLA's placement: Llama-2's 32000 gives 31999 (lowest action) .. 31744. Embedding matrices are often
        padded (OpenVLA: 32064 rows); counting from the padded size would shift every action by 64 bins in silence.

        Args:
            tokenizer_vocab_size: `tokenizer.vocab_size`, without padding and without added tokens.
            model_vocab_size: rows of the model's embedding matrix.
            tokenizer_length: `len(tokenizer)`. Needed if the two sizes are equal, to show that nothing is padding.
            special_ids: ids the tokenizer uses for control; none may be among the action ids.
            skip: ids at the end that keep their meaning. openpi puts FAST's 2048 symbols below the 128 <seg...> tokens
                of PaliGemma (`PaligemmaTokenizer`, `fast_skip_tokens`).
        """
        if tokenizer_vocab_size > model_vocab_size:
            raise problem(
                f"tokenizer vocabulary {tokenizer_vocab_size} larger than the model's {model_vocab_size}",
                "a model with a row for every token",
                "were the two sizes swapped? The tokenizer's is usually the smaller one",
            )
        if tokenizer_length is None and tokenizer_vocab_size == model_vocab_size:
            raise problem(
                f"tokenizer vocabulary {tokenizer_vocab_size} equal to the model's",
                "the tokenizer's own size: a model's is often padded (OpenVLA: 32064 for a tokenizer of 32000), and "
                "counting from it shifts every action",
                "pass tokenizer.vocab_size, and tokenizer_length=len(tokenizer) if the two really are equal",
            )
        if tokenizer_length is not None and tokenizer_vocab_size > tokenizer_length:
            raise problem(
                f"tokenizer vocabulary {tokenizer_vocab_size}, but the tokenizer has only {tokenizer_length} tokens",
                "the tokenizer's own size, not the model's padded one",
                "pass tokenizer.vocab_size",
            )
        last = tokenizer_vocab_size - 1 - skip
        if skip < 0 or not 0 < n <= last + 1:
            got = f"{n} symbols" + (f" below {skip} skipped ids" if skip else "")
            raise problem(got, f"1 .. {tokenizer_vocab_size}, the vocabulary", "use fewer symbols, or added ids")
        ids = tuple(range(last, last - n, -1))
        return cls("tail", ids).check(model_vocab_size, special_ids)

    @classmethod
    def reserved(cls, ids: Sequence[int], *, model_vocab_size: int, special_ids: Collection[int] = ()) -> Self:
        """Ids that the vocabulary keeps free, such as PaliGemma's <loc....> or SmolVLM's <reserved_..>."""
        return cls("reserved", tuple(int(i) for i in ids)).check(model_vocab_size, special_ids)

    @classmethod
    def added(cls, first_id: int, n: int = 256, *, model_vocab_size: int, special_ids: Collection[int] = ()) -> Self:
        """Tokens appended for actions: first_id .. first_id + n - 1, ascending with the action.

        `model_vocab_size` is the size after the embedding matrix has grown.
        """
        return cls("added", tuple(range(first_id, first_id + n))).check(model_vocab_size, special_ids)

    def check(self, model_vocab_size: int, special_ids: Collection[int] = ()) -> Self:
        """Itself, if every id has an embedding row and none is a special token; `VlaError` otherwise."""
        if self._legal[-1] >= model_vocab_size:
            raise problem(
                f"action ids up to {self._legal[-1]}",
                f"ids below {model_vocab_size}, the rows of the model's embedding matrix",
                "resize the embeddings first, or place the actions elsewhere",
            )
        collisions = sorted(set(self.ids) & set(special_ids))
        if collisions:
            raise problem(
                f"action ids that are special tokens: {_short(collisions)}",
                "ids with no other meaning",
                "count the tail from tokenizer.vocab_size (special tokens excluded), or use reserved or added ids",
            )
        return self

    @property
    def n_symbols(self) -> int:
        return len(self.ids)

    def encode(self, symbols: np.ndarray) -> np.ndarray:
        """Symbols (...) in 0 .. n_symbols - 1 -> int64 model ids (...). IndexError for anything else."""
        symbols = np.asarray(symbols)
        if symbols.size and symbols.min() < 0:
            raise IndexError(f"symbol {symbols.min()} is negative")
        return self._ids[symbols]

    def decode(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Model ids int (..., T) -> (int64 symbols (..., T), bool ok (...)).

        An id that is no action id becomes symbol -1 and makes its row not ok. It is never moved to the nearest one.
        """
        offset = np.asarray(ids, np.int64) - (self._legal[0] - 1)
        symbols = self._symbol_of.take(offset, mode="clip")
        return symbols, np.asarray(symbols.min(axis=-1, initial=0) >= 0)

    def legal_ids(self, position: int) -> np.ndarray:
        """int64 ids that may stand at token `position` of a chunk, ascending. The same at every position."""
        if position < 0:
            raise IndexError(f"position {position} is negative")
        return self._legal

    def save(self) -> dict[str, Any]:
        """JSON form; evenly spaced ids are written as a range."""
        first, n = self.ids[0], len(self.ids)
        step = self.ids[1] - first if n > 1 else 1
        if list(self.ids) == list(range(first, first + step * n, step)):
            return {"kind": self.kind, "first_id": first, "step": step, "n": n}
        return {"kind": self.kind, "ids": list(self.ids)}

    @classmethod
    def load(cls, data: dict[str, Any]) -> Self:
        """From `save`'s JSON form. Call `check` with the model's size afterwards."""
        if "ids" in data:
            ids = data["ids"]
        elif {"first_id", "step", "n"} <= data.keys() and data["step"]:
            ids = range(data["first_id"], data["first_id"] + data["step"] * data["n"], data["step"])
        else:
            raise problem(
                f"placement {data}", '"ids", or "first_id", "step" and "n"', "restore the file that training wrote"
            )
        return cls(data.get("kind", "no kind"), tuple(ids))


def _short(ids: Sequence[int]) -> str:
    text = ", ".join(str(i) for i in ids[:8])
    return f"[{text}]" if len(ids) <= 8 else f"[{text}, ... {len(ids)} in all]"
