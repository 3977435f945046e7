"""The part of `policy.json` that says how a query becomes a prompt: see `vla.inputs`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from vla.tokenizers.placement import Placement
from vla.types import problem


@dataclass(frozen=True)
class PromptSpec:
    """How instruction, proprioceptive state and past actions become a prompt."""

    template: str = "In: What action should the robot take to {instruction}?\nOut:"
    """`{instruction}`, `{state}` if the state is shown, `{history}` if past actions are. The default is OpenVLA's."""
    lowercase: bool = True
    state_names: tuple[str, ...] = ()
    """Dimensions of the state shown; empty: the prompt has none."""
    state_low: tuple[float, ...] = ()
    """State value shown as 0, per dimension, in the state's units."""
    state_high: tuple[float, ...] = ()
    """State value shown as `state_bins - 1`, per dimension."""
    state_bins: int = 256
    """Of each number shown, those of past actions too."""
    state_optional: bool = False
    """Without a state, the prompt says `unknown`; trained with state dropout."""
    history: int = 0
    """K, past actions shown at `{history}`, oldest first; those before the episode began as `unknown`."""
    history_low: tuple[float, ...] = ()
    """Action shown as 0, per dimension, in the units of `ActionChunk.actions`."""
    history_high: tuple[float, ...] = ()
    """Action shown as `state_bins - 1`."""
    history_optional: bool = False
    """Without past actions, all of them are `unknown`; trained with history dropout."""
    numbers_as: Literal["text", "tokens"] = "text"
    """text: each number in digits. tokens: each as one vocabulary id, put into the prompt as an id."""
    number_ids: dict[str, Any] = field(default_factory=dict)
    """`vla.tokenizers.placement.Placement.save()` of tokens: the id of each of the `state_bins` bins."""


def check_prompt(prompt: PromptSpec, action_dim: int) -> None:
    """Raise `VlaError` for a spec that contradicts itself."""
    if "{instruction}" not in prompt.template:
        raise problem(f"template {prompt.template!r}", "a template with {instruction}", "correct `prompt.template`")
    if ("{state}" in prompt.template) != bool(prompt.state_names):
        raise problem(f"template {prompt.template!r} with state {prompt.state_names}", "{state} in the template if, and "
                      "only if, state names are given", "correct `prompt`")  # fmt: skip
    if not len(prompt.state_names) == len(prompt.state_low) == len(prompt.state_high):
        raise problem(
            "state names and bounds of different lengths", "one low and one high per name", "correct `prompt`"
        )
    _check_history(prompt, action_dim)


def _check_history(prompt: PromptSpec, dim: int) -> None:
    """Past actions, and the ids of numbers."""
    if ("{history}" in prompt.template) != (prompt.history > 0) or prompt.history < 0:
        raise problem(f"template {prompt.template!r} with history {prompt.history}", "{history} in the template if, and "
                      "only if, past actions are shown", "correct `prompt`")  # fmt: skip
    expected = dim if prompt.history else 0
    if not len(prompt.history_low) == len(prompt.history_high) == expected:
        raise problem(f"{len(prompt.history_low)} and {len(prompt.history_high)} bounds of past actions", f"{expected} each",
                      "correct `prompt`")  # fmt: skip
    n_ids = Placement.load(prompt.number_ids).n_symbols if prompt.number_ids else 0
    if n_ids != (prompt.state_bins if prompt.numbers_as == "tokens" else 0):
        raise problem(f"{n_ids} number ids with numbers_as {prompt.numbers_as!r}", f"{prompt.state_bins} for tokens, none "
                      "for text", "correct `prompt`")  # fmt: skip
