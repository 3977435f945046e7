"""Everything a training loop needs to continue exactly, in one folder of safetensors and JSON. Nothing is pickled.

latest.json                 name of the newest complete checkpoint
step-00000100/
  trainable.safetensors     the parameters that train
  optimizer.safetensors     AdamW moments and step counts, by parameter name
  state.json                step, data position, RNG of torch, anything else the loop keeps
best/
  trainable.safetensors     as above, of the step with the lowest held-out loss
  state.json                that step and loss

A folder has its name only once it is whole: a crash or a full disk in the middle leaves the last good one as it was.
Tensors that are sharded over processes (FSDP2, DeepSpeed's ZeRO) are gathered, so a checkpoint depends neither on how many
there were nor on the kind of launch.
"""

from __future__ import annotations

import contextlib
import errno
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor

from vla.files import swap_folder, write_json
from vla.finetune.optimizers import settle_state
from vla.finetune.zero import (
    full_shape,
    gathered,
    gathered_moments,
    is_partitioned,
    is_zero_optimizer,
    is_zero_parameter,
    set_moments,
    set_parameter,
)
from vla.types import problem


def save_checkpoint(
    folder: Path,
    step: int,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    state: dict[str, Any],
    keep_last: int = 2,
    write: bool = True,
) -> Path:
    """Write `folder/step-...`, whole or not at all, then point latest.json at it and drop the older ones.

    Args:
        write: False on all processes but one. Every process must call this: sharded tensors are gathered from all.
    """
    named = dict(trainable(model))
    gather = gathered_moments if is_zero_optimizer(optimizer) else _moments
    moments = gather(named, optimizer, write)
    weights = gathered_weights(model, write)
    target = folder / f"step-{step:08d}"
    if not write:
        return target
    rng = torch.get_rng_state().tolist()
    with _new_folder(target) as temporary:
        save_file(weights, temporary / "trainable.safetensors")
        save_file(moments, temporary / "optimizer.safetensors")
        write_json(temporary / "state.json", {**state, "step": step, "torch_rng": rng})
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
    load_weights(path, model)
    named = dict(trainable(model))
    moments = load_file(path / "optimizer.safetensors")
    put = set_moments if is_zero_optimizer(optimizer) else _set_moments
    put(named, optimizer, moments)
    state = json.loads((path / "state.json").read_text())
    torch.set_rng_state(torch.tensor(state.pop("torch_rng"), dtype=torch.uint8))
    return state


def save_best(folder: Path, model: nn.Module, state: dict[str, Any], write: bool = True) -> None:
    """Write `folder/best`, whole or not at all. Every process must call this; one with `write`."""
    weights = gathered_weights(model, write)
    if write:
        with _new_folder(folder / "best") as temporary:
            save_file(weights, temporary / "trainable.safetensors")
            write_json(temporary / "state.json", state)


def load_weights(path: Path, model: nn.Module) -> None:
    """Restore the parameters that train from a checkpoint's folder.

    Raises:
        VlaError: parameters of another model.
    """
    weights = load_file(path / "trainable.safetensors")
    named = dict(trainable(model))
    if weights.keys() != named.keys() or any(weights[name].shape != full_shape(p) for name, p in named.items()):
        raise problem(f"{path} with {len(weights)} parameters of other names or shapes", f"{len(named)} as in this run",
                      "resume with the settings the run was started with")  # fmt: skip
    with torch.no_grad():
        for name, parameter in named.items():
            if is_zero_parameter(parameter):
                set_parameter(parameter, weights[name].to(parameter.device))
            else:
                parameter.copy_(_placed(weights[name], parameter))


def gathered_weights(model: nn.Module, keep: bool = True) -> dict[str, torch.Tensor]:
    """Copies of the parameters that train, whole; every process must call this. Empty unless `keep`."""
    found = {name: _gathered(parameter, keep) for name, parameter in trainable(model)}
    return found if keep else {}


def gathered_state(model: nn.Module, keep: bool = True) -> dict[str, torch.Tensor]:
    """`model.state_dict()` with every tensor whole, in the host's memory; what is tied stays so. Every process must call this.

    Empty unless `keep`."""
    values = model.state_dict(keep_vars=True)
    copies: dict[int, torch.Tensor] = {}
    for value in values.values():
        if id(value) not in copies:
            copy = _gathered(value, keep)
            copies[id(value)] = copy.cpu() if keep else value
    return {name: copies[id(value)] for name, value in values.items()} if keep else {}


@contextlib.contextmanager
def disk_full_said(folder: Path) -> Iterator[None]:
    """A full disk in the middle of a run becomes a `VlaError` that says what to do."""
    try:
        yield
    except (OSError, SafetensorError) as error:  # safetensors writes by itself and has its own error
        full = (
            error.errno in (errno.ENOSPC, errno.EDQUOT) if isinstance(error, OSError) else "os error 28" in str(error)
        )
        if not full:
            raise
        raise problem(f"no space left on the disk of {folder} ({error})", "room for one more checkpoint",
                      "free some space, then run the same command with --resume; the last good checkpoint is intact"
                      ) from error  # fmt: skip


@contextlib.contextmanager
def _new_folder(target: Path) -> Iterator[Path]:
    """A folder to fill; afterwards it is at `target`, or gone if filling it failed."""
    temporary = target.with_name(f".{target.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        yield temporary
        swap_folder(temporary, target)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _moments(named: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer, keep: bool) -> dict[str, torch.Tensor]:
    names = {id(parameter): name for name, parameter in named.items()}
    return {
        f"{names[id(parameter)]}::{key}": _gathered(torch.as_tensor(value), keep)
        for parameter, values in optimizer.state.items()
        for key, value in values.items()
    }


def _set_moments(
    named: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer, moments: dict[str, torch.Tensor]
) -> None:
    fused = any(group.get("fused") for group in optimizer.param_groups)  # then steps are counted on the GPU
    for key, value in moments.items():
        name, _, moment = key.partition("::")
        placed = value if moment == "step" and not fused else _placed(value, named[name])
        optimizer.state[named[name]][moment] = placed
    settle_state(optimizer)


def _gathered(value: torch.Tensor, keep: bool) -> torch.Tensor:
    """A copy, whole; collective where it is sharded."""
    if is_partitioned(value):
        return gathered(value)
    whole = value.detach()
    if isinstance(whole, DTensor):
        whole = whole.full_tensor()
    return whole.clone().contiguous() if keep else value


def _placed(value: torch.Tensor, like: nn.Parameter) -> torch.Tensor:
    """On the device of a parameter, and sharded as it is."""
    if isinstance(like.data, DTensor) and value.shape == like.shape:
        return distribute_tensor(value.to(like.device), like.data.device_mesh, like.data.placements)
    return value.to(like.device)


def trainable(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """(name, parameter) of everything with gradients, each once."""
    return [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
