"""Past actions in the prompt: what training shows is what acting shows, through the engine, the wire and by hand.

Also the largest robots end to end: 14 action and state dimensions with three cameras, and 7 with two.
"""

import dataclasses

import numpy as np
import pytest
import torch
from serving import FakePolicy, ask, frame, running
from sources import ArraySource, toy_source
from test_policy import make
from training import fake_dataset, sft_settings, tiny_backbone

from vla.doctor.evidence import predict
from vla.ensemble import ChunkEnsemble, EnsemblePolicy
from vla.files import read_jsonl
from vla.finetune import sft
from vla.finetune.data.chunks import ChunkDataset
from vla.finetune.formats.lerobot_reader import LeRobotReader
from vla.finetune.rl_math import slice_logprobs
from vla.finetune.sft_samples import Prepared, drops_history, drops_state, training_stream
from vla.finetune.sft_setup import build_policy, observation_of, open_datasets, show_history
from vla.inputs import UNKNOWN, history_text, prepare_prompt
from vla.merge_check import probe_logits
from vla.normalize import gripper_to_robot
from vla.policy import load_policy
from vla.rollout import run_episodes
from vla.serve import wire
from vla.serve.app import make_app
from vla.serve.client import PolicyClient, PolicyServerError
from vla.serve.remote_policy import RemotePolicy
from vla.spec import ActionSpec, BackboneSpec, ImageSpec, PolicySpec, PromptSpec, TokenSpec, check
from vla.testing import FakeEnv, FakeSuite
from vla.tokenizers.placement import Placement
from vla.types import ActionChunk, EpisodeRequest, Observation, VlaError

SPEC = PromptSpec(
    "Past actions: {history}. {instruction}",
    history=3,
    history_low=(-1.0, 0.0),
    history_high=(1.0, 10.0),
    state_bins=10,
)
PAST = np.float32([[-1.0, 5.0], [0.05, 0.0], [1.0, 99.0], [0.5, 2.5]])
FRONT = ImageSpec(("front",), 32)
GRIPPERS = {
    "signed": {}, "unit": {"gripper_range": "unit"}, "turned": {"gripper_invert": True},
    "openvla": {"gripper_range": "unit", "gripper_threshold": 0.5, "gripper_invert": True},
}  # fmt: skip


def seen(past: np.ndarray | None) -> Observation:
    return Observation({}, None, "go", past_actions=past)


def test_the_text_of_past_actions():
    assert prepare_prompt(seen(PAST[:0]), SPEC) == "Past actions: unknown; unknown; unknown. go"
    assert prepare_prompt(seen(PAST[:1]), SPEC) == "Past actions: unknown; unknown; 0 5. go"
    assert prepare_prompt(seen(PAST), SPEC) == "Past actions: 5 0; 9 9; 7 2. go", (
        "the last three, clipped to the bounds"
    )
    optional = dataclasses.replace(SPEC, history_optional=True)
    assert history_text(None, optional) == history_text(PAST[:0], optional) == "; ".join([UNKNOWN] * 3)
    tokens = dataclasses.replace(SPEC, numbers_as="tokens")
    assert history_text(PAST[:2], tokens) == "unknown " + "".join(chr(0xF0000 + b) for b in (0, 5, 5, 0))


@pytest.mark.parametrize("past, message", [
    (None, "got no past actions; expected the last 3 of this episode, 2 numbers each.*an empty list at the beginning"),
    (PAST[:, :1], r"got past actions of shape \(4, 1\); expected finite numbers \(n, 2\)"),
    (PAST[0], r"got past actions of shape \(2,\)"), (PAST * np.nan, "not all finite"),
])  # fmt: skip
def test_past_actions_that_cannot_be_shown(past, message):
    with pytest.raises(VlaError, match=message):
        prepare_prompt(seen(past), SPEC)


