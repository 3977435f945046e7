"""OpenVLA's named mixtures of Open X-Embodiment: rows of (dataset, weight).

A dataset's share of the frames is its weight times its number of frames, over the sum of those products. From OpenVLA's
prismatic/vla/datasets/rlds/oxe/mixtures.py. Where a name stands twice the first weight holds (`oxe.mixture`).
"""

from __future__ import annotations

Mixture = tuple[tuple[str, float], ...]

_FRACTAL, _KUKA = 0.54087122203, 0.8341046294  # make fractal, kuka and bridge_orig equally frequent

_RTX: Mixture = (
    ("fractal20220817_data", _FRACTAL),
    ("kuka", _KUKA),
    ("bridge_orig", 1.0),
    ("taco_play", 2.0),
    ("jaco_play", 2.0),
    ("berkeley_cable_routing", 3.0),
    ("roboturk", 1.0),
    ("viola", 2.0),
    ("berkeley_autolab_ur5", 1.0),
    ("toto", 1.0),
)

_SOUP_ARMS: Mixture = (
    ("bridge_orig", 1.0),
    ("taco_play", 2.0),
    ("jaco_play", 1.0),
    ("berkeley_cable_routing", 1.0),
    ("roboturk", 2.0),
    ("viola", 2.0),
    ("berkeley_autolab_ur5", 2.0),
    ("toto", 1.0),
)
_LANGUAGE_TABLE: Mixture = (("language_table", 0.1),)
_SOUP_MORE: Mixture = (
    ("stanford_hydra_dataset_converted_externally_to_rlds", 2.0),
    ("austin_buds_dataset_converted_externally_to_rlds", 1.0),
    ("nyu_franka_play_dataset_converted_externally_to_rlds", 3.0),
    ("furniture_bench_dataset_converted_externally_to_rlds", 0.1),
    ("ucsd_kitchen_dataset_converted_externally_to_rlds", 2.0),
    ("austin_sailor_dataset_converted_externally_to_rlds", 1.0),
    ("austin_sirius_dataset_converted_externally_to_rlds", 1.0),
    ("dlr_edan_shared_control_converted_externally_to_rlds", 1.0),
    ("iamlab_cmu_pickup_insert_converted_externally_to_rlds", 1.0),
    ("utaustin_mutex", 1.0),
    ("berkeley_fanuc_manipulation", 2.0),
    ("cmu_stretch", 1.0),
)
_PLUS: Mixture = (
    ("bc_z", 0.2),
    ("fmb_dataset", 1.0),
    ("dobbe", 0.2),
)

_SINGLE = (
    "tdroid_carrot_in_bowl",
    "tdroid_pour_corn_in_pot",
    "tdroid_flip_pot_upright",
    "tdroid_move_object_onto_plate",
    "tdroid_knock_object_over",
    "tdroid_cover_object_with_towel",
    "droid_wipe",
    "libero_spatial_no_noops",
    "libero_object_no_noops",
    "libero_goal_no_noops",
    "libero_10_no_noops",
)

MIXTURES: dict[str, Mixture] = {
    "bridge": (("bridge_orig", 1.0),),
    "bridge_rt_1": (("bridge_orig", 1.0), ("fractal20220817_data", 1.0)),
    "rtx": _RTX,
    "rtx_franka": (
        *_RTX,
        ("taco_play", 1.0),
        ("berkeley_cable_routing", 1.0),
        ("viola", 1.0),
        ("toto", 1.0),
        ("stanford_hydra_dataset_converted_externally_to_rlds", 1.0),
        ("austin_buds_dataset_converted_externally_to_rlds", 3.0),
        ("nyu_franka_play_dataset_converted_externally_to_rlds", 3.0),
        ("maniskill_dataset_converted_externally_to_rlds", 0.1),
        ("furniture_bench_dataset_converted_externally_to_rlds", 0.1),
        ("cmu_franka_exploration_dataset_converted_externally_to_rlds", 5.0),
        ("austin_sailor_dataset_converted_externally_to_rlds", 1.0),
        ("austin_sirius_dataset_converted_externally_to_rlds", 1.0),
        ("berkeley_rpt_converted_externally_to_rlds", 1.0),
        ("kaist_nonprehensile_converted_externally_to_rlds", 3.0),
        ("stanford_robocook_converted_externally_to_rlds", 1.0),
        ("iamlab_cmu_pickup_insert_converted_externally_to_rlds", 1.0),
        ("utaustin_mutex", 1.0),
        ("cmu_play_fusion", 1.0),
    ),
    "oxe_magic_soup": (
        ("fractal20220817_data", _FRACTAL),
        ("kuka", _KUKA),
        *_SOUP_ARMS,
        *_LANGUAGE_TABLE,
        *_SOUP_MORE,
    ),
    # OpenVLA's own: droid was taken out after 70 % of the training.
    "oxe_magic_soup_plus": (
        ("fractal20220817_data", _FRACTAL),
        ("kuka", _KUKA),
        *_SOUP_ARMS,
        *_LANGUAGE_TABLE,
        *_SOUP_MORE,
        *_PLUS,
        ("droid", 0.06),
    ),
    "oxe_magic_soup_plus_minus": (
        ("fractal20220817_data", 1.0),
        ("kuka", _KUKA),
        *_SOUP_ARMS,
        *_SOUP_MORE,
        *_PLUS,
    ),
    **{name: ((name, 1.0),) for name in _SINGLE},
}
"""The 7 mixtures, and the 11 datasets that OpenVLA also lets one call by a mixture's name."""
