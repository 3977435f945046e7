"""OpenVLA's config.json, read and written in the published form.

Field names, their defaults and the tables of vision backbones are those of `prismatic/extern/hf/configuration_prismatic.py`
(openvla/openvla@c8f03f4). Values in a config.json win over the tables, as they do there.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from vla.types import problem

DINOV2, SIGLIP = "vit_large_patch14_reg4_dinov2.lvd142m", "vit_so400m_patch14_siglip_{}"
CLIP, IN1K = "vit_large_patch14_clip_{}.openai", "vit_large_patch16_224.augreg_in21k_ft_in1k"
VISION_BACKBONES: dict[str, tuple[int, tuple[str, ...]]] = {
    "clip-vit-l": (224, (CLIP.format(224),)),
    "clip-vit-l-336px": (336, (CLIP.format(336),)),
    "dinov2-vit-l": (224, (DINOV2,)),
    "in1k-vit-l": (224, (IN1K,)),
    "siglip-vit-so400m": (224, (SIGLIP.format(224),)),
    "siglip-vit-so400m-384px": (384, (SIGLIP.format(384),)),
    "dinoclip-vit-l-336px": (336, (DINOV2, CLIP.format(336))),
    "dinosiglip-vit-so-224px": (224, (DINOV2, SIGLIP.format(224))),
    "dinosiglip-vit-so-384px": (384, (DINOV2, SIGLIP.format(384))),
}
"""`vision_backbone_id` -> (image side in px, timm models)."""
LANGUAGE_MODELS = {
    "llama2-7b-pure": ("llama", "meta-llama/Llama-2-7b-hf"),
    "llama2-13b-pure": ("llama", "meta-llama/Llama-2-13b-hf"),
    "llama2-7b-chat": ("llama", "meta-llama/Llama-2-7b-chat-hf"),
    "llama2-13b-chat": ("llama", "meta-llama/Llama-2-13b-chat-hf"),
    "vicuna-v15-7b": ("llama", "lmsys/vicuna-7b-v1.5"),
    "vicuna-v15-13b": ("llama", "lmsys/vicuna-13b-v1.5"),
    "mistral-v0.1-7b-pure": ("mistral", "mistralai/Mistral-7B-v0.1"),
    "mistral-v0.1-7b-instruct": ("mistral", "mistralai/Mistral-7B-Instruct-v0.1"),
}
"""`llm_backbone_id` -> (model type, Hub id). Phi-2 is left out: no OpenVLA has it, and its id 0 is a word."""

IMAGE_TOKEN_ID = 0
"""<unk>: a byte-fallback vocabulary never produces it. Its embedding is not looked at where a patch stands."""
HUB_CODE = "openvla/openvla-7b--"
"""Makes the authors' own loader find its code wherever the folder lies. Nothing here ever follows it."""


