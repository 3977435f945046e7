"""`vla finetune`: supervised LoRA fine-tuning of a vision-language model into a policy.

    vla finetune --data DATASET --out runs/sft
    vla finetune tiny-demo --data DATASET --out runs/sft
    accelerate launch -m vla.cli finetune --data DATASET --out runs/sft

Cross-entropy on the action tokens of every chunk, teacher-forced. Steps beyond the end of an episode (`is_pad`) carry no
loss, where the scheme has one token per dimension; any other scheme encodes a chunk as a whole, so there the chunk is
encoded as it is, its last action repeated to the end, and every token carries loss. The loss of an optimiser step is the
mean over the valid tokens of its *global* batch, so accumulating 8 x 1 equals 1 x 8 and N ranks equal one. A killed run
continues bit for bit with `--resume`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from vla.files import append_jsonl
from vla.finetune.augment import augment_observation, uncropped
from vla.finetune.checkpoint import load_checkpoint, save_checkpoint, trainable
from vla.finetune.chunks import ChunkDataset, Sample
from vla.finetune.curves import plot_curves
from vla.finetune.run_folder import cut_metrics, open_run
from vla.finetune.sft_settings import PRESETS, Settings
from vla.finetune.sft_setup import build_policy, describe, observation_of, open_datasets
from vla.finetune.statistics import constant_warnings
from vla.finetune.tokenizer_fit import save_tokenizer
from vla.policy import LocalPolicy
from vla.progress import Progress
from vla.spec import TOKENIZER_FOLDER, ImageSpec
from vla.tokenizers.rows import padded
from vla.tokenizers.schemes import load_tokenizer

__all__ = ["PRESETS", "Loop", "Settings", "learning_rate", "run"]


def run(settings: Settings) -> Path:
    """Train, and return the policy directory."""
    dataset, statistics = open_datasets(settings)
    AcceleratorState._reset_state()  # else a second run in one process could not choose another precision
    accelerator = Accelerator(
        mixed_precision="bf16" if settings.precision == "bf16" else "no", cpu=_device(settings) == "cpu"
    )
    torch.manual_seed(settings.seed)
    policy = build_policy(settings, dataset, statistics, str(accelerator.device))
    if settings.dry_run:
        describe(settings, dataset, policy)
        return settings.out
    if accelerator.is_main_process:
        open_run(settings.out, settings)
        save_tokenizer(policy.codec.tokenizer, settings.out / TOKENIZER_FOLDER)
        print("".join(f"note: {line}\n" for line in constant_warnings(statistics)), end="")
    accelerator.wait_for_everyone()
    if not accelerator.is_main_process:  # every rank fits its own, and a learned codec may differ between machines
        policy.codec = dataclasses.replace(policy.codec, tokenizer=load_tokenizer(settings.out / TOKENIZER_FOLDER))
    loop = Loop(settings, accelerator, dataset, policy)
    loop.train()
    target = settings.out / "policy"
    if accelerator.is_main_process:
        policy.save(target, stage="finetune", settings=dataclasses.asdict(settings))
        plot_curves(
            settings.out / "metrics.jsonl", settings.out / "curves.png",
            (("loss", "holdout_loss"), ("action_token_accuracy", "holdout_action_token_accuracy"), ("l1", "holdout_l1")),
        )  # fmt: skip
    accelerator.wait_for_everyone()
    return target


class Loop:
    """The training loop's state: what a checkpoint holds, and what moves it on."""

    def __init__(
        self, settings: Settings, accelerator: Accelerator, dataset: ChunkDataset, policy: LocalPolicy
    ) -> None:
        self.settings, self.accelerator, self.dataset, self.policy = settings, accelerator, dataset, policy
        model = policy.backbone.model
        parameters = [p for _, p in trainable(model)]
        optimizer = torch.optim.AdamW(parameters, lr=settings.lr, weight_decay=settings.weight_decay)
        self.model, self.optimizer = accelerator.prepare(model, optimizer)
        self.training_image = uncropped(policy.spec.image) if settings.augment else None
        """How training frames are given to the model; None: as frames are when the policy acts."""
        self.checkpoints = settings.out / "checkpoints"
        self.metrics = settings.out / "metrics.jsonl"
        state = load_checkpoint(self.checkpoints, model, self.optimizer.optimizer) if settings.resume else None
        self.step = state["step"] if state else 0
        self.position = state["position"] if state else 0
        """Samples consumed by all ranks together."""
        if accelerator.is_main_process:
            cut_metrics(self.metrics, self.step)
        self._stop = False

    def train(self) -> None:
        signal.signal(signal.SIGTERM, self._ask_to_stop)
        settings, first = self.settings, self.step
        started, seen = time.monotonic(), 0
        batch = settings.batch_size * settings.grad_accumulation * self.accelerator.num_processes
        with Progress("finetune", settings.steps, self.step) as progress:
            while self.step < settings.steps:
                row = self._optimizer_step(batch)
                seen += batch
                if self.step % settings.log_every_steps == 0 or self.step in (first + 1, settings.steps):
                    row["samples_per_s"] = seen / (time.monotonic() - started)
                    self._log(row)
                if self.step % settings.eval_every_steps == 0 or self.step == settings.steps:
                    self._log(self.evaluate())
                if self.step % settings.save_every_steps == 0 or self.step == settings.steps or self._stop:
                    self._save()
                progress.advance(1, f"loss {row['loss']:.3f}  token accuracy {row['action_token_accuracy']:.2f}")
                if self._stop:
                    print(f"stopped at step {self.step}; the same command with --resume continues")
                    raise SystemExit(0)

    def _optimizer_step(self, batch: int) -> dict[str, float]:
        """One optimiser step on the next `batch` samples of the stream."""
        settings, rank, world = self.settings, self.accelerator.process_index, self.accelerator.num_processes
        positions = np.arange(self.position, self.position + batch)
        mine = np.stack([self.dataset.indices(self.position, batch), positions], axis=1)[rank::world]
        samples = [
            [self._sample(int(i), int(p)) for i, p in part] for part in np.array_split(mine, settings.grad_accumulation)
        ]
        targets = [self._targets(part) for part in samples]
        n_global = self._over_ranks([float(sum(int(valid.sum()) for _, valid in targets))])[0]
        totals = np.zeros(3)
        for i, (part, target) in enumerate(zip(samples, targets, strict=True)):
            sync = i == len(samples) - 1
            with self._maybe_no_sync(sync):
                loss_sum, figures = self._forward(part, *target, self.training_image)
                # Ranks average their gradients; the loss is a sum over all of them.
                self.accelerator.backward(loss_sum * (world / n_global))
            totals += figures
        norm = self.accelerator.clip_grad_norm_([p for _, p in trainable(self.model)], settings.clip_norm)
        lr = learning_rate(settings, self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        self.position += batch
        loss, correct, l1 = self._over_ranks(totals)
        return {
            "step": self.step, "loss": loss / n_global, "action_token_accuracy": correct / n_global,
            **({"l1": l1 / n_global} if self.policy.codec.per_dimension else {}), "lr": lr, "grad_norm": float(torch.as_tensor(norm)), "epoch": self.position / self.dataset.epoch_size,
        }  # fmt: skip

    def _over_ranks(self, values: Sequence[float] | np.ndarray) -> list[float]:
        """Sums over all processes; float64, so that counts stay exact."""
        total = self.accelerator.reduce(torch.tensor([*values], dtype=torch.float64, device=self.accelerator.device))
        assert isinstance(total, torch.Tensor)
        return total.tolist()

    def _maybe_no_sync(self, sync: bool) -> Any:
        return contextlib.nullcontext() if sync else self.accelerator.no_sync(self.model)

    def _targets(self, samples: list[Sample]) -> tuple[torch.Tensor, torch.Tensor]:
        """(int64 ids (B, T) padded with -1, bool (B, T) tokens that carry loss) of a part of the batch."""
        if not samples:
            return torch.zeros((0, 1), dtype=torch.int64), torch.zeros((0, 1), dtype=torch.bool)
        rows = padded([self.policy.action_token_ids(s.actions[None], s.dataset)[0].tolist() for s in samples])
        valid = self.policy.codec.token_mask(rows, np.stack([~s.is_pad for s in samples]))
        device = self.policy.backbone.device
        return torch.from_numpy(rows).to(device), torch.from_numpy(valid).to(device)

    def _sample(self, index: int, position: int) -> Sample:
        """A sample, augmented if that is wanted: its draw depends on its position in the stream alone."""
        sample = self.dataset[index]
        if not self.settings.augment:
            return sample
        seen = augment_observation(observation_of(sample), self.policy.spec.image, self.settings.seed, position)
        return dataclasses.replace(sample, images=seen.images)

    def _forward(
        self, samples: list[Sample], ids: torch.Tensor, valid: torch.Tensor, image: ImageSpec | None = None
    ) -> tuple[torch.Tensor, np.ndarray]:
        """(sum of token losses, [the same, correct tokens, sum of L1 in normalised units]) over valid tokens.

        The L1 is that of the teacher-forced best ids. Only with one token per dimension do these decode one by one; it
        is 0 otherwise.
        """
        policy = self.policy
        inputs = policy.encode([observation_of(sample) for sample in samples], image)
        logits = policy.backbone.action_logits(inputs, ids, model=self.model).float()  # (B, T, V)
        legal = policy.legal_ids.to(ids.device)
        over_actions, open_ = logits[..., legal], policy.legal_mask(ids)  # (B, T, n_symbols)
        if open_ is not None:
            over_actions = over_actions.masked_fill(~open_, float("-inf"))
        filled = torch.where(ids < 0, legal[0], ids)  # padded places are never valid
        if self.settings.loss_over == "actions":
            scores, targets = over_actions, torch.searchsorted(legal, filled)
        else:
            scores, targets = logits, filled
        losses = torch.nn.functional.cross_entropy(scores.flatten(0, 1), targets.flatten(), reduction="none").view_as(
            ids
        )
        loss = torch.where(valid, losses, 0.0).sum()
        with torch.no_grad():
            predicted = legal[over_actions.argmax(-1)]  # (B, T)
            correct = ((predicted == ids) & valid).sum()
            l1 = 0.0
            if policy.codec.per_dimension:
                decoded, recorded = (policy.codec.decode(x.cpu().numpy())[0] for x in (predicted, ids))
                l1 = float(np.abs(decoded - recorded).reshape(len(samples), -1)[valid.cpu().numpy()].sum())
        return loss, np.array([float(loss.detach()), float(correct), l1])

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Teacher-forced loss, token accuracy and L1 on the held-out chunks; empty without any."""
        indices, size = self.dataset.holdout_indices, self.settings.batch_size
        if not len(indices):
            return {"step": self.step}
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        totals, n_valid = np.zeros(3), 0.0
        for start in range(0, len(indices), size * world):
            part = [self.dataset[i] for i in indices[start : start + size * world][rank::world]]
            if part:
                ids, valid = self._targets(part)
                totals += self._forward(part, ids, valid)[1]
                n_valid += int(valid.sum())
        sums = self._over_ranks([*totals, n_valid])
        names = ("holdout_loss", "holdout_action_token_accuracy") + ("holdout_l1",) * self.policy.codec.per_dimension
        return {"step": self.step, **{name: value / sums[3] for name, value in zip(names, sums, strict=False)}}

    def _log(self, row: dict[str, float]) -> None:
        if self.accelerator.is_main_process:
            append_jsonl(self.metrics, row)

    def _save(self) -> None:
        if self.accelerator.is_main_process:
            model = self.policy.backbone.model
            save_checkpoint(self.checkpoints, self.step, model, self.optimizer.optimizer, {"position": self.position})
        self.accelerator.wait_for_everyone()

    def _ask_to_stop(self, number: int, frame: object) -> None:
        self._stop = True


def learning_rate(settings: Settings, step: int) -> float:
    """Linear warm-up to `lr`, then constant, or half a cosine down to a tenth of it. `step` counts from 0."""
    if step < settings.warmup_steps:
        return settings.lr * (step + 1) / settings.warmup_steps
    if settings.schedule == "constant":
        return settings.lr
    share = (step - settings.warmup_steps) / max(1, settings.steps - settings.warmup_steps)
    return settings.lr * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * share)))


def _device(settings: Settings) -> str:
    if settings.device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return settings.device
