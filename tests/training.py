"""A dataset of the fake suite and the smallest settings, for tests that train."""

from __future__ import annotations

from pathlib import Path

from families import FAMILIES

from vla.finetune import collect, sft
from vla.testing import FakeSuite


def fake_dataset(folder: Path, episodes_per_task: int = 4) -> Path:
    collect.run(collect.Settings(out=folder / "fake", suite="fake", episodes_per_task=episodes_per_task), FakeSuite())
    return folder / "fake"


def tiny_backbone(folder: Path, family: str = "llava", width: int = 1) -> Path:
    FAMILIES[family](folder / family, width)
    return folder / family


def sft_settings(folder: Path, **changes: object) -> sft.Settings:
    """`folder` holds fake/ and llava/; the run goes to folder/run unless `out` says otherwise."""
    base = {
        "data": (str(folder / "fake"),), "out": folder / "run", "backbone": str(folder / "llava"), "horizon": 3, "bins": 64,
        "lora_r": 4, "steps": 6, "batch_size": 4, "warmup_steps": 2, "log_every_steps": 1, "save_every_steps": 2,
        "eval_every_steps": 3, "gripper_dim": None, "device": "cpu", "image_size_px": 32,
    }  # fmt: skip
    return sft.Settings(**{**base, **changes})  # pyright: ignore[reportArgumentType]
