"""Co-training: vision-language rows (captions, questions and answers, pointing) beside the action rows, so that the policy
keeps its model's language (RT-2, arXiv 2307.15818 §3.2; JARVIS-VLA, arXiv 2503.16365).

`vl_sources` says where rows come from, `vl_rows` what they say. The loss is the cross-entropy of the answer's tokens and the
end of text, teacher-forced, over the whole vocabulary; its mean over the tokens of a step's rows is added to the action loss
with the weight `vl_weight`. Which rows a step has depends on (seed, step) alone.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator

from vla.finetune.data.vl_rows import VlRow, VlSource
from vla.finetune.data.vl_sources import open_vl_source
from vla.finetune.sft_batch import sum_over_ranks
from vla.finetune.sft_launch import accumulating
from vla.finetune.sft_settings import Settings
from vla.inputs import prepare_image
from vla.policy import LocalPolicy
from vla.tokenizers.rows import padded
from vla.types import problem

PERIOD = 1000
"""Of so many rows in a row, each source gives its exact share."""


class Mixture:
    """An endless stream of rows of several sources: row k of the stream is the same whoever asks, and whenever.

    Args:
        weights: of all rows, the share weight / sum of weights comes from a source; () for equal shares.
    """

    def __init__(self, sources: Sequence[VlSource], weights: Sequence[float], seed: int) -> None:
        share = np.array(weights or [1.0] * len(sources), np.float64)
        if share.shape != (len(sources),) or not np.isfinite(share).all() or (share <= 0).any():
            raise problem(f"vl_weights {list(weights)}", f"{len(sources)} numbers above 0, one per source",
                          "correct --vl-weights")  # fmt: skip
        self.sources, self.seed = list(sources), seed
        exact = PERIOD * share / share.sum()
        self._quota = np.floor(exact).astype(np.int64)
        largest_remainders = np.argsort(self._quota - exact, kind="stable")[: PERIOD - self._quota.sum()]
        self._quota[largest_remainders] += 1
        if not self._quota.all():
            raise problem(f"vl_weights {list(weights)}", f"shares of at least 1/{PERIOD}", "raise the smallest")
        self._block: tuple[int, np.ndarray, np.ndarray] | None = None

    def place(self, k: int) -> tuple[int, int]:
        """Which source row `k` of the stream comes from, and which of its draws it is."""
        block, at = divmod(k, PERIOD)
        if self._block is None or self._block[0] != block:
            order, before = self._order(block), np.zeros(PERIOD, np.int64)
            for s, n in enumerate(self._quota.tolist()):
                before[order == s] = np.arange(n) + block * n
            self._block = block, order, before
        return int(self._block[1][at]), int(self._block[2][at])

    def _order(self, block: int) -> np.ndarray:
        """int64 (PERIOD,): the source of each row; a source's rows are spread evenly, each at random within its stretch, so
        that few rows in a row have about its share too."""
        rng = np.random.default_rng([self.seed, block, 2])
        times = np.concatenate([(np.arange(n) + rng.random(n)) / n for n in self._quota.tolist()])
        return np.repeat(np.arange(len(self._quota)), self._quota)[np.argsort(times, kind="stable")]

    def row(self, k: int) -> tuple[int, VlRow]:
        """Row `k` of the stream, and its source."""
        source, draw = self.place(k)
        return source, self.sources[source].row(draw)


def open_mixture(settings: Settings) -> Mixture:
    """The rows of `--vl-data`. Opening tells what is wrong with them.

    Raises:
        VlaError: as `open_vl_source`, and for weights that are no shares.
    """
    sources = [open_vl_source(text, settings.seed + n) for n, text in enumerate(settings.vl_data)]
    seen = Counter[str]()
    for source in sources:
        seen[source.name] += 1
        if seen[source.name] > 1:
            source.name = f"{source.name}-{seen[source.name]}"
    return Mixture(sources, settings.vl_weights, settings.seed)


class CoTraining:
    """The vision-language part of every optimiser step."""

    def __init__(self, settings: Settings, policy: LocalPolicy, model: Any, mixture: Mixture | None = None) -> None:
        self.settings, self.policy, self.model = settings, policy, model
        self.mixture = mixture or open_mixture(settings)
        self.names = [source.name for source in self.mixture.sources]
        self._image = dataclasses.replace(policy.spec.image, rotation_deg=0, crop_area=1.0, jpeg_quality=None)

    def rows(self, step: int, rank: int = 0, world: int = 1) -> list[tuple[int, VlRow]]:
        """This process's rows of a step with their sources; those of all processes together are the next of the stream."""
        n = self.settings.vl_batch_size * self.settings.grad_accumulation * world
        return [self.mixture.row(k) for k in range(step * n + rank, step * n + n, world)]

    def backward(self, accelerator: Accelerator, step: int) -> dict[str, float]:
        """Add the gradients of this process's rows, not yet averaged over processes; what to log of all rows."""
        settings, size = self.settings, self.settings.vl_batch_size
        mine = self.rows(step, accelerator.process_index, accelerator.num_processes)
        parts = [mine[start : start + size] for start in range(0, len(mine), size)]
        targets = [self._targets([row for _, row in part]) for part in parts]
        n = sum_over_ranks(accelerator, [sum(int((ids >= 0).sum()) for ids in targets)])[0]
        totals = np.zeros((len(self.names), 3))
        for part, ids in zip(parts, targets, strict=True):
            with accumulating(accelerator, self.model, last=False):
                losses, correct = self._losses([row for _, row in part], ids)
                accelerator.backward(losses.sum() * (settings.vl_weight * accelerator.num_processes / n))
            figures = torch.stack([losses.detach(), correct, (ids >= 0).sum(1).to(losses)], 1).double().cpu().numpy()
            np.add.at(totals, [source for source, _ in part], figures)
        sums = np.array(sum_over_ranks(accelerator, totals.ravel())).reshape(totals.shape)
        return self._figures(sums)

    def _figures(self, sums: np.ndarray) -> dict[str, float]:
        """Of (sources, 3): loss, correct tokens, tokens."""
        loss, correct, n = sums.sum(axis=0).tolist()
        figures = {"vl_loss": loss / n, "vl_token_accuracy": correct / n}
        if len(self.names) > 1:
            for name, (loss, correct, n) in zip(self.names, sums.tolist(), strict=True):
                if n:  # a step of few rows may have none of a source
                    figures |= {f"vl_loss/{name}": loss / n, f"vl_token_accuracy/{name}": correct / n}
        return figures

    def _targets(self, rows: list[VlRow]) -> torch.Tensor:
        """int64 (B, T): each answer's ids and the end of text, padded with -1."""
        words = self.policy.backbone.processor.tokenizer
        ids = [[*words.encode(row.answer, add_special_tokens=False), words.eos_token_id] for row in rows]
        return torch.from_numpy(padded(ids)).to(self.policy.backbone.device)

    def _losses(self, rows: list[VlRow], ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(B,) each: sums of token losses, and tokens that the model would have chosen."""
        backbone = self.policy.backbone
        pictures = [[prepare_image(row.pixels(), self._image)] for row in rows]
        inputs = backbone.encode([row.question for row in rows], pictures)
        logits = backbone.action_logits(inputs, ids, model=self.model).float()
        losses = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), ids.flatten(), ignore_index=-1, reduction="none"
        ).view_as(ids)
        return losses.sum(1), (logits.detach().argmax(-1) == ids).sum(1).to(losses)
