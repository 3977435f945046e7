"""Meta-World as a suite: repeatable to the bit, whatever was drawn or run before."""

from __future__ import annotations

import importlib.util

import numpy as np
import pytest

from vla.eval.metaworld_suite import ACTION_REPEAT_ML, CAMERA, MetaWorldEnv, MetaWorldSuite
from vla.eval.metaworld_tasks import INSTRUCTIONS, PRETRAINED_TASKS, SPLITS
from vla.eval.suites import get_suite
from vla.types import EpisodeRequest, VlaError

if importlib.util.find_spec("metaworld") is None:
    pytest.skip("needs the [metaworld] extra", allow_module_level=True)

SUITE = MetaWorldSuite(("drawer-close", "faucet-open"))
pytestmark = pytest.mark.filterwarnings("ignore:Constant.s. may be too high")


def trajectory(
    env: MetaWorldEnv, seed: int, n_steps: int, chunk: int, lazy: bool
) -> tuple[np.ndarray, list[np.ndarray]]:
    """Simulator states of all steps, and the frames at the ends of chunks."""
    expert = SUITE.expert(env.task.name)
    env.render_frames = True
    observation, _ = env.reset(seed=seed)
    states, frames = [observation.privileged], [observation.images[CAMERA]]
    for i in range(1, n_steps + 1):
        env.render_frames = not lazy or i % chunk == 0
        observation, *_ = env.step(expert.act([observation])[0].actions[0])
        states.append(observation.privileged)
        if i % chunk == 0:
            frames.append(observation.images[CAMERA])
    return np.stack([state for state in states if state is not None]), frames


@pytest.fixture(scope="module")
def env() -> MetaWorldEnv:
    return SUITE.make("faucet-open")


def test_same_seed_same_bits_in_fresh_and_used_environments(env: MetaWorldEnv) -> None:
    states, frames = trajectory(env, 5, 12, 4, lazy=False)
    np.random.seed(0)  # Meta-World's own default is to draw from here
    trajectory(env, 6, 7, 4, lazy=True)
    fresh = SUITE.make("faucet-open")
    for other, lazy in ((env, False), (env, True), (fresh, True)):
        states_again, frames_again = trajectory(other, 5, 12, 4, lazy=lazy)
        np.testing.assert_array_equal(states, states_again)
        np.testing.assert_array_equal(frames, frames_again)
    fresh.close()


def test_a_renderer_that_was_given_up_draws_the_same_again(env: MetaWorldEnv, monkeypatch: pytest.MonkeyPatch) -> None:
    from vla.eval import metaworld_suite

    monkeypatch.setattr(metaworld_suite, "_RENDERERS", {})  # without those of tests before
    env.render_frames = True
    before = env.reset(seed=3)[0].images[CAMERA]
    other = MetaWorldSuite(("drawer-close",), max_renderers=1).make("drawer-close")
    other.reset(seed=3)
    assert [task for task, _ in metaworld_suite._RENDERERS] == ["drawer-close"]
    np.testing.assert_array_equal(env.reset(seed=3)[0].images[CAMERA], before)


def test_seeds_differ(env: MetaWorldEnv) -> None:
    first, second = (env.reset(seed=seed)[0].privileged for seed in (1, 2))
    assert first is not None and second is not None
    assert not np.array_equal(first, second)


def test_frame_is_upright_and_complete(env: MetaWorldEnv) -> None:
    env.render_frames = True
    frame = env.reset(seed=0)[0].images[CAMERA]
    assert frame.shape == (160, 160, 3) and frame.dtype == np.uint8
    assert frame.std() > 20  # not black
    # The floor and the table fill the bottom, the wall the top; the table is the brown part.
    brown = (frame[..., 0].astype(int) - frame[..., 2]) > 25
    assert brown[80:].mean() > 2 * brown[:80].mean()


def test_no_frame_unless_asked(env: MetaWorldEnv) -> None:
    env.reset(seed=0)
    env.render_frames = False
    observation, reward, terminated, truncated, info = env.step(np.zeros(4, np.float32))
    assert observation.images == {} and observation.state is not None and observation.state.dtype == np.float32
    assert (reward, terminated, truncated, info["success"]) == (0.0, False, False, False)


def test_expert_solves_through_workers() -> None:
    from vla.eval.expert import SuiteExpert
    from vla.rollout import run_episodes

    requests = [EpisodeRequest(task.name, 0) for task in SUITE.tasks]
    results = list(run_episodes(SuiteExpert(SUITE), SUITE, requests, n_workers=1, slots_per_worker=2))
    assert [result.fault for result in results] == [None] * 2
    assert all(result.success and 10 < result.n_steps < SUITE.max_steps for result in results)


def test_truncates_at_the_limit() -> None:
    short = MetaWorldSuite(("faucet-open",), max_steps=3).make("faucet-open")
    short.render_frames = False
    short.reset(seed=0)
    flags = [short.step(np.zeros(4, np.float32))[3] for _ in range(3)]
    assert flags == [False, False, True]


def test_splits_are_metaworlds_own() -> None:
    import metaworld.env_dict as published

    for suite, benchmark, part in (
        ("metaworld-ml10", published.ML10_V3, "train"),
        ("metaworld-ml10-test", published.ML10_V3, "test"),
        ("metaworld-ml45", published.ML45_V3, "train"),
        ("metaworld-ml45-test", published.ML45_V3, "test"),
    ):
        assert {f"{task}-v3" for task in SPLITS[suite]} == set(benchmark[part])
    assert {f"{task}-v3" for task in SPLITS["metaworld-mt50"]} == set(published.ALL_V3_ENVIRONMENTS)
    assert len(set(INSTRUCTIONS.values())) == len(INSTRUCTIONS) == 50
    assert len(PRETRAINED_TASKS) == 27 and PRETRAINED_TASKS[-1] == "window-open"


def test_splits_are_suites() -> None:
    suite = get_suite("metaworld-ml45-test")
    assert suite.name == "metaworld-ml45-test" and [task.max_steps for task in suite.tasks] == [166] * 5
    assert len(get_suite("metaworld-ml45").tasks) == 45 and len(get_suite("metaworld-ml10").tasks) == 10
    assert [task.name for task in get_suite("metaworld-ml10", ("sweep",)).tasks] == ["sweep"]
    with pytest.raises(VlaError, match="got task 'drawer-open'; expected one of reach, push"):
        get_suite("metaworld-ml10", ("drawer-open",))
    with pytest.raises(VlaError, match="did you mean 'metaworld-ml45'"):
        get_suite("metaworld-ml46")


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(INSTRUCTIONS))
def test_every_task_builds_and_its_expert_acts(name: str) -> None:
    suite = get_suite("metaworld-mt50", (name,))
    env, expert = suite.make(name), suite.expert(name)
    observation, _ = env.reset(seed=0)
    assert observation.images[CAMERA].std() > 20
    first = observation.state
    env.render_frames = False
    for _ in range(5):
        observation, _, _, truncated, _ = env.step(expert.act([observation])[0].actions[0])
        assert not truncated
    assert first is not None and observation.state is not None and np.abs(observation.state - first).max() > 1e-3
    assert suite.control_hz == 80 / ACTION_REPEAT_ML


def test_bad_input(env: MetaWorldEnv) -> None:
    with pytest.raises(VlaError, match="got Meta-World task 'faucet'; expected one of"):
        MetaWorldSuite(("faucet",))
    with pytest.raises(VlaError, match="got task 'reach'; expected one of drawer-close, faucet-open"):
        SUITE.make("reach")
    with pytest.raises(VlaError, match="expected 4 finite numbers"):
        env.step(np.zeros(3, np.float32))
