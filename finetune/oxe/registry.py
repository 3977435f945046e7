"""Open X-Embodiment by name: what each dataset records, how it becomes actions and states, and OpenVLA's mixtures.

`oxe_standardizer("bridge_orig")` reads a dataset as OpenVLA does; `mixture("oxe_magic_soup_plus")` is what it trains on.
Rows: `oxe_configs`, `oxe_transforms`, `oxe_mixtures`.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from vla.finetune.data.standard import Standard
from vla.finetune.oxe.configs import ACTION_NAMES, DATASETS, EEF_POS, EEF_R6, OxeDataset
from vla.finetune.oxe.mixtures import MIXTURES
from vla.finetune.oxe.ops import Transform, join
from vla.finetune.oxe.transforms import TRANSFORMS
from vla.types import VlaError, problem

ALIASES = {"bridge": "bridge_oxe", "fractal": "fractal20220817_data", "rt1": "fractal20220817_data"}
"""`bridge` is the folder's name in the public bucket. The endings of `_ENDINGS` may be left out of any name."""

_ENDINGS = ("_dataset_converted_externally_to_rlds", "_converted_externally_to_rlds", "_dataset", "_data")

# q01 and q99 of DROID's actions that OpenVLA wrote into its filter (oxe/utils/droid_utils.py, `zero_action_filter`).
_DROID_Q01 = np.array([-0.7776297926902771, -0.5803514122962952, -0.5795090794563293,
                       -0.6464047729969025, -0.7041108310222626, -0.8895104378461838])  # fmt: skip
_DROID_Q99 = np.array([0.7597932070493698, 0.5726242214441299, 0.7351000607013702,
                       0.6705610305070877, 0.6464948207139969, 0.8897542208433151])  # fmt: skip


class OxeStandardizer:
    """The rule of one dataset; see `vla.finetune.data.standard.Standardizer`."""

    def __init__(self, name: str, row: OxeDataset, transform: Transform, cameras: Mapping[str, str],
                 proprio: bool = True, drop_idle: bool = True) -> None:  # fmt: skip
        """`cameras`: camera name -> flattened key. See `oxe_standardizer` for the rest."""
        self.name = name
        self.row = row
        self.transform = transform
        self.cameras: Mapping[str, str] = dict(cameras)
        self.action_names: tuple[str, ...] = ACTION_NAMES[row.action_encoding]
        self.state_names: tuple[str, ...] = row.state_names if proprio else ()
        self.gripper = transform.gripper
        self.drop_idle = drop_idle and row.drop_idle
        self._state = transform.state_parts(row.state) if proprio else ()

    @property
    def absolute_action_mask(self) -> tuple[bool, ...]:
        """Which action numbers are targets; the others are changes. OpenVLA's `absolute_action_mask`."""
        return absolute_mask(self.row.action_encoding)

    @property
    def action_normalization_mask(self) -> tuple[bool, ...]:
        """Which action numbers are normalised: all but the gripper. OpenVLA's name."""
        return tuple(not absolute for absolute in self.absolute_action_mask)

    @property
    def keys(self) -> tuple[str, ...]:
        """Flattened keys of the columns it reads, each once."""
        used = [key for part in (*self.transform.action, *self._state) for key in part.keys]
        return tuple(dict.fromkeys([*used, self.transform.instruction]))

    def __call__(self, columns: Mapping[str, np.ndarray]) -> Standard:
        n = self._n_steps(columns)
        frames = np.arange(self.transform.drop_first, n - self.transform.drop_last)
        if not len(frames):
            return self._nothing()
        try:
            actions = join(self.transform.action, columns, n)[frames]
            states = join(self._state, columns, n)[frames] if self._state else None
        except VlaError as error:
            raise VlaError(f"{self.name}: {error}") from error
        self._check_width("action", actions.shape[1], self.action_names)
        if states is not None:
            self._check_width("state", states.shape[1], self.state_names)
        texts = instructions(self.transform.instruction, columns[self.transform.instruction][frames])
        if self.drop_idle:
            moves = np.flatnonzero(arm_moves(actions))
            actions, frames, texts = actions[moves], frames[moves], tuple(texts[i] for i in moves)
            states = None if states is None else states[moves]
        return Standard(actions, states, texts, frames.astype(np.int64))

    def _n_steps(self, columns: Mapping[str, np.ndarray]) -> int:
        for key in self.keys:
            if key not in columns:
                near = difflib.get_close_matches(key, columns, n=3, cutoff=0.5)
                hint = f" (has {', '.join(near)})" if near else f" (has {', '.join(sorted(columns)) or 'nothing'})"
                raise problem(f"no column {key!r} in {self.name}{hint}", f"the columns {', '.join(self.keys)}",
                              "this is another version of the dataset, or another dataset: check its name")  # fmt: skip
        lengths = {key: len(columns[key]) for key in self.keys}
        if len(set(lengths.values())) > 1:
            raise problem(f"columns of {self.name} with {lengths} steps", "as many steps in every column",
                          "the recording is broken: leave the episode out")  # fmt: skip
        return next(iter(lengths.values()))

    def _check_width(self, what: str, width: int, names: Sequence[str]) -> None:
        if width != len(names):
            raise problem(f"{what} of {width} numbers from {self.name}", f"{len(names)}: {', '.join(names)}",
                          "this is another version of the dataset: give it a row of its own in "
                          "finetune/oxe/configs.py")  # fmt: skip

    def _nothing(self) -> Standard:
        states = np.zeros((0, len(self.state_names)), np.float32) if self._state else None
        return Standard(np.zeros((0, len(self.action_names)), np.float32), states, (), np.zeros(0, np.int64))


