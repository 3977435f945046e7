"""The suites by name. To add one: a module `eval/<name>_suite.py` with a `vla.types.Suite`, and a line here."""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable, Sequence
from dataclasses import fields, is_dataclass, replace
from typing import Any, cast

from vla.eval.libero_suite import LiberoSuite
from vla.eval.libero_tasks import SUITE_NAMES, suite_tasks
from vla.eval.metaworld_suite import ACTION_REPEAT_ML, MAX_STEPS_ML, MetaWorldSuite
from vla.eval.metaworld_tasks import INSTRUCTIONS, SPLITS
from vla.testing import FakeSuite
from vla.types import Suite, problem


def _metaworld(tasks: tuple[str, ...]) -> Suite:
    return MetaWorldSuite(tasks) if tasks else MetaWorldSuite()


def _split(name: str) -> Callable[[tuple[str, ...]], Suite]:
    """One of Meta-World's splits, under its own name and with the benchmark's step limit."""
    return lambda tasks: MetaWorldSuite(
        tasks or SPLITS[name], name=name, max_steps=MAX_STEPS_ML, action_repeat=ACTION_REPEAT_ML
    )


def _libero(name: str) -> Callable[[tuple[str, ...]], Suite]:
    """The environment says where LIBERO is for programs that have no flag for it."""
    return lambda tasks: LiberoSuite(
        name, tasks, sim_python=os.environ.get("VLA_LIBERO_PYTHON") or None,
        force_versions=os.environ.get("VLA_LIBERO_FORCE_VERSIONS", "") not in ("", "0"),
    )  # fmt: skip


def _fake(tasks: tuple[str, ...]) -> Suite:
    return FakeSuite(tasks) if tasks else FakeSuite()


SUITES: dict[str, Callable[[tuple[str, ...]], Suite]] = {
    "metaworld": _metaworld,
    **{name: _split(name) for name in SPLITS},
    **{name: _libero(name) for name in SUITE_NAMES},
    "fake": _fake,
}
"""Name -> a function from task names (empty: the suite's own choice) to the suite."""

TASKS: dict[str, tuple[str, ...]] = {
    "metaworld": tuple(INSTRUCTIONS),
    **SPLITS,
    **{name: tuple(task.name for task in suite_tasks(name)) for name in SUITE_NAMES},
    "fake": ("reach-near", "reach-far"),
}
"""All tasks that a suite knows."""


def get_suite(name: str, tasks: Sequence[str] = (), *, expert: bool = False) -> Suite:
    """The suite with these tasks, or with its own choice of tasks. VlaError names what is known and what is nearest.

    Args:
        expert: its scripted experts will be asked. LIBERO's works inside the simulator, which then has to be built so.
    """
    if name not in SUITES:
        raise problem(f"suite {name!r}", f"one of {', '.join(SUITES)}", _nearest(name, tuple(SUITES)))
    for task in tasks:
        if task not in TASKS[name]:
            raise problem(f"task {task!r}", f"one of {', '.join(TASKS[name])}", _nearest(task, TASKS[name]))
    if len(set(tasks)) != len(tasks):
        raise problem(f"tasks {', '.join(tasks)}", "each task once", "remove the repeated one")
    suite = SUITES[name](tuple(tasks))
    return replace(suite, with_expert=True) if expert and isinstance(suite, LiberoSuite) else suite


def with_options(suite: Suite, options: dict[str, Any]) -> Suite:
    """The suite with other values for some of its fields. VlaError if it has no such field."""
    assert is_dataclass(suite) and not isinstance(suite, type), "a suite is a frozen dataclass, to be sent to workers"
    known = {field.name for field in fields(suite)}
    for name in options:
        if name not in known:
            flag = f"--{name.replace('_', '-')}"
            raise problem(f"{flag} for suite {suite.name!r}", "a suite that has it", f"leave out {flag}")
    return cast(Suite, replace(suite, **options))


def _nearest(name: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {near[0]!r}?" if near else "correct the name"
