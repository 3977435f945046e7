"""The action sampler, driven by `generate` on a small random Llama."""

from functools import cache
from itertools import islice
from typing import Any

import numpy as np
import pytest
import torch
import transformers as tf
from toy_scheme import ToyTokenizer

from vla.decoding import ActionSampler, AllComplete, gumbel_noise
from vla.finetune.rl_math import slice_logprobs
from vla.tokenizers.chunk_codec import ActionCodec
from vla.tokenizers.grammar import free_grammar
from vla.tokenizers.placement import Placement
from vla.types import VlaError

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
    noise = gumbel_noise(keys, len(legal)) if temperature else None
    sampler = ActionSampler(free_grammar(legal.tolist(), N_TOKENS), temperature, noise)
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
    noise = torch.stack(list(islice(gumbel_noise(keys, 256), 3)), dim=1)
    assert noise.dtype == torch.float32 and noise.shape == (5, 3, 256)
    flat = noise.reshape(15, 256)
    assert len({tuple(row.tolist()) for row in flat}) == 15
    assert all(torch.equal(row, again[0]) for row, again in zip(noise[3], gumbel_noise([keys[3]], 256), strict=False))


def test_draws_follow_the_softmax() -> None:
    """Gumbel-max is exact: 20,000 draws of one distribution stay within five standard errors of it."""
    legal, n, temperature = LEGAL["scattered"], 20_000, 1.3
    logits = torch.randn(96, generator=torch.Generator().manual_seed(2))
    streams = [islice(gumbel_noise([(5, part)], len(legal)), n // 20) for part in range(20)]
    noise = torch.cat([row for stream in streams for row in stream])
    sampler = ActionSampler(free_grammar(legal.tolist(), 1), temperature, iter([noise]))
    sampler(torch.zeros((n, 1), dtype=torch.long), logits.expand(n, 96))
    p = torch.softmax(logits[legal] / temperature, dim=-1).double().numpy()
    counts = np.array([(sampler.token_ids == i).sum() for i in legal])
    assert (np.abs(counts / n - p) < 5 * np.sqrt(p * (1 - p) / n)).all()


def test_noise_is_drawn_as_if_at_once() -> None:
    """Step by step, the stream is that of one call: runs from before variable lengths go on with the same draws."""
    key = (3, 1, 4)
    generator = np.random.Generator(np.random.Philox(np.random.SeedSequence([len(key), *key])))
    whole = generator.gumbel(size=(7, 33)).astype(np.float32)
    np.testing.assert_array_equal(torch.cat(list(islice(gumbel_noise([key], 33), 7))).numpy(), whole)


# ------------------------------------------------------------------------------------------- rows of different lengths

TOY = ActionCodec(ToyTokenizer(8), Placement.reserved([70, 3, 41, 40, 90, 17, 60, 61, 5], model_vocab_size=96), 3, 2)


def draw_toy(rows: torch.Tensor, temperature: float, keys: list[tuple[int, ...]]) -> ActionSampler:
    noise = gumbel_noise(keys, 9) if temperature else None
    sampler = ActionSampler(TOY.grammar, temperature, noise, pad_id=0)
    model().generate(
        rows, attention_mask=torch.ones_like(rows), logits_processor=[sampler], do_sample=False,
        max_new_tokens=TOY.max_tokens, stopping_criteria=[AllComplete(sampler)],
    )  # fmt: skip
    return sampler


@pytest.mark.parametrize("temperature", [0.0, 1.0, 20.0])
def test_every_row_of_a_grammar_decodes_whatever_its_length(temperature: float) -> None:
    sampler = draw_toy(prompts(64), temperature, [(9, row) for row in range(64)])
    ids, logprobs = sampler.token_ids.numpy(), sampler.logprobs
    actions, ok = TOY.decode(ids)
    assert ok.all() and np.isfinite(actions).all() and all(sampler.complete)
    lengths = (ids != -1).sum(1)
    assert ids.shape[1] == lengths.max() <= TOY.max_tokens
    if temperature == 20.0:
        assert len(set(lengths.tolist())) > 2, "rows of different lengths"
    assert (logprobs[torch.from_numpy(ids == -1)] == 0).all() and (logprobs <= 0).all()


@pytest.mark.parametrize("temperature", [0.0, 0.7, 5.0])
def test_logprobs_over_what_was_legal_equal_a_teacher_forced_pass(temperature: float) -> None:
    rows = prompts(8)
    sampler = draw_toy(rows, temperature, [(row,) for row in range(8)])
    ids = sampler.token_ids
    legal_ids, masks = torch.from_numpy(np.array(TOY.legal_ids)), torch.from_numpy(TOY.grammar.row_masks(ids.numpy()))
    logits = teacher_forced(rows, torch.where(ids < 0, 0, ids))
    filled = torch.where(ids < 0, legal_ids[0], ids)
    logp, entropy = slice_logprobs(logits, filled, legal_ids, temperature or 1.0, masks)
    torch.testing.assert_close(torch.where(ids < 0, 0.0, logp), sampler.logprobs, atol=1e-5, rtol=1e-5)
    assert (entropy >= 0).all() and torch.isfinite(entropy).all()
    forced = torch.where(ids < 0, torch.zeros(()), 1.0)[..., None] * masks  # what is illegal has no probability
    assert forced[:, 0].sum(-1).eq(8).all(), "the mark of the end is not legal at the first place"


def test_a_row_does_not_depend_on_how_long_the_others_are() -> None:
    rows, keys = prompts(16), [(4, row) for row in range(16)]
    together = draw_toy(rows, 20.0, keys)
    for i in range(16):
        alone = draw_toy(rows[i : i + 1], 20.0, [keys[i]]).token_ids[0]
        mine = together.token_ids[i]
        assert mine[mine != -1].tolist() == alone.tolist(), "and stops as soon as it is complete"


def test_illegal_rows_have_no_log_probability() -> None:
    ids = torch.tensor([[5, 70]])  # the mark of the end comes first
    legal_ids = torch.from_numpy(np.array(TOY.legal_ids))
    legal = torch.ones(1, 2, 9, dtype=torch.bool)
    legal[0, 0, int(torch.searchsorted(legal_ids, torch.tensor(5)))] = False
    with pytest.raises(VlaError, match="token id 5; expected ids that the decoder may draw"):
        slice_logprobs(torch.zeros(1, 2, 96), ids, legal_ids, 1.0, legal)


def test_gradients_are_finite_where_ids_are_masked() -> None:
    logits = torch.randn(2, 3, 9, requires_grad=True)
    legal = torch.rand(2, 3, 9, generator=torch.Generator().manual_seed(0)) < 0.5
    legal[..., 4] = True
    logp, entropy = slice_logprobs(logits, torch.full((2, 3), 4), torch.arange(9), 1.0, legal)
    (logp.sum() + entropy.sum()).backward()
    assert logits.grad is not None and torch.isfinite(logits.grad).all() and (logits.grad[~legal] == 0).all()


def test_misuse_is_refused() -> None:
    grammar, noise = free_grammar(LEGAL["scattered"].tolist(), 1), gumbel_noise([(1,)], 6)
    with pytest.raises(ValueError, match="noise goes with temperature > 0"):
        ActionSampler(grammar, 1.0)
    with pytest.raises(ValueError, match="noise goes with temperature > 0"):
        ActionSampler(grammar, 0.0, noise)
    with pytest.raises(ValueError, match="temperature -1"):
        ActionSampler(grammar, -1.0, noise)
    sampler = ActionSampler(grammar)
    sampler(torch.zeros((1, 1), dtype=torch.long), torch.zeros(1, 96))
    with pytest.raises(ValueError, match="more than 1 tokens"):
        sampler(torch.zeros((1, 2), dtype=torch.long), torch.zeros(1, 96))
