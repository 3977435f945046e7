"""The protocols against values computed by the toolkits' own code (tests/golden/libero_protocol)."""

import dataclasses
import hashlib
import json
from pathlib import Path

import numpy as np
import pytest

from vla.inputs import prepare_image
from vla.jpeg import jpeg_round_trip
from vla.libero_protocol import (
    LEROBOT,
    OFT,
    OPENPI,
    OPENVLA,
    PROTOCOLS,
    STATE_NAMES,
    action_fields,
    disagreements,
    get_protocol,
    gripper_to_env,
    image_spec,
    max_steps,
    protocol_settings,
    quat_to_axis_angle,
    robot_state,
)
from vla.normalize import gripper_to_robot
from vla.resample import resize_lanczos3
from vla.spec import ActionSpec, ImageSpec
from vla.types import VlaError

GOLDEN = Path(__file__).parent / "golden" / "libero_protocol"
IMAGES = dict(np.load(GOLDEN / "images.npz"))
NUMBERS = dict(np.load(GOLDEN / "numbers.npz"))
RECORD = json.loads((GOLDEN / "record.json").read_text())
ACTION_NAMES = ("x", "y", "z", "rx", "ry", "rz", "gripper")


def digest(image) -> str:
    return hashlib.sha256(np.ascontiguousarray(image).tobytes()).hexdigest()


def assert_same_pixels(mine, theirs):
    difference = np.abs(np.asarray(mine).astype(int) - theirs.astype(int))
    assert difference.shape == theirs.shape
    assert (difference.max(), difference.mean()) == (0, 0.0)


def test_openvla_image_path_is_theirs_to_the_bit():
    spec = image_spec(OPENVLA, ("agentview",))
    assert_same_pixels(prepare_image(IMAGES["raw"], spec), IMAGES["openvla"])
    uncropped = prepare_image(IMAGES["raw"], image_spec(OPENVLA, ("agentview",), random_crops=False))
    assert digest(uncropped) == RECORD["sha256"]["openvla_uncropped"]


@pytest.mark.parametrize(
    ("name", "change"),
    [("mirrored", lambda raw: raw[:, ::-1]), ("negative", lambda raw: 255 - raw), ("swapped", lambda raw: raw[..., ::-1])],
)  # fmt: skip
def test_openvla_image_path_on_other_frames(name, change):
    image = prepare_image(change(IMAGES["raw"]), image_spec(OPENVLA, ("agentview",)))
    assert digest(image) == RECORD["sha256"][f"openvla_{name}"]


def test_oft_image_path_is_theirs_to_the_bit():
    assert digest(prepare_image(IMAGES["raw"], image_spec(OFT, ("agentview",)))) == RECORD["sha256"]["oft"]


def test_openpi_image_path_is_theirs_to_the_bit():
    spec = image_spec(OPENPI, ("agentview",))
    assert digest(prepare_image(IMAGES["raw"], spec)) == RECORD["sha256"]["openpi"]
    small = dataclasses.replace(spec, size_px=40, rotation_deg=0)
    assert_same_pixels(prepare_image(IMAGES["noise"], small), IMAGES["noise_padded"])
    assert not np.asarray(prepare_image(IMAGES["noise"], small))[:4].any()  # 48 x 61 leaves a border above and below


def test_lerobot_only_turns_the_frame():
    frame = np.random.default_rng(0).integers(0, 256, (360, 360, 3), dtype=np.uint8)
    assert_same_pixels(prepare_image(frame, image_spec(LEROBOT, ("agentview",))), frame[::-1, ::-1])
    turned = image_spec(LEROBOT, ("agentview",), frames_turned=True)
    assert_same_pixels(prepare_image(frame, turned), frame)


def test_jpeg_round_trip_of_a_frame_with_odd_sides_is_tensorflows():
    assert_same_pixels(jpeg_round_trip(IMAGES["noise"], 95), IMAGES["noise_jpeg"])


def test_lanczos_is_tensorflows_shrinking_and_enlarging():
    for name in ("noise_resized", "noise_enlarged"):
        height, width = IMAGES[name].shape[:2]
        assert_same_pixels(resize_lanczos3(IMAGES["noise_jpeg"], height, width), IMAGES[name])


