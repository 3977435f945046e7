"""Memory of a streamed mixture over 1e5 samples.

    python -m benchmarks.stream_memory                              a made-up stream
    python -m benchmarks.stream_memory --data DATASET DATASET       datasets of any format, streamed episode by episode

Prints the resident memory of this process every so many samples. Decoded frames are checked against their source.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro

from vla.finetune.data.open_source import open_sources
from vla.finetune.data.stream import SourceEpisodes, StreamMixture
from vla.types import Episode, Observation, Step


@dataclass(frozen=True)
class Settings:
    data: tuple[str, ...] = ()
    """Datasets; none: 2 made-up streams."""
    samples: int = 100_000
    """How many are drawn."""
    every: int = 10_000
    """Memory is printed every so many samples."""
    buffer_size: int = 2000
    """Frames in the shuffle buffer."""
    image_px: int = 32
    """Side of the made-up frames."""


@dataclass(frozen=True)
class MadeUp:
    """An endless supply of different episodes of 50 steps, made as they are asked for."""

    seed: int
    image_px: int

    def __call__(self, first: int) -> Iterator[Episode]:
        for number in range(first, 10**9):
            rng = np.random.default_rng([self.seed, number])
            frames = rng.integers(0, 256, (50, self.image_px, self.image_px, 3), dtype=np.uint8)
            actions = rng.normal(size=(50, 7)).astype(np.float32)
            actions[:, 0] = frames[:, 0, 0, 0]  # so that a sample tells which frame it should have
            steps = [Step(Observation({"primary": f}, None, "go"), a) for f, a in zip(frames, actions, strict=True)]
            yield Episode(steps, "go", "made-up")


def resident_mb() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096 / 2**20


def run(settings: Settings) -> list[float]:
    """MiB after each part, the first after `every` samples."""
    if settings.data:
        sources, _ = open_sources(settings.data)
        parts = [(source.name, SourceEpisodes(source), 1.0) for source in sources]
    else:
        parts = [(f"made-up-{seed}", MadeUp(seed, settings.image_px), 1.0 + seed) for seed in range(2)]
    stream = StreamMixture(parts, horizon=8, buffer_size=settings.buffer_size)
    found, start = [], time.perf_counter()
    for k, sample in enumerate(stream, 1):
        if not settings.data:
            assert sample.images["primary"][0, 0, 0] == sample.actions[0, 0], "a frame of another step"
        if k % settings.every == 0 or k == settings.samples:
            found.append(resident_mb())
            rate = k / (time.perf_counter() - start)
            print(f"{k:>8,} samples  {found[-1]:7.1f} MiB  {rate:7.0f} samples/s", flush=True)
        if k == settings.samples:
            break
    print(f"growth after the first part: {found[-1] - found[0]:+.1f} MiB")
    return found


if __name__ == "__main__":
    run(tyro.cli(Settings))
