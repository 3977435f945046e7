"""Each fault is planted in clean data and must be found there, and nowhere else."""

from __future__ import annotations

import numpy as np
import pytest
from sources import ArraySource, arm_source, toy_source

from vla.finetune.data.data_quality import measure_quality
from vla.finetune.data.dataset_check import Finding, check_source
from vla.finetune.data.dataset_lint import CHECKS, Limits, idle_frames, lint, longest_run, state_ranges
from vla.finetune.data.gripper_lint import check_gripper, gripper_dim
from vla.finetune.demonstrate import noops


def found(source: ArraySource, check: str, **options) -> list[Finding]:
    """The findings of one check; no other check may say anything."""
    findings = lint(source, **options).findings
    assert {finding.check for finding in findings} <= {check}, findings
    assert all(finding.fix for finding in findings)
    return findings


def span(source: ArraySource, k: int) -> slice:
    return slice(source.episodes[k].start, source.episodes[k].stop)


def test_clean_data_are_left_alone():
    for seed in range(3):
        assert lint(arm_source(seed=seed)).findings == []
    assert lint(arm_source(), against=arm_source(seed=1)).findings == []
    assert lint(toy_source()).findings == [] == check_source(toy_source())


def test_noops():
    source = arm_source()
    source._actions[span(source, 2)][20:35, :6] = 0
    (finding,) = found(source, "noops")
    assert finding.episodes == (2,) and "1 of 6 episodes with more than 5% no-ops" in finding.text
    assert "episode 2, 25%, longest run 15 frames" in finding.text
    assert noops(source._actions[span(source, 2)]).sum() == 15


def test_idle_frames():
    source = arm_source()
    rows = span(source, 4)
    stop_at_20 = np.r_[0:21, [20] * 34, 21:26]
    source._actions[rows], source._states[rows] = source._actions[rows][stop_at_20], source._states[rows][stop_at_20]
    assert idle_frames(source, 4, state_ranges(source)).sum() == 34
    (finding,) = found(source, "idle")
    assert finding.episodes == (4,) and "longest run 34 frames" in finding.text
    assert longest_run(np.array([1, 1, 0, 1, 1, 1], bool)) == 3 and longest_run(np.zeros(3, bool)) == 0


def test_gripper_turned_in_one_episode():
    source = arm_source(8)
    source._actions[span(source, 3), 6] *= -1
    findings = found(source, "gripper")
    assert [f.level for f in findings] == ["warning", "error"] and all(f.episodes == (3,) for f in findings)
    assert "1 episodes begin with the opposite command of the other 7" in findings[0].text
    assert "answers the command the other way round than in the other 7" in findings[1].text


def test_gripper_values_and_names():
    source = arm_source()
    source._actions[span(source, 1)][10, 6] = 0
    (finding,) = found(source, "gripper")
    assert finding.episodes == (1,) and finding.text == "gripper has two values and, rarely, 0"
    source = arm_source()
    source._actions[:, 6] = 1
    assert "gripper is 1 in every frame" in found(source, "gripper")[0].text
    source = arm_source()
    source._actions[:, 6] *= 100
    assert "gripper goes from -100 to 100, outside -1..1" in found(source, "gripper")[0].text
    assert check_gripper(arm_source(), "high") == []
    (finding,) = check_gripper(arm_source(), "low")
    assert finding.level == "error" and "high commands close it, in 6 of 6 episodes" in finding.text
    plain = ArraySource([np.zeros((3, 7))], action_names=tuple("0123456"))
    assert gripper_dim(plain) == 6
    assert gripper_dim(ArraySource([np.zeros((3, 2))], action_names=("x", "y"))) is None


def test_outliers():
    source = arm_source()
    source._actions[span(source, 5)][7, 1] = 30.0
    (finding,) = [f for f in lint(source).findings if f.check == "outliers"]
    assert finding.episodes == (5,) and "action dy: 1 values far outside" in finding.text
    assert "the furthest is 30 at frame 7 of episode 5" in finding.text
    source = arm_source()
    source._states[span(source, 0)][3, 2] = np.nan  # reported by check_source; here it only must not hide others
    source._states[span(source, 1)][9, 2] = -50
    assert [f.episodes for f in lint(source).findings if f.check == "outliers"] == [(1,)]
    heavy = ArraySource([np.random.default_rng(0).standard_t(4, (500, 7))])
    assert not [f for f in lint(heavy).findings if f.check == "outliers"]


