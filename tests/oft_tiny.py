"""A small OpenVLA-OFT checkpoint in the authors' layout: files and names as their finetune.py writes them, weights from names."""

import json
from pathlib import Path

import numpy as np
import openvla_tiny as tiny
import torch
from PIL import Image

from vla.openvla.oft import L1Head, ProprioProjector
from vla.types import Observation

H, D, S, LLM_DIM = 8, 7, 8, 64
KEY = "bridge_orig"


def filled(module: torch.nn.Module, prefix: str) -> dict[str, torch.Tensor]:
    return {
        name: torch.from_numpy(tiny.fill(prefix + name, tuple(tensor.shape)).astype(np.float32))
        for name, tensor in module.state_dict().items()
    }


def write_oft(folder: Path, head: bool = True, proprio: bool = True, step: str = "150000") -> Path:
    """Merged weights and heads; the names of tensors begin with `module.`, as DistributedDataParallel leaves them."""
    tiny.write_checkpoint(folder)
    write_heads(folder, head, proprio, step)
    (folder / "dataset_statistics.json").write_text(json.dumps({KEY: statistics_of(folder)}))
    return folder


def statistics_of(checkpoint: Path) -> dict:
    """Actions of `KEY`, by which the goldens were made, and LIBERO's state of eight numbers."""
    found = json.loads((checkpoint / "config.json").read_text())["norm_stats"]
    state = found[KEY]["proprio"]
    return {**found[KEY], "proprio": {name: [*values, 0.9 * values[-1]][:S] for name, values in state.items()}}


def write_heads(folder: Path, head: bool = True, proprio: bool = True, step: str = "150000") -> None:
    folder.mkdir(exist_ok=True)
    parts = {"action_head": L1Head(LLM_DIM, LLM_DIM, D)} if head else {}
    parts |= {"proprio_projector": ProprioProjector(LLM_DIM, S)} if proprio else {}
    for name, module in parts.items():
        tensors = {f"module.{key}": tensor for key, tensor in filled(module, f"{name}.").items()}
        torch.save(tensors, folder / f"{name}--{step}_checkpoint.pt")


def observations(statistics: dict, states: np.ndarray) -> list[Observation]:
    """What the goldens were made of: two images each, and states that are normalised to `states`."""
    frames, entry = tiny.frames(), statistics[KEY]["proprio"]
    low, high = np.array(entry["q01"]), np.array(entry["q99"])
    physical = (0.5 * (states.astype(np.float64) + 1) * (high - low + 1e-8) + low).astype(np.float32)
    return [
        Observation({"image": frames[i % 3], "wrist_image": frames[(i + 1) % 3]}, physical[i], tiny.INSTRUCTIONS[i])
        for i in range(len(states))
    ]


def picture(size: int = 224) -> Image.Image:
    return Image.fromarray(tiny.frames()[0]).resize((size, size))
