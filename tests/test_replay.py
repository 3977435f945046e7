"""Replay: raw it must reproduce the recording, with 256 bins nearly so, and with 4 bins it must fail."""

from __future__ import annotations

import dataclasses
import json
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from episodes import WRITER, make_episode

from vla import cli
from vla.eval.replay import ReplayPolicy, TokenPath, replay
from vla.finetune import collect
from vla.finetune.data.statistics import dataset_statistics, write_statistics
from vla.finetune.formats.lerobot_reader import LeRobotReader
from vla.finetune.formats.lerobot_writer import LeRobotWriter
from vla.normalize import ActionNormalizer, gripper_to_robot
from vla.replay_program import Settings, chosen_episodes, run
from vla.rollout import run_episodes
from vla.spec import ActionSpec, BackboneSpec, ImageSpec, PolicySpec, PromptSpec, TokenSpec, to_json
from vla.testing import FakeSuite
from vla.tokenizers.chunk_codec import ActionCodec
from vla.tokenizers.placement import Placement
from vla.tokenizers.uniform import UniformTokenizer
from vla.types import Episode, Observation, Step, VlaError


@pytest.fixture(scope="module")
def demos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("replay") / "demos"
    collect.run(collect.Settings(out, suite="fake", episodes_per_task=8), FakeSuite())
    return out


def codec(bins: int, horizon: int, dim: int) -> ActionCodec:
    return ActionCodec(UniformTokenizer(bins), Placement.added(100, bins, model_vocab_size=100 + bins), horizon, dim)


def episode(actions: np.ndarray, seed: int | None = 0, task: str | None = "reach-near") -> Episode:
    seen = Observation({}, None, "go")
    return Episode([Step(seen, action) for action in actions], "go", "toy", True, seed, task)


def write_policy(folder: Path, reader: LeRobotReader, bins: int, names: tuple[str, ...] = ("dx", "dy")) -> None:
    """Only what replay reads."""
    placement = Placement.tail(32000, bins, model_vocab_size=32064)
    spec = PolicySpec("p", BackboneSpec("tiny"), ActionSpec(names, 3), ImageSpec(("front",), 32), PromptSpec(),
                      TokenSpec("uniform", bins, placement.save()), "demos")  # fmt: skip
    (folder / "action_tokenizer").mkdir(parents=True)
    UniformTokenizer(bins).save(folder / "action_tokenizer")
    (folder / "policy.json").write_text(json.dumps(to_json(spec)))
    write_statistics(folder / "dataset_statistics.json", {"demos": dataset_statistics(reader)})


