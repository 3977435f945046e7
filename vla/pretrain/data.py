"""Pictures for pretraining the built-in VLM: Meta-World scenes in varied states, and what is true in each of them.

No demonstrations and no actions are kept: only frames and facts (where the gripper, the thing to touch and the goal
are, which colours, how far a joint is open). `vla.pretrain.text` turns facts into questions and answers.

A chunk is two files, `<split>-<number>.images.npy` (uint8) and `<split>-<number>.facts.npy` (`FACTS`). A chunk depends
only on its split and number, so rendering may be stopped, continued or spread over processes.
"""

from __future__ import annotations

import atexit
import importlib
import io
import math
import multiprocessing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from vla.eval.metaworld_suite import CAMERA, MetaWorldEnv, MetaWorldSuite
from vla.eval.metaworld_tasks import PRETRAINED_TASKS
from vla.files import write_bytes
from vla.types import Observation, Policy, problem

IMAGE_SIZE_PX = 160
TASKS = PRETRAINED_TASKS
CHUNK_IMAGES = 1000
FIRST_SEED = {"train": 10_000_000, "heldout": 1_000_000_000}  # far from the seeds of demonstrations and evaluations
WORKSPACE_M = np.array([[-0.5, 0.35, 0.0], [0.5, 1.0, 0.5]])  # what 0 and 255 mean in a position answer
OFTEN = ("faucet-open", "faucet-close", "drawer-close", "window-open")  # rendered twice as often as the others
COLOURS = {
    "red": (0.85, 0.1, 0.1),
    "green": (0.1, 0.7, 0.15),
    "blue": (0.1, 0.2, 0.85),
    "yellow": (0.9, 0.85, 0.1),
    "purple": (0.5, 0.1, 0.65),
    "orange": (0.95, 0.5, 0.05),
    "white": (0.95, 0.95, 0.95),
    "black": (0.08, 0.08, 0.08),
    "cyan": (0.1, 0.8, 0.85),
    "pink": (0.95, 0.5, 0.7),
}
NO_COLOUR = -1  # as Meta-World painted it

FACTS = np.dtype(
    [
        ("task", np.uint8),  # index into TASKS
        ("seed", np.int64),
        ("hand", np.float32, (3,)),  # metres, world frame
        ("opening", np.float32),  # of the fingers, [0, 1]
        ("part", np.float32, (3,)),  # the thing to touch, metres
        ("goal", np.float32, (3,)),  # metres
        ("hand_px", np.float32, (2,)),  # u (right), v (down) in the picture as saved; may lie outside
        ("part_px", np.float32, (2,)),
        ("goal_px", np.float32, (2,)),
        ("joint", np.float32),  # of the object: 0..1 of its range; NaN if it has none
        ("colour", np.int8),  # of the object: index into COLOURS, or NO_COLOUR
        ("table_colour", np.int8),
    ]
)


def chunk_paths(data_dir: Path, split: str, number: int) -> tuple[Path, Path]:
    """(images, facts) of one chunk."""
    stem = f"{split}-{number:05d}"
    return data_dir / f"{stem}.images.npy", data_dir / f"{stem}.facts.npy"


def load_chunks(data_dir: Path, split: str) -> tuple[list[np.ndarray], np.ndarray]:
    """Memory-mapped images, one array (n, 160, 160, 3) uint8 per chunk, and all facts (N,), in chunk order."""
    images, facts = [], []
    for path in sorted(data_dir.glob(f"{split}-*.facts.npy")):
        images.append(np.load(path.with_name(path.name.replace("facts", "images")), mmap_mode="r"))
        facts.append(np.load(path))
    if not facts:
        raise problem(f"no {split} chunk in {data_dir}", "rendered pictures", "let `vla pretrain` render them first")
    return images, np.concatenate(facts)


def render_all(data_dir: Path, n_train: int, n_heldout: int, processes: int) -> Iterator[tuple[int, int]]:
    """Render the missing chunks in `processes` processes; yields (done, total) after each chunk."""
    jobs = [
        (data_dir, split, number)
        for split, n in (("heldout", n_heldout), ("train", n_train))
        for number in range(math.ceil(n / CHUNK_IMAGES))
        if not chunk_paths(data_dir, split, number)[1].exists()
    ]
    if not jobs:
        return
    with multiprocessing.get_context("spawn").Pool(min(processes, len(jobs))) as pool:
        for done, _ in enumerate(pool.imap_unordered(_render_job, jobs), start=1):
            yield done, len(jobs)


