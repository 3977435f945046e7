"""What datasets that are trained together must agree on."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from sources import ArraySource
from training import sft_settings

from vla.finetune.data.agreement import check_agreement, common_cameras, doubts, gripper_index
from vla.finetune.data.statistics import constant_warnings, dataset_statistics
from vla.finetune.formats.lerobot_reader import LeRobotReader
from vla.finetune.sft_setup import open_datasets
from vla.types import VlaError

FIXTURES = Path(__file__).parent / "fixtures"
ARM = ("dx", "dy", "dz", "rx", "ry", "rz", "gripper")


def arm(low: float = -1.0, high: float = 1.0, names: tuple[str, ...] = ARM, name: str = "arm") -> ArraySource:
    rng = np.random.default_rng(0)
    episodes = [rng.uniform(-1, 1, (6, len(names))).astype(np.float32) for _ in range(3)]
    for episode in episodes:
        episode[:, -1] = rng.uniform(low, high, 6)
    source = ArraySource(episodes, action_names=names)
    source.name = name
    return source


def test_the_gripper_is_found_only_where_it_can_be_one() -> None:
    joints = tuple("abcdef")
    assert gripper_index(-1, [arm()]) == 6 and gripper_index(None, [arm()]) is None
    assert gripper_index(-1, [arm(names=joints)]) == 5
    assert gripper_index(-1, [arm(-2.0, 2.0, joints)]) is None  # joints in radians
    assert gripper_index(-1, [arm(), arm(0.0, 100.0)]) is None  # a gripper in per cent
    first = arm(names=("gripper", *"abc"))
    assert gripper_index(-1, [first]) == 0 and gripper_index(2, [first]) == 2
    with pytest.raises(VlaError, match=r"gripper_dim 9; expected 0\.\.3"):
        gripper_index(9, [first])
    with pytest.raises(
        VlaError, match=r"gripper_dim 6 \('gripper'\) with values up to 9\d.* in 'arm'; expected values in"
    ):
        gripper_index(6, [arm(0.0, 100.0)])


def test_joints_are_all_normalised(tmp_path: Path) -> None:
    """The last of six joints is no gripper, although no dimension is called so."""
    reader = LeRobotReader(FIXTURES / "lerobot_v21_image")
    assert np.abs(reader.actions()[:, -1]).max() > 1
    settings = sft_settings(tmp_path, data=(str(reader.root),), gripper_dim=-1, holdout_episodes=1, cache_images=False)
    _, statistics = open_datasets(settings)
    assert statistics["lerobot_v21_image"]["action"]["mask"] == [True] * 6


def test_cameras_that_all_have_are_taken() -> None:
    one, two, three = arm(), arm(), arm()
    one.cameras, two.cameras, three.cameras = ("primary", "secondary", "wrist"), ("wrist", "primary"), ("front",)
    assert common_cameras([one]) == one.cameras and common_cameras([one, two]) == ("primary", "wrist")
    with pytest.raises(
        VlaError, match=r"arm: front\); .* fix: say which ones belong together: --cameras NAME=KEY\|KEY"
    ):
        common_cameras([one, three])


def test_other_sizes_are_refused_and_other_meanings_told() -> None:
    one, other = arm(), arm(0.0, 1.0, name="other")
    assert doubts([one, arm()], 6, True) == []
    one.gripper, other.gripper = "1 closes", "1 opens"
    told = doubts([one, other], 6, True)
    assert told[0].startswith("the gripper of other runs over 0..1, that of arm over -1..1")
    assert told[1] == "the gripper of other means '1 opens', that of arm '1 closes'"
    other.state_names = ("joint",)
    assert doubts([one, other], 6, True)[0].startswith("the state of other (joint) is called otherwise")
    assert not any("state" in line for line in doubts([one, other], 6, False))
    with pytest.raises(VlaError, match="state dimensions in 'other'.*pass --no-state"):
        check_agreement([one, other], True)
    with pytest.raises(VlaError, match="arm with 4 action dimensions; expected 7, as arm has"):
        check_agreement([one, arm(names=tuple("abcd"))], False)


def test_a_dimension_without_spread_between_the_quantiles_is_told() -> None:
    episodes = [np.zeros((200, 2), np.float32)]
    episodes[0][:, 0] = np.linspace(-1, 1, 200)
    episodes[0][7, 1] = 0.5
    source = ArraySource(episodes, action_names=("a", "b"))
    (line,) = constant_warnings({"d": dataset_statistics(source)})
    assert line.startswith("d: action dimensions 1 have q01 = q99 but other values too")


def test_keyboard_and_mouse_train_on_recorded_numbers(tmp_path: Path) -> None:
    from vla.tokenizers.keyboard_mouse import KeyboardMouseTokenizer

    tokenizer = KeyboardMouseTokenizer()
    rng = np.random.default_rng(0)
    names = tuple(f"group_{i}" for i in range(9)) + ("pitch_deg", "yaw_deg")
    chunk = np.zeros((20, 11), np.float32)
    chunk[:, 9:] = rng.uniform(-8, 8, (20, 2))
    assert tokenizer.encode(chunk[None]).shape[0] == 1
    settings = sft_settings(tmp_path, data=("x",), tokenizer="keyboard_mouse")
    source = ArraySource([chunk, chunk], action_names=names)

    import vla.finetune.sft_setup as setup

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(setup, "open_sources", lambda *a: ([source], None))
        _, statistics = setup.open_datasets(replace(settings, holdout_episodes=0, cache_images=False))
    assert statistics[source.name]["action"]["mask"] == [False] * 11