def test_a_spec_that_contradicts_itself(tmp_path):
    spec = make(tmp_path / "base").spec
    for change, message in (
        ({"history": 2}, "with history 2; expected {history} in the template if, and only if, past actions are shown"),
        ({"template": "{instruction} {state} {history}"}, "with history 0"),
        (
            {"template": "{instruction} {state} {history}", "history": 1},
            "got 0 and 0 bounds of past actions; expected 2 each",
        ),
    ):
        with pytest.raises(VlaError, match=message):
            check(dataclasses.replace(spec, prompt=dataclasses.replace(spec.prompt, **change)))


@pytest.mark.parametrize("settings, message", [
    ({"history_dropout": 0.5}, "history_dropout 0.5 with history 0"), ({"history": -1}, "with history -1"),
    ({"history": 2, "history_dropout": 1.0}, "0 <= history_dropout < 1"),
])  # fmt: skip
def test_settings_that_contradict_themselves(tmp_path, settings, message):
    with pytest.raises(VlaError, match=message):
        sft_settings(tmp_path, **settings)


def test_samples_have_the_actions_before_them_and_none_of_other_episodes():
    source = toy_source(n_episodes=3, n=4)
    source.broken.add(4)
    dataset = ChunkDataset([("toy", source)], 2, holdout_episodes=1, skip_bad=True)
    assert dataset[0].past_actions is None
    dataset.show_past_actions(3, lambda actions: actions)
    actions, starts = source.actions(), [span.start for span in source.episodes]
    for index in [*range(len(dataset)), *dataset.holdout_indices.tolist()]:
        _, at, _ = dataset.locate(index)
        at += at == 4  # the frame after the broken one stands in for it
        first = max(start for start in starts if start <= at)
        past = dataset[index].past_actions
        assert past is not None and past.shape == (min(at - first, 3), 3) and past.dtype == np.float32
        np.testing.assert_array_equal(past, actions[max(first, at - 3) : at])


class Recorded:
    """Plays an episode's actions in chunks, as the robot is given them."""

    def __init__(self, actions: np.ndarray, horizon: int, history: int) -> None:
        self.actions, self.horizon = actions, horizon
        self.metadata = {"name": "recorded", "horizon": horizon, "action_dim": 2, "history": history}

    def act(self, observations):
        starts = [observation.key[-1] * self.horizon for observation in observations]
        return [ActionChunk(self.actions[i : i + self.horizon]) for i in starts]

    def reset(self) -> None: ...


@pytest.mark.parametrize("numbers_as", ["text", "tokens"])
@pytest.mark.parametrize("gripper", sorted(GRIPPERS))
def test_a_recording_replayed_by_the_engine_gives_the_prompts_of_training(monkeypatch, gripper, numbers_as):
    """With every gripper convention, thresholds and values that are not binary too."""
    monkeypatch.setattr("vla.testing.GOAL_RADIUS", -1.0)  # nothing ends an episode but its length
    rng, n, suite = np.random.default_rng(3), 12, FakeSuite(max_steps=12)
    recorded = rng.uniform(-0.02, 0.02, (n, 2)).astype(np.float32)
    recorded[:, 1] = rng.uniform(0, 1, n)
    action = dataclasses.replace(ActionSpec(("x", "gripper"), 3, gripper_dim=1), **GRIPPERS[gripper])
    given = gripper_to_robot(recorded, 1, action.gripper_range, action.gripper_threshold, action.gripper_invert)
    request = [EpisodeRequest("reach-far", 5, (0,))]

    def queries(horizon):
        policy = Recorded(given, horizon, 4)
        (result,) = run_episodes(policy, suite, request, n_workers=0, slots_per_worker=1, keep_queries=True)
        return [query.observation for query in result.queries]

    steps = queries(1)
    states = np.stack([o.state for o in steps])
    source = ArraySource(
        [recorded[: len(steps)]], [states], instructions=[steps[0].instruction], action_names=action.names
    )
    prompt = PromptSpec(
        "{history} {state} {instruction}", True, ("x", "y"), (0.0, 0.0), (1.0, 1.0), history=4,
        history_low=(-0.02, -1.0), history_high=(0.02, 1.0), numbers_as=numbers_as,
    )  # fmt: skip
    as_text = dataclasses.replace(prompt, numbers_as="text")
    placement = Placement.added(300, 256, model_vocab_size=600).save()
    dataset = ChunkDataset([("d", source)], 3)
    show_history(dataset, PolicySpec("p", BackboneSpec("tiny"), action, FRONT, as_text, TokenSpec(placement=placement)))
    trained = [prepare_prompt(observation_of(dataset[i]), prompt) for i in range(len(steps))]
    assert len(set(trained)) == len(steps) == n
    for horizon in (1, 3, 5):
        shown = [prepare_prompt(o, prompt) for o in queries(horizon)]
        assert shown == trained[::horizon][: len(shown)] and len(shown) > 1


