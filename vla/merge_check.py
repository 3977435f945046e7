"""Are merged weights the adapter they came from? Two fixed observations, and what each layer makes of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from vla.normalize import state_normalizer
from vla.policy import LocalPolicy
from vla.types import Observation

MAX_PROBE_TOKENS = 256  # a longest chunk may be longer than the model's context
KEPT_VALUES = 1024
"""Of each layer's output: enough to see where two models part, and little beside the model."""
PREFIX = "base_model.model."


@dataclass(frozen=True)
class Probe:
    """What a policy makes of the fixed observations."""

    logits: torch.Tensor
    """float32 (2, T, n_symbols); with an L1 head the normalised actions (2, H, D)."""
    outputs: dict[str, torch.Tensor]
    """Module -> up to 1024 values of its output, float32, in the order the modules ran."""


@dataclass(frozen=True)
class Comparison:
    """Two probes."""

    change: float
    """Largest difference of a logit, divided by the standard deviation of the first's logits."""
    same_choice: float
    """Share of probe positions with the same best token, in [0, 1]."""
    reason: str
    """Where the two part."""


def probe(policy: LocalPolicy) -> Probe:
    """Run the fixed observations, keeping a little of every layer's output."""
    outputs: dict[str, torch.Tensor] = {}
    hooks = [
        module.register_forward_hook(_keep(name.removeprefix(PREFIX), outputs))
        for name, module in policy.backbone.model.named_modules()
        if not any(part in name for part in (".base_layer", ".lora_", ".token_adapter"))
    ]
    try:
        return Probe(probe_logits(policy), outputs)
    finally:
        for hook in hooks:
            hook.remove()


def compare(before: Probe, after: Probe) -> Comparison:
    """How far `after` is from `before`, and which module differs first and most."""
    change = float((after.logits - before.logits).abs().max() / before.logits.std())
    same = float((after.logits.argmax(-1) == before.logits.argmax(-1)).float().mean())
    shares = {
        name: _share(value, after.outputs[name]) for name, value in before.outputs.items() if name in after.outputs
    }
    if not shares:
        return Comparison(change, same, "the models have no module in common")
    most = max(shares, key=lambda name: shares[name])
    first = next(name for name, share in shares.items() if share >= shares[most] / 10)
    reason = (
        f"modules differ first at {first} ({shares[first]:.2g} of its output) and most at {most} ({shares[most]:.2g})"
    )
    return Comparison(change, same, reason)


@torch.no_grad()
def probe_logits(policy: LocalPolicy) -> torch.Tensor:
    """(2, T, n_symbols) action-token logits of two fixed, meaningless observations; of an L1 head, what it answers."""
    spec, rng = policy.spec, np.random.default_rng(0)
    observations = []
    for instruction in ("open the drawer", "push the red button"):
        images = {c: rng.integers(0, 256, (spec.image.size_px,) * 2 + (3,), dtype=np.uint8) for c in spec.image.cameras}
        state = _state(policy)
        past = np.zeros((0, spec.action.dim), np.float32)
        observations.append(Observation(images, state, instruction, past_actions=past))
    if spec.head is not None:
        return at_once(policy, policy.encode(observations))
    n = min(policy.codec.max_tokens, MAX_PROBE_TOKENS)
    ids = policy.legal_ids[:: max(1, len(policy.legal_ids) // n)][:n]
    ids = ids.repeat(-(-n // len(ids)))[:n].expand(2, -1)
    logits = policy.backbone.action_logits(policy.encode(observations), ids)
    return logits[..., policy.legal_ids].float()


def at_once(policy: LocalPolicy, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """What a policy with a head makes of its inputs in one pass: logits of the action ids, or actions."""
    found = policy.backbone.model(**inputs, n_actions=policy.codec.horizon * policy.codec.dim).float()
    return found[..., policy.legal_ids] if policy.spec.says_tokens else found


def _state(policy: LocalPolicy) -> np.ndarray | None:
    spec = policy.spec
    if not spec.state_names:
        return None
    if spec.prompt.state_names:
        return np.asarray(spec.prompt.state_low, np.float32)
    key, n = policy.unnorm_key, len(spec.state_names)
    return state_normalizer(policy.statistics, key, n, spec.action.normalization).q01.astype(np.float32)


def _keep(name: str, outputs: dict[str, torch.Tensor]) -> Callable[[nn.Module, Any, Any], None]:
    def hook(module: nn.Module, inputs: Any, output: Any) -> None:
        if isinstance(output, torch.Tensor) and output.is_floating_point():
            flat = output.detach().flatten()
            outputs[name] = flat[:: max(1, flat.numel() // KEPT_VALUES)][:KEPT_VALUES].float().cpu()

    return hook


def _share(a: torch.Tensor, b: torch.Tensor) -> float:
    """Norm of the difference as a share of the norm; infinite for different shapes or values that are no numbers."""
    if a.shape != b.shape:
        return float("inf")
    share = float((a - b).norm() / a.norm().clamp(min=1e-12))
    return share if share == share else float("inf")
