"""`vla finetune`: supervised LoRA fine-tuning of a vision-language model into a policy.

    vla finetune --data DATASET --out runs/sft
    vla finetune tiny-demo --data DATASET --out runs/sft
    accelerate launch -m vla.cli finetune --data DATASET --out runs/sft

Cross-entropy on the action tokens of every chunk, teacher-forced. Steps beyond the end of an episode (`is_pad`) carry no
loss, where the scheme has one token per dimension; any other scheme encodes a chunk as a whole, so there the chunk is
encoded as it is, its last action repeated to the end, and every token carries loss. The loss of an optimiser step is the
mean over the valid tokens of its *global* batch, so accumulating 8 x 1 equals 1 x 8 and N ranks equal one. A killed run
continues bit for bit with `--resume`: the order of samples depends on the position in the stream alone, every random draw on
(seed, step, rank), the learning rate on the step, and the rest is in the checkpoint.
"""

from __future__ import annotations

import dataclasses
import json
import math
import signal
import time
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator

from vla.files import append_jsonl
from vla.finetune.checkpoint import (
    disk_full_said,
    load_checkpoint,
    load_weights,
    save_best,
    save_checkpoint,
    trainable,
)
from vla.finetune.curves import curves_page, plot_curves
from vla.finetune.data.chunks import ChunkDataset
from vla.finetune.data.statistics import data_hash
from vla.finetune.data.vl_data import CoTraining, Mixture, open_mixture
from vla.finetune.formats.bad_list import bad_summary, list_bad
from vla.finetune.optimizers import make_optimizer
from vla.finetune.run_folder import cut_metrics, open_run
from vla.finetune.sft_batch import Batches, acting, activate_dropout, seed_step, sum_over_ranks
from vla.finetune.sft_eval import Best, free_running_figures, held_out_figures, success_figures
from vla.finetune.sft_launch import (
    accumulating,
    acting_alone,
    is_sharded,
    make_accelerator,
    reshard,
    shape_for_launch,
    whole_number,
    whole_weights,
)
from vla.finetune.sft_memory import estimate_step, out_of_memory_said
from vla.finetune.sft_model import ready_model, restore_scaler, scaler_state
from vla.finetune.sft_motion import MotionTraining, describe_motions, label_samples, say_motions
from vla.finetune.sft_presets import PRESETS
from vla.finetune.sft_samples import Prepared, training_stream
from vla.finetune.sft_settings import Settings
from vla.finetune.sft_setup import build_policy, describe, open_datasets, show_history
from vla.finetune.sft_start import started
from vla.finetune.sft_track import Trackers, check_trackers
from vla.finetune.tokenizer_fit import save_tokenizer
from vla.model_card import record_run
from vla.policy import LocalPolicy
from vla.progress import Progress
from vla.spec import TOKENIZER_FOLDER
from vla.tokenizers.schemes import load_tokenizer
from vla.types import Suite, problem

__all__ = ["PRESETS", "Loop", "Settings", "learning_rate", "run"]


CURVES = (
    ("loss", "holdout_loss"),
    ("action_token_accuracy", "holdout_action_token_accuracy", "free_running_action_token_accuracy"),
    ("l1", "holdout_l1"),
)


def run(settings: Settings, suite: Suite | None = None) -> Path:
    """Train, and return the policy directory.

    Args:
        suite: simulator of `settings.eval_suite`; the command line supplies it.
    """
    check_trackers(settings)
    if settings.eval_suite and suite is None:
        raise problem(
            f"eval_suite {settings.eval_suite!r} without its simulator", "run(settings, suite)", "pass the suite"
        )
    mixture = open_mixture(settings) if settings.vl_data else None  # its mistakes are told before anything is loaded
    settings = started(settings)
    dataset, statistics = open_datasets(settings)
    phrases = label_samples(settings, dataset) if settings.language_motion else ()
    accelerator = make_accelerator(settings, _device(settings))
    torch.manual_seed(settings.seed)
    sharded = is_sharded(accelerator)
    with out_of_memory_said(settings, dataset):
        policy = build_policy(settings, dataset, statistics, str(accelerator.device), sharded)
    say_motions(settings, policy, phrases)
    show_history(dataset, policy.spec)
    if settings.dry_run:
        ready_model(settings, policy.backbone.model)
        describe(settings, dataset, policy)
        if settings.language_motion:
            describe_motions(dataset, policy)
        print("memory, estimated, of one process at batch_size "
              f"{settings.batch_size}:\n{estimate_step(settings, dataset, policy).table()}")  # fmt: skip
        return settings.out
    with disk_full_said(settings.out):
        if accelerator.is_main_process:
            data = {name: {"hash": data_hash(source), "revision": source.revision} for name, source in dataset.sources}
            open_run(settings.out, settings, data)
            list_bad(settings.out, dataset)
            save_tokenizer(policy.codec.tokenizer, settings.out / TOKENIZER_FOLDER)
        accelerator.wait_for_everyone()
        if not accelerator.is_main_process:  # every rank fits its own, and a learned codec may differ between machines
            policy.codec = dataclasses.replace(policy.codec, tokenizer=load_tokenizer(settings.out / TOKENIZER_FOLDER))
        loop = Loop(settings, accelerator, dataset, policy, suite, mixture)
        loop.train()
        return loop.finish()