def test_an_engine_that_averages_shows_what_was_executed():
    suite, rng = FakeSuite(max_steps=9), np.random.default_rng(0)
    chunks = rng.uniform(-0.02, 0.02, (20, 4, 2)).astype(np.float32)

    class Chunks(Recorded):
        def act(self, observations):
            return [ActionChunk(chunks[observation.key[-1]]) for observation in observations]

    policy = Chunks(chunks[0], 4, 3)
    options = {"n_workers": 0, "slots_per_worker": 1, "keep_queries": True}
    (result,) = run_episodes(policy, suite, [EpisodeRequest("reach-far", 5, (0,))], temporal_ensemble=0.1, **options)
    ensemble = ChunkEnsemble(0.1)
    executed = [ensemble.next(chunk) for chunk in chunks[: len(result.queries)]]
    assert len(result.queries) > 4
    for i, query in enumerate(result.queries):
        past = query.observation.past_actions
        assert past is not None and past.shape == (min(i, 3), 2)
        np.testing.assert_array_equal(past, np.array(executed[max(0, i - 3) : i]).reshape(-1, 2))
    # The same by hand, with one robot.
    env, remembered = FakeEnv(suite, suite.tasks[1]), []

    class Spy(Chunks):
        def act(self, observations):
            remembered.append(observations[0].past_actions)
            return super().act(observations)

    single = EnsemblePolicy(Spy(chunks[0], 4, 3), 0.1)
    for _ in range(2):
        single.reset()
        observation, _ = env.reset(seed=5)
        for i in range(len(result.queries)):
            (chunk,) = single.act([dataclasses.replace(observation, key=(0, i))])
            observation = env.step(chunk.actions[0])[0]
        for query, past in zip(result.queries, remembered, strict=True):
            np.testing.assert_array_equal(query.observation.past_actions, past)
        remembered.clear()


def test_a_policy_without_history_is_shown_none_and_faults_begin_anew(tmp_path):
    faulty = FakeSuite(passing_faults=(("reach-far", 5, "raise_step"),), passed_in=str(tmp_path))
    policy = Recorded(np.full((20, 2), 0.001, np.float32), 1, 2)
    requests = [EpisodeRequest("reach-far", 5, (0,))]
    options = {"n_workers": 0, "slots_per_worker": 1, "keep_queries": True, "max_fault_fraction": 1.0}
    (result,) = run_episodes(policy, faulty, requests, **options)
    assert result.fault is None
    assert [len(query.observation.past_actions) for query in result.queries[:4]] == [0, 1, 2, 2]
    policy.metadata = {**policy.metadata, "history": 0}
    (result,) = run_episodes(policy, FakeSuite(), requests, **options)
    assert all(query.observation.past_actions is None for query in result.queries)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("history")
    fake_dataset(folder)
    tiny_backbone(folder)
    return folder


@pytest.fixture(scope="module")
def trained(folder):
    return sft.run(sft_settings(folder, out=folder / "run", history=2, history_dropout=0.4))


