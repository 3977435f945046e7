"""`vla data filter`."""

from __future__ import annotations

import json

import numpy as np
import pytest
from sources import arm_source, toy_source

from vla.cli import parse
from vla.finetune.data import data_filter
from vla.finetune.data.data_filter import Settings, choose, run
from vla.finetune.data.dataset_lint import idle_frames, state_ranges
from vla.finetune.formats.lerobot_reader import LeRobotReader
from vla.types import VlaError


@pytest.fixture
def source(monkeypatch):
    source = arm_source(6, 30)
    source.success = [True, False, True, None, True, True]
    source.instructions[4] = "Open the drawer"
    monkeypatch.setattr(data_filter, "open_source", lambda text: source)
    return source


def kept(source, **rules):
    return choose(source, Settings("x", out="y", **rules)).kept  # type: ignore[arg-type]


def test_rules(source):
    assert kept(source) == [0, 1, 2, 3, 4, 5]
    assert kept(source, success_only=True) == [0, 2, 4, 5]
    assert kept(source, instruction="open.*drawer") == [4]
    assert kept(source, drop=(0, 5)) == [1, 2, 3, 4]
    assert kept(source, max_frames=29) == [] and kept(source, min_frames=30) == [0, 1, 2, 3, 4, 5]
    lengths = toy_source(5, 4)
    assert kept(lengths, min_frames=5, max_frames=7) == [1, 2, 3]
    dropped = choose(source, Settings("x", "y", success_only=True)).dropped  # type: ignore[arg-type]
    assert dropped == {1: "failed", 3: "success not known"}


def test_noops_and_idle_frames_are_cut_out(source, tmp_path, capsys):
    source._actions[5:9, :6] = 0
    rows = slice(60, 90)
    source._actions[rows][10:14], source._states[rows][10:14] = source._actions[rows][9], source._states[rows][9]
    idle = idle_frames(source, 2, state_ranges(source))
    assert idle.sum() == 4
    source.success = None
    chosen = run(Settings("x", tmp_path / "out", drop_noops=True, drop_idle=True))
    assert "6 of 6 episodes, 172 of 180 frames kept" in capsys.readouterr().out
    assert sorted(chosen.keep) == [0, 2]
    reader = LeRobotReader(tmp_path / "out")
    frames = np.setdiff1d(np.arange(180), np.r_[5:9, 60 + np.flatnonzero(idle)])
    np.testing.assert_array_equal(reader.actions(), source.actions()[frames])
    np.testing.assert_array_equal(reader.images(9)["front"], source.images(13)["front"])


def test_a_list_and_the_findings_of_check(source, tmp_path):
    findings = {"findings": [{"check": "idle", "episodes": [2], "text": "stands still"},
                             {"check": "leaks", "episodes": [0, 5], "text": "is elsewhere too"}]}  # fmt: skip
    (tmp_path / "found.json").write_text(json.dumps(findings))
    run(Settings("x", tmp_path / "a.json", drop_found=tmp_path / "found.json"))
    value = json.loads((tmp_path / "a.json").read_text())
    assert value["kept"] == [1, 3, 4] and value["source"] == "memory/arrays"
    assert value["dropped"] == {
        "0": "leaks: is elsewhere too",
        "2": "idle: stands still",
        "5": "leaks: is elsewhere too",
    }
    assert kept(source, drop_found=tmp_path / "found.json", checks=("idle",)) == [0, 1, 3, 4, 5]
    with pytest.raises(VlaError, match="a.json, which exists"):
        run(Settings("x", tmp_path / "a.json"))


def test_success_that_is_known_is_written(source, tmp_path):
    run(Settings("x", tmp_path / "out", success_only=True))
    reader = LeRobotReader(tmp_path / "out")
    assert reader.n_episodes == 4 and reader.success_of(0) is True
    run(Settings("x", tmp_path / "dry", dry_run=True))
    assert not (tmp_path / "dry").exists()


def test_rules_that_make_no_sense(source, tmp_path):
    (tmp_path / "bad.json").write_text('{"findings": [{"check": "idle", "episodes": [99], "text": ""}]}')
    (tmp_path / "worse.json").write_text("[]")
    for rules, message in (
        ({"instruction": "("}, r"--instruction '\('"), ({"drop": (9,)}, "episode 9 in --drop; expected 0..5"),
        ({"checks": ("idel",)}, "check 'idel'"), ({"drop_found": tmp_path / "bad.json"}, "about episode 99"),
        ({"drop_found": tmp_path / "worse.json"}, "the output of `vla data check --json`"),
    ):  # fmt: skip
        with pytest.raises(VlaError, match=message):
            kept(source, **rules)
    with pytest.raises(VlaError, match="--drop-noops and actions dx, dy, gripper"):
        kept(toy_source(), drop_noops=True)
    with pytest.raises(VlaError, match="no episode of memory/arrays left"):
        run(Settings("x", tmp_path / "o", max_frames=1))


def test_command_line():
    _, settings = parse(["data", "filter", "data/x", "--success-only", "--drop", "1", "2", "--out", "y.json"])
    assert settings.success_only and settings.drop == (1, 2)
