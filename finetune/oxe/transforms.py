"""How each dataset of Open X-Embodiment becomes the common form: the 73 transforms of OpenVLA as rows.

The common action is the end effector's change of position (3) and orientation (3) and the gripper, 1 open and 0 closed,
unless the row's `gripper` says otherwise. What OpenVLA does wrong is done here too, because published checkpoints were
trained on it; comments beginning with "OpenVLA:" say where.
"""

from __future__ import annotations

from vla.finetune.oxe.ops import (
    Change,
    Fill,
    Inflate,
    Op,
    Part,
    Take,
    Transform,
    binarize,
    clip,
    euler_from_quaternion,
    invert,
    to_absolute,
)

OPEN = "1 open, 0 closed"
NONE_0 = "none: always 0"
NONE_1 = "none: always 1"


def _action(start: int | None, stop: int | None, *ops: Op) -> Take:
    return Take("action", start, stop, ops)


def _part(name: str, *ops: Op) -> Take:
    return Take(f"action/{name}", ops=ops)


def _observed(name: str, start: int | None = None, stop: int | None = None, *ops: Op) -> Take:
    return Take(f"observation/{name}", start, stop, ops)


def _vectors(*gripper: Part) -> tuple[Part, ...]:
    return (_part("world_vector"), _part("rotation_delta"), *gripper)


_INSIDE = "observation/natural_language_instruction"
_CLOSEDNESS = "gripper_closedness_action"
_AS_IS = (_action(None, None),)
_WITHOUT_LAST = (_action(None, -1),)  # the last number ends the episode
_INVERTED = (_action(0, 6), _action(-1, None, invert))
_CLIPPED_INVERTED = (_action(0, 6), _action(-1, None, clip, invert))
_BINARIZED = (_action(0, 6), _action(-1, None, binarize))
_RELATIVE_GRIPPER = Take(f"action/{_CLOSEDNESS}", 0, 1, (to_absolute,))
_RELATIVE = _vectors(_RELATIVE_GRIPPER)


_EEF_GRIPPER = {"EEF_state": (_observed("state", 0, 6),), "gripper_state": (_observed("state", -1),)}
_EEF_GRIPPER_LOWER = {"eef_state": (_observed("state", 0, 6),), "gripper_state": (_observed("state", -1),)}

_BRIDGE_OXE = Transform((Change("observation/state", 6), _part("open_gripper")), _EEF_GRIPPER, _INSIDE, OPEN, 1, 1)
_BRIDGE_ORIG = Transform(
    (Change("observation/state", 6), _action(-1, None, binarize)), _EEF_GRIPPER, gripper=OPEN, drop_first=1, drop_last=1
)
# The same cameras and states, on the Franka of the T-DROID experiments and of PPGM.
_CARTESIAN = Transform(
    _BINARIZED,
    {"EEF_state": (_observed("cartesian_position", 0, 6),), "gripper_state": (_observed("gripper_position", -1),)},
    gripper=OPEN,
)
_RT1 = Transform(_RELATIVE, {}, _INSIDE, OPEN)
_PR2 = Transform(_WITHOUT_LAST, _EEF_GRIPPER_LOWER)
_FOUR_DOF = (_action(0, 4), Fill(2), _action(-1, None))  # xyz and yaw, which lands where roll belongs (OpenVLA)
_GNM = Transform(
    (_action(None, None), Fill(5)),
    {"state": (_observed("position"), Fill(3), _observed("yaw"))},
    gripper=NONE_0,
)
_DROID = Transform(
    (Take("action_dict/cartesian_velocity", 0, 6), Take("action_dict/gripper_position", ops=(invert,))),
    {"proprio": (_observed("cartesian_position"), _observed("gripper_position"))},
    gripper=OPEN,
)
# Recorded -1 open .. 1 closed. The state's gripper is both fingers, so the state has 9 numbers.
_LIBERO = Transform(
    _CLIPPED_INVERTED, {"EEF_state": (_observed("state", 0, 6),), "gripper_state": (_observed("state", -2),)},
    gripper=OPEN,
)  # fmt: skip