def test_history_dropout_hides_a_share_of_the_samples_by_their_place(folder):
    settings = sft_settings(folder, history=2, history_dropout=0.3, state_dropout=0.3, seed=4)
    hidden = np.array([drops_history(settings, position) for position in range(4000)])
    assert abs(hidden.mean() - 0.3) < 0.03
    blind = np.array([drops_state(settings, position) for position in range(4000)])
    assert abs((hidden & blind).mean() - 0.09) < 0.02, "one does not follow the other"
    dataset, _ = open_datasets(settings)
    dataset.show_past_actions(2, lambda actions: actions)
    prepared = Prepared(settings, dataset, FRONT)
    samples = next(training_stream(prepared, 100, 40))
    assert [sample.past_actions is None for sample in samples] == hidden[100:140].tolist()
    assert dataset[0].past_actions is not None, "held-out figures are of the policy as it acts"


def test_trained_saved_loaded_and_asked(folder, trained):
    policy = load_policy(trained)
    prompt = policy.spec.prompt
    assert (prompt.history, prompt.history_optional, len(prompt.history_low)) == (2, True, 2)
    assert prompt.template.startswith("Past actions: {history}. State: {state}. In: ")
    assert policy.metadata["history"] == 2 and policy.metadata["optional_inputs"] == ["past_actions"]
    dataset, _ = open_datasets(sft_settings(folder))
    show_history(dataset, policy.spec)
    sample = next(o for o in map(observation_of, map(dataset.__getitem__, range(20))) if len(o.past_actions) == 2)
    hidden, begun = (dataclasses.replace(sample, past_actions=past) for past in (None, sample.past_actions[:0]))
    first, second = policy.act([hidden, begun])
    assert np.array_equal(first.token_ids, second.token_ids)
    shown, other = (policy.encode([o])["input_ids"] for o in (sample, hidden))
    assert shown.shape != other.shape or not torch.equal(shown, other)
    assert {"holdout_loss"} <= read_jsonl(trained.parent / "metrics.jsonl")[-1].keys()
    strict = dataclasses.replace(policy.spec, prompt=dataclasses.replace(prompt, history_optional=False))
    policy.spec = strict
    assert policy.act([begun])[0].ok
    with pytest.raises(VlaError, match="got no past actions; expected the last 2 of this episode"):
        policy.act([hidden])


def test_workers_that_prepare_samples_change_nothing(folder, trained):
    settings = sft_settings(
        folder, out=folder / "helped", history=2, history_dropout=0.4, data_workers=1, cache_images=False
    )
    mine, theirs = (policy / "adapter" / "adapter_model.safetensors" for policy in (sft.run(settings), trained))
    assert mine.read_bytes() == theirs.read_bytes()


def test_training_goes_on_from_a_policy_with_its_history(folder, trained):
    again = sft.run(sft_settings(folder, out=folder / "more", from_=str(trained), steps=1, history_dropout=0.2))
    assert load_policy(again).spec.prompt == load_policy(trained).spec.prompt
    row = read_jsonl(folder / "more" / "metrics.jsonl")[0]
    assert row["loss"] < read_jsonl(trained.parent / "metrics.jsonl")[0]["loss"]


def test_the_engine_drives_a_server_as_it_drives_the_policy(folder, trained):
    policy, suite = load_policy(trained), FakeSuite()
    requests = [EpisodeRequest("reach-far", seed, (seed,)) for seed in (1, 2)]
    options = {"n_workers": 0, "slots_per_worker": 2, "keep_queries": True, "ordered": True, "n_execute": 1}
    with running(make_app(policy)) as url:
        found = [list(run_episodes(p, suite, requests, **options)) for p in (policy, RemotePolicy(url))]
    for mine, theirs in zip(*found, strict=True):
        assert len(mine.queries) == len(theirs.queries) > 3
        for a, b in zip(mine.queries, theirs.queries, strict=True):
            assert np.array_equal(a.observation.past_actions, b.observation.past_actions)
            assert np.array_equal(a.chunk.token_ids, b.chunk.token_ids)


