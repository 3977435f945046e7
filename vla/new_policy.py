"""A new policy: a pretrained VLM that learns to act."""

from __future__ import annotations

from collections.abc import Collection

from vla.adapters import (
    ALL_LINEAR,
    AddedInit,
    LoraInit,
    Method,
    PlacementKind,
    chosen_parts,
    load_dtype,
    make_trainable,
    place_actions,
)
from vla.backbone import DTYPES, fingerprint, load_backbone
from vla.kbit import require_bitsandbytes
from vla.normalize import Statistics
from vla.number_tokens import check_number_ids, n_own_ids, place_numbers
from vla.policy import LocalPolicy
from vla.spec import ActionSpec, BackboneSpec, HeadSpec, ImageSpec, PolicySpec, PromptSpec, TokenSpec
from vla.tokenizers.grammar import FixedGrammar
from vla.tokenizers.protocol import ActionTokenizer
from vla.tokenizers.schemes import scheme_of
from vla.tokenizers.uniform import UniformTokenizer
from vla.types import problem


def create_policy(
    source: str, *, name: str, action: ActionSpec, image: ImageSpec, prompt: PromptSpec, statistics: Statistics,
    tokenizer: ActionTokenizer | None = None, placement: PlacementKind = "added", skip: int = 0, added_init: AddedInit = "mean", unnorm_key: str | None = None,
    lora_r: int = 32, lora_alpha: int = 16, lora_dropout: float = 0.0,
    lora_parts: Collection[str] = ("llm", "projector"), method: Method = "lora", device: str = "cpu", dtype: str = "float32",
    lora_init: LoraInit = "kaiming", head: HeadSpec | None = None,
) -> LocalPolicy:  # fmt: skip
    """A new policy: a pretrained VLM, extended with action tokens, with a fresh LoRA adapter that trains.

    Args:
        tokenizer: the action tokenizer, fitted; default: 256 uniform bins.
        skip: ids left out at the end of the vocabulary, for the placement `tail`.
        lora_parts: parts of the model that train: llm, projector, vision, or all; `vla.adapters.ALL_LINEAR` leaves action
            ids that the model had already without trained rows of their own.
        method: what trains there (`vla.adapters.Method`). `full` has no adapter.
        dtype: of frozen weights, and what those of qlora are computed in. What trains is float32.
        head: its parts are new, and train whole. No vocabulary rows train then, as in OpenVLA-OFT.
    """
    chosen_parts(lora_parts)
    if method == "qlora":
        require_bitsandbytes("method qlora")
    tokenizer = tokenizer or UniformTokenizer()
    grammar = tokenizer.grammar(action.horizon, action.dim)
    if added_init == "numbers" and not (isinstance(grammar, FixedGrammar) and grammar.per_dimension):
        raise problem("added_init 'numbers' for symbols that are no numbers", "a scheme of one token per dimension",
                      "use added_init 'mean'")  # fmt: skip
    backbone = load_backbone(source, dtype=load_dtype(method, dtype), device="cpu" if method == "qlora" else device)
    base = BackboneSpec(
        source, backbone.config.model_type, "adapter", None, fingerprint(backbone.model),
        quantization="nf4" if method == "qlora" else "none",
    )  # fmt: skip
    n_symbols, n_own = tokenizer.vocab_size, n_own_ids(prompt, tokenizer.vocab_size, grammar)
    check_number_ids(prompt, n_own, placement, added_init)
    placed, n_added = place_actions(backbone, placement, n_symbols + n_own, added_init, skip)
    placed_actions, prompt = place_numbers(prompt, placed, n_symbols)
    tokens = TokenSpec(scheme_of(tokenizer), n_symbols, placed_actions.save(), n_added, added_init)
    if head is not None:
        if n_added:
            raise problem(f"placement {placement!r} with parallel decoding", "action tokens that the model has: none train",
                          "use --placement tail")  # fmt: skip
        from vla.openvla.oft_model import expect

        expect(backbone.model, head)
    make_trainable(
        backbone, method, dtype=DTYPES[dtype], device=device, r=lora_r, alpha=lora_alpha, dropout=lora_dropout, parts=lora_parts,
        train_ids=() if head is not None or (ALL_LINEAR in lora_parts and not n_added) else placed.ids, init=lora_init,
    )  # fmt: skip
    spec = PolicySpec(name, base, action, image, prompt, tokens, unnorm_key, head=head)
    if head is not None:
        from vla.openvla.oft_model import train_new_parts

        train_new_parts(backbone.model, head, action.dim)
    # With several datasets whoever loads the policy must choose; until then it acts by the first.
    return LocalPolicy(spec, backbone, statistics, tokenizer, unnorm_key=unnorm_key or next(iter(statistics)))
