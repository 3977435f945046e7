"""Actions to token ids, against the arithmetic of OpenVLA's `ActionTokenizer`.

Run it with `python -m benchmarks.action_tokens`.

OpenVLA encodes `np.digitize`, then turns the ids into text with the tokenizer, which the data pipeline tokenises again.
With `--tokenizer PATH` (a Llama-2 tokenizer folder) its string route is timed with the real vocabulary; without, with a
stand-in of 32 000 words in the same class, which understates the route a little.
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
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from vla.tokenizers.chunk_codec import ActionCodec
from vla.tokenizers.placement import Placement
from vla.tokenizers.uniform import UniformTokenizer


@dataclass(frozen=True)
class Settings:
    tokenizer: Path | None = None
    """Folder of a Llama-2 tokenizer; without it a stand-in of the same size is used."""
    batch: int = 1024
    """Actions per call."""
    repeats: int = 30
    """Interleaved A/B repeats; the median is reported."""


def cpu_us(function: Callable[[], object], loops: int) -> float:
    start = time.process_time()
    for _ in range(loops):
        function()
    return (time.process_time() - start) * 1e6 / loops


def load_tokenizer(path: Path | None) -> Any:
    if path is not None:
        return AutoTokenizer.from_pretrained(path)
    words = {f"t{i}": i for i in range(32000)}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel(words, unk_token="t0")))


def run(settings: Settings) -> dict[str, Any]:
    """Medians in CPU microseconds per call; ids and decoded values are checked to be equal first."""
    text = load_tokenizer(settings.tokenizer)
    tokenizer = UniformTokenizer()
    placement = Placement.tail(32000, 256, model_vocab_size=32064, tokenizer_length=32000)
    edges = np.linspace(-1.0, 1.0, 256)
    centres = (edges[:-1] + edges[1:]) / 2.0

    def peer_ids(actions: np.ndarray) -> np.ndarray:
        return 32000 - np.digitize(np.clip(actions, -1.0, 1.0), edges)

    def peer_text(actions: np.ndarray) -> list[str]:
        return text.batch_decode(peer_ids(actions).tolist())

    def peer_decode(ids: np.ndarray) -> np.ndarray:
        return centres[np.clip(32000 - ids - 1, 0, centres.shape[0] - 1)]

    results: dict[str, Any] = {"tokenizer": str(settings.tokenizer or "stand-in, 32000 words")}
    for batch in (settings.batch, 1):
        actions = np.random.default_rng(0).uniform(-1.1, 1.1, (batch, 7)).astype(np.float32)
        codec = ActionCodec(tokenizer, placement, horizon=1, dim=7)
        chunks, ids = actions[:, None], peer_ids(actions)
        assert (codec.encode(chunks) == ids).all(), "ids differ from OpenVLA's"
        assert (codec.decode(ids)[0][:, 0] == peer_decode(ids).astype(np.float32)).all(), "values differ from OpenVLA's"
        routes: dict[str, Callable[[], object]] = {
            "encode_ours": lambda chunks=chunks, codec=codec: codec.encode(chunks),
            "encode_openvla_digitize": lambda actions=actions: peer_ids(actions),
            "encode_openvla_text": lambda actions=actions: peer_text(actions),
            "decode_ours": lambda ids=ids, codec=codec: codec.decode(ids),
            "decode_openvla": lambda ids=ids: peer_decode(ids),
        }
        loops = 10 if batch > 1 else 100
        times: dict[str, list[float]] = {name: [] for name in routes}
        for _ in range(settings.repeats):
            for name, route in routes.items():
                times[name].append(cpu_us(route, 1 if "text" in name and batch > 1 else loops))
        row = {f"{name}_us": round(statistics.median(values), 1) for name, values in times.items()}
        row["ratio_to_digitize"] = round(row["encode_openvla_digitize_us"] / row["encode_ours_us"], 1)
        row["ratio_to_text"] = round(row["encode_openvla_text_us"] / row["encode_ours_us"], 1)
        row["ratio_decode"] = round(row["decode_openvla_us"] / row["decode_ours_us"], 2)
        results[f"[{batch}, 7]"] = row
    return results


if __name__ == "__main__":
    print(json.dumps(run(tyro.cli(Settings)), indent=2))
