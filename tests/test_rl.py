"""RIPT-VLA end to end on the fake suite: groups, updates, exact resume, and no update without a signal."""

import dataclasses
import hashlib
import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from training import fake_dataset, in_process, sft_settings, tiny_backbone

from vla.card_facts import read_facts, write_facts
from vla.files import read_jsonl
from vla.finetune import rl, sft
from vla.finetune.checkpoint import save_checkpoint
from vla.policy import load_policy
from vla.testing import FakeSuite
from vla.types import ActionChunk, EpisodeRequest, EpisodeResult, Observation, Query, VlaError

SUITE = FakeSuite(task_names=("reach-near",), max_steps=6)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("rl")
    fake_dataset(folder)
    tiny_backbone(folder)
    sft.run(sft_settings(folder, out=folder / "sft", steps=30, batch_size=8, lr=5e-3, save_every_steps=30))
    return folder


def settings(folder: Path, **changes) -> rl.Settings:
    base = rl.Settings(
        policy=folder / "sft" / "policy", out=folder / "run", iterations=2, groups=2, group_size=4, max_groups=6,
        updates=2, workers=0, slots=8, micro_batch=8, device="cpu", lr=1e-3, warmup_updates=3,
    )  # fmt: skip
    return dataclasses.replace(base, **changes)


def adapter_hash(policy: Path) -> str:
    return hashlib.sha256((policy / "adapter" / "adapter_model.safetensors").read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def straight(folder) -> Path:
    return rl.run(settings(folder, out=folder / "straight"), SUITE)


def test_metrics_and_result(folder, straight):
    rows = read_jsonl(folder / "straight" / "metrics.jsonl")
    assert [row["iteration"] for row in rows] == [1, 2]
    for row in rows:
        assert row["generated"] == row["kept"] + row["all_equal"] and row["generated"] <= 6
        assert 0 <= row["success"] <= 1 and row["faults"] == 0 and row["undecodable"] == 0
        assert row["kept"] > 0, "choose a task of middling difficulty, or the test proves nothing"
        assert row["first_log_ratio_max"] < 1e-3, "rollout and update agree on the log-probabilities"
        assert row["optimizer_steps"] == 2 and row["entropy"] > 0
    assert [row["lr"] for row in rows] == pytest.approx([1e-3 * 2 / 3, 1e-3]), "after 2 and 4 updates, warm-up over 3"
    assert adapter_hash(straight) != adapter_hash(folder / "sft" / "policy")
    loaded = load_policy(straight)
    assert [entry["stage"] for entry in loaded.spec.provenance] == ["finetune", "rl"]
    assert (folder / "straight" / "curves.png").stat().st_size > 5000


def test_the_card_has_the_figures_of_both_trainings(folder, straight):
    rows = read_jsonl(folder / "straight" / "metrics.jsonl")
    first, second = read_facts(straight)["runs"]
    assert [(run["name"], run["counter"], run["steps"]) for run in (first, second)] == [("sft", "step", 30), ("straight", "iteration", 2)]  # fmt: skip
    assert second["figures"]["highest_success"] == max(row["success"] for row in rows)
    assert second["figures"]["success/reach-near"] == rows[-1]["success/reach-near"]
    text = (straight / "README.md").read_text()
    for words in (
        "Run `sft`, 30 steps", "| held-out loss |", "Run `straight`, 2 iterations, last values in its metrics.jsonl:",
        f"| success rate of the training roll-outs, sampled | {rows[-1]['success']:.4g} | `success` |",
        f"| success/reach-near | {rows[-1]['success/reach-near']:.4g} |", "has not been measured",
    ):  # fmt: skip
        assert words in text, words


def test_evaluations_of_the_policy_before_are_not_of_this_one(folder):
    start = folder / "evaluated"
    shutil.copytree(folder / "sft" / "policy", start)
    entry = {"name": "e", "suite": "fake", "tasks": ["t"], "successes": 1, "trials": 1, "faults": 0, "command": ""}
    write_facts(start, {**read_facts(start), "license": "mit", "evaluations": [entry]})
    result = rl.run(settings(folder, policy=start, out=folder / "after", iterations=1, groups=1, max_groups=1), SUITE)
    facts = read_facts(result)
    assert facts["license"] == "mit" and len(facts["runs"]) == 2 and "evaluations" not in facts


def test_worker_processes_and_slots_change_nothing(folder, straight):
    other = rl.run(settings(folder, out=folder / "other", workers=1, slots=3, micro_batch=64), SUITE)
    mine, theirs = (read_jsonl(folder / name / "metrics.jsonl") for name in ("straight", "other"))
    for a, b in zip(mine, theirs, strict=True):
        assert (a["success"], a["kept"], a["queries"], a["env_steps"]) == (
            b["success"],
            b["kept"],
            b["queries"],
            b["env_steps"],
        )
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-3)
    for (name, p), (_, q) in zip(
        load_policy(straight).backbone.model.named_parameters(),
        load_policy(other).backbone.model.named_parameters(), strict=True,
    ):  # fmt: skip
        torch.testing.assert_close(p, q, atol=1e-4, rtol=1e-3, msg=lambda text, name=name: f"{name}: {text}")


