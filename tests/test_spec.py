"""The image and gripper fields of `policy.json`: old files load, contradictions are named, the policy obeys them."""

import copy
import dataclasses
import json

import numpy as np
import pytest
from families import FAMILIES

from vla.model_card import model_card
from vla.new_policy import create_policy
from vla.policy import load_policy
from vla.spec import ActionSpec, ImageSpec, PromptSpec, from_json, to_json
from vla.tokenizers.uniform import UniformTokenizer
from vla.types import Observation, VlaError

STATISTICS = {"toy": {"action": {"q01": [-1.0, 0.0], "q99": [1.0, 1.0], "mask": [True, False]}, "num_transitions": 9}}
ADDED = {
    "action": ("gripper_range", "gripper_threshold", "gripper_invert"),
    "image": ("jpeg_quality", "crop_order", "fit"),
}


def make(folder, **gripper):
    FAMILIES["llava"](folder)
    return create_policy(
        str(folder), name="toy", action=ActionSpec(("x", "gripper"), 3, **gripper), image=ImageSpec(("cam",), 32),
        prompt=PromptSpec(), statistics=STATISTICS, tokenizer=UniformTokenizer(64), lora_r=4,
    )  # fmt: skip


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    return make(tmp_path_factory.mktemp("policy") / "base")


def test_a_file_from_before_these_fields_loads_and_means_the_same(policy):
    value = to_json(policy.spec)
    for part, names in ADDED.items():
        for name in names:
            del value[part][name]
    assert from_json(json.loads(json.dumps(value))) == policy.spec


@pytest.mark.parametrize(
    ("part", "fields", "words"),
    [
        ("action", {"gripper_threshold": 0.5}, "threshold 0.5, invert False without a gripper_dim"),
        ("action", {"gripper_invert": True}, "invert True without a gripper_dim"),
        ("action", {"gripper_range": "unit"}, "range unit.*without a gripper_dim"),
        ("action", {"gripper_dim": 2}, "gripper_dim 2; expected 0..1"),
        ("action", {"gripper_dim": 1, "gripper_range": "unit", "gripper_threshold": -0.2}, "expected 0 < gripper_threshold"),
        ("action", {"gripper_dim": 1, "gripper_threshold": 1.0}, "expected -1 < gripper_threshold < 1"),
        ("action", {"gripper_dim": 1, "gripper_threshold": float("nan")}, "gripper_threshold nan"),
        ("action", {"gripper_range": "percent"}, "'percent'; expected one of signed, unit"),
        ("image", {"cameras": []}, "no cameras"),
        ("image", {"cameras": ["a", "a"]}, "each camera once"),
        ("image", {"size_px": 0}, "size_px 0"),
        ("image", {"crop_area": 0.0}, "crop_area 0"),
        ("image", {"crop_order": "after_resize"}, "which crops nothing"),
        ("image", {"crop_area": 0.9, "fit": "pad"}, "fit 'pad' with crop_area 0.9 before resizing"),
        ("image", {"jpeg_quality": 0}, "jpeg_quality 0; expected 1..100"),
        ("image", {"jpeg_quality": 101}, "jpeg_quality 101; expected 1..100"),
        ("image", {"jpeg_quality": True}, "image.jpeg_quality: True; expected int"),
        ("image", {"resize_filter": "lanczos5"}, "lanczos3"),
    ],
)  # fmt: skip
def test_contradictions_are_named(policy, part, fields, words):
    value = copy.deepcopy(to_json(policy.spec))
    value[part] |= fields
    with pytest.raises(VlaError, match=words):
        from_json(value)


def test_the_policy_answers_with_the_robots_gripper(tmp_path):
    plain = make(tmp_path / "base", gripper_dim=1)
    spec = plain.spec
    rng = np.random.default_rng(0)
    frames = [rng.integers(0, 256, (40, 40, 3), dtype=np.uint8) for _ in range(4)]
    observations = [Observation({"cam": frame}, None, "open the drawer") for frame in frames]
    plain.save(tmp_path / "policy", stage="finetune", settings={})
    changed = to_json(dataclasses.replace(spec, backbone=dataclasses.replace(spec.backbone, weights="adapter")))
    changed["action"] |= {"gripper_range": "unit", "gripper_threshold": 0.5, "gripper_invert": True}
    (tmp_path / "policy" / "policy.json").write_text(json.dumps(changed))
    openvla = load_policy(tmp_path / "policy")
    for mine, theirs in zip(openvla.act(observations), plain.act(observations), strict=True):
        assert np.array_equal(mine.token_ids, theirs.token_ids)  # what the model says stays what it says
        assert np.array_equal(mine.actions[:, 0], theirs.actions[:, 0])
        assert np.array_equal(mine.actions[:, 1], -np.sign(theirs.actions[:, 1] - np.float32(0.5)))
        assert mine.actions.dtype == np.float32 and set(mine.actions[:, 1]) <= {-1.0, 1.0}


def test_the_model_card_tells_the_image_path(policy):
    image = ImageSpec(("a",), 224, "lanczos3", 0.9, 180, 95, "after_resize")
    card = model_card(dataclasses.replace(policy.spec, image=image), STATISTICS)
    assert "| image path | turned 180° → JPEG 95 → lanczos3 to 224 px → centre crop of 0.9 of the area |" in card
    assert "| image path | lanczos to 32 px |" in model_card(policy.spec, STATISTICS)
