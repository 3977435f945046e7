"""Training a learned codec: everything here needs torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Protocol

import numpy as np
import torch
from torch import nn

Shapes = dict[str, tuple[int, ...]]


class Quantiser(Protocol):
    """A codec's quantiser while it is trained."""

    def quantise(self, latents: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Latents (B, n) -> (quantised latents (B, n) that pass the gradient on, a loss ())."""
        ...

    def after_step(self) -> None:
        """What the quantiser learns by itself, from the latents it saw last."""
        ...

    def weights(self) -> dict[str, torch.Tensor]: ...


def train(
    data: np.ndarray,
    shapes: Shapes,
    make_quantiser: Callable[[torch.Tensor], Quantiser],
    *,
    steps: int,
    batch: int,
    learning_rate: float,
    seed: int,
    warm_up: int,
    progress: Callable[[int, int, float], None] | None,
) -> dict[str, np.ndarray]:
    """Fit the two networks and the quantiser to float32 (N, H * D); the weights that numpy uses.

    Loss: mean absolute error, and the quantiser's own. torch's global random state is left as it was.

    Args:
        shapes: of the networks' weights, by name.
        make_quantiser: from the encoder's latents of some chunks, up to 4096, when the warm-up is over.
        warm_up: steps at the start in which the latents are not quantised.
    """
    chunks = torch.from_numpy(data)
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(seed)
        sides = {side: _network(shapes, side) for side in ("encoder", "decoder")}
        draws = _batches(len(chunks), batch, seed)
        quantiser: Quantiser | None = None
        parameters = [p for network in sides.values() for p in network.parameters()]
        optimizer = torch.optim.Adam(parameters, learning_rate)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        for step in range(1, steps + 1):
            if step > warm_up and quantiser is None:
                with torch.no_grad():
                    quantiser = make_quantiser(sides["encoder"](chunks[torch.randperm(len(chunks))[:4096]]))
            drawn = chunks[next(draws)]
            latents, own_loss = sides["encoder"](drawn), torch.zeros(())
            if quantiser is not None:
                latents, own_loss = quantiser.quantise(latents)
            loss = (sides["decoder"](latents) - drawn).abs().mean() + own_loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            if quantiser is not None:
                quantiser.after_step()
            if progress is not None and (step % 50 == 0 or step == steps):
                progress(step, steps, loss.item())
    assert quantiser is not None, "warm_up must be less than steps"
    weights = {name: _weight(sides, name) for name in shapes} | quantiser.weights()
    return {name: np.ascontiguousarray(w.detach().numpy(), np.float32) for name, w in weights.items()}


def _network(shapes: Shapes, side: str) -> nn.Sequential:
    layers: list[nn.Module] = []
    for i in range(3):
        inputs, outputs = shapes[f"{side}.{i}.weight"]
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def _weight(sides: dict[str, nn.Sequential], name: str) -> torch.Tensor:
    side, i, kind = name.split(".")
    value = getattr(sides[side][2 * int(i)], kind)
    return value.T if kind == "weight" else value


def _batches(n: int, batch: int, seed: int) -> Iterator[torch.Tensor]:
    """Endless indices; every chunk is seen once before any is seen again."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(n, generator=generator)
        for start in range(0, n, batch):
            yield order[start : start + batch]
