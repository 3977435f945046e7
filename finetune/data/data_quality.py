"""Action divergence and transition diversity of a dataset, after "Data Quality in Imitation Learning" (Belkhale, Cui and
Sadigh 2023, arXiv 2306.02437).

The paper ties a policy's drift to two properties of its data: how differently the demonstrators act in the same state
(action divergence: a policy cannot match all of them) and how much follows differently from the same state and action
(transition diversity: system noise, which widens the states seen). Its continuous estimates compare each frame with the
cluster of frames around it; here the cluster is the K nearest frames of other episodes, in standardised numbers, because
an epsilon-ball has no scale that fits every robot:

    action divergence     mean over frames of |a - mean of a' over the K nearest states|^2 / D
    transition diversity  mean over frames of |ds - mean of ds' over the K nearest (state, action)|^2 / S,
                          ds the change of the state to the next frame

With standardised actions 0 means that neighbours agree exactly and about 1 that the state says nothing about the action.
Proprioception alone is compared: where the task hides in the image, divergence is overstated. Compare datasets of one
robot with each other, not with a fixed number.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from vla.finetune.formats.source import FrameSource

NEIGHBOURS = 5
MAX_FRAMES = 4000
"""More are thinned evenly: every pair is compared."""
MIN_FRAMES = 100
MIN_EPISODES = 3
BLOCK = 512


@dataclass(frozen=True)
class Quality:
    """The two measures, and the first of them per episode."""

    action_divergence: float
    transition_diversity: float
    episode_divergence: list[float]
    """Mean over the frames of each episode; NaN if none of its frames was looked at."""
    n_frames: int
    """Frames that were compared."""


def measure_quality(source: FrameSource, neighbours: int = NEIGHBOURS, max_frames: int = MAX_FRAMES) -> Quality | None:
    """None without proprioception, or with fewer than 100 frames or 3 episodes. Frames whose numbers are not finite are
    left out."""
    states = source.states()
    if states is None or source.n_episodes < MIN_EPISODES or len(source) < MIN_FRAMES:
        return None
    ends = np.array([span.stop - 1 for span in source.episodes])
    frames = np.setdiff1d(np.arange(len(source)), ends)  # the last frame has no next one
    if len(frames) > max_frames:
        frames = frames[np.linspace(0, len(frames) - 1, max_frames).astype(np.int64)]
    finite = np.isfinite(states[frames]).all(1) & np.isfinite(states[frames + 1]).all(1)
    frames = frames[finite & np.isfinite(source.actions()[frames]).all(1)]
    episode = np.searchsorted([span.stop for span in source.episodes], frames, side="right")
    s, a, ds = (_standard(x) for x in (states[frames], source.actions()[frames], states[frames + 1] - states[frames]))
    if len(np.unique(episode)) < MIN_EPISODES:
        return None
    divergence = _spread(s, a, episode, neighbours)
    diversity = _spread(np.concatenate([s, a], axis=1), ds, episode, neighbours)
    per_episode = [float(divergence[episode == k].mean()) if (episode == k).any() else float("nan")
                   for k in range(source.n_episodes)]  # fmt: skip
    return Quality(float(divergence.mean()), float(diversity.mean()), per_episode, len(frames))


def _spread(places: np.ndarray, values: np.ndarray, episode: np.ndarray, neighbours: int) -> np.ndarray:
    """float64 (N,): mean square distance of each row of `values` from its neighbours' mean, per dimension."""
    out = np.empty(len(places))
    squares = (places**2).sum(1)
    for start in range(0, len(places), BLOCK):
        block = slice(start, start + BLOCK)
        distance = squares[block, None] + squares[None] - 2 * places[block] @ places.T
        distance[episode[block, None] == episode[None]] = np.inf  # frames of one episode agree with themselves
        nearest = np.argpartition(distance, neighbours - 1, axis=1)[:, :neighbours]
        out[block] = ((values[block] - values[nearest].mean(1)) ** 2).mean(1)
    return out


def _standard(rows: np.ndarray) -> np.ndarray:
    """Mean 0 and deviation 1 per dimension; constant dimensions are left out."""
    exact = rows.astype(np.float64)
    std = exact.std(0)
    return (exact - exact.mean(0))[:, std > 1e-9] / std[std > 1e-9]
