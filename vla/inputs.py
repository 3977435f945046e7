"""From an `Observation` to what a backbone is given: PIL images and a prompt, by the policy's own specs."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image

from vla.jpeg import jpeg_round_trip
from vla.resample import crop_and_resize, resize_lanczos3
from vla.spec import ImageSpec, PromptSpec
from vla.types import Observation, problem

UNKNOWN = "unknown"
FIRST_NUMBER, LAST_NUMBER = 0xF0000, 0xFFFFD
"""Unicode's supplementary private use area A, which no text has a use for: the bins of numbers that are shown as tokens.
`vla.number_tokens` puts vocabulary ids in their places."""
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


def number_bins(values: np.ndarray, low: Sequence[float], high: Sequence[float], n_bins: int) -> np.ndarray:
    """float (..., D) -> int64 (..., D) in 0..n_bins-1, clipped to the bounds of each dimension."""
    least, most = np.asarray(low), np.asarray(high)
    share = (values - least) / np.maximum(most - least, 1e-8)
    return np.clip(np.floor(share * n_bins), 0, n_bins - 1).astype(np.int64)


def state_text(state: np.ndarray, spec: PromptSpec) -> str:
    """Each shown dimension as its bin: integers separated by spaces, or one character per number (`number_tokens`)."""
    if not np.isfinite(state).all():
        raise problem(f"state {state.tolist()}", "finite numbers", "check the sensor or the dataset")
    return _row_text(number_bins(state, spec.state_low, spec.state_high, spec.state_bins), spec)


def history_text(actions: np.ndarray | None, spec: PromptSpec) -> str:
    """The last `spec.history` of the past actions (n, D), oldest first: each as a state is, `unknown` before the first.

    None, where the policy learned to do without, is as at the beginning of an episode.
    """
    dim = len(spec.history_low)
    if actions is None and not spec.history_optional:
        raise problem("no past actions", f"the last {spec.history} of this episode, {dim} numbers each",
                      "send the actions that were executed, an empty list at the beginning of an episode; or train with "
                      "history dropout")  # fmt: skip
    if actions is None:
        actions = np.zeros((0, dim), np.float32)
    fits = actions.ndim == 2 and actions.shape[1] == dim
    if not fits or not np.isfinite(actions).all():
        got = f"past actions of shape {actions.shape}" + (", not all finite" if fits else "")
        raise problem(got, f"finite numbers (n, {dim}), oldest first", "send the actions that were executed")
    shown = actions[len(actions) - min(len(actions), spec.history) :]
    rows = [_row_text(row, spec) for row in number_bins(shown, spec.history_low, spec.history_high, spec.state_bins)]
    missing = [UNKNOWN] * (spec.history - len(shown))
    if spec.numbers_as == "tokens":
        return " ".join([*missing, "".join(rows)]) if rows else " ".join(missing)
    return "; ".join([*missing, *rows])


def _row_text(bins: np.ndarray, spec: PromptSpec) -> str:
    if spec.numbers_as == "tokens":
        return "".join(chr(FIRST_NUMBER + int(b)) for b in bins)
    return " ".join(map(str, bins))


def prepare_prompt(observation: Observation, spec: PromptSpec) -> str:
    """The text a backbone is given for this observation."""
    if not observation.instruction.strip():
        raise problem("an empty instruction", "what the robot should do, in words", "send an instruction")
    if spec.numbers_as == "tokens" and any(FIRST_NUMBER <= ord(c) <= LAST_NUMBER for c in observation.instruction):
        raise problem("an instruction with characters that stand for numbers", "words", "send plain text")
    instruction = observation.instruction.strip().rstrip(".")
    values = {"instruction": instruction.lower() if spec.lowercase else instruction}
    if spec.state_names:
        values["state"] = _shown_state(observation.state, spec)
    if spec.history:
        values["history"] = history_text(observation.past_actions, spec)
    return spec.template.format(**values)


def _shown_state(state: np.ndarray | None, spec: PromptSpec) -> str:
    expected = (len(spec.state_names),)
    if state is None and spec.state_optional:
        return UNKNOWN
    if state is None or state.shape != expected:
        got = "no state" if state is None else f"a state of shape {state.shape}"
        raise problem(got, f"{expected}: {', '.join(spec.state_names)}", "send the robot's state")
    return state_text(state, spec)
