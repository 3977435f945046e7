"""From a request body to an `Observation`, checked against what the policy says it needs."""

from __future__ import annotations

import binascii
import io
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from vla.motion_spec import check_said
from vla.serve import wire
from vla.types import Observation, problem

MAX_SIDE_PX = 4096
MAX_INSTRUCTION_CHARS = 4096
IMAGE_FIX = "send uint8 RGB of shape (height, width, 3)"


@dataclass(frozen=True)
class Inputs:
    """What a policy's metadata says about its inputs. None: it does not say, and the policy itself checks."""

    cameras: tuple[str, ...] | None
    state_dim: int | None
    unnorm_key: str | None
    """Statistics the policy was loaded with."""
    unnorm_keys: tuple[str, ...]
    """All it carries."""
    action_dim: int | None = None
    history: int = 0
    """Past actions it is shown."""
    optional: tuple[str, ...] = ()
    """Of `state` and `past_actions`, what it can do without."""
    says_motions: bool = False
    """It acts by language motions, and may be told one."""


def inputs_of(metadata: Mapping[str, Any]) -> Inputs:
    """Reads the optional keys `cameras`, `state_names` or `state_dim`, `unnorm_key`, `unnorm_keys`, `action_dim`, `history`,
    `optional_inputs` and `motions`."""
    cameras = metadata.get("cameras")
    return Inputs(
        cameras=None if cameras is None else tuple(cameras),
        state_dim=metadata.get("state_dim") or len(metadata.get("state_names") or ()) or None,
        unnorm_key=metadata.get("unnorm_key"),
        unnorm_keys=tuple(metadata.get("unnorm_keys") or ()),
        action_dim=metadata.get("action_dim"),
        history=metadata.get("history") or 0,
        optional=tuple(metadata.get("optional_inputs") or ()),
        says_motions=bool(metadata.get("motions")),
    )


def observation_of(body: Mapping[str, Any], inputs: Inputs) -> Observation:
    """One observation from plain JSON values.

    Args:
        body: `images` {camera: image} or `image` (one camera) or OpenVLA-OFT's `full_image` and `*wrist*` keys;
            `instruction`; `state` (json_numpy or a list of numbers); `key` (list of non-negative ints); `past_actions`
            (json_numpy or a list of actions, oldest first; empty at the beginning of an episode); `motion` (text).
            An image is an array in json_numpy's form, or the base64 text of a PNG or JPEG file.
    """
    images = {name: _image(value, f"image {name!r}") for name, value in _named_images(body, inputs).items()}
    missing = [name for name in inputs.cameras or () if name not in images]
    if missing:
        raise problem(f"cameras {sorted(images)}", f"all of {list(inputs.cameras or ())}", f"send {', '.join(missing)}")
    return Observation(images, _state(body.get("state"), inputs), _instruction(body.get("instruction")),
                       _key(body.get("key")), past_actions=_past_actions(body.get("past_actions"), inputs),
                       motion=_motion(body.get("motion"), inputs))  # fmt: skip


def check_unnorm_key(key: object, inputs: Inputs) -> None:
    """A request may name the statistics; they must be those the policy was loaded with."""
    if key is None or (key == inputs.unnorm_key and isinstance(key, str)):
        return
    if key in inputs.unnorm_keys:
        raise problem(f"unnorm_key {key!r}", f"{inputs.unnorm_key!r}, which this server was started with",
                      f"leave it out, or start the server with --unnorm-key {key}")  # fmt: skip
    known = sorted({*inputs.unnorm_keys, *([inputs.unnorm_key] if inputs.unnorm_key else [])})
    raise problem(f"unnorm_key {key!r}", f"one of {known}" if known else "none: the policy has no named statistics",
                  "leave it out, or correct it")  # fmt: skip


def _named_images(body: Mapping[str, Any], inputs: Inputs) -> dict[str, Any]:
    forms = [form for form in ("image", "images", "full_image") if body.get(form) is not None]
    expected = f'"images": {{camera: image}} with the cameras {list(inputs.cameras or ["..."])}'
    if len(forms) != 1:
        raise problem(" and ".join(forms) or "no image", expected, "send exactly one of images, image, full_image")
    if forms == ["images"]:
        if not isinstance(body["images"], dict):
            raise problem(f"images of type {type(body['images']).__name__}", expected, "name each image by its camera")
        return body["images"]
    sent = [body["image"]] if forms == ["image"] else _oft_images(body)
    names = inputs.cameras or ("image",)
    if len(sent) != len(names):
        raise problem(f"{len(sent)} unnamed image(s)", f"{len(names)}: {list(names)}", f"send {expected}")
    return dict(zip(names, sent, strict=True))


def _oft_images(body: Mapping[str, Any]) -> list[Any]:
    """OpenVLA-OFT's order: the full view, then every key with "wrist" in it as they come."""
    return [body["full_image"], *(value for name, value in body.items() if "wrist" in name)]


