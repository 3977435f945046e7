"""Supervised fine-tuning: exact resume after kill -9, accumulation, frozen weights, and every refusal."""

import hashlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_demonstrate import LiftSuite
from training import fake_dataset, sft_settings, tiny_backbone

from vla.files import read_jsonl
from vla.finetune import collect, sft
from vla.policy import load_policy
from vla.types import VlaError


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


KILLED = """
import os, signal, sys
sys.path.insert(0, {tests!r})
from pathlib import Path
from training import sft_settings
from vla.finetune import checkpoint, sft
save = checkpoint.save_checkpoint
def save_then_die(folder, step, *rest, **more):
    save(folder, step, *rest, **more)
    if step >= 4:
        os.kill(os.getpid(), signal.SIGKILL)
sft.save_checkpoint = save_then_die
sft.run(sft_settings(Path({folder!r}), out=Path({folder!r}) / "killed"))
"""


def test_resume_after_kill_9_is_bit_identical(folder, straight):
    code = KILLED.format(tests=str(Path(__file__).parent), folder=str(folder))
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert process.returncode == -signal.SIGKILL, process.stderr[-2000:]
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


def test_sigterm_saves_and_exits_0(folder, straight):
    code = KILLED.format(tests=str(Path(__file__).parent), folder=str(folder)).replace(
        'sft.save_checkpoint = save_then_die', 'step = sft.Loop._optimizer_step\n'
        'def term(self, batch):\n    row = step(self, batch)\n'
        '    if self.step == 3: os.kill(os.getpid(), signal.SIGTERM)\n    return row\n'
        'sft.Loop._optimizer_step = term').replace('"killed"', '"stopped"')  # fmt: skip
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert process.returncode == 0, process.stderr[-2000:]
    assert "stopped at step 3" in process.stdout
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


def test_only_the_adapter_changes(folder):
    settings = sft_settings(folder, out=folder / "frozen", steps=3, lr=1e-2, warmup_steps=0)
    dataset, statistics = sft._open_data(settings)
    torch.manual_seed(0)
    before = sft._create(settings, dataset, statistics, "cpu").backbone.model
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
        ({"placement": "reserved"}, "reserved tokens"),
        ({"data": (Path("/nowhere"),)}, "nowhere"),
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
    changes = {"data": (folder / "lift",), "out": folder / "arm", "steps": 2, "gripper_dim": -1, "rotation_deg": 180,
               "cache_images": False, "holdout_episodes": 1, "gripper_convention": "+1 closes, -1 opens"}  # fmt: skip
    policy = load_policy(sft.run(sft_settings(folder, **changes)))
    spec = policy.spec
    assert spec.image.cameras == ("a", "b") and spec.image.rotation_deg == 180 and len(spec.prompt.state_names) == 8
    assert spec.action.gripper_dim == 6 and spec.action.control_hz == 20 and spec.action.dim == 7
    assert policy.statistics["lift"]["action"]["mask"] == [True] * 6 + [False]
    seen, _ = LiftSuite().make("lift").reset(seed=0)
    assert policy.act([seen])[0].actions.shape == (3, 7)
