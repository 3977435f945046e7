"""A fine-tuning run that is killed, stopped or runs out of disk goes on as if nothing had happened."""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import json
import os
import random
import signal
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from training import fake_dataset, in_process, sft_settings, tiny_backbone

from vla.files import read_jsonl, write_bytes
from vla.finetune import checkpoint, sft
from vla.finetune.run_folder import open_run
from vla.finetune.sft_batch import seed_step
from vla.types import VlaError

STEPS = 24


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("resume")
    fake_dataset(folder)
    tiny_backbone(folder)
    return folder


def settings_of(folder: Path, out: Path, **changes: object) -> sft.Settings:
    """Everything random at once: LoRA dropout, state dropout, augmentation, several epochs."""
    base = {"out": out, "steps": STEPS, "save_every_steps": 3, "eval_every_steps": 5, "free_running_samples": 2, "batch_size": 2,
            "lora_dropout": 0.2, "state_dropout": 0.3, "augment": True, "crop_area": 0.9, "lr": 3e-3}  # fmt: skip
    return sft_settings(folder, **{**base, **changes})


def same_run(one: Path, other: Path) -> None:
    """Bit-equal adapter and best weights, equal metrics and state."""
    for name in ("policy/adapter/adapter_model.safetensors", "checkpoints/best/trainable.safetensors"):
        digests = [hashlib.sha256((run / name).read_bytes()).hexdigest() for run in (one, other)]
        assert digests[0] == digests[1], name
    for a, b in zip(*(read_jsonl(run / "metrics.jsonl") for run in (one, other)), strict=True):
        assert {k: v for k, v in a.items() if k != "samples_per_s"} == {
            k: v for k, v in b.items() if k != "samples_per_s"
        }
    states = []
    for run in (one, other):
        latest = json.loads((run / "checkpoints" / "latest.json").read_text())["checkpoint"]
        moments = load_file(run / "checkpoints" / latest / "optimizer.safetensors")
        states.append((latest, json.loads((run / "checkpoints" / latest / "state.json").read_text()), moments))
    assert states[0][:2] == states[1][:2]
    assert all(torch.equal(states[0][2][name], value) for name, value in states[1][2].items())


@pytest.fixture(scope="module")
def straight(folder) -> Path:
    sft.run(settings_of(folder, folder / "straight"))
    return folder / "straight"


def run_and_die(folder: Path, out: Path, delay_s: float) -> None:
    """Train in a process of its own that is killed `delay_s` after its first step began."""
    torch.set_num_threads(1)
    begin = sft.Loop.train

    def train(self: sft.Loop) -> None:
        timer = threading.Timer(delay_s, os.kill, (os.getpid(), signal.SIGKILL))
        timer.daemon = True
        timer.start()
        begin(self)

    sft.Loop.train = train
    sft.run(settings_of(folder, out, resume=True))


def kill_at_random(folder: Path, out: Path, kills: int, seed: int, longest_s: float) -> list[int]:
    """Kill the run so many times at random points; the steps it had come to each time."""
    rng, reached = random.Random(seed), []
    for _ in range(kills):
        assert in_process(run_and_die, folder, out, rng.uniform(0.0, longest_s)) in (-signal.SIGKILL, 0)
        reached.append(max((row["step"] for row in read_jsonl(out / "metrics.jsonl")), default=0))
    return reached


def test_killed_at_random_points(folder, straight):
    reached = kill_at_random(folder, folder / "killed", kills=3, seed=1, longest_s=0.6)
    sft.run(settings_of(folder, folder / "killed", resume=True))
    same_run(folder / "killed", straight)
    assert reached[0] < STEPS, reached


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_killed_ten_times_at_random_points(folder, straight, seed):
    out = folder / f"killed often {seed}"
    reached = kill_at_random(folder, out, kills=10, seed=100 + seed, longest_s=0.4)
    sft.run(settings_of(folder, out, resume=True))
    same_run(out, straight)
    assert len(set(reached)) > 2, reached


def test_dropout_is_on_in_training_and_off_in_evaluation(folder, tmp_path):
    plain = {"augment": False, "crop_area": 1.0, "state_dropout": 0.0, "steps": 2, "lr": 0.0, "eval_every_steps": 1}
    for dropout in (0.0, 0.5):
        settings = settings_of(folder, tmp_path / str(dropout), lora_dropout=dropout, **plain)
        sft.run(settings)
    rows = [read_jsonl(tmp_path / name / "metrics.jsonl") for name in ("0.0", "0.5")]
    held = [[row["holdout_loss"] for row in r if "holdout_loss" in row] for r in rows]
    assert held[0] == held[1], "LoRA starts at zero, and does not move at learning rate 0"
    norms = [[row["grad_norm"] for row in r if "grad_norm" in row] for r in rows]
    assert norms[0] != norms[1], "the gradient of B sees the dropped inputs"


def test_the_draws_of_a_step_depend_on_seed_step_and_rank_alone():
    def draws(*key: int) -> tuple:
        seed_step(*key)
        return random.random(), float(np.random.random()), float(torch.rand(1))

    assert draws(0, 3, 1) == draws(0, 3, 1)
    assert len({draws(0, 3, 1), draws(1, 3, 1), draws(0, 4, 1), draws(0, 3, 0)}) == 4


