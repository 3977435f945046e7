"""Random frames per second from our own cache, from our LeRobot reader and, where it is installed, from lerobot itself.

Run it with `python -m benchmarks.data_cache`; `--peer` also times lerobot, which must then be installed
(`pip install lerobot`).

All read the same LeRobot v3.0 files (or the cache made of them): one sample is one frame of every camera decoded to
pixels, the state, the action and the instruction. Frames are checked to be equal first. Page caches are warm.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tyro

from vla.finetune.formats.cache_format import CacheSettings
from vla.finetune.formats.cache_reader import CacheReader
from vla.finetune.formats.cache_writer import CacheWriter
from vla.finetune.formats.lerobot_reader import LeRobotReader
from vla.finetune.formats.lerobot_writer import LeRobotWriter
from vla.finetune.formats.source import FrameSource
from vla.types import Episode, Observation, Step, problem


@dataclass(frozen=True)
class Settings:
    episodes: int = 8
    """Episodes of the data that are made up."""
    frames: int = 60
    """Frames of each."""
    size_px: int = 256
    """Side of the two cameras' frames."""
    images: Literal["image", "video"] = "image"
    """How the LeRobot dataset stores them."""
    samples: int = 64
    """Random frames per repeat of the slow readers; the cache reads 20 times as many."""
    repeats: int = 5
    """Interleaved repeats; the median is reported."""
    peer: bool = False
    """Time lerobot as well."""


def made_up(k: int, settings: Settings) -> Episode:
    """Smooth frames with some texture: compresses about as robots' frames do."""
    rng = np.random.default_rng(k)
    y, x = np.mgrid[: settings.size_px, : settings.size_px] / settings.size_px
    texture = rng.normal(0, 4, (settings.size_px, settings.size_px, 3))
    steps = []
    for i in range(settings.frames):
        wave = 128 + 60 * np.sin(6 * x + 0.1 * i) + 40 * np.cos(9 * y - 0.07 * i)
        image = np.clip(wave[..., None] * (1.0, 0.9, 0.8) + texture, 0, 255).astype(np.uint8)
        images = {"front": image, "wrist": image[::-1].copy()}
        state, action = rng.normal(size=8).astype(np.float32), rng.uniform(-1, 1, 7).astype(np.float32)
        steps.append(Step(Observation(images, state, "push the block"), action))
    return Episode(steps, "push the block", "bench", True, k)


def sample(source: FrameSource, i: int) -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray, str]:
    """What a training sample is made of."""
    states = source.states()
    assert states is not None
    return source.images(i), states[i], source.actions()[i], source.instruction_of(i)


def peer_reader(root: Path) -> Any:
    try:
        from lerobot.datasets.lerobot_dataset import LeRobotDataset  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise problem(f"no lerobot ({error})", "the peer", "pip install lerobot, or leave out --peer") from error
    return LeRobotDataset("bench/bench", root=root, video_backend="pyav")


def rate(read: Callable[[int], object], frames: np.ndarray) -> float:
    """Samples per second of wall time."""
    start = time.perf_counter()
    for i in frames.tolist():
        read(i)
    return len(frames) / (time.perf_counter() - start)


def run(settings: Settings) -> dict[str, Any]:
    """Medians of samples/s, and each cache's ratio to the LeRobot readers."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "data"
        size = (settings.size_px, settings.size_px)
        names = tuple(f"s{d}" for d in range(8)), tuple(f"a{d}" for d in range(7))
        with LeRobotWriter(root, 10, {"front": size, "wrist": size}, *names, "bench", settings.images) as writer:
            for k in range(settings.episodes):
                writer.add_episode(made_up(k, settings))
        source = LeRobotReader(root)
        sources: dict[str, FrameSource] = {"lerobot_reader": source}
        for kind in ("raw", "jpeg"):
            cache = CacheWriter(Path(folder) / kind, source, CacheSettings(kind))
            for k in range(source.n_episodes):
                cache.add_episode(k)
            cache.finish()
            sources[f"cache_{kind}"] = CacheReader(Path(folder) / kind)
        readers: dict[str, Callable[[int], object]] = {
            name: lambda i, source=source: sample(source, i) for name, source in sources.items()
        }
        check_equal(sources)
        if settings.peer:
            peer = peer_reader(root)
            theirs = (peer[3]["observation.images.front"].permute(1, 2, 0).numpy() * 255).round().astype(np.uint8)
            off = np.abs(theirs.astype(int) - source.images(3)["front"].astype(int)).max()
            assert off <= (0 if settings.images == "image" else 2), f"lerobot's frame differs by {off}"
            readers["lerobot"] = lambda i: peer[i]
        rates: dict[str, list[float]] = {name: [] for name in readers}
        for repeat in range(settings.repeats):
            chosen = np.random.default_rng(repeat).integers(0, len(source), settings.samples * 20)
            for name, read in readers.items():
                rates[name].append(rate(read, chosen if name == "cache_raw" else chosen[: settings.samples]))
    result = {f"{name}_samples_per_s": round(statistics.median(values), 1) for name, values in rates.items()}
    for base in ("lerobot_reader", "lerobot") if settings.peer else ("lerobot_reader",):
        for kind in ("raw", "jpeg"):
            ratio = result[f"cache_{kind}_samples_per_s"] / result[f"{base}_samples_per_s"]
            result[f"cache_{kind}_to_{base}"] = round(ratio, 1)
    return {"images": settings.images, "frame": f"2 x {settings.size_px} x {settings.size_px}"} | result


def check_equal(sources: dict[str, FrameSource]) -> None:
    """Numbers equal everywhere; pixels equal in the raw cache, near in the lossy one."""
    first = sources["lerobot_reader"]
    for i in (0, len(first) // 2, len(first) - 1):
        images, state, action, instruction = sample(first, i)
        for name, source in sources.items():
            mine = sample(source, i)
            assert (mine[1] == state).all() and (mine[2] == action).all() and mine[3] == instruction, name
            for camera, image in images.items():
                off = np.abs(mine[0][camera].astype(int) - image.astype(int))
                assert off.max() == 0 if name == "cache_raw" else off.mean() < 4, f"{name}: frames differ"


if __name__ == "__main__":
    print(json.dumps(run(tyro.cli(Settings)), indent=2))
