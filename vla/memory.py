"""Peak memory of training by part, before it is allocated.

Weights, optimiser state and quantised weights are counted from shapes; gradients, activations, logits and inputs come from
a trace of forward and backward passes on shapes (`vla.memory_probe`), at the moment when their sum is highest. Not
counted: what the process holds besides tensors, workspaces inside kernels, and a GPU's context and fragmentation.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from vla.backbone import Backbone
from vla.fold_norms import folded_convolutions
from vla.kbit import is_packed, packed_bytes, packed_numel
from vla.memory_probe import ACTIVATIONS, GRADIENTS, INPUTS, LOGITS, Allocations, trace
from vla.token_rows import only_rows

GB = 1e9
WEIGHTS, PACKED, SCALES, TRAINED, OPTIMIZER, UPDATE = (
    "frozen weights", "4-bit weights", "scales of 4-bit weights", "adapters or trained weights", "optimizer state",
    "update of the largest weight",
)  # fmt: skip


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes at the peak of a training step."""

    parts: dict[str, int]
    """By part; they add up to the peak."""

    @property
    def peak_bytes(self) -> int:
        return sum(self.parts.values())

    def table(self) -> str:
        """One line per part that is not empty."""
        rows = [*self.parts.items(), ("peak of a training step", self.peak_bytes)]
        return "\n".join(f"  {name:<28} {_size(n):>10}" for name, n in rows if n)


def static_parts(model: nn.Module) -> dict[str, int]:
    """Bytes held all the time: weights that train, weights that do not, and 4-bit weights as if they were packed."""
    parts: dict[str, int] = dict.fromkeys((WEIGHTS, PACKED, SCALES, TRAINED), 0)
    tensors = [t for top in (model, *folded_convolutions(model)) for t in (*top.parameters(), *top.buffers())]
    for tensor in {id(tensor): tensor for tensor in tensors}.values():
        if is_packed(tensor):
            packed, scales = packed_bytes(packed_numel(tensor))
            parts[PACKED] += packed
            parts[SCALES] += scales
        else:
            parts[TRAINED if tensor.requires_grad else WEIGHTS] += tensor.numel() * tensor.element_size()
    return parts


def estimate(
    backbone: Backbone, make_inputs: Callable[[], dict[str, torch.Tensor]], token_ids: torch.Tensor, *,
    only_ids: torch.Tensor | None, autocast: torch.dtype | None, optimizer_bytes: int, update_bytes: int = 0, passes: int = 1,
    head: str = "",
) -> MemoryEstimate:  # fmt: skip
    """Peak of a training step: cross-entropy of `token_ids` over the vocabulary, or over `only_ids`.

    Args:
        make_inputs: the batch as `Backbone.encode` gives it; called where the model says it is on the CPU.
        token_ids: int64 (B, T), on the CPU.
        autocast: precision of the forward pass, None for the weights' own.
        optimizer_bytes: state of the optimiser.
        update_bytes: what its step takes besides, when all activations are gone.
        passes: forward passes per optimiser step.
        head: `vla.spec.HeadSpec.kind`; all T actions then come from one pass, and those of l1 have the L1 loss.
    """

    def loss(counted: Allocations) -> torch.Tensor:
        inputs = make_inputs()
        for tensor in inputs.values():
            counted.count(tensor, INPUTS)
        with torch.autocast("cpu", dtype=autocast or torch.bfloat16, enabled=autocast is not None):
            if head:
                with only_rows(backbone.model, only_ids):
                    logits = backbone.model(**inputs, n_actions=token_ids.shape[1])
            else:
                logits = backbone.action_logits(inputs, token_ids, only_ids=only_ids)
        counted.count(logits, LOGITS)
        counted.label = LOGITS
        if head == "l1":
            return logits.float().abs().sum()
        targets = torch.zeros_like(token_ids).flatten()
        losses = nn.functional.cross_entropy(logits.float().flatten(0, 1), targets, reduction="none")
        total = losses.sum()
        counted.label = ACTIVATIONS
        return total

    counted = trace(backbone.model, loss, passes)
    moving = {part: counted.at_peak[part] for part in (GRADIENTS, ACTIVATIONS, LOGITS, INPUTS)}
    return _highest(static_parts(backbone.model), optimizer_bytes, update_bytes, moving)


def _highest(static: dict[str, int], optimizer_bytes: int, update_bytes: int, moving: dict[str, int]) -> MemoryEstimate:
    """The peak is in the passes, or after them, when there are the gradients and what the optimiser needs for its step."""
    if sum(moving.values()) < static[TRAINED] + update_bytes:
        moving = {**dict.fromkeys(moving, 0), GRADIENTS: static[TRAINED], UPDATE: update_bytes}
    return MemoryEstimate({**static, OPTIMIZER: optimizer_bytes, **moving})


def trained_sizes(model: nn.Module) -> list[int]:
    """Elements of each parameter that trains."""
    return [p.numel() for p in {id(p): p for p in model.parameters()}.values() if p.requires_grad]


def measured_peak(model: nn.Module, steps: Callable[[], Any]) -> int:
    """Bytes at the peak of `steps` on the CPU: what `model` holds, and what PyTorch's allocator gave out meanwhile.

    The optimiser must make its state in `steps`, or hold none yet.
    """
    from torch.profiler import ProfilerActivity, profile

    gc.collect()  # a model of before that went away meanwhile would count as memory given back
    held = held_bytes(model)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        steps()
    assert record.profiler is not None and record.profiler.kineto_results is not None
    events: list[Any] = [e for e in record.profiler.kineto_results.events() if e.name() == "[memory]"]
    highest = current = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        current += event.nbytes()
        highest = max(highest, current)
    return held + highest


def held_bytes(model: nn.Module) -> int:
    """Bytes of the tensors a model really holds, with the scales of packed weights."""
    storages: dict[int, int] = {}
    for tensor in _tensors(model):
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    return sum(storages.values())


def _tensors(model: nn.Module) -> Iterable[torch.Tensor]:
    for top in (model, *folded_convolutions(model)):
        for tensor in (*top.parameters(), *top.buffers()):
            yield tensor
            state = getattr(tensor, "quant_state", None)
            for part in (state, getattr(state, "state2", None)):
                if part is not None:
                    yield from (part.absmax, part.code)


def _size(n: int) -> str:
    return f"{n / GB:.2f} GB" if n >= 1e8 else f"{n / 1e6:.2f} MB"
