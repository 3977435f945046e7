"""From pictures and questions to tensors and losses, for `vla.pretrain.program`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from vla.pretrain.data import IMAGE_SIZE_PX, WORKSPACE_M, load_chunks
from vla.pretrain.model import N_IMAGE_TOKENS, N_NUMBERS, PIXEL_MEAN, PIXEL_STD
from vla.pretrain.text import Turn

IGNORE = -100
N_REGRESSED = 19


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
