"""The frozen weights under an adapter in 4 bits: QLoRA (Dettmers et al., arXiv 2305.14314).

nf4 with double quantization, by bitsandbytes. Only linear layers are packed; output head, embeddings, norms and
convolutions stay as they are, in float32, as PEFT's `prepare_model_for_kbit_training` leaves them.
"""

from __future__ import annotations

import importlib.util
import logging
from typing import Any

import torch
from torch import nn

from vla.types import problem

NEEDS_BNB = "pip install 'vla-toolkit[bnb]'"
BLOCK = 64
"""Weights that share one scale, bitsandbytes' default."""


def require_bitsandbytes(what: str) -> Any:
    """The package; VlaError that names the extra if it is missing."""
    if importlib.util.find_spec("bitsandbytes") is None:
        raise problem(f"{what} without bitsandbytes", "bitsandbytes", NEEDS_BNB)
    import bitsandbytes

    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # a line about optional CPU kernels at each start
    return bitsandbytes


def quantize_linears(model: Any, compute_dtype: torch.dtype) -> int:
    """Replace every linear layer but the output head by its nf4 form, in place; returns how many.

    All other parameters and buffers become float32. Layers on the CPU are packed at once; `model` may then be moved.
    On the meta device nothing is packed: `vla.memory` counts such layers as if they were.
    """
    bnb = require_bitsandbytes("method qlora")
    head = model.get_output_embeddings()
    found = [
        (name, module)
        for name, module in model.named_modules()
        # Subclasses of Linear are left: what owns them may read their weight directly, as MultiheadAttention does.
        if type(module) is nn.Linear and module is not head
    ]
    for name, linear in found:
        packed = bnb.nn.Linear4bit(
            linear.in_features, linear.out_features, bias=linear.bias is not None, compute_dtype=compute_dtype,
            compress_statistics=True, quant_type="nf4", device="meta",
        )  # fmt: skip
        packed.weight = bnb.nn.Params4bit(
            linear.weight.data, requires_grad=False, quant_type="nf4", compress_statistics=True, blocksize=BLOCK, module=packed
        )  # fmt: skip
        if linear.bias is not None:
            packed.bias = nn.Parameter(linear.bias.data, requires_grad=False)
        if linear.weight.device.type != "meta":
            packed.to(linear.weight.device)  # the first move packs
        # On CPUs with AVX512-BF16 a layer in eval mode would otherwise turn its weights, at the first pass without
        # gradients, into a layout whose product has no backward: later gradients would silently be lost.
        packed.support_avx512bf16_for_cpu = False
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, packed.eval())
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for tensor in tensors.values():
                if tensor is not None and tensor.is_floating_point() and not is_packed(tensor):
                    tensor.data = tensor.data.float()
    model.is_loaded_in_4bit = True  # what PEFT asks before it uses its layer for packed weights
    return len(found)


def is_packed(tensor: torch.Tensor) -> bool:
    """A linear layer's weight in 4 bits, packed already or, on the meta device, to be counted so."""
    return type(tensor).__name__ == "Params4bit"


def packed_numel(tensor: Any) -> int:
    """Weights that a packed parameter stands for."""
    return int(tensor.quant_state.shape.numel()) if tensor.quant_state is not None else tensor.numel()


def packed_bytes(n: int) -> tuple[int, int]:
    """(bytes of n weights at 4 bits, bytes of their scales).

    Double quantization: one 8-bit scale per 64 weights, one float32 per 256 scales, and two tables of 16 and 256 floats.
    """
    blocks = -(-n // BLOCK)
    return -(-n // 2), blocks + 4 * -(-blocks // 256) + 4 * (16 + 256) + 4