TRANSFORMS: dict[str, Transform] = {
    "bridge_oxe": _BRIDGE_OXE,
    "bridge_orig": _BRIDGE_ORIG,
    "bridge_dataset": _BRIDGE_ORIG,
    "ppgm": _CARTESIAN,
    "ppgm_static": _CARTESIAN,
    "ppgm_wrist": _CARTESIAN,
    "fractal20220817_data": _RT1,
    "kuka": Transform(
        _RELATIVE,
        {
            "clip_function_input/base_pose_tool_reached": (
                Inflate("observation/clip_function_input/base_pose_tool_reached", 7),
            ),
            "gripper_closed": (Inflate("observation/gripper_closed", 1),),
        },
        _INSIDE,
        OPEN,
    ),
    # OpenVLA: its comment says the gripper is inverted; it is only clipped.
    "taco_play": Transform(
        (Take("action/rel_actions_world", 0, 6), Take("action/rel_actions_world", -1, None, (clip,))),
        {"state_eef": (_observed("robot_obs", 0, 6),), "state_gripper": (_observed("robot_obs", 7, 8),)},
        _INSIDE,
        "recorded, clipped to 0..1",
    ),
    "jaco_play": Transform(
        (_part("world_vector"), Fill(3), _RELATIVE_GRIPPER),
        {
            "state_eef": (_observed("end_effector_cartesian_pos", 0, 6),),
            "state_gripper": (_observed("end_effector_cartesian_pos", -1),),
        },
        _INSIDE,
        OPEN,
    ),
    "berkeley_cable_routing": Transform(_vectors(Fill(1)), {}, _INSIDE, NONE_0),
    "roboturk": Transform(_vectors(_part(_CLOSEDNESS, clip, invert)), {}, _INSIDE, OPEN),
    "nyu_door_opening_surprising_effectiveness": _RT1,
    "viola": Transform(_vectors(_part(_CLOSEDNESS, clip, invert)), {}, _INSIDE, OPEN),
    "berkeley_autolab_ur5": Transform(
        _vectors(_part(_CLOSEDNESS, to_absolute)), {"state": (_observed("robot_state", 6, 14),)}, _INSIDE, OPEN
    ),
    "toto": Transform(_vectors(_part("open_gripper")), {}, _INSIDE, OPEN),
    "language_table": Transform((*_AS_IS, Fill(4), Fill(1, 1.0)), {}, "observation/instruction", NONE_1),
    # OpenVLA: closedness as recorded, so 1 is closed.
    "columbia_cairlab_pusht_real": Transform(_vectors(_part(_CLOSEDNESS)), {}, _INSIDE, "1 closed, as recorded"),
    "stanford_kuka_multimodal_dataset_converted_externally_to_rlds": Transform(
        (_action(0, 3), Fill(3), _action(-1, None))
    ),
    "nyu_rot_dataset_converted_externally_to_rlds": Transform((_action(0, 7),), _EEF_GRIPPER_LOWER),
    "stanford_hydra_dataset_converted_externally_to_rlds": Transform(
        _INVERTED,
        {
            "eef_state": (_observed("state", 0, 3), _observed("state", 7, 10)),
            "gripper_state": (_observed("state", -3, -2),),
        },
        gripper=OPEN,
    ),
    "austin_buds_dataset_converted_externally_to_rlds": Transform(
        _CLIPPED_INVERTED, {"state": (_observed("state", 0, 8),)}, gripper=OPEN
    ),
    "nyu_franka_play_dataset_converted_externally_to_rlds": Transform(
        (_action(-8, -2), _action(-2, -1, clip)), {"eef_state": (_observed("state", -6),)}, gripper=OPEN
    ),
    "maniskill_dataset_converted_externally_to_rlds": Transform(_AS_IS, {"gripper_state": (_observed("state", 7, 8),)}),
    "furniture_bench_dataset_converted_externally_to_rlds": Transform(
        (_action(0, 3), _action(3, 7, euler_from_quaternion), _action(-1, None, clip, invert)),
        {"state": (_observed("state", 0, 7), _observed("state", -1))},
        gripper=OPEN,
    ),
    "cmu_franka_exploration_dataset_converted_externally_to_rlds": Transform(_WITHOUT_LAST),
    "ucsd_kitchen_dataset_converted_externally_to_rlds": Transform(
        _WITHOUT_LAST, {"joint_state": (_observed("state", 0, 7),)}
    ),
    "ucsd_pick_and_place_dataset_converted_externally_to_rlds": Transform(
        (_action(0, 3), Fill(3), _action(-1, None)), _EEF_GRIPPER_LOWER
    ),
    "austin_sailor_dataset_converted_externally_to_rlds": Transform(_CLIPPED_INVERTED, gripper=OPEN),
    "austin_sirius_dataset_converted_externally_to_rlds": Transform(_CLIPPED_INVERTED, gripper=OPEN),
    # The first of the ten future steps that are recorded. OpenVLA: rotations stay axis-angle.
    "bc_z": Transform(
        (
            Take("action/future/xyz_residual", 0, 3),
            Take("action/future/axis_angle_residual", 0, 3),
            Take("action/future/target_close", 0, 1, (invert,)),
        ),
        {},
        _INSIDE,
        OPEN,
    ),
    "utokyo_pr2_opening_fridge_converted_externally_to_rlds": _PR2,
    "utokyo_pr2_tabletop_manipulation_converted_externally_to_rlds": _PR2,
    "utokyo_xarm_pick_and_place_converted_externally_to_rlds": Transform(_AS_IS),
    "utokyo_xarm_bimanual_converted_externally_to_rlds": Transform((_action(-7, None),)),  # the right arm
    "robo_net": Transform(
        _FOUR_DOF, {"eef_state": (_observed("state", 0, 4), Fill(2)), "gripper_state": (_observed("state", -1),)}
    ),
    "berkeley_mvp_converted_externally_to_rlds": Transform(_AS_IS),
    "berkeley_rpt_converted_externally_to_rlds": Transform(_AS_IS),
    "kaist_nonprehensile_converted_externally_to_rlds": Transform(
        (_action(0, 6), Fill(1)), {"state": (_observed("state", -7),)}, gripper=NONE_0
    ),
    "stanford_mask_vit_converted_externally_to_rlds": Transform(
        _FOUR_DOF,
        {
            "eef_state": (_observed("end_effector_pose", 0, 4), Fill(2)),
            "gripper_state": (_observed("end_effector_pose", -1),),
        },
    ),
    "tokyo_u_lsmo_converted_externally_to_rlds": Transform(_AS_IS, _EEF_GRIPPER_LOWER),
    "dlr_sara_pour_converted_externally_to_rlds": Transform(_AS_IS),
    "dlr_sara_grid_clamp_converted_externally_to_rlds": Transform(_AS_IS, {"state": (_observed("state", 0, 6),)}),
    "dlr_edan_shared_control_converted_externally_to_rlds": Transform(_INVERTED, gripper=OPEN),
    "asu_table_top_converted_externally_to_rlds": Transform(
        _AS_IS, {"eef_state": (Take("ground_truth_states/EE"),), "gripper_state": (_observed("state", -1),)}
    ),
    "stanford_robocook_converted_externally_to_rlds": Transform(_AS_IS, _EEF_GRIPPER_LOWER),
    "imperialcollege_sawyer_wrist_cam": Transform(_WITHOUT_LAST),
    "iamlab_cmu_pickup_insert_converted_externally_to_rlds": Transform(
        (_action(0, 3), _action(3, 7, euler_from_quaternion), _action(7, 8)),
        {"joint_state": (_observed("state", 0, 7),), "gripper_state": (_observed("state", 7, 8),)},
    ),
    "uiuc_d3field": Transform((*_AS_IS, Fill(4)), gripper=NONE_0),
    "utaustin_mutex": Transform(_CLIPPED_INVERTED, {"state": (_observed("state", 0, 8),)}, gripper=OPEN),
    # No gripper command is recorded: the inverted gripper state stands for it.
    "berkeley_fanuc_manipulation": Transform(
        (*_AS_IS, _observed("state", 6, 7, invert)),
        {"joint_state": (_observed("state", 0, 6),), "gripper_state": (_observed("state", 6, 7),)},
        gripper=OPEN,
    ),
    "cmu_playing_with_food": Transform((_action(0, 3), _action(3, 7, euler_from_quaternion), _action(-1, None))),
    # OpenVLA: recorded are xyz, quaternion, gripper, terminate; kept are xyz and the last four, which is no rotation.
    "cmu_play_fusion": Transform((_action(0, 3), _action(-4, None)), gripper="none: the end-of-episode flag is there"),
    "cmu_stretch": Transform(
        _WITHOUT_LAST, {"eef_state": (_observed("state", 0, 3), Fill(3)), "gripper_state": (_observed("state", -1),)}
    ),
    "berkeley_gnm_recon": _GNM,
    "berkeley_gnm_cory_hall": _GNM,
    "berkeley_gnm_sac_son": _GNM,
    "droid": _DROID,
    "fmb_dataset": Transform(_AS_IS, {"proprio": (_observed("eef_pose"), _observed("state_gripper_pose"))}),
    "dobbe": Transform(_AS_IS, {"proprio": (_observed("state"),)}),
    "roboset": Transform(
        (_action(0, 7), _action(-1, None, clip, invert)), {"proprio": (_observed("state"),)}, gripper=OPEN
    ),
    "rh20t": Transform(
        (_part("tcp_base"), _part("gripper")), {"proprio": (_observed("tcp_base"), _observed("gripper_width"))}
    ),
    "tdroid_carrot_in_bowl": _CARTESIAN,
    "tdroid_pour_corn_in_pot": _CARTESIAN,
    "tdroid_flip_pot_upright": _CARTESIAN,
    "tdroid_move_object_onto_plate": _CARTESIAN,
    "tdroid_knock_object_over": _CARTESIAN,
    "tdroid_cover_object_with_towel": _CARTESIAN,
    "droid_wipe": _DROID,
    "libero_spatial_no_noops": _LIBERO,
    "libero_object_no_noops": _LIBERO,
    "libero_goal_no_noops": _LIBERO,
    "libero_10_no_noops": _LIBERO,
}
"""Dataset name (as OpenVLA writes it) -> transform. The three ppgm have no row of cameras and states there."""
