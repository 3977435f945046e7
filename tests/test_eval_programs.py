"""Sharding and merging, comparing, the documented JSON, protocols, and policies that need no pictures."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from json_schema import violations

from vla import cli
from vla.eval import compare, merge
from vla.eval import run as run_module
from vla.eval.results import EvalResult, Tally, read_result, read_rows
from vla.eval.run import Settings, resolved, run
from vla.eval.shards import deal, parse_shard
from vla.eval.statistics import mcnemar, paired_difference
from vla.files import read_jsonl
from vla.rollout import run_episodes
from vla.spec import ActionSpec, BackboneSpec, ImageSpec, PolicySpec, PromptSpec, TokenSpec
from vla.testing import CAMERA, FakeEnv, FakeSuite, NoisyPolicy
from vla.tokenizers.placement import Placement
from vla.types import ActionChunk, EpisodeRequest, Observation, VlaError

ROOT = Path(__file__).resolve().parents[1]


def settings(out: Path, **changes: Any) -> Settings:
    base = Settings("noisy", suite="fake", episodes_per_task=6, temperature=1.0, workers=0, videos_per_task=1, out=out)
    return replace(base, **changes)


def evaluate(out: Path, noise: float = 0.1, **changes: Any) -> EvalResult:
    return run(settings(out, **changes), policy=NoisyPolicy(noise=noise))


def tree(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


# --- shards ---


@pytest.mark.parametrize("n_shards", [1, 2, 3, 5])
def test_dealing_is_complete_disjoint_and_balanced(n_shards: int) -> None:
    tasks = ("a", "b", "c", "d")
    hands = [deal(tasks, 7, f"{i}/{n_shards}") for i in range(1, n_shards + 1)]
    assert sorted(sum(hands, [])) == sorted(deal(tasks, 7)) and len(deal(tasks, 7)) == 28
    assert max(map(len, hands)) - min(map(len, hands)) <= 1
    for task in tasks:
        counts = [sum(name == task for name, _ in hand) for hand in hands]
        assert max(counts) - min(counts) <= 1, "every shard has its share of every task"
    longer = [deal(tasks, 9, f"{i}/{n_shards}") for i in range(1, n_shards + 1)]
    assert all(set(hand) <= set(more) for hand, more in zip(hands, longer, strict=True))


@pytest.mark.parametrize("text", ["0/2", "3/2", "1", "a/b", "1/0", "-1/2", "1/2/3"])
def test_a_bad_shard_is_refused(text: str, tmp_path: Path) -> None:
    with pytest.raises(VlaError, match=re.escape(f"got shard {text!r}; expected i/n with 1 <= i <= n")):
        parse_shard(text)
    with pytest.raises(VlaError, match="got shard"):
        evaluate(tmp_path / "out", shard=text)
    assert not (tmp_path / "out").exists()


def test_merged_shards_equal_one_run(tmp_path: Path) -> None:
    whole = evaluate(tmp_path / "whole")
    parts = [tmp_path / f"part{i}" for i in (1, 2, 3)]
    results = [evaluate(part, shard=f"{i}/3") for i, part in enumerate(parts, 1)]
    assert [len(result.rows) for result in results] == [4, 4, 4]
    assert [len(read_result(part).rows) for part in parts] == [4, 4, 4]
    before = [tree(part) for part in parts]
    out = tmp_path / "merged"
    command = ["eval", "merge", str(parts[2]), str(parts[0]), str(parts[1]), "--out", str(out)]
    assert cli.main(command) == 0
    assert [tree(part) for part in parts] == before
    merged = read_result(out)
    assert merged.outcomes() == whole.outcomes()
    assert [(row.task, row.index) for row in merged.rows] == [(row.task, row.index) for row in whole.rows]
    for name in (None, "reach-near", "reach-far"):
        assert merged.tally(name) == whole.tally(name)
    assert merged.settings["shard"] is None and merged.settings["out"] == str(out)
    assert merged.command.count("\n") == 2
    kept = {name for name in tree(tmp_path / "whole") if name.startswith(("videos/", "frames/"))}
    assert kept == {name for name in tree(out) if name.startswith(("videos/", "frames/"))}
    assert (out / "report.html").read_text().count("data:video/mp4;base64,") == 2
    first = tree(out)
    assert cli.main(command) == 0, "merging again is harmless"
    assert tree(out).keys() == first.keys()

    policy = NoisyPolicy(noise=0.1)
    again = run(settings(out), policy=policy)
    assert policy.batch_sizes == [] and again.outcomes() == whole.outcomes(), "the merged folder is an evaluation's own"


def test_what_cannot_be_merged_is_refused_and_nothing_written(tmp_path: Path) -> None:
    a, b, out = tmp_path / "a", tmp_path / "b", tmp_path / "out"
    evaluate(a, shard="1/2")
    evaluate(b, shard="2/2")
    evaluate(tmp_path / "seed", shard="2/2", seed=5)
    evaluate(tmp_path / "whole")

    def refused(*shards: Path, match: str) -> None:
        with pytest.raises(VlaError, match=match):
            merge.run(merge.Settings(shards, out))
        assert not out.exists()

    refused(a, match=r"got 6 episodes, without 6 \(reach-near 1, .*\.\.\.\); expected all 12; .*--allow-missing")
    refused(a, tmp_path / "seed", match=r"got seed=5 in .*seed, but 1000000 in .*a; expected shards of one evaluation")
    refused(a, tmp_path / "whole", match=r"episode 0 of reach-near in both .*a and .*whole")
    refused(a, a, match="in both")
    refused(a, tmp_path / "nowhere", match=r"no settings.json in .*nowhere")
    refused(match="no shard")
    (b / "result.json").unlink()  # an unfinished shard is all right as long as its episodes are there
    merge.run(merge.Settings((a, b), out))
    with pytest.raises(VlaError, match=r"with other episodes; .*choose another --out"):
        merge.run(merge.Settings((a,), out, allow_missing=True))


def test_a_merge_with_missing_episodes_can_be_completed(tmp_path: Path) -> None:
    whole = evaluate(tmp_path / "whole")
    evaluate(tmp_path / "a", shard="1/2")
    result = merge.run(merge.Settings((tmp_path / "a",), tmp_path / "out", allow_missing=True))
    assert result.tally().trials == 6
    assert evaluate(tmp_path / "out").outcomes() == whole.outcomes()


# --- comparing ---


def test_compare_says_what_the_pairs_say(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a = evaluate(tmp_path / "a", noise=0.12, episodes_per_task=10)
    b = evaluate(tmp_path / "b", noise=0.01, episodes_per_task=12, n_execute=5)
    page = tmp_path / "page.html"
    assert cli.main(["eval", "compare", str(tmp_path / "a"), str(tmp_path / "b"), "--out", str(page)]) == 0
    value = json.loads((tmp_path / "page.json").read_text())
    keys = sorted(a.outcomes().keys() & b.outcomes().keys())
    x, y = [a.outcomes()[key] for key in keys], [b.outcomes()[key] for key in keys]
    overall = value["overall"]
    assert (overall["gain"], overall["low"], overall["high"]) == paired_difference(x, y)
    assert overall["p_value"] == mcnemar(x, y) and overall["pairs"] == 20
    assert overall["only_b"] - overall["only_a"] == sum(y) - sum(x) > 3
    assert (value["a"]["unpaired"], value["b"]["unpaired"]) == (0, 4)
    assert set(value["tasks"]) == {"reach-near", "reach-far"}
    assert sum(task["only_b"] for task in value["tasks"].values()) == overall["only_b"]
    assert {entry["name"] for entry in value["differences"]} == {"n_execute", "episodes_per_task"}
    out = capsys.readouterr().out
    assert "b is better" in out and "differs: n_execute: None and 5" in out and "reach-near" in out
    html = page.read_text()
    HTMLParser().feed(html)
    assert "<script" not in html and not re.search(r'(src|href)="(?!data:)', html)
    for text in ("McNemar", "By task", "reach-far", "n_execute"):
        assert text in html

    same = compare.run(compare.Settings(tmp_path / "a", tmp_path / "a"))
    assert same["overall"]["p_value"] == 1.0 and same["differences"] == []
    assert "no difference shown by 20 pairs" in capsys.readouterr().out


def test_what_cannot_be_compared_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    evaluate(tmp_path / "a", episodes_per_task=1)
    evaluate(tmp_path / "b", episodes_per_task=1, seed=7)
    for b, out, match in (
        ("b", None, "without a common"),
        ("nowhere", None, "no result.json in .*nowhere"),
        ("a", tmp_path / "page.txt", "expected a name that ends in .html"),
    ):
        with pytest.raises(VlaError, match=match):
            compare.run(compare.Settings(tmp_path / "a", tmp_path / b, out))
    capsys.readouterr()
    assert cli.main(["eval", "compare", str(tmp_path / "a")]) == 2
    assert cli.main(["eval", "compar", "x"]) == 2
    assert "did you mean `vla eval compare`?" in capsys.readouterr().err


# --- the documented JSON ---


def schema() -> dict[str, Any]:
    return json.loads((ROOT / "eval" / "result.schema.json").read_text())


def check(value: Any, form: str) -> list[str]:
    root = schema()
    assert violations(value, root, root) == [] or violations(value, root["$defs"][form], root) != []
    return violations(value, root["$defs"][form], root)


def test_everything_written_obeys_the_schema(tmp_path: Path) -> None:
    suite = FakeSuite(faults=(("reach-near", 1_000_002, "raise_step"),))
    keys = ((1_000_000, 0, 0),)
    run(settings(tmp_path / "a"), policy=NoisyPolicy(noise=0.1, undecodable_keys=keys), suite=suite)
    evaluate(tmp_path / "b", n_execute=3)
    evaluate(tmp_path / "empty", tasks=("reach-near",), episodes_per_task=1)
    for name in ("a", "b", "empty"):
        result = json.loads((tmp_path / name / "result.json").read_text())
        assert check(result, "result") == []
        rows = read_jsonl(tmp_path / name / "episodes.jsonl")
        assert rows and all(check(row, "episode") == [] for row in rows)
    compare.run(compare.Settings(tmp_path / "a", tmp_path / "b", tmp_path / "page.html"))
    assert check(json.loads((tmp_path / "page.json").read_text()), "comparison") == []

    result = json.loads((tmp_path / "a" / "result.json").read_text())
    del result["wall_s"]
    result["overall"]["successes"] = -1
    result["overall"]["nonsense"] = 0
    result["versions"]["numpy"] = 2
    assert sorted(check(result, "result")) == [
        "$.overall.successes: -1 against minimum 0",
        "$.overall: nonsense is unknown",
        "$.versions.numpy: 2 is no string",
        "$: wall_s is missing",
    ]


def test_every_field_is_documented() -> None:
    text = (ROOT / "docs" / "result-schema.md").read_text()
    documented = set(re.findall(r"`([a-z_0-9]+)`", text))

    def names(part: Any) -> set[str]:
        if not isinstance(part, dict):
            return set()
        own = set(part.get("properties", {}))
        return own.union(
            *(names(sub) for key, sub in part.items()), *(names(s) for s in part.get("properties", {}).values())
        )

    assert names(schema()) - documented == set()


# --- outcomes ---


class EndsEarly(FakeEnv):
    """Gives up at its second step."""

    def step(self, action: np.ndarray) -> tuple[Observation, float, bool, bool, dict[str, Any]]:
        observation, reward, terminated, truncated, info = super().step(action)
        return observation, reward, terminated or self.n_steps == 2, truncated, info


class EndingSuite(FakeSuite):
    def make(self, task: str) -> FakeEnv:
        return (
            EndsEarly(self, next(t for t in self.tasks if t.name == task))
            if task == "reach-far"
            else super().make(task)
        )


def test_outcomes_are_counted_apart_and_failures_shown(tmp_path: Path) -> None:
    suite = EndingSuite(faults=(("reach-near", 1_000_003, "nan"),))
    result = run(settings(tmp_path), policy=NoisyPolicy(noise=0.1), suite=suite)
    far, near = result.tally("reach-far"), result.tally("reach-near")
    assert far.failures > 0 and far.timeouts == 0 and near.timeouts > 0 and near.failures == 0
    assert isinstance(far, Tally) and near.faults == 1
    for tally in (far, near, result.tally()):
        assert tally.successes + tally.failures + tally.timeouts + tally.undecodable == tally.trials
    failed = [row for row in result.rows if not row.success and row.fault is None]
    stills = [row for row in failed if row.last_frame]
    assert stills and all((row.video is None) != (row.last_frame is None) for row in failed)
    assert all((tmp_path / str(row.last_frame)).read_bytes()[:2] == b"\xff\xd8" for row in stills)
    report = (tmp_path / "report.html").read_text()
    assert report.count("data:image/jpeg;base64,") == len(stills)
    assert report.index("<h2>Failures") < report.index("<h2>Simulator faults")
    assert "non-finite state" in report and 'class="bad">time-out<' in report and 'class="bad">failure<' in report


# --- policies that need no pictures ---


class Blind(NoisyPolicy):
    """Steers by the state and says so."""

    @property
    def metadata(self) -> dict[str, Any]:
        return {**super().metadata, "reads_images": False}

    def act(self, observations: Any) -> list[ActionChunk]:
        assert all(observation.images == {} for observation in observations)
        seen = [replace(o, images={CAMERA: np.zeros((1, 1, 3), np.uint8)}) for o in observations]
        return super().act(seen)


class CountingEnv(FakeEnv):
    def frame(self) -> np.ndarray:
        with open(self.suite.name, "a") as file:
            file.write("x")
        return super().frame()


class CountingSuite(FakeSuite):
    """Its name is a file with one letter per frame drawn, in whatever process."""

    def make(self, task: str) -> FakeEnv:
        return CountingEnv(self, next(t for t in self.tasks if t.name == task))


@pytest.mark.parametrize("n_workers", [0, 1])
def test_frames_are_drawn_for_films_only_if_the_policy_reads_none(tmp_path: Path, n_workers: int) -> None:
    suite = CountingSuite(name=str(tmp_path / "drawn"))
    requests = [EpisodeRequest("reach-far", i, key=(7, i), tags={"i": i}) for i in range(6)]
    options: dict[str, Any] = {"n_workers": n_workers, "slots_per_worker": 2, "keep_queries": True}

    def drawn(**more: Any) -> tuple[list[Any], int]:
        Path(suite.name).write_text("")
        found = sorted(run_episodes(Blind(), suite, requests, **options, **more), key=lambda r: r.request.tags["i"])
        return found, len(Path(suite.name).read_text())

    plain, n_drawn = drawn()
    assert n_drawn == 0
    filmed, n_drawn = drawn(keep_frames=lambda request: request.tags["i"] == 1, render_every=2)
    assert n_drawn == len(filmed[1].frames) == 1 + filmed[1].n_steps // 2
    every, n_drawn = drawn(keep_frames=True)
    assert sum(len(result.frames) for result in every) == sum(len(result.queries) for result in every) <= n_drawn
    for a, b, c in zip(plain, filmed, every, strict=True):
        assert (a.success, a.n_steps) == (b.success, b.n_steps) == (c.success, c.n_steps)
        assert all(query.observation.images == {} for result in (a, b, c) for query in result.queries)


class TwoCameras(FakeEnv):
    def _observation(self) -> Observation:
        seen = super()._observation()
        return replace(seen, images={**seen.images, "wrist": 255 - seen.images[CAMERA]} if seen.images else {})


class TwoCameraSuite(FakeSuite):
    def make(self, task: str) -> FakeEnv:
        return TwoCameras(self, next(t for t in self.tasks if t.name == task))


@pytest.mark.parametrize("n_workers", [0, 1])
def test_a_film_shows_all_cameras_side_by_side_and_upright(tmp_path: Path, n_workers: int) -> None:
    suite = TwoCameraSuite(cameras=(CAMERA, "wrist"), frames_upside_down=True)
    (result,) = run_episodes(
        NoisyPolicy(), suite, [EpisodeRequest("reach-far", 3, key=(7, 3))], n_workers=n_workers, keep_frames=True,
        render_every=1, keep_queries=True,
    )  # fmt: skip
    assert len(result.frames) == result.n_steps + 1
    for frame in result.frames:
        assert frame.shape == (32, 64, 3)
        np.testing.assert_array_equal(frame[:, :32], 255 - frame[:, 32:])
    np.testing.assert_array_equal(result.frames[0][:, :32], result.queries[0].observation.images[CAMERA])

    from vla.eval.recording import upright

    np.testing.assert_array_equal(upright(result.frames[0], suite)[0], result.frames[0][-1])


# --- protocols and options of the simulator ---


def test_a_protocol_fills_what_the_user_left_open(tmp_path: Path) -> None:
    base = Settings("p", suite="libero_goal", protocol="oft", out=tmp_path)
    assert (resolved(base).episodes_per_task, resolved(base).n_execute) == (50, 8)
    mine = resolved(replace(base, episodes_per_task=3, n_execute=4))
    assert (mine.episodes_per_task, mine.n_execute) == (3, 4)
    assert resolved(replace(base, policy="expert")).n_execute is None
    assert resolved(Settings("p", out=tmp_path)).episodes_per_task == 20
    with pytest.raises(VlaError, match="got protocol 'openvl'; .*did you mean 'openvla'?"):
        resolved(replace(base, protocol="openvl"))
    with pytest.raises(VlaError, match="got suite 'metaworld' with protocol 'oft'"):
        run(replace(base, suite="metaworld"))
    assert "protocol" in run_module.IDENTITY


class PolicyOfADirectory(NoisyPolicy):
    """With what `policy.json` says, as a policy directory has it."""

    spec = PolicySpec(
        "mine", BackboneSpec("tiny"), ActionSpec(("dx",) * 6 + ("gripper",), 8, gripper_dim=6),
        ImageSpec(("agentview", "wrist"), 224), PromptSpec(), TokenSpec(n_symbols=256, placement=Placement.added(10, model_vocab_size=300).save()),
    )  # fmt: skip


def test_a_policy_that_disagrees_with_the_protocol_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    chosen = Settings("p", suite="libero_goal", protocol="openpi", episodes_per_task=1, out=tmp_path, workers=0)
    result = run(chosen, policy=PolicyOfADirectory(), suite=FakeSuite())
    told = result.policy_metadata["protocol_disagreements"]
    assert any(text.startswith("the policy has image.rotation_deg 0, protocol openpi has 180; fix: ") for text in told)
    assert sorted(text.split()[3] for text in told) == ["image.fit", "image.resize_filter", "image.rotation_deg"]
    assert f"warning: {told[0]}" in capsys.readouterr().err
    turned = replace(chosen, turn_frames=True, out=tmp_path / "turned")
    again = run(turned, policy=PolicyOfADirectory(), suite=FakeSuite()).policy_metadata["protocol_disagreements"]
    assert len(again) == 2 and not any("rotation" in text for text in again)
    assert "protocol_disagreements" not in run(
        replace(chosen, protocol=None, out=tmp_path / "free"), policy=PolicyOfADirectory(), suite=FakeSuite()
    ).policy_metadata  # fmt: skip


def test_options_that_a_suite_lacks_are_refused(tmp_path: Path) -> None:
    with pytest.raises(
        VlaError, match="got --sim-python for suite 'fake'; expected a suite that has it; fix: leave out"
    ):
        run(settings(tmp_path / "out", sim_python="python3.8"))
    with pytest.raises(VlaError, match="got --turn-frames for suite 'fake'"):
        run(settings(tmp_path / "out", turn_frames=True))
    with pytest.raises(VlaError, match="got --force-versions for suite 'fake'"):
        run(settings(tmp_path / "out", force_versions=True))
    assert not (tmp_path / "out").exists()


def test_reading_a_running_evaluation_changes_nothing(tmp_path: Path) -> None:
    evaluate(tmp_path)
    path = tmp_path / "episodes.jsonl"
    path.write_text(path.read_text() + '{"task": "reach-')
    before = path.read_bytes()
    assert len(read_rows(tmp_path)) == 12 and len(read_result(tmp_path).rows) == 12
    assert path.read_bytes() == before
