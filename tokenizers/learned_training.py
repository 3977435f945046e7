"""Training a learned codec: everything here needs torch."""

from __future__ import annotations

import math
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
    whiten: bool,
    progress: Callable[[int, int, float], None] | None,
) -> dict[str, np.ndarray]:
    """Fit both sides and the quantiser to float32 (N, H * D); the weights that numpy uses.

    Loss: mean squared error, and the quantiser's own. The rate rises over a tenth of the steps and falls along a cosine.
    torch's global random state is left as it was.

    Args:
        shapes: of the two sides' weights, by name.
        make_quantiser: from the first latents of some chunks, up to 4096.
        whiten: give the first latents variance 1.
    """
    chunks = torch.from_numpy(data)
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(seed)
        encoder, decoder = Side(shapes, "encoder"), Side(shapes, "decoder")
        _begin_with_components(encoder, decoder, chunks, whiten)
        draws = _batches(len(chunks), batch, seed)
        with torch.no_grad():
            quantiser = make_quantiser(encoder(chunks[torch.randperm(len(chunks))[:4096]]))
        parameters = [*encoder.parameters(), *decoder.parameters()]
        optimizer = torch.optim.Adam(parameters, learning_rate)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, steps))
        for step in range(1, steps + 1):
            drawn = chunks[next(draws)]
            latents, own_loss = quantiser.quantise(encoder(drawn))
            loss = ((decoder(latents) - drawn) ** 2).mean() + own_loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            quantiser.after_step()
            if progress is not None and (step % 50 == 0 or step == steps):
                progress(step, steps, loss.item())
    weights = encoder.named() | decoder.named() | quantiser.weights()
    return {name: np.ascontiguousarray(w.detach().numpy(), np.float32) for name, w in weights.items()}


class Side(nn.Module):
    """linear(x) + network(x); the network begins at 0."""

    def __init__(self, shapes: Shapes, side: str) -> None:
        super().__init__()
        self.side = side
        layers = []
        for name in ("linear", "0", "1", "2"):
            inputs, outputs = shapes[f"{side}.{name}.weight"]
            layers.append(nn.Linear(inputs, outputs))
        self.linear, first, second, last = layers
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        self.network = nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), last)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x) + self.network(x)

    def named(self) -> dict[str, torch.Tensor]:
        """Weights as numpy uses them: (inputs, outputs)."""
        layers = {"linear": self.linear, **{str(i): self.network[2 * i] for i in range(3)}}
        found = {}
        for name, layer in layers.items():
            assert isinstance(layer, nn.Linear)
            found[f"{self.side}.{name}.weight"], found[f"{self.side}.{name}.bias"] = layer.weight.T, layer.bias
        return found


@torch.no_grad()
def _begin_with_components(encoder: Side, decoder: Side, chunks: torch.Tensor, whiten: bool) -> None:
    """The latents become the chunks' principal components, largest first; those without variance, and beyond, 0."""
    mean = chunks.double().mean(dim=0)
    centred = chunks.double() - mean
    variance, axes = torch.linalg.eigh(centred.T @ centred / len(chunks))
    n = min(encoder.linear.out_features, int((variance > 1e-8).sum()))
    axes, size = axes.flip(1)[:, :n], variance.flip(0)[:n].sqrt() if whiten else torch.ones(n).double()
    encoder.linear.weight.zero_()[:n] = (axes / size).T
    decoder.linear.weight.zero_()[:, :n] = axes * size
    encoder.linear.bias.copy_(-(encoder.linear.weight.double() @ mean))
    decoder.linear.bias.copy_(mean)


def _rate(step: int, steps: int) -> float:
    """Of the peak learning rate, at step 0 .. steps."""
    rise = max(1, steps // 10)
    return (step + 1) / rise if step < rise else 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, steps - rise)))


def _batches(n: int, batch: int, seed: int) -> Iterator[torch.Tensor]:
    """Endless indices; every chunk is seen once before any is seen again."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(n, generator=generator)
        for start in range(0, n, batch):
            yield order[start : start + batch]
