"""`vla data retrieve`: of a large prior dataset, the episodes nearest to a few demonstrations of the target task.

    vla data retrieve --prior data/everything --target data/my_task --n 100 --out retrieved.json

Behavior Retrieval (Du, Nair, Sadigh and Finn 2023, arXiv 2304.08742) embeds transitions (s, a) and scores each one of the
prior data by its distance to the nearest target transition; those above a threshold are mixed into training. Here too:

    score(s, a) = -min over target (s', a') of |f(s, a) - f(s', a')|, brought to 0..1 over the prior data

Left out: the paper trains a VAE on the prior data for f. Ours needs no training: features of the built-in backbone's
vision tower, state and action, each standardised over both datasets and weighted alike; whole episodes are returned, by
the mean score of their transitions, because chunks of actions need what follows. A threshold is `--min-score`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from vla.files import write_json
from vla.finetune.data.data_convert import Settings as ConvertSettings
from vla.finetune.data.data_convert import convert
from vla.finetune.data.open_source import open_source
from vla.finetune.data.subset_source import SubsetSource
from vla.finetune.formats.source import FrameSource
from vla.progress import Progress
from vla.types import problem

BATCH = 16
BLOCK = 1024
N_FEATURES = 64
"""The vision tower's features are projected to so many by a fixed random matrix (Johnson-Lindenstrauss)."""


@dataclass(frozen=True)
class Settings:
    """Find the prior episodes nearest to a few target demonstrations."""

    prior: str
    """The large dataset: a folder or file of any format."""
    target: str
    """A few demonstrations of the task at hand, with the same actions (and state) as the prior data."""
    out: Path
    """File (.json) to write: the episodes and their scores."""
    n: int = 100
    """Episodes to retrieve."""
    min_score: float = 0.0
    """Fewer than n, if the others score less: 0 is the furthest transition of the prior data, 1 the nearest."""
    embedding: Literal["vision", "state-action"] = "vision"
    """`vision`: the built-in backbone's image features, with state and action. `state-action`: the numbers alone."""
    cameras: tuple[str, ...] = ()
    """Cameras to look at; not given: those that both datasets have."""
    frames_per_episode: int = 16
    """Evenly spaced transitions of each episode that are embedded."""
    subset: Path | None = None
    """Write the retrieved episodes as a LeRobot dataset to this folder too."""


@dataclass(frozen=True)
class Retrieved:
    """Prior episodes, the nearest first."""

    episodes: list[int]
    scores: list[float]
    """Mean score of each one's transitions, 0..1."""


def run(settings: Settings) -> Retrieved:
    """Score the prior data, print and write the nearest episodes."""
    if settings.out.exists():
        raise problem(f"{settings.out}, which exists", "a new file", "choose another --out")
    prior, target = open_source(settings.prior), open_source(settings.target)
    found = retrieve(prior, target, settings)
    write_json(settings.out, {"prior": prior.where, "target": target.where, "embedding": settings.embedding,
                              "kept": found.episodes, "scores": [round(score, 6) for score in found.scores]})  # fmt: skip
    print(
        f"{len(found.episodes)} of {prior.n_episodes} episodes, scores {found.scores[0]:.3f} to {found.scores[-1]:.3f}: "
        f"{settings.out}"
    )
    for episode, score in list(zip(found.episodes, found.scores, strict=True))[:10]:
        print(f"  {score:.3f}  episode {episode}: {prior.instruction_of(prior.episodes[episode].start)}")
    if settings.subset is not None:
        convert(SubsetSource(prior, found.episodes), ConvertSettings(settings.prior, "lerobot", settings.subset))
    return found


def retrieve(prior: FrameSource, target: FrameSource, settings: Settings) -> Retrieved:
    """See the module's text.

    Raises:
        VlaError: the two have other actions or states, or no camera in common for the vision embedding.
    """
    if settings.n < 1 or settings.frames_per_episode < 1:
        raise problem(f"n {settings.n}, frames_per_episode {settings.frames_per_episode}", "at least 1", "raise them")
    _check_alike(prior, target)
    frames = [_spaced(source, settings.frames_per_episode) for source in (prior, target)]
    parts = [_numbers(source, chosen) for source, chosen in zip((prior, target), frames, strict=True)]
    if settings.embedding == "vision":
        cameras = _cameras(prior, target, settings.cameras)
        vision = Vision()
        for part, source, chosen in zip(parts, (prior, target), frames, strict=True):
            part["images"] = vision.features(source, chosen, cameras)
    places = _weighted(parts[0], parts[1])
    score = similarity(*places)
    episode = np.searchsorted([span.stop for span in prior.episodes], frames[0], side="right")
    means = np.bincount(episode, score, prior.n_episodes) / np.maximum(
        np.bincount(episode, minlength=prior.n_episodes), 1
    )
    order = np.argsort(-means, kind="stable")[: settings.n]
    order = order[means[order] >= settings.min_score]
    if not len(order):
        raise problem(f"no episode with a score of {settings.min_score} (the best has {means.max():.3f})", "at least one",
                      "lower --min-score")  # fmt: skip
    return Retrieved([int(k) for k in order], [float(means[k]) for k in order])


