"""Augmentation against TensorFlow.

tests/golden/augment.npz was made with TensorFlow 2.21 on a 24 x 24 picture of gradients, noise, greys, black, white and
pure red: float32 / 255, then `tf.image.crop_and_resize` of a box of side sqrt(0.9), `adjust_brightness`,
`adjust_contrast`, `adjust_saturation`, `adjust_hue`, each alone and all in that order, clipped to [0, 1] after each,
`tf.cast(255 x, uint8)`, for six sets of parameters (the last two are the ends of their ranges). `wide` is its upper left
16 x 21.
"""

import time
from pathlib import Path

import numpy as np
import pytest

from vla.finetune.data import augment as module
from vla.finetune.data.augment import Augmentation, augment, augment_observation, draw_augmentations, uncropped
from vla.inputs import prepare_image
from vla.resample import crop_and_resize
from vla.spec import ImageSpec
from vla.types import Observation, VlaError

GOLDEN = np.load(Path(__file__).parent / "golden" / "augment.npz")
PARAMETERS = [Augmentation(*row) for row in GOLDEN["parameters"].tolist()]
ALONE = {
    "crop": lambda x, by: module.random_crop(x, by.top, by.left),
    "brightness": lambda x, by: module.adjust_brightness(x, by.brightness),
    "contrast": lambda x, by: module.adjust_contrast(x, by.contrast, x.mean((1, 2), keepdims=True)),
    "saturation": lambda x, by: module.adjust_saturation_and_hue(x, by.saturation, 0.0),
    "hue": lambda x, by: module.adjust_saturation_and_hue(x, 1.0, by.hue),
}


def difference(mine: np.ndarray, theirs: np.ndarray) -> np.ndarray:
    return np.abs(mine.astype(int) - theirs.astype(int))


@pytest.mark.parametrize("name", ALONE)
def test_each_operation_is_tensorflows(name):
    for by, expected in zip(PARAMETERS, GOLDEN[name], strict=True):
        mine = module.to_bytes(ALONE[name](module.unit_planes(GOLDEN["image"]), by))
        off = difference(mine, expected)
        # Saturation and hue leave most bytes as they were, where a last bit decides which byte is truncated to.
        assert off.max() <= 1 and (off > 0).mean() < (0.2 if name in ("saturation", "hue") else 0.01)


@pytest.mark.parametrize(("image", "chain"), [("image", "chain"), ("wide", "wide_chain")])
def test_all_five_in_order(image, chain):
    for by, expected in zip(PARAMETERS, GOLDEN[chain], strict=True):
        mine = augment(GOLDEN[image], by)
        assert mine.dtype == np.uint8 and mine.shape == GOLDEN[image].shape and mine.flags["C_CONTIGUOUS"]
        off = difference(mine, expected)
        assert off.max() <= 1 and (off > 0).mean() < 0.01


def test_nothing_to_do_changes_nothing_and_the_input_is_left_alone():
    image = np.random.default_rng(0).integers(0, 256, (30, 20, 3), dtype=np.uint8)
    before = image.copy()
    planes = module.adjust_saturation_and_hue(module.unit_planes(image), 1.0, 0.0)
    assert difference(module.to_bytes(planes), image).max() <= 1
    augment(image, PARAMETERS[0])
    np.testing.assert_array_equal(image, before)
    centre = (1 - 0.9**0.5) / 2
    cropped = module.to_bytes(module.random_crop(module.unit_planes(image), centre, centre))
    assert difference(cropped, crop_and_resize(image, 0.9, 30, 20)).max() <= 1  # what the policy sees when it acts


def test_draws_depend_on_seed_and_position_alone():
    rows = np.array([[vars(a)[k] for k in vars(a)] for p in range(300) for a in draw_augmentations(7, p, 2)])
    assert draw_augmentations(7, 3, 2) == draw_augmentations(7, 3, 2)
    assert draw_augmentations(7, 3, 2)[:1] == draw_augmentations(7, 3, 1)
    assert len(np.unique(rows[:, 0])) == 600 and draw_augmentations(8, 3, 1) != draw_augmentations(7, 3, 1)
    room = 1 - 0.9**0.5
    low, high = np.array([0, 0, -0.2, 0.8, 0.8, -0.05]), np.array([room, room, 0.2, 1.2, 1.2, 0.05])
    assert (rows >= low).all() and (rows <= high).all()
    share = (rows - low) / (high - low)
    np.testing.assert_allclose(share.mean(0), 0.5, atol=0.06)
    assert np.abs(np.corrcoef(share.T) - np.eye(6)).max() < 0.15  # independent, unlike dlimp's


def test_an_observation_is_prepared_once():
    spec = ImageSpec(("a", "b"), 16, rotation_deg=90, crop_area=0.9)
    rng = np.random.default_rng(1)
    images = {name: rng.integers(0, 256, (24, 32, 3), dtype=np.uint8) for name in ("a", "b", "unused")}
    seen = augment_observation(Observation(images, None, "go"), spec, 5, 9)
    assert list(seen.images) == ["a", "b"] and seen.instruction == "go"
    whole = ImageSpec(("a", "b"), 16, rotation_deg=90)
    for camera, by in zip(("a", "b"), draw_augmentations(5, 9, 2), strict=True):
        expected = augment(np.asarray(prepare_image(images[camera], whole)), by)
        np.testing.assert_array_equal(seen.images[camera], expected)
        np.testing.assert_array_equal(np.asarray(prepare_image(seen.images[camera], uncropped(spec))), expected)


def test_bad_images():
    for bad in (np.zeros((4, 4, 3), np.float32), np.zeros((4, 4), np.uint8), np.zeros((4, 4, 4), np.uint8)):
        with pytest.raises(VlaError, match=r"expected uint8 \(height, width, 3\)"):
            augment(bad, PARAMETERS[0])


def test_it_is_fast_enough():
    image = np.random.default_rng(0).integers(0, 256, (224, 224, 3), dtype=np.uint8)
    times = []
    for by in PARAMETERS * 2:
        start = time.process_time()
        augment(image, by)
        times.append(time.process_time() - start)
    assert min(times) < 0.1
