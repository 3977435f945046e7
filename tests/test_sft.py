"""Supervised fine-tuning: exact resume after kill -9, accumulation, frozen weights, and every refusal."""

import contextlib
import dataclasses
import hashlib
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from sources import ARM, ArraySource
from test_demonstrate import LiftSuite
from test_hdf5_reader import write as write_hdf5
from toy_scheme import WHERE, ToyTokenizer
from training import fake_dataset, in_process, in_two_parts, sft_settings, tiny_backbone

from vla.files import read_jsonl
from vla.finetune import collect, sft
from vla.finetune.checkpoint import save_checkpoint
from vla.finetune.formats.cache_format import CacheSettings
from vla.finetune.formats.cache_writer import CacheWriter
from vla.finetune.sft_batch import Batches
from vla.finetune.sft_setup import build_policy, open_datasets
from vla.policy import load_policy
from vla.testing import FakeSuite
from vla.tokenizers.fast import FastTokenizer
from vla.tokenizers.schemes import SCHEMES, load_tokenizer
from vla.tokenizers.vq import VqTokenizer
from vla.types import VlaError

FIXTURES = Path(__file__).parent / "fixtures"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sft")
    fake_dataset(folder)
    tiny_backbone(folder)
    return folder


def adapter_hash(policy: Path) -> str:
    return hashlib.sha256((policy / "adapter" / "adapter_model.safetensors").read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def straight(folder) -> Path:
    return sft.run(sft_settings(folder, out=folder / "straight"))


def test_metrics_curve_and_result_are_there(folder, straight):
    rows = read_jsonl(folder / "straight" / "metrics.jsonl")
    train = [row for row in rows if "loss" in row]
    held = [row for row in rows if "holdout_loss" in row]
    assert [row["step"] for row in train] == [1, 2, 3, 4, 5, 6]
    assert [row["step"] for row in held] == [3, 6]
    assert all(
        {"action_token_accuracy", "l1", "lr", "grad_norm", "samples_per_s", "epoch"} <= row.keys() for row in train
    )
    assert (folder / "straight" / "curves.png").stat().st_size > 5000
    assert load_policy(straight).metadata["unnorm_key"] == "fake"


def test_loss_falls(folder):
    sft.run(sft_settings(folder, out=folder / "longer", steps=60, lr=5e-3, save_every_steps=60, batch_size=8))
    losses = [row["loss"] for row in read_jsonl(folder / "longer" / "metrics.jsonl") if "loss" in row]
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])


def die_at_step_4(folder: Path) -> None:
    def save_then_die(target, step, *rest, **more):
        save_checkpoint(target, step, *rest, **more)
        if step >= 4:
            os.kill(os.getpid(), signal.SIGKILL)

    sft.save_checkpoint = save_then_die
    sft.run(sft_settings(folder, out=folder / "killed"))


def test_resume_after_kill_9_is_bit_identical(folder, straight):
    assert in_process(die_at_step_4, folder) == -signal.SIGKILL
    assert not (folder / "killed" / "policy").exists()
    with pytest.raises(VlaError, match="pass --resume to continue it"):
        sft.run(sft_settings(folder, out=folder / "killed"))
    result = sft.run(sft_settings(folder, out=folder / "killed", resume=True))
    assert adapter_hash(result) == adapter_hash(straight)
    rows = read_jsonl(folder / "killed" / "metrics.jsonl")
    assert [row["step"] for row in rows if "loss" in row] == [1, 2, 3, 4, 5, 6]
    for mine, theirs in zip(rows, read_jsonl(folder / "straight" / "metrics.jsonl"), strict=True):
        assert {k: v for k, v in mine.items() if k != "samples_per_s"} == {
            k: v for k, v in theirs.items() if k != "samples_per_s"
        }


def test_workers_that_prepare_samples_change_nothing(folder, straight):
    result = sft.run(sft_settings(folder, out=folder / "helped", data_workers=2, cache_images=False))
    assert adapter_hash(result) == adapter_hash(straight)
    with pytest.raises(VlaError, match="--data-workers with --skip-bad; expected one of them"):
        sft_settings(folder, data_workers=2, skip_bad=True)


