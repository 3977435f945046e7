"""Weight quantization for serving. What was really done is returned and shown in the policy's metadata.

nf4 and int8 are bitsandbytes' where it is installed and supports the device (it has CPU kernels since 0.46); without it,
int8 is torch's own dynamic int8 of the linear layers, on CPU only. There is no substitute for nf4.
"""

from __future__ import annotations

import importlib.util
import logging
import warnings
from typing import Any

import torch
from torch import nn

from vla.types import problem

METHODS = ("none", "int8", "nf4")


def quantized_options(method: str, device: str) -> tuple[dict[str, Any], str]:
    """(`from_pretrained` options, what will be done: none | bitsandbytes-int8 | bitsandbytes-nf4 | torch-dynamic-int8)."""
    if method not in METHODS:
        raise problem(f"quantization {method!r}", f"one of {', '.join(METHODS)}", "correct --quantization")
    if method == "none":
        return {}, "none"
    if importlib.util.find_spec("bitsandbytes") is None:
        if method == "int8" and device == "cpu":
            return {}, "torch-dynamic-int8"
        raise problem(f"{method} on {device} without bitsandbytes", "bitsandbytes", "pip install 'vla-toolkit[bnb]'")
    from transformers import BitsAndBytesConfig

    logging.getLogger("bitsandbytes.autograd._functions").setLevel(
        logging.ERROR
    )  # a line per int8 call with fp32 input
    warnings.filterwarnings("ignore", message="MatMul8bitLt: inputs will be cast")
    if method == "int8":
        config = BitsAndBytesConfig(load_in_8bit=True)
    else:
        config = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.float32 if device == "cpu" else torch.bfloat16,
        )  # fmt: skip
    return {"quantization_config": config, "device_map": {"": device}}, f"bitsandbytes-{method}"


def quantize_loaded(model: Any, done: str) -> Any:
    """Apply what has to be done after loading."""
    if done != "torch-dynamic-int8":
        return model
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8, inplace=True)


def weight_bytes(model: nn.Module) -> int:
    """Bytes held by parameters, buffers and packed quantized weights."""
    seen: dict[int, int] = {}
    for module in model.modules():
        for tensor in [*module.parameters(recurse=False), *module.buffers(recurse=False), *_packed(module)]:
            seen[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
    return sum(seen.values())


def _packed(module: nn.Module) -> list[torch.Tensor]:
    from torch.ao.nn.quantized.dynamic import Linear  # importing torch.ao is slow, and most programs never need it

    if isinstance(module, Linear):
        weight, bias = getattr(module, "_packed_params")._weight_bias()  # noqa: B009 - typed as a plain Module
        return [weight.int_repr(), *([bias] if bias is not None else [])]
    return []