def test_the_doctor_and_the_merge_check_ask_with_past_actions(folder, trained):
    policy = load_policy(trained)
    policy.spec = dataclasses.replace(
        policy.spec, prompt=dataclasses.replace(policy.spec.prompt, history_optional=False)
    )
    predictions = predict(policy, LeRobotReader(folder / "fake"), 5, "fake")
    assert predictions.ok.all() and np.isfinite(predictions.losses["own"]).all()
    assert torch.isfinite(probe_logits(policy)).all()


@pytest.mark.parametrize("numbers_as", ["text", "tokens"])
def test_rollouts_and_updates_agree_on_the_log_probabilities(folder, numbers_as):
    settings = sft_settings(folder, history=3, numbers_as=numbers_as, bins=256)
    dataset, statistics = open_datasets(settings)
    policy = build_policy(settings, dataset, statistics, "cpu")
    policy.temperature = 1.0
    requests = [EpisodeRequest("reach-far", seed, (seed,)) for seed in (1, 2)]
    results = list(run_episodes(policy, FakeSuite(), requests, n_workers=0, slots_per_worker=2, keep_queries=True))
    queries = [query for result in results for query in result.queries]
    assert {len(query.observation.past_actions) for query in queries} == {0, 3}
    ids = torch.from_numpy(np.stack([query.chunk.token_ids for query in queries]))
    with torch.no_grad():
        logits = policy.backbone.action_logits(policy.encode([query.observation for query in queries]), ids)
        again = slice_logprobs(logits, ids, policy.legal_ids, 1.0, policy.legal_mask(ids))[0]
    np.testing.assert_allclose(again, np.stack([query.chunk.logprobs for query in queries]), atol=2e-3)


class Shown(FakePolicy):
    """A policy that remembers what it was shown."""

    def __init__(self, optional: bool = False) -> None:
        super().__init__(state_names=("x",))
        self.optional = ["past_actions", "state"] if optional else []

    @property
    def metadata(self):
        return {**super().metadata, "history": 2, "action_dim": 2, "optional_inputs": self.optional}


def asked(**more) -> dict:
    return {"images": {"front": frame()}, "state": np.zeros(1, np.float32), "instruction": "go", **more}


def test_past_actions_over_the_wire():
    policy = Shown()
    with running(make_app(policy)) as url, PolicyClient(url) as client:
        client.act([asked(past_actions=PAST), asked(past_actions=[]), asked(past_actions=PAST[:1].tolist())])
        RemotePolicy(url).act([Observation(asked()["images"], np.zeros(1, np.float32), "go", past_actions=PAST[:1])])
        whole = {"image": wire.encode(frame()), "instruction": "go", "state": [0.0]}
        assert ask(url, "/act", {**whole, "past_actions": wire.encode(PAST[:2])})[0] == 200
        assert ask(url, "/act", {**whole, "past_actions": PAST[:2].tolist()})[0] == 200
        lengths = [2, 0, 1, 1, 2, 2]
        wanted = [PAST[2:], PAST[:0], PAST[:1], PAST[:1], PAST[:2], PAST[:2]]
        for observation, n, expected in zip(policy.seen, lengths, wanted, strict=True):
            assert observation.past_actions.dtype == np.float32 and len(observation.past_actions) == n
            np.testing.assert_array_equal(observation.past_actions, expected)
        with pytest.raises(PolicyServerError, match="got no past_actions; expected the last 2 actions of this episode, "
                           r"oldest first, 2 finite numbers each; fix: .*\[\] at the beginning"):  # fmt: skip
            client.act([asked()])
        for wrong, message in (
            (wire.encode(PAST[:, :1]), "past_actions of shape (4, 1)"), ([[1.0], [2.0]], "past_actions of shape (2, 1)"),
            ([[1.0, 2.0], [3.0]], "past_actions that are not lists of numbers of one length"), ([1.0, 2.0], "that are not lists"),
            ([[1.0, "a"]], "that are not lists of numbers"), ([[1.0, 1e300]], "past_actions [[1.0, 1e+300]]"), (7, "past_actions: 7"),
        ):  # fmt: skip
            status, reply = ask(url, "/act", {**whole, "past_actions": wrong})
            assert status == 400 and message in reply["error"]["got"]


