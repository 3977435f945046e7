"""Language motions: the phrases of the data, the two queries of a policy that says them, and its training."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from serving import FakePolicy, running
from sources import ARM, ArraySource
from test_sft_launch import run_two
from test_sft_resume import same_run
from training import fake_dataset, in_two_parts, sft_settings, tiny_backbone

from vla import cli, merge
from vla.backbone import Backbone, load_backbone
from vla.eval.recording import record
from vla.eval.results import EPISODES_FILE, read_rows
from vla.files import append_jsonl, read_jsonl
from vla.finetune import rl, sft
from vla.finetune.data import data_inspect
from vla.finetune.data.language_motion import STILL, MotionRule, all_phrases, label_frames
from vla.language_motion import PhraseTrie, asked, choose_phrases, phrase_grammar, phrase_ids
from vla.motion_spec import MotionSpec, motion_template
from vla.policy import LocalPolicy, load_policy
from vla.rollout import run_episodes
from vla.serve.app import make_app
from vla.serve.remote_policy import RemotePolicy
from vla.spec import from_json, read_spec, to_json
from vla.testing import FakeSuite
from vla.types import EpisodeRequest, Observation, VlaError

WORDS = ("dx=right/left", "dy=forward/backward")


def phrases_of(source: ArraySource, **rule: object) -> list[str]:
    labels = label_frames(source, MotionRule(**rule), gripper_convention="+1 closes, -1 opens")  # pyright: ignore[reportArgumentType]
    return [labels.phrases[k] for k in labels.of_frame]


def arm(rows: list[list[float]]) -> np.ndarray:
    return np.array(rows, np.float32)


def test_the_largest_movements_come_first_and_the_gripper_last():
    rows = [
        [0.5, 1.0, 0, 0, 0, 0, -1],
        [1.0, 0.1, 0, 0, 0, 0, -1],
        [0, 0, -1.0, 0, 0, 0, 1],
        [0, 0, 0, 0, 0, 1, 1],
        [0] * 6 + [1.0],
    ]
    found = phrases_of(ArraySource([arm(rows)]), lookahead=1)
    assert found == [
        "move arm left and forward",
        "move arm forward",
        "move arm down, close gripper",
        "rotate arm counterclockwise",
        STILL,
    ]


def test_a_window_ends_with_its_episode():
    first = arm([[1, 0, 0, 0, 0, 0, 1], [1, 0, 0, 0, 0, 0, 1]])
    second = arm([[-1, 0, 0, 0, 0, 0, -1]] * 2)
    found = phrases_of(ArraySource([first, second]), lookahead=4)
    assert found == ["move arm forward"] * 2 + ["move arm backward"] * 2


def test_opposite_movements_within_the_window_cancel():
    rows = arm([[1, 0, 0.3, 0, 0, 0, 1], [-1, 0, 0.3, 0, 0, 0, 1]])
    assert phrases_of(ArraySource([rows]), lookahead=2)[0] == "move arm up"


def test_absolute_targets_are_differenced_and_angles_go_the_short_way():
    turn = np.linspace(3.0, 3.6, 7)
    wrapped = (turn + np.pi) % (2 * np.pi) - np.pi
    rows = np.zeros((7, 7), np.float32)
    rows[:, 0], rows[:, 5], rows[:, 6] = np.linspace(5, 4, 7), wrapped, 1
    found = phrases_of(ArraySource([rows]), delta=False, lookahead=2)
    assert found[2] == "move arm backward, rotate arm counterclockwise"


@pytest.mark.parametrize(("convention", "word"), [("1 open, 0 closed", "open"), ("0 closes, 1 opens", "open"),
                                                  ("-1 opens, +1 closes", "close"), ("+1 closes", "close")])  # fmt: skip
def test_the_gripper_speaks_by_its_convention(convention, word):
    rows = np.zeros((4, 7), np.float32)
    rows[2:, 6] = 1
    labels = label_frames(ArraySource([rows]), MotionRule(lookahead=1), gripper_convention=convention)
    assert [labels.phrases[k] for k in labels.of_frame] == [STILL, STILL, f"{word} gripper", STILL]


def test_labels_match_a_plain_loop():
    rng = np.random.default_rng(3)
    lengths = rng.integers(1, 30, 12)
    actions = [np.concatenate([rng.normal(size=(n, 6)) * [1, 2, 0.1, 0.5, 0.5, 3], rng.choice([-1.0, 1.0], (n, 1))], 1)
               for n in lengths]  # fmt: skip
    source = ArraySource(actions)
    got = phrases_of(source, lookahead=5, threshold=0.3)
    all_rows = source.actions().astype(np.float64)
    fast = np.quantile(np.abs(all_rows), 0.99, axis=0)
    words = [("forward", "backward"), ("left", "right"), ("up", "down")]
    verbs = ["move arm"] * 3 + ["roll wrist", "tilt arm", "rotate arm"]
    words += [("right", "left"), ("down", "up"), ("counterclockwise", "clockwise")]
    for span in source.episodes:
        for t in range(span.start, span.stop):
            window = all_rows[t : min(t + 5, span.stop)]
            speed = window[:, :6].mean(0) / fast[:6]
            parts: dict[str, list[str]] = {}
            for d in sorted(range(6), key=lambda d: -abs(speed[d]))[:3]:
                if abs(speed[d]) >= 0.3:
                    parts.setdefault(verbs[d], []).append(words[d][int(speed[d] < 0)])
            said = [f"{verb} {' and '.join(found)}" for verb, found in parts.items()]
            change = window[-1, 6] - all_rows[max(t - 1, span.start), 6]
            said += ["close gripper"] if change >= 1 else ["open gripper"] if change <= -1 else []
            assert got[t] == (", ".join(said) or STILL), t


def test_names_of_many_datasets_have_words_and_other_frames_have_theirs():
    for names in (("x", "y", "z"), ("action.delta_x", "delta_y", "d_z"), ("dx", "dy", "droll")):
        assert len(phrases_of(ArraySource([arm([[1, 0, 0]])], action_names=names), lookahead=1)) == 1
    source = ArraySource([arm([[1, 0.0], [0, 1]])], action_names=("dx", "base"))
    assert phrases_of(source, lookahead=1, words=("dx=right/left", "base=turn base left/turn base right")) == [
        "move arm right", "turn base left",
    ]  # fmt: skip
    assert phrases_of(source, lookahead=1, words=("base=",)) == ["move arm forward", STILL]


def test_counts_are_ordered_and_constant_data_holds_still():
    still = ArraySource([np.full((5, 7), 0.0)])
    labels = label_frames(still, MotionRule(), gripper_convention="1 opens")
    assert labels.counts() == {STILL: 5}
    moving = label_frames(ArraySource([arm([[1, 0, 0, 0, 0, 0, 1]] * 7)]), MotionRule(), gripper_convention="1 opens")
    assert all_phrases([labels, moving]) == ("move arm forward", STILL)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"words": ("nowhere=up/down",)}, "words for nowhere; expected dimensions of the actions: dx, dy"),
        ({"words": ("dx=up",)}, "motion words 'dx=up'; expected NAME=PLUS/MINUS"),
        ({"words": ("dx=up/up",)}, "motion words"),
        ({"words": ("dx=up/down", "dx=left/right")}, "each name once"),
        ({"lookahead": 0}, "lookahead 0"),
        ({"threshold": 0.0}, "threshold 0"),
    ],
)
def test_bad_rules(change, message):
    with pytest.raises(VlaError, match=message):
        phrases_of(ArraySource([np.zeros((2, 7))]), **change)


def test_a_dimension_without_words_is_an_error():
    with pytest.raises(VlaError, match=r"without words: joint_1, joint_2.*'joint_1=forward/backward'"):
        phrases_of(ArraySource([np.zeros((2, 2))], action_names=("joint_1", "joint_2")))
    with pytest.raises(VlaError, match="without words: gripper.*close gripper/open gripper"):
        label_frames(ArraySource([np.zeros((2, 7))]), MotionRule())
    assert ARM[6] == "gripper"


def test_inspect_counts_them(tmp_path, capsys):
    fake_dataset(tmp_path, 2)
    data_inspect.run(data_inspect.Settings(str(tmp_path / "fake"), motions=3, motion_words=WORDS))
    out = capsys.readouterr().out
    assert "motion of the next 3 steps" in out and "move arm" in out


# The policy


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("motion")
    fake_dataset(folder)
    tiny_backbone(folder)
    return folder


def motion_settings(folder: Path, out: str, **changes: object) -> sft.Settings:
    base = {"out": folder / out, "language_motion": True, "motion_words": WORDS, "free_running_samples": 4}
    return sft_settings(folder, **{**base, **changes})


def rows_of(settings: sft.Settings, key: str = "loss") -> list[dict]:
    return [row for row in read_jsonl(settings.out / "metrics.jsonl") if key in row]


@pytest.fixture(scope="module")
def trained(folder) -> sft.Settings:
    settings = motion_settings(
        folder, "trained", steps=60, lr=5e-3, batch_size=8, save_every_steps=60, eval_every_steps=60
    )
    sft.run(settings)
    return settings


def observations(n: int = 5, **changes: object) -> list[Observation]:
    rng = np.random.default_rng(0)
    rows = []
    for k in range(n):
        image = rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)
        state = rng.uniform(0, 1, 2).astype(np.float32)
        rows.append(Observation({"top": image}, state, "reach-near the green square", key=(7, k)))
    return [dataclasses.replace(row, **changes) for row in rows]


def open_policy(settings: sft.Settings, **options: object) -> LocalPolicy:
    return load_policy(settings.out / "policy", **options)  # pyright: ignore[reportArgumentType]


def with_camera(policy: LocalPolicy, rows: list[Observation]) -> list[Observation]:
    camera = policy.spec.image.cameras[0]
    return [dataclasses.replace(row, images={camera: next(iter(row.images.values()))}) for row in rows]


def test_losses_of_motion_and_actions_are_logged_and_fall(trained):
    rows = rows_of(trained)
    for name in ("loss", "motion_loss"):
        assert sum(row[name] for row in rows[-5:]) < 0.8 * sum(row[name] for row in rows[:5]), name
    held = rows_of(trained, "holdout_loss")[-1]
    for name in ("motion_token_accuracy", "motion_accuracy"):
        assert 0 <= rows[-1][name] <= 1 and 0 <= held[f"holdout_{name}"] <= 1
    assert held["holdout_motion_loss"] > 0


def test_the_policy_says_a_known_phrase_and_acts_by_it(trained):
    policy = open_policy(trained)
    assert policy.spec.motion is not None
    phrases = policy.spec.motion.phrases
    assert policy.metadata["motions"] == list(phrases)
    rows = with_camera(policy, observations())
    chunks = policy.act(rows)
    assert all(chunk.ok and chunk.motion in phrases for chunk in chunks)
    told = policy.act([dataclasses.replace(row, motion=chunk.motion) for row, chunk in zip(rows, chunks, strict=True)])
    for a, b in zip(chunks, told, strict=True):  # the choice and the action query are two passes
        np.testing.assert_array_equal(a.token_ids, b.token_ids)
        assert a.motion == b.motion
    alone = [policy.act([row])[0] for row in rows]
    for a, b in zip(chunks, alone, strict=True):
        np.testing.assert_array_equal(a.token_ids, b.token_ids)
        assert a.motion == b.motion


def test_log_probabilities_are_those_of_the_actions_given_the_motion(trained):
    policy = open_policy(trained, temperature=0.7)
    rows = with_camera(policy, observations())
    for row, chunk in zip(rows, policy.act(rows), strict=True):
        assert chunk.token_ids is not None and chunk.logprobs is not None
        seen = dataclasses.replace(row, motion=chunk.motion)
        ids = torch.from_numpy(chunk.token_ids)[None]
        with torch.no_grad():
            logits = policy.backbone.action_logits(policy.encode([seen]), ids)[0][:, policy.legal_ids] / 0.7
        expected = torch.log_softmax(logits, -1).gather(1, torch.searchsorted(policy.legal_ids, ids[0])[:, None])[:, 0]
        np.testing.assert_allclose(chunk.logprobs, expected.numpy(), atol=1e-4)


def test_a_person_can_say_the_motion(trained):
    policy = open_policy(trained)
    row = with_camera(policy, observations(1))[0]
    assert policy.act([dataclasses.replace(row, motion="rotate arm")])[0].motion == "rotate arm"
    with pytest.raises(VlaError, match="one line of up to 1000 characters"):
        policy.act([dataclasses.replace(row, motion="up\ndown")])
    prompt = asked(dataclasses.replace(row, motion="move arm up"), policy.spec)[0].instruction
    assert prompt == "reach-near the green square, with the motion: move arm up"


def test_the_motion_decides_the_prompt_of_the_actions(trained):
    policy = open_policy(trained)
    row = with_camera(policy, observations(1))[0]
    words = policy.backbone.processor.tokenizer
    asks, acts = (
        words.decode(policy.encode([r])["input_ids"][0]) for r in (row, dataclasses.replace(row, motion="move arm up"))
    )
    assert "What motion should the robot make to reach-near the green square?" in asks
    assert "What action should the robot take to reach-near the green square, with the motion: move arm up?" in acts


def test_served_as_it_is_here(trained):
    policy = open_policy(trained)
    rows = with_camera(policy, observations(3))
    with running(make_app(policy)) as url:
        remote = RemotePolicy(url)
        told = dataclasses.replace(rows[0], motion="move arm up")
        for mine, theirs in zip(policy.act([*rows, told]), remote.act([*rows, told]), strict=True):
            assert mine.motion == theirs.motion != ""
            np.testing.assert_array_equal(mine.token_ids, theirs.token_ids)
        with pytest.raises(VlaError, match="one line of up to 1000 characters"):
            remote.act([dataclasses.replace(rows[0], motion="up\ndown")])
    with running(make_app(FakePolicy())) as url, pytest.raises(VlaError, match="the policy has no language motions"):
        seen = Observation({"front": np.zeros((4, 4, 3), np.uint8)}, None, "pick up the cup", motion="move arm up")
        RemotePolicy(url).act([seen])


def test_merged_it_says_the_same(trained, tmp_path):
    merge.run(merge.Settings(trained.out / "policy", tmp_path / "merged"))
    before, after = open_policy(trained), load_policy(tmp_path / "merged")
    rows = with_camera(before, observations())
    for a, b in zip(before.act(rows), after.act(rows), strict=True):
        assert a.motion == b.motion
        np.testing.assert_allclose(a.actions, b.actions, atol=1e-4)


def test_evaluations_record_them(trained, tmp_path):
    policy, suite = open_policy(trained), FakeSuite(max_steps=6)
    (result,) = run_episodes(
        policy, suite, [EpisodeRequest("reach-near", 1, tags={"index": 0})], n_workers=0, keep_queries=True
    )
    row = record(tmp_path, suite, result, 1)
    assert len(row.motions) == len(result.queries) and set(row.motions) <= set(policy.metadata["motions"])
    append_jsonl(tmp_path / EPISODES_FILE, dataclasses.asdict(row))
    assert read_rows(tmp_path) == {("reach-near", 0): row}


def test_training_goes_on_with_its_motions(trained, folder):
    before = read_spec(trained.out / "policy").motion
    assert before is not None
    words = ("dx=west/east", "dy=forward/backward")
    settings = motion_settings(
        folder, "on", steps=1, from_=str(trained.out / "policy"), language_motion=True, motion_words=words
    )
    sft.run(settings)
    after = read_spec(settings.out / "policy").motion
    assert after is not None and (after.template, after.joined) == (before.template, before.joined)
    assert after.phrases[: len(before.phrases)] == before.phrases and any("west" in phrase for phrase in after.phrases)
    assert rows_of(settings)[0]["motion_loss"] < rows_of(trained)[0]["motion_loss"]


def test_training_goes_on_with_its_rule(trained, folder):
    before = read_spec(trained.out / "policy").motion
    assert before is not None and before.words == trained.motion_words and before.words
    plain = {
        name: getattr(sft.Settings, name)
        for name in ("language_motion", "motion_words", "motion_lookahead", "motion_threshold")
    }
    settings = motion_settings(folder, "rule", steps=1, from_=str(trained.out / "policy"), **plain)
    sft.run(settings)
    assert read_spec(settings.out / "policy").motion == before
    with pytest.raises(VlaError, match="--motion-template with --from a policy with language motions"):
        sft.run(dataclasses.replace(settings, out=folder / "other", motion_template="Motion to {instruction}?"))


def test_resumed_exactly(folder):
    settings = motion_settings(folder, "straight", lora_dropout=0.2)
    sft.run(settings)
    halves = dataclasses.replace(settings, out=folder / "halves")
    in_two_parts(halves)
    same_run(halves.out, settings.out)


def test_accumulating_changes_nothing(folder):
    one = motion_settings(folder, "1x4", steps=3, batch_size=4)
    four = motion_settings(folder, "4x1", steps=3, batch_size=1, grad_accumulation=4)
    sft.run(one)
    sft.run(four)
    for a, b in zip(rows_of(one), rows_of(four), strict=True):
        for name in ("loss", "motion_loss", "grad_norm"):
            assert a[name] == pytest.approx(b[name], rel=2e-4), name


def test_the_weight_scales_the_gradient_and_not_the_losses(folder):
    rows = []
    for weight in (1e-9, 1.0):
        settings = motion_settings(folder, f"weight {weight}", steps=1, motion_weight=weight)
        sft.run(settings)
        rows.append(rows_of(settings)[0])
    assert rows[0]["loss"] == rows[1]["loss"] and rows[0]["motion_loss"] == rows[1]["motion_loss"]
    assert rows[1]["grad_norm"] != pytest.approx(rows[0]["grad_norm"], rel=1e-3)


def test_beside_past_actions_and_numbers_as_tokens(folder):
    settings = motion_settings(folder, "tokens", steps=2, bins=256, numbers_as="tokens", history=2, history_dropout=0.3)
    policy = load_policy(sft.run(settings))
    assert policy.spec.motion is not None
    assert policy.spec.motion.template.startswith("Past actions: {history}. State: {state}. In: What motion should")
    row = with_camera(policy, observations(1, past_actions=np.zeros((1, 2), np.float32)))[0]
    assert policy.act([row])[0].motion in policy.spec.motion.phrases


def test_the_command_line():
    words = [
        "finetune",
        "--data",
        "a",
        "b",
        "--out",
        "run",
        "--language-motion",
        "--motion-words",
        "dx=right/left",
        "dy=",
    ]
    _, settings = cli.parse([*words, "--vl-data", "rows.jsonl", "hf:a/b#split=train", "--vl-weights", "1", "3"])
    assert isinstance(settings, sft.Settings)
    assert settings.motion_words == ("dx=right/left", "dy=") and settings.vl_data == (
        "rows.jsonl",
        "hf:a/b#split=train",
    )
    assert settings.vl_weights == (1.0, 3.0)


@pytest.mark.slow
def test_two_processes_equal_one(folder):
    """With rows about images beside it, so that every loss there is has its gradients averaged."""
    lines = []
    for k in range(3):
        Image.new("RGB", (20, 20), (80 * k, 0, 0)).save(folder / f"{k}.png")
        lines.append(json.dumps({"image": f"{k}.png", "caption": f"number {k}"}))
    (folder / "rows.jsonl").write_text("\n".join(lines))
    both = {
        "language_motion": True,
        "motion_words": WORDS,
        "vl_data": [str(folder / "rows.jsonl")],
        "steps": 4,
        "vl_batch_size": 1,
    }
    one = motion_settings(
        folder, "one", **{**both, "vl_data": tuple(both["vl_data"]), "batch_size": 4, "vl_batch_size": 2}
    )
    sft.run(one)
    run_two(folder, "ddp", {"out": "two", "changes": {**both, "batch_size": 2}})
    for key in ("loss", "holdout_loss"):
        found = [[row for row in read_jsonl(folder / out / "metrics.jsonl") if key in row] for out in ("one", "two")]
        assert found[0]
        for a, b in zip(*found, strict=True):
            for name in {"loss", "motion_loss", "vl_loss", "holdout_loss", "holdout_motion_loss"} & set(a):
                assert a[name] == pytest.approx(b[name], rel=2e-5 if a["step"] == 1 else 2e-3), name


def test_workers_label_alike(folder):
    plain = motion_settings(folder, "here", steps=2, cache_images=False)
    ahead = dataclasses.replace(plain, out=folder / "ahead", data_workers=1)
    sft.run(plain)
    sft.run(ahead)
    assert [row["motion_loss"] for row in rows_of(plain)] == [row["motion_loss"] for row in rows_of(ahead)]


def test_dry_run_shows_the_motion_query(folder, capsys):
    sft.run(motion_settings(folder, "dry", dry_run=True))
    out = capsys.readouterr().out
    assert "language motions: " in out and "What motion should the robot make" in out


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"motion_words": ()}, None),
        ({"motion_words": ("dz=up/down",)}, "words for dz"),
        ({"template": "Do: {instruction} {state}"}, "pass --motion-template"),
        ({"template": "Do: {instruction} {state}", "motion_template": "How to {instruction}?"}, "fields of the prompt"),
        ({"motion_weight": 0.0}, "motion_weight 0"),
        ({"language_motion": False}, "without --language-motion"),
    ],
)
def test_bad_settings(folder, changes, message):
    if message is None:  # x and y have words of their own
        sft.run(motion_settings(folder, "bad", dry_run=True, **changes))
        return
    with pytest.raises(VlaError, match=message):
        sft.run(motion_settings(folder, "bad", **changes))
    assert not (folder / "bad").exists()


def test_reinforcement_learning_refuses(trained, folder):
    with pytest.raises(VlaError, match="with language motions.*no log-probability"):
        rl.run(rl.Settings(policy=trained.out / "policy", out=folder / "rl", device="cpu"), FakeSuite())
    assert not (folder / "rl").exists()


def test_other_policies_refuse_a_motion(folder):
    settings = sft_settings(folder, out=folder / "plain", steps=1)
    sft.run(settings)
    policy = open_policy(settings)
    row = with_camera(policy, observations(1, motion="move arm up"))[0]
    with pytest.raises(VlaError, match="for a policy without language motions"):
        policy.act([row])
    assert policy.act([dataclasses.replace(row, motion="")])[0].motion == ""
    assert policy.metadata["motions"] == []


def test_policies_from_before_open(trained, folder):
    spec = to_json(read_spec(trained.out / "policy"))
    assert from_json(json.loads(json.dumps(spec))).motion == read_spec(trained.out / "policy").motion
    del spec["motion"]
    assert from_json(spec).motion is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"phrases": ()}, "at least one phrase"),
        ({"phrases": ("move  arm",)}, "single spaces"),
        ({"phrases": ("a", "a")}, "each phrase once"),
        ({"template": "no field"}, "fields of the prompt"),
        ({"joined": "{motion}"}, "{instruction} and {motion}"),
    ],
)
def test_bad_specs(trained, change, message):
    spec = to_json(read_spec(trained.out / "policy"))
    with pytest.raises(VlaError, match=message):
        from_json({**spec, "motion": {**spec["motion"], **change}})


# The choice of a phrase


@pytest.fixture(scope="module")
def backbone(folder) -> Backbone:
    return load_backbone(str(folder / "llava"))


def test_any_set_of_phrases_is_said_whole(backbone):
    phrases = ("move arm forward", "move arm forward and left", "move arm", "close gripper", "hold still")
    grammar = phrase_grammar(
        backbone, MotionSpec(phrases, motion_template("What action should the robot take to {instruction}"))
    )
    picture = Image.fromarray(np.zeros((32, 32, 3), np.uint8))
    prompts = [f"{word}?" for word in "abcdefgh"]
    said = choose_phrases(backbone, backbone.encode(prompts, [[picture]] * 8), grammar)
    assert set(said) <= set(phrases)
    alone = [choose_phrases(backbone, backbone.encode([prompt], [[picture]]), grammar)[0] for prompt in prompts]
    assert said == alone


def test_the_trie_is_the_set_of_phrases(backbone):
    phrases = ("up", "up and left", "down")
    grammar = phrase_grammar(backbone, MotionSpec(phrases, "{instruction}"))
    rows = [phrase_ids(backbone, phrase) for phrase in phrases]
    assert max(map(len, rows)) == grammar.max_tokens
    for row in rows:
        grammar.row_masks(np.array([row]))
    for wrong in (rows[1][:-1], [*rows[0][:-1], rows[2][0]]):
        with pytest.raises(ValueError, match="complete|not legal"):
            grammar.row_masks(np.array([wrong]))


def test_phrases_of_the_same_tokens_are_an_error():
    with pytest.raises(VlaError, match="'a' and 'b', which are the same tokens"):
        PhraseTrie([[1, 2], [1, 2]], ["a", "b"])


def test_greedy_follows_the_likeliest_legal_token(backbone):
    """Against a loop that asks the model token by token."""
    phrases = ("move arm forward", "move arm left", "tilt arm up", "hold still")
    grammar = phrase_grammar(backbone, MotionSpec(phrases, "{instruction}"))
    inputs = backbone.encode(["which way?"], [[Image.fromarray(np.full((32, 32, 3), 90, np.uint8))]])
    rows = [phrase_ids(backbone, phrase) for phrase in phrases]
    prefix: list[int] = []
    while len(left := [row for row in rows if row[: len(prefix)] == prefix]) and prefix not in rows:
        with torch.no_grad():
            logits = backbone.action_logits(inputs, torch.tensor([[*prefix, 0]]))[0, -1]
        prefix.append(max({row[len(prefix)] for row in left}, key=lambda id_: float(logits[id_])))
    assert choose_phrases(backbone, inputs, grammar) == [phrases[rows.index(prefix)]]
