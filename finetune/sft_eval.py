"""Evaluation while training: held-out chunks teacher-forced and free-running, success in a simulator, the best so far."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from accelerate import Accelerator

from vla.finetune.data.chunks import Sample
from vla.finetune.sft_batch import Batches, sum_over_ranks
from vla.finetune.sft_launch import autocast_acting
from vla.finetune.sft_setup import observation_of
from vla.language_motion import motion_query
from vla.policy import LocalPolicy
from vla.rollout import run_episodes
from vla.threads import leave_cores_to
from vla.types import EpisodeRequest, Suite

FIRST_SEED = 900_000  # training data and `vla eval` use other seeds


@dataclass(frozen=True)
class Best:
    """The lowest held-out loss so far."""

    step: int = 0
    holdout_loss: float | None = None
    n_since: int = 0
    """Evaluations since then."""

    def after(self, step: int, holdout_loss: float) -> Best:
        """With one more evaluation."""
        if self.holdout_loss is None or holdout_loss < self.holdout_loss:
            return Best(step, holdout_loss)
        return Best(self.step, self.holdout_loss, self.n_since + 1)


@torch.no_grad()
def held_out_figures(batches: Batches, accelerator: Accelerator) -> dict[str, float]:
    """Teacher-forced loss, token accuracy and L1 on all held-out chunks; empty without any.

    With one token per dimension also `holdout_l1_physical/NAME`, the mean distance of each action dimension from the
    recording in the units of the data.
    """
    dataset, policy = batches.dataset, batches.policy
    indices, size = dataset.holdout_indices, batches.settings.batch_size
    if not len(indices):
        return {}
    rank, world = accelerator.process_index, accelerator.num_processes
    per_dimension, names = policy.codec.per_dimension, policy.spec.action.names
    totals, n_valid, n_targets, distance = np.zeros(3), 0, 0, np.zeros(len(names) + 1)
    for start in range(0, len(indices), size * world):
        mine = indices[start : start + size * world][rank::world]
        part = [dataset[i] for i in mine] or [dataset[indices[0]]]
        ids, valid = batches.targets(part)
        if not len(mine):  # where the model is sharded, every process must take part in every forward pass
            valid = torch.zeros_like(valid)
        found = batches.loss(part, ids, valid)
        totals = totals + found.figures
        n_valid, n_targets = n_valid + int(valid.sum()), n_targets + batches.n_targets(valid)
        if per_dimension and len(mine):
            distance += _distance(policy, part, batches.decoded(found.predicted))
    sums = sum_over_ranks(accelerator, [*totals, n_valid, n_targets, *distance])
    figures = {"holdout_loss": sums[0] / sums[4]}
    if policy.spec.says_tokens:
        figures["holdout_action_token_accuracy"] = sums[1] / sums[3]
    if per_dimension:
        figures["holdout_l1"] = sums[2] / sums[3]
        figures |= _by_name("holdout_l1_physical", names, sums[5:])
    return figures


@torch.no_grad()
def free_running_figures(batches: Batches, accelerator: Accelerator, n_samples: int) -> dict[str, float]:
    """The same on `n_samples` held-out chunks (evenly spread) that the policy decodes greedily, as it acts.

    `free_running_action_token_accuracy` counts a token as right if it is the recording's at its place;
    `free_running_l1_physical/NAME` is over rows that decode; `free_running_undecodable` is the share of the others. Empty
    with a head, of which the held-out figures are free-running already.
    """
    indices = batches.dataset.holdout_indices
    if not len(indices) or not n_samples or batches.policy.spec.head is not None:
        return {}
    dataset, policy = batches.dataset, batches.policy
    chosen = indices[np.unique(np.linspace(0, len(indices) - 1, min(n_samples, len(indices))).round().astype(int))]
    mine = chosen[accelerator.process_index :: accelerator.num_processes]
    names = policy.spec.action.names
    correct = n_valid = undecodable = 0
    distance = np.zeros(len(names) + 1)
    for start in range(0, len(mine), batches.settings.batch_size):
        part = [dataset[i] for i in mine[start : start + batches.settings.batch_size]]
        targets, valid = (x.cpu().numpy() for x in batches.targets(part))
        with autocast_acting(accelerator, batches.settings.precision):
            seen = policy.with_motions([motion_query(observation_of(s)) for s in part])
            drawn = policy.backbone.sample(policy.encode(seen), policy.codec.grammar)[0]
        rows = drawn.cpu().numpy()
        width = min(rows.shape[1], targets.shape[1])
        correct += int(((rows[:, :width] == targets[:, :width]) & valid[:, :width]).sum())
        n_valid += int(valid.sum())
        actions, ok = policy.codec.decode(rows)
        undecodable += int((~ok).sum())
        distance += _distance(policy, [s for s, fine in zip(part, ok, strict=True) if fine], actions[ok])
    sums = sum_over_ranks(accelerator, [correct, n_valid, undecodable, *distance])
    figures = {
        "free_running_action_token_accuracy": sums[0] / sums[1],
        "free_running_undecodable": sums[2] / len(chosen),
    }
    return figures | _by_name("free_running_l1_physical", names, sums[3:])


def _distance(policy: LocalPolicy, samples: Sequence[Sample], normalized: np.ndarray) -> np.ndarray:
    """float64 (D + 1,): sums of |predicted - recorded| per dimension in the data's units, and the steps summed over.

    `normalized` are the predictions, (B, H, D). Steps beyond the end of an episode are left out.
    """
    dim = policy.spec.action.dim
    total = np.zeros(dim + 1)
    for sample, actions in zip(samples, normalized, strict=True):
        predicted = policy.normalizer_of(sample.dataset).unnormalize(actions)
        total[:dim] += np.abs(predicted.astype(np.float64) - sample.actions)[~sample.is_pad].sum(axis=0)
        total[dim] += (~sample.is_pad).sum()
    return total


def _by_name(title: str, names: Sequence[str], sums: Sequence[float]) -> dict[str, float]:
    return (
        {f"{title}/{name}": value / sums[-1] for name, value in zip(names, sums[:-1], strict=True)} if sums[-1] else {}
    )


def success_figures(policy: LocalPolicy, suite: Suite, episodes_per_task: int, workers: int) -> dict[str, float]:
    """Share of episodes that succeed, over all tasks and per task; greedy, from fixed seeds. Episodes that the simulator
    spoils count neither way, and are counted."""
    requests = [EpisodeRequest(t.name, FIRST_SEED + i) for t in suite.tasks for i in range(episodes_per_task)]
    won, tried, faults = Counter[str](), Counter[str](), 0
    with leave_cores_to(workers):
        for result in run_episodes(policy, suite, requests, n_workers=workers, slots_per_worker=suite.default_slots):
            faults += result.fault is not None
            if result.fault is None:
                tried[result.request.task] += 1
                won[result.request.task] += result.success
    figures = {f"success/{task}": won[task] / n for task, n in sorted(tried.items())}
    overall = {"success": won.total() / tried.total()} if tried else {}
    return {**overall, **figures, "simulator_faults": float(faults)}
