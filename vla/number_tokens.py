"""Numbers of a prompt as single vocabulary ids: a state of 8 dimensions is 8 tokens, whatever the words of the tokenizer.

In a prompt's text such a number is one private-use character per bin; `NumberTokens` puts ids in their places after the text
around them was tokenised. The ids never become text: where they overlay words (placement `tail`), the tokenizer would give
others back.

Which ids: where the action tokens are one per dimension, and at least as many as there are bins, the numbers share them (bin b
is the symbol floor(b n / bins), so a state and an action at the same place of their ranges read alike). Any other scheme's
symbols mean something else; the numbers then get ids of their own, next to those of the actions and placed by the same rule.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from transformers import AddedToken

from vla.inputs import FIRST_NUMBER
from vla.spec import PromptSpec
from vla.tokenizers.grammar import FixedGrammar
from vla.tokenizers.placement import Placement
from vla.tokenizers.protocol import Grammar
from vla.types import problem

SLOT = "<|vla_number|>"
"""Stands in the text where an id will be. Never saved, never shown to the model."""


def n_own_ids(prompt: PromptSpec, n_symbols: int, grammar: Grammar) -> int:
    """How many ids the numbers need besides those of `n_symbols` action symbols."""
    if prompt.numbers_as == "text":
        return 0
    shares = isinstance(grammar, FixedGrammar) and grammar.per_dimension and n_symbols >= prompt.state_bins
    return 0 if shares else prompt.state_bins


def check_number_ids(prompt: PromptSpec, n_own: int, placement: str, added_init: str) -> None:
    """VlaError where numbers as tokens contradict the place, or the beginning, of the action tokens."""
    if prompt.numbers_as == "tokens" and placement == "text":
        raise problem("numbers as tokens with placement 'text'", "numbers in digits, which are the action tokens there",
                      "use numbers_as 'text'")  # fmt: skip
    if n_own and added_init == "numbers":
        raise problem(f"added_init 'numbers' with {n_own} ids of the numbers' own", "the action ids to be shared: uniform "
                      f"with at least {prompt.state_bins} bins", "raise the bins, or use added_init 'mean'")  # fmt: skip


def place_numbers(prompt: PromptSpec, placed: Placement, n_symbols: int) -> tuple[Placement, PromptSpec]:
    """Divide the ids `placed` into those of the actions, the first `n_symbols`, and those of numbers.

    `placed` has `n_symbols + n_own_ids(...)` ids.
    """
    actions = dataclasses.replace(placed, ids=placed.ids[:n_symbols])
    if prompt.numbers_as == "text":
        return actions, prompt
    own = placed.ids[n_symbols:]
    ids = own or tuple(placed.ids[b * n_symbols // prompt.state_bins] for b in range(prompt.state_bins))
    return actions, dataclasses.replace(prompt, number_ids=Placement(placed.kind, ids).save())


class NumberTokens:
    """Splices ids into the prompts of one processor."""

    def __init__(self, processor: Any, ids: Sequence[int]) -> None:
        """
        Args:
            processor: copied; its tokenizer must not learn the slot.
            ids: the vocabulary id of each bin.
        """
        self.ids = torch.tensor(list(ids), dtype=torch.int64)
        self.processor = copy.deepcopy(processor)
        self.processor.tokenizer.add_tokens([AddedToken(SLOT, special=True, normalized=False)], special_tokens=True)
        self._slot_id = int(self.processor.tokenizer.convert_tokens_to_ids(SLOT))

    def taken_out(self, prompts: Sequence[str]) -> tuple[list[str], list[list[int]]]:
        """Prompts with a slot for each number, and the bins of each prompt."""
        texts, bins = [], []
        for prompt in prompts:
            pieces, found = [], []
            for c in prompt:
                is_number = FIRST_NUMBER <= ord(c) < FIRST_NUMBER + len(self.ids)
                pieces.append(SLOT if is_number else c)
                if is_number:
                    found.append(ord(c) - FIRST_NUMBER)
            texts.append("".join(pieces))
            bins.append(found)
        return texts, bins

    def put_in(self, input_ids: torch.Tensor, bins: list[list[int]]) -> torch.Tensor:
        """`input_ids` (B, T) with the id of each number in its slot, whichever side is padded."""
        slots = input_ids == self._slot_id
        counts = slots.sum(dim=1).tolist()
        if counts != [len(row) for row in bins]:
            raise problem(f"{counts} places for numbers in the prompts", f"{[len(row) for row in bins]}, one per number",
                          f"take {SLOT} out of the instruction")  # fmt: skip
        flat = torch.tensor([b for row in bins for b in row], dtype=torch.int64)
        spliced = input_ids.clone()
        spliced[slots] = self.ids[flat].to(input_ids.device, input_ids.dtype)
        return spliced
