from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from episodes import WRITER, assert_same_episode, make_episode
from test_lerobot_reader import tree_hash

from vla.finetune.collect import Settings, run
from vla.finetune.formats.lerobot_reader import LeRobotReader
from vla.finetune.formats.lerobot_writer import LeRobotWriter
from vla.types import ActionChunk, Observation, Task, problem


class PlankEnv:
    """A point on a line. The task is won at 1; with an odd seed the floor is too slippery to get there."""

    def __init__(self, task: Task) -> None:
        self.task, self.render_frames = task, True
        self.place, self.seed, self.n_steps = 0.0, 0, 0

    def reset(self, *, seed, options=None):
        self.place, self.seed, self.n_steps = float(np.random.default_rng(seed).uniform(0, 0.4)), seed, 0
        return self.observation(), {"success": False}

    def step(self, action):
        self.n_steps += 1
        slip = 0.1 if self.seed % 2 and self.task.name == "slip" else 1.0
        self.place += slip * float(np.clip(action[0], -0.3, 0.3))
        success = self.place >= 1
        return self.observation(), float(success), success, self.n_steps >= self.task.max_steps, {"success": success}

    def close(self):
        self.place = float("nan")

    def observation(self):
        image = np.full((8, 8, 3), int(200 * min(max(self.place, 0), 1)), np.uint8)
        place = np.array([self.place], np.float32)
        return Observation({"front": image}, place, self.task.instruction, privileged=np.array([self.place, 1.0]))


class PlankExpert:
    metadata = {"name": "plank expert", "horizon": 1, "action_dim": 2}

    def act(self, observations):
        return [
            ActionChunk(np.array([[o.privileged[1] - o.privileged[0] + 0.05, 0.0]], np.float32)) for o in observations
        ]

    def reset(self):
        pass


@dataclass(frozen=True)
class PlankSuite:
    """See `vla.types.Suite`. Worker processes import it from this module."""

    name: str = "plank"
    cameras: tuple[str, ...] = ("front",)
    image_size_px: int = 8
    control_hz: float = 10.0
    frames_upside_down: bool = False
    default_slots: int = 4
    action_names: tuple[str, ...] = ("dx", "nothing")
    state_names: tuple[str, ...] = ("x",)
    tasks: tuple[Task, ...] = (Task("walk", "walk to the end", 12), Task("slip", "walk carefully", 12))
    simulator: str = "1.0"

    def make(self, task):
        return PlankEnv({t.name: t for t in self.tasks}[task])

    def expert(self, task):
        if task == "none":
            raise problem(task, "walk or slip", "choose another")
        return PlankExpert()

    def versions(self):
        return {"plank": self.simulator}


def collect(out: Path, **changes) -> LeRobotReader:
    settings: dict[str, Any] = {"episodes_per_task": 3, **changes}
    run(Settings(out, **settings), PlankSuite())
    return LeRobotReader(out)


def test_successes_of_every_task(tmp_path, capsys):
    reader = collect(tmp_path / "d")
    found = [(reader.task_of(i), reader.seed_of(i), reader.success_of(i)) for i in range(reader.n_episodes)]
    assert found == [("walk", 0, True), ("walk", 1, True), ("walk", 2, True),
                     ("slip", 0, True), ("slip", 2, True), ("slip", 4, True)]  # fmt: skip
    assert reader.tasks == {0: "walk to the end", 1: "walk carefully"}
    assert reader.name == "d" and reader.fps == 10 and reader.action_names == ("dx", "nothing")
    out = capsys.readouterr()
    assert "6 new episodes, 6 in all" in out.out and "2 failed attempts dropped" in out.out
    assert "demonstrations: 6/6" in out.err
    saved = json.loads((tmp_path / "d/collect.json").read_text())
    assert saved["settings"]["episodes_per_task"] == 3 and saved["shaping"]["versions"] == {"plank": "1.0"}
    for i in range(reader.n_episodes):  # the recorded seed and actions lead to the recorded states
        episode = reader.episode(i)
        env = PlankSuite().make(episode.task)
        observation, _ = env.reset(seed=episode.seed)
        for step in episode.steps:
            np.testing.assert_array_equal(observation.images["front"], step.observation.images["front"])
            np.testing.assert_array_equal(observation.state, step.observation.state)
            observation, *_ = env.step(step.action)
        assert env.place >= 1


def test_two_processes_write_the_same_dataset(tmp_path):
    one, two = collect(tmp_path / "one"), collect(tmp_path / "two", processes=2)
    for path in (p for p in (tmp_path / "one").rglob("*") if p.is_file() and p.name != "collect.json"):
        assert (tmp_path / "two" / path.relative_to(tmp_path / "one")).read_bytes() == path.read_bytes()
    assert one.n_episodes == two.n_episodes


