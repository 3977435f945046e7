"""torch.compile of a model's transformer blocks, for training.

Blocks, not the whole model: what lies between them in a vision-language model (placing image features by `nonzero`, masks
from Python lists, window indices) breaks the graph at a dozen places, and each piece is compiled again for every length of a
batch. The blocks of one kind share one graph, whose batch size and length are symbols, so it is compiled once.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import nn

from vla.gradient_checkpoint import block_classes
from vla.types import problem


def compile_blocks(model: nn.Module, backend: str = "inductor") -> int:
    """Compile every transformer block for passes with gradients, in place; returns how many blocks.

    Without gradients, when the policy acts or is evaluated, blocks run as they are: a cache of keys that grows by a token
    at a time would have them compiled again and again. Names of parameters do not change. Call it before
    `checkpoint_layers`, so that what is computed again is compiled too.
    """
    found = [module for module in model.modules() if isinstance(module, block_classes())]
    if not found:
        raise problem(f"--compile with {type(model).__name__}, which has no transformer blocks that transformers or timm mark",
                      "blocks", "drop it")  # fmt: skip
    for module in found:
        module.forward = functools.partial(_compiled, torch.compile(module.forward, backend=backend, dynamic=True), module.forward)  # fmt: skip
    return len(found)


def _compiled(compiled: Any, plain: Any, *args: Any, **kwargs: Any) -> Any:
    return (compiled if torch.is_grad_enabled() else plain)(*args, **kwargs)
