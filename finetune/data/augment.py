"""OpenVLA's image augmentation for training, in numpy.

Its five operations in its order (prismatic/vla/datasets/datasets.py and dlimp's `augment_image`): a crop of 90 % of the
area at a random place, brightness, contrast, saturation, hue; float32 in [0, 1], clipped after each, truncated to bytes
last. The arithmetic is that of `tf.image.crop_and_resize` and `tf.image.adjust_*`; saturation and hue are done in one
step, since a change of saturation keeps hue and value.

One difference: dlimp gives every operation the same seed, so that its six numbers are one number (the crop only moves
along the diagonal, and bright pictures are always of high contrast). Here they are drawn independently.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np

from vla.inputs import prepare_image
from vla.resample import crop_box
from vla.spec import ImageSpec
from vla.types import Observation, problem

CROP_AREA = 0.9
BRIGHTNESS = 0.2
CONTRAST = (0.8, 1.2)
SATURATION = (0.8, 1.2)
HUE = 0.05
_TINY = np.float32(1e-30)
_ROWS = 32  # at a time: what is in between stays in the processor's cache


@dataclass(frozen=True)
class Augmentation:
    """The numbers of one augmentation."""

    top: float
    """Upper edge of the crop, as a share of the height: 0 .. 1 - sqrt(0.9)."""
    left: float
    brightness: float
    """Added to every value."""
    contrast: float
    """Factor of the distance from each channel's mean."""
    saturation: float
    """Factor of the saturation (HSV)."""
    hue: float
    """Added to the hue, in turns."""


def draw_augmentations(seed: int, position: int, n: int) -> list[Augmentation]:
    """`n` augmentations, one per camera, for the sample at this position of the training stream. They depend on nothing
    else, so that workers, ranks and restarts change nothing."""
    draws = np.random.Generator(np.random.Philox(key=[seed, position])).random((n, 6))
    room = 1.0 - CROP_AREA**0.5
    low = np.array([0.0, 0.0, -BRIGHTNESS, CONTRAST[0], SATURATION[0], -HUE])
    high = np.array([room, room, BRIGHTNESS, CONTRAST[1], SATURATION[1], HUE])
    return [Augmentation(*row) for row in (low + (high - low) * draws).tolist()]


def augment(image: np.ndarray, by: Augmentation) -> np.ndarray:
    """uint8 (height, width, 3) RGB -> the same shape and dtype, all five operations."""
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise problem(f"an image of shape {image.shape}, {image.dtype}", "uint8 (height, width, 3)", "give RGB bytes")
    planes = adjust_brightness(random_crop(unit_planes(image), by.top, by.left), by.brightness)
    mean = planes.mean((1, 2), keepdims=True, dtype=np.float64).astype(np.float32)
    out = np.empty_like(image)
    for start in range(0, len(image), _ROWS):
        rows = adjust_contrast(planes[:, start : start + _ROWS], by.contrast, mean)
        out[start : start + _ROWS] = to_bytes(adjust_saturation_and_hue(rows, by.saturation, by.hue))
    return out


def augment_observation(observation: Observation, spec: ImageSpec, seed: int, position: int) -> Observation:
    """The observation as `uncropped(spec)` wants it, augmented: each of the spec's cameras turned, stored as JPEG and
    resized as the spec says, then augmented at that size, as OpenVLA does. The spec's centre crop is left out: it stands
    for the random crop when the policy acts."""
    whole = dataclasses.replace(spec, crop_area=1.0)
    images = {}
    for camera, by in zip(spec.cameras, draw_augmentations(seed, position, len(spec.cameras)), strict=True):
        images[camera] = augment(np.asarray(prepare_image(observation.images[camera], whole)), by)
    return dataclasses.replace(observation, images=images)


def uncropped(spec: ImageSpec) -> ImageSpec:
    """How frames that `augment_observation` has prepared are given to the model: as they are."""
    return dataclasses.replace(spec, rotation_deg=0, jpeg_quality=None, crop_area=1.0, crop_order="before_resize")


def unit_planes(image: np.ndarray) -> np.ndarray:
    """uint8 (height, width, 3) -> float32 (3, height, width) in [0, 1]."""
    return np.ascontiguousarray(image.transpose(2, 0, 1)).astype(np.float32) / np.float32(255.0)


def to_bytes(planes: np.ndarray) -> np.ndarray:
    """float32 (3, height, width) in [0, 1] -> uint8 (height, width, 3), truncated."""
    return np.ascontiguousarray((planes * np.float32(255.0)).astype(np.uint8).transpose(1, 2, 0))


def random_crop(planes: np.ndarray, top: float, left: float) -> np.ndarray:
    """CROP_AREA of the area from this corner on, brought back to the size bilinearly. Planes are float32 (3, h, w)."""
    side, y, x = np.sqrt(np.float32(CROP_AREA)), np.float32(top), np.float32(left)
    height, width = planes.shape[1:]
    rows = crop_box(np.ascontiguousarray(planes.transpose(1, 2, 0)), (y, x, y + side, x + side), height, width)
    return _clipped(np.ascontiguousarray(rows.transpose(2, 0, 1)))


def adjust_brightness(planes: np.ndarray, delta: float) -> np.ndarray:
    return _clipped(planes + np.float32(delta))


def adjust_contrast(planes: np.ndarray, factor: float, mean: np.ndarray) -> np.ndarray:
    """`mean` float32 (3, 1, 1): each channel's, over the whole image."""
    out = planes - mean
    out *= np.float32(factor)
    out += mean
    return _clipped(out)


def _clipped(planes: np.ndarray) -> np.ndarray:
    return np.clip(planes, 0.0, 1.0, out=planes)


def adjust_saturation_and_hue(planes: np.ndarray, factor: float, delta: float) -> np.ndarray:
    """HSV saturation times `factor`, at most 1, then hue plus `delta` turns, |delta| <= 1/6.

    A channel is value - range * clip(t - 1, 0, 1), where t is how far the hue is from the channel's own (red 0, green 2,
    blue 4), in sixths of a turn.
    """
    red, green, blue = planes
    value = np.maximum(np.maximum(red, green), blue)
    span = value - np.minimum(np.minimum(red, green), blue)
    is_red, is_green = red == value, green == value
    ahead = np.where(is_red, green, np.where(is_green, blue, red))
    behind = np.where(is_red, blue, np.where(is_green, red, green))
    sector = np.where(is_red, np.float32(0.0), np.where(is_green, np.float32(2.0), np.float32(4.0)))
    hue = (ahead - behind) / np.maximum(span, _TINY) + (sector + np.float32(6.0 * delta))  # -2 .. 6
    span = np.minimum(span * np.float32(factor), value)  # a saturation of at most 1
    out = np.empty_like(planes)
    for channel in range(3):
        away = np.abs(hue - np.float32(2.0 * channel))
        away = np.minimum(away, np.float32(6.0) - away)
        out[channel] = value - span * np.clip(away - np.float32(1.0), 0.0, 1.0)
    return out