def test_checkpoints_that_are_kept(folder, straight, tmp_path):
    kept = sorted(path.name for path in (straight / "checkpoints").iterdir())
    assert kept == ["best", "latest.json", f"step-{STEPS - 3:08d}", f"step-{STEPS:08d}"]
    sft.run(settings_of(folder, tmp_path / "four", keep_checkpoints=4))
    assert len(list((tmp_path / "four" / "checkpoints").glob("step-*"))) == 4


FULL = {
    "ours": OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
    "safetensors": SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
}


@pytest.mark.parametrize("who", FULL)
@pytest.mark.parametrize("where", ["trainable", "optimizer", "state", "latest"])
def test_a_full_disk_leaves_the_last_good_checkpoint(folder, straight, monkeypatch, who, where):
    out = folder / f"full {who} {where}"
    real_save, real_json = checkpoint.save_file, checkpoint.write_json
    n_saved = 0

    def save_file(tensors: dict, path: Path) -> None:
        nonlocal n_saved
        n_saved += where in path.name
        if n_saved == 2 and where in path.name:
            path.write_bytes(b"half")
            raise FULL[who]
        real_save(tensors, path)

    def write_json(path: Path, value: object) -> None:
        nonlocal n_saved
        n_saved += where in path.name
        if n_saved == 2 and where in path.name:
            raise FULL[who]
        real_json(path, value)

    with monkeypatch.context() as patch, pytest.raises(VlaError, match="no space left on the disk.*--resume"):
        patch.setattr(checkpoint, "save_file", save_file)
        patch.setattr(checkpoint, "write_json", write_json)
        sft.run(settings_of(folder, out))
    assert not [path for path in (out / "checkpoints").iterdir() if path.name.startswith(".")]
    sft.run(settings_of(folder, out, resume=True))
    same_run(out, straight)


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Path]:
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(disk)]
    if not Path("/bin/mount").exists() or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("may not mount a file system here")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


def test_a_really_full_disk(folder, straight, small_disk, monkeypatch):
    out, filler = small_disk / "run", small_disk / "filler"
    save = sft.Loop._save

    def save_then_fill(self: sft.Loop) -> None:
        save(self)
        if self.step == 9:
            free = os.statvfs(small_disk)
            filler.write_bytes(b"0" * (free.f_bavail * free.f_frsize - 60_000))

    with monkeypatch.context() as patch, pytest.raises(VlaError, match="No space left"):
        patch.setattr(sft.Loop, "_save", save_then_fill)
        sft.run(settings_of(folder, out))
    assert json.loads((out / "checkpoints" / "latest.json").read_text())["checkpoint"] == "step-00000009"
    filler.unlink()
    sft.run(settings_of(folder, out, resume=True))
    monkeypatch.undo()
    same_run(out, straight)


def test_a_full_disk_while_the_policy_is_written(folder, straight, monkeypatch):
    out = folder / "full at the end"
    settings = settings_of(folder, out)

    def refuse(path: Path, data: bytes) -> None:
        if path.name == "dataset_statistics.json":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write_bytes(path, data)

    with monkeypatch.context() as patch, pytest.raises(VlaError, match="no space left"):
        patch.setattr("vla.files.write_bytes", refuse)
        sft.run(settings)
    assert not (out / "policy").exists() and not list(out.glob(".policy*"))
    sft.run(dataclasses.replace(settings, resume=True))
    same_run(out, straight)


def test_other_errors_are_not_called_a_full_disk(tmp_path):
    with pytest.raises(PermissionError), checkpoint.disk_full_said(tmp_path):
        raise PermissionError(errno.EACCES, "no")
    with pytest.raises(SafetensorError, match="other"), checkpoint.disk_full_said(tmp_path):
        raise SafetensorError("other")


def test_resume_wants_the_data_it_began_with(folder, tmp_path):
    out = tmp_path / "run"
    settings = settings_of(folder, out, steps=2)
    sft.run(settings)
    found = json.loads((out / "data.json").read_text())
    assert list(found) == ["fake"] and len(found["fake"]["hash"]) == 16 and found["fake"]["revision"] == ""
    (out / "data.json").write_text(json.dumps({"fake": {"hash": "0" * 16, "revision": ""}}))
    with pytest.raises(VlaError, match=r"fake with other episodes.*data.json says; expected the same data"):
        sft.run(dataclasses.replace(settings, resume=True))


def test_a_run_that_is_older_than_a_setting_goes_on(folder, tmp_path):
    out = tmp_path / "run"
    settings = settings_of(folder, out, steps=2)
    open_run(out, settings)
    written = json.loads((out / "settings.json").read_text())
    (out / "settings.json").write_text(json.dumps({k: v for k, v in written.items() if k != "shuffle_window"}))
    open_run(out, dataclasses.replace(settings, resume=True))
    with pytest.raises(VlaError, match="other settings than .*: lr 0.003 -> 0.1"):
        open_run(out, dataclasses.replace(settings, resume=True, lr=0.1))
