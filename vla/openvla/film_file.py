"""The authors' `vision_backbone--*_checkpoint.pt`: the image featurizers of a model trained with FiLM.

Their `finetune.py` trains LoRA layers within the wrapped blocks and saves the whole vision backbone, unmerged, apart from
the adapter and from the merged model, whose own vision weights are then still those of the base. Three kinds of names:

    vision_backbone.featurizer.blocks.0.scale.weight                       FiLM
    vision_backbone.featurizer.blocks.0.block.norm1.weight                 what LoRA leaves alone
    vision_backbone.featurizer.blocks.0.block.attn.qkv.base_layer.weight   and its lora_A.default, lora_B.default

Here LoRA goes into the weights. A file without LoRA names, as other tools that merge may write, is read just so.
"""

from __future__ import annotations

import re
from pathlib import Path

import torch

from vla.openvla.checkpoint import check_weights
from vla.openvla.film import MAPS, add_film, film_shapes
from vla.openvla.model import OpenVlaForActionPrediction
from vla.openvla.torch_file import read_tensors
from vla.types import problem

WRAPPER = "vision_backbone."
FACTORS = (".lora_A.default.weight", ".lora_B.default.weight")
MAX_ALPHA = 16
"""finetune.py and the evaluation scripts: lora_alpha = min(lora_rank, 16)."""

Tensors = dict[str, torch.Tensor]


def load_vision_backbone(model: OpenVlaForActionPrediction, path: Path, lora_alpha: int | None = None) -> None:
    """Fill the vision backbone of `model`, FiLM and all, from the authors' file, in place and in the dtype it has here.

    Args:
        model: without LoRA layers; FiLM is added to one that has none.
        lora_alpha: of the run, where it is not the authors' own min(rank, 16). The file does not hold it.

    Raises:
        VlaError: no FiLM in the file, names or shapes that are not this model's; the model is as it was.
    """
    tensors = merged(named_as_here(read_tensors(path), path), path, lora_alpha)
    backbone = model.vision_backbone
    expected = {name: tuple(tensor.shape) for name, tensor in backbone.state_dict().items()} | film_shapes(model)
    check_weights({name: tuple(tensor.shape) for name, tensor in tensors.items()}, expected, str(path))
    if not backbone.film:
        add_film(model)
    backbone.load_state_dict(tensors)


def named_as_here(tensors: Tensors, path: Path) -> Tensors:
    """Their names -> ours: one prefix less, and no `.block` between a block and its parts."""
    if not any(name.endswith(f".{part}.weight") and "blocks." in name for name in tensors for part in MAPS):
        raise problem(
            f"{path} with {', '.join(sorted(tensors)[:3])}, ...", "a vision backbone with FiLM", "check the path"
        )
    return {plain_name(name.removeprefix(WRAPPER)): tensor for name, tensor in tensors.items()}


def plain_name(name: str) -> str:
    """'featurizer.blocks.0.block.attn.qkv.weight' -> 'featurizer.blocks.0.attn.qkv.weight'."""
    return re.sub(r"(^|\.)blocks\.(\d+)\.block\.", r"\1blocks.\2.", name)


def merged(tensors: Tensors, path: Path, lora_alpha: int | None = None) -> Tensors:
    """Each `base_layer` plus alpha / r * B A, in float32, under its layer's own name.

    Raises:
        VlaError: a factor that is missing, of another shape, or of another kind than LoRA's two.
    """
    found = {name.replace(".base_layer.", "."): tensor for name, tensor in tensors.items() if "lora_" not in name}
    strange = sorted(name for name in tensors if "lora_" in name and not name.endswith(FACTORS))
    if strange:
        raise problem(f"{path} with {', '.join(strange[:3])}", "LoRA named as peft's `default`", "check the path")
    parts = (re.match(r"(.*)\.(?:lora_.*|base_layer\.weight)$", name) for name in tensors)
    for layer in sorted({part[1] for part in parts if part}):
        a, b, weight = (_part(tensors, layer + ending, path).float() for ending in (*FACTORS, ".base_layer.weight"))
        alpha = min(len(a), MAX_ALPHA) if lora_alpha is None else lora_alpha
        fits = b.shape[1] == len(a) and (len(b), *a.shape[1:]) == weight.shape
        if not fits:
            shapes = ", ".join(str(list(tensor.shape)) for tensor in (a, b, weight))
            raise problem(
                f"{path} with shapes {shapes} at {layer}", "factors that multiply to the layer", "fetch the file again"
            )
        # of a convolution, A is (r, in, h, w) and B is (out, r, 1, 1)
        found[f"{layer}.weight"] = weight + alpha / len(a) * torch.tensordot(b.flatten(1), a, 1)
    return found


def _part(tensors: Tensors, name: str, path: Path) -> torch.Tensor:
    if name not in tensors:
        raise problem(
            f"{path} without {name}", "both factors of each LoRA layer, and the layer", "fetch the file again"
        )
    return tensors[name]