def test_raw_replay_reproduces_the_recording(demos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = run(Settings(demos, suite="fake", raw=True, workers=0))
    assert result is not None and result.mode == "replay/raw" and result.tasks == ("reach-near", "reach-far")
    for task in (None, *result.tasks):
        tally = result.tally(task)
        assert tally["successes"] == tally["recorded"] == tally["episodes"] == tally["trials"]
    assert [row.n_steps for row in result.episodes] == [row.recorded_steps for row in result.episodes]
    assert result.reconstruction == {"l1": [0.0, 0.0], "max": [0.0, 0.0], "clipped": [0.0, 0.0]}
    out = capsys.readouterr().out
    assert "replay/raw on fake" in out and "16/16" in out


def test_the_measure_measures(demos: Path, tmp_path: Path) -> None:
    """Fine tokens lose nothing that matters; four bins do."""
    fine = run(Settings(demos, suite="fake", workers=0, out=tmp_path / "r/replay.json"))
    coarse = run(Settings(demos, suite="fake", workers=0, bins=4))
    assert fine is not None and coarse is not None
    assert fine.tally()["successes"] >= 15 and coarse.tally()["successes"] <= 8
    assert max(fine.reconstruction["l1"]) < 0.001 < 0.01 < min(coarse.reconstruction["l1"])
    saved = json.loads((tmp_path / "r/replay.json").read_text())
    assert saved["schema"] == "vla-replay/1" and saved["versions"] == {"fake": "1"}
    assert saved["all"]["episodes"] == 16 and saved["tasks"]["reach-far"]["recorded"] == 8
    assert saved["settings"]["bins"] == 256 and len(saved["episodes"]) == 16
    low, high = saved["all"]["wilson_95"]
    assert low < saved["all"]["successes"] / 16 <= high == 1.0 or high < 1.0


def test_workers_and_chunk_length_change_nothing(demos: Path) -> None:
    results = [
        run(Settings(demos, suite="fake", horizon=h, workers=w, slots=2, episodes=3)) for h, w in ((1, 0), (5, 2))
    ]
    assert results[0] == results[1] and results[0] is not None and len(results[0].episodes) == 6


def test_a_policys_codec_and_statistics(demos: Path, tmp_path: Path) -> None:
    reader = LeRobotReader(demos)
    write_policy(tmp_path / "fine", reader, 256)
    write_policy(tmp_path / "coarse", reader, 4)
    base = Settings(demos, suite="fake", workers=0)
    own, fine, coarse = (
        run(dataclasses.replace(base, policy=p)) for p in (None, tmp_path / "fine", tmp_path / "coarse")
    )
    assert own is not None and fine is not None and coarse is not None
    assert fine.episodes == own.episodes and fine.reconstruction == own.reconstruction
    assert coarse.tally()["successes"] < fine.tally()["successes"]
    write_policy(tmp_path / "other", reader, 256, names=("dx", "dz"))
    with pytest.raises(VlaError, match="a policy of actions dx, dz; expected dx, dy, as in the data"):
        run(dataclasses.replace(base, policy=tmp_path / "other"))
    with pytest.raises(VlaError, match="unnorm_key 'nobody'; expected one of: demos"):
        run(dataclasses.replace(base, policy=tmp_path / "fine", unnorm_key="nobody"))


def test_the_path_of_an_action() -> None:
    """normalise, encode, decode, unnormalise, by hand; the gripper stays un-normalised."""
    bounds = ActionNormalizer(np.array([-0.2, 0.0]), np.array([0.2, 1.0]), np.array([True, False]))
    path = TokenPath(codec(3, 2, 2), bounds)  # edges -1, 0, 1; centres -0.5, 0.5
    actions = np.array([[-0.2, -1.0], [0.01, 1.0], [9.0, 1.0]], np.float32)
    np.testing.assert_allclose(path(actions), [[-0.1, -0.5], [0.1, 0.5], [0.1, 0.5]], atol=1e-7)
    np.testing.assert_allclose(path.clipped(actions), [1 / 3, 0.0])


def test_the_robots_own_gripper_convention() -> None:
    """Data with a 0..1 gripper, a robot that wants -1 or +1, inverted: turned after the tokens, and not an error of theirs."""
    bounds = ActionNormalizer(np.array([-1.0, 0.0]), np.array([1.0, 1.0]), np.array([True, False]))
    path = TokenPath(codec(256, 2, 2), bounds, lambda a: gripper_to_robot(a, 1, "unit", 0.5, True))
    policy = ReplayPolicy([episode(np.array([[0.5, 0.0], [0.5, 1.0], [0.5, 1.0]], np.float32))], path, gripper_dim=1)
    assert policy.executed[0][:, 1].tolist() == [1, -1, -1] and policy.reconstruction()["max"][1] < 0.004
    after = policy.act([Observation({}, None, "go", (0, 2))])[0].actions
    assert after.tolist() == [[0, -1], [0, -1]]


def test_chunks_and_what_follows_the_recording() -> None:
    actions = np.arange(10, dtype=np.float32).reshape(5, 2) + 1
    policy = ReplayPolicy([episode(actions), episode(actions[:1] * 9)], None, horizon=3, gripper_dim=1)

    def ask(*key: int) -> list[list[float]]:
        return policy.act([Observation({}, None, "go", key)])[0].actions.tolist()

    assert ask(0, 0) == actions[:3].tolist()
    assert ask(0, 1) == [[7, 8], [9, 10], [0, 10]], "then still, the gripper as it was"
    assert ask(0, 7) == [[0, 10]] * 3
    assert ask(1, 0) == [[9, 18], [0, 18], [0, 18]]
    absolute = ReplayPolicy([episode(actions)], None, horizon=3, delta=False)
    assert absolute.act([Observation({}, None, "go", (0, 9))])[0].actions.tolist() == [[9, 10]] * 3
    assert policy.metadata == {
        "name": "replay/raw",
        "horizon": 3,
        "action_dim": 2,
        "control_hz": 0.0,
        "reads_images": False,
    }
    assert [(r.task, r.seed, r.key) for r in policy.requests()] == [("reach-near", 0, (0,)), ("reach-near", 0, (1,))]


@pytest.mark.parametrize("key", [(), (0,), (2, 0), (0, -1), (1, 2, 3)])
def test_a_query_of_no_recording(key: tuple[int, ...]) -> None:
    policy = ReplayPolicy([episode(np.zeros((2, 2), np.float32))] * 2, None)
    with pytest.raises(
        VlaError, match=r"expected \(episode 0..1, query\); fix: run the requests of ReplayPolicy.requests"
    ):
        policy.act([Observation({}, None, "go", key)])


def test_bad_input(demos: Path, tmp_path: Path) -> None:
    zeros = np.zeros((2, 2), np.float32)
    with pytest.raises(VlaError, match="episode 1 with seed None, task reach-near and 2 steps"):
        ReplayPolicy([episode(zeros), episode(zeros, seed=None)], None)
    with pytest.raises(VlaError, match="episode 0 with seed 0, task None"):
        ReplayPolicy([episode(zeros, task=None)], None)
    with pytest.raises(VlaError, match="0 episodes with action sizes"):
        ReplayPolicy([], None)
    wide = TokenPath(codec(8, 2, 3), ActionNormalizer(np.zeros(3), np.ones(3), np.ones(3, bool)))
    with pytest.raises(VlaError, match=r"action sizes \[2, 3\]"):
        ReplayPolicy([episode(zeros)], wide)
    with pytest.raises(VlaError, match="recorded actions of size 3; expected 2: dx, dy"):
        replay(ReplayPolicy([episode(np.zeros((2, 3), np.float32))], None), FakeSuite())
    with pytest.raises(VlaError, match="--raw and --policy"):
        Settings(demos, raw=True, policy=tmp_path)
    with pytest.raises(VlaError, match="task jump; expected one of reach-near, reach-far, the tasks of"):
        run(Settings(demos, suite="fake", tasks=("jump",)))
    with pytest.raises(VlaError, match="gripper 'hand'; expected one of dx, dy"):
        run(Settings(demos, suite="fake", gripper="hand"))
    with pytest.raises(VlaError, match=r"data at 10 Hz; expected 20 Hz"):
        run(Settings(demos, suite="fake"), FakeSuite(control_hz=20.0))
    with LeRobotWriter(tmp_path / "foreign", **WRITER) as writer:
        writer.add_episode(dataclasses.replace(make_episode(0), task=None))
    with pytest.raises(VlaError, match="without a task name"):
        run(Settings(tmp_path / "foreign", suite="fake"))


def test_an_unfinished_replay_is_a_failure(demos: Path) -> None:
    """Holding still does not win: a recording cut before its success fails."""
    whole = chosen_episodes(LeRobotReader(demos), ("reach-far",), None)
    cut = [dataclasses.replace(e, steps=e.steps[:-1]) for e in whole if len(e) > 2]
    policy = ReplayPolicy(cut, None, horizon=4)
    results = list(run_episodes(policy, FakeSuite(), policy.requests(), n_workers=0))
    assert cut and [r.success for r in results] == [False] * len(cut)
    assert {r.n_steps for r in results} == {FakeSuite().max_steps}


def test_dry_run_and_the_command_line(demos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["eval", "replay", "--data", str(demos), "--suite", "fake", "--episodes", "2", "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert (
        "would replay 4 episodes of 2 tasks (reach-near, reach-far) as replay/tokens" in out and "mean |error|" in out
    )
    assert cli.main(["eval", "replay", "--data", str(demos), "--suite", "metaworld"]) == 2
    assert "task 'reach-near'" in capsys.readouterr().err


def test_metaworld(tmp_path: Path) -> None:
    """Real physics: bit-equal raw, won through 256 bins, lost with 4."""
    if find_spec("metaworld") is None:
        pytest.skip("needs the [metaworld] extra")
    from vla.eval.metaworld_suite import MetaWorldSuite

    suite = MetaWorldSuite(("button-press",), image_size_px=32)
    try:
        suite.make("button-press").reset(seed=0)
    except Exception as error:  # no off-screen GL on this machine
        pytest.skip(f"cannot render: {error}")
    collect.run(collect.Settings(tmp_path / "d", episodes_per_task=3), suite)
    raw = run(Settings(tmp_path / "d", raw=True, workers=0), suite)
    fine, coarse = (run(Settings(tmp_path / "d", bins=bins, workers=0), suite) for bins in (256, 4))
    assert raw is not None and fine is not None and coarse is not None
    assert raw.tally()["successes"] == 3 and [r.n_steps for r in raw.episodes] == [
        r.recorded_steps for r in raw.episodes
    ]
    assert fine.tally()["successes"] >= 2 > coarse.tally()["successes"]
