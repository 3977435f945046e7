"""OpenVLA-7B as shapes, for estimates of memory without its weights: Llama-2-7B, DINOv2 ViT-L and SigLIP So400m."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

from vla.adapters import PARTS, Method, attach_lora, train_parts
from vla.backbone import Backbone
from vla.gradient_checkpoint import checkpoint_layers
from vla.kbit import quantize_linears
from vla.openvla.config import OpenVlaConfig
from vla.openvla.model import OpenVlaForActionPrediction

VOCABULARY = 32064
ACTION_IDS = range(31744, 32000)
IMAGE_SIDE_PX, N_PATCHES, N_WORDS = 224, 256, 24
"""Of a prompt such as "In: What action should the robot take to put the bowl on the plate?\\nOut:", with BOS."""


def openvla_7b(
    method: Method, *, r: int = 32, gradient_checkpointing: bool = True, dtype: torch.dtype = torch.bfloat16, device: str = "meta",
    n_layers: int = 32, train_ids: bool = True,
) -> Backbone:  # fmt: skip
    """The published architecture with LoRA of rank `r` on all linear layers, or what `method` says.

    Args:
        dtype: of frozen weights; of all, with `full`, float32.
        device: `meta` allocates nothing; elsewhere the weights are random.
        n_layers: of the language model; fewer for a quick look.
        train_ids: the 256 action rows of embedding and output head train as well. The authors' script leaves them.
    """
    config = OpenVlaConfig(text_config={"vocab_size": VOCABULARY, "num_hidden_layers": n_layers})
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32 if method == "full" else dtype)
    try:
        with torch.device(device):
            model: Any = OpenVlaForActionPrediction(config)
    finally:
        torch.set_default_dtype(before)
    words = SimpleNamespace(padding_side="left", pad_token_id=0, eos_token_id=2, bos_token_id=1)
    backbone = Backbone(model.eval(), SimpleNamespace(tokenizer=words, chat_template=None))
    with torch.device(device):
        if method == "full":
            train_parts(backbone, PARTS)
        else:
            if method == "qlora":
                quantize_linears(model, dtype)
            ids = ACTION_IDS if train_ids else []
            attach_lora(backbone, r=r, alpha=16, dropout=0.0, parts=PARTS, train_ids=ids, method=method)
    if gradient_checkpointing:
        checkpoint_layers(backbone.model)
    return backbone


def openvla_batch(
    batch_size: int, dtype: torch.dtype, device: str = "cpu"
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """(model inputs of B prompts with one image each, int64 (B, 7) action ids), meaningless but of the right shapes."""
    row = [1, *[0] * N_PATCHES, *range(100, 100 + N_WORDS - 1)]
    ids = torch.tensor([row] * batch_size, device=device)
    pixels = torch.zeros(batch_size, 6, IMAGE_SIDE_PX, IMAGE_SIDE_PX, dtype=dtype, device=device)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}
    return inputs, torch.tensor([list(ACTION_IDS[:7])] * batch_size, device=device)
