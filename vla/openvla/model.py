"""OpenVLA (arXiv 2406.09246): image patches, a projector, and a language model that answers with action tokens.

Written against current transformers. Module and parameter names are those of published checkpoints, so a state dict or a
LoRA adapter of the authors' code loads by name. Beyond that code: batches, padding on either side, any attention
implementation, position ids that ignore padding, and gradient checkpointing of the vision transformers too.

The patches stand right after BOS. In `input_ids` their places hold `IMAGE_TOKEN_ID`; ids without them (as the authors'
processor makes them) get them in `forward` and `generate`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, GenerationMixin, PreTrainedModel

from vla.files import write_json
from vla.openvla.config import IMAGE_TOKEN_ID, OpenVlaConfig, published
from vla.openvla.vision import VisionBackbone, n_blocks
from vla.types import problem

IGNORED_LABEL = -100


class Projector(nn.Module):
    """(B, P, vision_dim) -> (B, P, llm_dim). Fused: 2176 -> 8704 -> 4096 -> 4096 in the 7B model."""

    def __init__(self, fused: bool, vision_dim: int, llm_dim: int) -> None:
        super().__init__()
        self.fused = fused
        hidden = 4 * vision_dim if fused else llm_dim
        self.fc1 = nn.Linear(vision_dim, hidden)
        self.fc2 = nn.Linear(hidden, llm_dim)
        if fused:
            self.fc3 = nn.Linear(llm_dim, llm_dim)

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        hidden = self.fc2(nn.functional.gelu(self.fc1(patches)))
        return self.fc3(nn.functional.gelu(hidden)) if self.fused else hidden


class OpenVlaForActionPrediction(PreTrainedModel, GenerationMixin):
    """See the module."""

    config: OpenVlaConfig
    config_class = OpenVlaConfig
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _no_split_modules = ["Block", "Projector", "LlamaDecoderLayer", "MistralDecoderLayer"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    def __init__(self, config: OpenVlaConfig) -> None:
        super().__init__(config)
        self.vision_backbone = VisionBackbone(config)
        llm_dim = config.text_config.hidden_size
        self.projector = Projector(self.vision_backbone.fused, self.vision_backbone.embed_dim, llm_dim)
        self.language_model = AutoModelForCausalLM.from_config(config.text_config)
        self.oft: nn.Module | None = None
        """`vla.openvla.oft_model.OftParts`, where actions come from one pass."""
        self.output_head_idle = False
        """Set where an L1 head reads the hidden states."""
        self.post_init()

    @property
    def n_image_tokens(self) -> int:
        """P, patches per image."""
        return self.vision_backbone.n_patches

    @property
    def idle_modules(self) -> tuple[str, ...]:
        """Prefixes of modules that published checkpoints hold but nothing runs: they get no gradients."""
        towers = {"vision_backbone.featurizer": self.vision_backbone.featurizer}
        if self.vision_backbone.fused:
            towers["vision_backbone.fused_featurizer"] = self.vision_backbone.fused_featurizer
        parts = {name: (f"blocks.{n_blocks(tower) - 1}", "norm", "attn_pool") for name, tower in towers.items()}
        idle = [f"{name}.{part}." for name, tails in parts.items() for part in tails]
        return (*idle, *(["language_model.lm_head"] if self.output_head_idle else []))

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.language_model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return self.language_model.get_output_embeddings()

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.language_model.set_output_embeddings(new_embeddings)

    def get_image_features(self, pixel_values: torch.Tensor, language: torch.Tensor | None = None) -> torch.Tensor:
        """(B, 3 or 6, h, w) -> (B, P, llm_dim); `language` (B, llm_dim) for FiLM."""
        return self.projector(self.vision_backbone(pixel_values, language))

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        n_actions: int = 0,
        proprio: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """`CausalLMOutputWithPast`; with `n_actions` a tensor: what `oft` makes of the hidden states of that many places.

        Args:
            input_ids: (B, T), with `IMAGE_TOKEN_ID` at the patches' places or without such places at all; the output
                then has P more positions.
            pixel_values: (B, 3 or 6, h, w), on the first pass of a cached generation only.
            attention_mask: (B, T so far), 0 at padding, or 4-D as the language model takes it.
            labels: (B, T), -100 where there is no loss.
            n_actions: H * D, of a model with `oft`, which takes prompts padded on the left and (B, 6 * images, h, w).
            proprio: (B, S), the normalised state, for `oft` with a projector.
        """
        if n_actions:
            assert self.oft is not None
            inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "pixel_values": pixel_values}
            return self.oft(self, inputs, n_actions, proprio)
        if pixel_values is not None:
            if input_ids is None:
                raise ValueError("pixel_values need input_ids, which say where the patches go")
            if not torch.compiler.is_compiling():
                input_ids, attention_mask, labels = place_images(
                    input_ids, attention_mask, labels, self.n_image_tokens, len(pixel_values)
                )
            words = self.get_input_embeddings()(input_ids)
            features = self.get_image_features(pixel_values).to(words.dtype)
            inputs_embeds = words.masked_scatter((input_ids == IMAGE_TOKEN_ID)[..., None], features)
        elif inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
        assert inputs_embeds is not None
        if position_ids is None and attention_mask is not None and attention_mask.ndim == 2:
            position_ids = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, -inputs_embeds.shape[1] :]
        return self.language_model(
            inputs_embeds=inputs_embeds, attention_mask=attention_mask, position_ids=position_ids, labels=labels,
            past_key_values=past_key_values, use_cache=use_cache, logits_to_keep=logits_to_keep, **kwargs,
        )  # fmt: skip

    def generate(self, inputs: torch.Tensor | None = None, **kwargs: Any) -> Any:
        """As `GenerationMixin.generate`; with images, the answered ids include the patches' places."""
        input_ids = kwargs.pop("input_ids", inputs)
        if input_ids is not None and kwargs.get("pixel_values") is not None:
            mask = kwargs.get("attention_mask")
            mask = torch.ones_like(input_ids) if mask is None else mask
            n_images = len(kwargs["pixel_values"])
            input_ids, kwargs["attention_mask"], _ = place_images(input_ids, mask, None, self.n_image_tokens, n_images)
        return super().generate(input_ids, **kwargs)  # pyright: ignore[reportAttributeAccessIssue]

    def save_pretrained(self, save_directory: Any, *, max_shard_size: int | str = "5GB", **kwargs: Any) -> None:
        """In the layout and naming that the authors' loader opens."""
        super().save_pretrained(save_directory, max_shard_size=max_shard_size, **kwargs)
        write_json(Path(save_directory) / "config.json", published(self.config, self.dtype))

    def prepare_inputs_for_generation(
        self, input_ids: torch.Tensor, pixel_values: torch.Tensor | None = None, is_first_iteration: bool = False, **kwargs: Any
    ) -> dict[str, Any]:  # fmt: skip
        """The images belong to the first pass: the empty cache that `generate` hands in there says nothing."""
        inputs = super().prepare_inputs_for_generation(  # pyright: ignore[reportAttributeAccessIssue]
            input_ids, is_first_iteration=is_first_iteration, **kwargs
        )
        if is_first_iteration or not kwargs.get("use_cache", True):
            inputs["pixel_values"] = pixel_values
        return inputs


