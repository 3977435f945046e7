"""Reconstruction error against code length: what a learned codec loses for every number of tokens."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

import numpy as np

from vla.tokenizers.learned import LearnedCodec, Progress


@dataclass(frozen=True)
class CodeLength:
    """One line of the table of error against code length."""

    scheme: str
    settings: str
    """The codec's own, as JSON."""
    tokens: int
    bits: float
    """Tokens times log2 of the symbols: what a chunk costs if all symbols are equally likely."""
    rms_error: float
    """On chunks that were held out."""
    max_error: float


def code_lengths(
    codecs: Sequence[LearnedCodec],
    chunks: np.ndarray,
    held_out: np.ndarray,
    progress: Callable[[LearnedCodec], Progress] | None = None,
) -> list[CodeLength]:
    """Fit each codec to `chunks` (N, H, D) and measure it on `held_out` (M, H, D).

    Args:
        progress: given a codec, called before it is fitted, what is to be told of its training.
    """
    shared, table = {f.name for f in fields(LearnedCodec)}, []
    for codec in codecs:
        fitted = codec.fit(chunks, progress(codec) if progress is not None else None)
        error = fitted.decode(fitted.encode(held_out), *held_out.shape[1:])[0].astype(np.float64) - held_out
        own = {f.name: getattr(codec, f.name) for f in fields(codec) if f.name not in shared}
        bits = codec.n_tokens * float(np.log2(codec.vocab_size))
        rms, largest = float(np.sqrt((error**2).mean())), float(np.abs(error).max())
        table.append(CodeLength(codec.name, json.dumps(own), codec.n_tokens, bits, rms, largest))
    return table
