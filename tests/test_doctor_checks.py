"""The doctor's checks one by one, on made-up numbers: each fault is planted and must be named."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

from vla.doctor.actions import check_delta, check_double_delta, check_gripper_polarity, check_gripper_threshold
from vla.doctor.evidence import DataView, Predictions
from vla.doctor.finding import Finding
from vla.doctor.images import (
    check_cameras,
    check_crop,
    check_filter,
    check_image_matters,
    check_jpeg,
    check_rotation,
    check_simulator_frames,
)
from vla.doctor.inputs import check_axis_angle, check_instruction_matters, check_state_source, rotation_dims
from vla.doctor.predictions import check_predictions, check_token_accuracy, check_undecodable
from vla.doctor.protocol import check_horizon, check_max_steps, check_replan, check_replay, check_settle_steps
from vla.doctor.statistics import check_dataset_statistics, check_mask, check_statistic_kind, check_unnorm_key
from vla.doctor.weights import check_libraries, check_quantization, check_simulator, check_weights
from vla.spec import ActionSpec, ImageSpec, PromptSpec
from vla.types import Task

B, H, NAMES = 24, 2, ("dx", "dy", "gripper")
ACTION = ActionSpec(NAMES, H, gripper_dim=2)
IMAGE = ImageSpec(("front", "wrist"), 32)
LIBERO_STATE = ("x", "y", "z", "axis_angle_x", "axis_angle_y", "axis_angle_z", "finger_1", "finger_2")


def predictions(**losses: float) -> Predictions:
    """A perfect policy; keyword "rotation_90=0.5" is the mean loss of that variant, the policy's own is 1."""
    rng = np.random.default_rng(0)
    truth = rng.normal(size=(B, H, 3)).astype(np.float32)
    truth[..., 2] = np.sign(truth[..., 2])
    ids, noise = rng.integers(0, 64, (B, H * 3)), rng.normal(0, 0.2, B)
    rows = {"own": 1.0 + noise} | {k.replace("_", " "): v + noise * 1.1 for k, v in losses.items()}
    return Predictions(NAMES, truth, np.ones((B, H), bool), truth.copy(), np.ones(B, bool), ids, ids.copy(), ids.copy(),
                       rows, {"front": 100.0, "wrist": 90.0}, np.ones(ids.shape, bool))  # fmt: skip


def data(actions: np.ndarray, states: np.ndarray | None, names: tuple[str, ...] = (), **more: Any) -> DataView:
    """One dataset of episodes of ten steps."""
    n = len(actions)
    base = dict(name="d", action_names=NAMES, state_names=names, cameras=("front",), fps=10.0, instructions=("go",))
    return DataView(actions=actions, states=states, starts=np.arange(0, n, 10), stops=np.arange(10, n + 10, 10),
                    **{**base, **more})  # fmt: skip


def walk(n: int = 200) -> tuple[np.ndarray, np.ndarray]:
    """(displacements (n, 3), positions (n, 3)) of a random walk; the state moves by half of what is commanded."""
    rng = np.random.default_rng(1)
    moves = rng.normal(0, 0.1, (n, 3))
    return moves.astype(np.float32), (np.cumsum(0.5 * moves, 0) - 0.5 * moves).astype(np.float32)


def expect(finding: Finding, status: str, evidence: str) -> None:
    assert finding.status == status and evidence in finding.evidence, finding
    assert bool(finding.fix) == (status in ("suspect", "wrong"))


def test_meaning_of_actions() -> None:
    moves, positions = walk()
    ungripped = ActionSpec(("a", "b", "c"), 1)
    expect(check_delta(ungripped, data(moves, positions)), "pass", "delta 1.00")
    targets = np.concatenate([positions[1:], positions[-1:]])
    expect(check_delta(ungripped, data(targets, positions)), "wrong", "actions are targets")
    absolute = dataclasses.replace(ungripped, delta=False)
    expect(check_delta(absolute, data(targets, positions)), "pass", "absolute 1.00")
    expect(check_delta(absolute, data(moves, positions)), "wrong", "actions are displacements")
    twice = np.concatenate([np.zeros((1, 3)), np.diff(moves, axis=0)]).astype(np.float32)
    expect(check_double_delta(ungripped, data(twice, positions)), "wrong", "look like: second difference")
    expect(check_double_delta(ungripped, data(moves * 0.1 - positions, positions)), "wrong", "delta minus state")
    expect(check_double_delta(ungripped, data(moves, positions)), "pass", "delta 1.00")
    noise = np.random.default_rng(2).normal(size=positions.shape).astype(np.float32)
    expect(check_delta(ungripped, data(noise, positions)), "not checked", "a state that follows the actions")
    expect(check_delta(ungripped, data(moves, None)), "not checked", "a state in d")


