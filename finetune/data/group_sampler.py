"""Dynamic sampling (DAPO, RIPT-VLA): draw groups of rollouts until enough of them teach something, or the budget ends.

A group whose rollouts all succeed or all fail has zero advantage everywhere; it is dropped before the update and costs
no policy tokens. A batch cut off by the budget is handed over smaller and says so; it is never filled up with copies.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from vla.finetune.rl_math import keep_groups
from vla.types import problem


@dataclass
class GroupSampler:
    """Bookkeeping of one optimiser batch. Offer groups in the order they were asked for, so that restarts agree."""

    target: int
    """Groups wanted."""
    max_groups: int
    """Groups drawn at most; without a cap a policy that always fails would be sampled for ever."""
    rule: Literal["std", "range"] = "std"
    """As in `rl_math.keep_groups`."""
    low: float = 0.1
    high: float = 0.9
    accepted: list[str] = field(default_factory=list, init=False)
    """Names of the groups to learn from. Groups in flight when the target was reached may make it longer than that."""
    counts: dict[str, int] = field(init=False)
    """Groups `generated`, `kept`, `all_equal` (no signal), `out_of_range`, `too_few_valid`, and `invalid_episodes`."""

    def __post_init__(self) -> None:
        if not 1 <= self.target <= self.max_groups:
            got = f"target {self.target}, max_groups {self.max_groups}"
            raise problem(got, "1 <= target <= max_groups", "raise the attempt cap or ask for fewer groups")
        names = ("generated", "kept", "all_equal", "out_of_range", "too_few_valid", "invalid_episodes")
        self.counts = dict.fromkeys(names, 0)

    def offer(self, name: str, rewards: Sequence[float], valid: Sequence[bool] | None = None) -> bool:
        """Count one finished group; True if it is to be learnt from."""
        ok = [True] * len(rewards) if valid is None else [bool(v) for v in valid]
        kept = keep_groups(rewards, [name] * len(rewards), ok, rule=self.rule, low=self.low, high=self.high)
        keep = kept.get(name, False)
        seen = {float(r) for r, v in zip(rewards, ok, strict=True) if v}
        if keep:
            self.accepted.append(name)
            outcome = "kept"
        elif sum(ok) < 2:
            outcome = "too_few_valid"
        else:
            outcome = "all_equal" if len(seen) == 1 else "out_of_range"
        self.counts["generated"] += 1
        self.counts[outcome] += 1
        self.counts["invalid_episodes"] += len(ok) - sum(ok)
        return keep

    @property
    def complete(self) -> bool:
        """Enough groups were accepted."""
        return len(self.accepted) >= self.target

    @property
    def done(self) -> bool:
        """Nothing more is to be drawn: complete, or out of budget (then the batch is partial)."""
        return self.complete or self.counts["generated"] >= self.max_groups

    @property
    def wanted(self) -> int:
        """Groups that can be drawn at once without drawing one too many."""
        return max(0, min(self.target - len(self.accepted), self.max_groups - self.counts["generated"]))


@dataclass
class SkipMemory:
    """RIPT's memory of solved initial states: one whose last group all succeeded is passed over `retry_after` times."""

    retry_after: int = 3
    skips_left: dict[str, int] = field(default_factory=dict)
    """Initial state -> how many more times it is passed over. JSON, for checkpoints."""

    def skip(self, name: str) -> bool:
        """Whether to pass over this initial state now; counts the skip."""
        left = self.skips_left.get(name, 0)
        if left:
            self.skips_left[name] = left - 1
        return left > 0

    def record(self, name: str, successes: Sequence[bool], valid: Sequence[bool] | None = None) -> None:
        """Remember a finished group. Invalid episodes (simulator faults) prove nothing either way."""
        seen = [s for i, s in enumerate(successes) if valid is None or valid[i]]
        if seen and all(seen):
            self.skips_left[name] = self.retry_after
        else:
            self.skips_left.pop(name, None)

    def save(self) -> dict[str, Any]:
        return {"retry_after": self.retry_after, "skips_left": dict(self.skips_left)}

    @classmethod
    def load(cls, data: dict[str, Any]) -> SkipMemory:
        return cls(int(data["retry_after"]), {str(k): int(v) for k, v in data["skips_left"].items()})
