"""The grid of `vla.tokenizers.fsq` while the networks are trained. Needs torch."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch


class ScalarGrid:
    """Rounding whose gradient is that of the squeezed latents. Learns nothing itself."""

    def __init__(self, levels: tuple[int, ...], constants: Sequence[np.ndarray]) -> None:
        """`constants`: `vla.tokenizers.fsq.squeeze_constants(levels)`."""
        self.half, self.offset, self.shift = (torch.from_numpy(c).float() for c in constants)
        self.widths = torch.tensor([level // 2 for level in levels], dtype=torch.float32)

    def quantise(self, latents: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        squeezed = torch.tanh(latents.unflatten(1, (-1, len(self.widths))) + self.shift) * self.half - self.offset
        rounded = squeezed + (squeezed.round() - squeezed).detach()
        return (rounded / self.widths).flatten(1), latents.new_zeros(())

    def after_step(self) -> None:
        pass

    def weights(self) -> dict[str, torch.Tensor]:
        return {}
