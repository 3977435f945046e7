"""Activations computed again in the backward pass instead of kept (Chen et al., arXiv 1604.06174)."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from vla.types import problem


def checkpoint_layers(model: nn.Module) -> int:
    """Keep only the inputs of every transformer block, in place; returns how many blocks.

    Not transformers' own switch: that needs the model in training mode, which also turns on dropout and the batch norms'
    statistics, and drops the key-value cache when the policy acts in between. Here it depends on gradients alone.
    """
    found = [module for module in model.modules() if isinstance(module, block_classes())]
    if not found:
        raise problem(f"--gradient-checkpointing with {type(model).__name__}, which has no transformer blocks that "
                      "transformers or timm mark", "blocks", "drop it")  # fmt: skip
    for module in found:
        module.forward = functools.partial(_again, module.forward)
    return len(found)


def block_classes() -> tuple[type[nn.Module], ...]:
    """What transformers and timm build transformer blocks of."""
    try:
        from timm.models.vision_transformer import Block
    except ImportError:
        return (GradientCheckpointingLayer,)
    return GradientCheckpointingLayer, Block


def _again(forward: Any, *args: Any, **kwargs: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    return checkpoint(forward, *args, use_reentrant=False, **kwargs)
