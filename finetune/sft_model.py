"""The model of `vla finetune` made ready for training, and the scaling of its loss in float16."""

from __future__ import annotations

from typing import Any

import torch
from accelerate import Accelerator

from vla.compile_blocks import compile_blocks
from vla.finetune.sft_settings import Settings
from vla.gradient_checkpoint import checkpoint_layers
from vla.types import problem


def autocast_of(settings: Settings, device: str) -> str:
    """Accelerate's name of the precision.

    Raises:
        VlaError: fp16 on a device whose Accelerate does not scale the loss.
    """
    if settings.precision == "fp16" and device == "cpu":
        raise problem(
            "precision fp16 on cpu", "a GPU, which is where Accelerate scales the loss", "use --precision bf16"
        )
    return "no" if settings.precision == "float32" else settings.precision


def ready_model(settings: Settings, model: Any) -> None:
    """Gradient checkpointing and compilation as the settings say, in place."""
    if settings.compile:
        compile_blocks(model)
    if settings.gradient_checkpointing:
        checkpoint_layers(model)


def scaler_state(accelerator: Accelerator) -> dict[str, Any]:
    """The loss scale and its history, as JSON; empty unless in fp16."""
    return accelerator.scaler.state_dict() if accelerator.scaler is not None else {}


def restore_scaler(accelerator: Accelerator, state: dict[str, Any]) -> None:
    """What `scaler_state` gave."""
    if accelerator.scaler is not None and state:
        accelerator.scaler.load_state_dict(state)


def out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed, on a GPU or in the host's memory."""
    if isinstance(error, torch.cuda.OutOfMemoryError | MemoryError):
        return True
    words = ("not enough memory", "out of memory", "can't allocate memory")
    return isinstance(error, RuntimeError) and any(word in str(error) for word in words)
