"""Policies that fine-tuning goes on with: those of a policy directory, and LoRAs of OpenVLA's own script."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch

from vla.adapters import ALL_LINEAR, load_dtype, make_trainable, place_actions
from vla.backbone import DTYPES, Backbone, fingerprint, load_backbone
from vla.finetune.sft_settings import Settings
from vla.kbit import require_bitsandbytes
from vla.lean_lora import lean_lora
from vla.normalize import Statistics
from vla.openvla.adapter import PREFIX, attach_adapter
from vla.openvla.oft_model import expect, read_parts, train_parts
from vla.policy import LocalPolicy, load_policy
from vla.policy_files import STATISTICS_FILE, read_statistics
from vla.spec import HEAD_FOLDER, BackboneSpec, PolicySpec, TokenSpec, read_tokenizer
from vla.tokenizers.placement import Placement
from vla.tokenizers.protocol import ActionTokenizer
from vla.tokenizers.schemes import scheme_of
from vla.types import problem

OPENVLA_TOKENS = TokenSpec(placement={"kind": "tail", "first_id": 31999, "step": -1, "n": 256})
"""256 uniform bins on the last ids before the padding."""


def continued_policy(
    settings: Settings, spec: PolicySpec, folder: Path, statistics: Statistics, key: str | None, control_hz: float,
    device: str, dtype: str,
) -> LocalPolicy:  # fmt: skip
    """The policy of a directory, to train on: its adapter as it is, or a fresh one on merged or published weights.

    Args:
        key: whose statistics it acts by; None: to be chosen by whoever opens the result.
        control_hz: of the data, where the policy does not know it.
        dtype: of frozen weights.
    """
    if spec.backbone.weights == "adapter":
        any_key = spec.unnorm_key or min(read_statistics(folder / STATISTICS_FILE))
        backbone = load_policy(
            folder, device=device, dtype=load_dtype(settings.method, dtype), trainable=True, unnorm_key=any_key
        ).backbone
        train_again(backbone.model, DTYPES[dtype])
        base, tokens = spec.backbone, spec.tokens
    else:
        backbone, base = _fresh_adapter(settings, spec, folder, device, dtype)
        tokens = dataclasses.replace(spec.tokens, n_added=0)  # the weights have them
    action = dataclasses.replace(spec.action, control_hz=spec.action.control_hz or control_hz)
    new = dataclasses.replace(
        spec, name=settings.out.name, backbone=base, action=action, tokens=tokens, unnorm_key=key, temperature=0.0
    )
    return LocalPolicy(
        new, backbone, statistics, read_tokenizer(folder, spec), unnorm_key=key or next(iter(statistics))
    )


def _fresh_adapter(
    settings: Settings, spec: PolicySpec, folder: Path, device: str, dtype: str
) -> tuple[Backbone, BackboneSpec]:
    """The merged or published weights of a policy, with what trains on them.

    Raises:
        VlaError: weights that are not there, or not those that the policy was made of.
    """
    merged, packed = spec.backbone.weights == "merged", settings.method == "qlora"
    if packed:
        require_bitsandbytes("method qlora")
    source = str((folder / "model").resolve()) if merged else spec.backbone.source
    revision = None if merged else spec.backbone.revision
    backbone = load_backbone(
        source, processor_path=folder / "processor" if merged else None, dtype=load_dtype(settings.method, dtype),
        device="cpu" if packed else device, **({} if revision is None else {"revision": revision}),
    )  # fmt: skip
    found = fingerprint(backbone.model)
    if not merged and spec.backbone.fingerprint not in ("", found):
        raise problem(f"weights {found} at {source}", f"{spec.backbone.fingerprint}, which the policy was imported from",
                      "restore those weights, or import the policy again")  # fmt: skip
    own_rows = ALL_LINEAR not in settings.lora_parts and spec.head is None
    if spec.head is not None:
        expect(backbone.model, spec.head)
    make_trainable(
        backbone, settings.method, dtype=DTYPES[dtype], device=device, r=settings.lora_r, alpha=settings.lora_alpha,
        dropout=settings.lora_dropout, parts=settings.lora_parts, init=settings.lora_init,
        train_ids=_own_ids(spec) if own_rows else (),
    )  # fmt: skip
    if spec.head is not None:
        read_parts(folder / HEAD_FOLDER, backbone.model, spec.head, spec.action.dim, torch.float32)
        train_parts(backbone.model)
    base = BackboneSpec(
        source, backbone.config.model_type, "adapter", revision, found, quantization="nf4" if packed else "none"
    )
    return backbone, base


def _own_ids(spec: PolicySpec) -> tuple[int, ...]:
    """Of the actions and of the numbers in the prompt, which may be the same."""
    placements = [place for place in (spec.tokens.placement, spec.prompt.number_ids) if place]
    return tuple(dict.fromkeys(int(i) for place in placements for i in Placement.load(place).ids))


def policy_on_lora(
    spec: PolicySpec, folder: Path, statistics: Statistics, tokenizer: ActionTokenizer, device: str, dtype: str
) -> LocalPolicy:
    """A policy of OpenVLA's kind from a LoRA folder of its authors' script, which trains on.

    Args:
        spec: of which `tokens` and all but the source of `backbone` are filled in here.
    """
    backbone = load_backbone(spec.backbone.source, dtype=load_dtype("lora", dtype), device=device)
    base = dataclasses.replace(
        spec.backbone, model_type="openvla", weights="adapter", fingerprint=fingerprint(backbone.model)
    )
    placed, _ = place_actions(backbone, "tail", tokenizer.vocab_size)
    backbone.model = attach_adapter(backbone.model, folder)
    train_again(backbone.model, DTYPES[dtype], lora=True)
    tokens = TokenSpec(scheme_of(tokenizer), tokenizer.vocab_size, placed.save())
    new = dataclasses.replace(spec, backbone=base, tokens=tokens)
    return LocalPolicy(new, backbone, statistics, tokenizer, unnorm_key=spec.unnorm_key or next(iter(statistics)))


def train_again(model: Any, dtype: torch.dtype, lora: bool = False) -> None:
    """An adapter's parameters train, in float32; what is frozen gets `dtype`. Those on layers that the model does not run,
    which the authors' script makes too, stay as they are.

    Args:
        lora: the adapter was opened for acting: all LoRA parameters begin to train.
    """
    idle = getattr(model.get_base_model(), "idle_modules", ())
    for name, parameter in model.named_parameters():
        trains = "lora_" in name if lora else parameter.requires_grad
        parameter.requires_grad_(trains and not name.removeprefix(PREFIX).startswith(idle))
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
        elif parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)
    lean_lora(model)
    model.eval()
