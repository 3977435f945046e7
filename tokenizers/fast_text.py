"""The text side of FAST: which bytes each token of a BPE stands for, and the grammar of rows with a given number of
characters.

FAST writes each coefficient as one Unicode character. The released tokenizers are *byte-level* (GPT-2): they cut the
UTF-8 form of the text, so a token may start or end inside a character. A grammar state is therefore the number of
characters still to come, and the bytes of one that has begun.
"""

from __future__ import annotations

import codecs
from dataclasses import dataclass, field

import numpy as np

from vla.types import problem

_NONE = np.zeros(0, np.int64)
_NONE.setflags(write=False)


def byte_characters() -> str:
    """The 256 characters that stand for the bytes in a byte-level vocabulary (GPT-2, `bytes_to_unicode`): printable
    Latin-1 as itself, the others from U+0100 on."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    return "".join(chr(i) if i in printable else chr(next(others)) for i in range(256))


def token_bytes(vocab: dict[str, int], byte_level: bool) -> tuple[bytes, ...]:
    """The bytes of every token, by id. A token with a character that stands for no byte is taken as it is, which is
    what HF `tokenizers` does when it decodes.

    Raises:
        VlaError: ids that are not 0 .. n - 1.
    """
    if sorted(vocab.values()) != list(range(len(vocab))):
        raise problem(f"a BPE of {len(vocab)} tokens with gaps in its ids", "ids 0 .. n - 1", "take the original files")
    byte_of = {character: i for i, character in enumerate(byte_characters())}
    table = [b""] * len(vocab)
    for token, i in vocab.items():
        plain = not byte_level or any(character not in byte_of for character in token)
        table[i] = token.encode() if plain else bytes(byte_of[character] for character in token)
    return tuple(table)


def code_points(vocab: dict[str, int], byte_level: bool) -> np.ndarray:
    """int64, ascending: the characters that the vocabulary can write, whatever stands beside them."""
    characters = byte_characters()
    limit = max((ord(character) for token in vocab for character in token), default=-1)
    if not byte_level:
        return np.array([point for point in range(limit + 1) if chr(point) in vocab], np.int64)
    single = {i for i, character in enumerate(characters) if character in vocab}
    return np.array([point for point in range(limit + 1) if single.issuperset(chr(point).encode())], np.int64)


@dataclass(frozen=True, eq=False)
class TextTable:
    """What each token does after each beginning of a character. P beginnings, of which number 0 is none; V tokens."""

    n_characters: np.ndarray
    """int64 (P, V): characters that the token completes; -1 if it may not stand there."""
    following: np.ndarray
    """int64 (P, V): the beginning that is left after it."""

    @property
    def n_beginnings(self) -> int:
        return len(self.n_characters)


def text_table(tokens: tuple[bytes, ...], limit: int) -> TextTable:
    """The table of a vocabulary for texts of characters up to code point `limit`."""
    number = {b"": 0}
    rows: list[list[tuple[int, int]]] = []
    while len(rows) < len(number):
        beginning = list(number)[len(rows)]
        row = []
        for token in tokens:
            step = _read(beginning + token, limit)
            row.append((-1, 0) if step is None else (step[0], number.setdefault(step[1], len(number))))
        rows.append(row)
    table = np.array(rows, np.int64).reshape(len(rows), len(tokens), 2)
    n_characters, following = table[..., 0].copy(), table[..., 1].copy()
    # A beginning that no tokens can finish must not be entered: a row would be stuck in it.
    open_end = np.ones(len(rows), bool)
    open_end[0] = False
    for _ in range(3):  # a character has at most three bytes after its first
        finished = (n_characters == 1) & (following == 0)
        continued = (n_characters == 0) & ~open_end[following]
        open_end &= ~(finished | continued).any(axis=1)
    n_characters[open_end[following]] = -1
    return TextTable(n_characters, following)


def _read(data: bytes, limit: int) -> tuple[int, bytes] | None:
    """(whole characters, bytes of an unfinished one) in `data`; None if it is not UTF-8 or goes beyond `limit`."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    try:
        text = decoder.decode(data)
    except UnicodeDecodeError:
        return None
    rest = decoder.getstate()[0]
    if (text and ord(max(text)) > limit) or (rest and _lowest(rest) > limit):
        return None
    return len(text), rest


def _lowest(rest: bytes) -> int:
    """The lowest code point whose UTF-8 form begins with `rest`."""
    n_bytes = 2 if rest[0] < 0xE0 else 3 if rest[0] < 0xF0 else 4
    point = rest[0] & (0xFF >> (n_bytes + 1))
    for byte in rest[1:]:
        point = point << 6 | byte & 0x3F
    return max(point << 6 * (n_bytes - len(rest)), (0x80, 0x800, 0x10000)[n_bytes - 2])


@dataclass(frozen=True, eq=False)
class TextGrammar:
    """Rows of tokens whose text has exactly n characters. See `vla.tokenizers.protocol.Grammar`."""

    table: TextTable
    start: int
    """n * P."""
    max_tokens: int
    _legal: dict[tuple[int, int], np.ndarray] = field(init=False, repr=False, default_factory=dict)

    def legal(self, state: int) -> np.ndarray:
        left, beginning = divmod(state, self.table.n_beginnings)
        if left == 0:
            return _NONE
        found = self._legal.get((left, beginning))
        if found is None:
            # A token that leaves a character unfinished needs room for it.
            needed = self.table.n_characters[beginning] + (self.table.following[beginning] != 0)
            found = np.flatnonzero((self.table.n_characters[beginning] >= 0) & (needed <= left))
            found.setflags(write=False)
            self._legal[left, beginning] = found
        return found

    def advance(self, state: int, symbol: int) -> int:
        left, beginning = divmod(state, self.table.n_beginnings)
        n = int(self.table.n_characters[beginning, symbol])
        if n < 0 or n > left:
            raise ValueError(f"symbol {symbol} may not stand there")
        return (left - n) * self.table.n_beginnings + int(self.table.following[beginning, symbol])
