"""How well the VLM answers questions about pictures it has not seen, by kind of question."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image

from vla.pretrain.data import IMAGE_SIZE_PX, WORKSPACE_M
from vla.pretrain.text import KINDS, ONLY_IF, RELATIVE_STEP_M, Turn, make_turn

_CELL_CM = (100 * (WORKSPACE_M[1] - WORKSPACE_M[0]) / 256).tolist()
_RELATIVE_CM = [100 * RELATIVE_STEP_M] * 3
# What one step of each number is worth, for the kinds that answer with a place.
PLACE_UNITS = {
    "part_relative": _RELATIVE_CM,
    "instruction_relative": _RELATIVE_CM,
    "goal_relative": _RELATIVE_CM,
    "hand_position": _CELL_CM,
    "part_position": _CELL_CM,
    "goal_position": _CELL_CM,
    "part_pixel": [IMAGE_SIZE_PX / 256] * 2,
    "hand_pixel": [IMAGE_SIZE_PX / 256] * 2,
    "distance": [1.0],
    "percent": [1.0],
}


class Pictures(Protocol):
    facts: np.ndarray

    def __len__(self) -> int: ...

    def images(self, rows: Sequence[int]) -> np.ndarray: ...


@torch.no_grad()
def ask(model: Any, processor: Any, images: np.ndarray, questions: Sequence[str], batch_size: int = 50) -> list[str]:
    """Greedy answers, one per picture (B, 160, 160, 3) uint8 and question."""
    answers = []
    for start in range(0, len(questions), batch_size):
        part = slice(start, start + batch_size)
        texts = [prompt(processor, question) for question in questions[part]]
        pictures = [[Image.fromarray(image)] for image in images[part]]
        inputs = processor(images=pictures, text=texts, padding=True, return_tensors="pt", add_special_tokens=False)
        inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
        tokens = model.generate(**inputs, max_new_tokens=32, do_sample=False)
        new = tokens[:, inputs["input_ids"].shape[1] :]
        answers += [text.strip() for text in processor.tokenizer.batch_decode(new, skip_special_tokens=True)]
    return answers


def prompt(processor: Any, question: str) -> str:
    """The chat text of one question about one picture."""
    content = [{"type": "image"}, {"type": "text", "text": question}]
    messages = [{"role": "user", "content": content}]
    return processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)


def evaluate(
    model: Any, processor: Any, pictures: Pictures, n_images: int, *, blind: bool = False, seed: int = 0
) -> dict[str, dict[str, float]]:
    """Figures per kind over the first `n_images` pictures, one question each.

    Words: `exact`. Places: `error` (mean distance in cm; px for pixels; % for percent), and `within_1`, `within_2`: shares
    closer than 1 and 2 of that unit. An answer that is not as many numbers counts as wrong and is left out of `error`.

    Args:
        blind: every question is asked about another picture, so only what needs no picture can be right.
    """
    rng = np.random.default_rng(seed)
    figures = {}
    for kind in KINDS:
        fits = ONLY_IF.get(kind, lambda fact: True)
        rows = [row for row in range(min(n_images, len(pictures))) if fits(pictures.facts[row])]
        if not rows:
            continue
        turns = [make_turn(kind, pictures.facts[row], rng) for row in rows]
        shown = [(row + len(pictures) // 2) % len(pictures) for row in rows] if blind else rows
        answers = ask(model, processor, pictures.images(shown), [turn.question for turn in turns])
        figures[kind] = score(kind, turns, answers)
    return figures


def score(kind: str, turns: Sequence[Turn], answers: Sequence[str]) -> dict[str, float]:
    """Figures of one kind; see `evaluate`."""
    if kind not in PLACE_UNITS:
        right = [turn.answer == answer for turn, answer in zip(turns, answers, strict=True)]
        return {"n": len(turns), "exact": float(np.mean(right))}
    units = np.array(PLACE_UNITS[kind])
    errors = []
    for turn, answer in zip(turns, answers, strict=True):
        words, expected = answer.split(), np.array(turn.answer.split(), float)
        whole = len(words) == len(expected) and all(word.isdecimal() for word in words)
        errors.append(np.linalg.norm((np.array(words, float) - expected) * units) if whole else np.inf)
    found = np.array(errors)
    readable = found[np.isfinite(found)]
    return {
        "n": len(turns),
        "error": float(readable.mean()) if len(readable) else -1.0,
        "within_1": float((found < 1).mean()),
        "within_2": float((found < 2).mean()),
    }
