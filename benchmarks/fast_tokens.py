"""FAST tokens, against the steps of the published processor.

Run it with `python -m benchmarks.fast_tokens --processor FOLDER`, where the folder holds processor_config.json and
tokenizer.json of `physical-intelligence/fast`. Without one, a BPE is fitted to synthetic chunks in the published form (over
bytes, 2048 tokens).

The processor's Python comes with its weights and is not run here: its steps are repeated with the same calls, one chunk at
a time: `scipy.fft.dct`, one Unicode string for each chunk, `PreTrainedTokenizerFast`, and back. Every repeat sees chunks it
has not seen, so that no cache of the BPE helps. CPU time counts all threads; wall time is what a caller waits.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from transformers import PreTrainedTokenizerFast

from vla.tokenizers.fast import FastTokenizer

SHAPES = ((8, 7), (10, 7), (16, 7), (50, 14))


@dataclass(frozen=True)
class Settings:
    processor: Path | None = None
    """Folder of the published FAST processor; without it a BPE of the same form is fitted to synthetic chunks."""
    batch: int = 256
    """Chunks per call."""
    repeats: int = 8
    """Interleaved A/B repeats; the median is reported."""


def smooth_chunks(n: int, horizon: int, dim: int, seed: int) -> np.ndarray:
    """float64 (n, H, D) in [-1, 1]: three slow cosines for each dimension, noise, and a gripper of -1 and 1."""
    rng = np.random.default_rng(seed)
    time_of = np.linspace(0, 1, horizon)[None, :, None]
    chunks = rng.normal(0, 0.02, (n, horizon, dim))
    for k in range(3):
        phase = rng.uniform(0, 2 * np.pi, (n, 1, dim))
        chunks += rng.normal(0, 0.4 / (k + 1), (n, 1, dim)) * np.cos(np.pi * k * time_of + phase)
    chunks[:, :, -1] = np.where(np.arange(horizon) < rng.integers(0, 4 * horizon, (n, 1)), 1.0, -1.0)
    return chunks.clip(-1, 1)


def peer_routes(
    ours: FastTokenizer,
) -> tuple[Callable[[np.ndarray], list[list[int]]], Callable[[list[list[int]], int, int], np.ndarray]]:
    """Encoding and decoding as the processor does them."""
    try:
        from scipy.fft import dct, idct
    except ImportError as error:
        raise SystemExit("the processor needs SciPy: pip install scipy") from error
    text = PreTrainedTokenizerFast(tokenizer_object=ours.bpe, clean_up_tokenization_spaces=False)

    def encode(chunks: np.ndarray) -> list[list[int]]:
        ids = []
        for rounded in np.around(np.asarray(dct(chunks, axis=1, norm="ortho")) * ours.scale):
            points = np.maximum(rounded.flatten() - ours.min_token, 0).astype(int)
            ids.append(text("".join(map(chr, points)))["input_ids"])
        return ids

    def decode(rows: list[list[int]], horizon: int, dim: int) -> np.ndarray:
        chunks = []
        for row in rows:
            characters = text.decode(row)
            points = np.array(list(map(ord, characters))) + ours.min_token  # pyright: ignore[reportArgumentType]
            chunks.append(idct(points.reshape(horizon, dim) / ours.scale, axis=0, norm="ortho"))
        return np.stack(chunks)

    return encode, decode


def run(settings: Settings) -> dict[str, Any]:
    """Medians in microseconds per chunk; ids and values are checked to be equal on every batch."""
    results: dict[str, Any] = {"processor": str(settings.processor or "fitted to synthetic chunks, 2048 tokens")}
    for horizon, dim in SHAPES:
        if settings.processor is not None:
            ours = FastTokenizer.from_processor(settings.processor)
        else:
            ours = FastTokenizer(max_vocab=2048, byte_level=True, clip=True).fit(smooth_chunks(2000, horizon, dim, 0))
        results[f"[{settings.batch}, {horizon}, {dim}]"] = measure(ours, settings, horizon, dim)
    return results


def measure(ours: FastTokenizer, settings: Settings, horizon: int, dim: int) -> dict[str, float]:
    peer_encode, peer_decode = peer_routes(ours)
    times: dict[str, list[tuple[float, float]]] = {}

    def timed(name: str, call: Callable[[], Any]) -> Any:
        cpu, wall = time.process_time(), time.perf_counter()
        result = call()
        spent = ((time.process_time() - cpu) * 1e6, (time.perf_counter() - wall) * 1e6)
        times.setdefault(name, []).append((spent[0] / settings.batch, spent[1] / settings.batch))
        return result

    for repeat in range(settings.repeats + 1):
        chunks = [smooth_chunks(settings.batch, horizon, dim, 2 * repeat + k) for k in (1, 2)]
        outside = [ours.n_outside(c) for c in chunks]
        if any(outside):  # the processor has no row for them that decodes
            chunks = [ours.decode(ours.encode(c), horizon, dim)[0].astype(np.float64) for c in chunks]
        # Each route meets one batch first, and the equality is checked on the other, so that neither warms a cache.
        symbols = timed("encode_ours", lambda c=chunks[0]: ours.encode(c))
        ids = timed("encode_processor", lambda c=chunks[1]: peer_encode(c))
        assert [row[row >= 0].tolist() for row in symbols] == peer_encode(chunks[0]), "ids differ"
        values, ok = timed("decode_ours", lambda s=symbols: ours.decode(s, horizon, dim))
        theirs = timed("decode_processor", lambda i=ids: peer_decode(i, horizon, dim))
        again, _ = ours.decode(ours.encode(chunks[1]), horizon, dim)
        assert ok.all() and np.abs(again - theirs).max() < 1e-6, "values differ"
    medians = {
        name: [statistics.median(column) for column in zip(*rows[1:], strict=True)] for name, rows in times.items()
    }
    row = {f"{name}_{kind}_us": round(m[i], 2) for name, m in medians.items() for i, kind in enumerate(("cpu", "wall"))}
    for way in ("encode", "decode"):
        for i, kind in enumerate(("cpu", "wall")):
            row[f"ratio_{way}_{kind}"] = round(medians[f"{way}_processor"][i] / medians[f"{way}_ours"][i], 2)
    row["tokens_per_chunk"] = round(float(np.asarray(symbols >= 0).sum(axis=1).mean()), 1)
    return row


if __name__ == "__main__":
    print(json.dumps(run(tyro.cli(Settings)), indent=2))
