"""OpenVLA-OFT (arXiv 2502.19645): a whole chunk of actions from one forward pass.

After the prompt stand H * D empty places (zero embeddings) and </s>; every position sees every other, and the hidden
states one place before each empty place become actions: by an MLP (L1 regression) or by the action token that the
language model would say (discrete). Several images and the robot's state, as one token, stand where OpenVLA has its image.

The authors get bidirectional attention from a fork of transformers, without which their code runs and acts wrongly. Here
the mask is an argument: eager and SDPA attention take it, anything else is refused.

FiLM (`film.py`) is used where the model has it. Left out: the diffusion head. Parameter names are those of their
`action_head--*` and `proprio_projector--*` files.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from vla.openvla.checkpoint import check_weights
from vla.openvla.config import IMAGE_TOKEN_ID
from vla.openvla.film import mean_language
from vla.openvla.model import OpenVlaForActionPrediction, place_images
from vla.openvla.torch_file import read_tensors
from vla.types import problem

STOP_ID = 2
CHANNELS = 6
"""Of one image, for the two featurizers."""


class ProprioProjector(nn.Module):
    """State (B, S), normalised to [-1, 1] -> one token (B, llm_dim)."""

    def __init__(self, llm_dim: int, proprio_dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(proprio_dim, llm_dim)
        self.fc2 = nn.Linear(llm_dim, llm_dim)

    def forward(self, state: torch.Tensor) -> torch.Tensor:
        return self.fc2(nn.functional.gelu(self.fc1(state.to(self.fc1.weight.dtype))))


class ResidualBlock(nn.Module):
    """x + relu(linear(norm(x)))."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.ffn = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, dim), nn.ReLU())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.ffn(x)


class ResidualMlp(nn.Module):
    """norm, linear, relu, two residual blocks, norm, linear."""

    def __init__(self, input_dim: int, hidden_dim: int, output_dim: int) -> None:
        super().__init__()
        self.layer_norm1, self.fc1 = nn.LayerNorm(input_dim), nn.Linear(input_dim, hidden_dim)
        self.mlp_resnet_blocks = nn.ModuleList([ResidualBlock(hidden_dim) for _ in range(2)])
        self.layer_norm2, self.fc2 = nn.LayerNorm(hidden_dim), nn.Linear(hidden_dim, output_dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.fc1(self.layer_norm1(x)))
        for block in self.mlp_resnet_blocks:
            x = block(x)
        return self.fc2(self.layer_norm2(x))


class L1Head(nn.Module):
    """Hidden states (B, H * D, llm_dim) -> normalised actions (B, H, D)."""

    def __init__(self, llm_dim: int, hidden_dim: int, action_dim: int) -> None:
        super().__init__()
        self.action_dim = action_dim
        self.model = ResidualMlp(llm_dim * action_dim, hidden_dim, action_dim)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        states = states.to(self.model.fc1.weight.dtype)
        return self.model(states.reshape(len(states), -1, self.action_dim * states.shape[2]))


def load_head(path: Path) -> L1Head:
    """From an `action_head--*_checkpoint.pt`; its sizes are those of its tensors."""
    state = read_tensors(path)
    if "model.fc1.weight" not in state or "model.fc2.weight" not in state:
        raise problem(f"{path} with {', '.join(sorted(state)[:4])}, ...", "an L1 regression head", "check the path")
    (hidden, width), action_dim = state["model.fc1.weight"].shape, len(state["model.fc2.weight"])
    if width % action_dim:
        raise problem(
            f"a head of {width} inputs for {action_dim} dimensions", "an L1 regression head", "check the path"
        )
    return _filled(L1Head(width // action_dim, hidden, action_dim), state, path)


def load_proprio(path: Path) -> ProprioProjector:
    """From a `proprio_projector--*_checkpoint.pt`."""
    state = read_tensors(path)
    if "fc1.weight" not in state:
        raise problem(f"{path} with {', '.join(sorted(state)[:4])}, ...", "a proprio projector", "check the path")
    return _filled(ProprioProjector(*state["fc1.weight"].shape), state, path)


def _filled(module: Any, state: dict[str, torch.Tensor], path: Path) -> Any:
    shapes = [{name: tuple(t.shape) for name, t in tensors.items()} for tensors in (state, module.state_dict())]
    check_weights(shapes[0], shapes[1], str(path))
    module.load_state_dict(state)
    return module.eval()


def action_states(
    model: OpenVlaForActionPrediction,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    pixel_values: torch.Tensor,
    n_actions: int,
    proprio: torch.Tensor | None = None,
) -> torch.Tensor:
    """Hidden states that become actions, in one pass.

    Args:
        input_ids: (B, T), each row ending in the bare space, padded on the left; with places for the patches of all images
            and the state's token, or without any.
        pixel_values: (B, 6 * images, h, w).
        n_actions: H * D.
        proprio: (B, llm_dim), the projected state.

    Returns:
        (B, n_actions, llm_dim).
    """
    compiling = torch.compiler.is_compiling()  # then nothing looks at values
    if not compiling and not attention_mask[:, -1].all():
        raise problem("prompts padded on the right", "left", "set the tokenizer's padding_side to 'left'")
    language = None
    if model.vision_backbone.film:
        language = mean_language(model, input_ids, attention_mask * (input_ids != IMAGE_TOKEN_ID), STOP_ID)
    channels = CHANNELS if model.vision_backbone.fused else CHANNELS // 2
    features = [model.get_image_features(image, language) for image in pixel_values.split(channels, dim=1)]
    features = torch.cat([*features, *([] if proprio is None else [proprio[:, None]])], dim=1)  # (B, P, llm_dim)
    ids, mask = input_ids, attention_mask
    if not compiling:
        ids, grown, _ = place_images(input_ids, attention_mask, None, features.shape[1], len(pixel_values))
        assert grown is not None
        mask = grown
    words = model.get_input_embeddings()(ids)
    prompt = words.masked_scatter((ids == IMAGE_TOKEN_ID)[..., None], features.to(words.dtype))
    empty = prompt.new_zeros(len(prompt), n_actions, prompt.shape[2])
    stop = model.get_input_embeddings()(ids.new_full((len(ids), 1), STOP_ID))
    mask = torch.cat([mask, mask.new_ones(len(mask), n_actions + 1)], dim=1)
    hidden = model.language_model.model(
        inputs_embeds=torch.cat([prompt, empty, stop], dim=1),
        attention_mask=two_way_mask(model, mask, words.dtype),
        position_ids=(mask.long().cumsum(-1) - 1).clamp(min=0),
        use_cache=False,
    ).last_hidden_state
    return hidden[:, -n_actions - 2 : -2]


def two_way_mask(model: OpenVlaForActionPrediction, mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """(B, T) of 0 and 1 -> additive (B, 1, T, T): all see all but padding."""
    attention = model.language_model.config._attn_implementation
    if attention not in ("eager", "sdpa"):
        raise problem(f"{attention} attention", "eager or sdpa, which take a mask: without it attention stays causal",
                      "pass attn_implementation='sdpa'")  # fmt: skip
    hidden = mask.new_zeros(mask.shape, dtype=dtype).masked_fill(mask == 0, torch.finfo(dtype).min)
    return hidden[:, None, None].expand(-1, 1, mask.shape[1], -1)
