"""Log-prob and entropy over the action slice, against a log-softmax over the whole vocabulary.

Run it with `python -m benchmarks.rl_math`.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import tyro

from vla.finetune import rl_math


@dataclass(frozen=True)
class Settings:
    tokens: int = 1792
    """Action tokens in the micro-batch."""
    hidden: int = 512
    """Width of the last hidden state."""
    vocab: int = 32064
    """Rows of the output head."""
    repeats: int = 5
    """Interleaved A/B repeats; the median is reported."""
    episodes: int = 512
    """Rows of the host-side update (advantage, mask, loss, gradient)."""
    episode_tokens: int = 3584
    """Tokens of one episode: 64 queries x 8 actions x 7 dimensions."""
    threads: int = 1
    """Torch threads."""


def cpu_ms(function: Callable[[], object]) -> float:
    start = time.process_time()
    function()
    return (time.process_time() - start) * 1e3


def run(settings: Settings) -> dict[str, float]:
    """Medians in CPU milliseconds; outputs are checked to be equal first."""
    torch.set_num_threads(settings.threads)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(settings.tokens, settings.hidden, generator=generator)
    weight = torch.randn(settings.vocab, settings.hidden, generator=generator) / settings.hidden**0.5
    legal = torch.arange(settings.vocab - 64 - 256, settings.vocab - 64)
    tokens = legal[torch.randint(256, (settings.tokens,), generator=generator)]

    def full() -> tuple[torch.Tensor, torch.Tensor]:
        logprobs = torch.log_softmax(hidden @ weight.T, dim=-1)
        return logprobs.gather(-1, tokens[:, None])[:, 0], -(logprobs.exp() * logprobs).sum(-1)

    def sliced() -> tuple[torch.Tensor, torch.Tensor]:
        return rl_math.slice_logprobs(rl_math.slice_head(hidden, weight, legal), tokens, legal)

    def masked() -> tuple[torch.Tensor, torch.Tensor]:
        return rl_math.slice_logprobs(hidden @ weight.T, tokens, legal)

    for got, expected in zip(sliced(), masked(), strict=True):  # the full softmax answers another question
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    pairs = [(cpu_ms(full), cpu_ms(sliced)) for _ in range(settings.repeats)]
    full_ms, slice_ms = (statistics.median(column) for column in zip(*pairs, strict=True))
    return {
        "full_vocab_ms": round(full_ms, 2),
        "slice_ms": round(slice_ms, 2),
        "ratio": round(full_ms / slice_ms, 1),
        **host_overhead(settings),
    }


def host_overhead(settings: Settings) -> dict[str, float]:
    """Everything an update does besides the model, for one large batch."""
    n, length = settings.episodes, settings.episode_tokens
    generator = torch.Generator().manual_seed(0)
    rewards = torch.randint(0, 2, (n,), generator=generator)
    groups = [i // 8 for i in range(n)]
    n_executed = torch.randint(1, length // 7 + 1, (n,), generator=generator)
    old = -torch.rand((n, length), generator=generator)
    logp = (old + 0.05 * torch.randn((n, length), generator=generator)).requires_grad_()

    def update() -> None:
        logp.grad = None
        advantages = rl_math.rloo(rewards, groups)
        mask = rl_math.token_mask(n_executed, length // 56, 8, 7).flatten(1)
        weights = rl_math.unit_weights(mask, "token-mean")
        loss, _ = rl_math.policy_loss(logp, old, advantages, mask, weights, clip_high=0.28)
        loss.backward()

    advantage_ms = statistics.median(cpu_ms(lambda: rl_math.rloo(rewards, groups)) for _ in range(settings.repeats))
    update_ms = statistics.median(cpu_ms(update) for _ in range(settings.repeats))
    return {"advantage_ms": round(advantage_ms, 3), "host_update_ms": round(update_ms, 1)}


if __name__ == "__main__":
    print(json.dumps(run(tyro.cli(Settings)), indent=2))
