"""The arithmetic of group-based RL on action tokens: advantages, masks, log-probabilities and the clipped policy loss.

Letters as in `vla.types`; a *row* is one trajectory (B) or one query of a trajectory, a *unit* (L per row) is what one
importance ratio covers: a token, an action (D tokens), a chunk (H*D tokens) or a whole sequence.

Sources: RLOO arXiv 2402.14740, GRPO 2402.03300, Dr.GRPO 2503.20783, DAPO 2503.14476 (token mean, asymmetric clip,
dynamic sampling), dual clip 1912.09729, GSPO 2507.18071, RIPT-VLA 2505.17016.

Masks always go through `torch.where`, before `exp`: a product would turn NaN in a masked place into NaN in the loss.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Literal

import torch
from torch import Tensor

from vla.types import problem

Level = Literal["token", "action", "chunk", "sequence"]
Aggregation = Literal["token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "dr-grpo"]
Ratio = Literal["token", "sequence", "sequence_sum"]

MAX_LOG_RATIO = 20.0
"""Log-ratios are clamped to ±20, far outside any clip range, so that `exp` never overflows into NaN gradients."""


# ---------------------------------------------------------------------------------------------- groups and advantages


def group_index(group_ids: Sequence[Hashable] | Tensor) -> tuple[Tensor, list[Hashable]]:
    """Any hashable group names -> (int64 index (N,), names in order of first appearance). Groups may be interleaved."""
    names = group_ids.tolist() if isinstance(group_ids, Tensor) else list(group_ids)
    order: dict[Hashable, int] = {}
    index = [order.setdefault(name, len(order)) for name in names]
    return torch.tensor(index, dtype=torch.int64), list(order)


def _group_stats(
    rewards: Sequence[float] | Tensor, group_ids: Sequence[Hashable] | Tensor, valid: Sequence[bool] | Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """float64 rewards (0 where invalid), bool valid, and the valid members' count and sum in each row's group; all (N,)."""
    r = torch.as_tensor(rewards, dtype=torch.float64).cpu()
    ok = torch.ones_like(r, dtype=torch.bool) if valid is None else torch.as_tensor(valid).cpu().bool()
    index, names = group_index(group_ids)
    if not r.shape == ok.shape == index.shape:
        shapes = f"rewards {tuple(r.shape)}, valid {tuple(ok.shape)}, group_ids {tuple(index.shape)}"
        raise ValueError(f"got {shapes}; expected equal shapes (N,)")
    r = torch.where(ok, r, 0.0)
    if not bool(torch.isfinite(r).all()):
        raise ValueError("a valid rollout has a reward that is not finite; mark simulator faults as invalid")
    counts = torch.zeros(len(names), dtype=torch.float64).index_add_(0, index, ok.double())[index]
    sums = torch.zeros(len(names), dtype=torch.float64).index_add_(0, index, r)[index]
    return r, ok, counts, sums


def rloo(
    rewards: Sequence[float] | Tensor,
    group_ids: Sequence[Hashable] | Tensor,
    valid: Sequence[bool] | Tensor | None = None,
) -> Tensor:
    """Leave-one-out advantages, float64 (N,): A_i = r_i - mean of the other valid members of i's group.

    Rollouts that are not valid (simulator crash or hang) are no evidence of failure: they leave the baseline and get 0.
    So does the only valid member of a group.
    """
    r, ok, n, total = _group_stats(rewards, group_ids, valid)
    return torch.where(ok & (n >= 2), r - (total - r) / (n - 1).clamp_min(1), 0.0)


def grpo(
    rewards: Sequence[float] | Tensor,
    group_ids: Sequence[Hashable] | Tensor,
    valid: Sequence[bool] | Tensor | None = None,
    *,
    eps: float = 1e-6,
    ddof: int = 1,
    scale: Literal["group", "batch", "none"] = "group",
) -> Tensor:
    """Group-normalised advantages, float64 (N,): (r_i - mean) / (std + eps). `scale="none"` is Dr.GRPO's r_i - mean.

    `scale="batch"` divides by the std over all valid rewards. Invalid members as in `rloo`.
    """
    r, ok, n, total = _group_stats(rewards, group_ids, valid)
    centred = torch.where(ok & (n >= 2), r - total / n.clamp_min(1), 0.0)
    if scale == "none":
        return centred
    if scale == "batch":
        std = r[ok].std(correction=ddof) if int(ok.sum()) > ddof else torch.zeros((), dtype=torch.float64)
        return torch.where(centred == 0, 0.0, centred / (std + eps))
    index, names = group_index(group_ids)
    squares = torch.zeros(len(names), dtype=torch.float64).index_add_(0, index, centred**2)[index]
    std = (squares / (n - ddof).clamp_min(1)).sqrt()
    return torch.where(centred == 0, 0.0, centred / (std + eps))  # also with eps = 0


def keep_groups(
    rewards: Sequence[float] | Tensor,
    group_ids: Sequence[Hashable] | Tensor,
    valid: Sequence[bool] | Tensor | None = None,
    *,
    rule: Literal["std", "range"] = "std",
    low: float = 0.1,
    high: float = 0.9,
) -> dict[Hashable, bool]:
    """Group name -> whether it teaches anything: rewards differ (`std`), or low <= mean <= high (`range`, inclusive).

    A group with fewer than two valid members is never kept.
    """
    r, ok, n, total = _group_stats(rewards, group_ids, valid)
    index, names = group_index(group_ids)
    keep: dict[Hashable, bool] = {}
    for g, name in enumerate(names):
        members = (index == g) & ok
        if int(members.sum()) < 2:
            keep[name] = False
        elif rule == "std":
            keep[name] = bool(r[members].max() > r[members].min())
        else:
            mean = float(total[members][0] / n[members][0])
            keep[name] = low - 1e-9 <= mean <= high + 1e-9
    return keep


# ------------------------------------------------------------------------------------------------- masks and reduction


def query_mask(n_executed: Tensor, horizon: int, dim: int) -> Tensor:
    """How many actions of each chunk reached the simulator, int (...) -> bool (..., H, D): the tokens that counted."""
    steps = torch.arange(horizon, device=n_executed.device)
    return (steps < n_executed[..., None])[..., None].expand(*n_executed.shape, horizon, dim)


def token_mask(n_executed: Tensor, queries: int, horizon: int, dim: int) -> Tensor:
    """Environment steps executed per trajectory, int (B,) -> bool (B, Q, H, D).

    The step that ended the episode counts. Every chunk but the last is taken as executed whole; where chunks are cut
    short on purpose use `query_mask` with the count of each query.
    """
    started = torch.arange(queries, device=n_executed.device) * horizon
    return query_mask((n_executed[:, None] - started).clamp(0, horizon), horizon, dim)


def reduce_logp(logp: Tensor, mask: Tensor, level: Level) -> tuple[Tensor, Tensor]:
    """Sum token log-probs (B, Q, H, D) up to `level`: ((B, L), bool (B, L)).

    A unit is valid if any of its tokens is; masked tokens add 0, whatever they hold.
    """
    logp = torch.where(mask, logp, 0.0)
    first_axis = {"token": 4, "action": 3, "chunk": 2, "sequence": 1}[level]
    if first_axis < 4:
        logp, mask = logp.flatten(first_axis).sum(-1), mask.flatten(first_axis).any(-1)
    return logp.reshape(len(logp), -1), mask.reshape(len(mask), -1)


# --------------------------------------------------------------------------------------------------------- policy loss


def unit_weights(
    mask: Tensor,
    aggregation: Aggregation,
    *,
    sequence_index: Tensor | None = None,
    max_len: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Weight of every unit, (R, L), such that the loss is the plain sum of weight * unit loss.

    Call it once on the mask of the **whole** optimiser batch and slice the result along with the data: then loss and
    gradient do not depend on how the batch is split into micro-batches. On several ranks, gather the masks first (and
    multiply by the world size if gradients are averaged).

    token-mean: 1/N over valid units. seq-mean-token-mean: mean over non-empty sequences of each one's mean.
    seq-mean-token-sum: the same of each one's sum. dr-grpo: 1/(sequences * max_len), empty sequences counted.

    Args:
        mask: bool (R, L).
        sequence_index: int64 (R,) trajectory of each row, 0 .. B-1, where a trajectory has several rows; else one each.
        max_len: units of the longest possible sequence; `dr-grpo` only.
    """
    index = torch.arange(len(mask), device=mask.device) if sequence_index is None else sequence_index
    n_sequences = int(index.max()) + 1 if len(index) else 0
    zeros = torch.zeros(n_sequences, dtype=torch.float64, device=mask.device)
    lengths = zeros.index_add(0, index, mask.sum(-1).double())
    n_filled = (lengths > 0).sum().clamp_min(1)
    if aggregation == "token-mean":
        per_row = (1.0 / lengths.sum().clamp_min(1)).expand(len(mask))
    elif aggregation == "seq-mean-token-mean":
        per_row = (1.0 / (n_filled * lengths.clamp_min(1)))[index]
    elif aggregation == "seq-mean-token-sum":
        per_row = (1.0 / n_filled.double()).expand(len(mask))
    elif aggregation == "dr-grpo":
        if max_len is None or max_len < 1:
            raise problem(f"max_len={max_len}", "a positive number of units", "dr-grpo divides by it; pass it")
        per_row = torch.full_like(index, 1.0 / (max(n_sequences, 1) * max_len), dtype=torch.float64)
    else:
        raise problem(f"aggregation {aggregation!r}", "one of " + ", ".join(Aggregation.__args__), "correct the name")
    return torch.where(mask, per_row[:, None], 0.0).to(dtype)


