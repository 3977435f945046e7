"""Evaluation while training: every figure checked against one computed by hand, early stop, the best, trackers."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from toy_scheme import WHERE, ToyTokenizer
from training import fake_dataset, in_two_parts, sft_settings, tiny_backbone

from vla.cli import main
from vla.files import append_jsonl, read_jsonl
from vla.finetune import sft, sft_eval
from vla.finetune.curves import curves_page
from vla.finetune.sft_eval import Best, success_figures
from vla.finetune.sft_samples import drops_state
from vla.finetune.sft_setup import observation_of, open_datasets
from vla.inputs import UNKNOWN, prepare_prompt
from vla.policy import load_policy
from vla.testing import FakeExpert, FakeSuite
from vla.tokenizers.schemes import SCHEMES
from vla.types import VlaError


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("eval")
    fake_dataset(folder)
    tiny_backbone(folder)
    return folder


def held_rows(out: Path) -> list[dict]:
    return [row for row in read_jsonl(out / "metrics.jsonl") if "holdout_loss" in row]


def free_running_by_hand(policy, dataset, chosen) -> dict[str, float]:
    """With `policy.act`, one observation at a time."""
    right, tokens, bad, distances = 0, 0, 0, []
    for i in chosen:
        sample = dataset[int(i)]
        chunk = policy.act([observation_of(sample)])[0]
        target = policy.action_token_ids(sample.actions[None], sample.dataset)[0].numpy()
        mask = policy.codec.token_mask(target[None], ~sample.is_pad[None])[0]
        n = min(len(chunk.token_ids), len(target))
        right += int(((chunk.token_ids[:n] == target[:n]) & mask[:n]).sum())
        tokens, bad = tokens + int(mask.sum()), bad + (not chunk.ok)
        if chunk.ok:
            distances.append(np.abs(chunk.actions - sample.actions)[~sample.is_pad])
    l1 = np.concatenate(distances).mean(axis=0)
    names = policy.spec.action.names
    return {"free_running_action_token_accuracy": right / tokens, "free_running_undecodable": bad / len(chosen),
            **{f"free_running_l1_physical/{name}": l1[d] for d, name in enumerate(names)}}  # fmt: skip


@pytest.mark.parametrize("scheme", ["uniform", "toy"])
def test_figures_against_the_policy_that_was_saved(folder, scheme, monkeypatch):
    changes: dict = {"loss_over": "actions"}
    if scheme == "toy":
        monkeypatch.setitem(SCHEMES, "toy", WHERE)
        ToyTokenizer(8).save(Path(changes.setdefault("tokenizer", str(folder / "toy"))).mkdir() or folder / "toy")
    settings = sft_settings(folder, out=folder / f"figures {scheme}", steps=20, lr=5e-3, batch_size=8, eval_every_steps=20,
                            save_every_steps=20, free_running_samples=4, **changes)  # fmt: skip
    policy = load_policy(sft.run(settings))
    row = held_rows(settings.out)[-1]
    dataset, _ = open_datasets(settings)
    held = dataset.holdout_indices
    by_hand = free_running_by_hand(
        policy, dataset, held[[0, round((len(held) - 1) / 3), round(2 * (len(held) - 1) / 3), -1]]
    )
    assert {name: row[name] for name in by_hand} == pytest.approx(by_hand, abs=1e-6)
    if scheme == "toy":
        assert not any(name.startswith("holdout_l1") for name in row), "tokens do not decode one by one"
        return
    total, n = np.zeros(2), 0
    for i in held:
        sample = dataset[int(i)]
        ids = policy.action_token_ids(sample.actions[None], sample.dataset)
        with torch.no_grad():
            logits = policy.backbone.action_logits(policy.encode([observation_of(sample)]), ids)
        best = policy.legal_ids[logits[..., policy.legal_ids].argmax(-1)]
        actions = policy.normalizer.unnormalize(policy.codec.decode(best.numpy())[0])[0]
        total, n = total + np.abs(actions - sample.actions)[~sample.is_pad].sum(0), n + int((~sample.is_pad).sum())
    found = [row[f"holdout_l1_physical/{name}"] for name in policy.spec.action.names]
    assert found == pytest.approx((total / n).tolist(), abs=1e-6)


def test_early_stop_and_the_best_weights(folder, monkeypatch):
    """The held-out loss is lowest at step 4; two evaluations later the run is over, also when it is resumed."""
    losses = {2: 3.0, 4: 1.0, 6: 1.5, 8: 1.0, 10: 0.1}
    now = {}
    step = sft.Loop._optimizer_step

    def watched(self: sft.Loop, batch: int) -> dict[str, float]:
        row = step(self, batch)
        now["step"] = self.step
        return row

    monkeypatch.setattr(sft.Loop, "_optimizer_step", watched)
    monkeypatch.setattr(sft, "held_out_figures", lambda *_: {"holdout_loss": losses[now["step"]]})
    common = {
        "steps": 12,
        "eval_every_steps": 2,
        "save_every_steps": 3,
        "patience": 2,
        "free_running_samples": 0,
        "lr": 5e-3,
    }
    settings = sft_settings(folder, out=folder / "early", policy_from="best", **common)
    sft.run(settings)
    best = settings.out / "checkpoints" / "best"
    assert json.loads((best / "state.json").read_text()) == {"step": 4, "holdout_loss": 1.0}
    assert [row["step"] for row in held_rows(settings.out)] == [2, 4, 6, 8]
    latest = json.loads((settings.out / "checkpoints" / "latest.json").read_text())["checkpoint"]
    assert latest == "step-00000008"
    kept, last = load_file(best / "trainable.safetensors"), load_file(best.parent / latest / "trainable.safetensors")
    trained = {n: p for n, p in load_policy(settings.out / "policy", trainable=True).backbone.model.named_parameters()}
    assert all(torch.equal(trained[name], value) for name, value in kept.items())
    assert not all(torch.equal(last[name], value) for name, value in kept.items())
    digest = hashlib.sha256((settings.out / "policy/adapter/adapter_model.safetensors").read_bytes()).hexdigest()
    sft.run(dataclasses.replace(settings, resume=True))  # is over, and stays so
    assert [row["step"] for row in held_rows(settings.out)] == [2, 4, 6, 8]
    again = hashlib.sha256((settings.out / "policy/adapter/adapter_model.safetensors").read_bytes()).hexdigest()
    assert again == digest


def test_the_best_so_far_survives_a_resume(folder, monkeypatch):
    losses = iter([3.0, 1.0, 2.0, 1.5])
    monkeypatch.setattr(sft, "held_out_figures", lambda *_: {"holdout_loss": next(losses)})
    settings = sft_settings(folder, out=folder / "survives", steps=4, eval_every_steps=1, save_every_steps=1,
                            free_running_samples=0)  # fmt: skip
    in_two_parts(settings, until_step=3)
    state = json.loads((settings.out / "checkpoints" / "step-00000004" / "state.json").read_text())
    assert state["best"] == {"step": 2, "holdout_loss": 1.0, "n_since": 2}


def test_best():
    best = Best()
    for step, loss in enumerate([2.0, 2.0, 3.0, 1.0], 1):
        best = best.after(step, loss)
        assert best == [Best(1, 2.0, 0), Best(1, 2.0, 1), Best(1, 2.0, 2), Best(4, 1.0, 0)][step - 1]


def test_success_in_the_simulator(folder, capsys):
    expert = success_figures(FakeExpert(), FakeSuite(), 3, 0)  # type: ignore[arg-type]
    assert expert == {"success": 1.0, "success/reach-far": 1.0, "success/reach-near": 1.0, "simulator_faults": 0.0}
    settings = sft_settings(folder, out=folder / "simulated", steps=3, eval_suite="fake", eval_suite_every_steps=2,
                            eval_suite_episodes=2, eval_suite_workers=0)  # fmt: skip
    sft.run(settings, FakeSuite())
    rows = [row for row in read_jsonl(settings.out / "metrics.jsonl") if "success" in row]
    assert [row["step"] for row in rows] == [2, 3] and all(0 <= row["success/reach-near"] <= 1 for row in rows)
    with pytest.raises(VlaError, match="eval_suite 'fake' without its simulator"):
        sft.run(settings)
    bad = ["finetune", "--data", str(folder / "fake"), "--out", str(folder / "no"), "--eval-suite", "metawrold"]
    assert main(bad) == 2 and "metawrold" in capsys.readouterr().err
    assert not (folder / "no").exists()


def test_spoiled_episodes_count_neither_way():
    suite = FakeSuite(faults=(("reach-near", sft_eval.FIRST_SEED, "raise_reset"),))
    figures = success_figures(FakeExpert(), suite, 4, 0)  # type: ignore[arg-type]
    assert figures["simulator_faults"] == 1.0 and figures["success/reach-near"] == 1.0


def test_state_dropout(folder):
    settings = sft_settings(folder, out=folder / "dropped", state_dropout=0.25, steps=2, batch_size=4)
    share = np.mean([drops_state(settings, position) for position in range(4000)])
    assert share == pytest.approx(0.25, abs=0.02)
    assert drops_state(settings, 7) == drops_state(settings, 7)
    policy = load_policy(sft.run(settings))
    parts = dataclasses.replace(settings, out=folder / "dropped parts", batch_size=1, grad_accumulation=4)
    sft.run(parts)
    a, b = (read_jsonl(s.out / "metrics.jsonl")[0]["loss"] for s in (settings, parts))
    assert a == pytest.approx(b, rel=1e-5)
    seen, _ = FakeSuite().make("reach-near").reset(seed=0)
    blind = dataclasses.replace(seen, state=None)
    assert f"State: {UNKNOWN}." in prepare_prompt(blind, policy.spec.prompt)
    assert policy.act([blind])[0].ok
    with pytest.raises(VlaError, match="got no state"):
        prepare_prompt(blind, dataclasses.replace(policy.spec.prompt, state_optional=False))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"state_dropout": 1.0}, "state_dropout 1.0 .*expected 0 <= state_dropout < 1"),
        ({"state_dropout": 0.1, "state": False}, "with the state"),
        ({"patience": 3, "holdout_episodes": 0}, "patience 3.*pass --holdout-episodes 1"),
        ({"policy_from": "best", "holdout_episodes": 0}, "policy_from 'best'"),
        ({"keep_checkpoints": 0}, "keep_checkpoints below 1"),
    ],
)
def test_settings_that_contradict_each_other(folder, changes, message):
    with pytest.raises(VlaError, match=message):
        sft_settings(folder, **changes)


class FakeTracker(types.ModuleType):
    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.calls: list[tuple] = []

    def init(self, **options: object) -> None:
        self.calls.append(("init", options))

    def log(self, values: dict[str, float], step: int) -> None:
        self.calls.append(("log", step, sorted(values)))

    def finish(self) -> None:
        self.calls.append(("finish",))


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_trackers_get_every_row(folder, tmp_path, monkeypatch, name):
    tracker = FakeTracker(name)
    monkeypatch.setitem(sys.modules, name, tracker)
    sft.run(sft_settings(folder, out=tmp_path / "run", steps=2, tracker=name, tracker_project="arm"))
    options = tracker.calls[0][1]
    assert options["project"] == "arm" and options["name"] == "run" and options["config"]["lora_r"] == 4
    assert ("id" in options) == (name == "wandb")
    rows = read_jsonl(tmp_path / "run" / "metrics.jsonl")
    assert tracker.calls[1:-1] == [("log", row["step"], sorted(row.keys() - {"step"})) for row in rows]
    assert tracker.calls[-1] == ("finish",)


@pytest.mark.parametrize(
    ("changes", "package"),
    [({"tensorboard": True}, "tensorboard"), ({"tracker": "wandb"}, "wandb"), ({"tracker": "trackio"}, "trackio")],
)
def test_a_tracker_that_is_not_installed(folder, tmp_path, monkeypatch, changes, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(VlaError, match=rf"without the package {package}.*pip install 'vla-toolkit\[{package}\]'"):
        sft.run(sft_settings(folder, out=tmp_path / "run", **changes))
    assert not (tmp_path / "run").exists()


def test_tensorboard_when_it_is_there(folder, tmp_path):
    pytest.importorskip("tensorboard")
    sft.run(sft_settings(folder, out=tmp_path / "run", steps=2, tensorboard=True))
    assert list((tmp_path / "run" / "tensorboard").glob("events.*"))


def test_curves_page(tmp_path):
    for step in range(1, 5):
        append_jsonl(
            tmp_path / "metrics.jsonl", {"step": step, "loss": 1 / step, "l1_physical/<dx>": step, "note": "x"}
        )
    append_jsonl(tmp_path / "metrics.jsonl", {"step": 4, "holdout_loss": 0.5})
    curves_page(tmp_path / "metrics.jsonl", tmp_path / "curves.html", "a <run>")
    text = (tmp_path / "curves.html").read_text()
    assert text.count("<svg") == 2 and "a &lt;run&gt;" in text and "l1_physical/&lt;dx&gt; 4" in text
    assert "<title>loss, 2: 0.5</title>" in text and "src=" not in text and "<script" not in text