_scenes: dict[str, Scene] = {}  # one simulator per task and process: building one costs as much as 20 pictures


def _render_job(job: tuple[Path, str, int]) -> None:
    data_dir, split, number = job
    images, facts = render_chunk(split, number)
    for path, array in zip(chunk_paths(data_dir, split, number), (images, facts), strict=True):
        buffer = io.BytesIO()
        np.save(buffer, array)
        write_bytes(path, buffer.getvalue())  # facts last: their presence means that the chunk is whole


def render_chunk(split: str, number: int, n_images: int = CHUNK_IMAGES) -> tuple[np.ndarray, np.ndarray]:
    """uint8 (n_images, 160, 160, 3) and `FACTS` (n_images,), from seeds nobody else uses."""
    first_seed = FIRST_SEED[split] + number * CHUNK_IMAGES
    rng = np.random.default_rng(first_seed)
    images = np.empty((n_images, IMAGE_SIZE_PX, IMAGE_SIZE_PX, 3), np.uint8)
    facts = np.empty(n_images, FACTS)
    weights = np.array([2.0 if name in OFTEN else 1.0 for name in TASKS])
    done = 0
    for episode in range(n_images):
        name = str(rng.choice(TASKS, p=weights / weights.sum()))
        if name not in _scenes:
            _scenes[name] = Scene(name)
            if len(_scenes) == 1:  # after MuJoCo's own exit functions were registered, so before they run
                atexit.register(_close_scenes)
        for image, fact in _scenes[name].episode(first_seed + episode, rng):
            images[done], facts[done] = image, fact
            done += 1
            if done == n_images:
                return images, facts
    raise AssertionError("an episode without pictures")


def _close_scenes() -> None:
    """Free the renderers while the libraries they need are still loaded."""
    for scene in _scenes.values():
        scene.env.close()
    _scenes.clear()