def test_gripper_of_predictions() -> None:
    sound = predictions()
    expect(check_gripper_polarity(ACTION, sound), "pass", "100%")
    flipped = dataclasses.replace(sound, predicted=sound.truth * [1, 1, -1])
    expect(check_gripper_polarity(ACTION, flipped), "wrong", "signs are opposite")
    unsure = dataclasses.replace(sound, predicted=np.where([False, False, True], 0.2 * sound.truth, sound.truth))
    expect(check_gripper_threshold(ACTION, unsure), "suspect", "would change: 0.3")
    zero_one = dataclasses.replace(sound, truth=(sound.truth + [0, 0, 1]) / [1, 1, 2])
    expect(check_gripper_threshold(ACTION, zero_one), "wrong", "in the middle of the range")
    unit = dataclasses.replace(ACTION, gripper_range="unit", gripper_threshold=0.5)
    right = dataclasses.replace(zero_one, predicted=zero_one.truth)
    expect(check_gripper_threshold(unit, right), "pass", "threshold 0.5")
    expect(check_gripper_threshold(unit, sound), "wrong", "outside the range")
    expect(check_gripper_polarity(ActionSpec(("a",), 1), None), "pass", "no gripper")


def test_image_treatments_are_ranked_by_loss() -> None:
    worse = predictions(rotation_90=3.0, rotation_180=3.0, rotation_270=3.0)
    expect(check_rotation(IMAGE, None, worse), "pass", "own 0")
    expect(
        check_rotation(IMAGE, None, predictions(rotation_90=3.0, rotation_180=0.5)), "wrong", "under rotation 180 than"
    )
    expect(check_rotation(IMAGE, None, predictions(rotation_90=1.0)), "suspect", "no worse under rotation 90")
    expect(check_rotation(IMAGE, 180, worse), "wrong", "trained with frames turned by 180")
    expect(check_crop(IMAGE, None, predictions(**{"crop 0.9": 0.7})), "suspect", "better under crop 0.9")
    expect(check_crop(IMAGE, 0.9, None), "wrong", "trained with crop_area 0.9")
    expect(check_crop(IMAGE, 1.0, predictions(**{"crop 0.9": 1.3})), "pass", "crop 0.9 1.")
    expect(check_filter(IMAGE, predictions(**{"filter bicubic": 0.8})), "suspect", "filter bicubic than lanczos")
    expect(check_filter(IMAGE, predictions()), "pass", "nothing is resized")
    expect(check_jpeg(IMAGE, predictions(**{"JPEG 95": 0.8})), "suspect", "with JPEG 95 than with no JPEG")
    stored = dataclasses.replace(IMAGE, jpeg_quality=95)
    finding = check_jpeg(stored, predictions(**{"JPEG none": 0.8}))
    assert finding.status == "suspect" and "jpeg_quality to null" in finding.fix
    swapped = predictions(**{"cameras wrist, front": 0.5})
    expect(check_cameras(IMAGE, ("front", "wrist"), None, swapped), "wrong", "better with cameras wrist, front")
    expect(check_cameras(IMAGE, None, ("front",), None), "wrong", "wrist not among the suite's")


def test_small_or_noisy_differences_of_loss_are_none() -> None:
    base = predictions()
    noise = np.random.default_rng(3).normal(0, 1.0, B)
    rows = {**base.losses, "crop 0.9": base.losses["own"] - 0.1 + noise, "filter box": base.losses["own"] - 0.01}
    noisy = dataclasses.replace(base, losses=rows)
    assert check_crop(IMAGE, None, noisy).status == "pass" and check_filter(IMAGE, noisy).status == "pass"


def test_inputs_that_change_nothing_are_named() -> None:
    base = predictions()
    deaf = dataclasses.replace(base, losses={**base.losses, "other instructions": base.losses["own"].copy()})
    expect(check_instruction_matters(deaf), "wrong", "another instruction changes nothing")
    expect(check_instruction_matters(base), "not checked", "at least two instructions")
    blind = dataclasses.replace(base, losses={**base.losses, "images of other frames": base.losses["own"].copy()})
    expect(check_image_matters(blind), "wrong", "other images change nothing")
    expect(check_image_matters(predictions(images_of_other_frames=1.0)), "suspect", "other images are as good")
    expect(check_image_matters(predictions(images_of_other_frames=2.0)), "pass", "images of other frames")


