"""The datasets of Open X-Embodiment that OpenVLA knows, one row each: cameras, state and the meaning of the numbers.

Values are those of OpenVLA's prismatic/vla/datasets/rlds/oxe/configs.py. What is wrong there is kept, because it defines
what published checkpoints were trained on, and is told in the row's `note`. How the numbers are made from the recorded
ones is in `oxe_transforms`.
"""

from __future__ import annotations

from dataclasses import dataclass

XYZ = ("x", "y", "z")
RPY = ("roll", "pitch", "yaw")
QUATERNION = ("qx", "qy", "qz", "qw")
PADS = tuple(f"pad_{i}" for i in range(8))

NONE, POS_EULER, POS_QUAT, JOINT = "NONE", "POS_EULER", "POS_QUAT", "JOINT"
STATE_NAMES: dict[str, tuple[str, ...]] = {
    NONE: PADS,
    POS_EULER: (*XYZ, *RPY, "pad", "gripper"),
    POS_QUAT: (*XYZ, *QUATERNION, "gripper"),
    JOINT: (*(f"joint_{i}" for i in range(7)), "gripper"),
}
"""State encoding -> names of its 8 numbers. Rotations are named as the encoding says, whatever the robot's convention."""

EEF_POS, EEF_R6, JOINT_POS = "EEF_POS", "EEF_R6", "JOINT_POS"
ACTION_NAMES: dict[str, tuple[str, ...]] = {
    EEF_POS: ("dx", "dy", "dz", "rx", "ry", "rz", "gripper"),
    EEF_R6: ("dx", "dy", "dz", *(f"r6_{i}" for i in range(6)), "gripper"),
    JOINT_POS: (*(f"joint_{i}" for i in range(7)), "gripper"),
}
"""Action encoding -> names of its numbers: changes relative to the present pose, but for the gripper, which is absolute."""

EEF_GRIPPER = ("EEF_state", None, "gripper_state")
EEF_GRIPPER_LOWER = ("eef_state", None, "gripper_state")
NO_STATE = (None,) * 8


@dataclass(frozen=True)
class OxeDataset:
    """One row."""

    primary: str | None
    """Name of the recorded observation that is the main camera's image; None if there is no such camera."""
    secondary: str | None
    wrist: str | None
    depth: tuple[str | None, str | None, str | None]
    """Depth images of the same three cameras, by the names they have after the transform. Not read."""
    state: tuple[str | None, ...]
    """Observations, recorded or made by the transform, that are the state side by side; None is one number of padding."""
    state_encoding: str
    action_encoding: str
    state_names: tuple[str, ...]
    drop_idle: bool
    """Whether OpenVLA leaves out steps at which the arm does not move (`oxe.arm_moves`)."""
    note: str

    @property
    def cameras(self) -> dict[str, str]:
        """Camera name -> flattened key of its image, without the cameras there are not."""
        named = {"primary": self.primary, "secondary": self.secondary, "wrist": self.wrist}
        return {camera: f"observation/{key}" for camera, key in named.items() if key is not None}


def _row(
    images: tuple[str | None, str | None, str | None],
    state: tuple[str | None, ...],
    state_encoding: str,
    action_encoding: str = EEF_POS,
    depth: tuple[str | None, str | None, str | None] = (None, None, None),
    state_names: tuple[str, ...] = (),
    drop_idle: bool = False,
    note: str = "",
) -> OxeDataset:
    if not state_names:
        padding = next((i for i, name in enumerate(reversed(state)) if name is not None), len(state))
        names = STATE_NAMES[state_encoding]
        state_names = (*names[: len(names) - padding], *PADS[len(names) - padding :])
    return OxeDataset(*images, depth, state, state_encoding, action_encoding, state_names, drop_idle, note)


