"""Frozen batch norms folded into the convolutions before them: a third off the time of a convolutional vision tower.

conv(x)·s + t with s = γ / sqrt(var + ε), t = β − s·mean is one convolution with weights s·W and bias s·b + t (Jacob et
al., arXiv 1712.05877, §3.2). Nothing that is saved changes: parameters, buffers and their names stay as they are.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

# Where a norm that stands after a convolution is also applied right after it; elsewhere the order of children says nothing.
PLAIN_ORDER = ("timm.models._efficientnet_blocks", "timm.models.efficientnet", "timm.layers.conv_bn_act")


def fold_frozen_norms(model: nn.Module) -> int:
    """Let the batch norms of timm's EfficientNets be computed by the convolutions before them; returns how many.

    Call it once, when the weights have their values, device and precision. The original path is taken in training mode,
    and where the convolution's or the norm's own parameters need gradients.
    """
    try:
        from timm.layers.norm_act import BatchNormAct2d
    except ImportError:  # no timm, no timm vision tower
        return 0
    pairs = []
    for module in model.modules():
        children = list(module.children()) if type(module).__module__ in PLAIN_ORDER else []
        for convolution, norm in zip(children, children[1:], strict=False):
            if isinstance(convolution, nn.Conv2d) and isinstance(norm, BatchNormAct2d) and norm.running_var is not None:
                pairs.append((convolution, norm))
    for convolution, norm in pairs:
        _fold(convolution, norm)
    return len(pairs)


def folded_convolutions(model: nn.Module) -> list[nn.Module]:
    """The convolutions made by `fold_frozen_norms`, which hold memory of their own."""
    return [module.__dict__["folded"] for module in model.modules() if "folded" in module.__dict__]


def unfold_norms(model: nn.Module) -> None:
    """Undo `fold_frozen_norms` where a convolution or its norm trains: what was folded would go stale."""
    for module in model.modules():
        if type(module).__module__ not in PLAIN_ORDER:
            continue
        children = list(module.children())
        if any(p.requires_grad for child in children if not list(child.children()) for p in child.parameters()):
            for child in children:
                if isinstance(child, nn.Conv2d) or "BatchNorm" in type(child).__name__:
                    child.__dict__.pop("forward", None)
                    child.__dict__.pop("folded", None)


def _fold(convolution: Any, norm: Any) -> None:
    fused = cast(Any, fuse_conv_bn_eval(convolution.eval(), norm.eval())).requires_grad_(False)
    if convolution.weight.is_contiguous(memory_format=torch.channels_last):
        fused.to(memory_format=torch.channels_last)
    plain_convolution, plain_norm = convolution.forward, norm.forward
    parameters = [*convolution.parameters(), *norm.parameters()]
    convolution.__dict__["folded"] = fused  # not a submodule: nothing of it is saved

    def folded() -> bool:
        trains = torch.is_grad_enabled() and any(parameter.requires_grad for parameter in parameters)
        return not (norm.training or trains)

    convolution.forward = lambda x: fused(x) if folded() else plain_convolution(x)
    norm.forward = lambda x: norm.act(norm.drop(x)) if folded() else plain_norm(x)
