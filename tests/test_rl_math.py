"""Golden cases (tests/golden/rl_cases.jsonl, float64, six decimals) and properties that need no numbers."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from vla.finetune import rl_math
from vla.types import VlaError

CASES = [json.loads(line) for line in (Path(__file__).parent / "golden" / "rl_cases.jsonl").read_text().splitlines()]


def cases(op: str) -> Any:
    chosen = [case for case in CASES if case["op"] == op]
    assert chosen, op
    return pytest.mark.parametrize("case", chosen, ids=lambda case: case["id"])


def close(got: Any, expected: Any) -> None:
    np.testing.assert_allclose(np.asarray(got, np.float64), np.asarray(expected, np.float64), rtol=0, atol=2e-6)


def double(values: Any) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


# ------------------------------------------------------------------------------------------------------- golden cases


@cases("adv_rloo")
def test_golden_rloo(case: dict[str, Any]) -> None:
    close(rl_math.rloo(**case["inputs"]), case["expected"]["adv"])


@cases("adv_grpo")
def test_golden_grpo(case: dict[str, Any]) -> None:
    close(rl_math.grpo(**case["inputs"], **case["params"]), case["expected"]["adv"])


@cases("keep_groups")
def test_golden_keep_groups(case: dict[str, Any]) -> None:
    rename = {"lo": "low", "hi": "high"}
    params: dict[str, Any] = {rename.get(str(name), str(name)): value for name, value in case["params"].items()}
    keep = rl_math.keep_groups(**case["inputs"], **params)
    assert {str(name): value for name, value in keep.items()} == case["expected"]["keep"]


@cases("token_mask")
def test_golden_token_mask(case: dict[str, Any]) -> None:
    queries, horizon, dim = (case["params"][k] for k in "TKD")
    mask = rl_math.token_mask(torch.tensor(case["inputs"]["n_exec"]), queries, horizon, dim)
    assert mask.dtype == torch.bool and (mask == mask[..., :1]).all()
    assert mask[..., 0].int().tolist() == case["expected"]["action_mask"]
    assert mask.flatten(1).sum(1).tolist() == case["expected"]["tokens_per_traj"]
    first_false = [row.index(False) if False in row else -1 for row in mask.flatten(1).tolist()]
    assert first_false == case["expected"]["first_false_flat"]


@cases("reduce_logp")
def test_golden_reduce_logp(case: dict[str, Any]) -> None:
    queries, horizon, dim = (case["params"][k] for k in "TKD")
    mask = rl_math.token_mask(torch.tensor(case["inputs"]["n_exec"]), queries, horizon, dim)
    for level, expected in case["expected"].items():
        logp, unit_mask = rl_math.reduce_logp(double(case["inputs"]["logp"]), mask, level)
        assert list(logp.shape) == list(unit_mask.shape) == expected["shape"]
        assert unit_mask.sum(1).tolist() == expected["n_units"]
        close(logp.sum(1), expected["sum_per_traj"])


@cases("policy_loss")
def test_golden_policy_loss(case: dict[str, Any]) -> None:
    params, inputs = case["params"], case["inputs"]
    mask = rl_math.token_mask(torch.tensor(inputs["n_exec"]), *params["chunk"])
    logp, unit_mask = rl_math.reduce_logp(double(inputs["logp"]), mask, params["level"])
    old_logp, _ = rl_math.reduce_logp(double(inputs["old_logp"]), mask, params["level"])
    logp.requires_grad_()
    weights = rl_math.unit_weights(unit_mask, params["agg"], max_len=params.get("max_len"), dtype=torch.float64)
    loss, sums = rl_math.policy_loss(
        logp, old_logp, double(inputs["adv"]), unit_mask, weights,
        clip_low=params["lo"], clip_high=params["hi"], dual_clip=params.get("c"), ratio=params.get("ratio", "token"),
    )  # fmt: skip
    loss.backward()
    assert logp.grad is not None
    close(loss.item(), case["expected"]["loss"])
    close(logp.grad, case["expected"]["grad_wrt_level_logp"])
    metrics = rl_math.mean_metrics([sums])
    for key, expected in case["expected"].items():
        if key not in ("loss", "grad_wrt_level_logp"):
            assert metrics[key] == pytest.approx(expected, abs=2e-6), key


@cases("kl")
def test_golden_kl(case: dict[str, Any]) -> None:
    got = rl_math.kl_estimates(double(case["inputs"]["logp"]), double(case["inputs"]["ref_logp"]))
    for name, values in zip(("k1", "k2", "k3"), got, strict=True):
        close(values, case["expected"][name])


@cases("logp_entropy")
def test_golden_slice_logprobs(case: dict[str, Any]) -> None:
    legal = torch.arange(case["params"]["lo"], case["params"]["hi"])
    tokens, temperature = torch.tensor(case["inputs"]["tokens"]), case["params"]["temperature"]
    logp, entropy = rl_math.slice_logprobs(double(case["inputs"]["logits"]), tokens, legal, temperature)
    close(logp, case["expected"]["logp"])
    close(entropy, case["expected"]["entropy"])


# --------------------------------------------------------------------------------------------------------- advantages


def some_rewards() -> tuple[torch.Tensor, list[int], torch.Tensor]:
    rng = np.random.default_rng(0)
    return double(rng.integers(0, 2, 40)), rng.integers(0, 6, 40).tolist(), torch.from_numpy(rng.random(40) > 0.2)


@pytest.mark.parametrize("estimator", [rl_math.rloo, rl_math.grpo])
def test_p1_p2_shift_and_permutation(estimator: Any) -> None:
    rewards, groups, valid = some_rewards()
    advantages = estimator(rewards, groups, valid)
    shift = double([[3.0, -1.0, 0.5, 7.0, 0.0, 2.0][g] for g in groups])
    close(estimator(rewards + shift, groups, valid), advantages)
    order = np.random.default_rng(1).permutation(40)
    close(estimator(rewards[order], [groups[i] for i in order], valid[order]), advantages[order])
    close(rl_math.grpo(rewards * 5, groups, valid, eps=0.0), rl_math.grpo(rewards, groups, valid, eps=0.0))


def test_p10_rloo_is_scaled_dr_grpo() -> None:
    rewards, groups, valid = some_rewards()
    size = double([sum(bool(valid[j]) and groups[j] == g for j in range(40)) for g in groups])
    size = size.clamp_min(2)  # a lone member has advantage 0 either way
    close(rl_math.rloo(rewards, groups, valid), size / (size - 1) * rl_math.grpo(rewards, groups, valid, scale="none"))


def test_invalid_rollouts_may_hold_nan_and_valid_ones_may_not() -> None:
    advantages = rl_math.rloo([1.0, 0.0, float("nan")], ["a"] * 3, [True, True, False])
    close(advantages, [1.0, -1.0, 0.0])
    with pytest.raises(ValueError, match="mark simulator faults as invalid"):
        rl_math.rloo([1.0, float("nan")], ["a", "a"])
    with pytest.raises(ValueError, match="expected equal shapes"):
        rl_math.rloo([1.0, 0.0], ["a"])


def test_one_valid_member_has_no_advantage_and_is_not_kept() -> None:
    assert rl_math.rloo([1.0, 0.0], ["a", "a"], [True, False]).tolist() == [0.0, 0.0]
    for rule in ("std", "range"):
        assert rl_math.keep_groups([1.0, 0.0], ["a", "a"], [True, False], rule=rule, low=0.0, high=1.0) == {"a": False}


def test_range_is_inclusive_in_spite_of_rounding() -> None:
    rewards = [0.1 * 3] + [0.0] * 2  # the mean of 0.30000000000000004 over three is a hair above 0.1
    assert rl_math.keep_groups(rewards, ["g"] * 3, rule="range", low=0.0, high=0.1) == {"g": True}


# ---------------------------------------------------------------------------------------------------------------- loss

AGGREGATIONS = ["token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "dr-grpo"]
SETTINGS = {"clip_low": 0.1, "clip_high": 0.15, "dual_clip": 1.2}


def batch(seed: int = 0, n: int = 6) -> dict[str, torch.Tensor]:
    """Six trajectories of 3 queries x 2 actions x 2 dims; one of them empty."""
    generator = torch.Generator().manual_seed(seed)
    old = -torch.rand((n, 12), generator=generator, dtype=torch.float64) * 3
    n_executed = torch.tensor([6, 3, 0, 1, 5, 4][:n])
    return {
        "logp": old + 0.3 * torch.randn(old.shape, generator=generator, dtype=torch.float64),
        "old_logp": old,
        "advantages": torch.randn(n, generator=generator, dtype=torch.float64),
        "mask": rl_math.token_mask(n_executed, 3, 2, 2).flatten(1),
    }


def loss_and_grad(data: dict, weights: torch.Tensor, **kwargs: Any) -> tuple[float, torch.Tensor, dict]:
    logp = data["logp"].clone().requires_grad_()
    loss, sums = rl_math.policy_loss(**{**data, "logp": logp}, weights=weights, **{**SETTINGS, **kwargs})
    loss.backward()
    assert logp.grad is not None
    return loss.item(), logp.grad, sums


def weigh(mask: torch.Tensor, aggregation: Any, **kwargs: Any) -> torch.Tensor:
    return rl_math.unit_weights(mask, aggregation, max_len=12, dtype=torch.float64, **kwargs)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("split", [[6], [1, 5], [2, 2, 2], [1] * 6])
def test_p3_p4_any_split_gives_the_same_loss_and_gradient(aggregation: str, split: list[int]) -> None:
    data = batch()
    weights = weigh(data["mask"], aggregation)
    whole, gradient, sums = loss_and_grad(data, weights)
    parts = []
    for rows in torch.arange(6).split(split):
        parts.append(loss_and_grad({key: value[rows] for key, value in data.items()}, weights[rows]))
    assert sum(part[0] for part in parts) == pytest.approx(whole, rel=1e-12)
    torch.testing.assert_close(torch.cat([part[1] for part in parts]), gradient, rtol=1e-12, atol=0)
    assert rl_math.mean_metrics([part[2] for part in parts]) == pytest.approx(rl_math.mean_metrics([sums]), rel=1e-12)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_p3_one_row_per_query_equals_one_row_per_trajectory(aggregation: str) -> None:
    data = batch()
    whole, gradient, _ = loss_and_grad(data, weigh(data["mask"], aggregation))
    rows = {key: value.reshape(18, 4) for key, value in data.items() if key != "advantages"}
    rows["advantages"] = data["advantages"].repeat_interleave(3)
    weights = weigh(rows["mask"], aggregation, sequence_index=torch.arange(6).repeat_interleave(3))
    loss, gradient_rows, _ = loss_and_grad(rows, weights)
    assert loss == pytest.approx(whole, rel=1e-12)
    torch.testing.assert_close(gradient_rows.reshape(6, 12), gradient, rtol=1e-12, atol=0)


@pytest.mark.parametrize("aggregation", AGGREGATIONS[:3])
@pytest.mark.parametrize("ratio", ["token", "sequence", "sequence_sum"])
def test_p5_padding_empty_episodes_and_degenerate_groups_change_nothing(aggregation: str, ratio: Any) -> None:
    data = batch()
    whole, gradient, _ = loss_and_grad(data, weigh(data["mask"], aggregation), ratio=ratio)
    padded = {key: torch.nn.functional.pad(value, (0, 4)) for key, value in data.items() if key != "advantages"}
    padded = {key: torch.cat([value, torch.zeros_like(value[:2])]) for key, value in padded.items()}
    padded["advantages"] = torch.cat([data["advantages"], double([5.0, -5.0])])
    loss, gradient_padded, _ = loss_and_grad(padded, weigh(padded["mask"], aggregation), ratio=ratio)
    assert loss == pytest.approx(whole, rel=1e-12)
    torch.testing.assert_close(gradient_padded[:6, :12], gradient, rtol=1e-12, atol=0)
    assert (gradient_padded[6:] == 0).all() and (gradient_padded[:, 12:] == 0).all()


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_p6_without_a_step_the_gradient_is_reinforce(aggregation: str) -> None:
    data = batch()
    data["logp"] = data["old_logp"]
    weights = weigh(data["mask"], aggregation)
    _, gradient, sums = loss_and_grad(data, weights)
    torch.testing.assert_close(gradient, -data["advantages"][:, None] * weights * data["mask"], rtol=1e-12, atol=1e-15)
    metrics = rl_math.mean_metrics([sums])
    assert metrics["ratio_mean"] == metrics["ratio_max"] == 1.0
    assert metrics["clip_frac_low"] == metrics["clip_frac_high"] == metrics["approx_kl_k3"] == 0.0


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf"), 1e9])
@pytest.mark.parametrize("ratio", ["token", "sequence", "sequence_sum"])
def test_p7_masked_tokens_never_matter(poison: float, ratio: Any) -> None:
    data = batch()
    weights = weigh(data["mask"], "seq-mean-token-mean")
    whole, gradient, sums = loss_and_grad(data, weights, ratio=ratio)
    for key in ("logp", "old_logp"):
        poisoned = {**data, key: torch.where(data["mask"], data[key], poison)}
        poisoned["advantages"] = torch.where(data["mask"].any(1), data["advantages"], poison)
        loss, gradient_poisoned, sums_poisoned = loss_and_grad(poisoned, weights, ratio=ratio)
        assert loss == whole and sums_poisoned == sums
        torch.testing.assert_close(gradient_poisoned, gradient, rtol=0, atol=0)
        mask = data["mask"].reshape(6, 3, 2, 2)
        reduced, _ = rl_math.reduce_logp(poisoned[key].reshape(6, 3, 2, 2), mask, "chunk")
        assert torch.isfinite(reduced).all()


def test_extreme_ratios_stay_finite() -> None:
    mask = torch.ones((1, 2), dtype=torch.bool)
    for gap in (500.0, -500.0):
        for advantage in (1.0, -1.0):
            logp = torch.tensor([[gap, 0.0]], requires_grad=True)
            weights = rl_math.unit_weights(mask, "token-mean")
            loss, _ = rl_math.policy_loss(logp, torch.zeros(1, 2), torch.tensor([advantage]), mask, weights)
            loss.backward()
            assert torch.isfinite(loss) and logp.grad is not None and torch.isfinite(logp.grad).all()


def test_p8_kl_estimates() -> None:
    x, y = torch.randn(2, 1000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    _, k2, k3 = rl_math.kl_estimates(x, y)
    assert (k2 >= 0).all() and (k3 >= 0).all()
    assert all((k == 0).all() for k in rl_math.kl_estimates(x, x))


def test_empty_batch_costs_nothing() -> None:
    data = {key: value[2:3] for key, value in batch().items()}  # the episode without a step
    loss, gradient, sums = loss_and_grad(data, weigh(data["mask"], "token-mean"))
    assert loss == 0.0 and (gradient == 0).all()
    assert np.isnan(rl_math.mean_metrics([sums])["ratio_mean"])


def test_wrong_aggregation() -> None:
    mask = torch.ones((1, 1), dtype=torch.bool)
    with pytest.raises(VlaError, match="dr-grpo divides by it"):
        rl_math.unit_weights(mask, "dr-grpo")
    with pytest.raises(VlaError, match="one of token-mean"):
        rl_math.unit_weights(mask, "mean")  # pyright: ignore[reportArgumentType]


# --------------------------------------------------------------------------------------------------- log-probabilities


@pytest.mark.parametrize("legal", [torch.arange(100, 356), torch.arange(3, 900, 7)], ids=["range", "scattered"])
def test_slice_logprobs_equal_a_masked_full_softmax(legal: torch.Tensor) -> None:
    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(4, 9, 16, generator=generator), torch.randn(1000, 16, generator=generator)
    tokens = legal[torch.randint(len(legal), (4, 9), generator=generator)]
    logits = hidden @ weight.T
    masked = torch.full_like(logits, -torch.inf).index_copy(-1, legal, logits[..., legal])
    full = torch.distributions.Categorical(logits=masked / 1.6)
    for given in (logits, rl_math.slice_head(hidden, weight, legal)):
        logp, entropy = rl_math.slice_logprobs(given, tokens, legal, 1.6)
        torch.testing.assert_close(logp, full.log_prob(tokens), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(entropy, torch.distributions.Categorical(logits=logits[..., legal] / 1.6).entropy())


def test_half_precision_logits_are_summed_in_fp32() -> None:
    logits = torch.randn(5, 300, generator=torch.Generator().manual_seed(0))
    tokens, legal = torch.tensor([44, 50, 299, 100, 45]), torch.arange(44, 300)
    logp, entropy = rl_math.slice_logprobs(logits.bfloat16(), tokens, legal)
    exact, _ = rl_math.slice_logprobs(logits.bfloat16().double(), tokens, legal)
    assert logp.dtype == entropy.dtype == torch.float32
    torch.testing.assert_close(logp.double(), exact, atol=1e-5, rtol=0)


def test_peaked_logits_have_finite_entropy_and_gradient() -> None:
    logits = torch.tensor([[1e4, 0.0, -1e4]], requires_grad=True)
    logp, entropy = rl_math.slice_logprobs(logits, torch.tensor([0]), torch.arange(3))
    (logp.sum() + entropy.sum()).backward()
    assert entropy.item() == 0.0 and logits.grad is not None and torch.isfinite(logits.grad).all()


def test_illegal_tokens_and_temperatures_are_refused() -> None:
    for token in (4, 10):
        with pytest.raises(VlaError, match=f"token id {token}"):
            rl_math.slice_logprobs(torch.zeros(1, 12), torch.tensor([token]), torch.arange(5, 10))
    with pytest.raises(VlaError, match="temperature 0"):
        rl_math.slice_logprobs(torch.zeros(1, 12), torch.tensor([5]), torch.arange(5, 10), 0.0)
