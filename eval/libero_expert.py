"""A scripted expert for LIBERO tasks: plans from the goal and the simulator's full state, acts through the 7-d action.

    expert = LiberoExpert(env)      # env: LIBERO's ControlEnv or OffScreenRenderEnv
    env.reset(); ...; expert.reset()
    env.step(expert.action())

One goal after another: unmet goals are worked on in the order open, place, switch, close, and again until all hold.
Skills are in `libero_place.py` and `libero_doors.py`, motions in `libero_arm.py`, geometry in `libero_grasp.py` and
`libero_spot.py`. Python 3.8, numpy and mujoco only; this file and its siblings are loaded by path, inside the
simulator's interpreter, where they are in no package.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

_SIBLINGS = ("libero_grasp", "libero_spot", "libero_arm", "libero_doors", "libero_place")  # each imports some before it
_ORDER = {"open": 0, "in": 1, "on": 1, "turnon": 2, "turnoff": 2, "close": 3}

if TYPE_CHECKING:  # Python 3.8 cannot subscript it
    Actions = Iterator[np.ndarray]


def _load(name: str) -> Any:
    """The module in the file beside this one, under its bare name."""
    spec = importlib.util.spec_from_file_location(name, str(Path(__file__).with_name(name + ".py")))
    assert spec is not None and spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


_arm, _doors, _place = [_load(name) for name in _SIBLINGS][2:]


class LiberoExpert:
    """Recommends the next action. Deterministic: the same simulator state at reset gives the same actions."""

    def __init__(self, env: Any) -> None:
        self._env = env
        self.reset()

    def reset(self) -> None:
        """Plans anew for the state the simulator is in. Call it after every env.reset() and set_init_state()."""
        self.arm = _arm.Arm(self._env)
        self._plan = self._solve()

    def action(self) -> np.ndarray:
        """(7,) float64 in [-1, 1]: translation / 0.05 m, rotation vector / 0.5 rad (world axes), -1 open / +1 close."""
        return next(self._plan)

    @property
    def phase(self) -> str:
        """What it is about, for people who debug."""
        return self.arm.phase

    def _solve(self) -> Actions:
        goals = sorted(self.arm.inner.parsed_problem["goal_state"], key=lambda goal: _ORDER[goal[0].lower()])
        attempt = 0
        while True:
            unmet = [goal for goal in goals if not self.arm.holds(goal)]
            if not unmet:
                self.arm.phase = "done"
                yield self.arm.still()
                continue
            # a goal that keeps failing must not keep the others from being tried
            goal = unmet[attempt // 2 % len(unmet)] if attempt > 3 else unmet[0]
            attempt += 1
            yield from self._work_on(goal, goals)

    def _work_on(self, goal: list[str], goals: list[list[str]]) -> Actions:
        kind = goal[0].lower()
        if kind in ("in", "on"):
            return _place.place(self.arm, goal[1], goal[2], goals)
        if kind in ("open", "close"):
            return _doors.move_door(self.arm, goal[1], kind == "open")
        return _doors.turn_knob(self.arm, goal[1], kind == "turnon")