def stop_at_step_3(folder: Path) -> None:
    step = sft.Loop._optimizer_step

    def term(self, batch):
        row = step(self, batch)
        if self.step == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return row

    sft.Loop._optimizer_step = term
    with (folder / "said.txt").open("w") as said, contextlib.redirect_stdout(said):
        sft.run(sft_settings(folder, out=folder / "stopped"))


def test_sigterm_saves_and_exits_0(folder, straight):
    assert in_process(stop_at_step_3, folder) == 0
    assert "stopped at step 3" in (folder / "said.txt").read_text()
    assert adapter_hash(sft.run(sft_settings(folder, out=folder / "stopped", resume=True))) == adapter_hash(straight)


def test_accumulating_4x1_equals_1x4(folder):
    a = load_policy(sft.run(sft_settings(folder, out=folder / "1x4", steps=2, batch_size=4)))
    b = load_policy(sft.run(sft_settings(folder, out=folder / "4x1", steps=2, batch_size=1, grad_accumulation=4)))
    rows = [read_jsonl(folder / name / "metrics.jsonl")[0] for name in ("1x4", "4x1")]
    assert rows[0]["loss"] == pytest.approx(rows[1]["loss"], rel=1e-5)
    assert rows[0]["grad_norm"] == pytest.approx(rows[1]["grad_norm"], rel=1e-4)
    for (name, mine), (_, theirs) in zip(
        a.backbone.model.named_parameters(), b.backbone.model.named_parameters(), strict=True
    ):
        torch.testing.assert_close(mine, theirs, atol=2e-5, rtol=1e-4, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("tokenizer", ["uniform", "integer_text"])
def test_the_order_within_a_batch_changes_nothing(folder, tokenizer):
    placement = {"tokenizer": "integer_text", "placement": "text"} if tokenizer == "integer_text" else {}
    settings = sft_settings(folder, out=folder / "order", **placement)
    dataset, statistics = open_datasets(settings)
    torch.manual_seed(0)
    policy = build_policy(settings, dataset, statistics, "cpu")
    batches, found = Batches(settings, dataset, policy, policy.backbone.model), []
    samples = [dataset[i] for i in (3, 15, 9, 18)]
    for order in ((0, 1, 2, 3), (2, 0, 3, 1)):
        policy.backbone.model.zero_grad()
        part = batches.loss([samples[k] for k in order], *batches.targets([samples[k] for k in order]))
        part.loss.backward()
        grads = {n: p.grad.clone() for n, p in policy.backbone.model.named_parameters() if p.grad is not None}
        found.append((part, order, grads))
    (one, _, mine), (other, order, theirs) = found
    np.testing.assert_allclose(one.figures, other.figures, rtol=1e-5)
    assert torch.equal(one.predicted[list(order)], other.predicted) and mine.keys() == theirs.keys() != set()
    for name in mine:
        torch.testing.assert_close(mine[name], theirs[name], atol=1e-5, rtol=1e-4)


def test_only_the_adapter_changes(folder):
    settings = sft_settings(folder, out=folder / "frozen", steps=3, lr=1e-2, warmup_steps=0)
    dataset, statistics = open_datasets(settings)
    torch.manual_seed(0)
    before = build_policy(settings, dataset, statistics, "cpu").backbone.model
    start = {name: p.detach().clone() for name, p in before.named_parameters()}
    after = load_policy(sft.run(settings), trainable=True).backbone.model
    for name, parameter in after.named_parameters():
        same = torch.equal(parameter, start[name])
        assert same != parameter.requires_grad, f"{name}: trains {parameter.requires_grad}, unchanged {same}"


def test_two_processes_equal_one(folder):
    """Two ranks on gloo, half the batch each, give the loss of one rank with the whole batch."""
    one = sft_settings(folder, out=folder / "one", steps=2, batch_size=4)
    sft.run(one)
    code = (
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); from pathlib import Path\n"
        "from training import sft_settings; from vla.finetune import sft\n"
        f"f = Path({str(folder)!r}); sft.run(sft_settings(f, out=f / 'two', steps=2, batch_size=2))\n"
    )
    script = folder / "two_ranks.py"
    script.write_text(code)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script)]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=120, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr[-3000:]
    mine, theirs = (read_jsonl(folder / name / "metrics.jsonl") for name in ("one", "two"))
    for a, b in zip([r for r in mine if "loss" in r], [r for r in theirs if "loss" in r], strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4)


