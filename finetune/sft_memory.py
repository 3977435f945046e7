"""What a run of `vla finetune` will need in memory, and what to change when that is too much."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator

import torch
from torch import nn

from vla.finetune.data.augment import uncropped
from vla.finetune.data.chunks import ChunkDataset
from vla.finetune.optimizers import state_bytes, update_bytes
from vla.finetune.sft_model import out_of_memory
from vla.finetune.sft_settings import Settings
from vla.finetune.sft_setup import observation_of
from vla.gradient_checkpoint import checkpoint_layers
from vla.kbit import packed_bytes
from vla.memory import GB, MemoryEstimate, estimate, trained_sizes
from vla.policy import LocalPolicy
from vla.tokenizers.rows import padded
from vla.types import problem

AUTOCAST = {"float32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def estimate_step(settings: Settings, dataset: ChunkDataset, policy: LocalPolicy) -> MemoryEstimate:
    """Peak of one process, on the first samples of the run; the model must have its gradient checkpointing already."""
    samples = [dataset[int(i)] for i in dataset.indices(0, settings.batch_size)]
    ids = padded([policy.action_token_ids(s.actions[None], s.dataset)[0].tolist() for s in samples])
    image = uncropped(policy.spec.image) if settings.augment else None
    narrow, sizes = settings.loss_over == "actions", trained_sizes(policy.backbone.model)
    return estimate(
        policy.backbone, lambda: policy.encode([observation_of(sample) for sample in samples], image),
        torch.from_numpy(ids), only_ids=policy.legal_ids if narrow else None, autocast=AUTOCAST[settings.precision],
        optimizer_bytes=state_bytes(settings.optimizer, sizes),
        update_bytes=update_bytes(settings.optimizer, sizes, policy.backbone.device.type),
        passes=settings.grad_accumulation, head=policy.spec.head.kind if policy.spec.head else "",
    )  # fmt: skip


@contextlib.contextmanager
def out_of_memory_said(
    settings: Settings, dataset: ChunkDataset, policy: LocalPolicy | None = None, step: int = 0
) -> Iterator[None]:
    """A failed allocation becomes a `VlaError` that says what to change, in order of effect.

    Args:
        policy: None while its weights are being loaded.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        if policy is None:
            raise problem("out of memory while loading the weights", "room for all of them",
                          "pass --precision bf16 or --method qlora, or take a smaller --backbone") from error  # fmt: skip
        need, ways = remedies(settings, dataset, policy)
        listed = "; ".join(f"{flags} (about {n / GB:.2f} GB less)" for n, flags in ways)
        raise problem(
            f"out of memory at step {step}", f"room for about {need / GB:.2f} GB of tensors, the estimated peak of these settings",
            f"in order of effect: {listed}" if listed else "take a smaller --backbone, or a larger machine",
        ) from error  # fmt: skip


def remedies(settings: Settings, dataset: ChunkDataset, policy: LocalPolicy) -> tuple[int, list[tuple[int, str]]]:
    """(estimated peak in bytes, [(bytes saved, flags that save them)], most first). Not for use after training goes on."""
    now = estimate_step(settings, dataset, policy)
    ways = [
        (now.peak_bytes - estimate_step(changed, dataset, policy).peak_bytes, flags)
        for changed, flags in _by_trace(settings)
    ]
    ways += _by_weights(settings, policy)
    if not settings.gradient_checkpointing:
        checkpoint_layers(policy.backbone.model)
        ways.append((now.peak_bytes - estimate_step(settings, dataset, policy).peak_bytes, "--gradient-checkpointing"))
    return now.peak_bytes, sorted([way for way in ways if way[0] > 0.01 * now.peak_bytes], reverse=True)


def _by_trace(settings: Settings) -> list[tuple[Settings, str]]:
    found = []
    if settings.batch_size > 1:
        size, parts = settings.batch_size // 2, settings.grad_accumulation * 2
        half = dataclasses.replace(settings, batch_size=size, grad_accumulation=parts)
        found.append((half, f"--batch-size {size} --grad-accumulation {parts}"))
    if settings.optimizer == "adamw":
        paged = dataclasses.replace(settings, optimizer="paged_adamw8bit")
        found.append((paged, "--optimizer paged_adamw8bit"))
    if settings.precision == "float32":
        found.append((dataclasses.replace(settings, precision="bf16"), "--precision bf16"))
    if settings.loss_over == "vocabulary":
        found.append((dataclasses.replace(settings, loss_over="actions"), "--loss-over actions"))
    return found


def _by_weights(settings: Settings, policy: LocalPolicy) -> list[tuple[int, str]]:
    """Savings in the weights themselves, which a trace of this model cannot show."""
    model = policy.backbone.model
    if settings.method == "full":
        n = sum(trained_sizes(model))
        return [(4 * n + state_bytes(settings.optimizer, [n]), "--method lora")]
    if settings.method not in ("lora", "rslora"):
        return []
    frozen = [m.weight for m in model.modules() if type(m) is nn.Linear and not m.weight.requires_grad]
    saved = sum(w.numel() * w.element_size() - sum(packed_bytes(w.numel())) for w in frozen)
    return [(saved, "--method qlora")]