def log_ratio(logp: Tensor, old_logp: Tensor, mask: Tensor, ratio: Ratio = "token") -> Tensor:
    """Log importance ratio of every unit, (R, L), 0 where masked.

    `sequence` (GSPO) is the row's mean over valid units, `sequence_sum` its sum; for both, a row is a whole sequence.
    """
    difference = torch.where(mask, logp - old_logp, 0.0)
    if ratio != "token":
        total = difference.sum(-1, keepdim=True)
        if ratio == "sequence":
            total = total / mask.sum(-1, keepdim=True).clamp_min(1)
        difference = torch.where(mask, total, 0.0)
    return difference.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)


def policy_loss(
    logp: Tensor,
    old_logp: Tensor,
    advantages: Tensor,
    mask: Tensor,
    weights: Tensor,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
    ratio: Ratio = "token",
) -> tuple[Tensor, dict[str, float]]:
    """PPO-clip: sum of w * max(-A rho, -A clip(rho, 1 - clip_low, 1 + clip_high)); minimise it.

    With `dual_clip` c, a unit of negative advantage costs at most -A c. All arguments may be one micro-batch: losses of
    micro-batches add up to the batch's.

    Args:
        logp, old_logp: (R, L) log-probs of the units, new (with gradient) and as drawn.
        advantages: (R,).
        mask: bool (R, L).
        weights: (R, L) from `unit_weights`.

    Returns:
        The loss and sums over valid units for `mean_metrics`.
    """
    advantage = torch.where(mask, advantages.to(logp.dtype).reshape(-1, 1), 0.0)
    unit_ratio = log_ratio(logp, old_logp, mask, ratio)
    rho = unit_ratio.exp()
    plain = -advantage * rho
    unit = torch.maximum(plain, -advantage * rho.clamp(1 - clip_low, 1 + clip_high))
    if dual_clip is not None:
        unit = torch.where(advantage < 0, torch.minimum(unit, -advantage * dual_clip), unit)
    loss = (torch.where(mask, unit, 0.0) * weights).sum()
    with torch.no_grad():
        difference = unit_ratio if ratio == "token" else log_ratio(logp, old_logp, mask)
        dual = (advantage < 0) & (rho > dual_clip) if dual_clip is not None else torch.zeros_like(mask)
        sums = torch.stack(
            [
                mask.sum(),
                torch.where(mask, rho, 0.0).sum(),
                torch.where(mask, rho, 0.0).amax() if mask.numel() else loss.new_zeros(()),
                ((advantage < 0) & (rho < 1 - clip_low)).sum(),
                ((advantage > 0) & (rho > 1 + clip_high)).sum(),
                dual.sum(),
                -difference.sum(),
                (difference.exp() - 1 - difference).sum(),
            ]
        ).tolist()  # one transfer from the device
    return loss, dict(zip(METRIC_SUMS, sums, strict=True))


