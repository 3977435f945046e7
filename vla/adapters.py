"""Action tokens into a model's vocabulary, LoRA or one of its kin onto its layers.

Order matters and is stored with the policy: add tokens, resize the embedding, then attach the adapter. An adapter with
trained token rows cannot be loaded onto an embedding that was not resized first.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Any, Literal

import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from vla.backbone import Backbone
from vla.fold_norms import unfold_norms
from vla.kbit import is_packed, packed_numel, quantize_linears
from vla.lean_lora import lean_lora
from vla.token_rows import lean_token_rows
from vla.tokenizers.integer_text import character_ids
from vla.tokenizers.placement import Placement
from vla.types import problem

PlacementKind = Literal["tail", "reserved", "added", "text"]
"""text: the model's own digits, for the scheme integer_text; saved as `reserved`."""
AddedInit = Literal["mean", "numbers"]
Method = Literal["lora", "qlora", "dora", "rslora", "full"]
"""How weights train: low-rank additions (Hu et al., arXiv 2106.09685), the same on a base in 4 bits (2305.14314), with the
magnitude of each column apart (2402.09353), scaled by alpha / sqrt(r) instead of alpha / r (2312.03732), or themselves."""
PARTS = ("llm", "projector", "vision")
ALL_PARTS = "all"
ALL_LINEAR = "all-linear"
"""What PEFT's setting of this name finds in OpenVLA: all linear layers, the output head and, because it goes by the last
part of a name, the patch embedding's convolution. The head's LoRA then trains the action tokens' logits."""
LoraInit = Literal["kaiming", "gaussian"]
"""How the first of LoRA's two matrices starts; the second is zero."""


def place_actions(
    backbone: Backbone, kind: PlacementKind, n: int, init: AddedInit = "mean", skip: int = 0
) -> tuple[Placement, int]:
    """Give `n` action symbols a place in the vocabulary; for `added`, the model and tokenizer grow.

    Args:
        skip: ids left out at the end of the vocabulary, `tail` only; 128 for PaliGemma as openpi uses it.

    Returns:
        The placement, and how many tokens were added (0 unless `added`).
    """
    tokenizer = backbone.processor.tokenizer
    special = tokenizer.all_special_ids
    if skip and kind != "tail":
        raise problem(f"skip {skip} with placement {kind!r}", "placement 'tail'", "drop one of them")
    if kind == "tail":
        placement = Placement.tail(
            tokenizer.vocab_size, n, model_vocab_size=backbone.n_embeddings, tokenizer_length=len(tokenizer),
            special_ids=special, skip=skip,
        )  # fmt: skip
        return placement, 0
    if kind == "text":
        ids = character_ids(tokenizer.get_vocab())
        if n != len(ids):
            raise problem(f"{n} symbols with placement 'text'", f"the {len(ids)} characters of integer_text",
                          "pass --tokenizer integer_text, or another placement")  # fmt: skip
        return Placement.reserved(ids, model_vocab_size=backbone.n_embeddings, special_ids=special), 0
    if kind == "reserved":
        ids = reserved_ids(tokenizer)
        if len(ids) < n:
            raise problem(f"{len(ids)} reserved tokens", f"at least {n}", "use --placement added, or fewer bins")
        return Placement.reserved(ids[:n], model_vocab_size=backbone.n_embeddings), 0
    first = add_action_tokens(backbone, n, init)
    return Placement.added(first, n, model_vocab_size=backbone.n_embeddings, special_ids=special), n


def reserved_ids(tokenizer: Any) -> list[int]:
    """Ids of tokens a vocabulary keeps free (<reserved_0>, <|reserved_special_token_0|>, <unused0>, ...), ascending."""
    pattern = re.compile(r"<\|?(reserved|unused|extra_id)[a-z_]*_?\d+\|?>|\[unused\d+\]")
    return sorted(i for token, i in tokenizer.get_vocab().items() if pattern.fullmatch(token))


