"""One policy query on the built-in VLM, against the same checkpoint as transformers opens it.

    python -m benchmarks.backbone

Ours folds the vision tower's frozen batch norms into its convolutions (`vla/fold_norms.py`) and lays them out channels
last. Both sides draw 12 tokens from 256 legal ids with the same noise; the ids are checked to be equal.
"""

from __future__ import annotations

import os
import statistics
import sys
import time
from dataclasses import dataclass

import numpy as np
import torch
import tyro
from PIL import Image

from vla.backbone import TINY_PATH, Backbone, load_backbone
from vla.tokenizers.grammar import free_grammar

N_TOKENS = 12
PROMPT = "State: 120 80 40 255\nIn: What action should the robot take to turn the faucet clockwise?\nOut:"


@dataclass(frozen=True)
class Settings:
    batches: tuple[int, ...] = (1, 16)
    """Observations per call."""
    repeats: int = 15
    """Interleaved repeats; the median is reported."""
    threads: int = 1
    """torch's threads; during roll-outs the policy has one of two cores."""


def main(settings: Settings) -> None:
    from transformers import (
        AutoModelForImageTextToText,
        AutoProcessor,
    )  # after vla, which mends torchvision beside a CPU torch

    torch.set_num_threads(settings.threads)
    stock_model = AutoModelForImageTextToText.from_pretrained(TINY_PATH, dtype=torch.float32).eval()
    sides = {
        "transformers": Backbone(stock_model, AutoProcessor.from_pretrained(TINY_PATH)),
        "ours": load_backbone("tiny"),
    }
    rng = np.random.default_rng(0)
    grammar = free_grammar(range(256, 512), N_TOKENS)
    print(
        f"median of {settings.repeats}, {settings.threads} thread, load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores"
    )
    print("| batch | transformers, ms per query | ours | ratio |\n|---|---|---|---|")
    for batch in settings.batches:
        pictures = rng.integers(0, 256, (batch, 160, 160, 3), dtype=np.uint8)
        inputs = sides["ours"].encode([PROMPT] * batch, [[Image.fromarray(picture)] for picture in pictures])
        keys = [(0, i) for i in range(batch)]
        times: dict[str, list[float]] = {name: [] for name in sides}
        found = {}
        for repeat in range(settings.repeats + 1):  # the first is a warm-up
            for name, backbone in sides.items():
                start = time.perf_counter()
                found[name] = backbone.sample(inputs, grammar, 1.0, keys)
                if repeat:
                    times[name].append((time.perf_counter() - start) * 1e3 / batch)
        (ids, logprobs), (other_ids, other_logprobs) = found.values()
        gap = float((logprobs - other_logprobs).abs().max())
        if not torch.equal(ids, other_ids) or gap > 1e-3:
            sys.exit(f"the two sides differ: ids equal {torch.equal(ids, other_ids)}, log-probabilities by {gap}")
        stock, ours = (statistics.median(times[name]) for name in sides)
        print(f"| {batch} | {stock:.1f} | {ours:.1f} | {stock / ours:.2f}x |")


if __name__ == "__main__":
    main(tyro.cli(Settings))
