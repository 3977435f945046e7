"""Read LIBERO's demonstrations: HDF5 files in robomimic's layout, one task in each, with h5py.

    data                                   attributes problem_info, env_args, bddl_file_name, num_demos, total, ...
    data/demo_0/actions                    float64 (T, 7)
    data/demo_0/{rewards,dones}            uint8 (T,)
    data/demo_0/states                     float64 (T, n), the simulator's
    data/demo_0/obs/{agentview_rgb,eye_in_hand_rgb}           uint8 (T, height, width, 3)
    data/demo_0/obs/{ee_states,ee_pos,ee_ori,gripper_states}  float64 (T, 6), (T, 3), (T, 3), (T, 2)

Written after LIBERO's scripts/create_dataset.py; files made again by OpenVLA's regenerate_libero_dataset.py, which have
no attributes, are read too. Frames are bottom row first, as they are stored, as the simulator draws them and as our LIBERO
suite gives them: a policy's `rotation_deg` says what it wants. (Files whose `macros_image_convention` is "opencv" hold
them top row first; those alone are turned over, so that all are alike.) The gripper's action is -1 to open and +1
to close, as the environment takes it (the RLDS copies of OpenVLA have 1 for open and 0 for close).
"""

from __future__ import annotations

import contextlib
import os
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from vla.finetune.formats.hdf5_file import (
    HDF5_ERRORS,
    child,
    control_hz,
    demo_order,
    frames_upright,
    hdf5_files,
    instruction_in,
    open_hdf5,
    signature,
)
from vla.finetune.formats.source import BadEpisode, FrameSource
from vla.types import Episode, VlaError, problem

OPEN_FILES = 16
CAMERA_NAMES = {"agentview_rgb": "agentview", "eye_in_hand_rgb": "wrist"}  # as the LIBERO suite has them
ACTION_NAMES = ("dx", "dy", "dz", "rx", "ry", "rz", "gripper")
STATE_NAMES = ("x_m", "y_m", "z_m", "rx_rad", "ry_rad", "rz_rad", "left_finger_m", "right_finger_m")
STATE_KEYS = ("ee_states", "gripper_states")
"""Position and axis-angle of the gripper, then its two fingers: the state of openpi and of OpenVLA-OFT."""

_INHERITED: list[Any] = []  # files of a parent process, kept so that a fork never closes them


@dataclass(frozen=True)
class Demo:
    """One demonstration. Frames `start` <= i < `stop` of the dataset."""

    index: int
    start: int
    stop: int
    file: int
    """Which of `Hdf5Reader.files`."""
    key: str
    """Its group, such as "demo_10"."""

    def __len__(self) -> int:
        return self.stop - self.start