def place_images(
    input_ids: torch.Tensor, attention_mask: torch.Tensor | None, labels: torch.Tensor | None, n_patches: int, n_images: int
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:  # fmt: skip
    """Make room for `n_patches` patches after each row's first unpadded id, BOS; ids, mask and labels (B, T) -> (B, T + P).

    What has its places already comes back as it is.

    Raises:
        VlaError: another number of places than patches in a row (the instruction says <unk>), or of images than rows.
    """
    if len(input_ids) != n_images:
        raise problem(f"{n_images} images for {len(input_ids)} prompts", "one image per prompt", "give one each")
    counts = (input_ids == IMAGE_TOKEN_ID).sum(1)
    low, high = (int(n) for n in torch.stack([counts.min(), counts.max()]).tolist())
    if low == high == n_patches:
        return input_ids, attention_mask, labels
    if high != 0:
        raise problem(f"{low} .. {high} ids <unk> in a prompt", f"none, or {n_patches} that stand for the image",
                      "take <unk> out of the instruction")  # fmt: skip
    places = torch.arange(input_ids.shape[1] + n_patches, device=input_ids.device)[None]  # (1, T + P)
    bos = torch.zeros_like(counts) if attention_mask is None else attention_mask.long().argmax(1)
    after = places - bos[:, None]  # (B, T + P), 0 at BOS
    source = torch.where(after <= 0, places, (places - n_patches).clamp(min=0)).clamp(max=input_ids.shape[1] - 1)
    is_image = (after > 0) & (after <= n_patches)

    def grow(tensor: torch.Tensor | None, fill: int) -> torch.Tensor | None:
        return None if tensor is None else tensor.gather(1, source).masked_fill(is_image, fill)

    grown = grow(input_ids, IMAGE_TOKEN_ID)
    assert grown is not None
    return grown, grow(attention_mask, 1), grow(labels, IGNORED_LABEL)
