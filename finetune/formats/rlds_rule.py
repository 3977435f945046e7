"""What an RLDS dataset means when nobody has said: the rule for datasets without a standardizer of their own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vla.finetune.data.standard import Standard
from vla.finetune.formats.tfds_features import Leaf
from vla.types import problem

ACTION = "action"
STATES = ("observation/state", "observation/proprio", "observation/robot_state")
INSTRUCTIONS = (
    "language_instruction", "observation/natural_language_instruction", "natural_language_instruction",
    "observation/language_instruction", "observation/instruction", "instruction", "task", "episode_metadata/language_instruction",
    "language_instruction_0",
)  # fmt: skip
OBSERVATION = "observation/"


@dataclass
class GenericRule:
    """A `Standardizer`: the recorded action vector, state vector and text as they are; every step kept."""

    cameras: Mapping[str, str]
    action_names: tuple[str, ...]
    state_names: tuple[str, ...]
    state: str | None
    instruction: str | None

    @property
    def keys(self) -> tuple[str, ...]:
        return tuple(key for key in (ACTION, self.state, self.instruction) if key is not None)

    def __call__(self, columns: Mapping[str, np.ndarray]) -> Standard:
        actions = columns[ACTION].astype(np.float32)
        states = None if self.state is None else columns[self.state].astype(np.float32)
        texts = [""] * len(actions) if self.instruction is None else columns[self.instruction]
        return Standard(actions, states, tuple(_text(text) for text in texts), np.arange(len(actions)))


def generic_rule(leaves: Mapping[str, Leaf], where: Path) -> GenericRule:
    """The rule for these features: `action`, a state vector, a text and the colour images under `observation`.

    Raises:
        VlaError: the action is not one plain vector of numbers; what there is instead is named.
    """
    action = leaves.get(ACTION)
    if action is None or not _is_vector(action):
        parts = [f"{leaf.key} ({leaf.dtype})" for leaf in leaves.values() if leaf.key.split("/")[0] == ACTION]
        raise problem(f"{where} with the actions {', '.join(parts) or 'none'}", f"one vector {ACTION!r} of numbers",
                      "give a standardizer, e.g. `oxe_standardizer(NAME)` for a dataset of Open X-Embodiment")  # fmt: skip
    state = next((key for key in STATES if key in leaves and _is_vector(leaves[key])), None)
    text = next((key for key in INSTRUCTIONS if key in leaves and _is_text(leaves[key])), None)
    cameras = {key.removeprefix(OBSERVATION).replace("/", "_"): key for key, leaf in leaves.items()
               if key.startswith(OBSERVATION) and is_camera(leaf)}  # fmt: skip
    return GenericRule(cameras, _names(action), _names(leaves[state]) if state else (), state, text)


def is_camera(leaf: Leaf) -> bool:
    """Whether a feature is a colour or grey image of 8 bits in each step (depth is 16 bits or float)."""
    return leaf.kind == "image" and leaf.dtype == "uint8" and leaf.in_steps


def _is_vector(leaf: Leaf) -> bool:
    return leaf.kind == "number" and len(leaf.shape) == 1 and leaf.in_steps and not leaf.ragged and leaf.dtype != "bool"


def _is_text(leaf: Leaf) -> bool:
    return leaf.kind == "text" and leaf.shape == () and not leaf.ragged


def _names(leaf: Leaf) -> tuple[str, ...]:
    return tuple(str(i) for i in range(leaf.size))


def _text(value: str | bytes) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else value
