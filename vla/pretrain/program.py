"""Pretrain the built-in VLM on rendered pictures: `vla pretrain --out-dir runs/tiny`.

Each picture comes with several questions in one sequence. A question sees the picture and itself, never the other
questions (block attention mask, positions start anew), so training matches asking one question at a time; the loss is on
the answers. Number answers are learned as a narrow Gaussian over neighbouring numbers instead of one class.

A linear head on the projected image tokens regresses the same facts during training (`vision_weight`) and is thrown
away: it gives the CNN and the projector a direct signal. What is exported is a running mean of the weights.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from transformers import AutoModelForImageTextToText, AutoProcessor, FastVlmForConditionalGeneration

from vla.files import append_jsonl, write_bytes, write_json
from vla.pretrain.batch import (
    IGNORE,
    N_REGRESSED,
    Packer,
    PictureData,
    answer_loss,
    block_mask,
    pixels,
    regression_targets,
)
from vla.pretrain.data import COLOURS, TASKS, render_all
from vla.pretrain.eval import evaluate
from vla.pretrain.model import N_IMAGE_TOKENS, build_model, build_processor, build_tokenizer
from vla.pretrain.text import Turn, make_turns
from vla.progress import Progress
from vla.types import problem


@dataclass(frozen=True)
class Settings:
    """Pretrain the built-in VLM (about an hour on two cores)."""

    data_dir: Path = Path("runs/tiny-data")
    """Where the rendered pictures are, or go."""
    out_dir: Path = Path("runs/tiny")
    """Where checkpoints, metrics and `model/`, the exported VLM, go."""
    images: int = 26_000
    """Pictures to train on."""
    heldout_images: int = 1000
    """Pictures of other episodes for the figures."""
    processes: int = 2
    """Processes that render."""
    steps: int = 3000
    """Optimizer steps."""
    batch_size: int = 24
    """Pictures per step."""
    asked: int = 10
    """How many of them the decoder is asked about; all go through the regression head. Seeing is the slower to learn."""
    turns: int = 8
    """Questions per picture that is asked about."""
    lr: float = 5e-4
    """Of the decoder and the projector; constant after warm-up, then linear to 0 over the second half of the steps."""
    vision_lr: float = 2e-4
    """Of the CNN; half of it for the regression head, which has 6400 inputs and is the first to become noisy."""
    warmup_steps: int = 100
    """Linear warm-up."""
    vision_steps: int = 300
    """First steps with the regression head alone, so that the decoder starts on useful features."""
    vision_weight: float = 1.0
    """Weight of the regression head's loss."""
    smoothing: float = 1.5
    """Standard deviation of a number's target, in numbers; 0 is plain cross-entropy."""
    bf16: bool = True
    """Autocast; twice as fast where the processor has bfloat16 instructions."""
    threads: int = 2
    """torch threads."""
    save_every_steps: int = 200
    """Checkpoint and export."""
    eval_images: int = 20
    """Held-out pictures asked every kind of question at each save; 0 asks none."""
    final_eval_images: int = 300
    """The same, at the end."""
    seed: int = 0
    """Of the starting weights and the order of pictures and questions."""
    resume: bool = False
    """Continue from the last checkpoint in out_dir."""
    dry_run: bool = False
    """Print the settings, then stop."""

    def __post_init__(self) -> None:
        if not 1 <= self.asked <= self.batch_size:
            raise problem(f"asked {self.asked}", f"1 to batch_size = {self.batch_size}", "correct --asked")


