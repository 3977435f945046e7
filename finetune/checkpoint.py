"""Everything a training loop needs to continue exactly, in one folder of safetensors and JSON. Nothing is pickled.

latest.json                 name of the newest complete checkpoint
step-00000100/
  trainable.safetensors     the parameters that train
  optimizer.safetensors     AdamW moments and step counts, by parameter name
  state.json                step, data position, RNG of torch, anything else the loop keeps
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from vla.files import swap_folder, write_json
from vla.types import problem


def save_checkpoint(
    folder: Path,
    step: int,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    state: dict[str, Any],
    keep_last: int = 2,
) -> Path:
    """Write `folder/step-...`, whole or not at all, then point latest.json at it and drop the older ones."""
    named = dict(trainable(model))
    names = {id(parameter): name for name, parameter in named.items()}
    moments = {
        f"{names[id(parameter)]}::{key}": value.detach().clone().contiguous()
        for parameter, values in optimizer.state.items()
        for key, value in values.items()
    }
    target = folder / f"step-{step:08d}"
    temporary = folder / f".{target.name}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    save_file({name: p.detach().clone().contiguous() for name, p in named.items()}, temporary / "trainable.safetensors")
    save_file(moments, temporary / "optimizer.safetensors")
    rng = torch.get_rng_state().tolist()
    write_json(temporary / "state.json", {**state, "step": step, "torch_rng": rng})
    swap_folder(temporary, target)
    write_json(folder / "latest.json", {"checkpoint": target.name})
    for old in sorted(folder.glob("step-*"))[:-keep_last]:
        if old != target:
            shutil.rmtree(old)
    return target


def load_checkpoint(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any] | None:
    """Restore parameters, moments and torch's RNG from the newest checkpoint; its state, or None if there is none.

    Raises:
        VlaError: parameters of another model.
    """
    latest = folder / "latest.json"
    if not latest.exists():
        return None
    path = folder / json.loads(latest.read_text())["checkpoint"]
    weights = load_file(path / "trainable.safetensors")
    named = dict(trainable(model))
    if weights.keys() != named.keys() or any(weights[name].shape != p.shape for name, p in named.items()):
        raise problem(f"{path} with {len(weights)} parameters of other names or shapes", f"{len(named)} as in this run",
                      "resume with the settings the run was started with")  # fmt: skip
    moments = load_file(path / "optimizer.safetensors")
    with torch.no_grad():
        for name, parameter in named.items():
            parameter.copy_(weights[name])
    for key, value in moments.items():
        name, _, moment = key.partition("::")
        optimizer.state[named[name]][moment] = value.to(named[name].device) if moment != "step" else value
    state = json.loads((path / "state.json").read_text())
    torch.set_rng_state(torch.tensor(state.pop("torch_rng"), dtype=torch.uint8))
    return state


def trainable(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """(name, parameter) of everything with gradients, each once."""
    return [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
