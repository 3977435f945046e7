"""`vla finetune --protocol`: what a LIBERO protocol decides about a new policy."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from training import sft_settings

from vla.finetune.sft_setup import image_path
from vla.libero_protocol import OFT, disagreements, get_protocol
from vla.spec import ActionSpec
from vla.types import VlaError

CAMERAS = ("agentview", "wrist")
ACTION = ActionSpec(("dx", "dy", "dz", "rx", "ry", "rz", "gripper"), 8, gripper_dim=6)


@pytest.mark.parametrize("name", ["openvla", "oft", "openpi", "lerobot"])
@pytest.mark.parametrize("turned", [False, True])
def test_the_policy_agrees_with_the_protocol(name: str, turned: bool, tmp_path: Path) -> None:
    settings = sft_settings(tmp_path, protocol=name, frames_turned=turned, image_size_px=0)
    image = image_path(settings, CAMERAS)
    assert disagreements(get_protocol(name), ACTION, image, frames_turned=turned) == {}
    assert image.rotation_deg == (0 if turned else 180)


def test_random_crops_bring_the_centre_crop(tmp_path: Path) -> None:
    plain = sft_settings(tmp_path, protocol="oft", image_size_px=0)
    assert image_path(plain, CAMERAS).crop_area == 1.0
    augmented = image_path(replace(plain, augment=True), CAMERAS)
    assert (augmented.crop_area, augmented.crop_order, augmented.jpeg_quality) == (
        0.9,
        "after_resize",
        OFT.jpeg_quality,
    )
    with pytest.raises(VlaError, match="--augment with protocol openpi; expected a protocol with a centre crop"):
        image_path(replace(plain, augment=True, protocol="openpi"), CAMERAS)


def test_contradictions_are_refused(tmp_path: Path) -> None:
    plain = sft_settings(tmp_path, protocol="oft", rotation_deg=180)
    assert image_path(plain, CAMERAS).size_px == 32  # said outright
    with pytest.raises(VlaError, match="rotation_deg 180 with protocol oft; expected 0, as the protocol has"):
        image_path(replace(plain, frames_turned=True), CAMERAS)
    with pytest.raises(VlaError, match="crop_area 0.5 with protocol oft"):
        image_path(replace(plain, crop_area=0.5), CAMERAS)
    with pytest.raises(VlaError, match="protocol 'ofd'.*did you mean 'oft'"):
        image_path(replace(plain, protocol="ofd"), CAMERAS)
    with pytest.raises(VlaError, match="--frames-turned without --protocol"):
        sft_settings(tmp_path, frames_turned=True)
