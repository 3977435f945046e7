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
from vla.pretrain_data import COLOURS, IMAGE_SIZE_PX, TASKS, WORKSPACE_M, load_chunks, render_all
from vla.pretrain_eval import evaluate
from vla.pretrain_model import (
    N_IMAGE_TOKENS,
    N_NUMBERS,
    PIXEL_MEAN,
    PIXEL_STD,
    build_model,
    build_processor,
    build_tokenizer,
)
from vla.pretrain_text import Turn, make_turns
from vla.progress import Progress
from vla.types import problem

IGNORE = -100
N_REGRESSED = 19


@dataclass(frozen=True)
class Settings:
    """Pretrain the built-in VLM (about an hour on two cores)."""

    data_dir: Path = Path("runs/tiny-data")
    # Where the rendered pictures are, or go.
    out_dir: Path = Path("runs/tiny")
    # Where checkpoints, metrics and `model/`, the exported VLM, go.
    images: int = 40_000
    # Pictures to train on.
    heldout_images: int = 1000
    # Pictures of other episodes for the figures.
    processes: int = 2
    # Processes that render.
    steps: int = 5000
    # Optimizer steps.
    batch_size: int = 16
    # Pictures per step.
    turns: int = 9
    # Questions per picture and step.
    lr: float = 5e-4
    # Of the decoder and the projector; constant after warm-up, then linear to 0 over the second half of the steps.
    vision_lr: float = 2e-4
    # Of the CNN; half of it for the regression head, which has 6400 inputs and is the first to become noisy.
    warmup_steps: int = 100
    # Linear warm-up.
    vision_steps: int = 0
    # First steps with the regression head alone: twice as fast, and the decoder then starts on useful features.
    vision_weight: float = 1.0
    # Weight of the regression head's loss.
    smoothing: float = 1.5
    # Standard deviation of a number's target, in numbers; 0 is plain cross-entropy.
    bf16: bool = True
    # Autocast; twice as fast where the processor has bfloat16 instructions.
    threads: int = 2
    # torch threads.
    save_every_steps: int = 500
    # Checkpoint and export.
    eval_images: int = 150
    # Held-out pictures asked at each save; the last evaluation asks all.
    seed: int = 0
    # Of the starting weights and the order of pictures and questions.
    resume: bool = False
    # Continue from the last checkpoint in out_dir.
    dry_run: bool = False
    # Print the settings and sizes, then stop.


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
        "heldout": evaluate(model, processor, heldout, settings.heldout_images),
        "blind": evaluate(model, processor, heldout, settings.heldout_images, blind=True),
    }
    write_json(settings.out_dir / "heldout.json", figures)
    return figures


class PictureData:
    """Rendered chunks of one split."""

    def __init__(self, data_dir: Path, split: str) -> None:
        self._chunks, self.facts = load_chunks(data_dir, split)
        self._ends = np.cumsum([len(chunk) for chunk in self._chunks])

    def __len__(self) -> int:
        return len(self.facts)

    def images(self, rows: Sequence[int]) -> np.ndarray:
        """uint8 (B, 160, 160, 3)."""
        chunks = [int(np.searchsorted(self._ends, row, side="right")) for row in rows]
        return np.stack([self._chunks[c][row - self._ends[c]] for c, row in zip(chunks, rows, strict=True)])


def pixels(images: np.ndarray) -> torch.Tensor:
    """uint8 (B, h, w, 3) -> float32 (B, 3, h, w), as the processor normalises them; channels last in memory."""
    values = torch.from_numpy(images).permute(0, 3, 1, 2).float()
    return ((values / 255 - PIXEL_MEAN) / PIXEL_STD).contiguous(memory_format=torch.channels_last)


