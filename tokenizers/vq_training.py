"""The codebooks of `vla.tokenizers.vq` while they are trained. Needs torch."""

from __future__ import annotations

import torch

DECAY = 0.95
"""Of the moving averages; they remember the last 20 steps."""
UNUSED = 0.02
"""A code with fewer members a step, on average, moves to a latent of the batch."""
COMMITMENT = 0.25
"""Weight of the squared distance of latents to their codes."""
K_MEANS_ITERATIONS = 10


class ResidualCodebooks:
    """K codebooks (K, V, L) with the moving averages of their members' number (K, V) and sum (K, V, L)."""

    def __init__(self, codebooks: int, codes: int, latents: torch.Tensor) -> None:
        self.codes = torch.empty(codebooks, codes, latents.shape[1])
        self.counts = torch.ones(codebooks, codes)
        self.seen: list[tuple[torch.Tensor, torch.Tensor]] = []
        for k in range(codebooks):
            self.codes[k] = _k_means(latents, codes)
            latents = latents - self.codes[k][_nearest(latents, self.codes[k])]
        self.sums = self.codes.clone()

    def quantise(self, latents: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        rest, total, self.seen = latents.detach(), torch.zeros_like(latents), []
        for book in self.codes:
            nearest = _nearest(rest, book)
            self.seen.append((rest, nearest))
            rest, total = rest - book[nearest], total + book[nearest]
        commitment = ((latents - total) ** 2).mean()
        return latents + (total - latents).detach(), COMMITMENT * commitment

    @torch.no_grad()
    def after_step(self) -> None:
        for k, (rest, nearest) in enumerate(self.seen):
            counts, sums = _members(rest, nearest, self.codes.shape[1])
            self.counts[k].lerp_(counts, 1 - DECAY)
            self.sums[k].lerp_(sums, 1 - DECAY)
            self.codes[k] = self.sums[k] / self.counts[k].clamp_min(1e-5)[:, None]
            unused = (self.counts[k] < UNUSED).nonzero()[:, 0]
            if len(unused):
                picked = rest[torch.randint(len(rest), (len(unused),))]
                self.codes[k, unused] = picked
                self.sums[k, unused], self.counts[k, unused] = picked, 1.0

    def weights(self) -> dict[str, torch.Tensor]:
        return {"codebooks": self.codes}


def _nearest(latents: torch.Tensor, book: torch.Tensor) -> torch.Tensor:
    """Indices (B,) of the nearest code."""
    return ((book**2).sum(dim=1) - 2 * latents @ book.T).argmin(dim=1)


def _members(latents: torch.Tensor, nearest: torch.Tensor, codes: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(number (V,), sum (V, L)) of the latents of each code."""
    sums = torch.zeros(codes, latents.shape[1]).index_add_(0, nearest, latents)
    return torch.bincount(nearest, minlength=codes).float(), sums


def _k_means(latents: torch.Tensor, codes: int) -> torch.Tensor:
    """Codes (V, L). Those without members, and all beyond the number of latents, lie near some latent."""
    picked = torch.randint(len(latents), (codes,))
    picked[: len(latents)] = torch.randperm(len(latents))[:codes]
    book = latents[picked] + 1e-3 * latents.std(correction=0) * torch.randn(codes, latents.shape[1])
    for _ in range(K_MEANS_ITERATIONS):
        counts, sums = _members(latents, _nearest(latents, book), codes)
        book = torch.where(counts[:, None] > 0, sums / counts.clamp_min(1)[:, None], book)
    return book
