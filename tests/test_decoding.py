"""The action sampler, driven by `generate` on a small random Llama."""

from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
import transformers as tf

from vla.decoding import ActionSampler, gumbel_noise
from vla.finetune.rl_math import slice_logprobs

N_TOKENS = 5
PROMPT = 6
LEGAL = {"range": torch.arange(60, 92), "scattered": torch.tensor([3, 17, 40, 41, 77, 90])}
both_slices = pytest.mark.parametrize("legal", LEGAL.values(), ids=LEGAL.keys())


@cache
def model() -> Any:
    torch.manual_seed(0)
    config = tf.LlamaConfig(
        vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        pad_token_id=0, eos_token_id=2, initializer_range=0.3,
    )  # fmt: skip
    return tf.LlamaForCausalLM(config).eval()


def prompts(batch: int) -> torch.Tensor:
    return torch.randint(1, 96, (batch, PROMPT), generator=torch.Generator().manual_seed(1))


def draw(
    rows: torch.Tensor, legal: torch.Tensor, temperature: float, keys: list[tuple[int, ...]]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(token ids, log-probs) of the sampler and (B, T) what `generate` itself appended."""
    noise = gumbel_noise(keys, N_TOKENS, len(legal)) if temperature else None
    sampler = ActionSampler(legal, N_TOKENS, temperature, noise)
    out = model().generate(
        rows, attention_mask=torch.ones_like(rows), logits_processor=[sampler], do_sample=False,
        max_new_tokens=N_TOKENS, min_new_tokens=N_TOKENS,
    )  # fmt: skip
    return sampler.token_ids, sampler.logprobs, out[:, PROMPT:]


def teacher_forced(rows: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Logits (B, T, V) in one forward pass."""
    with torch.no_grad():
        return model()(torch.cat([rows, ids], dim=1)).logits[:, PROMPT - 1 : -1]


@both_slices
@pytest.mark.parametrize("temperature", [0.0, 0.3, 1.0, 30.0])
def test_only_legal_ids_are_ever_produced(legal: torch.Tensor, temperature: float) -> None:
    keys = [(7, row) for row in range(64)]
    ids, logprobs, generated = draw(prompts(64), legal, temperature, keys)
    assert ids.shape == logprobs.shape == (64, N_TOKENS)
    assert torch.isin(ids, legal).all()
    assert torch.equal(ids, generated)
    assert (logprobs <= 0).all() and torch.isfinite(logprobs).all()


@both_slices
@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.6])
def test_logprobs_equal_a_teacher_forced_pass(legal: torch.Tensor, temperature: float) -> None:
    rows = prompts(8)
    ids, logprobs, _ = draw(rows, legal, temperature, [(row,) for row in range(8)])
    expected, _ = slice_logprobs(teacher_forced(rows, ids), ids, legal, temperature or 1.0)
    torch.testing.assert_close(logprobs, expected, atol=1e-5, rtol=1e-5)


@both_slices
def test_greedy_is_the_argmax_over_the_legal_ids(legal: torch.Tensor) -> None:
    rows = prompts(8)
    ids, _, _ = draw(rows, legal, 0.0, [])
    assert torch.equal(legal[teacher_forced(rows, ids)[..., legal].argmax(-1)], ids)


def test_noise_belongs_to_the_key_not_to_the_batch() -> None:
    keys = [(3, episode, query) for episode in range(4) for query in range(2)]
    rows, legal = prompts(8), LEGAL["range"]
    ids, logprobs, _ = draw(rows, legal, 1.0, keys)
    order = torch.tensor([5, 2, 7, 0, 1, 6, 3, 4])
    again, logprobs_again, _ = draw(rows[order], legal, 1.0, [keys[i] for i in order])
    assert torch.equal(again, ids[order])
    torch.testing.assert_close(logprobs_again, logprobs[order])
    for i in range(8):
        alone, _, _ = draw(rows[i : i + 1], legal, 1.0, [keys[i]])
        assert torch.equal(alone[0], ids[i])


def test_noise_differs_between_keys_and_positions_and_repeats_for_one_key() -> None:
    keys = [(0, 0, 1), (0, 1, 0), (1, 0, 0), (0, 0, 2), (100_000, 3, 1)]
    noise = gumbel_noise(keys, 3, 256)
    assert noise.dtype == torch.float32 and noise.shape == (5, 3, 256)
    flat = noise.reshape(15, 256)
    assert len({tuple(row.tolist()) for row in flat}) == 15
    assert torch.equal(noise[3], gumbel_noise([keys[3]], 3, 256)[0])


def test_draws_follow_the_softmax() -> None:
    """Gumbel-max is exact: 20,000 draws of one distribution stay within five standard errors of it."""
    legal, n, temperature = LEGAL["scattered"], 20_000, 1.3
    logits = torch.randn(96, generator=torch.Generator().manual_seed(2))
    noise = torch.cat([gumbel_noise([(5, part)], n // 20, len(legal)) for part in range(20)], dim=1).transpose(0, 1)
    sampler = ActionSampler(legal, 1, temperature, noise)
    sampler(torch.zeros((n, 1), dtype=torch.long), logits.expand(n, 96))
    p = torch.softmax(logits[legal] / temperature, dim=-1).double().numpy()
    counts = np.array([(sampler.token_ids == i).sum() for i in legal])
    assert (np.abs(counts / n - p) < 5 * np.sqrt(p * (1 - p) / n)).all()


def test_misuse_is_refused() -> None:
    legal, noise = LEGAL["scattered"], gumbel_noise([(1,)], 1, 6)
    with pytest.raises(ValueError, match="noise goes with temperature > 0"):
        ActionSampler(legal, 1, 1.0)
    with pytest.raises(ValueError, match="noise goes with temperature > 0"):
        ActionSampler(legal, 1, 0.0, noise)
    with pytest.raises(ValueError, match="temperature -1"):
        ActionSampler(legal, 1, -1.0, noise)
    sampler = ActionSampler(legal, 1)
    sampler(torch.zeros((1, 1), dtype=torch.long), torch.zeros(1, 96))
    with pytest.raises(ValueError, match="more than 1 tokens"):
        sampler(torch.zeros((1, 2), dtype=torch.long), torch.zeros(1, 96))