class Packer:
    """Questions of one picture -> token ids, labels, positions and the number of the question they belong to."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        names = ("<bos>", "<image>", "<|user|>", "<|assistant|>", "<eos>")
        self._bos, self._image, self._user, self._assistant, self._eos = tokenizer.convert_tokens_to_ids(list(names))
        self.prefix = [self._bos] + [self._image] * N_IMAGE_TOKENS

    def pack(self, rows: Sequence[Sequence[Turn]]) -> dict[str, torch.Tensor]:
        """int64 (B, T) `input_ids`, `labels` (already shifted: the token to predict), `position_ids`, `turn`."""
        texts = [" " + text for row in rows for turn in row for text in (turn.question, turn.answer)]
        encoded = iter(self._tokenizer(texts, add_special_tokens=False)["input_ids"])
        sequences = []
        for row in rows:
            tokens, labels, positions = list(self.prefix), [IGNORE] * len(self.prefix), list(range(len(self.prefix)))
            owner = [-1] * len(self.prefix)
            for number, _ in enumerate(row):
                question, answer = next(encoded), next(encoded)
                turn = [self._user, *question, self._assistant, *answer]
                tokens += turn
                labels += [IGNORE] * (len(question) + 1) + [*answer, self._eos]
                positions += range(len(self.prefix), len(self.prefix) + len(turn))
                owner += [number] * len(turn)
            sequences.append((tokens, labels, positions, owner))
        length = max(len(sequence[0]) for sequence in sequences)
        columns = []
        for values, fill in zip(zip(*sequences, strict=True), (self._eos, IGNORE, 0, -2), strict=True):
            columns.append(torch.tensor([v + [fill] * (length - len(v)) for v in values]))
        return dict(zip(("input_ids", "labels", "position_ids", "turn"), columns, strict=True))


def block_mask(turn: torch.Tensor) -> torch.Tensor:
    """bool (B, 1, T, T), True where row may look at column: earlier, and the picture or the same question."""
    causal = torch.ones(turn.shape[1], turn.shape[1], dtype=torch.bool).tril()
    same = turn[:, :, None] == turn[:, None, :]
    return ((same | (turn == -1)[:, None, :]) & causal)[:, None]


def answer_loss(logits: torch.Tensor, targets: torch.Tensor, first_number: int, smoothing: float) -> torch.Tensor:
    """Cross-entropy of (n, V) logits with (n,) ids; a number's target is spread over its neighbours."""
    logprobs = F.log_softmax(logits.float(), dim=-1)
    value = targets - first_number
    is_number = (value >= 0) & (value < N_NUMBERS) & (smoothing > 0)
    words = -logprobs[~is_number].gather(1, targets[~is_number, None]).sum()
    distance = torch.arange(N_NUMBERS)[None] - value[is_number, None]
    spread = torch.softmax(-0.5 * (distance / max(smoothing, 1e-6)) ** 2, dim=-1)
    numbers = -(spread * logprobs[is_number, first_number : first_number + N_NUMBERS]).sum()
    return (words + numbers) / len(targets)


def regression_targets(facts: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    """float32 (B, 19), each about one wide, and int64 (B, 3) classes: task, object colour, table colour."""
    low, high = WORKSPACE_M
    points = [(facts[name] - low) / (high - low) for name in ("hand", "part", "goal")]
    places = [facts[f"{name}_px"] / IMAGE_SIZE_PX for name in ("hand", "part", "goal")]
    values = [*points, 2 * (facts["part"] - facts["hand"]), *places, facts["opening"][:, None]]
    classes = np.stack([facts["task"], facts["colour"] + 1, facts["table_colour"] + 1], axis=1)
    return torch.from_numpy(np.concatenate(values, axis=1)).float(), torch.from_numpy(classes.astype(np.int64))


class Trainer:
    """Model, running mean of its weights, regression head and optimizer; all of it is in the checkpoint."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.step = 0
        tokenizer = build_tokenizer()
        self.processor = build_processor(tokenizer)
        self.packer = Packer(tokenizer)
        self.first_number = int(tokenizer.convert_tokens_to_ids("Ġ0"))
        self.model = build_model(tokenizer, settings.seed)
        self.mean = build_model(tokenizer, settings.seed)
        cnn: Any = self.model.model.vision_tower
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
        size = settings.batch_size * (2 if only_vision else 1)
        rows = rng.integers(len(data), size=size)
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
                answers = self._answer_loss(features, [make_turns(fact, rng, settings.turns) for fact in facts])
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
        text: Any = self.model.model.language_model
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
        torch._foreach_lerp_(list(self.mean.parameters()), list(self.model.parameters()), 1 - keep)

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


def export(model: FastVlmForConditionalGeneration, processor: Any, folder: Path) -> None:
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
