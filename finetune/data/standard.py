"""How the steps of one recorded episode, in whatever form they were published, become actions, states and instructions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np


@dataclass(frozen=True)
class Standard:
    """One episode in the project's own form; T' steps, which may be fewer than the T recorded ones."""

    actions: np.ndarray
    """float32 (T', D)."""
    states: np.ndarray | None
    """float32 (T', S)."""
    instructions: tuple[str, ...]
    """T' of them; "" where the data has none."""
    frames: np.ndarray
    """int64 (T',): the recorded step each of these comes from, whose images go with it."""


class Standardizer(Protocol):
    """A dataset's own rule. Must be picklable."""

    cameras: Mapping[str, str]
    """Camera name -> flattened key of the recorded image, e.g. {"primary": "observation/image"}."""
    action_names: tuple[str, ...]
    state_names: tuple[str, ...]

    @property
    def keys(self) -> tuple[str, ...]:
        """Flattened keys of the recorded columns it reads, e.g. "action/world_vector", "language_instruction"."""
        ...

    def __call__(self, columns: Mapping[str, np.ndarray]) -> Standard:
        """Columns of one episode, each (T, ...) of the recorded dtype; text is a numpy array of `str` objects.

        Raises:
            VlaError: a column is missing or of a wrong shape (the key is named), or a value is not finite.
        """
        ...
