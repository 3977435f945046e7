import json
from pathlib import Path
from typing import Any

import pytest
import torch

from vla.finetune import rl_math
from vla.finetune.data.group_sampler import GroupSampler, SkipMemory
from vla.types import VlaError

LINES = (Path(__file__).parent / "golden" / "rl_cases.jsonl").read_text().splitlines()
CASES = [case for case in map(json.loads, LINES) if case["op"] == "dynamic_sampling"]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["id"])
def test_golden_dynamic_sampling(case: dict[str, Any]) -> None:
    sampler = GroupSampler(target=case["params"]["target"], max_groups=case["params"].get("max_groups", 1000))
    for name, rewards in enumerate(case["inputs"]["stream"]):
        if sampler.done:
            break
        sampler.offer(str(name), rewards)
    assert [int(name) for name in sampler.accepted] == case["expected"]["accepted"]
    assert sampler.counts["generated"] == case["expected"]["generated"]
    assert sampler.complete == case["expected"]["complete"]


def test_sampler_counts_why_groups_were_dropped() -> None:
    sampler = GroupSampler(target=3, max_groups=6, rule="range", low=0.3, high=0.7)
    assert not sampler.offer("a", [1, 1, 1])
    assert not sampler.offer("b", [1, 0, 0, 0, 0])
    assert not sampler.offer("c", [1, 0, 0], [True, False, False])
    assert sampler.wanted == 3
    assert sampler.offer("d", [1, 0, 0], [True, True, False])
    assert sampler.offer("e", [1, 0]) and not sampler.done and sampler.wanted == 1
    assert not sampler.offer("f", [])
    assert sampler.done and not sampler.complete and sampler.accepted == ["d", "e"]
    assert sampler.counts == {
        "generated": 6, "kept": 2, "all_equal": 1, "out_of_range": 1, "too_few_valid": 2, "invalid_episodes": 3,
    }  # fmt: skip
    with pytest.raises(VlaError, match="attempt cap"):
        GroupSampler(target=3, max_groups=2)


def test_skip_memory_retries_and_survives_a_restart() -> None:
    memory = SkipMemory(retry_after=3)
    assert not memory.skip("a")
    memory.record("a", [True, True])
    assert memory.skip("a")
    memory = SkipMemory.load(json.loads(json.dumps(memory.save())))
    assert [memory.skip("a") for _ in range(3)] == [True, True, False]
    memory.record("a", [True, False], valid=[True, False])
    assert memory.skip("a")
    memory.record("a", [True, False])
    assert not memory.skip("a")


@pytest.mark.parametrize("estimator", [rl_math.rloo, rl_math.grpo])
@pytest.mark.parametrize("seed", range(5))
def test_p15_p13_toy_learning(estimator: Any, seed: int) -> None:
    """Two tokens of 8 symbols; reward 1 only for (3, 5). From 1.6 % success by luck to >= 95 % in <= 200 updates."""
    generator = torch.Generator().manual_seed(seed)
    legal = torch.arange(8)
    first = torch.zeros(8, requires_grad=True)
    second = torch.zeros(8, 8, requires_grad=True)  # given the first token
    optimiser = torch.optim.Adam([first, second], lr=0.1)
    forwards = 0
    for _ in range(200):
        sampler, rollouts = GroupSampler(target=2, max_groups=16), {}
        with torch.no_grad():
            while not sampler.done:
                a = torch.multinomial(first.softmax(-1), 16, replacement=True, generator=generator)
                b = torch.multinomial(second.softmax(-1)[a], 1, generator=generator)[:, 0]
                name = str(sampler.counts["generated"])
                rollouts[name] = (torch.stack([a, b], 1), ((a == 3) & (b == 5)).double())
                sampler.offer(name, rollouts[name][1].tolist())
        if not sampler.accepted:
            continue  # a batch of degenerate groups costs no forward
        tokens = torch.cat([rollouts[name][0] for name in sampler.accepted])
        rewards = torch.cat([rollouts[name][1] for name in sampler.accepted])
        groups = [name for name in sampler.accepted for _ in range(16)]
        mask = torch.ones_like(tokens, dtype=torch.bool)
        weights = rl_math.unit_weights(mask, "token-mean")
        old = None
        for _ in range(2):
            logits = torch.stack([first.expand(len(tokens), 8), second[tokens[:, 0]]], dim=1)
            forwards += 1
            logp, _ = rl_math.slice_logprobs(logits, tokens, legal)
            old = logp.detach() if old is None else old
            loss, _ = rl_math.policy_loss(logp, old, estimator(rewards, groups), mask, weights, clip_high=0.28)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
    success = (first.softmax(-1)[3] * second.softmax(-1)[3, 5]).item()
    assert success >= 0.95, success
    assert forwards <= 400
