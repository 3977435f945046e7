"""Memory of training samples that are read file by file, over 1e5 of them.

    python -m benchmarks.stream_memory                              two made-up datasets
    python -m benchmarks.stream_memory --data DATASET DATASET       datasets of any format

Prints the resident memory of this process every so many samples of a mixture with a shuffle window, as
`vla finetune --shuffle-window` draws them. Frames of the made-up data are checked against their actions.
"""

from __future__ import annotations

import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro

from vla.finetune.data.agreement import common_cameras
from vla.finetune.data.chunks import ChunkDataset
from vla.finetune.data.open_source import open_sources
from vla.finetune.formats.lerobot_writer import LeRobotWriter
from vla.types import Episode, Observation, Step


@dataclass(frozen=True)
class Settings:
    data: tuple[str, ...] = ()
    """Datasets; none: 2 made-up ones."""
    samples: int = 100_000
    """How many are drawn."""
    every: int = 10_000
    """Memory is printed every so many samples."""
    window: int = 2000
    """Shuffle window, in samples."""
    image_px: int = 64
    """Side of the made-up frames."""


def make_up(folder: Path, seed: int, image_px: int) -> str:
    """60 episodes of 50 frames of noise, as PNG in a LeRobotDataset."""
    names = tuple("xyzabcg")
    with LeRobotWriter(
        folder / f"made-up-{seed}", 10, {"primary": (image_px, image_px)}, ("s",), names, "none"
    ) as writer:
        for number in range(60):
            rng = np.random.default_rng([seed, number])
            frames = rng.integers(0, 256, (50, image_px, image_px, 3), dtype=np.uint8)
            actions = rng.normal(size=(50, 7)).astype(np.float32)
            actions[:, 0] = frames[:, 0, 0, 0]  # so that a sample tells which frame it should have
            state = np.zeros(1, np.float32)
            steps = [Step(Observation({"primary": f}, state, "go"), a) for f, a in zip(frames, actions, strict=True)]
            writer.add_episode(Episode(steps, "go", "made-up", True))
    return str(folder / f"made-up-{seed}")


def resident_mb() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096 / 2**20


def run(settings: Settings) -> list[float]:
    """MiB after each part, the first after `every` samples."""
    with tempfile.TemporaryDirectory() as folder:
        data = settings.data or tuple(make_up(Path(folder), seed, settings.image_px) for seed in range(2))
        sources, weights = open_sources(data)
        dataset = ChunkDataset([(s.name, s) for s in sources], 8, common_cameras(sources), weights or [1.0] * len(sources),
                               balance=True, window=settings.window)  # fmt: skip
        print(f"{len(dataset):,} frames of {len(sources)} datasets, window {settings.window}")
        found, start = [], time.perf_counter()
        for k in range(settings.samples):
            sample = dataset[int(dataset.indices(k, 1)[0])]
            if not settings.data:
                assert sample.images["primary"][0, 0, 0] == sample.actions[0, 0], "a frame of another step"
            if (k + 1) % settings.every == 0 or k + 1 == settings.samples:
                found.append(resident_mb())
                rate = (k + 1) / (time.perf_counter() - start)
                print(f"{k + 1:>8,} samples  {found[-1]:7.1f} MiB  {rate:7.0f} samples/s", flush=True)
        print(f"growth after the first part: {found[-1] - found[0]:+.1f} MiB")
        return found


if __name__ == "__main__":
    run(tyro.cli(Settings))
