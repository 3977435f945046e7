"""Temporal ensembling: ACT's weights, one memory per episode, the same in the engine and by hand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vla.ensemble import ChunkEnsemble, EnsemblePolicy
from vla.eval import run as evaluation
from vla.rollout import run_episodes
from vla.testing import FakeSuite, NoisyPolicy
from vla.types import ActionChunk, EpisodeRequest, Observation, Policy, VlaError


def act_reference(chunks: np.ndarray, m: float) -> np.ndarray:
    """The table of ACT's own evaluation loop (imitate_episodes.py): row t is filled with the chunk made at t, and column t
    averaged over its filled rows, the oldest first. chunks (T, H, D) -> (T, D)."""
    n, horizon, dim = chunks.shape
    table, filled = np.zeros((n, n + horizon, dim)), np.zeros((n, n + horizon), bool)
    done = []
    for t in range(n):
        table[t, t : t + horizon], filled[t, t : t + horizon] = chunks[t], True
        now = table[filled[:, t], t]
        weights = np.exp(-m * np.arange(len(now)))
        done.append((now * (weights / weights.sum())[:, None]).sum(0))
    return np.array(done)


@pytest.mark.parametrize("m", [0.0, 0.01, 0.5, 20.0])
@pytest.mark.parametrize("horizon", [1, 3, 8])
def test_weights_are_acts(m, horizon):
    chunks = np.random.default_rng(0).normal(size=(15, horizon, 7)).astype(np.float32)
    ensemble = ChunkEnsemble(m)
    mine = np.stack([ensemble.next(chunk) for chunk in chunks])
    assert mine.dtype == np.float32
    np.testing.assert_allclose(mine, act_reference(chunks, m), atol=1e-6)


def test_two_chunks_by_hand():
    ensemble = ChunkEnsemble(np.log(2.0))  # the newer of two weighs half of the older
    assert ensemble.next(np.array([[1.0], [4.0]])).tolist() == [1.0]
    assert ensemble.next(np.array([[1.0], [9.0]])).tolist() == [3.0]  # (4 + 1/2) / (1 + 1/2)
    assert ensemble.next(np.array([[0.0], [0.0]])).tolist() == [6.0]  # 9 / 1.5; the first chunk is over


def test_agreeing_chunks_are_executed_as_they_are():
    plan = np.linspace(0, 1, 20, dtype=np.float32)[:, None]
    ensemble = ChunkEnsemble(0.01)
    for t in range(12):
        np.testing.assert_allclose(ensemble.next(plan[t : t + 8]), plan[t], rtol=1e-6)


@dataclass
class Recorder:
    """A noisy policy that remembers every chunk by episode."""

    policy: NoisyPolicy = field(default_factory=lambda: NoisyPolicy(horizon=4))
    chunks: dict[tuple[int, ...], list[np.ndarray]] = field(default_factory=dict)

    @property
    def metadata(self) -> dict[str, Any]:
        return self.policy.metadata

    def act(self, observations: Sequence[Observation]) -> list[ActionChunk]:
        found = self.policy.act(observations)
        for observation, chunk in zip(observations, found, strict=True):
            self.chunks.setdefault(observation.key[:-1], []).append(chunk.actions)
        return found

    def reset(self) -> None:
        pass


class Watched(FakeSuite):
    """Remembers what its environments were told."""

    told: list[tuple[int, np.ndarray]] = []

    def make(self, task: str) -> Any:
        env, told = super().make(task), self.told
        step = env.step

        def watched(action: np.ndarray) -> Any:
            told.append((env.seed, action.copy()))
            return step(action)

        env.step = watched  # type: ignore[method-assign]
        return env


@pytest.mark.parametrize("slots", [1, 5])
def test_each_episode_has_its_own_memory(slots):
    suite, policy = Watched(), Recorder()
    suite.told.clear()
    requests = [EpisodeRequest("reach-far", seed, (seed,)) for seed in range(8)]
    results = list(
        run_episodes(policy, suite, requests, n_workers=0, slots_per_worker=slots, temporal_ensemble=0.3, ordered=True)
    )
    for seed, result in enumerate(results):
        told = np.stack([action for s, action in suite.told if s == seed])
        assert len(told) == result.n_steps == len(policy.chunks[(seed,)])
        np.testing.assert_allclose(told, act_reference(np.stack(policy.chunks[(seed,)]), 0.3), atol=1e-6)


def test_an_episode_that_is_run_again_begins_afresh(tmp_path):
    suite = FakeSuite(passing_faults=(("reach-far", 3, "raise_step"),), passed_in=str(tmp_path))
    requests = [EpisodeRequest("reach-far", seed, (seed,)) for seed in range(6)]

    def results(s: FakeSuite) -> list[tuple[bool, int]]:
        found = run_episodes(NoisyPolicy(horizon=4), s, requests, n_workers=0, temporal_ensemble=0.01, ordered=True)
        return [(result.success, result.n_steps) for result in found]

    assert results(suite) == results(FakeSuite())


def test_by_hand_it_is_the_same_as_in_the_engine():
    suite, seed = FakeSuite(), 5
    policy: Policy = EnsemblePolicy(NoisyPolicy(horizon=4), 0.2)
    assert policy.metadata["horizon"] == 1 and policy.metadata["temporal_ensemble"] == 0.2
    for _ in range(2):  # reset() begins an episode
        policy.reset()
        env = suite.make("reach-far")
        seen, _ = env.reset(seed=seed)
        n_steps, over = 0, False
        while not over:
            chunk = policy.act(
                [Observation(seen.images, seen.state, seen.instruction, (seed, n_steps), seen.privileged)]
            )
            seen, _, success, truncated, _ = env.step(chunk[0].actions[0])
            n_steps, over = n_steps + 1, success or truncated
        requests = [EpisodeRequest("reach-far", seed, (seed,))]
        engine = next(run_episodes(NoisyPolicy(horizon=4), suite, requests, n_workers=0, temporal_ensemble=0.2))
        assert (success, n_steps) == (engine.success, engine.n_steps)


def test_undecodable_chunks_end_the_episode():
    policy = NoisyPolicy(horizon=4, undecodable_keys=((2,),))
    requests = [EpisodeRequest("reach-far", 2, (2,))]
    result = next(run_episodes(policy, FakeSuite(), requests, n_workers=0, temporal_ensemble=0.01))
    assert result.undecodable == 1 and result.n_steps == 1
    by_hand = EnsemblePolicy(policy)
    seen, _ = FakeSuite().make("reach-far").reset(seed=2)
    ask = [Observation(seen.images, seen.state, seen.instruction, (2, 1), seen.privileged)]
    assert not by_hand.act(ask)[0].ok
    with pytest.raises(VlaError, match="a query after an undecodable chunk.*reset"):
        by_hand.act(ask)


def test_bad_use_is_refused():
    for m in (-0.1, float("nan")):
        with pytest.raises(VlaError, match="temporal ensemble .*; expected a number >= 0"):
            ChunkEnsemble(m)
        with pytest.raises(VlaError, match="expected a number >= 0"):
            run_episodes(NoisyPolicy(), FakeSuite(), [], temporal_ensemble=m)
    with pytest.raises(VlaError, match="n_execute=3 with temporal_ensemble; expected 1"):
        run_episodes(NoisyPolicy(), FakeSuite(), [], n_execute=3, temporal_ensemble=0.01)
    seen, _ = FakeSuite().make("reach-far").reset(seed=0)
    with pytest.raises(VlaError, match="2 observations; expected one robot's"):
        EnsemblePolicy(NoisyPolicy()).act([seen, seen])
    ensemble = ChunkEnsemble(0.01)
    ensemble.next(np.zeros((3, 2)))
    with pytest.raises(VlaError, match=r"shape \(4, 2\); expected \(3, 2\)"):
        ensemble.next(np.zeros((4, 2)))


def test_vla_eval_has_it(tmp_path: Path):
    common = {
        "policy": "noisy",
        "suite": "fake",
        "episodes_per_task": 2,
        "workers": 0,
        "videos_per_task": 0,
        "temperature": 1.0,
    }
    settings = evaluation.Settings(**common, temporal_ensemble=0.01, out=tmp_path / "eval")
    result = evaluation.run(settings, policy=NoisyPolicy(horizon=4), suite=FakeSuite())
    assert len(result.rows) == 4
    with pytest.raises(VlaError, match="temporal_ensemble=None for .*temporal_ensemble=0.01"):
        evaluation.run(evaluation.Settings(**common, n_execute=1, out=tmp_path / "eval"), policy=NoisyPolicy(horizon=4),
                       suite=FakeSuite())  # fmt: skip