def similarity(prior: np.ndarray, target: np.ndarray) -> np.ndarray:
    """float64 (N,): minus the distance of each row of `prior` (N, F) to the nearest of `target` (M, F), scaled to 0..1."""
    nearest = np.empty(len(prior))
    squares = (target**2).sum(1)
    for start in range(0, len(prior), BLOCK):
        block = prior[start : start + BLOCK]
        distance = (block**2).sum(1)[:, None] + squares[None] - 2 * block @ target.T
        nearest[start : start + BLOCK] = np.sqrt(np.maximum(distance.min(1), 0))
    low, high = -nearest.max(), -nearest.min()
    return (-nearest - low) / (high - low) if high > low else np.ones(len(prior))


class Vision:
    """Mean-pooled features of the packaged backbone's vision tower; nothing is downloaded."""

    def __init__(self) -> None:
        from vla.backbone import TINY, load_backbone

        self.backbone = load_backbone(TINY)

    def features(self, source: FrameSource, frames: np.ndarray, cameras: Sequence[str]) -> np.ndarray:
        """float32 (N, cameras * 64)."""
        rows = []
        with Progress(f"embedded frames of {source.name}", len(frames)) as progress:
            for start in range(0, len(frames), BATCH):
                chosen = [int(i) for i in frames[start : start + BATCH]]
                images = [source.images(i, cameras) for i in chosen]
                rows.append(np.concatenate([self._embed([row[c] for row in images]) for c in cameras], axis=1))
                progress.advance(len(chosen))
        return np.concatenate(rows)

    def _embed(self, images: list[np.ndarray]) -> np.ndarray:
        import torch
        from PIL import Image

        inputs = self.backbone.encode([""] * len(images), [[Image.fromarray(image)] for image in images])
        with torch.no_grad():
            grid: Any = self.backbone.model.get_image_features(pixel_values=inputs["pixel_values"]).last_hidden_state
        pooled = grid.flatten(2).mean(2).numpy()  # (B, channels)
        project = np.random.default_rng(0).normal(0, N_FEATURES**-0.5, (pooled.shape[1], N_FEATURES))
        return (pooled @ project).astype(np.float32)


def _check_alike(prior: FrameSource, target: FrameSource) -> None:
    for kind, a, b in (("action", prior.action_dim, target.action_dim), ("state", prior.state_dim, target.state_dim)):
        if a != b:
            raise problem(f"{kind}s of {a} numbers in {prior.where}, of {b} in {target.where}", "the same",
                          "retrieve from data of the same robot")  # fmt: skip
    for source in (prior, target):
        if not source.n_episodes:
            raise problem(f"{source.where} without episodes", "at least one", "choose other data")


def _cameras(prior: FrameSource, target: FrameSource, wanted: Sequence[str]) -> list[str]:
    for camera in wanted:
        prior.check_camera(camera)
        target.check_camera(camera)
    shared = list(wanted) or [camera for camera in prior.cameras if camera in target.cameras]
    if not shared:
        raise problem(f"cameras {', '.join(prior.cameras) or 'none'} and {', '.join(target.cameras) or 'none'}",
                      "one in common", "use --embedding state-action")  # fmt: skip
    return shared


def _spaced(source: FrameSource, n: int) -> np.ndarray:
    """int64: up to `n` frames of each episode."""
    return np.concatenate([
        np.unique(np.linspace(span.start, span.stop - 1, min(n, span.stop - span.start)).astype(np.int64))
        for span in source.episodes
    ])  # fmt: skip


def _numbers(source: FrameSource, frames: np.ndarray) -> dict[str, np.ndarray]:
    states = source.states()
    return {"actions": source.actions()[frames]} | ({} if states is None else {"states": states[frames]})


def _weighted(prior: dict[str, np.ndarray], target: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Each part standardised over both and divided by the root of its width; side by side."""
    columns = []
    for name in prior:
        both = np.concatenate([prior[name], target[name]]).astype(np.float64)
        if not np.isfinite(both).all():
            raise problem(
                f"{name} that are not finite", "finite numbers", "run `vla data check` and `vla data filter` first"
            )
        std = both.std(0)
        columns.append((both - both.mean(0)) / np.where(std > 1e-9, std, 1.0) / np.sqrt(both.shape[1]))
    places, n = np.concatenate(columns, axis=1), len(prior["actions"])
    return places[:n], places[n:]