def test_a_scheme_with_rows_of_different_lengths(folder, monkeypatch):
    """Loss falls, accumulation changes nothing, the policy acts as it did, and its tokens are the scheme's own."""
    monkeypatch.setitem(SCHEMES, "toy", WHERE)
    scheme = folder / "toy_scheme"
    scheme.mkdir()
    ToyTokenizer(8).save(scheme)
    changes = {"tokenizer": str(scheme), "loss_over": "actions", "lr": 5e-3, "save_every_steps": 40}
    result = sft.run(sft_settings(folder, out=folder / "toy", steps=40, batch_size=8, **changes))
    rows = read_jsonl(folder / "toy" / "metrics.jsonl")
    losses = [row["loss"] for row in rows if "loss" in row]
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])
    assert not any("l1" in row or "holdout_l1" in row for row in rows), "tokens do not decode one by one"
    assert all("holdout_loss" in row or "loss" in row for row in rows)
    policy = load_policy(result)
    assert policy.spec.tokens.scheme == "toy" and policy.spec.tokens.n_symbols == 9
    seen, _ = FakeSuite().make("reach-near").reset(seed=0)
    chunk, again = policy.act([seen])[0], load_policy(result).act([seen])[0]
    assert chunk.ok and (chunk.token_ids >= 0).all() and (chunk.token_ids == again.token_ids).all()
    for name, changed in (("toy 1x4", {"batch_size": 4}), ("toy 4x1", {"batch_size": 1, "grad_accumulation": 4})):
        sft.run(sft_settings(folder, out=folder / name, steps=2, **{**changes, **changed}))
    one, four = (read_jsonl(folder / name / "metrics.jsonl")[0] for name in ("toy 1x4", "toy 4x1"))
    assert one["loss"] == pytest.approx(four["loss"], rel=1e-5)
    assert one["grad_norm"] == pytest.approx(four["grad_norm"], rel=1e-4)


@pytest.mark.parametrize("loss_over", ["vocabulary", "actions"])
def test_fast_fitted_to_the_training_chunks(folder, loss_over):
    settings = sft_settings(folder, out=folder / f"fast {loss_over}", steps=30, batch_size=8, lr=5e-3, tokenizer="fast",
                            save_every_steps=30, loss_over=loss_over)  # fmt: skip
    result = sft.run(settings)
    losses = [row["loss"] for row in read_jsonl(settings.out / "metrics.jsonl") if "loss" in row]
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])
    policy = load_policy(result, temperature=1.0)
    seen, _ = FakeSuite().make("reach-near").reset(seed=0)
    for i in range(20):
        assert policy.act([dataclasses.replace(seen, key=(i,))])[0].ok
    kept = load_tokenizer(settings.out / "action_tokenizer")
    assert isinstance(kept, FastTokenizer) and kept.vocab_size == policy.spec.tokens.n_symbols


def test_integers_in_the_models_own_digits(folder):
    """Nothing is added to the vocabulary; the policy writes numbers that decode."""
    settings = sft_settings(folder, out=folder / "digits", steps=20, batch_size=8, lr=5e-3, tokenizer="integer_text",
                            placement="text", save_every_steps=20, loss_over="actions")  # fmt: skip
    result = sft.run(settings)
    losses = [row["loss"] for row in read_jsonl(settings.out / "metrics.jsonl") if "loss" in row]
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])
    policy = load_policy(result)
    tokens, words = policy.spec.tokens, policy.backbone.processor.tokenizer
    assert (tokens.scheme, tokens.n_added, tokens.placement["kind"]) == ("integer_text", 0, "reserved")
    seen, _ = FakeSuite().make("reach-near").reset(seed=0)
    chunk, again = policy.act([seen])[0], load_policy(result).act([seen])[0]
    assert chunk.ok and (chunk.token_ids == again.token_ids).all()
    text = words.decode(chunk.token_ids)
    values, ok, errors = policy.codec.tokenizer.parse([text], settings.horizon, policy.spec.action.dim)
    assert ok.all() and text.endswith("\n"), errors
    np.testing.assert_allclose(policy.normalizer.unnormalize(values)[0], chunk.actions, rtol=1e-6)


