"""Training a policy with a head (`vla.spec.HeadSpec`): targets and loss of OpenVLA-OFT's parallel decoding.

l1: mean |predicted - recorded| of normalised actions. The authors leave out the last H - 1 frames of every episode, whose
chunks would run beyond its end; here those chunks count as far as they go. discrete: cross-entropy of each place's token;
the authors also teach the </s> after them, which acting never looks at. Nothing is teacher-forced: no place is shown what
stands at another, so held-out figures are those of the policy acting.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from vla.finetune.data.chunks import Sample
from vla.policy import LocalPolicy
from vla.token_rows import only_rows


def parallel_targets(policy: LocalPolicy, samples: list[Sample]) -> tuple[torch.Tensor, torch.Tensor]:
    """(float32 normalised actions (B, H * D) for l1, int64 ids (B, H * D) for discrete; bool (B, H * D) that carry loss)."""
    assert policy.spec.head is not None
    if policy.spec.head.kind == "l1":
        rows = [policy.normalizer_of(s.dataset).normalize(s.actions).reshape(-1) for s in samples]
        targets = torch.from_numpy(np.stack(rows))
    else:
        targets = torch.cat([policy.action_token_ids(s.actions[None], s.dataset) for s in samples])
    valid = np.repeat(np.stack([~s.is_pad for s in samples]), policy.spec.action.dim, axis=1)
    device = policy.backbone.device
    return targets.to(device), torch.from_numpy(valid).to(device)


def parallel_loss(
    policy: LocalPolicy, model: Any, inputs: dict[str, torch.Tensor], targets: torch.Tensor, valid: torch.Tensor, narrow: bool
) -> tuple[torch.Tensor, np.ndarray, torch.Tensor]:  # fmt: skip
    """The fields of `vla.finetune.sft_batch.PartLoss`; `predicted` of l1 is float32 (B, H * D), normalised.

    Args:
        model: what is called.
        narrow: the softmax of discrete is over the action ids, not the vocabulary.
    """
    n_actions = targets.shape[1]
    if targets.is_floating_point():
        predicted = model(**inputs, n_actions=n_actions).float().flatten(1)
        loss = torch.where(valid, (predicted - targets).abs(), 0.0).sum()
        total = float(loss.detach())
        return loss, np.array([total, 0.0, total]), predicted.detach()
    legal = policy.legal_ids.to(targets.device)
    with only_rows(policy.backbone.model, legal if narrow else None):
        logits = model(**inputs, n_actions=n_actions).float()  # (B, T, V or n_symbols)
    wanted = torch.searchsorted(legal, targets) if narrow else targets
    losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), wanted.flatten(), reduction="none")
    loss = torch.where(valid, losses.view_as(targets), 0.0).sum()
    with torch.no_grad():
        predicted = legal[(logits if narrow else logits[..., legal]).argmax(-1)]  # (B, T)
        correct = ((predicted == targets) & valid).sum()
        decoded, recorded = (policy.codec.decode(x.cpu().numpy())[0] for x in (predicted, targets))
        l1 = float(np.abs(decoded - recorded).reshape(len(targets), -1)[valid.cpu().numpy()].sum())
    return loss, np.array([float(loss.detach()), float(correct), l1]), predicted
