"""LoRA layers without the passes over whole activations that PEFT's forward makes.

PEFT computes base(x) + B(A(x)) * scaling: the product is scaled and added in two more passes over a tensor of the layer's
size, and as many in the backward pass. Here the last product, its scaling and the sum are one `addmm`. Under autocast PEFT
also copies x to float32, the type of LoRA's weights, only for autocast to make 16 bits of it again; each layer then keeps its
own copy of x for the backward pass, where the frozen layers share one. Values are the same up to rounding.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from peft.tuners.lora.layer import Linear
from torch import nn


def lean_lora(model: nn.Module) -> int:
    """Let every plain LoRA layer of `model` compute so; returns how many there are. What is not plain stays PEFT's: DoRA, a
    quantized base, several adapters, dropout while it is on, an adapter that is merged or switched off, and inputs of
    another type than the weights outside of autocast."""
    found = [module for module in model.modules() if type(module) is Linear]
    for layer in found:
        layer.forward = functools.partial(_forward, layer)
    return len(found)


def _forward(layer: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    name = layer.active_adapters[0] if len(layer.active_adapters) == 1 else None
    if (
        args
        or kwargs
        or layer.disable_adapters
        or layer.merged
        or name not in layer.lora_A
        or name in layer.lora_variant
    ):
        return type(layer).forward(layer, x, *args, **kwargs)
    first, second, dropout = layer.lora_A[name], layer.lora_B[name], layer.lora_dropout[name]
    typed = torch.is_autocast_enabled(x.device.type) or x.dtype == first.weight.dtype
    if not typed or second.bias is not None or (dropout.training and not isinstance(dropout, nn.Identity)):
        return type(layer).forward(layer, x)
    frozen = layer.base_layer(x)
    low = first(x).flatten(0, -2)  # (n, r)
    out = torch.addmm(frozen.flatten(0, -2), low, second.weight.t(), alpha=layer.scaling[name])
    return out.view(frozen.shape)
