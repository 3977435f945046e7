"""Co-training with vision-language rows: both losses fall, nothing depends on batches or restarts, bad rows are named."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_sft_resume import same_run
from training import fake_dataset, sft_settings, tiny_backbone

from vla.files import read_jsonl
from vla.finetune import sft
from vla.finetune.data.vl_data import read_rows
from vla.types import VlaError


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("vl")
    fake_dataset(folder)
    tiny_backbone(folder)
    lines = []
    for i, (colour, name) in enumerate([((255, 0, 0), "red"), ((0, 255, 0), "green and so on"), ((0, 0, 255), "blue")]):
        Image.fromarray(np.full((40 + i, 30, 3), colour, np.uint8)).save(folder / f"{i}.png")
        lines.append(json.dumps({"image": f"{i}.png", "question": "which colour?", "answer": name}))
    (folder / "rows.jsonl").write_text("\n".join(lines) + "\n\n")
    return folder


def settings_of(folder: Path, out: str, **changes: object) -> sft.Settings:
    base = {"out": folder / out, "vl_data": str(folder / "rows.jsonl"), "free_running_samples": 2}
    return sft_settings(folder, **{**base, **changes})


def rows_of(settings: sft.Settings) -> list[dict]:
    return [row for row in read_jsonl(settings.out / "metrics.jsonl") if "loss" in row]


def test_both_losses_fall(folder):
    settings = settings_of(
        folder, "falls", steps=60, lr=5e-3, batch_size=8, vl_weight=0.5, save_every_steps=60, eval_every_steps=60
    )
    sft.run(settings)
    rows = rows_of(settings)
    for name in ("loss", "vl_loss"):
        assert sum(row[name] for row in rows[-5:]) < 0.8 * sum(row[name] for row in rows[:5]), name
    assert all(0.0 <= row["vl_token_accuracy"] <= 1.0 for row in rows)


def test_the_weight_scales_the_gradient_and_not_the_losses(folder):
    rows = []
    for weight in (1e-9, 0.5):
        settings = settings_of(folder, f"weight {weight}", steps=1, vl_weight=weight)
        sft.run(settings)
        rows.append(rows_of(settings)[0])
    plain = sft_settings(folder, out=folder / "plain", steps=1)
    sft.run(plain)
    assert rows[0]["loss"] == rows[1]["loss"] and rows[0]["vl_loss"] == rows[1]["vl_loss"]
    assert rows[0]["grad_norm"] == pytest.approx(rows_of(plain)[0]["grad_norm"], rel=1e-5)
    assert rows[1]["grad_norm"] != pytest.approx(rows[0]["grad_norm"], rel=1e-3)


def test_accumulating_changes_nothing(folder):
    one = settings_of(folder, "1x4", steps=3, batch_size=4, vl_batch_size=4)
    four = settings_of(folder, "4x1", steps=3, batch_size=1, grad_accumulation=4, vl_batch_size=1)
    sft.run(one)
    sft.run(four)
    for a, b in zip(rows_of(one), rows_of(four), strict=True):
        for name in ("loss", "vl_loss", "grad_norm"):
            assert a[name] == pytest.approx(b[name], rel=2e-4), name


def test_resumed_exactly(folder):
    settings = settings_of(folder, "straight", lora_dropout=0.2)
    sft.run(settings)
    halves = dataclasses.replace(settings, out=folder / "halves")
    save = sft.Loop._save

    def save_then_stop(self: sft.Loop) -> None:
        save(self)
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(sft.Loop, "_save", save_then_stop)
        sft.run(halves)
    sft.run(dataclasses.replace(halves, resume=True))
    same_run(halves.out, settings.out)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2: .*one JSON object a line"),
        ("[1]", r"line 2: \[1\]; expected image, question and answer"),
        ('{"image": "0.png", "question": "q"}', "line 2.*expected image, question and answer"),
        ('{"image": "0.png", "question": "q", "answer": " "}', "texts that are not empty"),
        ('{"image": "no.png", "question": "q", "answer": "a"}', "line 2: no image .*no.png"),
    ],
)
def test_bad_rows_are_named_before_anything_is_written(folder, line, message):
    good = (folder / "rows.jsonl").read_text().splitlines()[0]
    (folder / "bad.jsonl").write_text(f"{good}\n{line}\n")
    with pytest.raises(VlaError, match=message):
        sft.run(settings_of(folder, "bad", vl_data=str(folder / "bad.jsonl")))
    assert not (folder / "bad").exists()


def test_other_bad_input(folder, tmp_path):
    with pytest.raises(VlaError, match="no file .*nowhere.jsonl"):
        read_rows(tmp_path / "nowhere.jsonl")
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(VlaError, match="without a row"):
        read_rows(tmp_path / "empty.jsonl")
    with pytest.raises(VlaError, match="vl_weight 0.0"):
        settings_of(folder, "no", vl_weight=0.0)
    (tmp_path / "0.png").write_bytes(b"not an image")
    (tmp_path / "rows.jsonl").write_text('{"image": "0.png", "question": "q", "answer": "a"}\n')
    with pytest.raises(VlaError, match="0.png.*an image"):
        sft.run(settings_of(folder, "broken image", vl_data=str(tmp_path / "rows.jsonl")))
