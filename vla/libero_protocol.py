"""How each toolkit evaluates on LIBERO: every number and step that moves its published success rates, by name.

A success rate on LIBERO means little without these: the papers differ in step limits, re-planning, image path and
gripper, and each has cost somebody points. A protocol has two halves. What the simulator is told (settling, step limits,
trials, camera size, re-planning) goes to the evaluation: `protocol_settings`. What happens between the simulator and the
network (rotation, JPEG, resizing, crop, gripper) belongs to the policy directory, because a policy must be evaluated as
it was trained: `image_spec` and `action_fields` write it there, `disagreements` compares.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from vla.normalize import gripper_to_robot
from vla.spec import ActionSpec, ImageSpec
from vla.types import problem

SUITES = ("libero_spatial", "libero_object", "libero_goal", "libero_10", "libero_90")
STATE_NAMES = ("x_m", "y_m", "z_m", "rx_rad", "ry_rad", "rz_rad", "left_finger_m", "right_finger_m")
GRIPPER = 6
"""Index of the gripper in LIBERO's seven actions."""


@dataclass(frozen=True)
class Protocol:
    """One toolkit's evaluation on LIBERO."""

    name: str
    source: str
    """Repository and commit the values were read from."""
    max_steps: tuple[int, int, int, int, int]
    """Policy steps (settling not counted) on `SUITES`, in its order."""
    settle_steps: int = 10
    """Dummy actions after each reset, while objects drop into place; success in them does not count."""
    dummy_action: tuple[float, ...] = (0.0, 0.0, 0.0, 0.0, 0.0, 0.0, -1.0)
    trials: int = 50
    """Episodes per task; episode i starts from the benchmark's initial state i."""
    env_seed: int = 0
    """Given to `env.seed`: it places the fixtures, which the initial states do not hold."""
    reseed: Literal["task", "episode"] = "task"
    """task: `env.seed(env_seed)` once, then one reset after another draws on (here: each reset is seeded with it, see
    `vla.eval.libero_suite`). episode: `env.seed(env_seed + i)`."""
    control_hz: float = 20.0
    n_execute: int | None = None
    """Actions of each chunk executed before asking again; None: the policy decides."""
    image_size_px: int = 256
    """The cameras' height and width."""
    rotation_deg: Literal[0, 180] = 180
    """Turn of every camera's raw frame. A half turn is more than upright: it also swaps left and right."""
    jpeg_quality: int | None = None
    """Of the round trip before resizing; None: none."""
    resize_px: int | None = 224
    """What the policy is given; None: the camera's own size, the policy resizes."""
    resize_filter: Literal["bilinear", "lanczos3"] = "bilinear"
    fit: Literal["stretch", "pad"] = "stretch"
    crop_area: float = 1.0
    """Centre crop of a policy trained with random crops, after resizing, and back to resize_px."""
    state_names: tuple[str, ...] = STATE_NAMES
    """Position, orientation as axis-angle, both finger positions, of the observation (not of the controller)."""
    normalise_antipode: bool = False
    """Of the two quaternions of a rotation take the one with w >= 0, so that no angle exceeds pi. Nobody does."""
    gripper_range: Literal["signed", "unit"] = "signed"
    gripper_threshold: float | None = None
    gripper_invert: bool = False
    """These three as in `vla.spec.ActionSpec`. What reaches LIBERO: -1 opens, +1 closes."""


OPENVLA = Protocol(
    name="openvla",
    source="openvla/openvla@c8f03f48",
    # experiments/robot/libero/run_libero_eval.py, eval_libero
    max_steps=(220, 280, 300, 520, 400),
    # experiments/robot/libero/run_libero_eval.py, GenerateConfig: num_steps_wait, num_trials_per_task
    settle_steps=10,
    trials=50,
    # experiments/robot/libero/libero_utils.py, get_libero_env: env.seed(0), resolution=256
    env_seed=0,
    reseed="task",
    image_size_px=256,
    # experiments/robot/libero/run_libero_eval.py asks at every step: the policy has one action per query
    n_execute=1,
    # experiments/robot/libero/libero_utils.py, get_libero_image: [::-1, ::-1]
    rotation_deg=180,
    # experiments/robot/libero/libero_utils.py, resize_image: tf.image.encode_jpeg without a quality, then lanczos3
    jpeg_quality=95,
    resize_filter="lanczos3",
    # experiments/robot/robot_utils.py, get_image_resize_size
    resize_px=224,
    # experiments/robot/openvla_utils.py, get_vla_action: crop_scale, with center_crop (the default)
    crop_area=0.9,
    # experiments/robot/robot_utils.py, normalize_gripper_action(binarize=True), then invert_gripper_action
    gripper_range="unit",
    gripper_threshold=0.5,
    gripper_invert=True,
)

