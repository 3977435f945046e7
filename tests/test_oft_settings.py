"""Settings of OpenVLA-OFT's way of training: the preset, and what contradicts itself, the data or the backbone."""

import dataclasses
import json

import numpy as np
import openvla_tiny as tiny
import pytest
from oft_tiny import write_oft
from sources import ArraySource
from test_oft_train import FRAMES, settings_of
from training import fake_dataset, tiny_backbone

from vla import import_policy
from vla.files import read_jsonl
from vla.finetune import sft
from vla.finetune.data.data_convert import Settings as ConvertSettings
from vla.finetune.data.data_convert import convert
from vla.finetune.data.subset_source import SubsetSource, without_padding
from vla.finetune.sft_presets import PRESETS
from vla.finetune.sft_start import started
from vla.policy import load_policy
from vla.types import Observation, VlaError


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("oft settings")
    fake_dataset(folder)
    tiny.write_checkpoint(folder / "openvla")
    return folder


def test_the_preset(folder, tmp_path):
    """On data with LIBERO's dimensions and two cameras, at a small size."""
    rng = np.random.default_rng(0)
    actions = [np.c_[rng.normal(0, 0.3, (10, 6)), rng.integers(0, 2, (10, 1))] for _ in range(3)]
    cameras = {"image": (48, 64), "wrist_image": (48, 64)}
    source = ArraySource(
        actions, [rng.normal(0, 1, (10, 8)) for _ in actions], action_names=import_policy.NAMES, state_names=tuple("abcdefgh"),
        cameras=cameras,
    )  # fmt: skip
    convert(SubsetSource(source), ConvertSettings("x", "lerobot", tmp_path / "libero"))
    small = {"data": (str(tmp_path / "libero"),), "out": tmp_path / "run", "backbone": str(folder / "openvla"), "lora_r": 4,
             "steps": 2, "batch_size": 2, "decay_at_step": 1, "log_every_steps": 1, "holdout_episodes": 1, "device": "cpu"}  # fmt: skip
    policy = load_policy(sft.run(dataclasses.replace(PRESETS["openvla-oft"], **small)))
    spec = policy.spec
    assert [row["lr"] for row in read_jsonl(tmp_path / "run" / "metrics.jsonl") if "loss" in row] == [5e-4, 5e-5]
    assert spec.image.cameras == ("agentview", "wrist") and (spec.image.crop_area, spec.image.rotation_deg) == (
        0.9,
        180,
    )
    assert (spec.action.gripper_range, spec.action.gripper_invert) == ("unit", True)  # as the protocol `oft` has it
    images = {"agentview": FRAMES[0], "wrist": FRAMES[1]}
    chunk = policy.act([Observation(images, np.zeros(8, np.float32), "push the cup")])[0]
    assert chunk.actions.shape == (8, 7) and set(np.abs(chunk.actions[:, 6])) <= {0.0, 1.0}


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"head": "tokens"}, "proprio True, film False with head 'tokens'"),
        ({"placement": "added"}, "placement 'added' with head 'l1'; expected placement tail"),
        ({"stop_token": True}, "--stop-token with head 'l1'.*fix: pass --no-stop-token, or pass --head tokens"),
        ({"language_motion": True}, "--language-motion with head 'l1'"),
        ({"numbers_as": "tokens", "state": True}, "--numbers-as tokens with head 'l1'"),
        ({"state": True, "state_dropout": 0.5}, "--proprio with --state-dropout"),
        ({"schedule": "step"}, "schedule 'step' with decay_at_step 0"),
        ({"decay_at_step": 5}, "schedule 'cosine' with decay_at_step 5"),
        ({"horizon": 0}, "a count below 1"),
    ],
)
def test_settings_that_contradict(folder, changes, text):
    with pytest.raises(VlaError, match=text):
        settings_of(folder, folder / "no", **changes)


def test_what_the_data_or_the_backbone_cannot_do(folder, tmp_path):
    tiny_backbone(tmp_path)
    with pytest.raises(VlaError, match="parallel decoding with a llava model; expected OpenVLA"):
        sft.run(settings_of(folder, tmp_path / "a", backbone=str(tmp_path / "llava"), placement="tail"))
    with pytest.raises(VlaError, match="camera"):
        sft.run(settings_of(folder, tmp_path / "b", cameras=("front", "wrist")))
    with pytest.raises(VlaError, match="one token per dimension"):
        sft.run(settings_of(folder, tmp_path / "c", head="discrete", tokenizer="fast"))
    assert not any((tmp_path / name).exists() for name in "abc")


def test_padding_of_a_state_is_left_out():
    """OpenVLA's rows give LIBERO's state a `pad`; its OFT has the eight numbers that the simulator sends."""
    source = ArraySource([np.zeros((3, 2))], [np.arange(9).reshape(3, 3)], state_names=("x", "pad", "gripper_0"))
    assert without_padding(source).state_names == ("x", "gripper_0")
    states, kept = source.states(), without_padding(source).states()
    assert states is not None and kept is not None and (kept == states[:, [0, 2]]).all()
    plain = ArraySource([np.zeros((3, 2))])
    assert without_padding(plain) is plain


def test_learning_rate_falls_once():
    settings = PRESETS["openvla-oft"]
    rates = [sft.learning_rate(settings, step) for step in (0, 99_999, 100_000, 149_999)]
    assert rates == pytest.approx([5e-4, 5e-4, 5e-5, 5e-5])
    assert (settings.head, settings.proprio, settings.horizon, len(settings.cameras)) == ("l1", True, 8, 2)
    assert json.loads(json.dumps(dataclasses.asdict(settings), default=str))["schedule"] == "step"


def test_presets_go_on_with_an_imported_policy(tmp_path):
    """A user of a preset cannot drop what it sets: the policy decides, and what contradicts its pictures is said."""
    source = write_oft(tmp_path / "source")
    policy = import_policy.run(import_policy.Settings(str(source), tmp_path / "oft", protocol="oft", dtype="float32"))
    for preset in ("openvla", "openvla-oft"):
        cameras = ("agentview=front", "wrist")
        found = started(dataclasses.replace(PRESETS[preset], data=("x",), from_=str(policy), cameras=cameras))
        assert (found.protocol, found.stop_token, found.head, found.proprio) == ("", False, "l1", True)
        assert (found.crop_area, found.rotation_deg, found.horizon, found.cameras) == (0.9, 180, 8, cameras)
        assert started(found) == found
    turned = dataclasses.replace(PRESETS["openvla-oft"], data=("x",), from_=str(policy), frames_turned=True)
    with pytest.raises(VlaError, match="protocol oft with --from a policy of other pictures.*pass --protocol ''"):
        started(turned)
    with pytest.raises(VlaError, match="tokenizer fast with --from a policy; expected uniform"):
        started(dataclasses.replace(turned, protocol="", frames_turned=False, tokenizer="fast"))
