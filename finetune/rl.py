"""`vla rl`: post-training from sparse success with RIPT-VLA (arXiv 2505.17016).

    vla rl --policy runs/sft/policy --out runs/rl

G rollouts from one initial state with the current policy; reward 1 if the episode succeeds, else 0; RLOO leave-one-out
advantage A_i = R_i - mean of the others; groups with equal rewards are rejected and new ones drawn, up to a cap; PPO-clip
on the log-probability of the action tokens over the action-vocabulary slice, at the temperature they were drawn with.

Left out of the paper: the Laplace head for continuous policies (ours are tokens), padding short batches with copies (a
batch cut off by the cap stays smaller and is flagged). Differs: only executed tokens are in the loss; no KL, as there.

Each iteration's rollouts depend on (seed, iteration) and the weights alone, so a killed run repeats its last unfinished
iteration and goes on bit for bit.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import signal
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from vla.card_facts import read_facts, without_evaluations
from vla.files import append_jsonl
from vla.finetune.checkpoint import load_checkpoint, save_checkpoint, trainable
from vla.finetune.curves import plot_curves
from vla.finetune.data.group_sampler import GroupSampler, SkipMemory
from vla.finetune.rl_math import mean_metrics, policy_loss, query_mask, rloo, slice_logprobs, unit_weights
from vla.finetune.run_folder import cut_metrics, open_run
from vla.hub_policy import policy_folder
from vla.model_card import record_run
from vla.policy import LocalPolicy, load_policy
from vla.progress import Progress
from vla.rollout import run_episodes
from vla.spec import read_spec
from vla.threads import leave_cores_to
from vla.tokenizers.rows import padded
from vla.types import EpisodeRequest, EpisodeResult, Observation, Suite, problem
from vla.worker_pool import WorkerPool

MAX_DRIFT = 0.05  # |log-ratio| before any update; more means rollout and update disagree on model, crop or temperature


@dataclass(frozen=True)
class Settings:
    """Settings of `vla rl`."""

    policy: Path
    """Policy directory to start from, with its adapter."""
    out: Path
    """Run folder: policy/ (the result), checkpoints/, metrics.jsonl, curves.png."""
    suite: str = "metaworld"
    """Simulator suite."""
    tasks: tuple[str, ...] = ()
    """Tasks of the suite; empty: its default ones."""
    iterations: int = 12
    """Rollout-and-update rounds."""
    groups: int = 8
    """Groups with different rewards wanted per iteration (RIPT's B/K)."""
    group_size: int = 8
    """G, rollouts per initial state."""
    max_groups: int = 16
    """Groups drawn at most per iteration; without a cap a policy at 0 or 100 % would be sampled for ever."""
    contexts: int = 1000
    """Initial states trained on, per task: seeds first_seed .. first_seed + contexts - 1."""
    first_seed: int = 100_000
    """First training seed; evaluation seeds begin at 1,000,000."""
    skip_solved: int = 0
    """Pass over an initial state this many times after a group that succeeded throughout; 0: never."""
    temperature: float = 1.0
    """Sampling temperature of rollouts and log-probabilities."""
    n_execute: int | None = None
    """Actions of a chunk executed before the policy is asked again; default: all."""
    lr: float = 1e-4
    """Learning rate; constant after the warm-up."""
    warmup_updates: int = 0
    """Optimiser steps over which the rate rises linearly to `lr`. A fresh Adam steps by the whole rate in every
    coordinate, however noisy the gradient is (Ma and Yarats, arXiv 1910.04209)."""
    updates: int = 4
    """Optimiser steps per iteration: the accepted episodes are split into so many mini-batches."""
    epochs: int = 1
    """Passes over an iteration's episodes."""
    clip_low: float = 0.2
    """PPO clip below."""
    clip_high: float = 0.28
    """PPO clip above (DAPO's clip-higher)."""
    aggregation: Literal["token-mean", "seq-mean-token-mean", "seq-mean-token-sum"] = "seq-mean-token-mean"
    """How token losses are averaged; the default gives each episode equal weight, as RIPT does."""
    micro_batch: int = 32
    """Queries per forward pass; changes memory, not results."""
    weight_decay: float = 0.0
    """AdamW weight decay."""
    clip_norm: float = 1.0
    """Gradient norm limit."""
    workers: int = 2
    """Simulator processes; 0 runs the simulator in this one."""
    slots: int | None = None
    """Environments per process, default: as many as the suite advises; the policy sees batches of up to workers x slots."""
    max_fault_share: float = 0.2
    """Stop if more than this share of the episodes of an iteration fail in the simulator."""
    save_every: int = 1
    """Checkpoint every so many iterations."""
    device: str = "auto"
    """auto, cpu or cuda."""
    seed: int = 0
    """Choice of tasks, initial states and sampling noise."""
    resume: bool = False
    """Continue the run in `out`."""
    overwrite: bool = False
    """Delete what is in `out` first."""
    dry_run: bool = False
    """Show settings and sizes, then stop."""

    def __post_init__(self) -> None:
        if self.group_size < 2:
            raise problem(f"group_size {self.group_size}", "at least 2: RLOO compares rollouts", "raise it")
        if self.temperature <= 0:
            raise problem(f"temperature {self.temperature}", "above 0", "greedy rollouts are all the same")
        if not 1 <= self.groups <= self.max_groups:
            raise problem(
                f"groups {self.groups}, max_groups {self.max_groups}", "1 <= groups <= max_groups", "raise the cap"
            )
        if self.resume and self.overwrite:
            raise problem("--resume and --overwrite", "one of them", "drop one")


PRESETS = {
    # make demo's recipe, minutes on 2 CPU cores.
    "tiny-demo": Settings(
        policy=Path("runs/sft/policy"), out=Path("runs/rl"), groups=12, max_groups=16, lr=5e-4, warmup_updates=4,
        temperature=0.7,
    ),
    # The paper's OpenVLA-OFT numbers: 24 groups x 8, clip 0.1, one epoch, LoRA 1e-4.
    "ript": Settings(
        policy=Path("runs/sft/policy"), out=Path("runs/rl"), groups=24, max_groups=96, clip_low=0.1, clip_high=0.1,
        updates=12, skip_solved=3, micro_batch=8,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class TrainingQuery:
    """One policy call of an accepted episode, as the update needs it."""

    observation: Observation
    token_ids: np.ndarray
    """int64 (T,); T differs between queries where the tokenizer's rows do."""
    logprobs: np.ndarray
    """float32 (T,), as drawn."""
    n_executed: int
    advantage: float
    episode: int
    """Index of its episode within the iteration."""


def run(settings: Settings, suite: Suite) -> Path:
    """Train, and return the policy directory."""
    device = ("cuda" if torch.cuda.is_available() else "cpu") if settings.device == "auto" else settings.device
    head = read_spec(policy_folder(settings.policy)).head
    if head is not None:
        why = (
            "which has no distribution to sample from" if head.kind == "l1" else "not token after token as RL scores it"
        )
        raise problem(f"{settings.policy} with parallel decoding ({head.kind}), {why}", "a policy that answers token after token",
                      "fine-tune one with --head tokens, and start from that")  # fmt: skip
    policy = load_policy(settings.policy, device=device, temperature=settings.temperature, trainable=True)
    if policy.spec.backbone.weights != "adapter":
        raise problem(
            f"{settings.policy} with merged weights", "a policy with its adapter", "start from the unmerged policy"
        )
    if policy.spec.motion is not None:
        raise problem(f"{settings.policy} with language motions", "a policy that says actions only: the choice of a motion is "
                      "greedy, so it has no log-probability to learn from", "fine-tune one without --language-motion")  # fmt: skip
    if settings.dry_run:
        _describe(settings, policy, suite)
        return settings.out
    facts = without_evaluations(read_facts(policy_folder(settings.policy)))
    open_run(settings.out, settings)
    slots = suite.default_slots if settings.slots is None else settings.slots
    with contextlib.closing(WorkerPool(suite, settings.workers, slots)) as pool:
        Trainer(settings, policy, suite, pool).train()
    policy.spec = dataclasses.replace(policy.spec, temperature=settings.temperature)
    policy.save(settings.out / "policy", stage="rl", settings=dataclasses.asdict(settings))
    plot_curves(
        settings.out / "metrics.jsonl", settings.out / "curves.png",
        (("success",), ("kept", "all_equal"), ("entropy",), ("approx_kl_k3", "clip_frac_high", "clip_frac_low")),
        x="iteration",
    )  # fmt: skip
    record_run(settings.out / "policy", settings.out, facts)
    return settings.out / "policy"


class Trainer:
    """The state a checkpoint holds, and what moves it on by one iteration."""

    def __init__(self, settings: Settings, policy: LocalPolicy, suite: Suite, pool: WorkerPool) -> None:
        self.settings, self.policy, self.suite, self.pool = settings, policy, suite, pool
        parameters = [p for _, p in trainable(policy.backbone.model)]
        self.optimizer = torch.optim.AdamW(parameters, lr=settings.lr, weight_decay=settings.weight_decay)
        self.checkpoints, self.metrics = settings.out / "checkpoints", settings.out / "metrics.jsonl"
        state = load_checkpoint(self.checkpoints, policy.backbone.model, self.optimizer) if settings.resume else None
        self.iteration = state["step"] if state else 0
        self.n_updates = state["n_updates"] if state else 0
        self.memory = SkipMemory.load(state["memory"]) if state else SkipMemory(settings.skip_solved)
        self.passed_over: dict[str, list[str]] = {}
        """Group -> the solved initial states that were skipped to choose its own."""
        cut_metrics(self.metrics, self.iteration, "iteration")
        self._stop = False

    def train(self) -> None:
        signal.signal(signal.SIGTERM, self._ask_to_stop)
        settings = self.settings
        with Progress("rl", settings.iterations, self.iteration) as progress:
            while self.iteration < settings.iterations:
                row = self.iterate()
                append_jsonl(self.metrics, row)
                due = self.iteration % settings.save_every == 0 or self.iteration == settings.iterations
                if due or self._stop:
                    state = {"memory": self.memory.save(), "n_updates": self.n_updates}
                    save_checkpoint(self.checkpoints, self.iteration, self.policy.backbone.model, self.optimizer, state)
                progress.advance(1, f"success {row['success']:.2f}  groups kept {row['kept']}/{row['generated']}")
                if self._stop:
                    print(f"stopped after iteration {self.iteration}; the same command with --resume continues")
                    raise SystemExit(0)

    def iterate(self) -> dict[str, Any]:
        """Roll out, reject, update; one row of metrics."""
        started = time.monotonic()
        with leave_cores_to(self.settings.workers):
            sampler, groups = self.collect()
        rolled = time.monotonic()
        queries = training_queries([group for name, group in groups.items() if name in sampler.accepted])
        episodes = [result for group in groups.values() for result in group]
        valid = [result for result in episodes if result.fault is None]
        row = {
            "iteration": self.iteration + 1, "success": float(np.mean([r.success for r in valid])) if valid else None,
            "episodes": len(episodes), "env_steps": sum(r.n_steps for r in episodes),
            "undecodable": sum(r.undecodable for r in episodes), "faults": len(episodes) - len(valid), **sampler.counts,
            "batch_complete": sampler.complete, "queries": len(queries), **_success_by_task(valid),
        }  # fmt: skip
        row |= self.update(queries)
        self.iteration += 1
        return {**row, "rollout_s": rolled - started, "update_s": time.monotonic() - rolled}

    def collect(self) -> tuple[GroupSampler, dict[str, list[EpisodeResult]]]:
        """Groups in the order they were asked for, until enough are accepted or the cap is reached."""
        settings = self.settings
        sampler = GroupSampler(settings.groups, settings.max_groups)
        groups: dict[str, list[EpisodeResult]] = {}
        results = run_episodes(
            self.policy, self.suite, self._requests(), n_execute=settings.n_execute, ordered=True, keep_queries=True,
            max_fault_fraction=settings.max_fault_share, pool=self.pool,
        )  # fmt: skip
        with contextlib.closing(results):
            for result in results:
                name = result.request.tags["group"]
                group = groups.setdefault(name, [])
                group.append(result)
                if len(group) == settings.group_size:
                    successes, valid = [r.success for r in group], [r.fault is None for r in group]
                    sampler.offer(name, [float(success) for success in successes], valid)
                    for skipped in self.passed_over.pop(name):
                        self.memory.skip(skipped)
                    self.memory.record(f"{result.request.task}/{result.request.seed}", successes, valid)
                if sampler.done:
                    break
        return sampler, groups

    def _requests(self) -> Iterator[EpisodeRequest]:
        """G requests per group, group after group; the tasks take turns, the initial states are drawn."""
        settings, tasks = self.settings, [task.name for task in self.suite.tasks]
        for attempt in range(settings.max_groups):
            task = tasks[(self.iteration * settings.max_groups + attempt) % len(tasks)]
            seed = self._draw_context(task, attempt)
            for member in range(settings.group_size):
                key = (settings.seed, self.iteration, attempt, member)
                yield EpisodeRequest(task, seed, key, {"group": str(attempt)})

    def _draw_context(self, task: str, attempt: int) -> int:
        """An initial state's seed, passing over solved ones. Uses up their skips only when its group is judged."""
        settings = self.settings
        rng = np.random.default_rng([settings.seed, self.iteration, attempt])
        passed: list[str] = []
        while True:
            seed = settings.first_seed + int(rng.integers(settings.contexts))
            name = f"{task}/{seed}"
            if self.memory.skips_left.get(name, 0) <= passed.count(name):
                self.passed_over[str(attempt)] = passed
                return seed
            passed.append(name)

    def update(self, queries: Sequence[TrainingQuery]) -> dict[str, Any]:
        """Optimiser steps on mini-batches of whole episodes; metrics of the update, empty without queries."""
        settings = self.settings
        if not queries:
            return {}
        parts: list[dict[str, float]] = []
        norms, entropies, drift = [], [], None
        for epoch in range(settings.epochs):
            for batch in self._mini_batches(queries, epoch):
                weights = self._weights(batch)
                for start in range(0, len(batch), settings.micro_batch):
                    chunk = slice(start, start + settings.micro_batch)
                    loss, figures, entropy, gap = self._micro_loss(batch[chunk], weights[chunk])
                    if drift is None:
                        drift = gap
                        self._check_drift(drift)
                    loss.backward()
                    parts.append({**figures, "loss": float(loss.detach())})
                    entropies.append(entropy)
                parameters = [p for _, p in trainable(self.policy.backbone.model)]
                norms.append(float(torch.nn.utils.clip_grad_norm_(parameters, settings.clip_norm)))
                for group in self.optimizer.param_groups:
                    group["lr"] = self.lr()
                self.optimizer.step()
                self.optimizer.zero_grad(set_to_none=True)
                self.n_updates += 1
        return {
            **mean_metrics(parts), "loss": sum(p["loss"] for p in parts) / max(1, len(norms)), "entropy": float(np.mean(entropies)),
            "grad_norm": float(np.mean(norms)), "optimizer_steps": len(norms), "first_log_ratio_max": drift, "lr": self.optimizer.param_groups[0]["lr"],
        }  # fmt: skip

    def lr(self) -> float:
        """The rate of the next optimiser step."""
        warmup = self.settings.warmup_updates
        return self.settings.lr * (min(1.0, (self.n_updates + 1) / warmup) if warmup else 1.0)

    def _mini_batches(self, queries: Sequence[TrainingQuery], epoch: int) -> Iterator[list[TrainingQuery]]:
        """Episodes shuffled by (seed, iteration, epoch) and dealt into `updates` mini-batches."""
        episodes = sorted({query.episode for query in queries})
        rng = np.random.default_rng([self.settings.seed, self.iteration, epoch, 1])
        for part in np.array_split(rng.permutation(episodes), min(self.settings.updates, len(episodes))):
            chosen = set(part.tolist())
            yield [query for query in queries if query.episode in chosen]

    def _mask(self, batch: Sequence[TrainingQuery]) -> torch.Tensor:
        """bool (B, T): the tokens that count. One token per dimension: those of executed actions; any other scheme
        encodes a chunk as a whole, and all its tokens took part in what was executed."""
        codec = self.policy.codec
        steps = query_mask(torch.tensor([query.n_executed for query in batch]), codec.horizon, 1)[..., 0]
        return torch.from_numpy(codec.token_mask(padded([query.token_ids for query in batch]), steps.numpy()))

    def _weights(self, batch: Sequence[TrainingQuery]) -> torch.Tensor:
        numbers = {episode: i for i, episode in enumerate(sorted({query.episode for query in batch}))}
        index = torch.tensor([numbers[query.episode] for query in batch])
        return unit_weights(self._mask(batch), self.settings.aggregation, sequence_index=index)

    def _micro_loss(
        self, batch: Sequence[TrainingQuery], weights: torch.Tensor
    ) -> tuple[torch.Tensor, dict[str, float], float, float]:
        """(loss, metric sums, mean entropy, largest |log-ratio|) of some queries."""
        policy, settings = self.policy, self.settings
        device = policy.backbone.device
        ids = torch.from_numpy(padded([query.token_ids for query in batch])).to(device)
        old = torch.zeros(ids.shape)
        for row, query in zip(old, batch, strict=True):
            row[: len(query.logprobs)] = torch.from_numpy(query.logprobs)
        old, mask, weights = old.to(device), self._mask(batch).to(device), weights[:, : ids.shape[1]]
        logits = policy.backbone.action_logits(policy.encode([query.observation for query in batch]), ids)
        legal_ids, legal = policy.legal_ids.to(device), policy.legal_mask(ids)
        filled = torch.where(ids < 0, legal_ids[0], ids)  # padded places are masked below
        logp, entropy = slice_logprobs(logits, filled, legal_ids, settings.temperature, legal)
        loss, figures = policy_loss(
            logp, old, torch.tensor([query.advantage for query in batch], device=device), mask, weights.to(device),
            clip_low=settings.clip_low, clip_high=settings.clip_high,
        )  # fmt: skip
        gap = torch.where(mask, (logp.detach() - old).abs(), 0.0).max()
        return loss, figures, float(torch.where(mask, entropy.detach(), 0.0).sum() / mask.sum()), float(gap)

    def _check_drift(self, drift: float) -> None:
        if drift > MAX_DRIFT:
            raise problem(f"log-ratio {drift:.3f} before any update", f"below {MAX_DRIFT}",
                          "rollout and update disagree: check temperature, precision and image settings")  # fmt: skip

    def _ask_to_stop(self, number: int, frame: object) -> None:
        self._stop = True


def training_queries(groups: Sequence[Sequence[EpisodeResult]]) -> list[TrainingQuery]:
    """RLOO advantages over each group's valid episodes, spread over their queries."""
    queries, episode = [], 0
    for group in groups:
        rewards = [float(result.success) for result in group]
        advantages = rloo(rewards, [0] * len(group), [result.fault is None for result in group]).tolist()
        for result, advantage in zip(group, advantages, strict=True):
            if result.fault is None:
                queries += [
                    TrainingQuery(q.observation, q.chunk.token_ids, q.chunk.logprobs, q.n_executed, advantage, episode)
                    for q in result.queries
                    if q.chunk.ok
                    and q.n_executed > 0
                    and q.chunk.token_ids is not None
                    and q.chunk.logprobs is not None
                ]
                episode += 1
    return queries


def _success_by_task(results: Sequence[EpisodeResult]) -> dict[str, float]:
    tasks = sorted({result.request.task for result in results})
    return {f"success/{t}": float(np.mean([r.success for r in results if r.request.task == t])) for t in tasks}


def _describe(settings: Settings, policy: LocalPolicy, suite: Suite) -> None:
    print(json.dumps(dataclasses.asdict(settings), indent=2, default=str))
    n = sum(p.numel() for _, p in trainable(policy.backbone.model))
    print(f"trainable parameters: {n:,}; tasks: {', '.join(task.name for task in suite.tasks)}")
    print(f"per iteration: {settings.groups}-{settings.max_groups} groups x {settings.group_size} episodes, "
          f"{settings.updates * settings.epochs} optimiser steps")  # fmt: skip