OFT = dataclasses.replace(
    OPENVLA,  # the same functions in the same files, resize_image moved to experiments/robot/openvla_utils.py
    name="oft",
    source="moojink/openvla-oft@213c5ff8",
    # experiments/robot/libero/run_libero_eval.py, GenerateConfig: num_open_loop_steps
    n_execute=8,
)

OPENPI = Protocol(
    name="openpi",
    source="Physical-Intelligence/openpi@15a9616a",
    # examples/libero/main.py, eval_libero
    max_steps=(220, 280, 300, 520, 400),
    # examples/libero/main.py, Args: num_steps_wait, num_trials_per_task, seed (given to env.seed), replan_steps
    settle_steps=10,
    trials=50,
    env_seed=7,
    reseed="task",
    n_execute=5,
    # examples/libero/main.py, LIBERO_ENV_RESOLUTION, and [::-1, ::-1] of both cameras
    image_size_px=256,
    rotation_deg=180,
    # examples/libero/main.py, Args.resize_size; packages/openpi-client/src/openpi_client/image_tools.py
    resize_px=224,
    resize_filter="bilinear",
    fit="pad",
    # examples/libero/main.py steps with the policy's action as it is: trained on LIBERO's own gripper signs
    gripper_range="signed",
)

LEROBOT = Protocol(
    name="lerobot",
    source="huggingface/lerobot@7427f318",
    # src/lerobot/envs/libero.py, TASK_SUITE_MAX_STEPS: spatial has 280, the others have 220
    max_steps=(280, 280, 300, 520, 400),
    # src/lerobot/envs/libero.py, LiberoEnv.__init__: num_steps_wait
    settle_steps=10,
    # src/lerobot/configs/default.py, EvalConfig.n_episodes (docs/source/libero.mdx advises 10)
    trials=50,
    # src/lerobot/configs/eval.py, EvalPipelineConfig.seed; scripts/lerobot_eval.py counts up from it
    env_seed=1000,
    reseed="episode",
    # src/lerobot/envs/configs.py, LiberoEnv: fps, observation_height (LIBERO's data sets have 256)
    control_hz=20.0,
    image_size_px=360,
    # the policy's config has n_action_steps and its processor resizes
    n_execute=None,
    resize_px=None,
    # src/lerobot/processor/env_processor.py, LiberoProcessorStep: torch.flip of both axes, _quat2axisangle in float32
    rotation_deg=180,
    # src/lerobot/envs/libero.py, LiberoEnv.step: the action as it is
    gripper_range="signed",
)

PROTOCOLS = {protocol.name: protocol for protocol in (OPENVLA, OFT, OPENPI, LEROBOT)}


def get_protocol(name: str) -> Protocol:
    """VlaError names the known ones."""
    if name not in PROTOCOLS:
        near = difflib.get_close_matches(name, PROTOCOLS, n=1)
        raise problem(f"protocol {name!r}", f"one of {', '.join(PROTOCOLS)}",
                      f"did you mean {near[0]!r}?" if near else "correct --protocol")  # fmt: skip
    return PROTOCOLS[name]


def max_steps(protocol: Protocol, suite: str) -> int:
    """Step limit of a LIBERO suite, or of the one that a perturbed suite (`libero_goal_swap`) was made from."""
    for base, steps in zip(SUITES, protocol.max_steps, strict=True):
        if suite == base or suite.startswith(base + "_"):
            return steps
    raise problem(f"suite {suite!r} with protocol {protocol.name!r}", f"a suite of LIBERO: {', '.join(SUITES)}",
                  "correct --suite, or leave out --protocol")  # fmt: skip


def protocol_settings(name: str, suite: str) -> dict[str, Any]:
    """The simulator's half of a protocol on one suite.

    Returns:
        episodes_per_task, n_execute: fields of the evaluation's settings.
        suite_options: fields of the suite: settle_steps, max_steps, image_size_px, env_seed, env_seed_step.
    """
    protocol = get_protocol(name)
    return {
        "episodes_per_task": protocol.trials,
        "n_execute": protocol.n_execute,
        "suite_options": {
            "settle_steps": protocol.settle_steps,
            "max_steps": max_steps(protocol, suite),
            "image_size_px": protocol.image_size_px,
            "env_seed": protocol.env_seed,
            "env_seed_step": 1 if protocol.reseed == "episode" else 0,
        },
    }


