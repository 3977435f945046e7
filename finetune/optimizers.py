"""AdamW, in float32 or with its moments in 8 bits (Dettmers et al., arXiv 2110.02861; paged: arXiv 2305.14314 §3)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import nn

from vla.kbit import require_bitsandbytes

OptimizerName = Literal["adamw", "adamw8bit", "paged_adamw8bit"]
FULL_STATE_BELOW = 4096
"""Elements of a parameter below which bitsandbytes keeps its moments in float32."""


def make_optimizer(
    name: OptimizerName, parameters: Iterable[nn.Parameter], lr: float, weight_decay: float
) -> torch.optim.Optimizer:
    """Paged moments move to the host's memory when the GPU's runs out; on the CPU, paged is the same as not paged.

    Raises:
        VlaError: no bitsandbytes.
    """
    parameters = list(parameters)
    if name == "adamw":
        # Fused, where it is on a GPU: the default there makes temporary copies of all gradients.
        fused = bool(parameters) and all(p.device.type == "cuda" for p in parameters)
        return torch.optim.AdamW(parameters, lr=lr, weight_decay=weight_decay, fused=fused or None)
    bnb = require_bitsandbytes(f"optimizer {name}")
    paged = name == "paged_adamw8bit" and any(p.device.type == "cuda" for p in parameters)
    kind = bnb.optim.PagedAdamW8bit if paged else bnb.optim.AdamW8bit
    return kind(parameters, lr=lr, weight_decay=weight_decay, min_8bit_size=FULL_STATE_BELOW)


def settle_state(optimizer: Any) -> None:
    """Bring state that was read from a file, all of it tensors, into the form and memory the optimizer made it in."""
    if not type(optimizer).__module__.startswith("bitsandbytes"):
        return
    for group_index, group in enumerate(optimizer.param_groups):
        for index, parameter in enumerate(group["params"]):
            found = optimizer.state.pop(parameter, None)
            if not found:
                continue
            optimizer.init_state(group, parameter, group_index, index)
            made = optimizer.state[parameter]
            for key, value in found.items():
                if isinstance(made[key], torch.Tensor):
                    made[key].copy_(value)
                else:
                    made[key] = type(made[key])(value.item())


def state_bytes(name: OptimizerName, sizes: Iterable[int]) -> int:
    """Bytes of the moments of parameters with so many elements each, and of their scales and tables."""
    if name == "adamw":
        return sum(8 * n + 4 for n in sizes)
    scales = [2 * n + 2 * 4 * -(-n // 256) + 2 * 4 * 256 for n in sizes if n >= FULL_STATE_BELOW]
    return sum(scales) + sum(8 * n for n in sizes if n < FULL_STATE_BELOW)


def update_bytes(name: OptimizerName, sizes: Iterable[int], device: str) -> int:
    """Bytes that an update takes for a moment: PyTorch's AdamW goes from parameter to parameter on a CPU and makes the root
    of the second moment and the denominator of each. The fused one on a GPU and those in 8 bits work in place."""
    return 2 * 4 * max(sizes, default=0) if name == "adamw" and device == "cpu" else 0