def add_action_tokens(backbone: Backbone, n: int, init: AddedInit) -> int:
    """Append `<act_0>` .. `<act_{n-1}>`; returns the first id. The new rows are deterministic.

    `mean` starts each row at the mean of the vocabulary, so untrained tokens are equally likely. `numbers` copies the
    row of the integer word of the same bin (symbol s -> round(255 s / (n - 1))): a model that has learned what numbers
    mean then starts with ordered actions.
    """
    tokenizer, model = backbone.processor.tokenizer, backbone.model
    first, old_rows = len(tokenizer), backbone.n_embeddings
    rows = [number_ids(tokenizer, n)] if init == "numbers" else [list(range(min(first, old_rows)))]
    tokenizer.add_tokens([f"<act_{i}>" for i in range(n)])
    if first + n > old_rows:
        model.resize_token_embeddings(first + n, mean_resizing=False)
    layers = {id(layer): layer for layer in (model.get_input_embeddings(), model.get_output_embeddings())}.values()
    weights = {layer.weight.data_ptr(): layer.weight for layer in layers}.values()  # one, if they are tied
    with torch.no_grad():
        for weight in weights:
            source = weight[torch.tensor(rows[0])].clone()
            weight[first : first + n] = source if init == "numbers" else source.mean(0, keepdim=True)
    return first


def number_ids(tokenizer: Any, n: int) -> list[int]:
    ids = []
    for symbol in range(n):
        encoded = tokenizer.encode(str(round(255 * symbol / (n - 1))), add_special_tokens=False)
        if len(encoded) != 1:
            raise problem(f"{len(encoded)} tokens for one integer", "one token per integer 0..255",
                          "use --added-init mean with this tokenizer")  # fmt: skip
        ids.append(encoded[0])
    return ids


def part_of(module_name: str) -> str:
    """'vision', 'projector' or 'llm', from the names the families give their modules."""
    if re.search(r"(^|\.)(multi_modal_projector|connector|merger|mlp1|projector)(\.|$)", module_name):
        return "projector"
    if re.search(r"(^|\.)(vision_tower|vision_model|visual|vision_backbone)(\.|$)", module_name):
        return "vision"
    return "llm"


def lora_targets(model: nn.Module, parts: Collection[str]) -> list[str]:
    """Full names of the linear layers in the chosen parts; the output head only by `all-linear`, and never if it is tied to
    the embedding; nor layers the model does not run."""
    chosen, idle, every = chosen_parts(parts), _idle_modules(model), ALL_LINEAR in parts
    head = None if not every or _is_tied(model) else model.get_output_embeddings()  # pyright: ignore[reportCallIssue]
    return [
        name
        for name, module in model.named_modules()
        if not name.startswith(idle)
        and (
            isinstance(module, nn.Linear) and not name.endswith("lm_head") and part_of(name) in chosen
            or every and isinstance(module, nn.Conv2d) and name.endswith("patch_embed.proj")
            or head is not None and module is head
        )
    ]  # fmt: skip


def _is_tied(model: Any) -> bool:
    """Whether output head and embedding are one matrix."""
    head = model.get_output_embeddings()
    if head is None:
        return True
    first, second = head.weight, model.get_input_embeddings().weight
    return first is second or first.device.type != "meta" and first.data_ptr() == second.data_ptr()


def chosen_parts(parts: Collection[str]) -> tuple[str, ...]:
    """`parts` with `all` and `all-linear` spelled out.

    Raises:
        VlaError: none, or one that does not exist.
    """
    unknown = sorted(set(parts) - {*PARTS, ALL_PARTS, ALL_LINEAR})
    if unknown or not parts:
        raise problem(f"LoRA parts {sorted(parts)}", f"some of {', '.join(PARTS)}, or {ALL_PARTS}, or {ALL_LINEAR}",
                      "correct --lora-parts")  # fmt: skip
    return tuple(part for part in PARTS if part in parts or ALL_PARTS in parts or ALL_LINEAR in parts)


def _idle_modules(model: nn.Module) -> tuple[str, ...]:
    """OpenVLA's: weights that are only carried along."""
    return getattr(model, "idle_modules", ())


