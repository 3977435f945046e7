"""`vla finetune`: supervised LoRA fine-tuning of a vision-language model into a policy.

    vla finetune --data DATASET --out runs/sft
    vla finetune tiny-demo --data DATASET --out runs/sft
    accelerate launch -m vla.cli finetune --data DATASET --out runs/sft

Cross-entropy on the action tokens of every chunk, teacher-forced. Steps beyond the end of an episode (`is_pad`) carry no
loss. The loss of an optimiser step is the mean over the valid tokens of its *global* batch, so accumulating 8 x 1 equals
1 x 8 and N ranks equal one. A killed run continues bit for bit with `--resume`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from vla.adapters import AddedInit, PlacementKind, parameter_counts
from vla.files import append_jsonl
from vla.finetune.checkpoint import load_checkpoint, save_checkpoint, trainable
from vla.finetune.chunks import ChunkDataset, Sample
from vla.finetune.curves import plot_curves
from vla.finetune.lerobot_reader import LeRobotReader
from vla.finetune.run_folder import cut_metrics, open_run
from vla.finetune.statistics import dataset_statistics
from vla.policy import LocalPolicy, create_policy
from vla.progress import Progress
from vla.spec import ActionSpec, ImageSpec, PromptSpec
from vla.types import Observation, problem


@dataclass(frozen=True)
class Settings:
    """Settings of `vla finetune`."""

    data: tuple[Path, ...]
    """LeRobot v3.0 dataset folders; each folder's name is its unnorm_key."""
    out: Path
    """Run folder: policy/ (the result), checkpoints/, metrics.jsonl, curves.png."""
    backbone: str = "tiny"
    """'tiny', a Hub id, or a checkpoint folder that AutoModelForImageTextToText opens."""
    cameras: tuple[str, ...] = ()
    """Cameras the policy sees, in order; empty: all of the first dataset."""
    image_size_px: int = 0
    """Square size given to the model's processor; 0: 160 for tiny, else 224."""
    crop_area: float = 1.0
    """Share of the image kept by a centre crop."""
    rotation_deg: Literal[0, 90, 180, 270] = 0
    """Counter-clockwise turn of every frame, in training and in acting: 180 for data with LIBERO's own camera frames."""
    cache_images: bool = True
    """Decode every frame once, before training, and keep it in memory; else as needed. The samples are the same."""
    horizon: int = 8
    """Actions per chunk."""
    state: bool = True
    """Show the proprioceptive state in the prompt, as integers."""
    state_low: tuple[float, ...] = ()
    """Lower bound of the state text per dimension; empty: the data's minimum."""
    state_high: tuple[float, ...] = ()
    """Upper bound of the state text per dimension; empty: the data's maximum."""
    template: str = ""
    """Prompt with {instruction} and, if the state is shown, {state}; empty: OpenVLA's wording."""
    gripper_dim: int | None = -1
    """Dimension left un-normalised; -1 is the last, None normalises all."""
    gripper_convention: str = ""
    """In words, for whoever executes the actions."""
    delta: bool = True
    """The data's actions are displacements (False: absolute targets)."""
    placement: PlacementKind = "added"
    """Where action tokens sit in the vocabulary."""
    bins: int = 256
    """Bins per action dimension."""
    added_init: AddedInit = "mean"
    """How added token embeddings start; `numbers` needs a vocabulary with the integers 0..255."""
    lora_r: int = 32
    """LoRA rank."""
    lora_alpha: int = 16
    """LoRA scale numerator."""
    lora_dropout: float = 0.0
    """LoRA dropout."""
    lora_parts: tuple[Literal["llm", "projector", "vision"], ...] = ("llm", "projector")
    """Parts of the model that get LoRA layers."""
    steps: int = 2000
    """Optimiser steps."""
    batch_size: int = 16
    """Chunks per forward pass and process."""
    grad_accumulation: int = 1
    """Forward passes per optimiser step."""
    lr: float = 5e-4
    """Peak learning rate."""
    schedule: Literal["constant", "cosine"] = "cosine"
    """Learning rate after warm-up."""
    warmup_steps: int = 50
    """Linear warm-up."""
    loss_over: Literal["vocabulary", "actions"] = "vocabulary"
    """Softmax of the loss: the whole vocabulary as OpenVLA does, or the action ids alone, as acting and RL use them;
    `actions` learns faster where new tokens start far below the old ones, but needs constrained decoding."""
    weight_decay: float = 0.01
    """AdamW weight decay."""
    clip_norm: float = 1.0
    """Gradient norm limit."""
    precision: Literal["float32", "bf16"] = "float32"
    """bf16: autocast; weights stay float32."""
    device: str = "auto"
    """auto, cpu or cuda."""
    holdout_episodes: int = 2
    """Episodes per dataset kept out of training for the held-out figures."""
    eval_every_steps: int = 200
    """Held-out loss, token accuracy and L1 every so many steps."""
    save_every_steps: int = 200
    """Checkpoint every so many steps."""
    log_every_steps: int = 10
    """Metrics every so many steps."""
    seed: int = 0
    """Data order and initialisation."""
    resume: bool = False
    """Continue the run in `out`."""
    overwrite: bool = False
    """Delete what is in `out` first."""
    dry_run: bool = False
    """Show settings, parameters and one decoded batch, then stop."""

    def __post_init__(self) -> None:
        if self.resume and self.overwrite:
            raise problem("--resume and --overwrite", "one of them", "drop one")
        if min(self.steps, self.batch_size, self.grad_accumulation, self.horizon) < 1:
            raise problem("a count below 1", "steps, batch_size, grad_accumulation, horizon >= 1", "correct it")


