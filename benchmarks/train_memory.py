"""Memory of fine-tuning: the estimate of `vla finetune --dry-run` against what was allocated.

    python -m benchmarks.train_memory

On the CPU: two optimiser steps of the real loop, by PyTorch's own count of its allocations, on the built-in VLM and on random
models of real classes. For an OpenVLA of 7B: the estimate from shapes and, where there is a GPU, the same model with random weights, its peak and its
samples per second. Needs bitsandbytes (pip install 'vla-toolkit[bnb]').
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import importlib
import io
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch.nn.functional import cross_entropy

from vla.adapters import Method, parameter_counts
from vla.finetune import collect, sft
from vla.finetune.optimizers import OptimizerName, make_optimizer, state_bytes
from vla.finetune.sft_memory import estimate_step
from vla.finetune.sft_model import autocast_of, ready_model
from vla.finetune.sft_setup import build_policy, open_datasets
from vla.memory import GB, MemoryEstimate, estimate, measured_peak, trained_sizes
from vla.memory_shapes import ACTION_IDS, openvla_7b, openvla_batch
from vla.testing import FakeSuite

SMALL: tuple[dict[str, Any], ...] = (
    {"batch_size": 1}, {"batch_size": 4}, {"batch_size": 4, "lora_parts": ("all",)},
    {"batch_size": 4, "lora_parts": ("all",), "gradient_checkpointing": True}, {"batch_size": 4, "method": "dora"},
    {"batch_size": 4, "method": "qlora"}, {"batch_size": 1, "method": "full"}, {"batch_size": 4, "method": "full"},
    {"batch_size": 4, "method": "full", "optimizer": "adamw8bit"}, {"batch_size": 4, "precision": "bf16"},
)  # fmt: skip
FAMILIES, WIDTH = ("llava", "paligemma", "qwen2_5_vl", "smolvlm"), 8
ALL_BF16 = {"batch_size": 4, "precision": "bf16", "lora_parts": ("all",)}
WIDE: tuple[dict[str, Any], ...] = (
    {"batch_size": 4}, ALL_BF16, {**ALL_BF16, "gradient_checkpointing": True}, {"batch_size": 4, "method": "qlora"},
    {"batch_size": 4, "method": "full"}, {**ALL_BF16, "loss_over": "actions", "batch_size": 1},
)  # fmt: skip
LARGE: tuple[tuple[Method, OptimizerName, bool, int], ...] = (
    ("qlora", "paged_adamw8bit", True, 1), ("lora", "paged_adamw8bit", True, 1), ("lora", "adamw", True, 1),
    ("lora", "adamw", False, 1), ("lora", "adamw", True, 8),
)  # fmt: skip


@dataclass(frozen=True)
class Settings:
    small: bool = True
    """Measure the built-in VLM on the CPU."""
    wide: bool = True
    """Measure random models of tests/families.py on the CPU: 2 layers, hidden size 512."""
    large: bool = True
    """Estimate OpenVLA-7B, and measure it where there is a GPU."""
    steps: int = 10
    """Timed optimiser steps on the GPU."""


def main(settings: Settings) -> None:
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stderr(io.StringIO()):
        data = Path(folder) / "fake"
        with contextlib.redirect_stdout(io.StringIO()):
            collect.run(collect.Settings(out=data, suite="fake", episodes_per_task=4), FakeSuite())
        if settings.small:
            table(data, "tiny", SMALL)
        for family in FAMILIES if settings.wide else ():
            importlib.import_module("tests.families").FAMILIES[family](Path(folder) / family, WIDTH)
            table(data, family, WIDE)
    if settings.large:
        on_gpu = torch.cuda.is_available()
        print(
            "| OpenVLA-7B, r 32, all linear, bf16 | trains | estimate, GB |"
            + " measured, GB | ratio | samples/s |" * on_gpu
        )
        print("|---|---|---|" + "---|---|---|" * on_gpu)
        for method, optimizer, checkpointing, batch_size in LARGE:
            guess, share = large(method, optimizer, checkpointing, batch_size)
            row = f"| {method}, {optimizer}, checkpointing {checkpointing}, batch {batch_size} | {share} | {guess.peak_bytes / GB:.2f} |"
            if on_gpu:
                real, rate = on_cuda(method, optimizer, checkpointing, batch_size, settings.steps)
                row += f" {real / GB:.2f} | {guess.peak_bytes / real:.3f} | {rate:.2f} |"
            print(f"{row}\n{guess.table()}" if not on_gpu else row, flush=True)


def table(data: Path, backbone: str, rows: tuple[dict[str, Any], ...]) -> None:
    """`backbone`: tiny, or a folder beside `data`."""
    print(f"| {backbone} | estimate, MB | measured, MB | ratio |\n|---|---|---|---|")
    source = backbone if backbone == "tiny" else str(data.parent / backbone)
    for changes in rows:
        guess, real = measured(data, {**changes, "backbone": source, "image_size_px": 0 if backbone == "tiny" else 64})
        words = ", ".join(f"{key} {value}" for key, value in changes.items())
        print(f"| {words} | {guess / 1e6:.1f} | {real / 1e6:.1f} | {guess / real:.3f} |", flush=True)


def measured(data: Path, changes: dict[str, Any]) -> tuple[int, int]:
    """(estimated, measured) bytes at the peak of two optimiser steps."""
    settings = sft.Settings(
        data=(str(data),), out=data.parent / "run", horizon=3, gripper_dim=None, device="cpu", **changes
    )
    dataset, statistics = open_datasets(settings)
    policy = build_policy(settings, dataset, statistics, "cpu")
    ready_model(settings, policy.backbone.model)
    guess = estimate_step(settings, dataset, policy)
    AcceleratorState._reset_state()
    accelerator = Accelerator(mixed_precision=autocast_of(settings, "cpu"), cpu=True)
    loop = sft.Loop(dataclasses.replace(settings, gradient_checkpointing=False), accelerator, dataset, policy)
    real = measured_peak(policy.backbone.model, lambda: [loop._optimizer_step(settings.batch_size) for _ in range(2)])
    return guess.peak_bytes, real


def large(method: Method, optimizer: OptimizerName, checkpointing: bool, batch_size: int) -> tuple[MemoryEstimate, str]:
    """The estimate, from shapes alone, and the share of parameters that train."""
    backbone = openvla_7b(method, gradient_checkpointing=checkpointing)
    inputs, ids = openvla_batch(batch_size, torch.bfloat16)
    guess = estimate(
        backbone, lambda: dict(inputs), ids, only_ids=torch.tensor(ACTION_IDS), autocast=torch.bfloat16,
        optimizer_bytes=state_bytes(optimizer, trained_sizes(backbone.model)),
    )  # fmt: skip
    trains, total = parameter_counts(backbone.model)
    return guess, f"{trains / 1e6:.1f} M of {total / 1e9:.2f} B ({trains / total:.2%})"


def on_cuda(
    method: Method, optimizer: OptimizerName, checkpointing: bool, batch_size: int, steps: int
) -> tuple[int, float]:
    """(bytes of tensors at the peak of a step, samples/s) with random weights."""
    gc.collect()
    backbone = openvla_7b(method, gradient_checkpointing=checkpointing, device="cuda")
    torch.cuda.empty_cache()
    parameters = [p for p in backbone.model.parameters() if p.requires_grad]
    chosen = make_optimizer(optimizer, parameters, 1e-5, 0.0)
    inputs, ids = openvla_batch(batch_size, torch.bfloat16, "cuda")
    only = torch.tensor(ACTION_IDS, device="cuda")

    def step() -> None:
        with torch.autocast("cuda", torch.bfloat16):
            logits = backbone.action_logits(dict(inputs), ids, only_ids=only)
        cross_entropy(logits.float().flatten(0, 1), (ids - ACTION_IDS[0]).flatten()).backward()
        chosen.step()
        chosen.zero_grad(set_to_none=True)

    step()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    for _ in range(steps):
        step()
    torch.cuda.synchronize()
    rate = steps * batch_size / (time.perf_counter() - start)
    peak = torch.cuda.max_memory_allocated()
    if optimizer == "paged_adamw8bit":  # bitsandbytes' pages are not PyTorch's
        peak += state_bytes(optimizer, trained_sizes(backbone.model))
    return peak, rate


if __name__ == "__main__":
    main(tyro.cli(Settings))