def test_pillow_alone_would_not_do():
    """Why simplejpeg and a resampler of our own are needed: the same recipe with Pillow differs by more than a rounding."""
    import io

    from PIL import Image

    stored = io.BytesIO()
    Image.fromarray(IMAGES["noise"]).save(stored, "JPEG", quality=95)
    pillow = np.asarray(Image.open(stored)).astype(int)
    assert np.abs(pillow - IMAGES["noise_jpeg"]).max() > 3
    resized = Image.fromarray(IMAGES["noise_jpeg"]).resize((52, 40), Image.Resampling.LANCZOS)
    assert np.abs(np.asarray(resized).astype(int) - IMAGES["noise_resized"]).max() > 3


@pytest.mark.parametrize("name", ["openvla", "oft", "openpi"])
def test_axis_angle_is_theirs_to_the_bit(name):
    mine = np.stack([quat_to_axis_angle(quat) for quat in NUMBERS["quats"]])
    assert np.array_equal(mine, NUMBERS[f"axis_angle_{name}"])


def test_axis_angle_is_lerobots_but_for_its_float32():
    mine = np.stack([quat_to_axis_angle(quat) for quat in NUMBERS["quats"][:50]])  # without the near-zero rotations
    np.testing.assert_allclose(mine, np.load(GOLDEN / "lerobot.npz")["axis_angle"][:50], atol=5e-6)


def test_axis_angle_keeps_both_signs_of_a_quaternion_apart_unless_told():
    quat = np.array([0.6, 0.0, 0.0, -0.8])
    before = quat.copy()
    assert np.linalg.norm(quat_to_axis_angle(quat)) > np.pi
    assert not np.allclose(quat_to_axis_angle(quat), quat_to_axis_angle(-quat))
    assert np.array_equal(quat_to_axis_angle(quat, normalise_antipode=True), quat_to_axis_angle(-quat))
    assert np.array_equal(quat, before)  # theirs clips w in place


def test_the_simulators_own_copy_agrees():
    libero_sim = pytest.importorskip("vla.eval.libero_sim")
    for quat in NUMBERS["quats"]:
        np.testing.assert_allclose(libero_sim.axis_angle_of(quat), quat_to_axis_angle(quat), rtol=1e-15, atol=0)


def test_robot_state():
    state = robot_state(np.array([1.0, 2, 3]), np.array([1.0, 0, 0, 0]), np.array([0.04, -0.04]), OPENVLA)
    assert state.tolist() == [1, 2, 3, np.pi, 0, 0, 0.04, -0.04]
    assert len(STATE_NAMES) == len(state)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", ["openvla", "oft"])
def test_gripper_is_theirs_to_the_bit(name, dtype):
    actions = NUMBERS["unit"].astype(dtype)
    mine = gripper_to_env(actions, get_protocol(name))
    assert mine.dtype == dtype and np.array_equal(mine, NUMBERS[f"gripper_{name}_{dtype}"])
    smooth = gripper_to_robot(actions, 6, "unit")
    assert np.array_equal(smooth, NUMBERS[f"gripper_{name}_continuous_{dtype}"])
    assert np.array_equal(actions, NUMBERS["unit"].astype(dtype))  # a copy was changed
    assert mine[0, 6] == 1 and mine[1, 6] == 0 and mine[2, 6] == -1  # 0 closes, 0.5 is nothing, 1 opens


@pytest.mark.parametrize("protocol", [OPENPI, LEROBOT])
def test_signed_grippers_pass_unchanged(protocol):
    assert np.array_equal(gripper_to_env(NUMBERS["unit"], protocol), NUMBERS["unit"])


def test_gripper_of_an_undecodable_chunk_stays_nan():
    assert np.isnan(gripper_to_env(np.full((2, 7), np.nan, np.float32), OPENVLA)).all()


@pytest.mark.parametrize("name", list(PROTOCOLS))
def test_constants_are_those_in_their_files(name):
    protocol, theirs = PROTOCOLS[name], dict(RECORD["constants"][name])
    limits = theirs.pop("max_steps")
    assert {suite: max_steps(protocol, suite) for suite in limits} == limits
    assert tuple(theirs.pop("dummy_action")) == protocol.dummy_action
    assert int(theirs.pop("env_seed")) == protocol.env_seed
    assert {field: getattr(protocol, field) for field in theirs} == theirs
    assert protocol.source.split("@")[1] == RECORD["commits"][name][:8]