PRESETS = {
    # make demo's recipe: built-in VLM, a few demonstrations per Meta-World task; minutes on 2 CPU cores.
    "tiny-demo": Settings(
        data=(), out=Path("runs/sft"), horizon=3, added_init="numbers", lora_r=16, lora_alpha=32, lr=3e-3, batch_size=16,
        steps=300, warmup_steps=20, loss_over="actions", state_low=(-0.5, 0.35, 0.0, 0.0), state_high=(0.5, 1.0, 0.5, 1.0),
        gripper_convention="+1 closes, -1 opens",
    ),
    # OpenVLA's LoRA recipe (vla-scripts/finetune.py): r 32, alpha 16, constant 5e-4, no warm-up, one action per query.
    "openvla-lora": Settings(
        data=(), out=Path("runs/sft"), backbone="Qwen/Qwen2.5-VL-3B-Instruct", horizon=1, state=False, lr=5e-4,
        schedule="constant", warmup_steps=0, batch_size=16, steps=50_000, precision="bf16",
        lora_parts=("llm", "projector", "vision"), crop_area=0.9, image_size_px=224, save_every_steps=5000,
    ),
    # LIBERO demonstrations of `vla data collect --suite libero_*`: two cameras, 8 state and 7 action dimensions, chunks of
    # 8 as OpenVLA-OFT. Frames are turned as its authors turn them. Needs a GPU of 24 GB or more; not measured.
    "libero": Settings(
        data=(), out=Path("runs/sft"), backbone="Qwen/Qwen2.5-VL-3B-Instruct", cameras=("agentview", "wrist"),
        rotation_deg=180, cache_images=False, horizon=8, lr=5e-4, schedule="cosine", warmup_steps=500, batch_size=16,
        steps=50_000, precision="bf16", lora_parts=("llm", "projector", "vision"), image_size_px=224,
        gripper_convention="+1 closes, -1 opens", save_every_steps=5000, eval_every_steps=1000, holdout_episodes=5,
    ),
}  # fmt: skip