def oxe_standardizer(
    name: str, cameras: Sequence[str] = ("primary",), *, proprio: bool = True, drop_idle: bool = True
) -> OxeStandardizer:
    """How OpenVLA reads the dataset called `name` (see `dataset_name` for what may be left out of it).

    Args:
        cameras: of "primary", "secondary", "wrist".
        proprio: False leaves the state out, as OpenVLA's own training does; its columns are then not needed.
        drop_idle: leave out the steps at which the arm does not move where OpenVLA trains without them (DROID). It
            computes statistics with them: False gives those.

    Raises:
        VlaError: unknown name, with the nearest known ones; a camera the dataset does not have, with those it has.
    """
    name = dataset_name(name)
    row = DATASETS[name]
    for camera in cameras:
        if camera not in row.cameras:
            raise problem(f"camera {camera!r} of {name}", f"one of {', '.join(row.cameras)}",
                          "choose a camera this dataset has")  # fmt: skip
    chosen = {camera: row.cameras[camera] for camera in cameras}
    return OxeStandardizer(name, row, TRANSFORMS[name], chosen, proprio, drop_idle)


def dataset_name(name: str) -> str:
    """The full name of a dataset: "stanford_hydra" -> "stanford_hydra_dataset_converted_externally_to_rlds".

    A version after "/" or ":" is left out. VlaError with the nearest known names if there is none, or no row for it.
    """
    short = name.replace(":", "/").split("/")[0]
    for full in (short, ALIASES.get(short, short), *(short + ending for ending in _ENDINGS)):
        if full in DATASETS:
            return full
    if short in TRANSFORMS:
        raise problem(f"dataset {name!r}, for which OpenVLA has a transform but no cameras and no state", "a row of both",
                      "add its row to finetune/oxe/configs.py")  # fmt: skip
    raise _unknown("dataset", name, [*DATASETS, *ALIASES])


def mixture(name: str) -> list[tuple[str, float]]:
    """(dataset, weight) rows of a named mixture as OpenVLA trains on it, see `usable`.

    Raises:
        VlaError: unknown name, with the nearest known ones.
    """
    if name not in MIXTURES:
        raise _unknown("mixture", name, list(MIXTURES))
    return usable(MIXTURES[name])[0]


def usable(rows: Iterable[tuple[str, float]]) -> tuple[list[tuple[str, float]], list[tuple[str, float, str]]]:
    """(rows that are trained on, rows that are not with the reason), as OpenVLA's `get_oxe_dataset_kwargs_and_weights`.

    Of a dataset that stands twice the first weight holds. Datasets whose actions are not of the end effector are out.
    Cameras play no part: OpenVLA shows black images where a dataset has no such camera; `oxe_standardizer` raises.
    """
    kept: dict[str, float] = {}
    out: list[tuple[str, float, str]] = []
    refused = set()
    for name, weight in rows:
        if name in kept or name in refused:
            out.append((name, weight, "stands there already: the first weight holds"))
        elif DATASETS[name].action_encoding not in (EEF_POS, EEF_R6):
            refused.add(name)
            out.append((name, weight, f"actions are {DATASETS[name].action_encoding}, not of the end effector"))
        else:
            kept[name] = weight
    return list(kept.items()), out


def absolute_mask(action_encoding: str) -> tuple[bool, ...]:
    """Which numbers of an action are targets rather than changes: only the last, the gripper."""
    n = len(ACTION_NAMES[action_encoding])
    return (*(False,) * (n - 1), True)


def arm_moves(actions: np.ndarray) -> np.ndarray:
    """bool (T,): whether any of the first six numbers (T, D) differs from 0, as OpenVLA's `zero_action_filter` for DROID.

    It compares actions normalised to -1 .. 1 by DROID's q01 and q99 with a normalised 0, tolerance 1e-5.
    """
    scale = 2 / (_DROID_Q99 - _DROID_Q01 + 1e-8)
    return np.any(np.abs(actions[:, :6] * scale) > 1e-5, axis=1)


def instructions(key: str, column: np.ndarray) -> tuple[str, ...]:
    """One text per step of a column of texts, of UTF-8 bytes, or of Unicode code points (T, N) ended by 0."""
    column = np.asarray(column)
    if column.ndim == 2 and column.dtype.kind in "iu":
        return tuple(_from_codes(codes) for codes in column)
    if column.ndim != 1 or column.dtype.kind not in "OUS":
        raise problem(f"column {key!r} of {column.dtype} with shape {column.shape}", "one text per step",
                      "this is not the dataset of that name: check it")  # fmt: skip
    return tuple(_text(key, value) for value in column)


def _from_codes(codes: np.ndarray) -> str:
    ends = np.flatnonzero(codes == 0)
    valid = [int(code) for code in codes[: ends[0] if len(ends) else None]]
    return "".join(chr(c) if 0 <= c < 0xD800 or 0xE000 <= c < 0x110000 else "\ufffd" for c in valid)


def _text(key: str, value: object) -> str:
    if isinstance(value, str):
        return str(value)
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError as error:
            raise problem(f"{key} = {value[:40]!r}", "UTF-8 text", "the file is damaged: fetch it again") from error
    raise problem(f"{key} of type {type(value).__name__}", "text", "this is not the dataset of that name: check it")


def _unknown(kind: str, name: str, known: list[str]) -> VlaError:
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.4) or [k for k in known if name and name in k][:3]
    expected = f"one of {len(known)} names" + (f", nearest {', '.join(near)}" if near else "")
    return problem(f"{kind} {name!r}", expected, "`vla data list` shows them all")
