"""Tensors that DeepSpeed's ZeRO keeps in parts: its optimiser state at stage 2, the weights too at stage 3.

DeepSpeed writes checkpoints of its own, by pickling. Here what they hold is gathered whole and by parameter name instead, and
put back, so that a checkpoint is the same file whatever kind of launch wrote it. Every process must call each function.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from vla.types import problem

MOMENTS = ("exp_avg", "exp_avg_sq")
"""AdamW's, in its state."""


def require_deepspeed() -> Any:
    """The package.

    Raises:
        VlaError: it is not installed.
    """
    try:
        import deepspeed  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise problem("a DeepSpeed launch without deepspeed", "the extra [deepspeed]",
                      "pip install 'vla-toolkit[deepspeed]'") from error  # fmt: skip
    return deepspeed


def is_partitioned(value: torch.Tensor) -> bool:
    """Whether it is a parameter of ZeRO-3, of which `.data` is empty between uses."""
    return "ds_id" in vars(value)


def is_zero_parameter(parameter: nn.Parameter) -> bool:
    """Whether ZeRO, of either stage, steps another copy of it."""
    return is_partitioned(parameter) or "_hp_mapping" in vars(parameter)


def full_shape(parameter: Any) -> torch.Size:
    return parameter.ds_shape if is_partitioned(parameter) else parameter.shape


def gathered(parameter: Any) -> torch.Tensor:
    """A whole copy of a partitioned parameter."""
    with require_deepspeed().zero.GatheredParameters([parameter]):
        return parameter.detach().clone()


def set_parameter(parameter: Any, value: torch.Tensor) -> None:
    """Give a parameter, and the copy of it that is stepped, the value that every process has."""
    deepspeed = require_deepspeed()
    with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0), torch.no_grad():
        parameter.copy_(value)
    deepspeed.utils.safe_set_full_fp32_param(parameter, value)


def is_zero_optimizer(optimizer: Any) -> bool:
    return type(optimizer).__module__.startswith("deepspeed.")


def gathered_moments(named: dict[str, nn.Parameter], optimizer: Any, keep: bool) -> dict[str, torch.Tensor]:
    """By `name::key`, as AdamW would have it: whole moments and the count of steps. Empty unless `keep`, or before a step."""
    get = require_deepspeed().utils.safe_get_full_optimizer_state
    states = [state for state in optimizer.optimizer.state.values() if state]
    found = {}
    for name, parameter in named.items() if states else ():
        for key in MOMENTS:
            moment = get(parameter, key)
            if keep:
                found[f"{name}::{key}"] = moment.reshape(full_shape(parameter)).cpu()
        if keep:
            found[f"{name}::step"] = torch.as_tensor(states[0]["step"]).cpu().clone()
    return found


def set_moments(named: dict[str, nn.Parameter], optimizer: Any, moments: dict[str, torch.Tensor]) -> None:
    """What `gathered_moments` found, on every process."""
    put = require_deepspeed().utils.safe_set_full_optimizer_state
    stage_3 = any(is_partitioned(parameter) for parameter in named.values())
    flat = optimizer.fp32_partitioned_groups_flat if stage_3 else optimizer.single_partition_of_fp32_groups
    fused = any(group.get("fused") for group in optimizer.param_groups)  # then steps are counted on the GPU
    step = next(value for key, value in moments.items() if key.endswith("::step"))
    for part in flat:  # as AdamW's first step would
        state = {key: torch.zeros_like(part, memory_format=torch.preserve_format) for key in MOMENTS}
        optimizer.optimizer.state[part] = {"step": step.to(part.device if fused else "cpu", copy=True), **state}
    if not stage_3:
        optimizer._lazy_init_hp_params_optimizer_state()  # else `put` finds no moments before the first step
    for name, parameter in named.items():
        for key in MOMENTS:
            put(parameter, moments[f"{name}::{key}"].to(flat[0].device), key)
