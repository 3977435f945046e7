"""Open X-Embodiment by name, against OpenVLA's own functions.

`golden/oxe_transforms.npz`: for each of the 60 functions that OpenVLA's `OXE_STANDARDIZATION_TRANSFORMS` names, one to
five episodes of 12 steps (`function|episode|in|column`, "/" written ":") of random numbers of the recorded shapes and
types, with gripper commands all open, all closed, and in between, and quaternions at and near gimbal lock; and what the
function made of them with TensorFlow 2.21 and tensorflow_graphics 2021.12.3 (`...|out|action`, `state`, `language`,
`frames`), the state put together as `make_dataset_from_rlds` does. `zero_action_filter|in`, `|out`: DROID's filter.
`golden/oxe_registry.json`: OpenVLA's configs, mixtures, and what `get_oxe_dataset_kwargs_and_weights` makes of them.
"""

from __future__ import annotations

import json
import pickle
import zlib
from pathlib import Path

import numpy as np
import pytest

from vla.finetune.data.standard import Standardizer
from vla.finetune.oxe.configs import ACTION_NAMES, DATASETS, EEF_GRIPPER, EEF_R6, POS_EULER, OxeDataset
from vla.finetune.oxe.mixtures import MIXTURES
from vla.finetune.oxe.ops import binarize, euler_from_quaternion, to_absolute
from vla.finetune.oxe.registry import (
    OxeStandardizer,
    absolute_mask,
    arm_moves,
    dataset_name,
    instructions,
    mixture,
    oxe_standardizer,
    usable,
)
from vla.finetune.oxe.transforms import TRANSFORMS
from vla.types import VlaError

GOLDEN = Path(__file__).parent / "golden"
REGISTRY = json.loads((GOLDEN / "oxe_registry.json").read_text())
KUKA_COMPRESSED = ("observation/clip_function_input/base_pose_tool_reached", "observation/gripper_closed")
_PPGM = OxeDataset("image", None, None, (None,) * 3, EEF_GRIPPER, POS_EULER, "EEF_POS", DATASETS["bridge_orig"].state_names,
                   False, "")  # fmt: skip


@pytest.fixture(scope="module")
def golden() -> dict[str, dict[str, np.ndarray]]:
    """ "function|episode" -> {"in|column": array, "out|action": array, ...}."""
    cases: dict[str, dict[str, np.ndarray]] = {}
    with np.load(GOLDEN / "oxe_transforms.npz", allow_pickle=False) as file:
        for key in file.files:
            function, episode, rest = key.split("|", 2) if key.count("|") == 3 else (key.split("|")[0], "0", key)
            cases.setdefault(f"{function}|{episode}", {})[rest] = file[key]
    return cases


