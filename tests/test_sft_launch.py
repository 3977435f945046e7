"""Several processes train what one trains: data parallel and sharded, on CPUs with gloo, from the files that are shipped.

Starting processes is most of the time here, so one launch makes several runs.
"""

from __future__ import annotations

import importlib.util
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import pytest
import sharding
import yaml
from accelerate.commands import launch
from safetensors.torch import load_file
from sharding import back_to
from torch.distributed import TCPStore
from training import fake_dataset, forked, sft_settings, tiny_backbone

from vla.files import read_jsonl
from vla.finetune import sft, sft_launch
from vla.policy import load_policy
from vla.types import VlaError

TESTS = Path(__file__).parent
LAUNCH_FILES = TESTS.parent / "examples" / "accelerate"
deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="needs the extra [deepspeed]: pip install '.[deepspeed]'"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("launch")
    fake_dataset(folder)
    for family in ("llava", "smolvlm"):
        tiny_backbone(folder, family)
    return folder


def launched(how: str) -> dict[str, str]:
    """What `accelerate launch` sets in the environment of every process for a shipped file; nothing is started."""
    after: dict[str, str] = {}
    arguments = ["--config_file", str(LAUNCH_FILES / f"{how}.yaml"), "--main_process_port", "0", "a_script.py"]
    with mock.patch("torch.distributed.run.run", lambda _: after.update(os.environ)):
        launch.launch_command(launch.launch_command_parser().parse_args(arguments))
    assert after
    return {name: value for name, value in after.items() if os.environ.get(name) != value}


