"""A training step without its arithmetic: what it would allocate, and when.

The weights are replaced by tensors that have shapes only (PyTorch's FakeTensor), the batch stays real, and forward and
backward passes run as they would. So code that looks at token ids or image grids works, and a model of any size, even one
that was never loaded, is traced in seconds.
"""

from __future__ import annotations

import contextlib
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.nn.functional import linear
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from vla.fold_norms import folded_convolutions
from vla.kbit import is_packed

ACTIVATIONS, GRADIENTS, LOGITS, INPUTS = "activations", "gradients", "logits", "batch inputs"


class Allocations(TorchDispatchMode):
    """While entered, counts the bytes of all tensors that come into being, by label, and notes the highest sum."""

    def __init__(self, known: list[torch.Tensor]) -> None:
        """`known` are not counted, nor are views of them."""
        super().__init__()
        self.label = ACTIVATIONS
        """Of what is allocated from now on."""
        self.live: dict[int, tuple[int, str]] = {}
        self.by_label: Counter[str] = Counter()
        self.peak_bytes = 0
        self.at_peak: Counter[str] = Counter()
        self._known = [tensor.untyped_storage() for tensor in known]  # held, so that no address is used again
        self._ignored = {storage._cdata for storage in self._known}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*_without_masks(func, args), **(kwargs or {}))
        for value in tree_leaves(found):
            if isinstance(value, torch.Tensor):
                self.count(value)
        return found

    def count(self, tensor: torch.Tensor, label: str | None = None) -> None:
        """Count a tensor, once; with a label, it is from now on counted under that."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._ignored:
            return
        if key in self.live:
            n, before = self.live[key]
            if label is not None and label != before:
                self.live[key] = n, label
                self.by_label[before] -= n
                self.by_label[label] += n
            return
        n = storage.nbytes()
        self.live[key] = n, label or self.label
        self.by_label[label or self.label] += n
        weakref.finalize(storage, self._free, key)
        if self.by_label.total() > self.peak_bytes:
            self.peak_bytes, self.at_peak = self.by_label.total(), self.by_label.copy()

    def _free(self, key: int) -> None:
        n, label = self.live.pop(key, (0, self.label))
        self.by_label[label] -= n


def trace(model: nn.Module, loss: Callable[[Allocations], torch.Tensor], passes: int = 1) -> Allocations:
    """Forward and backward passes of `loss` on shapes. `model` is as before afterwards, wherever it is.

    Args:
        loss: calls `model` on a real batch on the CPU; gradients and activations are told apart here, other labels there.
        passes: as many as come before an optimiser step, if gradients accumulate.
    """
    with _shapes_only(model) as (parameters, known):
        counted = Allocations(known)

        def kept(parameter: torch.Tensor) -> None:
            if parameter.grad is not None:
                counted.count(parameter.grad, GRADIENTS)

        hooks = [p.register_post_accumulate_grad_hook(kept) for p in parameters if p.requires_grad]
        with counted:
            for _ in range(min(passes, 2)):
                counted.label = ACTIVATIONS
                loss(counted).backward()
        for hook in hooks:
            hook.remove()
        for parameter in parameters:
            parameter.grad = None
    return counted


@contextlib.contextmanager
def _shapes_only(model: nn.Module) -> Iterator[tuple[list[nn.Parameter], list[torch.Tensor]]]:
    """Inside, all parameters of `model` are shapes on the CPU; (those, they and the buffers)."""
    fake, made = FakeTensorMode(allow_non_fake_inputs=True), {}
    replaced: list[tuple[dict[str, Any], str, Any]] = []
    tied: dict[int, Any] = {}

    def shape_of(tensor: torch.Tensor) -> torch.Tensor:
        with fake:
            return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cpu")

    modules = [m for top in (model, *folded_convolutions(model)) for m in top.modules()]
    for module in modules:
        for name, value in module._parameters.items():
            if value is None or is_packed(value):
                continue
            if id(value) not in made:
                made[id(value)] = nn.Parameter(shape_of(value), requires_grad=value.requires_grad)
            replaced.append((module._parameters, name, value))
        for name, value in module._buffers.items():
            if value is not None and value.device.type != "cpu":
                tied[id(value)] = shape_of(value) if value.is_meta else value.cpu()
                replaced.append((module._buffers, name, value))
    for slots, name, value in replaced:
        slots[name] = made.get(id(value), tied.get(id(value)))
    try:
        with _shapes_of_packed():
            buffers = [b for module in modules for b in module._buffers.values() if b is not None]
            yield list(made.values()), [*made.values(), *buffers]
    finally:
        for slots, name, value in replaced:
            slots[name] = value


@contextlib.contextmanager
def _shapes_of_packed() -> Iterator[None]:
    """Inside, bitsandbytes' 4-bit layers allocate what they would, without looking at their weights."""
    try:
        from bitsandbytes.nn.modules import Linear4bit
    except ImportError:  # then no model has such layers
        yield
        return
    plain = Linear4bit.forward

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        inner = x.to(self.compute_dtype)
        return _PackedLinear.apply(inner, self.out_features, self.bias).to(x.dtype)

    Linear4bit.forward = forward
    try:
        yield
    finally:
        Linear4bit.forward = plain


class _PackedLinear(torch.autograd.Function):
    """As bitsandbytes' MatMul4Bit: the weights are unpacked for each product and not kept."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, out_features: int, bias: torch.Tensor | None) -> torch.Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.sizes = out_features, x.shape[-1]
        return linear(x, x.new_empty(ctx.sizes), None if bias is None else bias.to(x.dtype))

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return gradient @ gradient.new_empty(ctx.sizes), None, None


def _without_masks(func: Any, args: Any) -> Any:
    """Boolean masks of an index as positions: how many there are is then known without the values that are indexed."""
    if func not in (torch.ops.aten.index.Tensor, torch.ops.aten.index_put.default, torch.ops.aten.index_put_.default):
        return args
    positions = []
    for index in args[1]:
        is_mask = isinstance(index, torch.Tensor) and index.dtype == torch.bool and not isinstance(index, FakeTensor)
        positions += index.nonzero(as_tuple=True) if is_mask else [index]
    return args[0], positions, *args[2:]
