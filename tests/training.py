"""A dataset of the fake suite and the smallest settings, for tests that train."""

from __future__ import annotations

import dataclasses
import multiprocessing
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
from families import FAMILIES

from vla.finetune import collect, sft
from vla.testing import FakeSuite


def fake_dataset(folder: Path, episodes_per_task: int = 4) -> Path:
    collect.run(collect.Settings(out=folder / "fake", suite="fake", episodes_per_task=episodes_per_task), FakeSuite())
    return folder / "fake"


def tiny_backbone(folder: Path, family: str = "llava", width: int = 1) -> Path:
    FAMILIES[family](folder / family, width)
    return folder / family


def in_process(target: Callable[..., object], *args: object, timeout_s: float = 120.0) -> int | None:
    """Exit code of `target(*args)`, a function of a module, in a process of its own; -9 if that was killed with SIGKILL."""
    process = forked(target, *args)
    process.join(timeout_s)
    if process.exitcode is None:
        process.kill()
    return process.exitcode


def forked(target: Callable[..., object], *args: object) -> BaseProcess:
    """`target(*args)`, begun in a process that is forked from one that has the libraries loaded: 0.1 s where a new Python
    takes 5."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["training", "vla.finetune.rl"])
    process = context.Process(target=target, args=args)
    process.start()
    return process


def in_two_parts(settings: sft.Settings, until_step: int = 0) -> Path:
    """The policy of a run that is interrupted right after its first checkpoint, or that of `until_step`, and resumed."""
    save = sft.Loop._save

    def save_then_stop(self: sft.Loop) -> None:
        save(self)
        if self.step >= until_step:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(sft.Loop, "_save", save_then_stop)
        sft.run(settings)
    return sft.run(dataclasses.replace(settings, resume=True))


def sft_settings(folder: Path, **changes: object) -> sft.Settings:
    """`folder` holds fake/ and llava/; the run goes to folder/run unless `out` says otherwise."""
    base = {
        "data": (str(folder / "fake"),), "out": folder / "run", "backbone": str(folder / "llava"), "horizon": 3, "bins": 64,
        "lora_r": 4, "steps": 6, "batch_size": 4, "warmup_steps": 2, "log_every_steps": 1, "save_every_steps": 2,
        "eval_every_steps": 3, "gripper_dim": None, "device": "cpu", "image_size_px": 32,
    }  # fmt: skip
    return sft.Settings(**{**base, **changes})  # pyright: ignore[reportArgumentType]
