"""What OpenVLA-OFT adds to an OpenVLA, as parts of the model itself.

    attach(model, new_parts(model, spec.head, action_dim))        # in place; after LoRA, before gradient checkpointing
    model(**inputs, n_actions=H * D)                # l1: normalised actions (B, H, D); discrete: logits (B, H * D, V)

Because the parts are in the model, whatever wraps it (PEFT, DDP, FSDP, compilation) has them too: gradients are averaged,
checkpoints hold them. They are not the base's weights, so they are attached after its fingerprint is taken, and after
LoRA, which would otherwise be put on them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from vla.openvla.checkpoint import check_weights
from vla.openvla.film import add_film, film_parameters, load_film, train_film
from vla.openvla.model import OpenVlaForActionPrediction
from vla.openvla.oft import L1Head, ProprioProjector, action_states
from vla.spec import HeadSpec
from vla.types import problem

ACTION_HEAD, PROPRIO, FILM = "action_head", "proprio_projector", "film"
"""Files `head/NAME.safetensors`; tensors are named as in the authors' files."""


class OftParts(nn.Module):
    """`model.oft`: the action head (None: the language model's own) and the state's projector (None: no state)."""

    def __init__(self, action_head: L1Head | None, proprio_projector: ProprioProjector | None) -> None:
        super().__init__()
        self.action_head = action_head
        self.proprio_projector = proprio_projector

    def forward(self, model: OpenVlaForActionPrediction, inputs: dict[str, Any], n_actions: int, state: torch.Tensor | None) -> torch.Tensor:  # fmt: skip
        """See `OpenVlaForActionPrediction.forward`."""
        if (state is None) != (self.proprio_projector is None):
            raise ValueError("a state goes with a proprio projector, and with nothing else")
        token = None if self.proprio_projector is None or state is None else self.proprio_projector(state)
        states = action_states(model, **inputs, n_actions=n_actions, proprio=token)
        return model.get_output_embeddings()(states) if self.action_head is None else self.action_head(states)


def inner(model: Any) -> OpenVlaForActionPrediction:
    """The OpenVLA inside a PEFT model, or itself.

    Raises:
        VlaError: another model.
    """
    found: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    if not isinstance(found, OpenVlaForActionPrediction):
        raise problem(f"parallel decoding with a {found.config.model_type} model", "OpenVLA: it decodes in OpenVLA-OFT's way",
                      "pass --backbone openvla/openvla-7b, or --head tokens")  # fmt: skip
    return found


def expect(model: Any, head: HeadSpec) -> None:
    """Tell a model, before LoRA is put on it, what head it will have: an L1 head leaves the language model's output head idle.

    Raises:
        VlaError: it is no OpenVLA.
    """
    inner(model).output_head_idle = head.kind == "l1"


def new_parts(model: Any, head: HeadSpec, action_dim: int) -> OftParts:
    """Fresh parts of the authors' sizes, float32 on the CPU."""
    llm_dim = inner(model).config.text_config.hidden_size
    return OftParts(
        L1Head(llm_dim, llm_dim, action_dim) if head.kind == "l1" else None,
        ProprioProjector(llm_dim, len(head.state_names)) if head.state_names else None,
    )


def attach(model: Any, parts: OftParts, dtype: torch.dtype | None = None) -> None:
    """Make `parts` the model's own, in place, on its device; frozen."""
    target = inner(model)
    target.oft = parts.to(device=target.device, dtype=dtype).requires_grad_(False).eval()
    target.output_head_idle = parts.action_head is not None


def train_new_parts(model: Any, head: HeadSpec, action_dim: int) -> None:
    """Attach fresh parts, FiLM among them, and have them train, in float32."""
    target = inner(model)
    attach(model, new_parts(model, head, action_dim), torch.float32)
    if head.film:
        add_film(target)
    train_parts(model)


def train_parts(model: Any) -> None:
    """Gradients for what OFT added, in float32; none for an output head that an L1 head leaves unused."""
    target = inner(model)
    assert isinstance(target.oft, OftParts)
    for parameter in target.oft.parameters():
        parameter.data = parameter.data.float()
        parameter.requires_grad_(True)
    if target.vision_backbone.film:
        train_film(target)
    if target.output_head_idle:  # not a LoRA on it either: it would never get a gradient, which DDP does not allow
        target.get_output_embeddings().requires_grad_(False)


def part_parameters(model: Any) -> dict[str, dict[str, tuple[str, nn.Parameter]]]:
    """File -> name in it -> (name in `inner(model)`, parameter)."""
    target, found = inner(model), {}
    assert isinstance(target.oft, OftParts)
    for file, module in ((ACTION_HEAD, target.oft.action_head), (PROPRIO, target.oft.proprio_projector)):
        if module is not None:
            found[file] = {name: (f"oft.{file}.{name}", p) for name, p in module.named_parameters()}
    if film := film_parameters(target):
        found[FILM] = {name: (f"vision_backbone.{name}", p) for name, p in film.items()}
    return found


def without_parts(model: Any, weights: dict[str, torch.Tensor] | None = None) -> dict[str, torch.Tensor]:
    """The state dict of a model without PEFT around it, or `weights` instead of it, without what OFT added."""
    added = {name for part in part_parameters(model).values() for name, _ in part.values()}
    return {name: tensor for name, tensor in (weights or model.state_dict()).items() if name not in added}


def write_parts(folder: Path, model: Any, weights: dict[str, torch.Tensor] | None = None) -> None:
    """`folder/NAME.safetensors` of each part.

    Args:
        weights: parameters by the name they have in `model`, instead of its own; those that do not train are not among them.
    """
    prefix = "base_model.model." if isinstance(model, PeftModel) else ""
    folder.mkdir()
    for file, part in part_parameters(model).items():
        tensors = {}
        for name, (own, parameter) in part.items():
            if weights is None:
                tensors[name] = parameter.detach().cpu().contiguous()
            else:  # FiLM of the last block, which nothing runs, does not train
                found = weights.get(prefix + own)
                tensors[name] = torch.zeros(parameter.shape) if found is None else found.cpu().contiguous()
        save_file(tensors, folder / f"{file}.safetensors", metadata={"format": "pt"})


def read_parts(folder: Path, model: Any, head: HeadSpec, action_dim: int, dtype: torch.dtype) -> None:
    """Attach what `write_parts` wrote.

    Raises:
        VlaError: a file that is missing, damaged, or of another size.
    """
    target, parts = inner(model), new_parts(model, head, action_dim)
    for file, module in ((ACTION_HEAD, parts.action_head), (PROPRIO, parts.proprio_projector)):
        if module is not None:
            fill(module, _read(folder / f"{file}.safetensors"), str(folder / f"{file}.safetensors"))
    attach(model, parts, dtype)
    if head.film:
        load_film(target, _read(folder / f"{FILM}.safetensors"), str(folder / f"{FILM}.safetensors"))


def fill(module: nn.Module, tensors: dict[str, torch.Tensor], where: str) -> None:
    """VlaError unless names and shapes are the module's."""
    shapes = [{name: tuple(t.shape) for name, t in part.items()} for part in (tensors, module.state_dict())]
    check_weights(shapes[0], shapes[1], where)
    module.load_state_dict(tensors)


def _read(path: Path) -> dict[str, torch.Tensor]:
    if not path.is_file():
        raise problem(f"no {path.parent.name}/{path.name} in {path.parent.parent}", "it, as policy.json says",
                      "restore the file from a copy of the policy")  # fmt: skip
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise problem(f"{path}: {error}", "a whole safetensors file", "restore the file from a copy of the policy") from error  # fmt: skip