_TDROID = _row(("static_image", None, None), EEF_GRIPPER, POS_EULER, depth=("static_depth_image", None, None))
_LIBERO = _row(
    ("image", None, "wrist_image"),
    EEF_GRIPPER,
    POS_EULER,
    state_names=(*XYZ, "rx", "ry", "rz", "pad", "gripper_0", "gripper_1"),
)

DATASETS: dict[str, OxeDataset] = {
    "fractal20220817_data": _row(("image", None, None), ("base_pose_tool_reached", "gripper_closed"), POS_QUAT),
    "kuka": _row(("image", None, None), ("clip_function_input/base_pose_tool_reached", "gripper_closed"), POS_QUAT),
    "bridge_oxe": _row(
        ("image", "image_1", None),
        EEF_GRIPPER,
        POS_EULER,
        note="Google's copy; `bridge_orig` is the authors' newer and larger one",
    ),
    "bridge_orig": _row(("image_0", "image_1", None), EEF_GRIPPER, POS_EULER),
    "bridge_dataset": _row(("image_0", "image_1", None), EEF_GRIPPER, POS_EULER),
    "taco_play": _row(
        ("rgb_static", None, "rgb_gripper"),
        ("state_eef", None, "state_gripper"),
        POS_EULER,
        depth=("depth_static", None, "depth_gripper"),
        note="its transform clips the gripper and does not invert it, against its own comment",
    ),
    "jaco_play": _row(("image", None, "image_wrist"), ("state_eef", None, "state_gripper"), POS_EULER),
    "berkeley_cable_routing": _row(("image", "top_image", "wrist45_image"), ("robot_state", None), JOINT),
    "roboturk": _row(("front_rgb", None, None), NO_STATE, NONE),
    "nyu_door_opening_surprising_effectiveness": _row((None, None, "image"), NO_STATE, NONE),
    "viola": _row(("agentview_rgb", None, "eye_in_hand_rgb"), ("joint_states", "gripper_states"), JOINT),
    "berkeley_autolab_ur5": _row(("image", None, "hand_image"), ("state",), POS_QUAT, depth=("depth", None, None)),
    "toto": _row(("image", None, None), ("state", None), JOINT),
    "language_table": _row(
        ("rgb", None, None),
        ("effector_translation", None, None, None, None, None, None),
        POS_EULER,
        state_names=("x", "y", *PADS[2:]),
    ),
    "columbia_cairlab_pusht_real": _row(
        ("image", None, "wrist_image"),
        ("robot_state", None, None, None, None, None, None),
        POS_EULER,
        state_names=("x", "y", *PADS[2:]),
    ),
    "stanford_kuka_multimodal_dataset_converted_externally_to_rlds": _row(
        ("image", None, None), ("ee_position", "ee_orientation", None), POS_QUAT, depth=("depth_image", None, None)
    ),
    "nyu_rot_dataset_converted_externally_to_rlds": _row(("image", None, None), EEF_GRIPPER_LOWER, POS_EULER),
    "stanford_hydra_dataset_converted_externally_to_rlds": _row(
        ("image", None, "wrist_image"), EEF_GRIPPER_LOWER, POS_EULER
    ),
    "austin_buds_dataset_converted_externally_to_rlds": _row(("image", None, "wrist_image"), ("state",), JOINT),
    "nyu_franka_play_dataset_converted_externally_to_rlds": _row(
        ("image", "image_additional_view", None),
        ("eef_state", None, None),
        POS_EULER,
        depth=("depth", "depth_additional_view", None),
    ),
    "maniskill_dataset_converted_externally_to_rlds": _row(
        ("image", None, "wrist_image"), ("tcp_pose", "gripper_state"), POS_QUAT, depth=("depth", None, "wrist_depth")
    ),
    "furniture_bench_dataset_converted_externally_to_rlds": _row(("image", None, "wrist_image"), ("state",), POS_QUAT),
    "cmu_franka_exploration_dataset_converted_externally_to_rlds": _row(("highres_image", None, None), NO_STATE, NONE),
    "ucsd_kitchen_dataset_converted_externally_to_rlds": _row(("image", None, None), ("joint_state", None), JOINT),
    "ucsd_pick_and_place_dataset_converted_externally_to_rlds": _row(
        ("image", None, None), EEF_GRIPPER_LOWER, POS_EULER
    ),
    "austin_sailor_dataset_converted_externally_to_rlds": _row(("image", None, "wrist_image"), ("state",), POS_QUAT),
    "austin_sirius_dataset_converted_externally_to_rlds": _row(("image", None, "wrist_image"), ("state",), POS_QUAT),
    "bc_z": _row(
        ("image", None, None),
        ("present/xyz", "present/axis_angle", None, "present/sensed_close"),
        POS_EULER,
        state_names=(*XYZ, "rx", "ry", "rz", "pad", "gripper"),
        note="version 0.1.0 only: later ones are broken",
    ),
    "utokyo_pr2_opening_fridge_converted_externally_to_rlds": _row(("image", None, None), EEF_GRIPPER_LOWER, POS_EULER),
    "utokyo_pr2_tabletop_manipulation_converted_externally_to_rlds": _row(
        ("image", None, None), EEF_GRIPPER_LOWER, POS_EULER
    ),
    "utokyo_xarm_pick_and_place_converted_externally_to_rlds": _row(
        ("image", "image2", "hand_image"), ("end_effector_pose", None, None), POS_EULER
    ),
    "utokyo_xarm_bimanual_converted_externally_to_rlds": _row(("image", None, None), ("pose_r", None, None), POS_EULER),
    "robo_net": _row(("image", "image1", None), EEF_GRIPPER_LOWER, POS_EULER),
    "berkeley_mvp_converted_externally_to_rlds": _row(
        (None, None, "hand_image"),
        ("pose", "gripper"),
        POS_QUAT,
        JOINT_POS,
        note="joint actions: OpenVLA leaves it out of mixtures",
    ),
    "berkeley_rpt_converted_externally_to_rlds": _row(
        (None, None, "hand_image"),
        ("joint_pos", "gripper"),
        JOINT,
        JOINT_POS,
        note="joint actions: OpenVLA leaves it out of mixtures",
    ),
    "kaist_nonprehensile_converted_externally_to_rlds": _row(("image", None, None), ("state", None), POS_QUAT),
    "stanford_mask_vit_converted_externally_to_rlds": _row(("image", None, None), EEF_GRIPPER_LOWER, POS_EULER),
    "tokyo_u_lsmo_converted_externally_to_rlds": _row(("image", None, None), EEF_GRIPPER_LOWER, POS_EULER),
    "dlr_sara_pour_converted_externally_to_rlds": _row(("image", None, None), ("state", None, None), POS_EULER),
    "dlr_sara_grid_clamp_converted_externally_to_rlds": _row(("image", None, None), ("state", None, None), POS_EULER),
    "dlr_edan_shared_control_converted_externally_to_rlds": _row(("image", None, None), ("state", None), POS_EULER),
    "asu_table_top_converted_externally_to_rlds": _row(("image", None, None), EEF_GRIPPER_LOWER, POS_EULER),
    "stanford_robocook_converted_externally_to_rlds": _row(
        ("image_1", "image_2", None), EEF_GRIPPER_LOWER, POS_EULER, depth=("depth_1", "depth_2", None)
    ),
    "imperialcollege_sawyer_wrist_cam": _row(
        ("image", None, "wrist_image"),
        (None, None, None, None, None, None, None, "state"),
        NONE,
        state_names=(*PADS[:7], "gripper"),
        note="both cameras are the wrist camera; the state, called NONE, is the gripper",
    ),
    "iamlab_cmu_pickup_insert_converted_externally_to_rlds": _row(
        ("image", None, "wrist_image"), ("joint_state", "gripper_state"), JOINT
    ),
    "uiuc_d3field": _row(
        ("image_1", "image_2", None),
        NO_STATE,
        NONE,
        depth=("depth_1", "depth_2", None),
        note="published data is broken",
    ),
    "utaustin_mutex": _row(("image", None, "wrist_image"), ("state",), JOINT),
    "berkeley_fanuc_manipulation": _row(("image", None, "wrist_image"), ("joint_state", None, "gripper_state"), JOINT),
    "cmu_playing_with_food": _row(("image", None, "finger_vision_1"), ("state", None, None), POS_EULER),
    "cmu_play_fusion": _row(
        ("image", None, None),
        ("state",),
        JOINT,
        note="part of the quaternion and the gripper end up as rotation, the end-of-episode flag as gripper",
    ),
    "cmu_stretch": _row(("image", None, None), EEF_GRIPPER_LOWER, POS_EULER),
    "berkeley_gnm_recon": _row(
        (None, None, "image"),
        ("state", None, None),
        POS_EULER,
        state_names=("x", "y", "pad_2", "pad_3", "pad_4", "yaw", "pad_6", "pad_7"),
    ),
    "berkeley_gnm_cory_hall": _row(
        (None, None, "image"),
        ("state", None, None),
        POS_EULER,
        state_names=("x", "y", "pad_2", "pad_3", "pad_4", "yaw", "pad_6", "pad_7"),
    ),
    "berkeley_gnm_sac_son": _row(
        (None, None, "image"),
        ("state", None, None),
        POS_EULER,
        state_names=("x", "y", "pad_2", "pad_3", "pad_4", "yaw", "pad_6", "pad_7"),
    ),
    "droid": _row(
        ("exterior_image_1_left", "exterior_image_2_left", "wrist_image_left"),
        ("proprio",),
        POS_QUAT,
        state_names=(*XYZ, *RPY, "gripper"),
        drop_idle=True,
        note="state is 7 numbers with Euler angles, not POS_QUAT; OpenVLA swaps the two exterior cameras at random per episode",
    ),
    "fmb_dataset": _row(
        ("image_side_1", "image_side_2", "image_wrist_1"),
        ("proprio",),
        POS_EULER,
        depth=("image_side_1_depth", "image_side_2_depth", "image_wrist_1_depth"),
        state_names=(*XYZ, *QUATERNION, "gripper"),
        note="state has a quaternion, not POS_EULER",
    ),
    "dobbe": _row(
        ("wrist_image", None, None),
        ("proprio",),
        POS_EULER,
        state_names=(*XYZ, *RPY, "gripper"),
        note="its wrist camera is called primary",
    ),
    "roboset": _row(
        ("image_left", "image_right", "image_wrist"),
        ("proprio",),
        JOINT,
        JOINT_POS,
        note="joint actions: OpenVLA leaves it out of mixtures",
    ),
    "rh20t": _row(
        ("image_front", "image_side_right", "image_wrist"),
        ("proprio",),
        POS_EULER,
        state_names=(*XYZ, *RPY, "gripper"),
        note="width of its state not checked against published data",
    ),
    "tdroid_carrot_in_bowl": _TDROID,
    "tdroid_pour_corn_in_pot": _TDROID,
    "tdroid_flip_pot_upright": _TDROID,
    "tdroid_move_object_onto_plate": _TDROID,
    "tdroid_knock_object_over": _TDROID,
    "tdroid_cover_object_with_towel": _TDROID,
    "droid_wipe": _row(
        ("exterior_image_2_left", None, "wrist_image_left"),
        ("proprio",),
        POS_EULER,
        state_names=(*XYZ, *RPY, "gripper"),
    ),
    "libero_spatial_no_noops": _LIBERO,
    "libero_object_no_noops": _LIBERO,
    "libero_goal_no_noops": _LIBERO,
    "libero_10_no_noops": _LIBERO,
}
"""Name, as OpenVLA and mixtures write it -> row."""
