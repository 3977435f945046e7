"""`vla data retrieve`: planted neighbours are found."""

from __future__ import annotations

import json

import numpy as np
import pytest
from sources import ArraySource, toy_source

from vla.finetune.data import data_retrieve
from vla.finetune.data.data_retrieve import Settings, Vision, retrieve, run, similarity
from vla.finetune.formats.lerobot_reader import LeRobotReader
from vla.types import VlaError

NEAR = (2, 5, 7)


class Coloured(ArraySource):
    """Frames of one colour per episode; the numbers are the same everywhere."""

    def __init__(self, colours: list[tuple[int, int, int]]) -> None:
        rows = np.linspace(-1, 1, 42).reshape(6, 7)
        super().__init__([rows] * len(colours), [rows[:, :3]] * len(colours), state_names=("x", "y", "z"),
                         cameras={"front": (32, 32)})  # fmt: skip
        self.colours = colours

    def images(self, i, cameras=None):
        picture = np.full((32, 32, 3), self.colours[self.episode_of(i)], np.uint8)
        picture[4 + i % 6 : 12] = 255
        return {"front": picture}


def line(goal: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    states = np.linspace(0, goal, 20)[:, None] + np.random.default_rng(seed).normal(0, 0.01, (20, 2))
    return np.full((20, 2), goal / 20), states


def numbers(goals: list[float], seed: int) -> ArraySource:
    rows = [line(goal, seed + k) for k, goal in enumerate(goals)]
    return ArraySource([a for a, _ in rows], [s for _, s in rows], action_names=("dx", "dy"), state_names=("x", "y"),
                       success=[True] * len(rows))  # fmt: skip


def test_by_state_and_action():
    prior = numbers([1.0 if k in NEAR else -1.0 for k in range(9)], 0)
    settings = Settings("p", "t", "o", n=3, embedding="state-action")  # type: ignore[arg-type]
    found = retrieve(prior, numbers([1.0], 50), settings)
    assert sorted(found.episodes) == list(NEAR)
    assert found.scores == sorted(found.scores, reverse=True) and 0 <= found.scores[-1] <= found.scores[0] <= 1
    every = retrieve(prior, numbers([1.0], 50), Settings("p", "t", "o", embedding="state-action"))  # type: ignore
    assert sorted(every.episodes[:3]) == list(NEAR) and every.scores[3] < every.scores[2] - 0.1
    few = Settings("p", "t", "o", min_score=0.75, embedding="state-action")  # type: ignore[arg-type]
    assert set(retrieve(prior, numbers([1.0], 50), few).episodes) <= set(NEAR)


def test_by_what_is_seen():
    red, blue = (180, 20, 20), (20, 20, 180)
    prior = Coloured([red if k in NEAR else blue for k in range(9)])
    settings = Settings("p", "t", "o", n=3, frames_per_episode=2)  # type: ignore[arg-type]
    assert sorted(retrieve(prior, Coloured([red]), settings).episodes) == list(NEAR)
    assert not set(retrieve(prior, Coloured([blue]), settings).episodes) & set(NEAR)
    assert Vision().features(prior, np.arange(3), ["front"]).shape == (3, 64)


def test_similarity_is_the_nearest_distance_by_hand():
    prior, target = np.array([[0.0, 0.0], [3.0, 4.0], [6.0, 8.0]]), np.array([[0.0, 0.0], [6.0, 8.0]])
    np.testing.assert_allclose(similarity(prior, target), [1, 0, 1])
    np.testing.assert_allclose(similarity(prior, target[:1]), [1, 0.5, 0])
    np.testing.assert_allclose(similarity(prior[:1], target[:1]), [1])


def test_program_writes_a_list_and_a_subset(tmp_path, monkeypatch, capsys):
    data = {"p": numbers([1.0 if k in NEAR else -1.0 for k in range(9)], 0), "t": numbers([1.0], 50)}
    monkeypatch.setattr(data_retrieve, "open_source", lambda text: data[text])
    settings = Settings("p", "t", tmp_path / "r.json", 3, embedding="state-action", subset=tmp_path / "d")
    run(settings)
    value = json.loads((tmp_path / "r.json").read_text())
    assert sorted(value["kept"]) == list(NEAR) and len(value["scores"]) == 3
    assert "3 of 9 episodes" in capsys.readouterr().out
    reader = LeRobotReader(tmp_path / "d")
    np.testing.assert_array_equal(reader.states()[:20], data["p"].states()[20 * value["kept"][0] :][:20])
    with pytest.raises(VlaError, match="r.json, which exists"):
        run(settings)


def test_data_that_do_not_fit():
    two, three = numbers([1.0], 0), toy_source()
    settings = Settings("p", "t", "o", embedding="state-action")  # type: ignore[arg-type]
    with pytest.raises(VlaError, match="actions of 3 numbers .*, of 2"):
        retrieve(three, two, settings)
    blind = ArraySource(
        [np.zeros((3, 2))], [np.zeros((3, 2))], action_names=("a", "b"), state_names=("x", "y"), cameras={}
    )
    with pytest.raises(
        VlaError, match="cameras front and none; expected one in common; fix: use --embedding state-action"
    ):
        retrieve(two, blind, Settings("p", "t", "o"))  # type: ignore[arg-type]
    with pytest.raises(VlaError, match="no episode with a score of 2.0"):
        retrieve(two, two, Settings("p", "t", "o", min_score=2.0, embedding="state-action"))  # type: ignore[arg-type]
    two._actions[0] = np.nan
    with pytest.raises(VlaError, match="actions that are not finite"):
        retrieve(two, two, settings)
