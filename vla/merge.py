"""`vla merge`: fold a policy's LoRA adapter into its weights.

    vla merge --policy runs/rl/policy --out runs/merged

The result's model/ folder is a plain Hugging Face checkpoint that stock transformers opens, and the form that can be
quantized. The logits before and after are compared on a fixed input; a merge that changes them is not written.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from vla.backbone import DTYPES
from vla.policy import LocalPolicy, load_policy
from vla.types import Observation, problem

MAX_PROBE_TOKENS = 256  # a longest chunk may be longer than the model's context


@dataclass(frozen=True)
class Settings:
    """Settings of `vla merge`."""

    policy: Path
    """Policy directory with an adapter."""
    out: Path
    """Folder of the merged policy; must not exist."""
    dtype: str = "float32"
    """Data type the merged weights are stored in: float32, bfloat16 or float16."""
    tolerance: float = 1e-3
    """Largest allowed change of an action-token logit, for float32."""


def run(settings: Settings) -> Path:
    """Merge, check and write; returns `out`."""
    if settings.out.exists():
        raise problem(f"{settings.out} exists", "a new folder", "choose another --out, or delete it")
    if settings.dtype not in DTYPES:
        raise problem(f"dtype {settings.dtype!r}", f"one of {', '.join(DTYPES)}", "correct --dtype")
    policy = load_policy(settings.policy, dtype="float32")
    if policy.spec.backbone.weights != "adapter":
        raise problem(f"{settings.policy} with merged weights", "a policy with an adapter", "use it as it is")
    before = probe_logits(policy)
    policy.backbone.model = policy.backbone.model.merge_and_unload()
    change = float((probe_logits(policy) - before).abs().max())
    if change > settings.tolerance:
        raise problem(f"logits that moved by {change:.2g} in the merge", f"at most {settings.tolerance:g}",
                      "report this model family; serve the adapter unmerged meanwhile")  # fmt: skip
    policy.backbone.model = policy.backbone.model.to(DTYPES[settings.dtype])
    policy.save(settings.out, stage="merge", settings=dataclasses.asdict(settings))
    print(f"merged into {settings.out}; largest change of a logit {change:.2g}")
    return settings.out


@torch.no_grad()
def probe_logits(policy: LocalPolicy) -> torch.Tensor:
    """(2, T, n_symbols) action-token logits of two fixed, meaningless observations."""
    spec, rng = policy.spec, np.random.default_rng(0)
    observations = []
    for instruction in ("open the drawer", "push the red button"):
        images = {c: rng.integers(0, 256, (spec.image.size_px,) * 2 + (3,), dtype=np.uint8) for c in spec.image.cameras}
        state = np.asarray(spec.prompt.state_low, np.float32) if spec.prompt.state_names else None
        observations.append(Observation(images, state, instruction))
    n = min(policy.codec.max_tokens, MAX_PROBE_TOKENS)
    ids = policy.legal_ids[:: max(1, len(policy.legal_ids) // n)][:n]
    ids = ids.repeat(-(-n // len(ids)))[:n].expand(2, -1)
    logits = policy.backbone.action_logits(policy.encode(observations), ids)
    return logits[..., policy.legal_ids].float()