def load_dtype(method: Method, dtype: str) -> str:
    """The type to load a checkpoint in. What trains is float32; and float16 is made from that later, so that
    `vla.backbone.fingerprint` sees what a reader of the float32 weights sees."""
    return "float32" if method == "full" or dtype == "float16" else dtype


def make_trainable(
    backbone: Backbone, method: Method, *, dtype: torch.dtype, device: str, r: int, alpha: int, dropout: float,
    parts: Collection[str], train_ids: Collection[int], init: LoraInit = "kaiming",
) -> None:  # fmt: skip
    """Prepare `backbone.model`, loaded as `load_dtype` says, for training by `method`, in place; the rest as `attach_lora`."""
    if method == "full":
        train_parts(backbone, parts)
        return
    if method == "qlora":
        quantize_base(backbone, dtype, device)
    else:
        for parameter in backbone.model.parameters():  # not the buffers: rotary frequencies stay float32
            parameter.data = parameter.data.to(dtype)
    attach_lora(backbone, r=r, alpha=alpha, dropout=dropout, parts=parts, train_ids=train_ids, method=method, init=init)


def quantize_base(backbone: Backbone, dtype: torch.dtype, device: str) -> None:
    """4 bits where the model is, normally on the CPU, then the move: the device never holds more."""
    quantize_linears(backbone.model, dtype)
    backbone.model = backbone.model.to(device)


def train_parts(backbone: Backbone, parts: Collection[str]) -> None:
    """Let all weights of the chosen parts train, in place, and no others; embeddings and output head belong to the LLM.

    Raises:
        VlaError: the LLM is not among them: new action tokens would stay what they were.
    """
    model, chosen = backbone.model, chosen_parts(parts)
    if "llm" not in chosen:
        raise problem(f"method full with parts {', '.join(chosen)}", "llm among them: it holds the action tokens",
                      "add llm to --lora-parts, or use --method lora")  # fmt: skip
    idle = _idle_modules(model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(part_of(name) in chosen and not name.startswith(idle))
    unfold_norms(model)
    model.eval()


def attach_lora(
    backbone: Backbone, *, r: int, alpha: int, dropout: float, parts: Collection[str], train_ids: Collection[int],
    method: Method = "lora", init: LoraInit = "kaiming",
) -> None:  # fmt: skip
    """Wrap `backbone.model` in a PEFT LoRA model, in place. What trains is float32, whatever the base is.

    Args:
        train_ids: vocabulary rows trained besides LoRA, normally the action ids; other rows stay frozen. Of a head that
            has LoRA of its own, none.
        method: any but full. For qlora, `backbone.model` is in 4 bits already (`vla.kbit.quantize_linears`).
    """
    model = backbone.model
    indices: dict[str, list[int]] | None = None
    if train_ids:
        embedding = _module_name(model, model.get_input_embeddings())
        indices = {embedding: sorted(train_ids)}
        if not _is_tied(model) and ALL_LINEAR not in parts:
            indices[_module_name(model, model.get_output_embeddings())] = sorted(train_ids)
    config = LoraConfig(
        r=r, lora_alpha=alpha, lora_dropout=dropout, target_modules=lora_targets(model, parts),
        trainable_token_indices=indices, init_lora_weights=True if init == "kaiming" else init, use_dora=method == "dora", use_rslora=method == "rslora",
    )  # fmt: skip
    backbone.model = get_peft_model(model, config)
    for parameter in backbone.model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    lean_token_rows(backbone.model)
    lean_lora(backbone.model)
    backbone.model.eval()


def _module_name(model: nn.Module, module: nn.Module) -> str:
    return next(name for name, candidate in model.named_modules() if candidate is module)


def parameter_counts(model: nn.Module) -> tuple[int, int]:
    """(trainable, all), each parameter once."""
    parameters = {id(p): p for p in model.parameters()}.values()
    sizes = [(packed_numel(p) if is_packed(p) else p.numel(), p.requires_grad) for p in parameters]
    return sum(n for n, trains in sizes if trains), sum(n for n, _ in sizes)
