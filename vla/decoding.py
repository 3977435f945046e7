"""Sampling that can only produce legal action ids, for any model that `transformers` can generate with.

The sampler is a logits processor that makes the whole choice itself: it masks everything but the legal ids, divides by
the temperature, adds Gumbel noise (argmax of log-probability + Gumbel noise is an exact draw from the softmax, Gumbel
1954; Maddison et al. 2014) and leaves one finite logit per row, so `generate(do_sample=False)` picks it. The noise of a
row comes from that row's key alone: batch order, batch size, workers and restarts do not change what is drawn.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from transformers import LogitsProcessor


def gumbel_noise(keys: Sequence[tuple[int, ...]], n_tokens: int, n_symbols: int) -> torch.Tensor:
    """float32 (B, T, n_symbols), row i drawn from a counter-based generator seeded by `keys[i]` alone."""
    rows = []
    for key in keys:
        # The length goes in too: to SeedSequence, (1,) and (1, 0) are the same.
        generator = np.random.Generator(np.random.Philox(np.random.SeedSequence([len(key), *key])))
        rows.append(generator.gumbel(size=(n_tokens, n_symbols)).astype(np.float32))
    return torch.from_numpy(np.stack(rows))


class ActionSampler(LogitsProcessor):
    """One use: one `generate` call of exactly T new tokens. Afterwards `token_ids` and `logprobs` are (B, T)."""

    def __init__(
        self, legal_ids: torch.Tensor, n_tokens: int, temperature: float = 0.0, noise: torch.Tensor | None = None
    ) -> None:
        """
        Args:
            legal_ids: int64 (n_symbols,) ids that may be produced, the same at every position.
            temperature: 0 is greedy; log-probabilities are then reported at temperature 1.
            noise: (B, T, n_symbols) from `gumbel_noise`, needed when temperature > 0.
        """
        if temperature < 0 or (temperature > 0) != (noise is not None):
            raise ValueError(
                f"temperature {temperature} with noise {noise is not None}: noise goes with temperature > 0"
            )
        self.legal_ids, self.n_tokens, self.temperature, self.noise = legal_ids, n_tokens, temperature, noise
        self._ids: list[torch.Tensor] = []
        self._logprobs: list[torch.Tensor] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        step = len(self._ids)
        if step >= self.n_tokens:
            raise ValueError(f"more than {self.n_tokens} tokens were asked for")
        logprobs = torch.log_softmax(scores[:, self.legal_ids].float() / (self.temperature or 1.0), dim=-1)  # (B, n)
        noisy = logprobs if self.noise is None else logprobs + self.noise[:, step].to(logprobs.device)
        choice = noisy.argmax(dim=-1, keepdim=True)  # (B, 1)
        self._logprobs.append(logprobs.gather(1, choice)[:, 0])
        chosen = self.legal_ids[choice]  # (B, 1)
        self._ids.append(chosen[:, 0])
        return torch.full_like(scores, float("-inf")).scatter_(1, chosen, 0.0)

    @property
    def token_ids(self) -> torch.Tensor:
        return torch.stack(self._ids, dim=1)

    @property
    def logprobs(self) -> torch.Tensor:
        return torch.stack(self._logprobs, dim=1)