def image_spec(
    protocol: Protocol, cameras: tuple[str, ...], *, random_crops: bool = True, frames_turned: bool = False
) -> ImageSpec:
    """The protocol's image path for a policy directory.

    Args:
        random_crops: the policy was trained with them; without, OpenVLA's evaluation does not crop either.
        frames_turned: the frames come turned already, so that the policy must not turn them again.
    """
    cropped = random_crops and protocol.crop_area < 1.0
    return ImageSpec(
        cameras,
        protocol.resize_px or protocol.image_size_px,
        resize_filter=protocol.resize_filter,
        crop_area=protocol.crop_area if cropped else 1.0,
        crop_order="after_resize" if cropped else "before_resize",
        rotation_deg=0 if frames_turned else protocol.rotation_deg,
        jpeg_quality=protocol.jpeg_quality,
        fit=protocol.fit,
    )


def action_fields(protocol: Protocol) -> dict[str, Any]:
    """The protocol's gripper as fields of `vla.spec.ActionSpec`."""
    words = "0 closes, 1 opens" if protocol.gripper_range == "unit" else "-1 opens, +1 closes"
    return {
        "gripper_dim": GRIPPER,
        "gripper_convention": words,
        "gripper_range": protocol.gripper_range,
        "gripper_threshold": protocol.gripper_threshold,
        "gripper_invert": protocol.gripper_invert,
    }


def disagreements(
    protocol: Protocol, action: ActionSpec, image: ImageSpec, *, frames_turned: bool = False
) -> dict[str, tuple[Any, Any]]:
    """Field -> (the policy's, the protocol's) where they differ.

    A policy without crops agrees with OpenVLA's. So does one that learned from LIBERO's own gripper signs (-1..1) instead
    of 0..1: it must not turn them, as one of 0..1 must.
    """
    wanted = image_spec(protocol, image.cameras, random_crops=image.crop_area < 1.0, frames_turned=frames_turned)
    ignored = {"cameras"} | ({"size_px", "resize_filter", "fit"} if protocol.resize_px is None else set())
    pairs = {
        f"image.{field.name}": (getattr(image, field.name), getattr(wanted, field.name))
        for field in dataclasses.fields(ImageSpec)
        if field.name not in ignored
    }
    gripper = action_fields(protocol)
    del gripper["gripper_convention"]
    if action.gripper_range != protocol.gripper_range:
        gripper = {"gripper_dim": GRIPPER, "gripper_invert": action.gripper_range == "unit"}
    pairs |= {f"action.{name}": (getattr(action, name), value) for name, value in gripper.items()}
    pairs["action.delta"] = (action.delta, True)
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def quat_to_axis_angle(quat: np.ndarray, *, normalise_antipode: bool = False) -> np.ndarray:
    """Unit quaternion (x, y, z, w) -> float64 (3,) axis times angle in radians, the angle in 0 .. 2 pi.

    robosuite's formula, as every toolkit copied it. q and -q are one rotation but give different vectors: with
    `normalise_antipode` both give the one whose angle is at most pi, which is not what policies were trained on.
    """
    x = np.array(quat, np.float64)
    if normalise_antipode and x[3] < 0.0:
        x = -x
    w = min(1.0, max(-1.0, float(x[3])))
    sine = np.sqrt(1.0 - w * w)
    if math.isclose(sine, 0.0):
        return np.zeros(3)
    return x[:3] * 2.0 * math.acos(w) / sine


def robot_state(position: np.ndarray, quat: np.ndarray, fingers: np.ndarray, protocol: Protocol) -> np.ndarray:
    """float64 (8,), named by `STATE_NAMES`: gripper position in metres, axis-angle, finger positions in metres."""
    axis_angle = quat_to_axis_angle(quat, normalise_antipode=protocol.normalise_antipode)
    return np.concatenate([position, axis_angle, fingers])


def gripper_to_env(actions: np.ndarray, protocol: Protocol) -> np.ndarray:
    """A policy's actions (..., 7), un-normalised -> a copy as LIBERO's `env.step` wants them: -1 opens, +1 closes."""
    return gripper_to_robot(
        actions, GRIPPER, protocol.gripper_range, protocol.gripper_threshold, protocol.gripper_invert
    )
