"""What an action tokenizer costs and loses, measured on chunks, as a table row and a plot."""

from __future__ import annotations

import io
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from vla.finetune.tokenizer_fit import n_clipped
from vla.normalize import ActionNormalizer
from vla.tokenizers.code_length import CodeLength
from vla.tokenizers.protocol import PAD, ActionTokenizer

BATCH = 256


@dataclass(frozen=True)
class Measured:
    """One tokenizer on N chunks."""

    name: str
    symbols: int
    """Of the vocabulary."""
    tokens_mean: float
    """Per chunk."""
    tokens_max: int
    rms: float
    """Root mean square error of the normalised actions after encoding and decoding."""
    largest: float
    """Largest error, normalised."""
    rms_physical: tuple[float, ...]
    """Per dimension, in the units of the data."""
    largest_physical: tuple[float, ...]
    bits: float
    """Entropy of the symbols' frequencies times the mean number of tokens: what a chunk would cost at least if its tokens
    were independent, so an upper bound of what a policy has to predict."""
    encode_per_s: float
    """Chunks per second, in batches of 256, on one thread of this machine."""
    decode_per_s: float
    clipped: int | None = None
    """Coefficients that FAST moved into its alphabet; None of other schemes, and of FAST that refuses such chunks."""

    def to_json(self) -> dict[str, Any]:
        return dict(vars(self))


def measure(
    name: str, tokenizer: ActionTokenizer, chunks: np.ndarray, normalizers: Sequence[tuple[int, ActionNormalizer]],
    seconds: float = 0.2,
) -> Measured:  # fmt: skip
    """
    Args:
        chunks: float32 (N, H, D), normalised.
        normalizers: (how many of the chunks, their dataset's normaliser), in order.
        seconds: how long each speed is measured.

    Raises:
        VlaError: chunks that the tokenizer cannot encode.
        ValueError: a tokenizer that cannot decode what it has encoded.
    """
    horizon, dim = chunks.shape[1:]
    symbols = tokenizer.encode(chunks)
    decoded, ok = tokenizer.decode(symbols, horizon, dim)
    if not ok.all():
        raise ValueError(f"{name}: {(~ok).sum()} of {len(ok)} encoded chunks cannot be decoded")
    error = decoded.astype(np.float64) - chunks
    physical = _unnormalized(decoded, normalizers) - _unnormalized(chunks, normalizers)
    lengths = (symbols != PAD).sum(axis=1)
    counts = np.unique(symbols[symbols != PAD], return_counts=True)[1]
    share = counts / counts.sum()
    batch = chunks[:BATCH]
    rows = tokenizer.encode(batch)
    return Measured(
        name, tokenizer.vocab_size, float(lengths.mean()), int(lengths.max()), _rms(error), float(np.abs(error).max()),
        tuple(_rms(physical[..., d]) for d in range(dim)), tuple(np.abs(physical).max(axis=(0, 1)).tolist()),
        float(-(share * np.log2(share)).sum() * lengths.mean()),
        len(batch) * _per_second(lambda: tokenizer.encode(batch), seconds),
        len(batch) * _per_second(lambda: tokenizer.decode(rows, horizon, dim), seconds),
        n_clipped(tokenizer, chunks),
    )  # fmt: skip


def plot(rows: Sequence[Measured], title: str, code_lengths: Sequence[CodeLength] = ()) -> bytes:
    """PNG: error and bits over tokens per chunk, with a line for the codes of each learned scheme, and the speeds."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 3.8), layout="constrained")
    error, bits, speed = figure.subplots(1, 3)
    for row in rows:
        for axis, value in ((error, max(row.rms, 1e-7)), (bits, row.bits)):
            axis.scatter(row.tokens_mean, value)
            axis.annotate(
                _short(row.name), (row.tokens_mean, value), fontsize=8, xytext=(4, 3), textcoords="offset points"
            )
    for scheme in dict.fromkeys(length.scheme for length in code_lengths):
        mine = sorted((c.tokens, c.bits, max(c.rms_error, 1e-7)) for c in code_lengths if c.scheme == scheme)
        tokens, cost, loss = zip(*mine, strict=True)
        error.plot(tokens, loss, ".-", linewidth=1, label=f"{scheme}, code length")
        bits.plot(tokens, cost, ".-", linewidth=1, label=f"{scheme}, tokens x log2 symbols")
    if code_lengths:
        error.legend(fontsize=8)
        bits.legend(fontsize=8)
    error.set(yscale="log", xlabel="tokens per chunk", ylabel="RMS error, normalised", title=title)
    bits.set(xlabel="tokens per chunk", ylabel="bits per chunk")
    places, names = np.arange(len(rows)), [_short(row.name) for row in rows]
    speed.barh(places - 0.2, [row.encode_per_s for row in rows], 0.4, label="encode")
    speed.barh(places + 0.2, [row.decode_per_s for row in rows], 0.4, label="decode")
    speed.set_yticks(places, names, fontsize=8)
    speed.set(xscale="log", xlabel="chunks per second")
    speed.legend(fontsize=8)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()


def _short(name: str) -> str:
    """The end of a long path: a label as wide as the figure would leave no room for what it names."""
    return name if len(name) <= 28 else "…" + name[-27:]


def _unnormalized(chunks: np.ndarray, normalizers: Sequence[tuple[int, ActionNormalizer]]) -> np.ndarray:
    starts = np.cumsum([0, *(n for n, _ in normalizers)])
    parts = [n.unnormalize(chunks[a:b]) for (_, n), a, b in zip(normalizers, starts, starts[1:], strict=False)]
    return np.concatenate(parts).astype(np.float64)


def _rms(error: np.ndarray) -> float:
    return math.sqrt(float((error**2).mean()))


def _per_second(call: Callable[[], object], seconds: float) -> float:
    """Calls per second of this process's time; the first call is not counted."""
    call()
    n, start = 0, time.process_time()
    while (spent := time.process_time() - start) < seconds:
        call()
        n += 1
    return n / spent
