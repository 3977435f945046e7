"""Frames out of an RLDS dataset: `RldsReader` beside tensorflow_datasets, from the same files, pixels checked equal.

Run it with `python -m benchmarks.rlds` in an environment that has tensorflow_datasets (it is no dependency of ours).

Sequential: all frames in the order of the shards, every image decoded. Shuffled: all frames once in random order. Of a
TFRecord file TFDS has no random access: it is given what OpenVLA's pipeline does, a shuffle buffer of undecoded frames (here
one that holds them all) and decoding behind it. TensorFlow decodes on every core; ours runs in this one process, so
frames per CPU second are given too.
"""

from __future__ import annotations

import json
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tyro

from vla.finetune.formats.rlds_reader import RldsReader
from vla.types import problem


@dataclass(frozen=True)
class Settings:
    data: Path | None = None
    """An RLDS dataset with one action vector; without it, one is written: 2 cameras of 224 px, JPEG 95."""
    episodes: int = 12
    """Episodes of the dataset that is written."""
    steps: int = 40
    """Steps of each."""
    repeats: int = 3
    """Interleaved A/B repeats; the median is reported."""


def peer() -> tuple[Any, Any]:
    try:
        import tensorflow  # pyright: ignore[reportMissingModuleSource, reportMissingImports]
        import tensorflow_datasets  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise problem(
            f"no {error.name}", "the peer in this environment", "pip install tensorflow-cpu tensorflow_datasets"
        ) from error
    return tensorflow, tensorflow_datasets


def write_dataset(tfds: Any, folder: Path, settings: Settings) -> Path:
    """A dataset as LIBERO's in RLDS, written by TFDS."""
    features = tfds.features

    class BenchArm(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self) -> Any:
            image = features.Image(shape=(224, 224, 3), encoding_format="jpeg")
            step = {"observation": {"image": image, "wrist_image": image, "state": features.Tensor(shape=(8,), dtype=np.float32)},
                    "action": features.Tensor(shape=(7,), dtype=np.float32), "language_instruction": features.Text()}  # fmt: skip
            return tfds.core.DatasetInfo(
                builder=self, features=features.FeaturesDict({"steps": features.Dataset(step)})
            )

        def _split_generators(self, _: Any) -> Any:
            return {"train": self._generate_examples()}

        def _generate_examples(self) -> Iterator[tuple[str, Any]]:
            rng = np.random.default_rng(0)
            for e in range(settings.episodes):
                steps = [{"observation": {"image": picture(rng), "wrist_image": picture(rng),
                                          "state": rng.normal(size=8).astype(np.float32)},
                          "action": rng.uniform(-1, 1, 7).astype(np.float32), "language_instruction": f"do {e}"}
                         for _ in range(settings.steps)]  # fmt: skip
                yield str(e), {"steps": steps}

    builder = BenchArm(data_dir=folder)
    builder.download_and_prepare(download_config=tfds.download.DownloadConfig(num_shards=4))
    return Path(builder.data_dir)


def picture(rng: np.random.Generator) -> np.ndarray:
    coarse = np.kron(rng.uniform(0, 255, (14, 14, 3)), np.ones((16, 16, 1)))
    return np.clip(coarse + rng.normal(size=(224, 224, 3)) * 3, 0, 255).astype(np.uint8)


def run(settings: Settings) -> dict[str, Any]:
    """Medians of wall and CPU time; every pixel and number is compared first."""
    tf, tfds = peer()
    with tempfile.TemporaryDirectory() as folder:
        os.environ["VLA_CACHE"] = folder
        root = settings.data or write_dataset(tfds, Path(folder), settings)
        return measure(tf, tfds, root, settings)


def measure(tf: Any, tfds: Any, root: Path, settings: Settings) -> dict[str, Any]:
    start = time.perf_counter()
    reader = RldsReader(root)
    index_s = time.perf_counter() - start
    start = time.perf_counter()
    reader = RldsReader(root)
    reopen_s = time.perf_counter() - start
    builder = tfds.builder_from_directory(str(root))
    config = tfds.ReadConfig(interleave_cycle_length=1, try_autocache=False)
    image_features = {key.split("/")[-1]: tfds.decode.SkipDecoding() for key in reader.camera_keys.values()}
    undecoded = {"steps": {"observation": image_features}}

    def peer_steps() -> Iterator[Any]:
        episodes = builder.as_dataset(split="train", read_config=config)
        return iter(episodes.flat_map(lambda episode: episode["steps"]).prefetch(tf.data.AUTOTUNE).as_numpy_iterator())

    def peer_shuffled() -> Iterator[Any]:
        episodes = builder.as_dataset(split="train", read_config=config, decoders=undecoded)
        frames = episodes.flat_map(lambda episode: episode["steps"]).shuffle(len(reader))

        def decoded(step: Any) -> Any:
            seen = {key: tf.io.decode_image(value, channels=3, expand_animations=False) if key in image_features else value
                    for key, value in step["observation"].items()}  # fmt: skip
            return {**step, "observation": seen}

        return iter(frames.map(decoded, tf.data.AUTOTUNE).prefetch(tf.data.AUTOTUNE).as_numpy_iterator())

    for i, step in enumerate(peer_steps()):
        assert (reader.actions()[i] == step["action"]).all(), f"actions of frame {i} differ"
        assert reader.instruction_of(i) == step["language_instruction"].decode(), f"instructions of frame {i} differ"
        for camera, key in reader.camera_keys.items():
            theirs = step["observation"][key.split("/")[-1]]
            assert (reader.images(i)[camera] == theirs).all(), f"pixels of frame {i} differ"
    assert i + 1 == len(reader), "numbers of frames differ"

    def ours(order: np.ndarray) -> None:
        states = reader.states()
        for i in order:
            state = None if states is None else states[i]
            assert reader.images(int(i)) and len(reader.actions()[i]) and reader.instruction_of(int(i)), state

    straight, shuffled = np.arange(len(reader)), np.random.default_rng(0).permutation(len(reader))
    routes = {
        "sequential_ours": lambda: ours(straight),
        "sequential_tfds": lambda: sum(1 for _ in peer_steps()),
        "shuffled_ours": lambda: ours(shuffled),
        "shuffled_tfds": lambda: sum(1 for _ in peer_shuffled()),
    }
    wall: dict[str, list[float]] = {name: [] for name in routes}
    cpu: dict[str, list[float]] = {name: [] for name in routes}
    for _ in range(settings.repeats):
        for name, route in routes.items():
            start, start_cpu = time.perf_counter(), time.process_time()
            route()
            wall[name].append(time.perf_counter() - start)
            cpu[name].append(time.process_time() - start_cpu)
    result: dict[str, Any] = {"frames": len(reader), "cameras": len(reader.cameras), "cores": os.cpu_count(),
                              "index_s": round(index_s, 3), "reopen_s": round(reopen_s, 3),
                              "pixels": "equal bit for bit"}  # fmt: skip
    for name in routes:
        result[f"{name}_frames_per_s"] = round(len(reader) / statistics.median(wall[name]), 1)
        result[f"{name}_frames_per_cpu_s"] = round(len(reader) / statistics.median(cpu[name]), 1)
    for order in ("sequential", "shuffled"):
        for unit in ("frames_per_s", "frames_per_cpu_s"):
            result[f"{order}_ratio_{unit}"] = round(result[f"{order}_ours_{unit}"] / result[f"{order}_tfds_{unit}"], 2)
    return result


if __name__ == "__main__":
    print(json.dumps(run(tyro.cli(Settings)), indent=2))