def die_after_the_first_iteration(folder: Path) -> None:
    def save_then_die(*args, **more):
        save_checkpoint(*args, **more)
        os.kill(os.getpid(), signal.SIGKILL)

    rl.save_checkpoint = save_then_die
    rl.run(settings(folder, out=folder / "killed"), SUITE)


def test_resume_after_kill_9_is_bit_identical(folder, straight):
    assert in_process(die_after_the_first_iteration, folder) == -signal.SIGKILL
    with pytest.raises(VlaError, match="pass --resume"):
        rl.run(settings(folder, out=folder / "killed"), SUITE)
    result = rl.run(settings(folder, out=folder / "killed", resume=True), SUITE)
    assert adapter_hash(result) == adapter_hash(straight)
    assert len(read_jsonl(folder / "killed" / "metrics.jsonl")) == 2


@pytest.mark.parametrize("tokenizer", ["fast", "quantile"])
def test_rows_of_different_lengths_train(folder, tokenizer):
    """Rollout and update agree on every log-probability, and the size of the micro-batches, so the padding, is no matter."""
    out = folder / tokenizer
    start = sft.run(sft_settings(folder, out=out / "sft", steps=30, batch_size=8, lr=5e-3, save_every_steps=30,
                                 tokenizer=tokenizer, bins=16))  # fmt: skip
    rows = []
    for micro_batch in (3, 64):
        changed = settings(folder, policy=start, out=out / f"rl{micro_batch}", iterations=1, micro_batch=micro_batch)
        result = rl.run(changed, SUITE)
        rows.append(read_jsonl(changed.out / "metrics.jsonl")[0])
        assert adapter_hash(result) != adapter_hash(start)
        assert load_policy(result).spec.tokens.scheme == tokenizer
    for row in rows:
        assert row["kept"] > 0 and row["undecodable"] == 0 and row["first_log_ratio_max"] < 1e-3 and row["entropy"] > 0
    assert rows[0]["grad_norm"] == pytest.approx(rows[1]["grad_norm"], rel=1e-3)
    assert rows[0]["loss"] == pytest.approx(rows[1]["loss"], abs=1e-5)


def test_the_tokens_that_count(folder):
    trainer = object.__new__(rl.Trainer)
    trainer.policy = load_policy(folder / "sft" / "policy")
    query = rl.TrainingQuery(Observation({}, None, "x"), np.arange(6), np.zeros(6, np.float32), 2, 1.0, 0)
    assert trainer._mask([query]).tolist() == [[True] * 4 + [False] * 2]


def far_away_seed(suite: FakeSuite) -> int:
    """An initial state that one step cannot solve."""
    env = suite.make("reach-far")
    for seed in range(100):
        hand_goal = env.reset(seed=seed)[0].privileged
        if np.linalg.norm(hand_goal[2:] - hand_goal[:2]) > 0.4:
            return seed
    raise AssertionError("no far goal")


def test_uniform_groups_cost_no_update_and_the_cap_ends_the_search(folder):
    suite = FakeSuite(task_names=("reach-far",), max_steps=1)
    hopeless = settings(
        folder, out=folder / "hopeless", iterations=1, lr=1.0, first_seed=far_away_seed(suite), contexts=1
    )
    result = rl.run(hopeless, suite)
    row = read_jsonl(folder / "hopeless" / "metrics.jsonl")[0]
    assert (row["kept"], row["generated"], row["batch_complete"], row["queries"]) == (0, 6, False, 0)
    before, after = (load_policy(p).backbone.model for p in (folder / "sft" / "policy", result))
    for (name, p), (_, q) in zip(before.named_parameters(), after.named_parameters(), strict=True):
        assert torch.equal(p, q), name


def result(success: bool, n_executed: int, fault: str | None = None) -> EpisodeResult:
    observation = Observation({}, None, "x")
    chunk = ActionChunk(np.zeros((3, 2), np.float32), np.arange(6), np.zeros(6, np.float32))
    query = Query(observation, chunk, n_executed)
    return EpisodeResult(EpisodeRequest("t", 0), success, n_executed, (query,), fault=fault)


def test_advantages_are_leave_one_out_and_faults_are_left_out():
    group = [result(True, 3), result(False, 2), result(False, 3), result(True, 1, fault="crash")]
    queries = rl.training_queries([group])
    assert [round(q.advantage, 6) for q in queries] == [1.0, -0.5, -0.5]
    assert [q.n_executed for q in queries] == [3, 2, 3]


def test_dry_run_writes_nothing(folder, capsys):
    rl.run(settings(folder, out=folder / "dry", dry_run=True), SUITE)
    assert "trainable parameters" in capsys.readouterr().out and not (folder / "dry").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"group_size": 1}, "at least 2"),
        ({"temperature": 0.0}, "above 0"),
        ({"groups": 9}, "1 <= groups <= max_groups"),
    ],
)
def test_contradictions_are_refused(folder, changes, message):
    with pytest.raises(VlaError, match=message):
        settings(folder, **changes)