class OpenVlaConfig(PreTrainedConfig):
    """See the module. `timm_model_args` is ours: keywords of `timm.create_model` per featurizer, for small copies in
    tests; published checkpoints do not have it."""

    model_type = "openvla"
    sub_configs = {"text_config": AutoConfig}  # pyright: ignore[reportAssignmentType]

    def __init__(
        self,
        vision_backbone_id: str = "dinosiglip-vit-so-224px",
        llm_backbone_id: str = "llama2-7b-pure",
        arch_specifier: str = "no-align+fused-gelu-mlp",
        use_fused_vision_backbone: bool | None = None,
        image_resize_strategy: str = "resize-naive",
        text_config: dict[str, Any] | PreTrainedConfig | None = None,
        llm_max_length: int = 2048,
        pad_token_id: int = 32000,
        pad_to_multiple_of: int = 64,
        output_projector_states: bool = False,
        n_action_bins: int = 256,
        norm_stats: dict[str, Any] | None = None,
        timm_model_ids: list[str] | None = None,
        timm_override_act_layers: list[str | None] | None = None,
        image_sizes: list[int] | None = None,
        hf_llm_id: str | None = None,
        timm_model_args: list[dict[str, Any]] | None = None,
        **kwargs: Any,
    ) -> None:
        if vision_backbone_id not in VISION_BACKBONES:
            raise problem(f"vision_backbone_id {vision_backbone_id!r}", f"one of {', '.join(VISION_BACKBONES)}",
                          "correct config.json")  # fmt: skip
        if llm_backbone_id not in LANGUAGE_MODELS:
            raise problem(f"llm_backbone_id {llm_backbone_id!r}", f"one of {', '.join(LANGUAGE_MODELS)}",
                          "correct config.json")  # fmt: skip
        side, names = VISION_BACKBONES[vision_backbone_id]
        llm_type, llm_id = LANGUAGE_MODELS[llm_backbone_id]
        self.vision_backbone_id, self.llm_backbone_id = vision_backbone_id, llm_backbone_id
        self.arch_specifier, self.output_projector_states = arch_specifier, output_projector_states
        fused = len(names) == 2 if use_fused_vision_backbone is None else use_fused_vision_backbone
        self.use_fused_vision_backbone = fused
        self.timm_model_ids = timm_model_ids or list(names)
        self.timm_override_act_layers = timm_override_act_layers or [
            "quick_gelu" if "_clip_" in name else None for name in names
        ]
        self.image_sizes = image_sizes or [side] * len(names)
        self.timm_model_args = timm_model_args
        self.image_resize_strategy, self.llm_max_length = image_resize_strategy, llm_max_length
        self.hf_llm_id = hf_llm_id or llm_id
        self.pad_to_multiple_of, self.n_action_bins, self.norm_stats = pad_to_multiple_of, n_action_bins, norm_stats
        if isinstance(text_config, PreTrainedConfig):
            self.text_config = text_config
        else:
            text = {"model_type": llm_type, **(text_config or {})}
            if text["model_type"] != llm_type:
                raise problem(f"text_config of a {text['model_type']} model", f"{llm_type}, as {llm_backbone_id} is",
                              "correct config.json")  # fmt: skip
            self.text_config = CONFIG_MAPPING[llm_type](**{k: v for k, v in text.items() if k != "model_type"})
        kwargs.pop("auto_map", None)
        super().__init__(**kwargs)
        self.pad_token_id = pad_token_id
        self._check()

    def _check(self) -> None:
        n = 2 if self.use_fused_vision_backbone else 1
        lists = (self.timm_model_ids, self.timm_override_act_layers, self.image_sizes)
        if any(len(values) != n for values in lists) or len(self.timm_model_args or [{}] * n) != n:
            raise problem(f"{len(self.timm_model_ids)} timm_model_ids, {len(self.image_sizes)} image_sizes",
                          f"{n} of each, as use_fused_vision_backbone says", "correct config.json")  # fmt: skip


def published(config: OpenVlaConfig, dtype: torch.dtype) -> dict[str, Any]:
    """config.json as the authors' own classes, on transformers 4.40, read it.

    transformers 5 has other names for two things it stores (`dtype`, `rope_parameters`); 4.40 would silently ignore them.
    """
    text = _text_config(config.text_config)
    name = str(dtype).removeprefix("torch.")
    text["torch_dtype"] = name
    own = (
        "vision_backbone_id", "llm_backbone_id", "arch_specifier", "use_fused_vision_backbone", "image_resize_strategy",
        "llm_max_length", "pad_token_id", "pad_to_multiple_of", "output_projector_states", "n_action_bins", "norm_stats",
        "timm_model_ids", "timm_override_act_layers", "image_sizes", "hf_llm_id",
    )  # fmt: skip
    fields = {key: copy.deepcopy(config.__dict__[key]) for key in own}
    if config.timm_model_args is not None:
        fields["timm_model_args"] = config.timm_model_args
    return {
        "architectures": ["OpenVLAForActionPrediction"],
        "auto_map": {
            "AutoConfig": f"{HUB_CODE}configuration_prismatic.OpenVLAConfig",
            "AutoModelForVision2Seq": f"{HUB_CODE}modeling_prismatic.OpenVLAForActionPrediction",
        },
        "model_type": "openvla",
        **fields,
        "text_config": text,
        "torch_dtype": name,
    }


def _text_config(config: Any) -> dict[str, Any]:
    values = {k: v for k, v in config.to_diff_dict().items() if k not in ("dtype", "transformers_version")}
    rope = dict(values.pop("rope_parameters", None) or {})
    values["rope_theta"] = rope.pop("rope_theta", 10000.0)
    if rope.pop("rope_type", "default") != "default":
        raise problem(f"rope_parameters {rope}", "the default rotary embedding", "OpenVLA's format holds no other")
    values.pop("architectures", None)
    return {**values, "model_type": config.model_type}