class Scene:
    """One task's simulator, with ways to bring it into many states."""

    def __init__(self, task: str) -> None:
        suite = MetaWorldSuite(
            (task,), image_size_px=IMAGE_SIZE_PX, max_steps=1000, action_repeat=1, max_renderers=len(TASKS)
        )
        self.env: MetaWorldEnv = suite.make(task)
        self.env.render_frames = False
        self.expert: Policy = suite.expert(task)
        self.task = TASKS.index(task)
        self.env.reset(seed=0)
        self.env.frame()  # places the camera
        model = self.env._env.model
        self._rgba, self._light = model.geom_rgba.copy(), model.light_diffuse.copy()
        robot, table = (int(model.body_rootid[model.body(name).id]) for name in ("hand", "tablelink"))
        walls = {model.body(i).id for i in range(model.nbody) if model.body(i).name in ("RetainingWall", "mocap")}
        roots = model.body_rootid[model.geom_bodyid]
        seen = model.geom_group < 3
        self._table_geoms = np.flatnonzero(seen & (roots == table))
        self._object_geoms = np.flatnonzero(seen & ~np.isin(roots, [0, robot, table, *walls]))
        self._joint = model.njnt - 1  # the arm's nine joints come first, then the object's

    def episode(self, seed: int, rng: np.random.Generator) -> list[tuple[np.ndarray, np.ndarray]]:
        """Four pictures after one reset: the expert at work with noise, or the hand sent to random places."""
        observation, _ = self.env.reset(seed=seed)
        colours = self._paint(rng)
        if rng.random() < 0.35:
            self._move_object(rng)
        by_expert = rng.random() < 0.5
        shots = []
        for _ in range(4):
            if by_expert:
                noise = rng.choice([0.0, 0.3, 1.0])
                for _ in range(int(rng.integers(3, 22))):
                    action = self.expert.act([observation])[0].actions[0] + noise * rng.normal(size=4)
                    observation = self.env.step(action.astype(np.float32))[0]
            else:
                observation = self._wander(observation, rng)
            shots.append((self.env.frame(), self._facts(observation, seed, colours)))
        return shots

    def _wander(self, observation: Observation, rng: np.random.Generator) -> Observation:
        """Go most of the way to a random place, half the time one near the thing to touch."""
        assert observation.privileged is not None
        target = rng.uniform([-0.35, 0.4, 0.03], [0.35, 0.9, 0.4])
        if rng.random() < 0.6:
            target = observation.privileged[4:7] + rng.normal(size=3) * rng.choice([0.03, 0.1]) + [0, 0, 0.03]
        grip = rng.choice([-1.0, 1.0])
        for _ in range(int(rng.integers(5, 45))):
            assert observation.privileged is not None
            offset = target - observation.privileged[:3]
            if np.abs(offset).max() < 0.01:
                break
            observation = self.env.step(np.append(offset * 25, grip).astype(np.float32))[0]
        return observation

    def _move_object(self, rng: np.random.Generator) -> None:
        """Put a hinge or slide anywhere in its range, a free object somewhere else on the table."""
        mujoco: Any = importlib.import_module("mujoco")
        model, data = self.env._env.model, self.env._env.data
        joint = model.joint(self._joint)
        if joint.type[0] == mujoco.mjtJoint.mjJNT_FREE:
            data.qpos[joint.qposadr[0] : joint.qposadr[0] + 2] += rng.uniform(-0.12, 0.12, 2)
        else:
            data.qpos[joint.qposadr[0]] = rng.uniform(*joint.range)
        mujoco.mj_forward(model, data)

    def _paint(self, rng: np.random.Generator) -> tuple[int, int]:
        """Repaint the object and the table in some episodes; indices of their colours, or NO_COLOUR."""
        model = self.env._env.model
        model.geom_rgba[:], model.light_diffuse[:] = self._rgba, self._light
        if rng.random() < 0.3:
            model.light_diffuse[:] *= rng.uniform(0.7, 1.25)
        chosen = []
        for geoms, probability in ((self._object_geoms, 0.35), (self._table_geoms, 0.2)):
            colour = int(rng.integers(len(COLOURS))) if rng.random() < probability else NO_COLOUR
            if colour != NO_COLOUR:
                rgb = np.array(list(COLOURS.values())[colour]) + rng.uniform(-0.06, 0.06, 3)
                model.geom_rgba[geoms, :3] = rgb.clip(0, 1)
            chosen.append(colour)
        return chosen[0], chosen[1]

    def _facts(self, observation: Observation, seed: int, colours: tuple[int, int]) -> np.ndarray:
        raw = observation.privileged
        assert raw is not None
        model, data = self.env._env.model, self.env._env.data
        joint = model.joint(self._joint)
        low, high = joint.range
        fact = np.zeros((), FACTS)
        fact["task"], fact["seed"], (fact["colour"], fact["table_colour"]) = self.task, seed, colours
        fact["hand"], fact["opening"], fact["part"] = raw[:3], raw[3], raw[4:7]
        fact["goal"] = self.env._env._target_pos
        fact["joint"] = (data.qpos[joint.qposadr[0]] - low) / (high - low) if high > low else np.nan
        camera = model.camera(CAMERA)
        pose = data.cam_xpos[camera.id], data.cam_xmat[camera.id].reshape(3, 3)
        for name in ("hand", "part", "goal"):
            fact[f"{name}_px"] = project(fact[name], *pose, float(camera.fovy[0]))
        return fact


def project(point_m: np.ndarray, camera_m: np.ndarray, rotation: np.ndarray, fovy_deg: float) -> np.ndarray:
    """Pixel (u, v), float (2,), of a world point in a frame that was turned upright (MuJoCo's, mirrored in both axes).

    MuJoCo's camera looks along its -z with +x right and +y up in the picture as rendered.
    """
    x, y, z = rotation.T @ (np.asarray(point_m, np.float64) - camera_m)
    focal_px = IMAGE_SIZE_PX / 2 / math.tan(math.radians(fovy_deg) / 2)
    return IMAGE_SIZE_PX / 2 + focal_px * np.array([-x, y]) / -z
