"""The scripted expert of LIBERO: its geometry without a simulator; whole episodes where there is one."""

from __future__ import annotations

import ast
import importlib
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vla.eval import libero_grasp
from vla.eval.libero_grasp import Boxes, Cells, find_grasp, lean, yaw_matrix

FILES = [
    Path(str(libero_grasp.__file__)).with_name(f"libero_{name}.py")
    for name in ("expert", "place", "doors", "arm", "spot", "grasp")
]
SHOULDER = np.array([-0.5, 0.0, 0.33])
DOWN = np.array([[0.0, 1.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, -1.0]])
"""Columns: the fingers close along y, x is sideways, the hand points down."""


def boxes(*sides: tuple[tuple[float, float, float], tuple[float, float, float]]) -> Boxes:
    """Upright boxes from (lowest corner, highest corner)."""
    low, high = np.array(sides)[:, 0], np.array(sides)[:, 1]
    return Boxes((low + high) / 2, np.tile(np.eye(3), (len(low), 1, 1)), (high - low) / 2, np.zeros(len(low), int))


TABLE = boxes(((-0.5, -0.5, -0.05), (0.5, 0.5, 0.0)))


@pytest.fixture
def spot(monkeypatch: pytest.MonkeyPatch) -> Any:
    """`libero_spot`, which finds its sibling under the bare name that `libero_expert` gives it."""
    monkeypatch.setitem(sys.modules, "libero_grasp", libero_grasp)
    monkeypatch.delitem(sys.modules, "vla.eval.libero_spot", raising=False)
    return importlib.import_module("vla.eval.libero_spot")


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_old_interpreters_can_read_it(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"), feature_version=(3, 8))
    lazy = isinstance(tree.body[1], ast.ImportFrom) and tree.body[1].module == "__future__"
    assert lazy, "without it Python 3.8 evaluates `list[...]` and `X | None`"


def test_cells_are_exact_to_a_cell() -> None:
    turned = Boxes(np.zeros((1, 3)), yaw_matrix(0.5)[None], np.array([[0.04, 0.02, 0.03]]), np.zeros(1, int))
    cells = Cells(np.full(3, -0.1), np.full(3, 0.1)).fill(turned, 0.0)
    points = np.random.default_rng(0).uniform(-0.09, 0.09, (4000, 3))
    beyond = (np.abs(points @ yaw_matrix(0.5)) - turned.half[0]).max(1)  # in the box's own axes
    occupied = cells.at(points)
    assert occupied[beyond < -0.004].all() and not occupied[beyond > 0.004].any()
    assert not cells.at(np.array([[1.0, 0.0, 0.0]])).any(), "outside of the grid is free"


def test_turns_are_rotations() -> None:
    for turn in (yaw_matrix(0.7), lean(0, 0.7), lean(1, 0.7)):
        np.testing.assert_allclose(turn @ turn.T, np.eye(3), atol=1e-12)
        assert np.linalg.det(turn) == pytest.approx(1.0)
    np.testing.assert_allclose(yaw_matrix(np.pi / 2) @ [1, 0, 0], [0, 1, 0], atol=1e-12)
    np.testing.assert_allclose(lean(0, 0.7)[:, 0], [1, 0, 0])
    np.testing.assert_allclose(lean(1, 0.7)[:, 1], [0, 1, 0])


def test_a_box_is_held_across_its_thin_side() -> None:
    block = boxes(((-0.06, -0.02, 0.0), (0.06, 0.02, 0.06)))
    across = yaw_matrix(np.pi / 2) @ DOWN
    for rotations in ([(DOWN, 0.0), (across, 0.0)], [(across, 0.0), (DOWN, 0.0)]):
        grasp = find_grasp(block, TABLE, rotations, np.array([0.0, 0.0, 0.03]), SHOULDER, 0.006)
        assert grasp is not None
        np.testing.assert_array_equal(grasp.rotation, DOWN)  # along the other side it is wider than the hand
        assert abs(grasp.position[1]) < 0.006 and abs(grasp.position[0]) < 0.012 and 0.014 < grasp.position[2] < 0.07


def test_a_thin_box_on_the_table_is_held_without_touching_the_table() -> None:
    bar = boxes(((-0.04, -0.02, 0.0), (0.04, 0.02, 0.018)))
    grasp = find_grasp(bar, TABLE, [(DOWN, 0.0)], np.array([0.0, 0.0, 0.01]), SHOULDER, 0.006)
    assert grasp is not None and 0.010 < grasp.position[2] < 0.019


def test_no_grasp_where_there_is_no_room() -> None:
    block, walls = (
        ((-0.03, -0.02, 0.0), (0.03, 0.02, 0.06)),
        [((-0.2, y, 0.0), (0.2, y + 0.02, 0.2)) for y in (-0.05, 0.03)],
    )
    middle = np.array([0.0, 0.0, 0.03])
    assert find_grasp(boxes(block), boxes(*walls), [(DOWN, 0.0)], middle, SHOULDER, 0.006) is None
    wide = boxes(((-0.06, -0.06, 0.0), (0.06, 0.06, 0.06)))
    assert find_grasp(wide, TABLE, [(DOWN, 0.0)], middle, SHOULDER, 0.006) is None


def test_things_are_let_go_just_above_what_is_below(spot: Any) -> None:
    block = boxes(((-0.02, -0.02, 0.30), (0.02, 0.02, 0.34)))
    step = boxes(((-0.5, -0.5, -0.05), (0.5, 0.5, 0.0)), ((-0.3, 0.1, 0.0), (0.3, 0.5, 0.05)))
    held = (block, np.array([0.0, 0.0, 0.32]), np.array([0.0, 0.0, 0.34]), DOWN)
    low = spot.find_spot(*held, step, np.array([[0.0, -0.2]]), (0.0,), 0.01)
    high = spot.find_spot(*held, step, np.array([[0.0, 0.25]]), (0.0,), 0.01)
    assert low.origin[2] == pytest.approx(0.03, abs=0.006) and high.origin[2] == pytest.approx(0.08, abs=0.006)
    chosen = spot.find_spot(*held, step, np.array([[0.0, 0.25], [0.0, -0.2]]), (0.0,), 0.01)
    np.testing.assert_array_equal(chosen.origin[:2], [0.0, -0.2])


def test_a_spiral_starts_in_the_middle(spot: Any) -> None:
    points = spot.spiral(np.array([1.0, 2.0]), np.eye(2), np.array([0.03, 0.02]))
    distance = np.linalg.norm(points - [1.0, 2.0], axis=1)
    assert len(points) == 7 * 5 and distance[0] < 1e-9 and (np.diff(distance) > -1e-9).all()


def test_ways_past_obstacles(spot: Any) -> None:
    shelf = boxes(((0.0, -0.2, 0.10), (0.2, 0.2, 0.12)))
    under, beside = boxes(((-0.02, -0.02, 0.0), (0.02, 0.02, 0.05))), boxes(((-0.2, 0.0, 0.0), (-0.1, 0.1, 0.05)))
    way = spot.way_out(under, shelf)
    assert np.linalg.norm(way) == pytest.approx(0.03) and way[0] + 0.02 < 0 and way[2] == 0
    assert not spot.way_out(
        boxes(*(((-0.02 + way[0], -0.02 + way[1], 0.0), (0.02 + way[0], 0.02 + way[1], 0.05)),)), shelf
    ).any()
    assert not spot.way_out(beside, shelf).any()
    start, end = np.array([-0.3, 0.0, 0.0]), np.array([0.3, 0.0, 0.0])
    assert spot.corridor_top(shelf, start, end, 0.05) == pytest.approx(0.12)
    assert spot.corridor_top(shelf, start, start, 0.05) == float("-inf")


def test_the_open_side_of_a_roofed_place(spot: Any) -> None:
    roof, floor = ((-0.1, -0.1, 0.1), (0.1, 0.1, 0.12)), ((-0.1, -0.1, -0.02), (0.1, 0.1, 0.0))
    walls = [
        ((-0.12, -0.1, 0.0), (-0.1, 0.1, 0.1)),
        ((0.1, -0.1, 0.0), (0.12, 0.1, 0.1)),
        ((-0.1, 0.1, 0.0), (0.1, 0.12, 0.1)),
    ]
    inside = np.array([0.0, 0.0, 0.05])
    np.testing.assert_array_equal(spot.open_side(boxes(roof, floor, *walls), inside, np.eye(3)), [0, -1, 0])
    assert spot.open_side(boxes(floor, *walls), inside, np.eye(3)) is None, "no roof"
    assert spot.surface_below(boxes(roof, floor, *walls), inside) == pytest.approx(0.0)


def episode(sim: Any, state: int, limit: int) -> tuple[np.ndarray, bool]:
    """The expert's actions, (steps, 7), up to success or the limit."""
    seen, actions = sim.reset(0, state), []
    while not seen.success and len(actions) < limit:
        actions.append(seen.expert_action)
        seen = sim.step(seen.expert_action)
    return np.array(actions), seen.success


@pytest.mark.libero
@pytest.mark.parametrize(
    ("suite", "index"), [("libero_object", 0), ("libero_spatial", 0), ("libero_goal", 0), ("libero_10", 5)]
)
def test_solves_within_the_usual_limit_and_repeats_itself(suite: str, index: int) -> None:
    """A second time, in the same simulator or in another, an episode must not differ by a bit."""
    from vla.eval.libero_sim import LiberoSim
    from vla.eval.libero_tasks import MAX_STEPS, suite_tasks

    sim = LiberoSim(suite, suite_tasks(suite)[index].name, expert=True)
    sim.render_frames = False
    try:
        first, success = episode(sim, 0, MAX_STEPS[suite])
        assert success and first.shape[1] == 7 and np.abs(first).max() <= 1.0
        assert set(np.unique(first[:, 6])) <= {-1.0, 1.0}, "the gripper opens or closes"
        if suite == "libero_object":
            np.testing.assert_array_equal(episode(sim, 0, MAX_STEPS[suite])[0], first)
        if suite == "libero_spatial":
            sim.close()
            sim = LiberoSim(suite, suite_tasks(suite)[index].name, expert=True)
            sim.render_frames = False
            np.testing.assert_array_equal(episode(sim, 0, MAX_STEPS[suite])[0], first)
    finally:
        sim.close()
