"""OpenVLA's image featurizers: one or two timm vision transformers, patch by patch, side by side.

Each gives the output of its second-to-last block, without prefix tokens, final norm or pooling; the last block and what
follows are carried along because published checkpoints hold their weights. Parameter names are the published ones: timm
calls LayerScale's parameter `gamma`, OpenVLA's files call it `scale_factor`.
"""

from __future__ import annotations

from typing import Any

import timm
import torch
from timm.models.vision_transformer import LayerScale, VisionTransformer  # pyright: ignore[reportPrivateImportUsage]
from torch import nn
from torch.utils.checkpoint import checkpoint

from vla.openvla.config import OpenVlaConfig
from vla.types import problem


class ScaleFactor(nn.Module):
    """timm's LayerScale under OpenVLA's parameter name."""

    def __init__(self, like: LayerScale) -> None:
        super().__init__()
        self.scale_factor = nn.Parameter(like.gamma.detach().clone())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.scale_factor


class VisionBackbone(nn.Module):
    """pixel_values (B, 3 or 6, h, w) -> patches (B, P, `embed_dim`); the second three channels are the second
    featurizer's normalisation of the same image."""

    def __init__(self, config: OpenVlaConfig) -> None:
        super().__init__()
        self.fused = bool(config.use_fused_vision_backbone)
        self.gradient_checkpointing = False
        """Set by transformers where activations are to be computed again in the backward pass."""
        self.film = False
        """Set by `vla.openvla.film.add_film`: the blocks want the instruction too."""
        self.featurizer = featurizer(config, 0)
        self.embed_dim = self.featurizer.embed_dim
        self.n_patches = self.featurizer.patch_embed.num_patches
        if self.fused:
            self.fused_featurizer = featurizer(config, 1)
            self.embed_dim += self.fused_featurizer.embed_dim
            if self.fused_featurizer.patch_embed.num_patches != self.n_patches:
                raise problem(f"{self.n_patches} and {self.fused_featurizer.patch_embed.num_patches} patches of the two "
                              "featurizers", "as many", "correct image_sizes in config.json")  # fmt: skip

    def forward(self, pixel_values: torch.Tensor, language: torch.Tensor | None = None) -> torch.Tensor:
        """`language` (B, llm_dim), the prompt's mean embedding, goes with FiLM and with nothing else."""
        if self.film != (language is not None):
            got = "no mean embedding of the prompt" if self.film else "a mean embedding of the prompt"
            raise problem(f"{got}, {'with' if self.film else 'without'} FiLM", "the one with the other",
                          "run a model with FiLM through `vla.openvla.oft.action_states`")  # fmt: skip
        again = self.gradient_checkpointing and self.training
        self.featurizer.set_grad_checkpointing(again)
        if not self.fused:
            return patches(self.featurizer, pixel_values, language)
        self.fused_featurizer.set_grad_checkpointing(again)
        first, second = pixel_values.split(3, dim=1)
        towers = patches(self.featurizer, first, language), patches(self.fused_featurizer, second, language)
        return torch.cat(towers, dim=2)


def featurizer(config: OpenVlaConfig, index: int) -> VisionTransformer:
    """The timm model of one featurizer, without weights."""
    args: dict[str, Any] = (config.timm_model_args or [{}, {}])[index]
    model = timm.create_model(
        config.timm_model_ids[index], pretrained=False, num_classes=0, img_size=config.image_sizes[index],
        act_layer=config.timm_override_act_layers[index], **args,
    )  # fmt: skip
    if not isinstance(model, VisionTransformer):
        raise problem(f"timm model {config.timm_model_ids[index]!r}", "a vision transformer", "correct config.json")
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, LayerScale):
                setattr(module, name, ScaleFactor(child))
    return model


def patches(model: VisionTransformer, pixels: torch.Tensor, language: torch.Tensor | None = None) -> torch.Tensor:
    """(B, 3, h, w) -> (B, P, dim) of the second-to-last block; the last one is not run."""
    if language is not None:
        return patches_with_language(model, pixels, language)
    found: Any = model.forward_intermediates(
        pixels, indices=[n_blocks(model) - 2], norm=False, stop_early=True, output_fmt="NLC", intermediates_only=True
    )
    return found[0]


def patches_with_language(model: VisionTransformer, pixels: torch.Tensor, language: torch.Tensor) -> torch.Tensor:
    """timm's `forward_intermediates` with one more argument for each block (`vla.openvla.film.FilmBlock`)."""
    x = model.norm_pre(model.patch_drop(model._pos_embed(model.patch_embed(pixels))))
    for block in list(model.blocks.children())[:-1]:
        if model.grad_checkpointing:
            x = checkpoint(block, x, language=language, use_reentrant=False)
        else:
            x = block(x, language=language)
    return x[:, model.num_prefix_tokens :]


def n_blocks(model: VisionTransformer) -> int:
    return len(list(model.blocks.children()))