class Hdf5Reader(FrameSource):
    """Random access to the demonstrations of one file, or of all .hdf5 and .h5 files in a folder and below.

    Frames are read when they are asked for. Picklable: a copy opens its own files, and a forked child reopens them.
    Demonstrations without a step are left out and named in `empty`.

    Args:
        skip_bad: read the numbers of every demonstration now; leave out, and list in `bad`, files and demonstrations that
            cannot be read or used. What most demonstrations have, all must have.

    Raises:
        VlaError: no such file, not HDF5 or cut short, another layout, a dataset that is missing, of another shape or
            of another length than the actions; file, demonstration and dataset are named.
    """

    def __init__(self, path: Path | str, name: str | None = None, skip_bad: bool = False) -> None:
        self.path = Path(path)
        self.where = str(self.path)
        self.name = name or (self.path.resolve().name if self.path.is_dir() else self.path.resolve().stem)
        self.files = hdf5_files(self.path)
        self.empty: tuple[str, ...] = ()
        self._forget()
        demos: list[Demo] = []
        rates: set[float] = set()
        self._instructions: dict[int, str] = {}
        self._upright: dict[int, bool] = {}
        self._layout: dict[str, tuple[int, ...]] = {}
        usual = self._usual_demo() if skip_bad else None
        if usual is not None:
            self._learn_layout(
                child(self._data(usual[0]), usual[1], h5py.Group, self.files[usual[0]]), self.files[usual[0]]
            )
        for k, file in enumerate(self.files):
            with self._listing_bad(file, None, skip_bad):
                data = self._data(k)
                self._instructions[k] = instruction_in(data, file)
                self._upright[k] = frames_upright(data)
                rates.add(control_hz(data, file))
                for key in sorted(data, key=demo_order):
                    with self._listing_bad(file, key, skip_bad):
                        self._take(demos, k, key, skip_bad)
        if not demos:
            first = f" (the first of {len(self.bad)} bad ones: {self.bad[0].why})" if self.bad else ""
            raise problem(
                f"no demonstration with steps in {self.path}{first}", "data/demo_0 and so on", "pass other files"
            )
        self.fps = rates.pop() if len(rates) == 1 else 0.0
        self.episodes: Sequence[Demo] = demos

    def __getstate__(self) -> dict[str, Any]:
        """Without open files and what was read."""
        left_out = ("_open", "_actions", "_states", "_rewards", "_stops")
        return {name: value for name, value in self.__dict__.items() if name not in left_out}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._forget()

    def actions(self) -> np.ndarray:
        """float32 (N, 7), un-normalised: displacement and rotation in [-1, 1], gripper -1 (open) or 1 (close)."""
        return self._actions

    def states(self) -> np.ndarray | None:
        """float32 (N, 8), see STATE_NAMES; None if the files were made without proprioception. The axis-angle is as
        robosuite gives it: for some orientations it jumps between two vectors that mean the same."""
        return self._states

    def rewards(self) -> np.ndarray | None:
        return self._rewards

    def images(self, i: int, cameras: Sequence[str] | None = None) -> dict[str, np.ndarray]:
        demo = self.episodes[self.episode_of(i)]
        found = {}
        for camera in self.cameras if cameras is None else cameras:
            self.check_camera(camera)
            key = f"obs/{self._camera_keys[camera]}"
            frame = self._read(demo, key, lambda values: values[i - demo.start])
            found[camera] = np.ascontiguousarray(frame[::-1]) if self._upright[demo.file] else frame
        return found

    def image_shape(self, camera: str) -> tuple[int, int, int]:
        self.check_camera(camera)
        height, width = self._layout[f"obs/{self._camera_keys[camera]}"][:2]
        return height, width, 3

    def instruction_of(self, i: int) -> str:
        return self._instructions[self.episodes[self.episode_of(i)].file]

    def place_of(self, episode: int) -> tuple[str, str]:
        demo = self.episodes[episode]
        return str(self.files[demo.file]), demo.key

    def success_of(self, episode: int) -> bool | None:
        """Whether there was a reward; without rewards, whether it was done before it ended or at its end."""
        demo = self.episodes[episode]
        for key in ("rewards", "dones"):
            if key in self._layout:
                return bool((self._read(demo, key) > 0).any())
        return None

    def task_of(self, episode: int) -> str | None:
        """LIBERO's name of the task: the file's name without `_demo`."""
        return self.files[self.episodes[episode].file].stem.removesuffix("_demo")

    def episode(self, i: int, cameras: Sequence[str] | None = None) -> Episode:
        if not 0 <= i < self.n_episodes:
            raise problem(f"episode {i}", f"0..{self.n_episodes - 1} in {self.where}", "choose another episode")
        initial = self._read(self.episodes[i], "states", lambda v: v[0]) if "states" in self._layout else None
        return replace(super().episode(i, cameras), initial_state=initial)

    @cached_property
    def _actions(self) -> np.ndarray:
        return self._whole(["actions"])

    @cached_property
    def _states(self) -> np.ndarray | None:
        return self._whole([f"obs/{key}" for key in STATE_KEYS]) if self.state_names else None

    @cached_property
    def _rewards(self) -> np.ndarray | None:
        return self._whole(["rewards"])[:, 0] if "rewards" in self._layout else None

    def _whole(self, keys: Sequence[str]) -> np.ndarray:
        """float32 (N, width): these datasets of all demonstrations, side by side."""
        return np.concatenate([self._numbers(demo, keys) for demo in self.episodes])

    def _numbers(self, demo: Demo, keys: Sequence[str]) -> np.ndarray:
        """float32 (T, width): these datasets of one demonstration, side by side; VlaError if one is not finite."""
        rows = [np.asarray(self._read(demo, key), np.float64).reshape(len(demo), -1) for key in keys]
        values = np.concatenate(rows, axis=1).astype(np.float32)
        if not np.isfinite(values).all():
            row, column = np.argwhere(~np.isfinite(values))[0]
            place = f"{self.files[demo.file]}: {demo.key}/{'+'.join(keys)}"
            raise problem(f"{place}: {values[row, column]} at step {row}, dimension {column}", "finite numbers",
                          "remove this demonstration from the file, or make it again, or pass --skip-bad")  # fmt: skip
        return values

    def _take(self, demos: list[Demo], k: int, key: str, skip_bad: bool) -> None:
        """Append demonstration `key` of file `k` to `demos`, if it has steps."""
        data, file = self._data(k), self.files[k]
        n = self._n_steps(data, file, key)
        if n == 0:
            self.empty += (f"{file}: {key}",)
            return
        group, start = child(data, key, h5py.Group, file), demos[-1].stop if demos else 0
        if not self._layout:
            self._learn_layout(group, file)
        demo = Demo(len(demos), start, start + n, k, key)
        self._check(group, demo)
        if skip_bad:
            for names in (("actions",), tuple(f"obs/{name}" for name in STATE_KEYS), ("rewards",), ("dones",)):
                if all(name in self._layout for name in names):
                    self._numbers(demo, names)
        demos.append(demo)

    def _usual_demo(self) -> tuple[int, str] | None:
        """File and name of the first demonstration that has the datasets that most have; None if none can be read."""
        found: dict[tuple[Any, ...], list[tuple[int, str]]] = {}
        for k in range(len(self.files)):
            with contextlib.suppress(VlaError, *HDF5_ERRORS):  # it is listed later
                data = self._data(k)
                for key in sorted(data, key=demo_order):
                    with contextlib.suppress(VlaError, *HDF5_ERRORS):
                        if self._n_steps(data, self.files[k], key):
                            found.setdefault(signature(data[key]), []).append((k, key))
        return max(found.values(), key=len)[0] if found else None

    @contextlib.contextmanager
    def _listing_bad(self, file: Path, key: str | None, skip_bad: bool) -> Iterator[None]:
        """With `skip_bad`, what fails inside is added to `bad`."""
        if not skip_bad:
            yield
            return
        try:
            yield
        except (VlaError, *HDF5_ERRORS) as error:
            why = str(error) if isinstance(error, VlaError) else f"{file}: {key or 'data'}: {error}"
            self.bad += (BadEpisode(str(file), key, why),)

    def _learn_layout(self, demo: h5py.Group, file: Path) -> None:
        """What the first demonstration has, all must have."""
        observations = child(demo, "obs", h5py.Group, file)
        keys = ["actions", *(k for k in ("rewards", "dones", "states") if k in demo)]
        pictures = [key for key in observations if key.endswith("_rgb")]
        known = [key for key in CAMERA_NAMES if key in pictures]
        self._camera_keys: dict[str, str] = {CAMERA_NAMES[key]: key for key in known}
        self._camera_keys |= {key.removesuffix("_rgb"): key for key in sorted(set(pictures) - set(known))}
        self.cameras = tuple(self._camera_keys)
        has_state = any(key in observations for key in STATE_KEYS)
        self.state_names = STATE_NAMES if has_state else ()
        keys += [f"obs/{key}" for key in (*pictures, *(STATE_KEYS if has_state else ()))]
        self._layout = {key: child(demo, key, h5py.Dataset, file).shape[1:] for key in keys}
        width = int(np.prod(self._layout["actions"]))
        self.action_names = ACTION_NAMES if width == len(ACTION_NAMES) else tuple(str(i) for i in range(width))
        expected = {"obs/ee_states": (6,), "obs/gripper_states": (2,)}
        for key, shape in self._layout.items():
            wanted = (*shape[:2], 3) if key.endswith("_rgb") else expected.get(key, shape)
            if shape != wanted or (key.endswith("_rgb") and len(shape) != 3):
                raise problem(f"{file}: {demo.name}/{key} with {shape} per step", f"{wanted}", "pass a LIBERO file")

    def _check(self, group: h5py.Group, demo: Demo) -> None:
        file = self.files[demo.file]
        for key, shape in self._layout.items():
            if key == "states":  # the simulator's state differs in length from task to task
                continue
            found = child(group, key, h5py.Dataset, file)
            if found.shape != (len(demo), *shape):
                raise problem(f"{file}: {demo.key}/{key} of shape {found.shape}", f"{(len(demo), *shape)}, as the actions "
                              "and the first demonstration have it", "remove this demonstration or make it again")  # fmt: skip

    def _n_steps(self, data: h5py.Group, file: Path, key: str) -> int:
        demo = child(data, key, h5py.Group, file)
        if not len(demo) and not demo.attrs.get("num_samples", 0):
            return 0
        return int(child(demo, "actions", h5py.Dataset, file).shape[0])

    def _read(self, demo: Demo, key: str, part: Callable[[Any], Any] = lambda values: values[()]) -> np.ndarray:
        file = self.files[demo.file]
        try:
            return part(self._data(demo.file)[f"{demo.key}/{key}"])
        except HDF5_ERRORS as error:
            raise problem(
                f"{file}: {demo.key}/{key}: {error}", "readable data", "the file is damaged: copy it again"
            ) from error

    def _data(self, k: int) -> h5py.Group:
        """The group `data` of a file, which stays open for a while. HDF5 must not be shared over a fork."""
        if self._pid != os.getpid():
            _INHERITED.append(self._open)
            self._forget()
        if k not in self._open:
            self._open[k] = open_hdf5(self.files[k])
            if len(self._open) > OPEN_FILES:
                self._open.popitem(last=False)[1].close()
        self._open.move_to_end(k)
        return child(self._open[k], "data", h5py.Group, self.files[k])

    def _forget(self) -> None:
        self._pid = os.getpid()
        self._open: OrderedDict[int, h5py.File] = OrderedDict()
