"""FiLM of OpenVLA-OFT+ (arXiv 2502.19645 §IV-D; FiLM: 1709.07871): the instruction scales and shifts image features.

    add_film(model)                  # in place, once; before or after LoRA, before gradient checkpointing
    train_film(model)                # gradients on, float32
    action_states(model, ...)        # sees that the model has FiLM; several images, any batch
    film_parameters(model)           # to save beside the policy: name -> parameter
    load_film(model, tensors, path)  # and to load again

In every block of both featurizers, between attention and MLP, x becomes x * (1 + scale(l)) + shift(l): `scale` and
`shift` are affine maps llm_dim -> block width, and l is the mean embedding of the prompt (`mean_language`). They start as
the authors' do, like any new linear layer: of the order 1 / sqrt(llm_dim), so the start is near the identity (1 +- 0.01
in the 7B model), not at it.

`film_file.py` reads the authors' `vision_backbone--*_checkpoint.pt`. In theirs the blocks are wrapped (`blocks.0.block.*`
beside `blocks.0.scale.*`); here a block keeps its own names, so that checkpoints and adapters of models without FiLM fit.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from timm.models.vision_transformer import Block, VisionTransformer  # pyright: ignore[reportPrivateImportUsage]
from torch import nn

from vla.openvla.checkpoint import check_weights
from vla.openvla.model import OpenVlaForActionPrediction
from vla.types import problem

MAPS = ("scale", "shift")


class LanguageMap(nn.Module):
    """(B, llm_dim) -> (B, width). Not an `nn.Linear`, so that LoRA and 4-bit weights leave it alone, as the authors' do."""

    def __init__(self, llm_dim: int, width: int, **options: Any) -> None:
        super().__init__()
        bound = 1 / math.sqrt(llm_dim)  # nn.Linear's own, for weight and bias
        self.weight = nn.Parameter(torch.empty(width, llm_dim, **options).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(width, **options).uniform_(-bound, bound))

    def forward(self, language: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(language.to(self.weight.dtype), self.weight, self.bias)


class FilmBlock(Block):
    """A timm block that `add_film` gave `scale` and `shift`."""

    scale: LanguageMap
    shift: LanguageMap

    def forward(self, x: torch.Tensor, *, language: torch.Tensor) -> torch.Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """x (B, tokens, width), language (B, llm_dim)."""
        x = x + self.drop_path1(self.ls1(self.attn(self.norm1(x))))
        x = x * (1 + self.scale(language))[:, None].to(x.dtype) + self.shift(language)[:, None].to(x.dtype)
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))


def add_film(model: OpenVlaForActionPrediction) -> None:
    """Fresh FiLM in every block of `model`, in place, in the block's dtype and on its device.

    Args:
        model: without its PEFT wrapper (`get_base_model()`); LoRA layers inside it are no obstacle.

    Raises:
        VlaError: it has FiLM, or its blocks are not plain ones.
    """
    if model.vision_backbone.film:
        raise problem("a model with FiLM", "one without", "call add_film once")
    blocks = list(_blocks(model).values())
    if any(type(block) is not Block for block in blocks):
        raise problem(
            f"blocks of {sorted({type(block).__name__ for block in blocks})}",
            "timm's Block",
            "use DINOv2, SigLIP or CLIP",
        )
    if any("forward" in vars(block) for block in blocks):
        raise problem(
            "blocks whose forward is replaced", "plain ones", "add FiLM before gradient checkpointing and compilation"
        )
    for block in blocks:
        weight = block.norm1.weight
        for name in MAPS:
            made = LanguageMap(
                model.config.text_config.hidden_size, len(weight), device=weight.device, dtype=weight.dtype
            )
            setattr(block, name, made)
        block.__class__ = FilmBlock
    model.vision_backbone.film = True


def film_parameters(model: OpenVlaForActionPrediction) -> dict[str, nn.Parameter]:
    """'featurizer.blocks.0.scale.weight' -> parameter, of every block of both featurizers; empty without FiLM."""
    return {
        f"{prefix}.{name}.{kind}": getattr(getattr(block, name), kind)
        for prefix, block in _blocks(model).items()
        if model.vision_backbone.film
        for name in MAPS
        for kind in ("weight", "bias")
    }


def train_film(model: OpenVlaForActionPrediction) -> list[nn.Parameter]:
    """Have FiLM train, in float32, and return what trains: not the last block of a featurizer, which nothing runs."""
    idle = tuple(name.removeprefix("vision_backbone.") for name in model.idle_modules)
    trained = []
    for name, parameter in film_parameters(model).items():
        parameter.data = parameter.data.float()
        parameter.requires_grad_(not name.startswith(idle))
        trained += [parameter] if parameter.requires_grad else []
    return trained


def load_film(model: OpenVlaForActionPrediction, tensors: dict[str, torch.Tensor], where: str) -> None:
    """Fill FiLM with what `film_parameters` gave, in the dtype it has here; adds FiLM to a model without.

    Raises:
        VlaError: names or shapes that are not this model's; the model is as it was.
    """
    check_weights({name: tuple(tensor.shape) for name, tensor in tensors.items()}, film_shapes(model), where)
    if not model.vision_backbone.film:
        add_film(model)
    for name, parameter in film_parameters(model).items():
        parameter.data.copy_(tensors[name])


def film_shapes(model: OpenVlaForActionPrediction) -> dict[str, tuple[int, ...]]:
    """Name -> shape of what `film_parameters` gives, or would give had the model FiLM."""
    shapes: dict[str, tuple[int, ...]] = {}
    for prefix, block in _blocks(model).items():
        width = len(block.norm1.weight)
        for name in MAPS:
            shapes[f"{prefix}.{name}.weight"] = (width, model.config.text_config.hidden_size)
            shapes[f"{prefix}.{name}.bias"] = (width,)
    return shapes


def mean_language(
    model: OpenVlaForActionPrediction, input_ids: torch.Tensor, attention_mask: torch.Tensor, stop_id: int
) -> torch.Tensor:
    """(B, T) prompts, the mask 0 at padding and at patches -> (B, llm_dim): what FiLM is given.

    What the authors average is all but the action places: BOS, the template's words, the instruction, the bare space and
    the </s> that follows the actions. Padding is left out; in their training batches, padded on the right, it counts in,
    so a prompt's mean there depends on the longest prompt beside it. One prompt at a time, as they evaluate, is the same.
    """
    embed = model.get_input_embeddings()
    words, stop = embed(input_ids), embed(input_ids.new_full((len(input_ids), 1), stop_id))
    kept = attention_mask[..., None] != 0
    total = (words.float() * kept).sum(1) + stop[:, 0].float()
    return (total / (kept.sum(1) + 1)).to(words.dtype)


def _blocks(model: OpenVlaForActionPrediction) -> dict[str, Any]:
    """'featurizer.blocks.0' -> block."""
    backbone = model.vision_backbone
    towers: dict[str, VisionTransformer] = {"featurizer": backbone.featurizer}
    if backbone.fused:
        towers["fused_featurizer"] = backbone.fused_featurizer
    return {
        f"{name}.blocks.{i}": block for name, tower in towers.items() for i, block in enumerate(tower.blocks.children())
    }
