"""Sampling that can only produce rows a grammar allows, for any model that `transformers` can generate with.

The sampler is a logits processor that makes the whole choice itself: it masks everything but the legal ids, divides by
the temperature, adds Gumbel noise (argmax of log-probability + Gumbel noise is an exact draw from the softmax, Gumbel
1954; Maddison et al. 2014) and leaves one finite logit per row, so `generate(do_sample=False)` picks it. The noise of a
row comes from that row's key alone: batch order, batch size, workers and restarts do not change what is drawn.

Rows may be complete at different lengths. A complete row goes on as padding, which no other row sees, until all are.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from transformers import LogitsProcessor, StoppingCriteria

from vla.tokenizers.grammar import IdGrammar
from vla.tokenizers.protocol import PAD


def gumbel_noise(keys: Sequence[tuple[int, ...]], n_symbols: int) -> Iterator[torch.Tensor]:
    """float32 (B, n_symbols) for each token in turn, without end. Row i comes from a counter-based generator that is
    seeded by `keys[i]` alone; drawn step by step, because few rows are as long as their grammar allows."""
    # The length goes in too: to SeedSequence, (1,) and (1, 0) are the same.
    generators = [np.random.Generator(np.random.Philox(np.random.SeedSequence([len(key), *key]))) for key in keys]
    while True:
        yield torch.from_numpy(np.stack([g.gumbel(size=n_symbols).astype(np.float32) for g in generators]))


class ActionSampler(LogitsProcessor):
    """One use: one `generate` call. Afterwards `token_ids` and `logprobs` are (B, T)."""

    def __init__(
        self, grammar: IdGrammar, temperature: float = 0.0, noise: Iterator[torch.Tensor] | None = None,
        pad_id: int = 0, device: torch.device | str = "cpu",
    ) -> None:  # fmt: skip
        """
        Args:
            temperature: 0 is greedy; log-probabilities are then reported at temperature 1.
            noise: (B, n_symbols) per token as from `gumbel_noise`, needed when temperature > 0.
            pad_id: what the model reads after the end of a complete row.
        """
        if temperature < 0 or (temperature > 0) != (noise is not None):
            raise ValueError(
                f"temperature {temperature} with noise {noise is not None}: noise goes with temperature > 0"
            )
        self.grammar, self.temperature, self.noise, self.pad_id = grammar, temperature, noise, pad_id
        self.legal_ids = torch.from_numpy(np.array(grammar.ids)).to(device)
        self.states: list[int] | None = None
        """Of each row, in a grammar that has something to say; None before the first token."""
        self._ids: list[torch.Tensor] = []
        self._logprobs: list[torch.Tensor] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if len(self._ids) >= self.grammar.max_tokens:
            raise ValueError(f"more than {self.grammar.max_tokens} tokens were asked for")
        logits = scores[:, self.legal_ids].float() / (self.temperature or 1.0)  # (B, n)
        done = None
        if not self.grammar.free:
            legal, done = self._legal(len(scores), scores.device)
            logits = logits.masked_fill(~legal, float("-inf"))
        logprobs = torch.log_softmax(logits, dim=-1)
        noisy = logprobs if self.noise is None else logprobs + next(self.noise).to(logprobs.device)
        choice = noisy.argmax(dim=-1, keepdim=True)  # (B, 1)
        chosen, logprob = self.legal_ids[choice], logprobs.gather(1, choice)[:, 0]
        ids = chosen[:, 0]
        if done is not None:
            self._advance(choice[:, 0].tolist(), done.tolist())
            chosen = chosen.masked_fill(done[:, None], self.pad_id)
            ids, logprob = ids.masked_fill(done, PAD), logprob.masked_fill(done, 0.0)
        self._ids.append(ids)
        self._logprobs.append(logprob)
        return torch.full_like(scores, float("-inf")).scatter_(1, chosen, 0.0)

    @property
    def complete(self) -> list[bool]:
        """Of each row, whether it has all its tokens."""
        return [self.grammar.complete(state) for state in self.states or []]

    @property
    def token_ids(self) -> torch.Tensor:
        """int64 (B, T), -1 after the end of a row."""
        return torch.stack(self._ids, dim=1)

    @property
    def logprobs(self) -> torch.Tensor:
        """(B, T), over the ids that were legal at each place; 0 after the end of a row."""
        return torch.stack(self._logprobs, dim=1)

    def _legal(self, n_rows: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """(bool (B, n) legal columns, bool (B,) complete rows, of which all columns count as legal)."""
        if self.states is None:
            self.states = [self.grammar.start] * n_rows
        legal = torch.from_numpy(np.stack([self.grammar.mask(state) for state in self.states])).to(device)
        done = ~legal.any(dim=1)
        return legal | done[:, None], done

    def _advance(self, columns: list[int], done: list[bool]) -> None:
        assert self.states is not None
        self.states = [
            state if over else self.grammar.advance(state, column)
            for state, column, over in zip(self.states, columns, done, strict=True)
        ]


class AllComplete(StoppingCriteria):
    """Stops generation once every row of the sampler is complete."""

    def __init__(self, sampler: ActionSampler) -> None:
        self.sampler = sampler

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        return torch.tensor(self.sampler.complete, device=input_ids.device)
