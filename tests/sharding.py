"""A fine-tuning run of several CPU processes: `python -m torch.distributed.run ... sharding.py FOLDER OUT CHANGES [fsdp]`."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from accelerate import Accelerator, DistributedType, FullyShardedDataParallelPlugin
from accelerate.state import PartialState
from torch.distributed.tensor import DTensor
from training import sft_settings

from vla.finetune import sft


class CpuSharding(Accelerator):
    """Accelerate shards on accelerators only; torch's FSDP2 shards on CPUs too, and nothing else differs."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        plugin = FullyShardedDataParallelPlugin()  # from the environment that `accelerate launch` made of the YAML
        for state in (self.state._shared_state, PartialState._shared_state):
            state["distributed_type"] = DistributedType.FSDP
        self.state._shared_state["fsdp_plugin"] = plugin
        self.state.distributed_type, self.state.fsdp_plugin = DistributedType.FSDP, plugin


def main(folder: Path, out: str, changes: dict[str, Any], *how: str) -> None:
    if "fsdp" in how:
        sft.Accelerator = CpuSharding
        begin = sft.Loop.__init__

        def begin_sharded(self: sft.Loop, *rest: Any) -> None:
            begin(self, *rest)
            world = int(os.environ["WORLD_SIZE"])
            whole = sum(p.numel() for p in self.model.parameters())
            mine = sum(p.to_local().numel() for p in self.model.parameters() if isinstance(p, DTensor))
            assert mine < 1.1 * whole / world, f"{mine} of {whole} elements in one of {world} processes"

        sft.Loop.__init__ = begin_sharded
    family = folder / changes.pop("family", "llava")
    sft.run(sft_settings(folder, out=folder / out, backbone=str(family), **changes))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], json.loads(sys.argv[3]), *sys.argv[4:])
