"""What `accelerate launch` may ask for: one process, data parallel (DDP), or sharded (FSDP2, DeepSpeed's ZeRO-2 and ZeRO-3)."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import torch
from accelerate import Accelerator, DeepSpeedPlugin, DistributedType, InitProcessGroupKwargs
from accelerate.state import AcceleratorState
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from vla.finetune.checkpoint import gathered_state, gathered_weights
from vla.finetune.sft_model import autocast_of
from vla.finetune.sft_settings import Settings
from vla.finetune.zero import require_deepspeed
from vla.gradient_checkpoint import block_classes
from vla.types import problem


def make_accelerator(settings: Settings, device: str) -> Accelerator:
    """For the launch that was asked for.

    Raises:
        VlaError: what would not be done, or not be done right: FSDP 1, FSDP on a CPU (where Accelerate leaves it out without
            a word), DeepSpeed without the package or at another stage, or evaluations in which the policy acts while no
            process can have all of its weights.
    """
    AcceleratorState._reset_state()  # else a second run in one process could not choose another precision
    if _asked("ACCELERATE_USE_DEEPSPEED"):
        return _zero_accelerator(settings, device)
    accelerator = Accelerator(mixed_precision=autocast_of(settings, device), cpu=device == "cpu")
    if _asked("ACCELERATE_USE_FSDP") and accelerator.distributed_type != DistributedType.FSDP:
        raise problem(f"an FSDP launch on {accelerator.device.type} with {accelerator.num_processes} processes",
                      "several GPUs: elsewhere Accelerate does not shard", "use examples/accelerate/ddp.yaml")  # fmt: skip
    if accelerator.distributed_type == DistributedType.FSDP and not accelerator.is_fsdp2:
        raise problem("FSDP 1", "fsdp_version: 2 in the launch file", "use examples/accelerate/fsdp2.yaml")
    return accelerator


def _zero_accelerator(settings: Settings, device: str) -> Accelerator:
    require_deepspeed()
    plugin = DeepSpeedPlugin()  # from the environment that `accelerate launch` made of its file
    config, stage = plugin.deepspeed_config, plugin.zero_stage
    if stage not in (2, 3):
        raise problem(f"DeepSpeed with zero_stage {stage}", "2 or 3",
                      "use examples/accelerate/zero2.yaml or zero3.yaml")  # fmt: skip
    if settings.optimizer != "adamw":
        raise problem(f"DeepSpeed with --optimizer {settings.optimizer}", "adamw: ZeRO flattens what 8 bits scale in blocks",
                      "drop it, or use examples/accelerate/ddp.yaml")  # fmt: skip
    if settings.precision == "fp16" or any(config.get(name, {}).get("enabled") for name in ("bf16", "fp16")):
        raise problem("DeepSpeed with weights or losses in half precision", "autocast, of what trains in float32",
                      "drop bf16 and fp16 from DeepSpeed's configuration and pass --precision bf16")  # fmt: skip
    if device == "cpu" and torch.cuda.is_available():
        raise problem("DeepSpeed with --device cpu on a machine with a GPU", "the GPU, which it takes", "drop --device")
    if stage == 3 and settings.method == "qlora":
        raise problem("ZeRO-3 with --method qlora", "weights that can be cut anywhere",
                      "use examples/accelerate/zero2.yaml")  # fmt: skip
    if stage == 3 and settings.film:
        raise problem("ZeRO-3 with --film", "parts that all train: others cannot be saved",
                      "use examples/accelerate/zero2.yaml")  # fmt: skip
    if stage == 3 and (settings.free_running_samples or settings.eval_suite):
        raise problem("ZeRO-3 with evaluations in which the policy acts", "only teacher-forced ones: no process has all weights",
                      "pass --free-running-samples 0 and no --eval-suite, and run `vla eval` afterwards")  # fmt: skip
    config |= {
        "train_micro_batch_size_per_gpu": settings.batch_size, "train_batch_size": "auto",
        "gradient_accumulation_steps": 1,  # the loop counts them itself
        "gradient_clipping": settings.clip_norm, "bf16": {"enabled": False}, "fp16": {"enabled": False},
        "zero_force_ds_cpu_optimizer": False,
    }  # fmt: skip
    if settings.precision == "bf16":
        config["torch_autocast"] = {"enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": []}
    handlers: list[Any] | None = [InitProcessGroupKwargs(backend="gloo")] if device == "cpu" else None
    accelerator = Accelerator(mixed_precision="no", deepspeed_plugin=plugin, kwargs_handlers=handlers)
    unset_hf_deepspeed_config()  # every process reads the checkpoint itself, and `prepare` cuts it up
    return accelerator


def is_sharded(accelerator: Accelerator) -> bool:
    """Whether no process has all weights."""
    return accelerator.distributed_type == DistributedType.FSDP or _zero_stage(accelerator) == 3


def whole_weights(accelerator: Accelerator, model: nn.Module, method: str) -> dict[str, torch.Tensor] | None:
    """What the policy directory needs of a sharded model: what trains, or all of it; None of any other. Collective."""
    if not is_sharded(accelerator):
        return None
    gather = gathered_state if method == "full" else gathered_weights
    return gather(model, accelerator.is_main_process)


def shape_for_launch(accelerator: Accelerator, model: nn.Module) -> None:
    """What `accelerator.prepare` needs of the model, in place.

    FSDP gathers one transformer block at a time, unless the launch file names other modules: Accelerate's own choice, the
    model's `_no_split_modules`, fails where that lists classes the model does not use. DeepSpeed sends parameters as bytes,
    which those in another memory order (e.g. channels last) are not.
    """
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        for parameter in model.parameters():
            parameter.data = parameter.data.contiguous()
    plugin: Any = getattr(accelerator.state, "fsdp_plugin", None)
    if accelerator.distributed_type == DistributedType.FSDP and plugin.transformer_cls_names_to_wrap is None:
        found = {type(module).__name__ for module in model.modules() if isinstance(module, block_classes())}
        plugin.transformer_cls_names_to_wrap = sorted(found)


@contextlib.contextmanager
def accumulating(accelerator: Accelerator, model: Any, last: bool) -> Iterator[None]:
    """One of several forward and backward passes of an optimiser step; after the `last`, gradients are averaged.

    DeepSpeed steps in that backward pass: the learning rate must be set before.
    """
    accelerator.sync_gradients = last
    with contextlib.nullcontext() if last else accelerator.no_sync(model):
        yield


def autocast_acting(accelerator: Accelerator, precision: str) -> contextlib.AbstractContextManager[Any]:
    """For the policy that acts, which does not go through what was prepared; with DeepSpeed, Accelerate's own does nothing."""
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        return torch.autocast(accelerator.device.type, torch.bfloat16, enabled=precision == "bf16")
    return accelerator.autocast()


@contextlib.contextmanager
def acting_alone(accelerator: Accelerator, model: nn.Module) -> Iterator[None]:
    """Inside, every process has all weights and may run the model as often as it likes."""
    plugin: Any = getattr(accelerator.state, "fsdp_plugin", None)
    blocks = [module for module in model.modules() if isinstance(module, FSDPModule)]
    for block in blocks:
        block.set_reshard_after_forward(False, recurse=False)
        block.unshard()
    try:
        yield
    finally:
        for block in blocks:
            block.set_reshard_after_forward(plugin.reshard_after_forward, recurse=False)
        reshard(model)


def reshard(model: nn.Module) -> None:
    """After forward passes without a backward pass: FSDP leaves the last blocks gathered, and their parameters are others then."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def whole_number(norm: Any) -> float:
    """A gradient norm, which is sharded where the gradients are; every process must call this."""
    return float(norm.full_tensor() if isinstance(norm, DTensor) else torch.as_tensor(norm))


def _zero_stage(accelerator: Accelerator) -> int:
    plugin = accelerator.deepspeed_plugin
    return 0 if plugin is None else int(plugin.zero_stage)


def _asked(variable: str) -> bool:
    return os.environ.get(variable, "false").lower() == "true"
