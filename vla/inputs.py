"""From an `Observation` to what a backbone is given: PIL images and a prompt, by the policy's own specs."""

from __future__ import annotations

import numpy as np
from PIL import Image

from vla.jpeg import jpeg_round_trip
from vla.resample import crop_and_resize, resize_lanczos3
from vla.spec import ImageSpec, PromptSpec
from vla.types import Observation, problem

UNKNOWN_STATE = "unknown"
FILTERS = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
    "box": Image.Resampling.BOX,
}


def prepare_image(frame: np.ndarray, spec: ImageSpec) -> Image.Image:
    """uint8 (h, w, 3) -> size_px square: rotate, JPEG, then crop and resize in the spec's order."""
    if frame.ndim != 3 or frame.shape[2] != 3 or frame.dtype != np.uint8:
        raise problem(f"an image of shape {frame.shape}, {frame.dtype}", "uint8 (height, width, 3)", "send RGB bytes")
    frame = np.ascontiguousarray(np.rot90(frame, spec.rotation_deg // 90))
    if spec.jpeg_quality is not None:
        frame = jpeg_round_trip(frame, spec.jpeg_quality)
    if spec.crop_area == 1.0:
        return _resize(frame, spec)
    if spec.crop_order == "after_resize":
        resized = np.asarray(_resize(frame, spec))
        return Image.fromarray(crop_and_resize(resized, spec.crop_area, spec.size_px, spec.size_px))
    if spec.resize_filter == "lanczos3":
        return Image.fromarray(resize_lanczos3(frame, spec.size_px, spec.size_px, spec.crop_area))
    image = Image.fromarray(frame)
    side = spec.crop_area**0.5
    width, height = image.width * side, image.height * side
    left, top = (image.width - width) / 2, (image.height - height) / 2
    box = (left, top, left + width, top + height)
    return image.resize((spec.size_px, spec.size_px), FILTERS[spec.resize_filter], box=box)


def _resize(frame: np.ndarray, spec: ImageSpec) -> Image.Image:
    """The whole frame to size_px x size_px."""
    height, width = frame.shape[:2]
    if (width, height) == (spec.size_px, spec.size_px):
        return Image.fromarray(frame)
    inner_width = inner_height = spec.size_px
    if spec.fit == "pad":
        ratio = max(width, height) / spec.size_px
        inner_width, inner_height = max(1, int(width / ratio)), max(1, int(height / ratio))
    if spec.resize_filter == "lanczos3":
        resized = Image.fromarray(resize_lanczos3(frame, inner_height, inner_width))
    else:
        resized = Image.fromarray(frame).resize((inner_width, inner_height), FILTERS[spec.resize_filter])
    if resized.size == (spec.size_px, spec.size_px):
        return resized
    square = Image.new("RGB", (spec.size_px, spec.size_px))
    square.paste(resized, ((spec.size_px - inner_width) // 2, (spec.size_px - inner_height) // 2))
    return square


def prepare_images(observation: Observation, spec: ImageSpec) -> list[Image.Image]:
    """The spec's cameras, in its order."""
    missing = [name for name in spec.cameras if name not in observation.images]
    if missing:
        raise problem(f"cameras {sorted(observation.images)}", f"all of {list(spec.cameras)}",
                      f"send {', '.join(missing)}, or train with the cameras you have")  # fmt: skip
    return [prepare_image(observation.images[name], spec) for name in spec.cameras]


def state_text(state: np.ndarray, spec: PromptSpec) -> str:
    """Each shown dimension as an integer 0..state_bins-1, clipped to the spec's bounds, separated by spaces."""
    if not np.isfinite(state).all():
        raise problem(f"state {state.tolist()}", "finite numbers", "check the sensor or the dataset")
    low, high = np.asarray(spec.state_low), np.asarray(spec.state_high)
    share = (state - low) / np.maximum(high - low, 1e-8)
    bins = np.clip(np.floor(share * spec.state_bins), 0, spec.state_bins - 1).astype(int)
    return " ".join(map(str, bins))


def prepare_prompt(observation: Observation, spec: PromptSpec) -> str:
    """The text a backbone is given for this observation."""
    if not observation.instruction.strip():
        raise problem("an empty instruction", "what the robot should do, in words", "send an instruction")
    instruction = observation.instruction.strip().rstrip(".")
    values = {"instruction": instruction.lower() if spec.lowercase else instruction}
    if spec.state_names:
        expected = (len(spec.state_names),)
        if observation.state is None and spec.state_optional:
            return spec.template.format(**values, state=UNKNOWN_STATE)
        if observation.state is None or observation.state.shape != expected:
            got = "no state" if observation.state is None else f"a state of shape {observation.state.shape}"
            raise problem(got, f"{expected}: {', '.join(spec.state_names)}", "send the robot's state")
        values["state"] = state_text(observation.state, spec)
    return spec.template.format(**values)