def test_a_policy_that_learned_to_do_without_is_asked_without():
    policy = Shown(optional=True)
    with running(make_app(policy)) as url, PolicyClient(url) as client:
        client.act([{"images": {"front": frame()}, "instruction": "go"}])
        assert policy.seen[0].past_actions is None and policy.seen[0].state is None
    plain = FakePolicy()
    with running(make_app(plain)) as url, PolicyClient(url) as client:
        client.act([{"images": {"front": frame()}, "instruction": "go"}])
        assert plain.seen[0].past_actions is None, "what was sent before there was a history still works"


ROBOTS = {
    "bimanual": (14, ("high", "left_wrist", "right_wrist"), {"history": 2, "numbers_as": "tokens", "bins": 256}),
    "bimanual, plain": (14, ("high", "left_wrist", "right_wrist"), {}),
    "arm": (7, ("agentview", "wrist"), {"history": 1, "history_dropout": 0.2}),
}


def robot_source(dim: int, cameras: tuple[str, ...]) -> ArraySource:
    rng = np.random.default_rng(dim)
    actions, states = [rng.uniform(-1, 1, (9, dim)) for _ in range(4)], [rng.normal(size=(9, dim)) for _ in range(4)]
    return ArraySource(
        actions, states, cameras=dict.fromkeys(cameras, (32, 32)), name="robot",
        action_names=tuple(f"joint_{i}" for i in range(dim)), state_names=tuple(f"q_{i}" for i in range(dim)),
    )  # fmt: skip


@pytest.mark.parametrize("robot", sorted(ROBOTS))
def test_many_dimensions_and_cameras_end_to_end(folder, tmp_path, monkeypatch, robot):
    dim, cameras, more = ROBOTS[robot]
    source = robot_source(dim, cameras)
    monkeypatch.setattr("vla.finetune.sft_setup.open_sources", lambda *_: ([source], None))
    settings = sft_settings(
        folder, out=tmp_path / "run", data=("robot",), horizon=4, steps=3, holdout_episodes=1, **more
    )
    policy = load_policy(sft.run(settings))
    assert policy.metadata["action_dim"] == len(policy.metadata["state_names"]) == dim
    assert policy.spec.image.cameras == cameras and policy.spec.action.horizon == 4
    dataset, _ = open_datasets(settings)
    show_history(dataset, policy.spec)
    seen = [dataclasses.replace(observation_of(dataset[i]), key=(i,)) for i in (0, 5)]
    local = policy.act(seen)
    assert all(chunk.ok and chunk.actions.shape == (4, dim) for chunk in local)
    assert policy.encode(seen)["pixel_values"].shape[0] == 2 * len(cameras)
    with running(make_app(policy)) as url:
        remote = RemotePolicy(url)
        for mine, theirs in zip(local, remote.act(seen), strict=True):
            np.testing.assert_array_equal(mine.token_ids, theirs.token_ids)
            np.testing.assert_allclose(mine.actions, theirs.actions)
        with pytest.raises(VlaError, match=f"all of .*{cameras[-1]}"):
            remote.act([dataclasses.replace(seen[0], images={cameras[0]: seen[0].images[cameras[0]]})])
        with pytest.raises(VlaError, match=f"expected {dim} finite numbers"):
            remote.act([dataclasses.replace(seen[0], state=np.zeros(3, np.float32))])
