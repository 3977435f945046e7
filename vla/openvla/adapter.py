"""LoRA adapters that OpenVLA's own `finetune.py` wrote, put onto our model by name.

They hold what peft's `all-linear` found there: every linear layer of the vision transformers, the projector and the
language model, and, because its names are suffixes, `lm_head` and the patch embedding's convolution too. peft then also
stores a copy of the base model's `lm_head`, by which a wrong base is known.

A run with FiLM has the vision backbone, its LoRA included, in a file of its own (`film_file.py`). What the adapter says of
it is left out here, as it is, without a word, by the authors' own merge: in their adapter those names fit no model.
"""

from __future__ import annotations

from pathlib import Path

import torch
from peft import PeftConfig, PeftModel, get_peft_model_state_dict
from safetensors import SafetensorError, safe_open

from vla.openvla.checkpoint import check_weights
from vla.openvla.model import OpenVlaForActionPrediction
from vla.types import problem

WEIGHTS = "adapter_model.safetensors"
PREFIX, BASE_LAYER = "base_model.model.", ".base_layer.weight"
OF_FILM = f"{PREFIX}vision_backbone.vision_backbone."


def attach_adapter(model: OpenVlaForActionPrediction, folder: Path) -> PeftModel:
    """`model` within a PEFT model that has the adapter's weights, every one of them.

    Raises:
        VlaError: no adapter there, a pickled one, one whose names and shapes are not this model's, or one of a run with
            FiLM on a model without.
    """
    if not (folder / "adapter_config.json").is_file() or not (folder / WEIGHTS).is_file():
        pickled = (
            " but a pickled adapter_model.bin, which is never opened"
            if (folder / "adapter_model.bin").is_file()
            else ""
        )
        raise problem(f"{folder} without adapter_config.json and {WEIGHTS}{pickled}", "a PEFT adapter",
                      "check --adapter, or save the adapter with a current peft")  # fmt: skip
    try:
        with safe_open(folder / WEIGHTS, framework="pt") as file:
            found = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
            for name in [name for name in found if name.endswith(BASE_LAYER)]:
                _check_base(model, name, file.get_tensor(name))
                del found[name]
        config = PeftConfig.from_pretrained(str(folder))
        if any(name.startswith(OF_FILM) for name in found):
            _check_film(model)
            config.exclude_modules = r"vision_backbone\..*"  # pyright: ignore[reportAttributeAccessIssue]
            found = {name: shape for name, shape in found.items() if not name.startswith(OF_FILM)}
        adapted = PeftModel.from_pretrained(model, str(folder), config=config)
    except (SafetensorError, OSError, ValueError, RuntimeError, TypeError, KeyError) as error:
        raise problem(f"{folder}: {error}", "a LoRA adapter of an OpenVLA model of this size",
                      "give the adapter that belongs to this base model") from error  # fmt: skip
    state = get_peft_model_state_dict(adapted, save_embedding_layers=False)
    wanted = {name: tuple(tensor.shape) for name, tensor in state.items() if not name.endswith(BASE_LAYER)}
    check_weights(found, wanted, str(folder / WEIGHTS))
    return adapted.eval()


def _check_film(model: OpenVlaForActionPrediction) -> None:
    if not model.vision_backbone.film:
        raise problem("an adapter of a run with FiLM, on a model without", "the run's vision_backbone--*_checkpoint.pt too",
                      "load that first, with `vla.openvla.film_file.load_vision_backbone`")  # fmt: skip


def _check_base(model: OpenVlaForActionPrediction, name: str, stored: torch.Tensor) -> None:
    """The adapter's copy of a base weight must be this model's, up to bfloat16."""
    own = model.get_parameter(name.removeprefix(PREFIX).removesuffix(BASE_LAYER) + ".weight")
    if own.shape != stored.shape or not torch.equal(own.to("cpu", torch.bfloat16), stored.to(torch.bfloat16)):
        raise problem(f"an adapter whose copy of {name.removeprefix(PREFIX)} is not the model's", "its own base model",
                      "give the base that it was trained on")  # fmt: skip