def run(settings: Settings) -> Path:
    """Train, and return the policy directory."""
    dataset, statistics = _open_data(settings)
    AcceleratorState._reset_state()  # else a second run in one process could not choose another precision
    accelerator = Accelerator(
        mixed_precision="bf16" if settings.precision == "bf16" else "no", cpu=_device(settings) == "cpu"
    )
    torch.manual_seed(settings.seed)
    policy = _create(settings, dataset, statistics, str(accelerator.device))
    if settings.dry_run:
        _describe(settings, dataset, policy)
        return settings.out
    if accelerator.is_main_process:
        open_run(settings.out, settings)
    accelerator.wait_for_everyone()
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
        indices = self.dataset.indices(self.position, batch)
        mine = indices[rank::world]
        samples = [[self.dataset[i] for i in part] for part in np.array_split(mine, settings.grad_accumulation)]
        n_valid = sum(int((~s.is_pad).sum()) for part in samples for s in part) * self._tokens_per_action
        n_global = self._over_ranks([n_valid])[0]
        totals = np.zeros(3)
        for i, part in enumerate(samples):
            sync = i == len(samples) - 1
            with self._maybe_no_sync(sync):
                loss_sum, figures = self._forward(part)
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
            "step": self.step, "loss": loss / n_global, "action_token_accuracy": correct / n_global, "l1": l1 / n_global,
            "lr": lr, "grad_norm": float(torch.as_tensor(norm)), "epoch": self.position / len(self.dataset),
        }  # fmt: skip

    def _over_ranks(self, values: Sequence[float] | np.ndarray) -> list[float]:
        """Sums over all processes; float64, so that counts stay exact."""
        total = self.accelerator.reduce(torch.tensor([*values], dtype=torch.float64, device=self.accelerator.device))
        assert isinstance(total, torch.Tensor)
        return total.tolist()

    def _maybe_no_sync(self, sync: bool) -> Any:
        return contextlib.nullcontext() if sync else self.accelerator.no_sync(self.model)

    @property
    def _tokens_per_action(self) -> int:
        return self.policy.codec.n_tokens // self.policy.codec.horizon

    def _forward(self, samples: list[Sample]) -> tuple[torch.Tensor, np.ndarray]:
        """(sum of token losses, [the same, correct tokens, sum of L1 in normalised units]) over valid tokens."""
        policy = self.policy
        inputs = policy.encode([observation_of(sample) for sample in samples])
        ids = torch.cat([policy.action_token_ids(s.actions[None], s.dataset) for s in samples]).to(
            policy.backbone.device
        )
        valid = torch.tensor(np.stack([~s.is_pad for s in samples])).repeat_interleave(self._tokens_per_action, dim=1)
        valid = valid.to(ids.device)
        logits = policy.backbone.action_logits(inputs, ids, model=self.model).float()  # (B, T, V)
        legal = policy.legal_ids.to(ids.device)
        over_actions = logits[..., legal]  # (B, T, n_symbols)
        if self.settings.loss_over == "actions":
            scores, targets = over_actions, torch.searchsorted(legal, ids)
        else:
            scores, targets = logits, ids
        losses = torch.nn.functional.cross_entropy(scores.flatten(0, 1), targets.flatten(), reduction="none").view_as(
            ids
        )
        loss = torch.where(valid, losses, 0.0).sum()
        with torch.no_grad():
            predicted = legal[over_actions.argmax(-1)]  # (B, T)
            correct = ((predicted == ids) & valid).sum()
            error = np.abs(policy.codec.decode(predicted.cpu().numpy())[0] - policy.codec.decode(ids.cpu().numpy())[0])
            l1 = float(error.reshape(len(samples), -1)[valid.cpu().numpy()].sum())
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
                totals += self._forward(part)[1]
                n_valid += sum(int((~s.is_pad).sum()) for s in part) * self._tokens_per_action
        sums = self._over_ranks([*totals, n_valid])
        names = ("holdout_loss", "holdout_action_token_accuracy", "holdout_l1")
        return {"step": self.step, **{name: value / sums[3] for name, value in zip(names, sums[:3], strict=True)}}

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