def columns_of(case: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """As a reader gives them: text is an array of `str` objects."""
    columns = {key[3:].replace(":", "/"): array for key, array in case.items() if key.startswith("in|")}
    return {key: array.astype(object) if array.dtype.kind == "U" else array for key, array in columns.items()}


def standardizer(name: str) -> OxeStandardizer:
    if name in DATASETS:
        return oxe_standardizer(name, cameras=(), drop_idle=False)
    return OxeStandardizer(name, _PPGM, TRANSFORMS[name], {})


def episode(name: str, golden: dict[str, dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    return columns_of(golden[f"{REGISTRY['transforms'][name]}|0"])


def test_the_same_names() -> None:
    assert len(DATASETS) == 70 and len(TRANSFORMS) == 73 and len(MIXTURES) == 18
    assert list(TRANSFORMS) == list(REGISTRY["transforms"])
    assert sorted(set(TRANSFORMS) - set(DATASETS)) == ["ppgm", "ppgm_static", "ppgm_wrist"]


@pytest.mark.parametrize("name", list(TRANSFORMS))
def test_transform_equals_openvlas(name: str, golden: dict[str, dict[str, np.ndarray]]) -> None:
    function = REGISTRY["transforms"][name]
    cases = [case for key, case in golden.items() if key.split("|")[0] == function]
    assert len(cases) in (1, 5)
    for case in cases:
        columns = columns_of(case)
        before = {key: array.copy() for key, array in columns.items()}
        made = standardizer(name)(columns)
        assert made.actions.dtype == np.float32 and made.states is not None and made.states.dtype == np.float32
        if "quaternion" in str(TRANSFORMS[name].action):
            np.testing.assert_allclose(made.actions, case["out|action"], rtol=0, atol=1e-6)
        else:
            np.testing.assert_array_equal(made.actions, case["out|action"])
        np.testing.assert_array_equal(made.states, case["out|state"])
        np.testing.assert_array_equal(made.frames, case["out|frames"])
        assert made.frames.dtype == np.int64
        assert made.instructions == tuple(case["out|language"])
        for key, array in before.items():
            np.testing.assert_array_equal(columns[key], array, err_msg="its input was changed")


def test_kuka_reads_what_it_stores_compressed(golden: dict[str, dict[str, np.ndarray]]) -> None:
    plain = episode("kuka", golden)
    squeezed = dict(plain)
    for key in KUKA_COMPRESSED:
        squeezed[key] = np.array([zlib.compress(row.tobytes()) for row in plain[key]], object)
    kuka = oxe_standardizer("kuka")
    np.testing.assert_array_equal(kuka(squeezed).states, kuka(plain).states)
    for value, text in (
        (b"junk", r"step 3 of observation/gripper_closed: .*expected zlib-compressed float32"),
        (zlib.compress(bytes(8)), r"step 3 of observation/gripper_closed: 8 bytes; expected 4"),
        ("text", r"step 3 of observation/gripper_closed: .*expected zlib-compressed float32"),
        (7, r"observation/gripper_closed of type int; expected zlib-compressed bytes"),
    ):
        broken = {**squeezed, "observation/gripper_closed": squeezed["observation/gripper_closed"].copy()}
        broken["observation/gripper_closed"][3] = value
        with pytest.raises(VlaError, match="kuka: got " + text):
            kuka(broken)


@pytest.mark.parametrize("name", list(DATASETS))
def test_row_equals_openvlas(name: str) -> None:
    row, wanted = DATASETS[name], REGISTRY["configs"][name]
    assert [row.primary, row.secondary, row.wrist] == wanted["images"]
    assert list(row.depth) == wanted["depth"]
    assert list(row.state) == wanted["state"]
    assert (row.state_encoding, row.action_encoding) == (wanted["state_encoding"], wanted["action_encoding"])
    assert row.drop_idle == wanted["filtered"]
    reader = oxe_standardizer(name, cameras=tuple(row.cameras))
    assert reader.cameras == row.cameras and len(set(reader.state_names)) == len(reader.state_names)
    if name in REGISTRY["masks"]:
        assert list(reader.absolute_action_mask) == REGISTRY["masks"][name]["absolute"]
        assert list(reader.action_normalization_mask) == REGISTRY["masks"][name]["normalized"]


def test_registry_has_no_other_rows() -> None:
    assert list(DATASETS) == list(REGISTRY["configs"]) and list(MIXTURES) == list(REGISTRY["mixtures"])
    assert absolute_mask(EEF_R6) == (False,) * 9 + (True,) and len(ACTION_NAMES[EEF_R6]) == 10


@pytest.mark.parametrize("name", list(MIXTURES))
def test_mixture_equals_openvlas(name: str) -> None:
    assert [list(row) for row in MIXTURES[name]] == REGISTRY["mixtures"][name]
    assert [list(row) for row in mixture(name)] == REGISTRY["materialized"][name]
    for dataset, _ in mixture(name):
        assert "primary" in oxe_standardizer(dataset).cameras


def test_what_a_mixture_leaves_out() -> None:
    out = usable(MIXTURES["rtx_franka"])[1]
    assert [name for name, _, _ in out] == ["taco_play", "berkeley_cable_routing", "viola", "toto",
                                            "berkeley_rpt_converted_externally_to_rlds"]  # fmt: skip
    assert "JOINT_POS" in out[-1][2]
    assert dict(mixture("rtx_franka"))["berkeley_cable_routing"] == 3.0


def test_droid_is_read_without_its_idle_steps(golden: dict[str, dict[str, np.ndarray]]) -> None:
    case = golden["zero_action_filter|0"]
    actions, kept = case["zero_action_filter|in"], case["zero_action_filter|out"]
    assert 10 < kept.sum() < 40
    np.testing.assert_array_equal(arm_moves(actions), kept)

    columns = episode("droid", golden)
    columns["action_dict/cartesian_velocity"] = columns["action_dict/cartesian_velocity"].copy()
    columns["action_dict/cartesian_velocity"][[0, 4, 5]] = 0
    made = oxe_standardizer("droid")(columns)
    assert made.frames.tolist() == [1, 2, 3, 6, 7, 8, 9, 10, 11]
    assert len(made.actions) == len(made.instructions) == 9 and made.states is not None
    whole = oxe_standardizer("droid", drop_idle=False)(columns)
    np.testing.assert_array_equal(whole.actions[made.frames], made.actions)
    assert whole.states is not None
    np.testing.assert_array_equal(whole.states[made.frames], made.states)
    assert whole.frames.tolist() == list(range(12))


def test_without_proprioception_its_columns_are_not_needed(golden: dict[str, dict[str, np.ndarray]]) -> None:
    columns = episode("libero_goal_no_noops", golden)
    reader: Standardizer = oxe_standardizer("libero_goal_no_noops", ("primary", "wrist"), proprio=False)
    assert reader.keys == ("action", "language_instruction") and reader.state_names == ()
    assert reader.cameras == {"primary": "observation/image", "wrist": "observation/wrist_image"}
    made = reader({key: columns[key] for key in reader.keys})
    assert made.states is None and made.actions.shape == (12, 7)
    # Bridge's actions are made from its states.
    assert oxe_standardizer("bridge_orig", proprio=False).keys == (
        "observation/state",
        "action",
        "language_instruction",
    )


def test_columns_read_are_named_once_and_readers_can_be_sent_to_other_processes() -> None:
    for name in DATASETS:
        reader = oxe_standardizer(name, cameras=())
        assert len(set(reader.keys)) == len(reader.keys)
        assert pickle.loads(pickle.dumps(reader)).keys == reader.keys


def test_an_episode_too_short_for_what_is_dropped_is_empty(golden: dict[str, dict[str, np.ndarray]]) -> None:
    columns = episode("bridge_orig", golden)
    bridge = oxe_standardizer("bridge_orig")
    for n in (1, 2):
        made = bridge({key: array[:n] for key, array in columns.items()})
        assert made.actions.shape == (0, 7) and made.states is not None and made.states.shape == (0, 8)
        assert made.instructions == () and made.frames.shape == (0,)
    assert bridge({key: array[:3] for key, array in columns.items()}).frames.tolist() == [1]


@pytest.mark.parametrize(
    ("name", "full"),
    [
        ("bridge_orig", "bridge_orig"),
        ("bridge", "bridge_oxe"),
        ("fractal", "fractal20220817_data"),
        ("fmb", "fmb_dataset"),
        ("stanford_hydra", "stanford_hydra_dataset_converted_externally_to_rlds"),
        ("berkeley_mvp", "berkeley_mvp_converted_externally_to_rlds"),
        ("bc_z/0.1.0", "bc_z"),
        ("kuka:0.1.0", "kuka"),
    ],
)
def test_names_that_may_be_shorter(name: str, full: str) -> None:
    assert dataset_name(name) == full


def test_unknown_names() -> None:
    with pytest.raises(VlaError, match=r"dataset 'bridge_orgi'; expected one of \d+ names, nearest bridge_orig"):
        oxe_standardizer("bridge_orgi")
    with pytest.raises(VlaError, match=r"dataset 'libero'; .*libero_10_no_noops.*fix: `vla data list` shows them all"):
        oxe_standardizer("libero")
    with pytest.raises(VlaError, match=r"mixture 'magic_soup'; expected one of 18 names, nearest oxe_magic_soup,"):
        mixture("magic_soup")
    with pytest.raises(VlaError, match=r"dataset 'zzz'; expected one of 73 names; fix"):
        dataset_name("zzz")
    with pytest.raises(VlaError, match=r"dataset 'ppgm', for which OpenVLA has a transform but no cameras"):
        oxe_standardizer("ppgm")
    with pytest.raises(VlaError, match=r"camera 'primary' of nyu_door_opening_\w+; expected one of wrist;"):
        oxe_standardizer("nyu_door_opening_surprising_effectiveness")
    with pytest.raises(VlaError, match=r"camera 'left' of kuka; expected one of primary;"):
        oxe_standardizer("kuka", ("left",))


def test_columns_that_are_not_the_datasets(golden: dict[str, dict[str, np.ndarray]]) -> None:
    columns = episode("bridge_orig", golden)
    bridge = oxe_standardizer("bridge_orig")

    def without(key: str, **other: np.ndarray) -> dict[str, np.ndarray]:
        return {**{k: v for k, v in columns.items() if k != key}, **other}

    with pytest.raises(VlaError, match=r"no column 'observation/state' in bridge_orig \(has observation/states\); "
                                       r"expected the columns observation/state, action, language_instruction; "
                                       r"fix: this is another version of the dataset"):  # fmt: skip
        bridge(without("observation/state", **{"observation/states": columns["observation/state"]}))
    with pytest.raises(VlaError, match=r"no column .* \(has nothing\)"):
        bridge({})
    with pytest.raises(VlaError, match=r"columns of bridge_orig with {.*'action': 11.*} steps"):
        bridge({**columns, "action": columns["action"][:11]})
    with pytest.raises(VlaError, match=r"bridge_orig: got column 'action' of float32 with shape \(12, 7, 1\)"):
        bridge({**columns, "action": columns["action"][..., None]})
    with pytest.raises(
        VlaError, match=r"column 'language_instruction' of float32 with shape \(10, 7\); expected one text"
    ):
        bridge({**columns, "language_instruction": columns["action"]})
    with pytest.raises(VlaError, match=r"action of 3 numbers from bridge_orig; expected 7: dx, dy"):
        bridge({**columns, "observation/state": columns["observation/state"][:, :2]})
    libero = oxe_standardizer("libero_10_no_noops")
    other = episode("libero_10_no_noops", golden)
    with pytest.raises(VlaError, match=r"state of 3 numbers from libero_10_no_noops; expected 9: x, y"):
        libero({**other, "observation/state": other["observation/state"][:, :1]})
    broken = columns["observation/state"].copy()
    broken[5, 2] = np.nan
    with pytest.raises(VlaError, match=r"bridge_orig: got observation/state = .*nan.* at step 5"):
        bridge({**columns, "observation/state": broken})
    quaternions = episode("cmu_playing_with_food", golden)
    quaternions["action"] = quaternions["action"] * np.float32(3)
    with pytest.raises(
        VlaError, match=r"action whose values have no euler_from_quaternion; expected rotations of unit"
    ):
        oxe_standardizer("cmu_playing_with_food")(quaternions)


def test_texts() -> None:
    words = np.array(["pick", "π"], object)
    assert instructions("k", words) == instructions("k", np.array([w.encode() for w in words], object)) == ("pick", "π")
    assert instructions("k", np.array([[104, 105, 0, 106], [0, 1, 2, 3], [97, 98, 99, 0x20AC]])) == ("hi", "", "abc€")
    assert instructions("k", np.array([[0xD800, 97]])) == ("\ufffda",)
    with pytest.raises(VlaError, match=r"k = b'\\xff'; expected UTF-8 text"):
        instructions("k", np.array([b"\xff"], object))
    with pytest.raises(VlaError, match="k of type int; expected text"):
        instructions("k", np.array([3], object))


def test_gripper_operations_as_written_in_openvlas_docstrings() -> None:
    rng = np.random.default_rng(5)
    for _ in range(200):
        x = rng.choice([0, 1, 0.5, 0.96, 0.94, 0.04, -1, -0.05, -0.2], size=(rng.integers(1, 9), 1)).astype(np.float32)
        carry, wanted = x[-1, 0], np.empty(len(x), np.float32)
        for i in reversed(range(len(x))):
            carry = carry if 0.05 <= x[i, 0] <= 0.95 else np.float32(x[i, 0] > 0.95)
            wanted[i] = carry
        np.testing.assert_array_equal(binarize(x)[:, 0], wanted)
        np.testing.assert_array_equal(binarize(binarize(x)), binarize(x))

        commands = [1 if v < -0.1 else -1 if v > 0.1 else 0 for v in x[:, 0]]
        carry = next((-c for c in commands if c), 1)
        for i, command in enumerate(commands):
            carry = command or carry
            wanted[i] = carry / 2 + 0.5
        np.testing.assert_array_equal(to_absolute(x)[:, 0], wanted)


def test_euler_angles_give_the_rotation_back() -> None:
    q = np.random.default_rng(6).normal(size=(200, 4))
    q /= np.linalg.norm(q, axis=1, keepdims=True)
    x, y, z, w = q.T
    wanted = np.array([[1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)],
                       [2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)],
                       [2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)]]).transpose(2, 0, 1)  # fmt: skip
    a, b, c = euler_from_quaternion(q).T
    one, zero = np.ones_like(a), np.zeros_like(a)
    rx = np.array([[one, zero, zero], [zero, np.cos(a), -np.sin(a)], [zero, np.sin(a), np.cos(a)]]).transpose(2, 0, 1)
    ry = np.array([[np.cos(b), zero, np.sin(b)], [zero, one, zero], [-np.sin(b), zero, np.cos(b)]]).transpose(2, 0, 1)
    rz = np.array([[np.cos(c), -np.sin(c), zero], [np.sin(c), np.cos(c), zero], [zero, zero, one]]).transpose(2, 0, 1)
    np.testing.assert_allclose(rz @ ry @ rx, wanted, atol=1e-9)
