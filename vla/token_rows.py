"""Trained vocabulary rows without copies of the whole vocabulary.

PEFT keeps trained rows apart from the frozen matrix and, at every forward pass, builds a copy of the matrix with the rows
put in: for 32 000 x 4096 in float32 that is 0.5 GB for the embedding, the same for the output head, and as much again for
the gradients of both. Here only the rows that are looked up are taken. The values are the same.

`only_rows` goes further: inside it the output head computes the logits of a few ids and no others.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import TrainableTokensWrapper
from torch import nn
from torch.nn.functional import embedding, linear

from vla.types import problem


def lean_token_rows(model: nn.Module) -> int:
    """Let every layer of `model` with trained rows work without copies of its matrix; returns how many there are."""
    found = [module for module in model.modules() if isinstance(module, TrainableTokensWrapper)]
    for wrapper in found:
        wrapper.forward = functools.partial(_lean_forward, wrapper)
    return len(found)


@contextlib.contextmanager
def only_rows(model: Any, rows: torch.Tensor | None) -> Iterator[None]:
    """Inside, the output head of `model` returns logits (..., n) of the ids `rows` (n,) instead of (..., V).

    What a model does to logits afterwards must treat each alone, as scaling and soft-capping do. None changes nothing.
    """
    if rows is None:
        yield
        return
    head = model.get_output_embeddings()
    if head is None:
        raise problem(
            f"{type(model).__name__} without an output head", "a model that predicts tokens", "choose another"
        )
    if "narrowed_to" not in head.__dict__:  # once, so that a compiled model is not compiled again
        head.narrowed_to = None
        head.forward = functools.partial(_head_forward, head, head.forward)
    head.narrowed_to = rows
    try:
        yield
    finally:
        head.narrowed_to = None


def _head_forward(head: Any, plain: Any, hidden: torch.Tensor) -> torch.Tensor:
    rows = head.narrowed_to
    if rows is None:
        return plain(hidden)
    if isinstance(head, BaseTunerLayer):  # LoRA on the head: its `weight` is that of the frozen layer alone
        return plain(hidden)[..., rows.to(hidden.device)]
    rows, trained = rows.to(hidden.device), _trained(head) if isinstance(head, TrainableTokensWrapper) else None
    base: Any = head.token_adapter.base_layer if isinstance(head, TrainableTokensWrapper) else head
    weight = base.weight[rows] if trained is None else _rows_of(base.weight, trained, rows)
    return linear(hidden, weight, None if base.bias is None else base.bias[rows])


def _lean_forward(wrapper: TrainableTokensWrapper, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    """The wrapper's own `forward`, for one adapter that is switched on and not merged; else that."""
    trained = _trained(wrapper)
    base: Any = wrapper.token_adapter.base_layer
    if trained is None or args or kwargs:
        return type(wrapper).forward(wrapper, x, *args, **kwargs)
    values, places = trained
    if isinstance(base, nn.Embedding):
        frozen, at = base(x), places[x]  # a family's scaling is in its own embedding class
        rows = embedding(at.clamp(min=0), values)
        scale = wrapper.token_adapter._get_embed_scale()
        rows = rows if scale is None else rows * scale.to(rows.dtype)
        return torch.where(at[..., None] >= 0, rows.to(frozen.dtype), frozen)
    ids = _ids(wrapper)
    # Of a slice in memory, `linear` makes a product per row of the batch, and its backward pass in bfloat16 on a CPU then
    # holds a copy of the whole matrix for each of them.
    x = x.contiguous()
    frozen = base(x)
    new = linear(x, values.to(base.weight.dtype), None if base.bias is None else base.bias[ids])
    return frozen.index_copy(-1, ids, new.to(frozen.dtype))


def _trained(wrapper: TrainableTokensWrapper) -> tuple[torch.Tensor, torch.Tensor] | None:
    """(trained rows (n, d), int64 (V,) the row that stands for an id, or -1); None if there are none to use."""
    layer: Any = wrapper.token_adapter
    names = layer.active_adapters
    if layer.disable_adapters or layer.merged or wrapper.disable_adapters or len(names) != 1:
        return None
    values = layer.trainable_tokens_delta[names[0]]
    return values, _table(wrapper, names[0], values.device)[0]


def _ids(wrapper: TrainableTokensWrapper) -> torch.Tensor:
    layer: Any = wrapper.token_adapter
    return _table(wrapper, layer.active_adapters[0], layer.base_layer.weight.device)[1]


def _table(wrapper: Any, adapter: str, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """(int64 (V,) id -> trained row or -1, int64 (n,) trained ids), kept on the wrapper."""
    device = torch.device("cpu") if device.type == "meta" else device
    key = (adapter, device)
    kept: dict[Any, tuple[torch.Tensor, torch.Tensor]] = wrapper.__dict__.setdefault("token_tables", {})
    if key not in kept:
        ids = torch.tensor(wrapper.token_adapter.token_indices[adapter], device=device)
        places = torch.full((wrapper.token_adapter.base_layer.weight.shape[0],), -1, device=device)
        places[ids] = torch.arange(len(ids), device=device)
        kept[key] = places, ids
    return kept[key]


def _rows_of(weight: torch.Tensor, trained: tuple[torch.Tensor, torch.Tensor], rows: torch.Tensor) -> torch.Tensor:
    """(n, d) rows of the matrix with its trained rows put in."""
    values, places = trained
    at = places[rows]
    new = values[at.clamp(min=0)].to(weight.dtype)
    return torch.where(at[:, None] >= 0, new, weight[rows])