def observation_of(sample: Sample) -> Observation:
    return Observation(sample.images, sample.state, sample.instruction)


def _device(settings: Settings) -> str:
    if settings.device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return settings.device


def _open_data(settings: Settings) -> tuple[ChunkDataset, dict[str, Any]]:
    if not settings.data:
        raise problem("no dataset", "at least one LeRobot dataset folder", "pass --data FOLDER")
    readers = [(root.name, LeRobotReader(root)) for root in settings.data]
    cameras = settings.cameras or tuple(readers[0][1].cameras)
    dim = readers[0][1].action_dim
    for name, reader in readers:
        if reader.action_dim != dim:
            raise problem(f"{name} with {reader.action_dim} action dimensions", f"{dim}, as {readers[0][0]} has",
                          "train on datasets with the same action space")  # fmt: skip
    gripper = dim - 1 if settings.gripper_dim == -1 else settings.gripper_dim
    statistics = {name: dataset_statistics(reader, gripper_dim=gripper) for name, reader in readers}
    dataset = ChunkDataset(
        readers, settings.horizon, cameras, seed=settings.seed, holdout_episodes=settings.holdout_episodes,
        cache_images=settings.cache_images,
    )  # fmt: skip
    return dataset, statistics


def _create(settings: Settings, dataset: ChunkDataset, statistics: dict[str, Any], device: str) -> LocalPolicy:
    reader = dataset.readers[0]
    names = tuple(reader.action_names)
    gripper = len(names) - 1 if settings.gripper_dim == -1 else settings.gripper_dim
    action = ActionSpec(
        names, settings.horizon, settings.delta, gripper, settings.gripper_convention, control_hz=reader.fps
    )
    image = ImageSpec(dataset.cameras, settings.image_size_px or (160 if settings.backbone == "tiny" else 224),
                      crop_area=settings.crop_area, rotation_deg=settings.rotation_deg)  # fmt: skip
    keys = sorted(statistics)
    return create_policy(
        settings.backbone, name=settings.out.name, action=action, image=image,
        prompt=_prompt(settings, reader), statistics=statistics, placement=settings.placement,
        bins=settings.bins, added_init=settings.added_init, unnorm_key=keys[0] if len(keys) == 1 else None,
        lora_r=settings.lora_r, lora_alpha=settings.lora_alpha, lora_dropout=settings.lora_dropout,
        lora_parts=settings.lora_parts, device=device,
    )  # fmt: skip


def _prompt(settings: Settings, reader: LeRobotReader) -> PromptSpec:
    states = reader.states() if settings.state else None
    if states is None:
        return PromptSpec(settings.template or PromptSpec.template)
    low = settings.state_low or tuple(float(x) for x in states.min(0))
    high = settings.state_high or tuple(float(x) for x in states.max(0))
    template = settings.template or "State: {state}. In: What action should the robot take to {instruction}?\nOut:"
    return PromptSpec(template, True, tuple(reader.state_names), low, high)


def _describe(settings: Settings, dataset: ChunkDataset, policy: LocalPolicy) -> None:
    trainable_count, total = parameter_counts(policy.backbone.model)
    for name, value in dataclasses.asdict(settings).items():
        print(f"  {name} = {value}")
    sample = dataset[int(dataset.indices(0, 1)[0])]
    ids = policy.action_token_ids(sample.actions[None], sample.dataset)
    print(f"data: {len(dataset)} chunks to train on, {len(dataset.holdout_indices)} held out")
    print(f"parameters: {total:,}, of which {trainable_count:,} train ({trainable_count / total:.1%})")
    inputs = policy.encode([observation_of(sample)])
    print("prompt:", policy.backbone.processor.tokenizer.decode(inputs["input_ids"][0], skip_special_tokens=True))
    print("action ids:", ids[0].tolist())
    print("decoded:", policy.normalizer.unnormalize(policy.codec.decode(ids.numpy())[0])[0].round(3).tolist())