def run_two(folder: Path, how: str, *jobs: dict) -> None:
    """Runs of two processes on this machine, one run after another; see tests/sharding.py."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # as torchrun's: its port is free for sure
    common = {
        **launched(how), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True",
    }  # fmt: skip
    logs = [folder / f"{how}.{rank}.log" for rank in range(2)]
    pair = [
        forked(sharding.process, {**common, "RANK": str(rank), "LOCAL_RANK": str(rank)}, log, folder, how, jobs)
        for rank, log in enumerate(logs)
    ]
    end = time.monotonic() + 600
    while (
        any(one.exitcode is None for one in pair) and not any(one.exitcode for one in pair) and time.monotonic() < end
    ):
        time.sleep(0.1)
    codes = [one.exitcode for one in pair]
    for one in pair:
        one.kill()  # the other would wait for long
        one.join()
    assert codes == [0, 0], "".join(f"{log.name}:\n{log.read_text()[-2000:]}\n" for log in logs)


def run_one(folder: Path, out: str, changes: dict) -> Path:
    """The same in one process; once for all tests."""
    if not (folder / out).exists():
        backbone = str(folder / changes.get("family", "llava"))
        rest = {name: value for name, value in changes.items() if name != "family"}
        sft.run(sft_settings(folder, out=folder / out, backbone=backbone, **rest))
    return folder / out


def same_training(one: Path, two: Path, rel: float) -> None:
    """The first step to rounding. Later ones to `rel`: Adam makes whole steps of gradients that are nothing but rounding."""
    rows = [
        [row for row in read_jsonl(run / "metrics.jsonl") if "loss" in row or "holdout_loss" in row]
        for run in (one, two)
    ]
    assert len(rows[0]) > 2
    for a, b in zip(*rows, strict=True):
        assert {name for name in a.keys() ^ b.keys() if not name.startswith("free_running_")} == set()
        # Not the accuracies: new tokens start equal, so at first the best of them is a matter of rounding.
        for name in a.keys() & {"step", "loss", "lr", "epoch", "holdout_loss"}:
            assert a[name] == pytest.approx(b[name], rel=2e-5 if a["step"] == 1 else rel), name
    assert rows[0][0]["grad_norm"] == pytest.approx(rows[1][0]["grad_norm"], rel=2e-5)
    same_files(one / "policy", two / "policy", rel)
    assert load_policy(two / "policy").metadata["unnorm_key"] == "fake"


def same_files(one: Path, two: Path, atol: float) -> None:
    """The same tensors in the same files, to within `atol`."""
    found = [{path.relative_to(run) for path in run.rglob("*.safetensors")} for run in (one, two)]
    assert found[0] and found[0] == found[1]
    for path in found[0]:
        a, b = load_file(one / path), load_file(two / path)
        assert a.keys() == b.keys(), path
        for name, value in a.items():
            assert value.dtype == b[name].dtype
            assert (value - b[name]).abs().max() <= atol, f"{path}: {name}"


CASES = {
    # how one process takes the global batch, how each of two does, and to what later steps agree
    "accumulated": ({"batch_size": 8}, {"batch_size": 2, "grad_accumulation": 2}, 2e-4),
    "a fitted scheme": (
        {"batch_size": 4, "tokenizer": "fast", "loss_over": "actions"},
        {"batch_size": 1, "grad_accumulation": 2, "tokenizer": "fast", "loss_over": "actions"}, 2e-3,
    ),
    "full": ({"batch_size": 4, "method": "full"}, {"batch_size": 1, "grad_accumulation": 2, "method": "full"}, 2e-3),
}  # fmt: skip
RUN = {"steps": 4, "policy_from": "best", "free_running_samples": 3}

SUITE = {"eval_suite": "fake", "eval_suite_episodes": 1, "eval_suite_workers": 1}


def settings_of(case: str, how: str = "one") -> dict:
    """ZeRO-3 cannot have the policy act, which changes nothing about training."""
    return {**RUN, **CASES[case][how != "one"], **({"free_running_samples": 0} if how == "zero3" else {})}


def test_two_processes_equal_one(folder):
    cases = ["accumulated", "a fitted scheme"]
    run_two(folder, "ddp", *({"out": f"ddp {case}", "changes": settings_of(case, "ddp")} for case in cases))
    for case in cases:
        same_training(run_one(folder, f"one {case}", settings_of(case)), folder / f"ddp {case}", CASES[case][2])


@pytest.mark.parametrize("how", ["fsdp2", *(pytest.param(how, marks=deepspeed) for how in ("zero2", "zero3"))])
def test_two_sharded_processes_equal_one(folder, how):
    """The same training and the same checkpoints, resumed to the last bit of the optimiser's state; full fine-tuning too."""
    cases = ["accumulated", "full"] if how != "zero2" else ["accumulated"]
    jobs = [{"out": f"{how} {case}", "changes": settings_of(case, how)} for case in cases]
    run_two(folder, how, *jobs, {**jobs[0], "back_to": 2})
    for case in cases:
        one, two = run_one(folder, f"one {case}", settings_of(case)), folder / f"{how} {case}"
        same_training(one, two, CASES[case][2])
        same_files(one / "checkpoints", two / "checkpoints", CASES[case][2])
    resumed = folder / f"{how} accumulated"
    same_files(resumed / "kept", resumed / "checkpoints", 0.0)
    assert (resumed / "kept" / "step-00000004").is_dir()
    assert not list(resumed.rglob("*.pt")) + list(resumed.rglob("*.bin"))


@pytest.mark.slow
@pytest.mark.parametrize("how", ["fsdp2", *(pytest.param(how, marks=deepspeed) for how in ("zero2", "zero3"))])
def test_more_families_and_launch_kinds(folder, how):
    """Another backbone and a fitted scheme, sharded; a run of two DDP processes is continued sharded."""
    case, more = "a fitted scheme", {"family": "smolvlm"}
    run_two(folder, "ddp", {"out": f"began for {how}", "changes": settings_of(case, how)})
    begun = folder / f"began for {how}"
    back_to(begun, 2)
    jobs = [
        {"out": begun.name, "changes": {**settings_of(case, how), "resume": True}},
        {"out": f"{how} smolvlm", "changes": settings_of(case, how) | more | ({} if how == "zero3" else SUITE)},
        {"out": f"{how} half", "changes": settings_of("accumulated", how) | {"precision": "bf16"}},
    ]
    run_two(folder, how, *jobs)
    same_files(begun / "kept", begun / "checkpoints", CASES[case][2])
    same_training(run_one(folder, "one smolvlm", settings_of(case) | more), folder / f"{how} smolvlm", CASES[case][2])
    assert any("success" in row for row in read_jsonl(folder / f"{how} smolvlm" / "metrics.jsonl")) == (how != "zero3")
    half = run_one(folder, "one half", settings_of("accumulated") | {"precision": "bf16"})
    losses = [[row["loss"] for row in read_jsonl(run / "metrics.jsonl") if "loss" in row] for run in (half, folder / f"{how} half")]  # fmt: skip
    assert losses[0] == pytest.approx(losses[1], rel=1e-2)


