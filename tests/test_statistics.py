from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from episodes import WRITER, make_episode

from vla.finetune.lerobot_reader import LeRobotReader
from vla.finetune.lerobot_writer import LeRobotWriter
from vla.finetune.statistics import (
    FILE,
    action_mask,
    dataset_statistics,
    read_statistics,
    vector_statistics,
    write_statistics,
)
from vla.normalize import action_normalizer
from vla.types import VlaError

GOLDEN = Path(__file__).parent / "fixtures/lerobot_v3_image"


def test_exact_quantiles_of_all_rows_never_the_stored_ones():
    reader = LeRobotReader(GOLDEN)
    entry = dataset_statistics(reader)
    actions = reader.actions().astype(np.float64)
    for name, value in (("q01", np.quantile(actions, 0.01, axis=0)), ("q99", np.quantile(actions, 0.99, axis=0)),
                        ("mean", actions.mean(0)), ("std", actions.std(0)), ("min", actions.min(0)),
                        ("max", actions.max(0))):  # fmt: skip
        np.testing.assert_array_equal(entry["action"][name], value)
    stored = json.loads((GOLDEN / "meta/stats.json").read_text())["action"]["q01"]
    assert np.abs(np.array(stored) - entry["action"]["q01"]).max() > 0.05
    assert entry["action"]["mask"] == [True] * 6 + [False]
    assert list(entry) == ["action", "proprio", "num_transitions", "num_trajectories"]
    assert (entry["num_transitions"], entry["num_trajectories"]) == (39, 3)
    assert set(entry["proprio"]) == {"mean", "std", "max", "min", "q01", "q99"} and len(entry["proprio"]["mean"]) == 8


def test_some_episodes_only():
    reader = LeRobotReader(GOLDEN)
    entry = dataset_statistics(reader, episodes=[0, 2])
    rows = np.concatenate([reader.actions()[:12], reader.actions()[25:]])
    np.testing.assert_array_equal(entry["action"]["max"], rows.max(0).astype(np.float64))
    assert (entry["num_transitions"], entry["num_trajectories"]) == (26, 2)
    with pytest.raises(VlaError, match="without rows"):
        dataset_statistics(reader, episodes=[])


def test_mask():
    names = ("dx", "gripper", "dz")
    assert action_mask(names) == [True, False, True]
    assert action_mask(("dx", "dy")) == [True, True]
    assert action_mask(names, None) == [True, True, True]
    assert action_mask(names, 2) == [True, True, False]
    with pytest.raises(VlaError, match=r"gripper_dim 3; expected 0\.\.2"):
        action_mask(names, 3)


def test_round_trip_feeds_the_normaliser(tmp_path):
    value = {"toy": dataset_statistics(LeRobotReader(GOLDEN))}
    write_statistics(tmp_path / FILE, value)
    assert read_statistics(tmp_path) == read_statistics(tmp_path / FILE) == value
    normalizer = action_normalizer(read_statistics(tmp_path), None, 7)
    actions = LeRobotReader(GOLDEN).actions()
    inside = ((actions >= normalizer.q01) & (actions <= normalizer.q99)) | ~normalizer.mask
    back = normalizer.unnormalize(normalizer.normalize(actions))
    np.testing.assert_allclose(back[inside], actions[inside], atol=1e-6)


def test_nan_is_named(tmp_path):
    with pytest.raises(VlaError, match=r"action of d: nan at frame 1, dimension 0; expected finite"):
        vector_statistics(np.array([[0.0], [np.nan]]), "action of d")


def test_statistics_of_a_dataset_without_state(tmp_path):
    with LeRobotWriter(tmp_path / "a", **dict(WRITER, state_names=())) as writer:
        writer.add_episode(dataclasses.replace(make_episode(0)))
    assert "proprio" not in dataset_statistics(LeRobotReader(tmp_path / "a"))


GOOD = {"mean": [0.0], "std": [1.0], "max": [1.0], "min": [-1.0], "q01": [-1.0], "q99": [1.0]}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, r"no .*dataset_statistics.json; expected .*fix: make them with `vla data stats`"),
        ("{", "dataset_statistics.json: .*expected JSON"),
        ("{}", "without datasets"),
        (json.dumps({"d": {"num_transitions": 1}}), r"no d.action"),
        (json.dumps({"d": {"action": {k: v for k, v in GOOD.items() if k != "q99"}}}), "d.action without q99"),
        (json.dumps({"d": {"action": GOOD | {"q01": [1.0, 2.0]}}}), "d.action: .*lists of numbers, all of one length"),
        (json.dumps({"d": {"action": GOOD | {"q01": ["x"]}}}), "d.action"),
        (json.dumps({"d": {"action": GOOD | {"q01": [float("nan")]}}}), "d.action .* with 1 values not finite"),
        (json.dumps({"d": {"action": GOOD | {"mask": [True, False]}}}), r"d.action.mask .*expected 1 booleans"),
        (json.dumps({"d": {"action": GOOD, "proprio": 3}}), "d.proprio is 3"),
    ],
)
def test_bad_files(tmp_path, text, message):
    path = tmp_path / FILE
    if text is not None:
        path.write_text(text)
    with pytest.raises(VlaError, match=message):
        read_statistics(path)
    if text is not None and text != "{":
        with pytest.raises(VlaError):
            write_statistics(tmp_path / "other.json", json.loads(text))
        assert not (tmp_path / "other.json").exists()