@pytest.mark.parametrize("scheme", ["vq", "fast"])
def test_what_fitting_says(folder, capsys, monkeypatch, scheme):
    if scheme == "vq":
        monkeypatch.setattr("vla.finetune.tokenizer_fit.new_tokenizer", lambda *_: VqTokenizer(steps=60))
    sft.run(sft_settings(folder, out=folder / "said", tokenizer=scheme, dry_run=True))
    said = capsys.readouterr()
    if scheme == "vq":
        assert "fit vq: 60/60" in said.err and "loss" in said.err
    else:
        assert re.search(r"fast: 0 of \d+ coefficients of \d+ training chunks are clipped", said.out)


def test_a_run_goes_on_with_the_tokenizer_it_began_with(folder, monkeypatch):
    settings = sft_settings(folder, out=folder / "kept", steps=2, tokenizer="quantile", bins=16)
    sft.run(settings)
    monkeypatch.setattr("vla.finetune.sft_setup.action_tokenizer", None)
    sft.run(dataclasses.replace(settings, resume=True))


def test_bf16_trains(folder):
    result = sft.run(sft_settings(folder, out=folder / "bf16", steps=2, precision="bf16"))
    assert next(load_policy(result).backbone.model.parameters()).dtype == torch.float32


def test_dry_run_writes_nothing(folder, capsys):
    sft.run(sft_settings(folder, out=folder / "dry", dry_run=True))
    out = capsys.readouterr().out
    assert "of which" in out and "action ids:" in out and "prompt:" in out
    assert not (folder / "dry").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": ()}, "no dataset"),
        ({"cameras": ("nope",)}, "nope"),
        ({"backbone": "tinny"}, "did you mean 'tiny'"),
        ({"added_init": "numbers"}, "one token per integer"),
        ({"tokenizer": "unifrom"}, "did you mean 'uniform'"),
        ({"tokenizer": "/nowhere/fast"}, "no folder /nowhere/fast"),
        ({"tokenizer": "fast", "added_init": "numbers"}, "symbols that are no numbers"),
        ({"placement_skip": 128}, "skip 128 with placement 'added'"),
        ({"placement": "reserved"}, "reserved tokens"),
        ({"placement": "text"}, "64 symbols with placement 'text'; expected the 12 characters of integer_text"),
        ({"data": ("/nowhere",)}, "nowhere"),
    ],
)
def test_bad_settings_are_refused_before_anything_is_written(folder, changes, message):
    with pytest.raises(VlaError, match=message):
        sft.run(sft_settings(folder, out=folder / "bad", **changes))
    assert not (folder / "bad").exists()


def test_resume_with_other_settings_is_refused(folder, straight):
    with pytest.raises(VlaError, match="lr 0.0005 -> 0.1"):
        sft.run(sft_settings(folder, out=folder / "straight", lr=0.1, resume=True))


def test_learning_rate_schedules():
    settings = sft.PRESETS["tiny-demo"]
    rates = [sft.learning_rate(settings, step) for step in range(settings.steps)]
    assert rates[0] == pytest.approx(settings.lr / settings.warmup_steps)
    assert max(rates) == pytest.approx(settings.lr)
    assert rates[-1] == pytest.approx(0.1 * settings.lr, rel=0.01)
    constant = sft.PRESETS["openvla-lora"]
    assert {sft.learning_rate(constant, step) for step in (0, 10, 40_000)} == {constant.lr}


def test_an_arm_with_two_cameras(folder):
    """LIBERO's shape of data needs no code: 7-D actions, 8-D state, two cameras, frames turned, decoded as needed."""
    collect.run(collect.Settings(folder / "lift", episodes_per_task=3), LiftSuite())
    changes = {"data": (str(folder / "lift"),), "out": folder / "arm", "steps": 2, "gripper_dim": -1, "rotation_deg": 180,
               "cache_images": False, "holdout_episodes": 1, "gripper_convention": "+1 closes, -1 opens"}  # fmt: skip
    policy = load_policy(sft.run(sft_settings(folder, **changes)))
    spec = policy.spec
    assert spec.image.cameras == ("a", "b") and spec.image.rotation_deg == 180 and len(spec.prompt.state_names) == 8
    assert spec.action.gripper_dim == 6 and spec.action.control_hz == 20 and spec.action.dim == 7
    assert policy.statistics["lift"]["action"]["mask"] == [True] * 6 + [False]
    seen, _ = LiftSuite().make("lift").reset(seed=0)
    assert policy.act([seen])[0].actions.shape == (3, 7)