def test_fsdp_on_a_cpu_is_refused(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(VlaError, match="an FSDP launch on cpu .*expected several GPUs"):
        sft.run(sft_settings(folder, out=tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_deepspeed_that_is_not_there(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    with pytest.raises(
        VlaError, match=r"a DeepSpeed launch without deepspeed; .*pip install 'vla-toolkit\[deepspeed\]'"
    ):
        sft.run(sft_settings(folder, out=tmp_path / "run"))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("stage", "changes", "message"),
    [
        (1, {}, "DeepSpeed with zero_stage 1; expected 2 or 3"),
        (2, {"optimizer": "adamw8bit"}, "DeepSpeed with --optimizer adamw8bit; expected adamw"),
        (2, {"precision": "fp16"}, "DeepSpeed with weights or losses in half precision; .*--precision bf16"),
        (3, {}, "ZeRO-3 with evaluations in which the policy acts; .*--free-running-samples 0"),
        (3, {"film": True, "head": "l1", "free_running_samples": 0}, "ZeRO-3 with --film; .*zero2.yaml"),
        (3, {"method": "qlora", "free_running_samples": 0}, "ZeRO-3 with --method qlora; .*zero2.yaml"),
    ],
)
def test_deepspeed_that_would_not_do_what_it_says(folder, tmp_path, monkeypatch, stage, changes, message):
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_ZERO_STAGE", str(stage))
    monkeypatch.setattr(sft_launch, "require_deepspeed", lambda: None)  # all of these are told before it is used
    with pytest.raises(VlaError, match=message):
        sft.run(sft_settings(folder, out=tmp_path / "run", **changes))
    assert not (tmp_path / "run").exists()


def command_of(how: str) -> list[str]:
    """What a launch file says to type."""
    lines = [line.removeprefix("#   ") for line in (LAUNCH_FILES / f"{how}.yaml").read_text().splitlines()]
    first = next(i for i, line in enumerate(lines) if line.startswith("accelerate launch"))
    last = next(i for i in range(first, len(lines)) if not lines[i].endswith("\\"))
    return shlex.split(" ".join(line.strip().removesuffix("\\") for line in lines[first : last + 1]))


@pytest.mark.slow
@pytest.mark.parametrize("how", ["ddp", "fsdp2", *(pytest.param(how, marks=deepspeed) for how in ("zero2", "zero3"))])
def test_the_commands_in_the_launch_files(folder, tmp_path, how):
    """As written, on a CPU as they say, with settings for a small model at the end."""
    said, small = (
        command_of(how),
        ["--horizon", "3", "--steps", "2", "--image-size-px", "32", "--holdout-episodes", "1"],
    )
    said[said.index("DATA")], said[said.index("RUN")] = str(folder / "fake"), str(tmp_path / "run")
    said[said.index("8")] = "2"
    # `accelerate launch` without the `accelerate` script, which imports every command it has.
    done = subprocess.run(
        [sys.executable, "-m", "accelerate.commands.launch", *said[2:], "--device", "cpu", "--backbone", str(folder / "llava"), *small],
        capture_output=True, text=True, timeout=600, cwd=TESTS.parent,
    )  # fmt: skip
    if how == "fsdp2":
        assert done.returncode != 0
        assert "an FSDP launch on cpu with 2 processes; expected several GPUs" in done.stderr
        assert not (tmp_path / "run").exists()
    else:
        assert done.returncode == 0, done.stderr[-3000:]
        assert load_policy(tmp_path / "run" / "policy").metadata["unnorm_key"] == "fake"


def test_launch_files_are_plain():
    for path in LAUNCH_FILES.glob("*.yaml"):
        values = yaml.safe_load(path.read_text())
        assert values["mixed_precision"] == "no", "the precision is a setting of `vla finetune`"
        assert command_of(path.stem)[:4] == [
            "accelerate",
            "launch",
            "--config_file",
            f"examples/accelerate/{path.name}",
        ]