def run(settings: Settings) -> dict[str, Any]:
    """Render what is missing, train, export to `out_dir/model`; returns the held-out figures."""
    if settings.dry_run:
        print(json.dumps(asdict(settings), indent=2, default=str))
        return {}
    state_dir = settings.out_dir / "checkpoint"
    if settings.resume != state_dir.exists():
        got = "no checkpoint" if settings.resume else "a checkpoint"
        raise problem(f"{got} in {settings.out_dir}", "one to continue, or none", "use or leave out --resume")
    torch.set_num_threads(settings.threads)
    rendering = render_all(settings.data_dir, settings.images, settings.heldout_images, settings.processes)
    for done, total in rendering:
        print(f"rendered {done}/{total} chunks", flush=True)
    data = PictureData(settings.data_dir, "train")
    heldout = PictureData(settings.data_dir, "heldout")
    trainer = Trainer(settings)
    write_json(settings.out_dir / "settings.json", asdict(settings))
    if settings.resume:
        trainer.load(state_dir)
    else:
        trainer.export(settings.out_dir / "model")
    with Progress("pretrain", settings.steps, done=trainer.step) as progress:
        while trainer.step < settings.steps:
            row = trainer.train_step(data)
            progress.advance(1, f"loss {row['loss']:.3f}")
            if trainer.step % 20 == 0:
                append_jsonl(settings.out_dir / "metrics.jsonl", row)
            if trainer.step % settings.save_every_steps == 0:
                trainer.save(state_dir)
                trainer.export(settings.out_dir / "model")
                if settings.eval_images:
                    figures = evaluate(trainer.mean, trainer.processor, heldout, settings.eval_images)
                    append_jsonl(settings.out_dir / "metrics.jsonl", {"step": trainer.step, "heldout": figures})
    trainer.export(settings.out_dir / "model")
    model = AutoModelForImageTextToText.from_pretrained(settings.out_dir / "model", dtype=torch.float32)
    processor = AutoProcessor.from_pretrained(settings.out_dir / "model")
    figures = {
        "heldout": evaluate(model, processor, heldout, settings.final_eval_images),
        "blind": evaluate(model, processor, heldout, settings.final_eval_images, blind=True),
    }
    write_json(settings.out_dir / "heldout.json", figures)
    return figures


