"""Language motions in `vla finetune`: the labels of the samples, and the loss of the motion query (RT-H, arXiv 2403.01823).

Every sample is trained on twice: its motion query, answered with its phrase and the end of text, and its action query, which
holds the phrase that was recorded. The motion loss is the mean over the tokens of all phrases of an optimiser step, over the
whole vocabulary; it is added to the loss of the actions with the weight `motion_weight`. RT-H mixes the two half and half.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator

from vla.finetune.data.chunks import ChunkDataset, Sample
from vla.finetune.data.language_motion import Labels, MotionRule, all_phrases, label_frames
from vla.finetune.sft_batch import Batches, sum_over_ranks
from vla.finetune.sft_launch import accumulating
from vla.finetune.sft_settings import Settings
from vla.finetune.sft_setup import observation_of
from vla.language_motion import motion_query, phrase_ids
from vla.motion_spec import MotionSpec, motion_template
from vla.policy import LocalPolicy
from vla.spec import ImageSpec
from vla.tokenizers.rows import padded
from vla.types import problem


@dataclass(frozen=True)
class _PhraseOf:
    """(Source, frame) -> phrase; picklable, for the processes that prepare samples."""

    labels: tuple[Labels, ...]

    def __call__(self, source: int, frame: int) -> str:
        one = self.labels[source]
        return one.phrases[one.of_frame[frame]]


def label_samples(settings: Settings, dataset: ChunkDataset) -> tuple[str, ...]:
    """Give the samples their motions. The phrases that occur, held-out episodes included, the most frequent first."""
    rule = MotionRule(
        settings.motion_lookahead or settings.horizon, settings.motion_threshold, settings.delta, settings.motion_words
    )
    told = settings.gripper_dim if settings.gripper_dim is not None and settings.gripper_dim >= 0 else None
    labels = tuple(label_frames(source, rule, told, settings.gripper_convention) for source in dataset.readers)
    dataset.show_motions(_PhraseOf(labels))
    return all_phrases(labels)


def say_motions(settings: Settings, policy: LocalPolicy, phrases: Sequence[str]) -> None:
    """Make a new policy one that says a motion first. One that does already keeps its queries and learns new phrases.

    Raises:
        VlaError: a policy with language motions whose training goes on without them.
    """
    before = policy.spec.motion
    if not settings.language_motion:
        if before is not None:
            raise problem("a policy with language motions, without --language-motion", "both",
                          "pass --language-motion, or start from another policy")  # fmt: skip
        return
    template = policy.spec.prompt.template
    if before is None:
        motion = MotionSpec(
            tuple(phrases), settings.motion_template or motion_template(template), lookahead=settings.motion_lookahead,
            threshold=settings.motion_threshold, words=settings.motion_words,
        )  # fmt: skip
    else:
        motion = dataclasses.replace(before, phrases=tuple(dict.fromkeys([*before.phrases, *phrases])))
    policy.spec = dataclasses.replace(policy.spec, motion=motion)
    policy.phrases  # noqa: B018 - phrases that the backbone cannot tell apart are told now


class MotionTraining:
    """The motion query's part of every optimiser step."""

    def __init__(self, settings: Settings, batches: Batches, model: Any) -> None:
        self.settings, self.batches, self.policy, self.model = settings, batches, batches.policy, model

    def backward(self, accelerator: Accelerator, parts: Sequence[list[Sample]]) -> dict[str, float]:
        """Add the gradients of this process's samples, not yet averaged over processes; what to log of all."""
        targets = [self._targets(part) for part in parts]
        counts = [sum(int((ids >= 0).sum()) for ids in targets), sum(len(part) for part in parts)]
        n_tokens, n_samples = sum_over_ranks(accelerator, counts)
        scale = self.settings.motion_weight * accelerator.num_processes / n_tokens
        totals = np.zeros(3)
        for part, ids in zip(parts, targets, strict=True):
            with accumulating(accelerator, self.model, last=False):
                loss, figures = self._loss(part, ids, self.batches.training_image)
                accelerator.backward(loss * scale)
            totals += figures
        loss, correct, whole = sum_over_ranks(accelerator, totals)
        return {
            "motion_loss": loss / n_tokens, "motion_token_accuracy": correct / n_tokens,
            "motion_accuracy": whole / n_samples,
        }  # fmt: skip

    @torch.no_grad()
    def held_out_figures(self, accelerator: Accelerator) -> dict[str, float]:
        """The same on all held-out samples; empty without any."""
        dataset, size = self.batches.dataset, self.settings.batch_size
        indices, rank, world = dataset.holdout_indices, accelerator.process_index, accelerator.num_processes
        if not len(indices):
            return {}
        totals = np.zeros(5)
        for start in range(0, len(indices), size * world):
            mine = indices[start : start + size * world][rank::world]
            part = [dataset[i] for i in mine] or [dataset[indices[0]]]
            ids = self._targets(part)
            figures = self._loss(part, ids)[1]
            if len(mine):  # where the model is sharded, every process must take part in every forward pass
                totals += [*figures, int((ids >= 0).sum()), len(part)]
        loss, correct, whole, n_tokens, n_samples = sum_over_ranks(accelerator, totals)
        return {
            "holdout_motion_loss": loss / n_tokens, "holdout_motion_token_accuracy": correct / n_tokens,
            "holdout_motion_accuracy": whole / n_samples,
        }  # fmt: skip

    def _targets(self, samples: list[Sample]) -> torch.Tensor:
        """int64 (B, T): each phrase's ids and the end of text, padded with -1."""
        rows = padded([phrase_ids(self.policy.backbone, sample.motion) for sample in samples])
        return torch.from_numpy(rows).to(self.policy.backbone.device)

    def _loss(
        self, samples: list[Sample], ids: torch.Tensor, image: ImageSpec | None = None
    ) -> tuple[torch.Tensor, np.ndarray]:
        """(sum of token losses; float64 (3,): the same, correct tokens, phrases all of whose tokens are)."""
        if not samples:
            return torch.zeros((), device=ids.device, requires_grad=True), np.zeros(3)
        inputs = self.policy.encode([motion_query(observation_of(sample)) for sample in samples], image)
        logits = self.policy.backbone.action_logits(inputs, ids, model=self.model).float()
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids.flatten(), ignore_index=-1, reduction="sum")
        right = (logits.detach().argmax(-1) == ids) | (ids < 0)
        n_correct, n_whole = int((right & (ids >= 0)).sum()), int(right.all(1).sum())
        return loss, np.array([float(loss.detach()), n_correct, n_whole])


def describe_motions(dataset: ChunkDataset, policy: LocalPolicy) -> None:
    """Print the motion query and its answer for the first sample of the run."""
    assert policy.spec.motion is not None
    sample = dataset[int(dataset.indices(0, 1)[0])]
    inputs = policy.encode([motion_query(observation_of(sample))])
    words = policy.backbone.processor.tokenizer.decode(inputs["input_ids"][0], skip_special_tokens=True)
    phrases = policy.spec.motion.phrases
    print(f"language motions: {len(phrases)}, most often {'; '.join(phrases[:4])}")
    print(f"motion query: {words} -> {sample.motion}")