class Loop:
    """The training loop's state: what a checkpoint holds, and what moves it on."""

    def __init__(
        self, settings: Settings, accelerator: Accelerator, dataset: ChunkDataset, policy: LocalPolicy,
        suite: Suite | None = None, mixture: Mixture | None = None,
    ) -> None:  # fmt: skip
        """`mixture`: the rows of `settings.vl_data`, if they are open already."""
        self.settings, self.accelerator, self.dataset, self.policy = settings, accelerator, dataset, policy
        self.suite = suite
        model = policy.backbone.model
        parameters = [p for _, p in trainable(model)]
        ready_model(settings, model)
        optimizer = make_optimizer(settings.optimizer, parameters, settings.lr, settings.weight_decay)
        shape_for_launch(accelerator, model)
        self.model, self.optimizer = accelerator.prepare(model, optimizer)
        self.batches = Batches(settings, dataset, policy, self.model)
        self.co_training = CoTraining(settings, policy, self.model, mixture) if settings.vl_data else None
        self.motion_training = MotionTraining(settings, self.batches, self.model) if settings.language_motion else None
        self.checkpoints = settings.out / "checkpoints"
        self.metrics = settings.out / "metrics.jsonl"
        state = load_checkpoint(self.checkpoints, model, self.optimizer.optimizer) if settings.resume else None
        self.step = state["step"] if state else 0
        self.position = state["position"] if state else 0
        """Samples consumed by all ranks together."""
        restore_scaler(accelerator, state["loss_scale"] if state else {})
        self.best = Best(**state["best"]) if state else Best()
        self.trackers: Trackers | None = None
        if accelerator.is_main_process:
            cut_metrics(self.metrics, self.step)
            self.trackers = Trackers(
                settings, self.step, json.loads(json.dumps(dataclasses.asdict(settings), default=str))
            )
        prepared = Prepared(settings, dataset, policy.spec.image)
        rank, world = accelerator.process_index, accelerator.num_processes
        batch = settings.batch_size * settings.grad_accumulation * world
        self.stream = training_stream(prepared, self.position, batch, rank, world)
        self._stop = False

    def train(self) -> None:
        signal.signal(signal.SIGTERM, self._ask_to_stop)
        activate_dropout(self.policy.backbone.model)
        settings, first = self.settings, self.step
        began, seen = time.monotonic(), 0
        batch = settings.batch_size * settings.grad_accumulation * self.accelerator.num_processes
        with Progress("finetune", settings.steps, self.step) as progress:
            while self.step < settings.steps and not self._stalled:
                with out_of_memory_said(settings, self.dataset, self.policy, self.step):
                    row = self._optimizer_step(batch)
                seen += batch
                if self.step % settings.log_every_steps == 0 or self.step in (first + 1, settings.steps):
                    row["samples_per_s"] = seen / (time.monotonic() - began)
                    self._log(row)
                self._evaluate()
                stop = sum_over_ranks(self.accelerator, [self._stop])[0] > 0  # all ranks save at the same step, or none
                if self.step % settings.save_every_steps == 0 or self.step == settings.steps or stop or self._stalled:
                    self._save()
                share = row.get("action_token_accuracy")
                progress.advance(
                    1, f"loss {row['loss']:.3f}" + ("" if share is None else f"  token accuracy {share:.2f}")
                )
                if stop:
                    self._close()
                    print(f"stopped at step {self.step}; the same command with --resume continues")
                    raise SystemExit(0)
        if self._stalled:
            print(f"stopped early at step {self.step}: the held-out loss was lowest, {self.best.holdout_loss:.4g}, at step "
                  f"{self.best.step}")  # fmt: skip

    def finish(self) -> Path:
        """Write the policy directory and the curves."""
        target, model = self.settings.out / "policy", self.policy.backbone.model
        if self.settings.policy_from == "best":
            load_weights(self.checkpoints / "best", model)
        weights = whole_weights(self.accelerator, model, self.settings.method)
        if self.accelerator.is_main_process:
            self.policy.save(target, stage="finetune", settings=dataclasses.asdict(self.settings), weights=weights)
        self._close()
        if self.accelerator.is_main_process:
            record_run(target, self.settings.out)
            print("".join(f"{line}\n" for line in bad_summary(self.settings.out)), end="")
        self.accelerator.wait_for_everyone()
        return target

    def _optimizer_step(self, batch: int) -> dict[str, float]:
        """One optimiser step on the next `batch` samples of the stream."""
        settings, world = self.settings, self.accelerator.num_processes
        seed_step(settings.seed, self.step, self.accelerator.process_index)
        batches, mine = self.batches, next(self.stream)
        parts = np.array_split(np.arange(len(mine)), settings.grad_accumulation)
        samples = [[mine[k] for k in part] for part in parts]
        targets = [batches.targets(part) for part in samples]
        counts = [[batches.n_targets(valid), int(valid.sum())] for _, valid in targets]
        n_global, n_actions = sum_over_ranks(self.accelerator, np.sum(counts, axis=0))
        lr = learning_rate(settings, self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        beside = self.co_training.backward(self.accelerator, self.step) if self.co_training else {}
        if self.motion_training:
            beside |= self.motion_training.backward(self.accelerator, samples)
        totals = np.zeros(3)
        for i, (part, target) in enumerate(zip(samples, targets, strict=True)):
            with accumulating(self.accelerator, self.model, last=i == len(samples) - 1):
                found = batches.loss(part, *target, batches.training_image)
                # Ranks average their gradients; the loss is a sum over all of them.
                self.accelerator.backward(found.loss * (world / n_global))
            totals += found.figures
        norm = self.accelerator.clip_grad_norm_([p for _, p in trainable(self.model)], settings.clip_norm or math.inf)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        self.position += batch
        loss, correct, l1 = sum_over_ranks(self.accelerator, totals)
        return {
            "step": self.step, "loss": loss / n_global, **({"action_token_accuracy": correct / n_actions} if self.policy.spec.says_tokens else {}), **beside,
            **({"l1": l1 / n_actions} if self.policy.codec.per_dimension else {}), "lr": lr, "grad_norm": whole_number(norm), "epoch": self.position / self.dataset.epoch_size,
        }  # fmt: skip

    def _evaluate(self) -> None:
        """Log whatever is due at this step, and keep the weights if they are the best."""
        settings, last = self.settings, self.step == self.settings.steps
        with acting(self.policy.backbone.model):
            if self.step % settings.eval_every_steps == 0 or last:
                figures = held_out_figures(self.batches, self.accelerator)
                if figures:
                    if self.motion_training:
                        figures |= self.motion_training.held_out_figures(self.accelerator)
                    reshard(self.model)
                    if settings.free_running_samples:
                        with acting_alone(self.accelerator, self.model):
                            figures |= free_running_figures(
                                self.batches, self.accelerator, settings.free_running_samples
                            )
                    self._log({"step": self.step, **figures})
                    self._judge(figures["holdout_loss"])
            if self.suite is not None and (self.step % settings.eval_suite_every_steps == 0 or last):
                with acting_alone(self.accelerator, self.model):
                    if self.accelerator.is_main_process:
                        figures = success_figures(
                            self.policy, self.suite, settings.eval_suite_episodes, settings.eval_suite_workers
                        )
                        self._log({"step": self.step, **figures})
                    self.accelerator.wait_for_everyone()

    def _judge(self, holdout_loss: float) -> None:
        self.best = self.best.after(self.step, holdout_loss)
        if self.best.step == self.step:
            state = {"step": self.step, "holdout_loss": holdout_loss}
            save_best(self.checkpoints, self.policy.backbone.model, state, self.accelerator.is_main_process)

    @property
    def _stalled(self) -> bool:
        return 0 < self.settings.patience <= self.best.n_since

    def _log(self, row: dict[str, float]) -> None:
        if self.trackers is not None:
            append_jsonl(self.metrics, row)
            self.trackers.log(row)

    def _save(self) -> None:
        list_bad(self.settings.out, self.dataset)  # of every rank: each has its own samples
        scale = scaler_state(self.accelerator)
        state = {"position": self.position, "best": dataclasses.asdict(self.best), "loss_scale": scale}
        save_checkpoint(
            self.checkpoints, self.step, self.policy.backbone.model, self.optimizer.optimizer, state,
            keep_last=self.settings.keep_checkpoints, write=self.accelerator.is_main_process,
        )  # fmt: skip
        self.accelerator.wait_for_everyone()

    def _close(self) -> None:
        """Curves and trackers, at the end of the run or of this part of it."""
        if self.trackers is not None:
            plot_curves(self.metrics, self.settings.out / "curves.png", CURVES)
            curves_page(self.metrics, self.settings.out / "curves.html", self.settings.out.name)
            self.trackers.close()

    def _ask_to_stop(self, number: int, frame: object) -> None:
        self._stop = True


def learning_rate(settings: Settings, step: int) -> float:
    """Linear warm-up to `lr`, then as `schedule` says. `step` counts from 0."""
    if step < settings.warmup_steps:
        return settings.lr * (step + 1) / settings.warmup_steps
    if settings.schedule == "constant":
        return settings.lr
    if settings.schedule == "step":
        return settings.lr * (settings.decay_factor if step >= settings.decay_at_step else 1.0)
    share = (step - settings.warmup_steps) / max(1, settings.steps - settings.warmup_steps)
    return settings.lr * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * share)))


def _device(settings: Settings) -> str:
    if settings.device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return settings.device
