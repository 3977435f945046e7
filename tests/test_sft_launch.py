"""Several processes train what one trains: data parallel and sharded, on CPUs with gloo, from the files that are shipped."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file
from training import fake_dataset, sft_settings, tiny_backbone

from vla.files import read_jsonl, write_json
from vla.finetune import sft
from vla.policy import load_policy
from vla.types import VlaError

TESTS = Path(__file__).parent
LAUNCH_FILES = TESTS.parent / "examples" / "accelerate"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("launch")
    fake_dataset(folder)
    for family in ("llava", "smolvlm"):
        tiny_backbone(folder, family)
    return folder


def run_two(folder: Path, out: str, changes: dict, *how: str) -> subprocess.CompletedProcess[str]:
    """Two processes on this machine. For FSDP as `accelerate launch` starts them, with the shipped file."""
    # Not the `accelerate` script, which imports every command it has.
    launch = ["accelerate.commands.launch", "--config_file", str(LAUNCH_FILES / "fsdp2.yaml")]
    plain = ["torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [sys.executable, "-m", *(launch if how else plain), str(TESTS / "sharding.py")]
    return subprocess.run(
        [*command, str(folder), out, json.dumps(changes), *how], capture_output=True, text=True, timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{TESTS}:{TESTS.parent}"},
    )  # fmt: skip


def same_training(one: Path, two: Path, rel: float) -> None:
    """The first step to rounding. Later ones to `rel`: Adam makes whole steps of gradients that are nothing but rounding."""
    rows = [
        [row for row in read_jsonl(run / "metrics.jsonl") if "loss" in row or "holdout_loss" in row]
        for run in (one, two)
    ]
    assert len(rows[0]) > 2
    for a, b in zip(*rows, strict=True):
        assert a.keys() == b.keys()
        # Not the accuracies: new tokens start equal, so at first the best of them is a matter of rounding.
        for name in a.keys() & {"step", "loss", "lr", "epoch", "holdout_loss"}:
            assert a[name] == pytest.approx(b[name], rel=2e-5 if a["step"] == 1 else rel), name
    assert rows[0][0]["grad_norm"] == pytest.approx(rows[1][0]["grad_norm"], rel=2e-5)
    adapters = [load_file(run / "policy" / "adapter" / "adapter_model.safetensors") for run in (one, two)]
    assert adapters[0].keys() == adapters[1].keys()
    for name, value in adapters[0].items():
        assert (value - adapters[1][name]).abs().max() < rel, name
    assert load_policy(two / "policy").metadata["unnorm_key"] == "fake"


SETTINGS = {
    "accumulated": ({"batch_size": 8}, {"batch_size": 2, "grad_accumulation": 2}),
    "a fitted scheme": (
        {"batch_size": 4, "tokenizer": "fast", "loss_over": "actions"},
        {"batch_size": 1, "grad_accumulation": 2, "tokenizer": "fast", "loss_over": "actions"},
    ),
}
RELATIVE = {"accumulated": 2e-4, "a fitted scheme": 2e-3}


@pytest.mark.parametrize("case", ["accumulated", "a fitted scheme"])
def test_two_processes_equal_one(folder, case):
    one, two = SETTINGS[case]
    sft.run(sft_settings(folder, out=folder / f"one {case}", steps=3, **one))
    done = run_two(folder, f"two {case}", {"steps": 3, **two})
    assert done.returncode == 0, done.stderr[-3000:]
    same_training(folder / f"one {case}", folder / f"two {case}", RELATIVE[case])


@pytest.mark.parametrize("family", ["llava", pytest.param("smolvlm", marks=pytest.mark.slow)])
@pytest.mark.parametrize("case", ["accumulated", pytest.param("a fitted scheme", marks=pytest.mark.slow)])
def test_two_sharded_processes_equal_one(folder, case, family):
    """FSDP2: the same training, the same checkpoints, resumed to the last bit of the optimiser's state."""
    one, two = SETTINGS[case]
    common = {"steps": 4, "free_running_samples": 0, "policy_from": "best"}
    name = f"{family} {case}"
    sft.run(sft_settings(folder, out=folder / f"whole {name}", backbone=str(folder / family), **common, **one))
    done = run_two(folder, f"sharded {name}", {**common, **two, "family": family}, "fsdp")
    assert done.returncode == 0, done.stderr[-3000:]
    run = folder / f"sharded {name}"
    same_training(folder / f"whole {name}", run, RELATIVE[case])
    kept = folder / f"kept {name}"
    shutil.copytree(run / "checkpoints", kept)
    shutil.rmtree(run / "checkpoints" / "step-00000004")
    write_json(run / "checkpoints" / "latest.json", {"checkpoint": "step-00000002"})
    done = run_two(folder, run.name, {**common, **two, "family": family, "resume": True}, "fsdp")
    assert done.returncode == 0, done.stderr[-3000:]
    for file in (
        "step-00000004/trainable.safetensors",
        "step-00000004/optimizer.safetensors",
        "best/trainable.safetensors",
    ):
        assert (kept / file).read_bytes() == (run / "checkpoints" / file).read_bytes(), file


@pytest.mark.parametrize(
    ("variable", "message"),
    [
        ("ACCELERATE_USE_DEEPSPEED", "a DeepSpeed launch; expected DDP or FSDP2"),
        ("ACCELERATE_USE_FSDP", "an FSDP launch on cpu .*expected several GPUs"),
    ],
)
def test_launches_that_would_not_do_what_they_say(folder, tmp_path, monkeypatch, variable, message):
    monkeypatch.setenv(variable, "true")
    with pytest.raises(VlaError, match=message):
        sft.run(sft_settings(folder, out=tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_launch_files_are_plain():
    for path in LAUNCH_FILES.glob("*.yaml"):
        text = path.read_text()
        values = yaml.safe_load(text)
        assert values["mixed_precision"] == "no", "the precision is a setting of `vla finetune`"
        assert f"accelerate launch --config_file examples/accelerate/{path.name}" in text
