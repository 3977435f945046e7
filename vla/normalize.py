"""Actions between physical units and [-1, 1], by the statistics of one dataset.

Quantile bounds as OpenVLA's BOUNDS_Q99: y = clip(2 (x - q01) / (q99 - q01 + 1e-8) - 1, -1, 1) where the mask is True,
x itself where it is False (a gripper that already lies in [-1, 1]). The inverse is 0.5 (y + 1) (q99 - q01) + q01. Its
BOUNDS has min and max in their place. States that are given to a model as numbers are normalised in the same way.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from vla.types import problem

EPSILON = 1e-8
Statistics = dict[str, dict[str, Any]]
"""OpenVLA's `dataset_statistics.json`: dataset -> {"action": {q01, q99, mask, ...}, "proprio": {...}, counts}."""


@dataclass(frozen=True)
class ActionNormalizer:
    """Bounds of one dataset; arrays are (D,)."""

    q01: np.ndarray
    """Or the minimum."""
    q99: np.ndarray
    """Or the maximum."""
    mask: np.ndarray
    """bool; False: the dimension is left as it is."""

    def normalize(self, actions: np.ndarray) -> np.ndarray:
        """float (..., D) physical -> float32 (..., D) in [-1, 1] where masked."""
        scaled = 2.0 * (actions - self.q01) / (self.q99 - self.q01 + EPSILON) - 1.0
        return np.where(self.mask, np.clip(scaled, -1.0, 1.0), actions).astype(np.float32)

    def unnormalize(self, actions: np.ndarray) -> np.ndarray:
        """The inverse, float32; NaN stays NaN."""
        return np.where(self.mask, 0.5 * (actions + 1.0) * (self.q99 - self.q01) + self.q01, actions).astype(np.float32)


def gripper_to_robot(
    actions: np.ndarray, dim: int | None, gripper_range: str = "signed", threshold: float | None = None, invert: bool = False
) -> np.ndarray:  # fmt: skip
    """Actions (..., D) with the gripper as the data has it -> a copy with the gripper as the robot wants it.

    The fields of `vla.spec.ActionSpec` in its order: range 0..1 to -1..1, threshold to -1 or +1, turn of the sign. A
    value that is the threshold itself gives 0, as `np.sign` in OpenVLA's; NaN stays NaN.
    """
    if dim is None or (gripper_range, threshold, invert) == ("signed", None, False):
        return actions
    out = actions.copy()
    gripper = out[..., dim]
    if threshold is not None:
        gripper = np.sign(gripper - actions.dtype.type(threshold))
    elif gripper_range == "unit":
        gripper = 2.0 * gripper - 1.0
    out[..., dim] = -gripper if invert else gripper
    return out


def action_normalizer(
    statistics: Statistics, unnorm_key: str | None, dim: int, normalization: str = "bounds_q99"
) -> ActionNormalizer:
    """The normaliser of `unnorm_key`, which may be None if there is exactly one dataset.

    Args:
        normalization: as in `vla.spec.ActionSpec`.

    Raises:
        VlaError: unknown or missing key, missing fields, another number of dimensions, q01 > q99, non-finite values.
    """
    return _normalizer(statistics, unnorm_key, "action", dim, normalization)


def state_normalizer(
    statistics: Statistics, unnorm_key: str | None, dim: int, normalization: str = "bounds_q99"
) -> ActionNormalizer:
    """The same for states (S,), by the group `proprio`; without a mask, every dimension is normalised."""
    return _normalizer(statistics, unnorm_key, "proprio", dim, normalization)


def _normalizer(
    statistics: Statistics, unnorm_key: str | None, group: str, dim: int, normalization: str
) -> ActionNormalizer:
    key = choose_key(statistics, unnorm_key)
    entry = statistics[key].get(group, {})
    low, high = ("q01", "q99") if normalization == "bounds_q99" else ("min", "max")
    missing = [name for name in (low, high) if name not in entry]
    if missing:
        raise problem(f"statistics of {key!r} without {group} {', '.join(missing)}", f"{low} and {high} per dimension",
                      "recompute them with `vla data stats`")  # fmt: skip
    q01, q99 = np.asarray(entry[low], np.float64), np.asarray(entry[high], np.float64)
    mask = np.asarray(entry.get("mask", [True] * len(q01)), bool)
    if not q01.shape == q99.shape == mask.shape == (dim,):
        size = "action" if group == "action" else "state"
        raise problem(f"statistics of {key!r} for {q01.size} dimensions", f"{dim}, the policy's {size} size",
                      "use the statistics of the data the policy was trained on")  # fmt: skip
    if not (np.isfinite(q01).all() and np.isfinite(q99).all() and (q01 <= q99).all()):
        raise problem(
            f"{low} {q01.tolist()}, {high} {q99.tolist()}", f"finite, {low} <= {high}", "recompute the statistics"
        )
    return ActionNormalizer(q01, q99, mask)


def choose_key(statistics: Statistics, unnorm_key: str | None) -> str:
    """The dataset whose statistics to use; VlaError listing the known ones."""
    known = ", ".join(sorted(statistics)) or "none"
    if unnorm_key is None:
        if len(statistics) != 1:
            raise problem("no unnorm_key", f"one of: {known}", "pass --unnorm-key")
        return next(iter(statistics))
    if unnorm_key not in statistics:
        raise problem(f"unnorm_key {unnorm_key!r}", f"one of: {known}", "pass a known --unnorm-key")
    return unnorm_key
