"""What `accelerate launch` may ask for: one process, data parallel (DDP), or sharded (FSDP2)."""

from __future__ import annotations

import os
from typing import Any

import torch
from accelerate import Accelerator, DistributedType
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from vla.finetune.sft_settings import Settings
from vla.gradient_checkpoint import block_classes
from vla.types import problem


def refuse_deepspeed() -> None:
    """VlaError where the launch asks for DeepSpeed: its checkpoints are pickles, and FSDP2 shards the same things."""
    if _asked("ACCELERATE_USE_DEEPSPEED"):
        raise problem("a DeepSpeed launch", "DDP or FSDP2",
                      "use examples/accelerate/fsdp2.yaml: it shards weights, gradients and optimiser state as ZeRO-3 does")  # fmt: skip


def check_launch(settings: Settings, accelerator: Accelerator) -> None:
    """Refuse what would not be done, or not be done right.

    Raises:
        VlaError: FSDP 1, FSDP on a CPU (where Accelerate leaves it out without a word), or evaluations in which the
            policy acts while no process has all of its weights.
    """
    if _asked("ACCELERATE_USE_FSDP") and accelerator.distributed_type != DistributedType.FSDP:
        raise problem(f"an FSDP launch on {accelerator.device.type} with {accelerator.num_processes} processes",
                      "several GPUs: elsewhere Accelerate does not shard", "use examples/accelerate/ddp.yaml")  # fmt: skip
    if not is_sharded(accelerator):
        return
    if not accelerator.is_fsdp2:
        raise problem("FSDP 1", "fsdp_version: 2 in the launch file", "use examples/accelerate/fsdp2.yaml")
    if settings.free_running_samples or settings.eval_suite:
        raise problem("FSDP with evaluations in which the policy acts", "only teacher-forced ones: no process has all weights",
                      "pass --free-running-samples 0 and no --eval-suite, and run `vla eval` afterwards")  # fmt: skip
    if settings.method == "full":  # only trained parameters are gathered for the policy directory
        raise problem("FSDP with --method full", "an adapter", "use --method lora, or DDP")


def is_sharded(accelerator: Accelerator) -> bool:
    return accelerator.distributed_type == DistributedType.FSDP


def shard_by_block(accelerator: Accelerator, model: nn.Module) -> None:
    """Have FSDP gather one transformer block at a time, unless the launch file names other modules.

    Accelerate's own choice, the model's `_no_split_modules`, fails where that lists classes the model does not use.
    """
    plugin: Any = getattr(accelerator.state, "fsdp_plugin", None)
    if is_sharded(accelerator) and plugin.transformer_cls_names_to_wrap is None:
        found = {type(module).__name__ for module in model.modules() if isinstance(module, block_classes())}
        plugin.transformer_cls_names_to_wrap = sorted(found)


def reshard(model: nn.Module) -> None:
    """After forward passes without a backward pass: FSDP leaves the last blocks gathered, and their parameters are others then."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def whole_number(norm: Any) -> float:
    """A gradient norm, which is sharded where the gradients are; every process must call this."""
    return float(norm.full_tensor() if isinstance(norm, DTensor) else torch.as_tensor(norm))


def _asked(variable: str) -> bool:
    return os.environ.get(variable, "false").lower() == "true"