def test_an_episode_at_another_rate():
    source = arm_source(8)
    fast = arm_source(8)
    rows = span(source, 6)
    start = source._states[rows][0, :6]
    source._states[rows, :6] = start + 2 * (fast._states[rows][:, :6] - start)  # twice as far per frame
    (finding,) = found(source, "rate")
    assert finding.episodes == (6,) and "episode 6 2 times as far" in finding.text
    source = arm_source()
    for k in range(source.n_episodes):
        states = source._states[span(source, k)]
        states[1::2] = states[::2][: len(states[1::2])]
    (finding,) = [f for f in lint(source).findings if "changes in every second frame only" in f.text]
    assert len(finding.episodes) == 6 and "recorded at 5 fps" in finding.fix
    assert "does not say its rate" in found(arm_source(fps=0), "rate")[0].text
    assert "1000 fps" in found(arm_source(fps=1000), "rate")[0].text


def test_duplicates():
    source = arm_source()
    for rows in (source._actions, source._states):
        rows[span(source, 4)] = rows[span(source, 1)]
    assert found(source, "duplicates") == []  # same actions, another picture
    source.frame_seeds[source.episodes[4].start] = source.episodes[1].start
    (finding,) = found(source, "duplicates")
    assert finding.text == "episodes 1, 4 are the same: actions and first frame" and finding.episodes == (4,)


def test_instructions():
    source = arm_source()
    source.instructions[2], source.instructions[5] = "  ", "Unknown"
    (finding,) = found(source, "instructions")
    assert finding.level == "error" and finding.episodes == (2, 5)
    source = arm_source()
    source.instructions[3] = "Push the  cup."
    (finding,) = found(source, "instructions")
    assert finding.level == "warning" and finding.episodes == (3,) and "2 spellings" in finding.text


def test_leaks():
    train, test = arm_source(), arm_source(seed=1)
    test._actions[span(test, 0)] = train._actions[span(train, 3)]
    test.seeds = [5000 + k for k in range(6)]
    (finding,) = found(train, "leaks", against=test)
    assert finding.level == "error" and finding.episodes == (3,) and "(same actions): 3 = 0" in finding.text
    test = arm_source(seed=1)
    test.seeds = [2, *range(5000, 5005)]
    (finding,) = found(train, "leaks", against=test)
    assert finding.episodes == (2,) and "same seed of the same task" in finding.text


def test_action_divergence_and_transition_diversity():
    """Both rise when their own noise is added, and hardly with the other's."""
    rng = np.random.default_rng(0)
    clean = arm_source(10)
    base = measure_quality(clean)
    noisy_actions, noisy_steps = arm_source(10), arm_source(10)
    noisy_actions._actions[:, :6] += rng.normal(0, 0.05, (600, 6)).astype(np.float32)
    noisy_steps._states[:, :6] += rng.normal(0, 0.02, (600, 6)).astype(np.float32)
    actions, steps = measure_quality(noisy_actions), measure_quality(noisy_steps)
    assert base and actions and steps
    assert actions.action_divergence > 1.5 * base.action_divergence
    assert steps.transition_diversity > 1.2 * base.transition_diversity
    assert measure_quality(ArraySource([np.zeros((200, 7))])) is None and measure_quality(toy_source()) is None


def test_one_demonstrator_unlike_the_others():
    rng = np.random.default_rng(1)
    position = [np.cumsum(rng.uniform(0.5, 1.0, (80, 2)), 0) for _ in range(8)]
    actions = [np.stack([np.sin(p[:, 0] / 10), np.cos(p[:, 1] / 10)], 1) for p in position]
    actions[5] = -actions[5]
    source = ArraySource(actions, position, action_names=("a", "b"), state_names=("x", "y"))
    (finding,) = [f for f in lint(source).findings if f.check == "quality"]
    assert finding.episodes == (5,)


def test_any_source_is_read_whole():
    source = toy_source()
    source.broken.add(source.episodes[2].start)
    source._actions[3, 1] = np.inf
    assert [f.episodes for f in check_source(source)] == [(0,), (2,)]
    source.broken = {source.episodes[2].start + 1}
    assert len(check_source(source)) == 1 and len(check_source(source, all_frames=True)) == 2


@pytest.mark.parametrize("check", CHECKS)
def test_checks_survive_the_smallest_data(check):
    for source in (ArraySource([np.zeros((1, 7))]), ArraySource([np.zeros((1, 2))], [np.zeros((1, 1))], action_names=("a", "b"),
                                                              state_names=("s",), cameras={})):  # fmt: skip
        assert isinstance(list(CHECKS[check](source, Limits())), list)
