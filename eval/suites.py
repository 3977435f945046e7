"""The suites by name. To add one: a module `eval/<name>_suite.py` with a `vla.types.Suite`, and a line here."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence

from vla.eval.metaworld_suite import INSTRUCTIONS, MetaWorldSuite
from vla.testing import FakeSuite
from vla.types import Suite, problem


def _metaworld(tasks: tuple[str, ...]) -> Suite:
    return MetaWorldSuite(tasks) if tasks else MetaWorldSuite()


def _fake(tasks: tuple[str, ...]) -> Suite:
    return FakeSuite(tasks) if tasks else FakeSuite()


SUITES: dict[str, Callable[[tuple[str, ...]], Suite]] = {"metaworld": _metaworld, "fake": _fake}
"""Name -> a function from task names (empty: the suite's own choice) to the suite."""

TASKS: dict[str, tuple[str, ...]] = {"metaworld": tuple(INSTRUCTIONS), "fake": ("reach-near", "reach-far")}
"""All tasks that a suite knows."""


def get_suite(name: str, tasks: Sequence[str] = ()) -> Suite:
    """The suite with these tasks, or with its own choice of tasks. VlaError names what is known and what is nearest."""
    if name not in SUITES:
        raise problem(f"suite {name!r}", f"one of {', '.join(SUITES)}", _nearest(name, tuple(SUITES)))
    for task in tasks:
        if task not in TASKS[name]:
            raise problem(f"task {task!r}", f"one of {', '.join(TASKS[name])}", _nearest(task, TASKS[name]))
    if len(set(tasks)) != len(tasks):
        raise problem(f"tasks {', '.join(tasks)}", "each task once", "remove the repeated one")
    return SUITES[name](tuple(tasks))


def _nearest(name: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {near[0]!r}?" if near else "correct the name"