def _image(value: object, name: str) -> np.ndarray:
    array = _decode_file(value, name) if isinstance(value, str) else wire.decode(value, name)
    if array.dtype != np.uint8:
        raise problem(f"{name}: dtype {array.dtype}", "uint8, 0..255", IMAGE_FIX)
    if array.ndim != 3 or array.shape[2] != 3 or not all(1 <= side <= MAX_SIDE_PX for side in array.shape[:2]):
        raise problem(f"{name}: shape {array.shape}", f"(height, width, 3), sides 1..{MAX_SIDE_PX}", IMAGE_FIX)
    return array


def _decode_file(text: str, name: str) -> np.ndarray:
    """Base64 PNG or JPEG, with or without a `data:` prefix. The size is checked before pixels are decoded."""
    fix = "send the base64 text of an RGB PNG or JPEG file"
    payload = text.partition(",")[2] if text.startswith("data:") else text
    try:
        data = binascii.a2b_base64(payload, strict_mode=True)
        image = Image.open(io.BytesIO(data), formats=("PNG", "JPEG"))
        if max(image.size) > MAX_SIDE_PX or image.mode != "RGB":
            raise problem(f"{name}: {image.width}x{image.height} {image.mode}", f"RGB, sides up to {MAX_SIDE_PX}", fix)
        return np.array(image)
    except (binascii.Error, ValueError, OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise problem(f"{name}: {error}", "a whole PNG or JPEG file in base64", fix) from error


def _state(value: object, inputs: Inputs) -> np.ndarray | None:
    expected = "a list of finite numbers" if inputs.state_dim is None else f"{inputs.state_dim} finite numbers"
    if value is None:
        if inputs.state_dim and "state" not in inputs.optional:
            raise problem("no state", expected, "send the robot's state")
        return None
    if isinstance(value, list):
        if not _are_numbers(value):
            raise problem("a state with items that are not numbers", expected, "send a flat list of numbers")
        array = np.asarray(value, np.float64)
    else:
        array = wire.decode(value, "state")
    if array.ndim != 1 or array.dtype.kind not in "fiu" or (inputs.state_dim or len(array)) != len(array):
        raise problem(f"a state of shape {array.shape}, {array.dtype}", expected, "send the robot's state")
    return _as_float32(array, "state", expected, "check the sensor")


def _past_actions(value: object, inputs: Inputs) -> np.ndarray | None:
    """float32 (n, D), the last ones the policy is shown."""
    expected = (
        f"the last {inputs.history} actions of this episode, oldest first" if inputs.history else "a list of actions"
    )
    expected += "" if inputs.action_dim is None else f", {inputs.action_dim} finite numbers each"
    fix = "send the actions the robot executed, [] at the beginning of an episode"
    if value is None:
        if inputs.history and "past_actions" not in inputs.optional:
            raise problem("no past_actions", expected, fix)
        return None
    if isinstance(value, list):
        if not all(isinstance(row, list) and len(row) == len(value[0]) and _are_numbers(row) for row in value):
            raise problem("past_actions that are not lists of numbers of one length", expected, fix)
        array = np.array(value, np.float64).reshape(len(value), len(value[0]) if value else inputs.action_dim or 0)
    else:
        array = wire.decode(value, "past_actions")
    if array.ndim != 2 or array.dtype.kind not in "fiu" or array.shape[1] != (inputs.action_dim or array.shape[1]):
        raise problem(f"past_actions of shape {array.shape}, {array.dtype}", expected, fix)
    return _as_float32(array[max(0, len(array) - inputs.history) :], "past_actions", expected, fix)


def _are_numbers(values: list[Any]) -> bool:
    return all(isinstance(item, int | float) and not isinstance(item, bool) for item in values)


def _as_float32(array: np.ndarray, name: str, expected: str, fix: str) -> np.ndarray:
    with np.errstate(over="ignore"):  # too large for float32 becomes infinite and is refused
        numbers = array.astype(np.float32)
    if not np.isfinite(numbers).all():
        raise problem(f"{name} {array.tolist()}", expected, fix)
    return numbers


def _instruction(value: object) -> str:
    if not isinstance(value, str) or not value.strip():
        got = "no instruction" if value is None else f"instruction {value!r}"
        raise problem(got, "what the robot should do, in words", 'send "instruction": "pick up the cup"')
    if len(value) > MAX_INSTRUCTION_CHARS:
        raise problem(f"an instruction of {len(value)} characters", f"at most {MAX_INSTRUCTION_CHARS}", "shorten it")
    return value


def _motion(value: object, inputs: Inputs) -> str:
    if value is None or value == "":
        return ""
    if not isinstance(value, str) or not inputs.says_motions:
        raise problem(f"motion {value!r}", "none: the policy has no language motions" if isinstance(value, str) else "a text",
                      "leave it out")  # fmt: skip
    check_said(value)
    return value


def _key(value: object) -> tuple[int, ...]:
    if value is None:
        return ()
    if not isinstance(value, list) or not all(type(item) is int and 0 <= item < 2**63 for item in value):
        raise problem(f"key {value!r}", "a list of integers 0..2**63-1", "send [seed, episode, query], or leave it out")
    return tuple(value)