class Trainer:
    """Model, running mean of its weights, regression head and optimizer; all of it is in the checkpoint."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.step = 0
        tokenizer = build_tokenizer()
        self.processor = build_processor(tokenizer)
        self.packer = Packer(tokenizer)
        self.first_number = tokenizer.get_vocab()["Ġ0"]
        self.model: Any = build_model(tokenizer, settings.seed)
        self.mean: Any = build_model(tokenizer, settings.seed)
        cnn = self.model.model.vision_tower
        cnn.to(memory_format=torch.channels_last)
        width = N_IMAGE_TOKENS * self.model.config.text_config.hidden_size
        self.head = torch.nn.Linear(width, N_REGRESSED + len(TASKS) + 2 * (len(COLOURS) + 1))
        self.head.weight.data.mul_(0.1)
        vision = list(cnn.parameters())
        known = {id(p) for p in vision}
        rest = [p for p in self.model.parameters() if id(p) not in known]
        head = list(self.head.parameters())
        self.parameters = vision + rest + head
        rates = (settings.vision_lr, settings.lr, 0.5 * settings.vision_lr)
        groups = [{"params": ps, "peak": lr} for ps, lr in zip((vision, rest, head), rates, strict=True)]
        self.optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.98), weight_decay=0.01, fused=True)

    def train_step(self, data: PictureData) -> dict[str, Any]:
        """One step; its pictures and questions depend on the seed and the step alone."""
        settings, start = self.settings, time.monotonic()
        rng = np.random.default_rng([settings.seed, self.step])
        only_vision = self.step < settings.vision_steps
        size = settings.batch_size
        rows = rng.integers(min(len(data), settings.images), size=size)
        facts = data.facts[rows]
        gain = rng.uniform(0.85, 1.15, size=(size, 1, 1, 1)), rng.uniform(-0.1, 0.1, size=(size, 1, 1, 1))
        gain = [torch.from_numpy(g).float() for g in gain]
        values = pixels(data.images(rows.tolist())) * gain[0] + gain[1]
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak"] * lr_share(self.step, settings)
        with torch.autocast("cpu", torch.bfloat16, enabled=settings.bf16):
            features = self.model.model.get_image_features(pixel_values=values, return_dict=True).pooler_output
            vision = self._vision_loss(features, facts)
            answers = torch.zeros(())
            if not only_vision:
                turns = [make_turns(fact, rng, settings.turns) for fact in facts[: settings.asked]]
                answers = self._answer_loss(features[: settings.asked], turns)
        loss = answers + settings.vision_weight * vision
        self.optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.step += 1
        self._update_mean()
        return {
            "step": self.step, "loss": answers.item(), "vision_loss": vision.item(), "grad_norm": norm.item(),
            "lr": self.optimizer.param_groups[1]["lr"], "images_per_s": size / (time.monotonic() - start),
        }  # fmt: skip

    def _answer_loss(self, features: torch.Tensor, turns: Sequence[Sequence[Turn]]) -> torch.Tensor:
        batch = self.packer.pack(turns)
        text = self.model.model.language_model
        embeds = text.embed_tokens(batch["input_ids"])
        embeds = torch.cat([embeds[:, :1], features.to(embeds.dtype), embeds[:, len(self.packer.prefix) :]], dim=1)
        hidden = text(
            inputs_embeds=embeds, attention_mask=block_mask(batch["turn"]), position_ids=batch["position_ids"],
            use_cache=False,
        ).last_hidden_state  # fmt: skip
        asked = batch["labels"] != IGNORE
        logits = self.model.lm_head(hidden[asked])
        return answer_loss(logits, batch["labels"][asked], self.first_number, self.settings.smoothing)

    def _vision_loss(self, features: torch.Tensor, facts: np.ndarray) -> torch.Tensor:
        sizes = [N_REGRESSED, len(TASKS), len(COLOURS) + 1, len(COLOURS) + 1]
        values, *logits = self.head(features.flatten(1)).float().split(sizes, dim=1)
        targets, classes = regression_targets(facts)
        named = [F.cross_entropy(guess, classes[:, i]) for i, guess in enumerate(logits)]
        return 4 * F.l1_loss(values, targets) + 0.1 * torch.stack(named).sum()

    @torch.no_grad()
    def _update_mean(self) -> None:
        every = 4
        if self.step % every:
            return
        keep = min(0.998, (1 + self.step) / (10 + self.step)) ** every
        for mean, now in zip(self.mean.parameters(), self.model.parameters(), strict=True):
            mean.lerp_(now, 1 - keep)

    def save(self, folder: Path) -> None:
        """Everything `load` needs, as safetensors; the folder is replaced whole."""
        fresh = folder.with_name(folder.name + ".new")
        shutil.rmtree(fresh, ignore_errors=True)
        tensors = {f"head.{k}": v for k, v in self.head.state_dict().items()}
        for name, module in (("model", self.model), ("mean", self.mean)):
            tensors |= {f"{name}.{k}": v for k, v in module.named_parameters()}
        for i, p in enumerate(self.parameters):
            tensors |= {f"optimizer.{i}.{k}": v for k, v in self.optimizer.state[p].items()}
        fresh.mkdir(parents=True)
        save_file({k: v.detach().contiguous() for k, v in tensors.items()}, fresh / "state.safetensors")
        write_json(fresh / "step.json", {"step": self.step})
        shutil.rmtree(folder, ignore_errors=True)
        fresh.rename(folder)

    @torch.no_grad()
    def load(self, folder: Path) -> None:
        tensors = load_file(folder / "state.safetensors")
        self.step = json.loads((folder / "step.json").read_text())["step"]
        for name, module in (("model", self.model), ("mean", self.mean), ("head", self.head)):
            for key, parameter in module.named_parameters():
                parameter.copy_(tensors[f"{name}.{key}"])
        for i, p in enumerate(self.parameters):
            names = [name for name in ("step", "exp_avg", "exp_avg_sq") if f"optimizer.{i}.{name}" in tensors]
            for name in names:
                value = tensors[f"optimizer.{i}.{name}"]
                # The fused optimizer walks memory: moments must lie as the weight does (channels last in the CNN).
                self.optimizer.state[p][name] = value if name == "step" else torch.empty_like(p).copy_(value)

    def export(self, folder: Path) -> None:
        """The running mean in float16 with its processor; each file is replaced atomically, the weights last."""
        export(self.mean, self.processor, folder)


def lr_share(step: int, settings: Settings) -> float:
    """Share of the peak: linear warm-up, constant, linear to 0 over the second half."""
    decay = (settings.steps - step) / (0.5 * settings.steps)
    return min(1.0, (step + 1) / settings.warmup_steps, decay)


def export(model: Any, processor: Any, folder: Path) -> None:
    """Write a checkpoint that stock transformers opens, weights in float16."""
    fresh = folder.with_name(folder.name + ".new")
    shutil.rmtree(fresh, ignore_errors=True)
    half = FastVlmForConditionalGeneration(model.config)
    half.load_state_dict(model.state_dict())
    half.half().save_pretrained(fresh)
    config = json.loads((fresh / "config.json").read_text())
    for part in (config, config["text_config"], config["vision_config"]):
        part["dtype"] = "float32"  # what `from_pretrained` loads by default; only the file is in float16
    write_json(fresh / "config.json", config)
    processor.save_pretrained(fresh)
    for path in sorted(fresh.iterdir(), key=lambda p: p.suffix == ".safetensors"):
        write_bytes(folder / path.name, path.read_bytes())
    shutil.rmtree(fresh)