@pytest.fixture
def four_formats(folder, tmp_path, monkeypatch) -> list[str]:
    monkeypatch.setenv("VLA_CACHE", str(tmp_path / "indices"))
    lerobot = str(FIXTURES / "lerobot_v3_image")
    hdf5 = str(write_hdf5(tmp_path / "open_the_drawer_demo.hdf5"))
    source = ArraySource([np.random.default_rng(k).uniform(-1, 1, (4, 7)) for k in range(3)], action_names=ARM)
    writer = CacheWriter(tmp_path / "cached", source, CacheSettings())
    for i in range(3):
        writer.add_episode(i)
    writer.finish()
    return [lerobot, hdf5, str(FIXTURES / "rlds" / "tiny_arm"), str(tmp_path / "cached")]


CAMERA = "primary=image|agentview|front|top"


def test_every_format_trains_with_no_conversion(folder, four_formats, tmp_path):
    common = {"cameras": (CAMERA,), "state": False, "steps": 1, "holdout_episodes": 0, "gripper_dim": -1}
    for k, address in enumerate(
        [*four_formats, str(FIXTURES / "lerobot_v21_image"), str(FIXTURES / "lerobot_v21_video")]
    ):
        sft.run(sft_settings(folder, data=(address,), out=tmp_path / f"alone-{k}", **common))
    mixed = {**common, "steps": 3, "weights": (1.0, 2.0, 1.0, 0.5), "augment": True, "crop_area": 0.9}
    policy = load_policy(sft.run(sft_settings(folder, data=tuple(four_formats), out=tmp_path / "mixed", **mixed)),
                         unnorm_key="tiny_arm")  # fmt: skip
    assert len(policy.statistics) == 4 and policy.spec.image.cameras == ("primary",)
    assert policy.spec.image.crop_area == 0.9
    rows = read_jsonl(tmp_path / "mixed" / "metrics.jsonl")
    assert [row["step"] for row in rows if "loss" in row] == [1, 2, 3]


def test_mixed_and_augmented_training_resumes_and_accumulates(folder, four_formats, tmp_path):
    """The state of both has 8 numbers; augmentation is drawn by position, so neither restarts nor batches change it."""
    common = {"data": tuple(four_formats[:2]), "cameras": (CAMERA,), "augment": True, "crop_area": 0.9, "lora_r": 2,
              "holdout_episodes": 1, "steps": 4, "batch_size": 2, "weights": (1.0, 1.0), "gripper_dim": -1}  # fmt: skip
    straight = sft.run(sft_settings(folder, out=tmp_path / "straight", **common))
    resumed = in_two_parts(sft_settings(folder, out=tmp_path / "halves", **common))
    assert adapter_hash(resumed) == adapter_hash(straight)
    parts = {**common, "batch_size": 1, "grad_accumulation": 2, "steps": 1}
    sft.run(sft_settings(folder, out=tmp_path / "parts", **parts))
    rows = [read_jsonl(tmp_path / name / "metrics.jsonl")[0] for name in ("straight", "parts")]
    assert rows[0]["loss"] == pytest.approx(rows[1]["loss"], rel=1e-5)
    assert load_policy(straight, unnorm_key="lerobot_v3_image").spec.prompt.state_names


def test_mixtures_that_cannot_be_trained(folder, four_formats, tmp_path):
    def refused(message: str, **changes: object) -> None:
        with pytest.raises(VlaError, match=message):
            sft.run(sft_settings(folder, out=tmp_path / "bad", **changes))

    refused("5 state dimensions in 'tiny_arm'; expected 8, as 'lerobot_v3_image' has; fix: pass --no-state",
            data=(four_formats[0], four_formats[2]), cameras=("image",))  # fmt: skip
    refused(
        "camera 'image'; expected one of agentview, wrist, the cameras of 'open_the_drawer_demo'",
        data=four_formats[:2], cameras=("image",),
    )  # fmt: skip
    refused("datasets without a camera of one name .*open_the_drawer_demo: agentview, wrist", data=four_formats[:2])
    refused("fake with 2 action dimensions; expected 7", data=(four_formats[0], str(folder / "fake")), state=False)
    with pytest.raises(VlaError, match="--augment with crop_area 1.0; .*fix: pass --crop-area 0.9"):
        sft_settings(folder, augment=True)
    refused("2 weights for 1 datasets", data=four_formats[:1], weights=(1.0, 2.0))
