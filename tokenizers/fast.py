"""FAST: chunks of actions as the byte-pair encoding of their rounded cosine transform.

FAST (Pertsch et al. 2025, arXiv 2501.09747) takes the orthonormal DCT-II of a chunk along time, rounds `scale` times the
coefficients, writes them lowest frequency first and within a frequency by dimension, each as the character
`coefficient - min_token`, and compresses that text with a BPE. Smooth chunks become few tokens; their number differs
from chunk to chunk.

The files of a released processor (`physical-intelligence/fast`) open with `FastTokenizer.from_processor`; its Python is
neither needed nor run. Its ids and values are reproduced, with four differences, all on purpose:

- a row that is not H * D coefficients is NaN and not ok; the processor prints a line and answers the middle of the range;
- H and D are always the caller's; the processor remembers those of its last call;
- a coefficient outside the alphabet raises, or with `clip` becomes the nearest one inside; the processor clamps it at the
  bottom, and at the top writes a row that no longer decodes;
- the transform is computed in float64 whatever the dtype of the chunk. The processor transforms float32 in float32,
  which moves a coefficient to the next integer where it lies within 1e-5 of half-way. One exactly half-way (a gripper of
  0 and 1 with H = 16) may round either way in both.

`fit` runs the same BPE trainer over the coefficients themselves. The released way works on the UTF-8 bytes of the text and
cuts it wherever a letter meets a digit or a space, which has nothing to do with actions; `byte_level=True` does that too.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any, Self

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from vla.files import write_json, write_text
from vla.tokenizers.fast_text import TextGrammar, TextTable, code_points, text_table, token_bytes
from vla.tokenizers.protocol import ActionEncodeError
from vla.tokenizers.rows import finite_chunks, padded, whole_rows
from vla.tokenizers.schemes import FILE, field_of, read_scheme
from vla.types import problem

BPE_FILE = "tokenizer.json"
LARGEST_ALPHABET = 0xD800
"""Characters from here on are no text (UTF-16 surrogates)."""


@dataclass(frozen=True, eq=False)
class FastTokenizer:
    """Rows of different lengths. Unfitted until `fit`, `load` or `from_processor`."""

    scale: float = 10.0
    """Coefficients are rounded to 1 / scale; an action is then off by at most `bound(horizon)`."""
    max_vocab: int = 1024
    """Tokens that `fit` may make, the alphabet included."""
    byte_level: bool = False
    """`fit` as the released tokenizers were made, over bytes."""
    clip: bool = False
    """Move coefficients outside the alphabet to the nearest inside, where they would raise. `n_outside` counts them."""
    min_token: int = 0
    """The coefficient whose character is U+0000."""
    bpe: Tokenizer | None = None

    def __post_init__(self) -> None:
        if not (np.isfinite(self.scale) and self.scale > 0) or self.max_vocab < 2:
            raise problem(f"scale {self.scale}, max_vocab {self.max_vocab}", "a scale above 0 and at least 2 tokens",
                          "check the tokenizer's settings")  # fmt: skip

    @property
    def vocab_size(self) -> int:
        """Number of tokens of the BPE."""
        return self._fitted.get_vocab_size()

    def bound(self, horizon: int) -> float:
        """Largest error of an action, for coefficients inside the alphabet: every coefficient half a step off, all in
        the worst direction."""
        return float(np.abs(transform(horizon)).sum(axis=0).max()) / (2 * self.scale)

    def fit(self, chunks: np.ndarray) -> Self:
        """Learn the alphabet and the merges from normalised chunks (N, H, D), N >= 1.

        Settings of the trainer as in the processor's own `fit`: pairs seen twice or more, alphabet = every integer from
        the lowest coefficient to the highest.

        Raises:
            VlaError: an alphabet larger than `max_vocab`.
        """
        coefficients = self._coefficients(chunks)
        if not coefficients.size:
            raise problem(
                f"chunks of shape {np.shape(chunks)}", "at least one chunk", "give the training data's chunks"
            )
        low, high = int(coefficients.min()), int(coefficients.max())
        n = high - low + 1
        if n > min(self.max_vocab, LARGEST_ALPHABET):
            raise problem(
                f"{n} different coefficients, from {low} to {high}",
                f"at most max_vocab = {self.max_vocab}",
                "normalise the actions to [-1, 1] and clip them, lower the scale, or raise max_vocab",
            )
        bpe = Tokenizer(models.BPE())
        bpe.decoder = decoders.Fuse()
        if self.byte_level:
            bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
            bpe.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=self.max_vocab,
            min_frequency=2,
            show_progress=False,
            special_tokens=[],
            initial_alphabet=[chr(i) for i in range(n)],
            max_token_length=10000,
        )
        bpe.train_from_iterator(_texts(coefficients - low), trainer=trainer)
        return replace(self, min_token=low, bpe=bpe)

    def encode(self, chunks: np.ndarray) -> np.ndarray:
        """Normalised actions (B, H, D) -> int64 symbols (B, T), padded with PAD.

        `ActionEncodeError` for NaN, infinity, a wrong shape, and, unless `clip`, for a coefficient that the tokenizer
        has no character for.
        """
        points = self._coefficients(chunks) - self.min_token
        outside = ~self._has_character(points)
        if outside.any():
            if not self.clip:
                row, place = np.argwhere(outside)[0]
                frequency, dimension = divmod(int(place), np.shape(chunks)[2])
                low, high = (int(self._points[i]) + self.min_token for i in (0, -1))
                raise ActionEncodeError(
                    f"got {outside.sum()} coefficients that this tokenizer has no character for, the first "
                    f"{points[row, place] + self.min_token} (chunk {row}, frequency {frequency}, dimension {dimension}); "
                    f"expected {low} .. {high}; fix: fit on data that has such chunks, check the normalisation, or set "
                    "clip=True"
                )
            points = self._nearest(points)
        if len(points) == 1:  # one at a time, as data loaders do: no threads
            return padded([self._fitted.encode(_texts(points)[0], add_special_tokens=False).ids])
        return padded([e.ids for e in self._fitted.encode_batch_fast(_texts(points), add_special_tokens=False)])

    def decode(self, symbols: np.ndarray, horizon: int, dim: int) -> tuple[np.ndarray, np.ndarray]:
        """Symbols (B, T) -> (float32 normalised actions (B, H, D), bool ok (B,)).

        Not ok: a symbol that is no token, text that is not UTF-8 or goes beyond the alphabet, or any other number of
        coefficients than horizon * dim."""
        symbols, _, ok = whole_rows(symbols, self.vocab_size)
        table = (*self._bytes, b"")  # PAD, -1, is the last
        texts = [
            b"".join([table[i] for i in row]) if good else b"" for row, good in zip(symbols.tolist(), ok, strict=True)
        ]
        points = np.zeros((len(texts), horizon * dim), np.int64)
        for i, data in enumerate(texts):
            try:
                text = data.decode()
            except UnicodeDecodeError:
                ok[i] = False
                continue
            if len(text) == horizon * dim:
                points[i] = np.frombuffer(text.encode("utf-32-le"), "<u4")
            else:
                ok[i] = False
        ok &= (points <= self._points[-1]).all(axis=1)
        coefficients = (points + self.min_token).reshape(-1, horizon, dim) / self.scale
        actions = np.matmul(transform(horizon).T, coefficients).astype(np.float32)
        actions[~ok] = np.nan
        return actions, ok

    def grammar(self, horizon: int, dim: int) -> TextGrammar:
        """Rows of tokens that make horizon * dim coefficients."""
        n, largest = horizon * dim, len(chr(int(self._points[-1])).encode())
        table = self._table
        return TextGrammar(table, n * table.n_beginnings, n * largest if table.n_beginnings > 1 else n)

    def n_outside(self, chunks: np.ndarray) -> int:
        """How many coefficients of `chunks` the tokenizer has no character for, and `clip` would move."""
        return int((~self._has_character(self._coefficients(chunks) - self.min_token)).sum())

    def save(self, folder: Path) -> None:
        """Write tokenizer.json and scheme.json."""
        settings = {name: getattr(self, name) for name in ("scale", "max_vocab", "byte_level", "clip", "min_token")}
        write_text(folder / BPE_FILE, self._fitted.to_str())
        write_json(folder / FILE, {"scheme": "fast", **settings})

    @classmethod
    def load(cls, folder: Path) -> Self:
        """From a folder that `save` wrote."""
        data = read_scheme(folder)
        kinds = {"scale": float, "max_vocab": int, "byte_level": bool, "clip": bool, "min_token": int}
        fields = {name: field_of(data, name, kind, folder) for name, kind in kinds.items()}
        return cls(**fields, bpe=read_bpe(folder / BPE_FILE, fields["byte_level"]))

    @classmethod
    def from_processor(cls, folder: Path, *, clip: bool = False) -> Self:
        """From the files of a published FAST processor: processor_config.json (or preprocessor_config.json) and
        tokenizer.json, which newer transformers put into the folder bpe_tokenizer. No code of the folder is run.

        Its `action_dim` and `time_horizon` are only defaults for decoding, and are not used.

        Raises:
            VlaError: a file or field that is missing or of another kind.
        """
        configs = [folder / name for name in ("processor_config.json", "preprocessor_config.json")]
        config = next((path for path in configs if path.is_file()), None)
        if config is None:
            raise problem(f"no processor_config.json in {folder}", "the folder of a FAST processor",
                          "download the whole repository, e.g. physical-intelligence/fast")  # fmt: skip
        data = _read_object(config)
        for name in ("scale", "min_token", "vocab_size"):
            if not isinstance(data.get(name), (int, float)):
                raise problem(f"{config}: {name} = {data.get(name)!r}", "a number", "download the file again")
        paths = [folder / BPE_FILE, folder / "bpe_tokenizer" / BPE_FILE]
        path = next((path for path in paths if path.is_file()), paths[0])
        bpe = read_bpe(path, None)
        return cls(
            float(data["scale"]), int(data["vocab_size"]), _is_byte_level(bpe), clip, int(data["min_token"]), bpe
        )

    @property
    def _fitted(self) -> Tokenizer:
        if self.bpe is None:
            raise problem("a FAST tokenizer that was not fitted", "one with an alphabet and merges",
                          "call fit(chunks), load or from_processor")  # fmt: skip
        return self.bpe

    @cached_property
    def _bytes(self) -> tuple[bytes, ...]:
        return token_bytes(self._fitted.get_vocab(), self.byte_level)

    @cached_property
    def _points(self) -> np.ndarray:
        """int64, ascending: the characters there are."""
        points = code_points(self._fitted.get_vocab(), self.byte_level)
        if not points.size:
            raise problem("a BPE without single characters", "the tokenizer of FAST", "take the original files")
        return points

    @cached_property
    def _table(self) -> TextTable:
        return text_table(self._bytes, int(self._points[-1]))

    def _coefficients(self, chunks: np.ndarray) -> np.ndarray:
        """Chunks (B, H, D) -> int64 (B, H * D), rounded, half to even."""
        values = finite_chunks(chunks)
        n, horizon, dim = values.shape
        scaled = np.matmul(transform(horizon), values.astype(np.float64, copy=False)) * self.scale
        return np.around(scaled).astype(np.int64).reshape(n, horizon * dim)

    @cached_property
    def _known(self) -> np.ndarray:
        """bool: whether there is a character one below the index; False at both ends, for all beyond them."""
        known = np.zeros(self._points[-1] + 3, bool)
        known[self._points + 1] = True
        return known

    def _has_character(self, points: np.ndarray) -> np.ndarray:
        return self._known.take(points + 1, mode="clip")

    def _nearest(self, points: np.ndarray) -> np.ndarray:
        """The character next to each point; the lower of two."""
        above = np.searchsorted(self._points, points).clip(1, max(1, len(self._points) - 1))
        low, high = self._points[above - 1], self._points[above.clip(max=len(self._points) - 1)]
        return np.where(points - low <= high - points, low, high)


@cache
def transform(horizon: int) -> np.ndarray:
    """float64 (H, H): the orthonormal DCT-II; its transpose is the inverse."""
    n = np.arange(horizon)
    matrix = np.cos(np.pi * (2 * n[None] + 1) * n[:, None] / (2 * horizon)) * np.sqrt(2 / horizon)
    matrix[0] = np.sqrt(1 / horizon)
    matrix.setflags(write=False)
    return matrix


def read_bpe(path: Path, byte_level: bool | None) -> Tokenizer:
    """A tokenizer.json that FAST can use; VlaError naming the file otherwise."""
    try:
        bpe = Tokenizer.from_str(path.read_text(encoding="utf-8"))
    except Exception as error:  # HF tokenizers raises bare Exception for a file it cannot read
        raise problem(
            f"{path}: {error}", "a tokenizer.json of HF tokenizers", "restore or download the file"
        ) from error
    form = json.loads(bpe.to_str())
    plain = form["normalizer"] is None and form["model"]["type"] == "BPE" and not form["added_tokens"]
    if (
        not plain
        or byte_level not in (None, _is_byte_level(bpe))
        or (form["pre_tokenizer"] and not _is_byte_level(bpe))
    ):
        raise problem(f"{path}: a tokenizer that is not the BPE of FAST",
                      "a BPE without normalizer and added tokens, over characters or bytes",
                      "restore or download the file")  # fmt: skip
    return bpe


def _is_byte_level(bpe: Tokenizer) -> bool:
    form = json.loads(bpe.to_str())["pre_tokenizer"]
    return form is not None and form["type"] == "ByteLevel" and not form["add_prefix_space"]


def _read_object(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise problem(f"{path}: {error}", "JSON", "download the file again") from error
    if not isinstance(data, dict):
        raise problem(f"{path}: {type(data).__name__}", "a JSON object", "download the file again")
    return data


def _texts(points: np.ndarray) -> list[str]:
    """Code points (B, n) -> B strings."""
    n = points.shape[1]
    text = np.ascontiguousarray(points, "<u4").tobytes().decode("utf-32-le")
    return [text[i : i + n] for i in range(0, n * len(points), n)]
