"""Training samples per second from the files of a LeRobotDataset v3.0, beside lerobot's own `LeRobotDataset`.

Run it with `python -m benchmarks.lerobot_loading` where lerobot is installed (lerobot 0.6 needs Python 3.12 or newer).

A sample is one frame with all its cameras, the state and the next H actions. Frames are drawn at random, in batches; the
two loaders take turns on the same frames in one process, and their samples are compared number by number first.
`ours` is what our training reads (uint8 pixels); `ours_tensors` also makes the tensors lerobot makes (float32 in [0, 1],
channels first) and is the one the ratio is for. Without `--data` a dataset is written first, by our writer.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import tyro

from vla.finetune.data.chunks import ChunkDataset, Sample
from vla.finetune.formats.lerobot_reader import LeRobotReader
from vla.finetune.formats.lerobot_writer import LeRobotWriter
from vla.types import Episode, Observation, Step, problem


@dataclass(frozen=True)
class Settings:
    data: Path | None = None
    """Folder of a LeRobotDataset v3.0; None: datasets of images and of videos are made for this run."""
    episodes: int = 8
    """Of the datasets that are made."""
    frames: int = 60
    """In each of their episodes."""
    size_px: int = 224
    """Height and width of their frames."""
    batch: int = 8
    """Frames per batch."""
    horizon: int = 8
    """H, actions per sample."""
    batches: int = 20
    """Batches of each loader; the median is reported."""
    video_backend: str = "pyav"
    """lerobot's decoder: pyav or torchcodec."""


def run(settings: Settings) -> dict[str, Any]:
    """Samples per second (CPU and wall time), and their ratios."""
    torch.set_num_threads(1)
    if settings.data is not None:
        return {settings.data.name: compare(settings, settings.data)}
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        modes: tuple[Literal["image", "video"], ...] = ("image", "video")
        for mode in modes:
            root = Path(folder) / mode
            write_dataset(settings, root, mode)
            results[mode] = compare(settings, root)
    return results


def compare(settings: Settings, root: Path) -> dict[str, Any]:
    """Both loaders on the same batches of one dataset."""
    reader = LeRobotReader(root)
    chunks = ChunkDataset([(reader.name, reader)], settings.horizon)
    theirs = peer(settings, root, reader.fps)
    loaders: dict[str, Callable[[Sequence[int]], list[Any]]] = {
        "ours": lambda frames: [chunks[i] for i in frames],
        "ours_tensors": lambda frames: [tensors(chunks[i]) for i in frames],
        "lerobot": lambda frames: [theirs[i] for i in frames],
    }
    order = np.random.default_rng(0).integers(0, len(reader), (settings.batches + 1, settings.batch)).tolist()
    check_equal(reader, loaders["ours_tensors"](order[0]), loaders["lerobot"](order[0]))
    cpu: dict[str, list[float]] = {name: [] for name in loaders}
    wall: dict[str, list[float]] = {name: [] for name in loaders}
    for frames in order[1:]:
        for name, load in loaders.items():
            cpu_start, wall_start = time.process_time(), time.perf_counter()
            load(frames)
            wall[name].append(time.perf_counter() - wall_start)
            cpu[name].append(time.process_time() - cpu_start)
    rates = {name: settings.batch / statistics.median(values) for name, values in cpu.items()}
    row: dict[str, Any] = {f"{name}_per_cpu_s": round(rate, 1) for name, rate in rates.items()}
    row |= {f"{name}_per_s": round(settings.batch / statistics.median(values), 1) for name, values in wall.items()}
    row["ratio_uint8"] = round(rates["ours"] / rates["lerobot"], 2)
    return row | {"ratio": round(rates["ours_tensors"] / rates["lerobot"], 2)}


def peer(settings: Settings, root: Path, fps: float) -> Any:
    """lerobot's dataset with the same action window."""
    try:
        from lerobot.datasets.lerobot_dataset import LeRobotDataset  # type: ignore[import-not-found]
    except ImportError as error:
        raise problem(f"no lerobot ({error})", "lerobot to compare with", "pip install 'lerobot[dataset]'") from error
    window = {"action": [k / fps for k in range(settings.horizon)]}
    return LeRobotDataset("local/data", root=root, delta_timestamps=window, video_backend=settings.video_backend)


def tensors(sample: Sample) -> dict[str, Any]:
    """A sample in lerobot's form."""
    row: dict[str, Any] = {"action": torch.from_numpy(sample.actions), "action_is_pad": torch.from_numpy(sample.is_pad),
                           "task": sample.instruction}  # fmt: skip
    for camera, pixels in sample.images.items():
        row[camera] = torch.from_numpy(pixels).permute(2, 0, 1).contiguous().to(torch.float32).div_(255)
    if sample.state is not None:
        row["observation.state"] = torch.from_numpy(sample.state)
    return row


def check_equal(reader: LeRobotReader, ours: Sequence[dict[str, Any]], theirs: Sequence[dict[str, Any]]) -> None:
    """AssertionError unless every number and text is the same."""
    for a, b in zip(ours, theirs, strict=True):
        for name, value in a.items():
            other = b[reader.camera_keys.get(name, name)]
            same = value == other if isinstance(value, str) else torch.equal(value, other)
            assert same, f"{name} differs from lerobot's"


def write_dataset(settings: Settings, root: Path, mode: Literal["image", "video"]) -> None:
    """Frames with the size on disk of a camera's: a smooth picture that moves, with a little noise."""
    rng, size = np.random.default_rng(0), settings.size_px
    names = tuple("abcdefg")
    writer = LeRobotWriter(root, 10, {"front": (size, size)}, names, names, "made", image_mode=mode)
    y, x = np.mgrid[:size, :size] / size
    for e in range(settings.episodes):
        steps, waves = [], rng.uniform(2, 9, (3, 2))
        for k in range(settings.frames):
            picture = [128 + 100 * np.sin(a * x + b * y + 0.05 * k) for a, b in waves]
            pixels = np.stack(picture, axis=-1) + rng.normal(0, 2, (size, size, 3))
            seen = Observation({"front": pixels.clip(0, 255).astype(np.uint8)}, _numbers(rng), f"task {e % 3}")
            steps.append(Step(seen, _numbers(rng), success=k == settings.frames - 1))
        writer.add_episode(Episode(steps, f"task {e % 3}", "made", success=True))
    writer.finalize()


def _numbers(rng: np.random.Generator) -> np.ndarray:
    return rng.normal(size=7).astype(np.float32)


if __name__ == "__main__":
    print(json.dumps(run(tyro.cli(Settings)), indent=2))
