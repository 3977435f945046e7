"""Files as LIBERO's scripts/create_dataset.py writes them: the same groups, datasets, types and attributes, smaller."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from vla.eval.libero_suite import LiberoSuite
from vla.finetune.formats.hdf5_file import demo_order, instruction_from_name
from vla.finetune.formats.hdf5_reader import ACTION_NAMES, CAMERA_NAMES, STATE_NAMES, Hdf5Reader
from vla.finetune.formats.source import FrameSource
from vla.types import VlaError

TASK = "pick_up_the_black_bowl_on_the_stove_and_place_it_on_the_plate"
LENGTHS = {"demo_0": 5, "demo_1": 4, "demo_2": 6, "demo_10": 3}


def write(path: Path, lengths: dict[str, int] | None = None, seed: int = 0, attributes: bool = True) -> Path:
    """As create_dataset.py: groups in the order demo_0, demo_1, ..., which HDF5 lists as demo_0, demo_1, demo_10, ..."""
    lengths, rng = LENGTHS if lengths is None else lengths, np.random.default_rng(seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        data = file.create_group("data")
        if attributes:
            bddl = f"chiliocosm/bddl_files/libero_spatial/{TASK}.bddl"
            problem = {"problem_name": "libero_tabletop_manipulation", "domain_name": "robosuite",
                       "language_instruction": "Pick the akita black bowl on the stove and place it on the plate"}  # fmt: skip
            env = {"type": 1, "env_name": "Libero_Tabletop_Manipulation", "problem_name": problem["problem_name"],
                   "bddl_file": bddl, "env_kwargs": {"robots": ["Panda"], "control_freq": 20, "camera_heights": 128}}  # fmt: skip
            data.attrs.update({"env_name": env["env_name"], "problem_info": json.dumps(problem),
                               "macros_image_convention": "opengl", "bddl_file_name": bddl,
                               "bddl_file_content": "(define (problem LIBERO_Tabletop_Manipulation))",
                               "env_args": json.dumps(env), "num_demos": len(lengths), "total": sum(lengths.values()),
                               "tag": "libero-v1"})  # fmt: skip
        for key, n in lengths.items():
            demo = data.create_group(key)
            obs = demo.create_group("obs")
            ee = rng.normal(size=(n, 6))
            for name, values in {
                "gripper_states": rng.normal(size=(n, 2)), "joint_states": rng.normal(size=(n, 7)), "ee_states": ee,
                "ee_pos": ee[:, :3], "ee_ori": ee[:, 3:],
                "agentview_rgb": rng.integers(0, 256, (n, 16, 20, 3), np.uint8),
                "eye_in_hand_rgb": rng.integers(0, 256, (n, 16, 20, 3), np.uint8),
            }.items():  # fmt: skip
                obs.create_dataset(name, data=values)
            end = np.zeros(n, np.uint8)
            end[-1:] = 1
            demo.create_dataset("actions", data=rng.uniform(-1, 1, (n, 7)))
            demo.create_dataset("states", data=rng.normal(size=(n, 12)))
            demo.create_dataset("robot_states", data=rng.normal(size=(n, 9)))
            demo.create_dataset("rewards", data=end)
            demo.create_dataset("dones", data=end)
            demo.attrs.update({"num_samples": n, "model_file": "<mujoco/>", "init_state": np.zeros(12)})
    return path


def change(path: Path, key: str, value: Any) -> None:
    """Replace a dataset; None removes it."""
    with h5py.File(path, "r+") as file:
        del file[key]
        if value is not None:
            file[key] = value


@pytest.fixture
def demos(tmp_path) -> Path:
    return write(tmp_path / f"libero_spatial/{TASK}_demo.hdf5")


def test_numbers_names_and_frames(demos):
    reader = Hdf5Reader(demos)
    assert isinstance(reader, FrameSource)
    assert (len(reader), reader.n_episodes, reader.fps, reader.where) == (18, 4, 20.0, str(demos))
    assert reader.cameras == ("agentview", "wrist") and reader.image_shape("wrist") == (16, 20, 3)
    assert [demo.key for demo in reader.episodes] == ["demo_0", "demo_1", "demo_2", "demo_10"]
    assert [(d.index, d.start, d.stop) for d in reader.episodes] == [(0, 0, 5), (1, 5, 9), (2, 9, 15), (3, 15, 18)]
    actions, states, rewards = reader.actions(), reader.states(), reader.rewards()
    assert actions.dtype == np.float32 and states is not None and states.dtype == np.float32 and rewards is not None
    with h5py.File(demos) as file:
        for demo in reader.episodes:
            group, rows = file["data"][demo.key], slice(demo.start, demo.stop)
            np.testing.assert_array_equal(actions[rows], group["actions"][()].astype(np.float32))
            wanted = np.hstack([group["obs/ee_pos"], group["obs/ee_ori"], group["obs/gripper_states"]])
            np.testing.assert_array_equal(states[rows], wanted.astype(np.float32))
            np.testing.assert_array_equal(rewards[rows], group["rewards"])
            for k in range(len(demo)):
                images = reader.images(demo.start + k)
                np.testing.assert_array_equal(images["agentview"], group["obs/agentview_rgb"][k])
                np.testing.assert_array_equal(images["wrist"], group["obs/eye_in_hand_rgb"][k])
    assert list(reader.images(0, ["wrist"])) == ["wrist"] and reader.images(0, []) == {}


def test_names_are_those_of_the_suite():
    suite = LiberoSuite("libero_spatial")
    assert tuple(suite.action_names) == ACTION_NAMES and tuple(suite.state_names) == STATE_NAMES
    assert tuple(suite.cameras) == tuple(CAMERA_NAMES.values()) and suite.frames_upside_down


def test_episode(demos):
    episode = Hdf5Reader(demos, name="libero_spatial").episode(2, cameras=())
    assert (len(episode), episode.dataset, episode.success, episode.task) == (6, "libero_spatial", True, TASK)
    assert episode.instruction == "Pick the akita black bowl on the stove and place it on the plate"
    assert [step.reward for step in episode.steps] == [0.0] * 5 + [1.0]
    assert [step.success for step in episode.steps] == [False] * 5 + [True]
    with h5py.File(demos) as file:
        np.testing.assert_array_equal(episode.initial_state, file["data/demo_2/states"][0])


def test_success_without_rewards(demos):
    for key in LENGTHS:
        change(demos, f"data/{key}/rewards", None)
    change(demos, "data/demo_1/dones", np.zeros(4, np.uint8))
    reader = Hdf5Reader(demos)
    assert reader.rewards() is None and [reader.success_of(i) for i in range(4)] == [True, False, True, True]
    del reader  # HDF5 opens a file either for reading or for writing
    for key in LENGTHS:
        change(demos, f"data/{key}/dones", None)
    assert Hdf5Reader(demos).success_of(0) is None and Hdf5Reader(demos).episode(0, ()).success is None


def test_folder_of_files_without_attributes(tmp_path):
    """What OpenVLA's regenerate_libero_dataset.py leaves: no attributes; the instruction is the file's name."""
    write(tmp_path / "KITCHEN_SCENE10_close_the_top_drawer_demo.hdf5", {"demo_0": 2}, seed=1, attributes=False)
    write(tmp_path / "open_the_drawer_demo.hdf5", {"demo_0": 3, "demo_1": 2}, seed=2, attributes=False)
    (tmp_path / "notes.txt").write_text("not data")
    reader = Hdf5Reader(tmp_path, name="both")
    assert (len(reader), reader.n_episodes, reader.fps) == (7, 3, 0.0)
    assert [reader.instruction_of(i) for i in (0, 1, 2, 6)] == ["close the top drawer"] * 2 + ["open the drawer"] * 2
    assert [reader.task_of(i) for i in (0, 2)] == ["KITCHEN_SCENE10_close_the_top_drawer", "open_the_drawer"]


def test_instructions_and_order():
    assert (
        instruction_from_name("LIVING_ROOM_SCENE5_put_the_red_mug_on_the_left_plate")
        == "put the red mug on the left plate"
    )
    assert instruction_from_name("open_the_middle_drawer") == "open the middle drawer"
    assert sorted(["demo_10", "demo_9", "demo_0", "x"], key=demo_order) == ["x", "demo_0", "demo_9", "demo_10"]


@pytest.mark.parametrize("text", ['"put it there"', ["put", "it", "there"], "put it there "])
def test_forms_of_the_instruction(demos, text):
    with h5py.File(demos, "r+") as file:
        file["data"].attrs["problem_info"] = json.dumps({"language_instruction": text})
    assert Hdf5Reader(demos).instruction_of(0) == "put it there"


def test_files_in_the_other_convention_are_turned_over(demos):
    before = Hdf5Reader(demos).images(0)["agentview"]
    with h5py.File(demos, "r+") as file:
        file["data"].attrs["macros_image_convention"] = "opencv"
    np.testing.assert_array_equal(Hdf5Reader(demos).images(0)["agentview"], before[::-1])


def test_pickle_and_fork(demos):
    reader = Hdf5Reader(demos)
    first = reader.images(7)["wrist"]
    other = pickle.loads(pickle.dumps(reader))
    np.testing.assert_array_equal(other.images(7)["wrist"], first)
    np.testing.assert_array_equal(other.actions(), reader.actions())
    receive, send = os.pipe()
    child = os.fork()
    if child == 0:
        same = np.array_equal(reader.images(7)["wrist"], first) and reader._pid == os.getpid()
        os.write(send, b"y" if same else b"n")
        os._exit(0)
    os.waitpid(child, 0)
    assert os.read(receive, 1) == b"y"
    np.testing.assert_array_equal(reader.images(7)["wrist"], first)


def test_demonstrations_without_steps_are_left_out(tmp_path):
    path = write(tmp_path / "a_demo.hdf5", {"demo_0": 0, "demo_1": 3})
    with h5py.File(path, "r+") as file:
        file["data"].create_group("demo_2")
    reader = Hdf5Reader(path)
    assert [demo.key for demo in reader.episodes] == ["demo_1"]
    assert reader.empty == (f"{path}: demo_0", f"{path}: demo_2")
    with pytest.raises(VlaError, match=r"no demonstration with steps in .*b_demo.hdf5"):
        Hdf5Reader(write(tmp_path / "b_demo.hdf5", {"demo_0": 0}))


def test_without_proprioception(demos):
    for key in LENGTHS:
        for name in ("ee_states", "ee_pos", "ee_ori", "gripper_states", "joint_states"):
            change(demos, f"data/{key}/obs/{name}", None)
    reader = Hdf5Reader(demos)
    assert reader.states() is None and reader.state_names == () and reader.episode(0).steps[0].observation.state is None


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("data/demo_1/obs/ee_states", None, r"demo_1 without obs/ee_states \(it has obs, actions|demo_1 without obs/ee_states"),
        ("data/demo_10/obs/agentview_rgb", None, r"_demo.hdf5: demo_10 without obs/agentview_rgb"),
        ("data/demo_0/actions", None, r"_demo.hdf5: demo_0 without actions \(it has dones"),
        ("data/demo_0/obs/gripper_states", None, r"demo_0 without obs/gripper_states"),
        ("data/demo_2/obs/eye_in_hand_rgb", np.zeros((5, 16, 20, 3), np.uint8), r"demo_2/obs/eye_in_hand_rgb of shape \(5, 16, 20, 3\); expected \(6, 16, 20, 3\)"),
        ("data/demo_2/actions", np.zeros((6, 6)), r"demo_2/actions of shape \(6, 6\); expected \(6, 7\)"),
        ("data/demo_0/obs/agentview_rgb", np.zeros((5, 16, 20), np.uint8), r"demo_0/obs/agentview_rgb with \(16, 20\) per step"),
        ("data/demo_2/actions", np.full((6, 7), np.nan), r"_demo.hdf5: demo_2/actions: nan at step 0, dimension 0; expected finite"),
        ("data/demo_1/obs/gripper_states", np.full((4, 2), np.inf), r"demo_1/obs/ee_states\+obs/gripper_states: inf at step 0, dimension 6"),
    ],
)  # fmt: skip
def test_bad_data(demos, key, value, message):
    change(demos, key, value)
    with pytest.raises(VlaError, match=message):
        reader = Hdf5Reader(demos)
        reader.actions(), reader.states()


def test_bad_files(demos, tmp_path):
    with pytest.raises(VlaError, match=r"no file .*nothing.hdf5; expected an HDF5 file"):
        Hdf5Reader(tmp_path / "nothing.hdf5")
    (tmp_path / "empty").mkdir()
    with pytest.raises(VlaError, match=r"no .hdf5 file in .*empty"):
        Hdf5Reader(tmp_path / "empty")
    other = tmp_path / "other.hdf5"
    other.write_bytes(b"PK not HDF5")
    with pytest.raises(VlaError, match=r"other.hdf5 \(11 bytes\): .*expected a whole HDF5 file"):
        Hdf5Reader(other)
    whole = demos.read_bytes()
    for keep in (0.0, 0.3, 0.99):
        demos.write_bytes(whole[: int(len(whole) * keep)])
        with pytest.raises(VlaError, match=r"_demo.hdf5 \(\d+ bytes\): .*fix: the file is cut short"):
            Hdf5Reader(demos)
    with h5py.File(other, "w") as file:
        file["x"] = 1
    with pytest.raises(VlaError, match=r"other.hdf5: / without data \(it has x\); expected LIBERO's layout"):
        Hdf5Reader(other)
    demos.write_bytes(whole)
    with h5py.File(demos, "r+") as file:
        file["data"].attrs["problem_info"] = "{"
    with pytest.raises(VlaError, match=r"attribute problem_info of data: .*expected a JSON object"):
        Hdf5Reader(demos)


def test_unknown_camera_frame_and_episode(demos):
    reader = Hdf5Reader(demos)
    with pytest.raises(VlaError, match=r"camera 'front'; expected one of agentview, wrist"):
        reader.images(0, ["front"])
    with pytest.raises(VlaError, match=r"frame 18; expected 0\.\.17"):
        reader.images(18)
    with pytest.raises(VlaError, match=r"episode 4; expected 0\.\.3"):
        reader.episode(4)


def test_the_name_of_a_folder_with_a_dot(tmp_path):
    write(tmp_path / "goal.v1" / "open_the_drawer_demo.hdf5")
    assert Hdf5Reader(tmp_path / "goal.v1").name == "goal.v1"
    assert Hdf5Reader(tmp_path / "goal.v1/open_the_drawer_demo.hdf5").name == "open_the_drawer_demo"