def test_simulator_and_data_frames() -> None:
    rng = np.random.default_rng(4)
    frame = rng.integers(0, 255, (32, 32, 3), dtype=np.uint8)
    expect(check_simulator_frames([(frame, frame)]), "pass", "upright 0.0")
    expect(check_simulator_frames([(frame[::-1], frame)]), "wrong", "flipped top to bottom")
    expect(check_simulator_frames([(np.rot90(frame), frame)]), "wrong", "turned by 270")
    expect(check_simulator_frames([(frame // 2, frame)]), "suspect", "simulator darker by 6")
    expect(check_simulator_frames([(frame.repeat(2, 0).repeat(2, 1), frame)]), "pass", "upright 0.0")


def test_state_of_another_source() -> None:
    prompt = PromptSpec("{state} {instruction}", state_names=("x", "y"), state_low=(0.0, 0.0), state_high=(1.0, 1.0))
    states = np.random.default_rng(5).uniform(0, 1, (100, 2))
    proprio = {"mean": [0.5, 0.5], "std": [0.29, 0.29]}
    expect(check_state_source(prompt, proprio, ("x", "y"), states, "d"), "pass", "0% of 100")
    expect(check_state_source(prompt, proprio, ("x", "y"), states + [0, 1.5], "d"), "wrong", "d, y: 100% of 100")
    expect(check_state_source(prompt, proprio, ("x", "y"), states + [0.2, 0], "d"), "suspect", "d, x:")
    expect(check_state_source(prompt, proprio, ("y", "x"), states, "d"), "suspect", "the policy reads x, y; d has y, x")
    expect(check_state_source(prompt, proprio, ("x",), states[:, :1], "d"), "wrong", "d has x")
    expect(check_state_source(PromptSpec(), None, None, None, ""), "pass", "not shown")


def rotations(angles: np.ndarray, axis: tuple[float, float, float] = (1.0, 0.0, 0.0)) -> np.ndarray:
    states = np.zeros((len(angles), 8), np.float32)
    states[:, 3:6] = angles[:, None] * np.array(axis)
    return states


def test_antipodes_of_rotations() -> None:
    raw = np.linspace(3.0, 3.4, 100)  # as robosuite gives them: angles beyond pi stay
    normalised = np.where(raw > np.pi, raw - 2 * np.pi, raw)
    proprio = {"min": rotations(raw).min(0).tolist(), "max": rotations(raw).max(0).tolist()}
    actions = np.zeros((100, 3), np.float32)
    expect(
        check_axis_angle(PromptSpec(), proprio, data(actions, rotations(raw), LIBERO_STATE)), "pass", "0 antipode jumps"
    )
    flipped = data(actions, rotations(normalised), LIBERO_STATE)
    expect(check_axis_angle(PromptSpec(), proprio, flipped), "wrong", "the antipode of what the policy saw")
    one = dataclasses.replace(flipped, starts=np.array([0]), stops=np.array([100]))
    expect(check_axis_angle(PromptSpec(), None, one), "suspect", "1 antipode jumps")
    expect(check_axis_angle(PromptSpec(), None, data(actions, actions, ("x", "y", "z"))), "pass", "no rotation")
    assert rotation_dims(("px", "qx", "qy", "qz", "qw")) == ([1, 2, 3, 4], True)
    assert rotation_dims(tuple("01234567")) == ([3, 4, 5], False)


def test_predictions_and_tokens() -> None:
    sound = predictions()
    expect(check_predictions(sound), "pass", "dx 0 (a constant")
    constant = dataclasses.replace(sound, predicted=np.zeros_like(sound.truth))
    finding = check_predictions(constant)
    expect(finding, "wrong", "the same action whatever is seen")
    assert finding.plot is not None
    mirrored = dataclasses.replace(sound, predicted=-sound.truth)
    expect(check_predictions(mirrored), "wrong", "no better than a constant in dx, dy, gripper")
    drifting = dataclasses.replace(sound, free_ids=sound.truth_ids + (np.arange(H * 3) > 0))
    expect(check_token_accuracy(drifting), "wrong", "teacher-forced 100.0%, free-running 16.7%")
    untrained = dataclasses.replace(sound, free_ids=sound.truth_ids + 1, teacher_ids=sound.truth_ids + 1)
    expect(check_token_accuracy(untrained), "suspect", "teacher-forced 0.0%")
    garbled = dataclasses.replace(sound, ok=np.arange(B) > 3)
    expect(check_undecodable(garbled), "wrong", "4 of 24 answers")
    expect(check_undecodable(sound), "pass", "0 of 24")


def test_steps_and_chunks() -> None:
    moves, positions = walk()
    view = data(moves, positions)
    expect(check_horizon(12, None, view), "suspect", "12 actions per chunk; episodes of d have 10")
    expect(check_horizon(8, 8, view), "pass", "8 actions")
    expect(check_replan(4, None, np.array([0.1, 0.15, 0.4, 0.5])), "suspect", "4 of 4 actions")
    assert "--n-execute 2" in check_replan(4, None, np.array([0.1, 0.15, 0.4, 0.5])).fix
    expect(check_replan(4, 2, np.array([0.1, 0.15, 0.4, 0.5])), "pass", "2 of 4")
    tasks = [Task("a", "go", 200)]
    expect(check_max_steps("libero_object", tasks, None), "wrong", "stops after 200 steps (papers: 280)")
    expect(check_max_steps("other", tasks, view), "pass", "demonstrations need up to 10")
    expect(check_settle_steps("libero_goal", 0), "wrong", "0 steps before the first action")
    expect(check_settle_steps("libero_goal", 10), "pass", "10 steps")
    expect(check_settle_steps("libero_goal", None), "not checked", "says how many")
    expect(check_replay(3, 4), "suspect", "3 of 4")
    expect(check_replay(1, 4), "wrong", "1 of 4")
    expect(check_replay(None, 0, "seeds"), "not checked", "needs seeds")


def entry(low: float, high: float, mask: list[bool] | None = None) -> dict[str, Any]:
    n = len(NAMES)
    return {
        "q01": [low] * n,
        "q99": [high] * n,
        "min": [low - 1] * n,
        "max": [high + 1] * n,
        "mask": mask or [True, True, False],
    }


def test_statistics() -> None:
    known = {"a": {"action": entry(-1, 1)}, "b": {"action": entry(-3, 3)}}
    expect(check_unnorm_key(known, "a", "a", known["a"]), "pass", "'a' 0.0%")
    finding = check_unnorm_key(known, "b", "a", known["a"])
    expect(finding, "wrong", "in use: 'b'")
    assert finding.fix.startswith("pass --unnorm-key a")
    expect(check_unnorm_key(known, "a", None, None), "not checked", "there are 2 keys (a, b)")
    expect(
        check_statistic_kind({**entry(-1, 1), "min": [-1] * 3, "max": [1] * 3}, None), "suspect", "equal min and max"
    )
    expect(check_dataset_statistics(entry(-1, 1), entry(-1, 1.1), NAMES), "suspect", "dx, 4.8%")
    expect(check_mask(ACTION, entry(-1, 1, [True] * 3)), "suspect", "nothing changes yet")
    expect(check_mask(ACTION, {**entry(-1, 1), "q01": [1, -1, -1]}), "suspect", "no range in dx")
    rows = np.random.default_rng(6).normal(size=(1000, 3))
    z_score = {**entry(0, 0), "q01": rows.mean(0).tolist(), "q99": rows.std(0).tolist()}
    expect(check_statistic_kind(z_score, rows), "wrong", "hold the data's mean and std")


def test_weights_and_versions() -> None:
    expect(check_weights("base", None), "suspect", "pretrained weights")
    expect(check_weights("merged", None, 0.4), "wrong", "same token in 40.0%")
    expect(check_weights("merged", None, None), "not checked", "at its recorded path")
    expect(check_quantization("bitsandbytes-int8"), "suspect", "bitsandbytes-int8")
    expect(
        check_libraries({"transformers": "5.1", "torch": "2.1"}, {"torch": "2.1"}),
        "wrong",
        "not installed: transformers",
    )
    expect(check_libraries({}, {}), "not checked", "versions in policy.json")
    new, old = {"mujoco": "3.9.0"}, {"mujoco": "3.3.2"}
    expect(check_simulator("libero_goal", old, new), "wrong", "MuJoCo 3.9.0 is newer than 3.3.2")
    expect(check_simulator("libero_goal", {}, new), "suspect", "MuJoCo 3.9.0 is newer than 3.3.2")
    expect(check_simulator("libero_goal", old, old), "pass", "mujoco 3.3.2")
    expect(check_simulator("metaworld", old, new), "suspect", "changed: mujoco 3.3.2 -> 3.9.0")


@pytest.mark.parametrize("check", [check_predictions, check_token_accuracy, check_undecodable, check_image_matters])
def test_without_predictions_nothing_is_claimed(check: Any) -> None:
    expect(check(None), "not checked", "not checked: needs a dataset (--dataset FOLDER)")
