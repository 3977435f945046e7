"""A part of a batch of supervised fine-tuning: its samples, their targets, and the loss of each action token."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import nn

from vla.finetune.data.augment import uncropped
from vla.finetune.data.chunks import ChunkDataset, Sample
from vla.finetune.sft_parallel import parallel_loss, parallel_targets
from vla.finetune.sft_settings import Settings
from vla.finetune.sft_setup import observation_of
from vla.policy import LocalPolicy
from vla.spec import ImageSpec
from vla.tokenizers.rows import padded


@dataclass(frozen=True)
class PartLoss:
    """Over the valid tokens of a part of a batch."""

    loss: torch.Tensor
    """Sum of the token losses, with gradient, over `Batches.n_targets` tokens."""
    figures: np.ndarray
    """float64 (3,): the same sum; of the action tokens alone, how many are correct and their sum of L1 in normalised units.

    The L1 is that of the teacher-forced best ids. Only with one token per dimension do these decode one by one; it is 0
    otherwise."""
    predicted: torch.Tensor
    """int64 (B, T): teacher-forced best ids; with an L1 head float32 (B, H * D), normalised actions."""


class Batches:
    """The samples of a run as the model is given them."""

    def __init__(self, settings: Settings, dataset: ChunkDataset, policy: LocalPolicy, model: Any) -> None:
        """`model`: what is called, e.g. the wrapper of `policy.backbone.model` for data-parallel training."""
        self.settings, self.dataset, self.policy, self.model = settings, dataset, policy, model
        self.training_image = uncropped(policy.spec.image) if settings.augment else None
        """How training frames are given to the model; None: as frames are when the policy acts."""

    def targets(self, samples: list[Sample]) -> tuple[torch.Tensor, torch.Tensor]:
        """(int64 ids (B, T) padded with -1, bool (B, T) tokens that carry loss) of a part of the batch; with a head, what
        `vla.finetune.sft_parallel` says."""
        if not samples:
            return torch.zeros((0, 1), dtype=torch.int64), torch.zeros((0, 1), dtype=torch.bool)
        if self.policy.spec.head is not None:
            return parallel_targets(self.policy, samples)
        rows = padded([self.policy.action_token_ids(s.actions[None], s.dataset)[0].tolist() for s in samples])
        valid = self.policy.codec.token_mask(rows, np.stack([~s.is_pad for s in samples]))
        device = self.policy.backbone.device
        return torch.from_numpy(rows).to(device), torch.from_numpy(valid).to(device)

    def n_targets(self, valid: torch.Tensor) -> int:
        """Tokens that `loss` sums over: the valid action tokens and, with `stop_token`, one more for each row of them."""
        return int(valid.sum()) + (int(valid.any(1).sum()) if self.settings.stop_token else 0)

    def loss(
        self, samples: list[Sample], ids: torch.Tensor, valid: torch.Tensor, image: ImageSpec | None = None
    ) -> PartLoss:
        """Teacher-forced loss of `targets` ids over their valid tokens and, if it is learned, the end of the text."""
        policy, stop = self.policy, self.settings.stop_token
        inputs = policy.encode([observation_of(s) for s in samples], image, [s.dataset for s in samples])
        legal, narrow = policy.legal_ids.to(ids.device), self.settings.loss_over == "actions"
        if policy.spec.head is not None:
            return PartLoss(*parallel_loss(policy, self.model, inputs, ids, valid, narrow))
        rows = ended(ids, policy.backbone.processor.tokenizer.eos_token_id) if stop else ids
        every = policy.backbone.action_logits(
            inputs, rows, model=self.model, only_ids=legal if narrow else None
        ).float()
        logits = every[:, : ids.shape[1]]
        # (B, T, n_symbols); the logits of the other ids are not computed unless the loss is over them
        over_actions, open_ = logits if narrow else logits[..., legal], policy.legal_mask(ids)
        if open_ is not None:
            over_actions = over_actions.masked_fill(~open_, float("-inf"))
        filled = torch.where(ids < 0, legal[0], ids)  # padded places are never valid
        if narrow:
            scores, targets = over_actions, torch.searchsorted(legal, filled)
        else:
            scores, targets = logits, filled
        losses = torch.nn.functional.cross_entropy(scores.flatten(0, 1), targets.flatten(), reduction="none").view_as(
            ids
        )
        loss = torch.where(valid, losses, 0.0).sum()
        if stop:
            at_end = (torch.arange(len(ids), device=ids.device), (ids >= 0).sum(1))
            endings = torch.nn.functional.cross_entropy(every[at_end], rows[at_end], reduction="none")
            loss = loss + torch.where(valid.any(1), endings, 0.0).sum()
        with torch.no_grad():
            predicted = legal[over_actions.argmax(-1)]  # (B, T)
            correct = ((predicted == ids) & valid).sum()
            l1 = 0.0
            if policy.codec.per_dimension:
                decoded, recorded = (policy.codec.decode(x.cpu().numpy())[0] for x in (predicted, ids))
                l1 = float(np.abs(decoded - recorded).reshape(len(samples), -1)[valid.cpu().numpy()].sum())
        return PartLoss(loss, np.array([float(loss.detach()), float(correct), l1]), predicted)

    def decoded(self, predicted: torch.Tensor) -> np.ndarray:
        """float32 (B, H, D): what `PartLoss.predicted` stands for, normalised; with one token per dimension, or an L1 head."""
        if not predicted.is_floating_point():
            return self.policy.codec.decode(predicted.cpu().numpy())[0]
        action = self.policy.spec.action
        return predicted.cpu().numpy().reshape(-1, action.horizon, action.dim)


def ended(ids: torch.Tensor, eos_id: int) -> torch.Tensor:
    """Rows of ids (B, T), padded with -1, with `eos_id` after the last of each: (B, T + 1)."""
    longer = torch.cat([ids, ids.new_full((len(ids), 1), -1)], dim=1)
    return longer.scatter(1, (ids >= 0).sum(1, keepdim=True), eos_id)


def sum_over_ranks(accelerator: Accelerator, values: Sequence[float] | np.ndarray) -> list[float]:
    """Sums over all processes; float64, so that counts stay exact."""
    total = accelerator.reduce(torch.tensor([*values], dtype=torch.float64, device=accelerator.device))
    assert isinstance(total, torch.Tensor)
    return total.tolist()


def seed_step(seed: int, step: int, rank: int) -> None:
    """Every generator (python, numpy, torch on CPU and GPU) for one optimiser step of one process.

    Dropout is then a function of (seed, step, rank): a resumed run draws what the uninterrupted one drew, and nothing
    that happens between two steps can change it.
    """
    words = np.random.SeedSequence([seed, step, rank]).generate_state(2)
    number = int(words[0]) << 32 | int(words[1])
    random.seed(number)
    np.random.seed(int(words[1]))
    torch.manual_seed(number)  # CUDA as well


def activate_dropout(model: nn.Module) -> None:
    """LoRA's own dropout on; all else stays as it is when the policy acts."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Dropout) and ".lora_dropout." in name:
            module.train()


@contextlib.contextmanager
def acting(model: nn.Module) -> Iterator[None]:
    """While inside, every layer is as when the policy acts."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
