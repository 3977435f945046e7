"""Co-training: vision-language rows (captions, questions and answers, pointing) beside the action rows, so that the policy
keeps its model's language (RT-2, arXiv 2307.15818 §3.2; JARVIS-VLA, arXiv 2503.16365).

A JSONL file with one row a line: {"image": "frames/0.png", "question": "what is on the table?", "answer": "a cup"}. Images lie
beside the file. The loss is the cross-entropy of the answer's tokens and the end of text, teacher-forced, over the whole
vocabulary; its mean over the tokens of a step's rows is added to the action loss with the weight `vl_weight`. Which rows a step
has depends on (seed, step) alone.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image, UnidentifiedImageError

from vla.finetune.data.chunks import epoch_order
from vla.finetune.sft_batch import sum_over_ranks
from vla.finetune.sft_settings import Settings
from vla.inputs import prepare_image
from vla.policy import LocalPolicy
from vla.tokenizers.rows import padded
from vla.types import problem


@dataclass(frozen=True)
class VlRow:
    image: Path
    question: str
    answer: str


def read_rows(path: Path) -> list[VlRow]:
    """All rows of a file.

    Raises:
        VlaError: no file, no rows, or a line that is not such a row, with its number.
    """
    if not path.is_file():
        raise problem(f"no file {path}", "JSONL with image, question and answer", "correct --vl-data")
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except json.JSONDecodeError as error:
            raise problem(f"{path} line {number}: {error}", "one JSON object a line", "correct the line") from error
        names = ("image", "question", "answer")
        texts = [value.get(name) if isinstance(value, dict) else None for name in names]
        if not all(isinstance(text, str) and text.strip() for text in texts):
            raise problem(f"{path} line {number}: {line[:80]}", "image, question and answer, texts that are not empty",
                          "correct the line")  # fmt: skip
        row = VlRow(path.parent / str(texts[0]), str(texts[1]), str(texts[2]))
        if not row.image.is_file():
            raise problem(f"{path} line {number}: no image {row.image}", "a path from the file's folder", "correct it")
        rows.append(row)
    if not rows:
        raise problem(f"{path} without a row", "at least one", "drop --vl-data")
    return rows


class CoTraining:
    """The vision-language part of every optimiser step."""

    def __init__(self, settings: Settings, policy: LocalPolicy, model: Any) -> None:
        self.settings, self.policy, self.model = settings, policy, model
        self.all = read_rows(Path(settings.vl_data))
        self._image = dataclasses.replace(policy.spec.image, rotation_deg=0, crop_area=1.0, jpeg_quality=None)

    def rows(self, step: int, n: int) -> list[VlRow]:
        """The `n` rows of a step, by all processes together: the file, shuffled anew each time it has been walked through."""
        size = len(self.all)
        orders = {
            e: epoch_order(size, self.settings.seed, e) for e in range(step * n // size, (step * n + n - 1) // size + 1)
        }
        return [self.all[orders[k // size][k % size]] for k in range(step * n, step * n + n)]

    def backward(self, accelerator: Accelerator, step: int) -> dict[str, float]:
        """Add the gradients of this process's rows, not yet averaged over processes; what to log of all rows."""
        settings, rank, world = self.settings, accelerator.process_index, accelerator.num_processes
        mine = self.rows(step, settings.vl_batch_size * settings.grad_accumulation * world)[rank::world]
        size = settings.vl_batch_size
        parts = [mine[start : start + size] for start in range(0, len(mine), size)]
        targets = [self._targets(part) for part in parts]
        n = sum_over_ranks(accelerator, [sum(int((ids >= 0).sum()) for ids in targets)])[0]
        totals = np.zeros(2)
        for part, ids in zip(parts, targets, strict=True):
            with accelerator.no_sync(self.model):
                loss, correct = self._loss(part, ids)
                accelerator.backward(loss * (settings.vl_weight * world / n))
            totals += [float(loss.detach()), correct]
        loss, correct = sum_over_ranks(accelerator, totals)
        return {"vl_loss": loss / n, "vl_token_accuracy": correct / n}

    @contextlib.contextmanager
    def _opened(self, path: Path) -> Any:
        try:
            with Image.open(path) as image:
                yield np.asarray(image.convert("RGB"))
        except (UnidentifiedImageError, OSError) as error:
            raise problem(
                f"{path}: {error}", "an image", f"replace it, or drop its row from {self.settings.vl_data}"
            ) from error

    def _picture(self, row: VlRow) -> Image.Image:
        with self._opened(row.image) as pixels:
            return prepare_image(pixels, self._image)

    def _targets(self, rows: list[VlRow]) -> torch.Tensor:
        """int64 (B, T): each answer's ids and the end of text, padded with -1."""
        words = self.policy.backbone.processor.tokenizer
        ids = [[*words.encode(row.answer, add_special_tokens=False), words.eos_token_id] for row in rows]
        return torch.from_numpy(padded(ids)).to(self.policy.backbone.device)

    def _loss(self, rows: list[VlRow], ids: torch.Tensor) -> tuple[torch.Tensor, int]:
        """(sum of token losses, tokens that the model would have chosen)."""
        backbone = self.policy.backbone
        inputs = backbone.encode([row.question for row in rows], [[self._picture(row)] for row in rows])
        logits = backbone.action_logits(inputs, ids, model=self.model).float()
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids.flatten(), ignore_index=-1, reduction="sum")
        return loss, int((logits.detach().argmax(-1) == ids).sum())
