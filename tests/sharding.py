"""One of two CPU processes that fine-tune together.

How they are launched is ddp, fsdp2, zero2 or zero3. A job {"out": "NAME", "changes": {...}} is a run, and with "back_to": 2
that run once more from its checkpoint of step 2, after `back_to`.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

from accelerate import Accelerator, DeepSpeedPlugin, DistributedType, FullyShardedDataParallelPlugin
from accelerate.state import PartialState
from torch.distributed.tensor import DTensor
from training import sft_settings

from vla.files import write_json
from vla.finetune import sft, sft_launch
from vla.testing import FakeSuite


class CpuSharding(Accelerator):
    """Accelerate shards on accelerators only; torch's FSDP2 shards on CPUs too, and nothing else differs."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        plugin = FullyShardedDataParallelPlugin()  # from the environment that `accelerate launch` made of the YAML
        for state in (self.state._shared_state, PartialState._shared_state):
            state["distributed_type"] = DistributedType.FSDP
        self.state._shared_state["fsdp_plugin"] = plugin
        self.state.distributed_type, self.state.fsdp_plugin = DistributedType.FSDP, plugin


class SmallParts(DeepSpeedPlugin):
    """ZeRO-3 leaves parameters below 100,000 elements whole, which in a tiny model are all of them."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.deepspeed_config["zero_optimization"]["stage3_param_persistence_threshold"] = 0


def held_here(loop: sft.Loop, how: str) -> tuple[int, int]:
    """(elements that this process holds, elements in all) of what is to be sharded."""
    parameters = list(loop.model.parameters())
    if how == "fsdp2":
        held = [p.to_local().numel() for p in parameters if isinstance(p, DTensor)]
        return sum(held), sum(p.numel() for p in parameters)
    if how == "zero3":
        return sum(p.ds_tensor.numel() for p in parameters), sum(p.ds_numel for p in parameters)
    flat = loop.optimizer.optimizer.single_partition_of_fp32_groups
    return sum(p.numel() for p in flat), sum(p.numel() for p in parameters if p.requires_grad)


def really(how: str) -> None:
    """Have every run check that it is sharded, as `accelerate launch` was told."""
    begin = sft.Loop.__init__

    def begin_sharded(self: sft.Loop, *rest: Any) -> None:
        begin(self, *rest)
        assert self.accelerator.num_processes == 2
        if how != "ddp":
            mine, whole = held_here(self, how)
            assert 0 < mine < 0.55 * whole, f"{mine} of {whole} elements in one of two processes"

    sft.Loop.__init__ = begin_sharded


def without_compiler() -> None:
    """DeepSpeed's collectives in shared memory are built at first use; gloo's own do."""
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def back_to(run: Path, step: int) -> None:
    """Leave a run as it was after an earlier step; all of its checkpoints are copied to `run/kept`."""
    shutil.rmtree(run / "kept", ignore_errors=True)
    shutil.copytree(run / "checkpoints", run / "kept")
    for later in (run / "checkpoints").glob("step-*"):
        if int(later.name.removeprefix("step-")) > step:
            shutil.rmtree(later)
    write_json(run / "checkpoints" / "latest.json", {"checkpoint": f"step-{step:08d}"})


def process(environment: dict[str, str], log: Path, folder: Path, how: str, jobs: list[dict[str, Any]]) -> None:
    """All jobs, as the process that `environment` says this is; what it prints goes to `log`."""
    os.environ |= environment
    with log.open("w") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    if how == "fsdp2":
        sft_launch.Accelerator = CpuSharding
    if how.startswith("zero"):
        without_compiler()
        sft_launch.DeepSpeedPlugin = SmallParts
    really(how)
    for job in jobs:
        changes, out = dict(job["changes"]), folder / job["out"]
        if "back_to" in job:
            changes["resume"] = True
            if PartialState().is_main_process:
                back_to(out, job["back_to"])
            PartialState().wait_for_everyone()
        family = folder / changes.pop("family", "llava")
        suite = FakeSuite() if "eval_suite" in changes else None
        sft.run(sft_settings(folder, out=out, backbone=str(family), **changes), suite)