def test_stopping_and_starting_again(tmp_path, monkeypatch):
    """An interrupted collection, started again, holds what an uninterrupted one holds; finished work is not redone."""
    whole = collect(tmp_path / "whole")
    add, n_calls = LeRobotWriter.add_episode, 0

    def interrupted(self, episode):
        nonlocal n_calls
        n_calls += 1
        if n_calls == 5:
            raise KeyboardInterrupt
        return add(self, episode)

    monkeypatch.setattr(LeRobotWriter, "add_episode", interrupted)
    with pytest.raises(KeyboardInterrupt):
        collect(tmp_path / "cut")
    assert LeRobotReader(tmp_path / "cut").n_episodes == 4
    result = run(Settings(tmp_path / "cut", episodes_per_task=3), PlankSuite())
    assert (result.n_new, result.n_episodes, n_calls) == (2, 6, 7)
    again = LeRobotReader(tmp_path / "cut")
    for i in range(6):
        assert_same_episode(again.episode(i), dataclasses.replace(whole.episode(i), dataset="cut"))
    before = tree_hash(tmp_path / "cut")
    assert run(Settings(tmp_path / "cut", episodes_per_task=3), PlankSuite()).n_new == 0
    assert tree_hash(tmp_path / "cut") == before
    more = run(Settings(tmp_path / "cut", episodes_per_task=4), PlankSuite())
    assert (more.n_new, more.n_episodes) == (2, 8)


def test_noise_moves_the_states_but_labels_stay_the_experts(tmp_path):
    clean, noisy = collect(tmp_path / "clean"), collect(tmp_path / "noisy", noise_std=0.05)
    states, labels = noisy.states(), noisy.actions()
    assert states is not None
    np.testing.assert_allclose(labels[:, 0], 1.0 - states[:, 0] + 0.05, atol=1e-6)
    assert (labels[:, 1] == 0).all()
    assert states.tobytes() != np.asarray(clean.states()).tobytes()
    again = collect(tmp_path / "again", noise_std=0.05)
    np.testing.assert_array_equal(again.states(), states)


def test_dry_run_writes_nothing(tmp_path, capsys):
    run(Settings(tmp_path / "d", dry_run=True), PlankSuite())
    assert not (tmp_path / "d").exists() and "slip: walk carefully" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "suite", "message"),
    [
        ({"tasks": ("jump",)}, PlankSuite(), "task jump; expected tasks of plank: walk, slip"),
        ({"noise_std": 0.1}, PlankSuite(), "noise_std 0.1; expected 0.0, as the collection"),
        ({"first_seed": 5}, PlankSuite(), "first_seed 5; expected 0"),
        ({"image_mode": "video"}, PlankSuite(), "image_mode 'video'; expected 'image'"),
        ({}, PlankSuite(simulator="2.0"), r"versions \{'plank': '2.0'\}; expected \{'plank': '1.0'\}"),
    ],
)
def test_other_settings_change_nothing(tmp_path, changes, suite, message):
    collect(tmp_path / "d", episodes_per_task=1)
    before = tree_hash(tmp_path / "d")
    with pytest.raises(Exception, match=message):
        run(Settings(tmp_path / "d", **({"episodes_per_task": 3} | changes)), suite)
    assert tree_hash(tmp_path / "d") == before


def test_foreign_folders_are_not_touched(tmp_path):
    (tmp_path / "d").mkdir()
    (tmp_path / "d/thesis.tex").write_text("x")
    with pytest.raises(Exception, match="is not empty; expected a new folder, or a collection to continue"):
        collect(tmp_path / "d")
    with LeRobotWriter(tmp_path / "e", **WRITER) as writer:
        writer.add_episode(make_episode(0))
    before = tree_hash(tmp_path / "e")
    with pytest.raises(Exception, match="is not empty"):
        collect(tmp_path / "e")
    assert [p.name for p in (tmp_path / "d").iterdir()] == ["thesis.tex"] and tree_hash(tmp_path / "e") == before


def test_experts_that_fail(tmp_path):
    with pytest.raises(Exception, match=r"1 successful demonstrations of slip in 2 attempts; expected 2"):
        collect(tmp_path / "d", tasks=("slip",), episodes_per_task=2, max_attempts_per_episode=1)
    suite = PlankSuite(tasks=(Task("none", "do nothing", 3),))
    with pytest.raises(Exception, match="none"):
        run(Settings(tmp_path / "e"), suite)
    assert not (tmp_path / "e").exists()


@pytest.mark.parametrize("bad", [{"episodes_per_task": 0}, {"processes": 0}, {"noise_std": -1.0}])
def test_bad_settings(tmp_path, bad):
    with pytest.raises(Exception, match=next(iter(bad))):
        Settings(tmp_path, **bad)


def test_metaworld(tmp_path):
    """One real demonstration, with frames."""
    if find_spec("metaworld") is None:  # importing it before the suite does would choose an on-screen GL
        pytest.skip("needs the [metaworld] extra")
    from vla.eval.metaworld_suite import MetaWorldSuite

    suite = MetaWorldSuite(task_names=("drawer-close",), image_size_px=64)
    try:
        suite.make("drawer-close").reset(seed=0)
    except Exception as error:  # no off-screen GL on this machine
        pytest.skip(f"cannot render: {error}")
    run(Settings(tmp_path / "m", episodes_per_task=1), suite)
    episode = LeRobotReader(tmp_path / "m").episode(0)
    assert episode.success and episode.instruction == "close the drawer" and 5 < len(episode) < 120
    first = episode.steps[0].observation.images["corner2"]
    assert first.shape == (64, 64, 3) and first.std() > 10
    state = episode.steps[0].observation.state
    assert state is not None and state.shape == episode.steps[0].action.shape == (4,)