def test_protocol_settings():
    assert protocol_settings("oft", "libero_10") == {
        "episodes_per_task": 50,
        "n_execute": 8,
        "suite_options": {
            "settle_steps": 10,
            "max_steps": 520,
            "image_size_px": 256,
            "env_seed": 0,
            "env_seed_step": 0,
        },
    }
    lerobot = protocol_settings("lerobot", "libero_spatial")["suite_options"]
    assert (lerobot["max_steps"], lerobot["env_seed"], lerobot["env_seed_step"]) == (280, 1000, 1)
    openpi = protocol_settings("openpi", "libero_spatial")["suite_options"]
    assert (openpi["env_seed"], openpi["env_seed_step"]) == (7, 0)
    assert max_steps(OPENVLA, "libero_goal_swap") == 300
    with pytest.raises(VlaError, match="protocol 'opnvla'.*did you mean 'openvla'"):
        protocol_settings("opnvla", "libero_10")
    with pytest.raises(VlaError, match="suite 'metaworld' with protocol 'openvla'"):
        protocol_settings("openvla", "metaworld")


@pytest.mark.parametrize("protocol", list(PROTOCOLS.values()))
def test_a_policy_written_with_a_protocol_agrees_with_it(protocol):
    image = image_spec(protocol, ("agentview", "wrist"))
    action = ActionSpec(ACTION_NAMES, 8, **action_fields(protocol))
    assert disagreements(protocol, action, image) == {}


def test_disagreements_are_named_with_both_values():
    image = dataclasses.replace(image_spec(OPENVLA, ("agentview",)), rotation_deg=0, jpeg_quality=None)
    action = ActionSpec(ACTION_NAMES, 1, delta=False, gripper_dim=6, gripper_range="unit", gripper_threshold=0.5)
    assert disagreements(OPENVLA, action, image) == {
        "image.rotation_deg": (0, 180), "image.jpeg_quality": (None, 95), "action.gripper_invert": (False, True),
        "action.delta": (False, True),
    }  # fmt: skip
    turned = dataclasses.replace(image, jpeg_quality=95)
    assert "image.rotation_deg" not in disagreements(OPENVLA, action, turned, frames_turned=True)
    uncropped = image_spec(OPENVLA, ("agentview",), random_crops=False)
    assert not any(name.startswith("image") for name in disagreements(OPENVLA, action, uncropped))


def test_a_gripper_learned_with_liberos_own_signs_is_not_turned():
    image = image_spec(OFT, ("agentview",))
    own = ActionSpec(ACTION_NAMES, 8, gripper_dim=6)
    assert disagreements(OFT, own, image) == {}
    turned = dataclasses.replace(own, gripper_invert=True)
    assert disagreements(OFT, turned, image) == {"action.gripper_invert": (True, False)}
    unit = dataclasses.replace(own, gripper_range="unit")
    assert disagreements(OPENPI, unit, image_spec(OPENPI, ("agentview",))) == {"action.gripper_invert": (False, True)}


def test_old_image_specs_do_what_they_did():
    """The fields added for these protocols change nothing where they are absent."""
    from PIL import Image

    frame = IMAGES["raw"]
    whole = Image.fromarray(frame).resize((224, 224), Image.Resampling.LANCZOS)
    assert_same_pixels(prepare_image(frame, ImageSpec(("a",), 224)), np.asarray(whole))
    side = 0.9**0.5 * 256
    box = ((256 - side) / 2, (256 - side) / 2, (256 + side) / 2, (256 + side) / 2)
    cropped = Image.fromarray(frame).resize((160, 160), Image.Resampling.LANCZOS, box=box)
    assert_same_pixels(prepare_image(frame, ImageSpec(("a",), 160, crop_area=0.9)), np.asarray(cropped))


def test_lanczos3_can_also_crop_before_it_resizes():
    """Close to Pillow's, which crops by the same box but rounds more often."""
    spec = ImageSpec(("a",), 160, resize_filter="lanczos3", crop_area=0.9)
    pillow = prepare_image(IMAGES["raw"], dataclasses.replace(spec, resize_filter="lanczos"))
    difference = np.abs(np.asarray(prepare_image(IMAGES["raw"], spec)).astype(int) - np.asarray(pillow))
    assert difference.mean() < 0.5