METRIC_SUMS = ("n", "ratio_mean", "ratio_max", "clip_frac_low", "clip_frac_high", "dual_clip_frac", "kl_k1", "kl_k3")


def mean_metrics(parts: Sequence[dict[str, float]]) -> dict[str, float]:
    """Metrics of a batch from those of its micro-batches; NaN where no unit was valid.

    clip_frac_low: share of units with A < 0 pushed below the range; clip_frac_high: with A > 0 above it.
    approx_kl of old to new, on sampled units: k1 = mean(old - new), k3 = mean(exp(d) - 1 - d), d = new - old.
    """
    n = sum(part["n"] for part in parts)
    means = {key: sum(part[key] for part in parts) / n if n else float("nan") for key in METRIC_SUMS[1:]}
    means["ratio_max"] = max((part["ratio_max"] for part in parts), default=float("nan"))
    return {key.replace("kl_", "approx_kl_"): value for key, value in means.items()}


def kl_estimates(logp: Tensor, ref_logp: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Per-token estimates of KL(policy, reference) on sampled tokens: k1 = x, k2 = x²/2, k3 = exp(-x) - 1 + x."""
    x = logp - ref_logp
    return x, x**2 / 2, torch.exp(-x) - 1 + x


# --------------------------------------------------------------------------------------------------- log-probabilities


def slice_head(hidden: Tensor, weight: Tensor, legal_ids: Tensor, bias: Tensor | None = None) -> Tensor:
    """Logits of the legal ids only: hidden (..., h), head weight (V, h) -> (..., n). Never forms the V logits."""
    return torch.nn.functional.linear(hidden, _pick(weight, legal_ids, 0), None if bias is None else bias[legal_ids])


def slice_logprobs(
    logits: Tensor, token_ids: Tensor, legal_ids: Tensor, temperature: float = 1.0, legal: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(log-prob of each token, entropy in nats), both fp32 (...), over the softmax of the legal ids at `temperature`.

    The temperature divides the logits first. Rollout and update must use the same slice and temperature. Half-precision
    logits are lifted to fp32 before anything is summed; float64 stays float64.

    Args:
        logits: (..., V) of the whole vocabulary, or (..., n) from `slice_head` in the order of `legal_ids`.
        token_ids: int64 (...) vocabulary ids; `VlaError` if one is not legal, so fill masked places with a legal id.
        legal_ids: int64 (n,), ascending.
        legal: bool (..., n), which of `legal_ids` could be drawn at each place; None: all of them everywhere.
    """
    if temperature <= 0:
        raise problem(f"temperature {temperature}", "above 0", "a greedy policy has no log-probs to train on")
    if logits.shape[-1] != len(legal_ids):
        logits = _pick(logits, legal_ids, -1)
    position = torch.searchsorted(legal_ids, token_ids).clamp_max(len(legal_ids) - 1)
    illegal = legal_ids[position] != token_ids
    if legal is not None:
        illegal |= ~legal.gather(-1, position[..., None])[..., 0]
    if bool(illegal.any()):
        raise problem(
            f"token id {int(token_ids[illegal][0])}", "ids that the decoder may draw", "drop undecodable rows first"
        )
    scores = logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature
    if legal is not None:
        scores = scores.masked_fill(~legal, float("-inf"))
    logprobs = torch.log_softmax(scores, dim=-1)
    chosen = logprobs.gather(-1, position[..., None])[..., 0]
    probs = logprobs.exp()
    # 0 · log 0 = 0, and the gradient of -inf would be NaN even where it is not chosen
    safe = logprobs if legal is None else logprobs.masked_fill(~legal, 0.0)
    return chosen, -torch.where(probs > 0, probs * safe, 0.0).sum(-1)


def _pick(table: Tensor, ids: Tensor, dim: int) -> Tensor:
    """`table` at `ids` along `dim`; a view where the ids are consecutive."""
    first, last = int(ids[0]), int(ids[-1])
    if last - first + 1 == len(ids):
        return table.narrow(dim, first, len(ids))
    return table.index_select(dim, ids)
