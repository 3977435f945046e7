"""What only a CUDA device shows: `pytest -m gpu tests/test_gpu.py`. The checks themselves are run on the CPU too."""

from __future__ import annotations

import dataclasses
import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from openvla_tiny import INSTRUCTIONS, PROMPT, write_checkpoint
from PIL import Image
from test_sft_resume import same_run
from training import fake_dataset, sft_settings, tiny_backbone

from vla.backbone import load_backbone
from vla.files import read_jsonl
from vla.finetune import sft
from vla.finetune.sft_setup import observation_of, open_datasets
from vla.policy import load_policy

on_gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
DEVICES = ["cpu", pytest.param("cuda", marks=on_gpu)]
FLASH = pytest.mark.skipif(importlib.util.find_spec("flash_attn") is None, reason="needs the package flash-attn")
ATTENTION = [
    ("cpu", "eager"), ("cpu", "sdpa"), pytest.param("cuda", "eager", marks=on_gpu), pytest.param("cuda", "sdpa", marks=on_gpu),
    pytest.param("cuda", "flash_attention_2", marks=[*on_gpu, FLASH]),
]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("gpu")
    fake_dataset(folder)
    tiny_backbone(folder)
    write_checkpoint(folder / "openvla")
    return folder


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(("device", "attention"), ATTENTION)
def test_openvla_in_bf16_is_openvla_in_float32(folder, device, attention, side):
    """A batch padded on either side, in bfloat16, against one prompt at a time in float32 on the CPU."""
    rng = np.random.default_rng(0)
    frames = [Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)) for _ in INSTRUCTIONS]
    prompts = [PROMPT.format(text.lower()) for text in INSTRUCTIONS]
    exact = load_backbone(str(folder / "openvla"), attn_implementation="eager")
    wanted = [exact.model(**exact.encode([p], [[f]])).logits[0, -1] for p, f in zip(prompts, frames, strict=True)]
    found = load_backbone(str(folder / "openvla"), dtype="bfloat16", device=device, attn_implementation=attention)
    assert found.model.language_model.config._attn_implementation == attention
    found.processor.tokenizer.padding_side = side
    inputs = found.encode(prompts, [[frame] for frame in frames])
    mask = inputs["attention_mask"]
    assert mask.min() == 0
    last = mask.shape[1] - 1 - mask.flip(1).argmax(1)
    logits = found.model(**inputs).logits[torch.arange(len(prompts), device=mask.device), last].float().cpu()
    for got, want in zip(logits, wanted, strict=True):
        assert (got - want).std() < 0.05 * want.std()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("changes", [
    {"precision": "bf16"}, {"precision": "bf16", "gradient_checkpointing": True}, {"method": "qlora", "optimizer": "paged_adamw8bit"},
    {"precision": "fp16"},
], ids=lambda changes: "-".join(str(value) for value in changes.values()))  # fmt: skip
def test_training_learns_and_goes_on_exactly(folder, tmp_path, device, changes):
    if changes.get("precision") == "fp16" and device == "cpu":
        pytest.skip("fp16 needs a CUDA device")
    if "method" in changes and importlib.util.find_spec("bitsandbytes") is None:
        pytest.skip("needs the extra [bnb]")
    settings = sft_settings(
        folder, out=tmp_path / "whole", device=device, steps=30, lr=1e-2, save_every_steps=10, eval_every_steps=10, **changes
    )  # fmt: skip
    policy = sft.run(settings)
    losses = [row["loss"] for row in read_jsonl(settings.out / "metrics.jsonl") if "loss" in row]
    assert np.isfinite(losses).all() and np.mean(losses[-5:]) < 0.9 * losses[0]
    opened, sample = load_policy(policy, device=device), open_datasets(settings)[0][0]
    assert opened.act([observation_of(sample)])[0].actions.shape == (3, 2) and opened.backbone.device.type == device
    half = dataclasses.replace(settings, out=tmp_path / "half")
    loop_steps = sft.Loop._optimizer_step

    def stop_at_20(self, batch):
        if self.step == 20:
            raise KeyboardInterrupt
        return loop_steps(self, batch)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(sft.Loop, "_optimizer_step", stop_at_20)
        sft.run(half)
    sft.run(dataclasses.replace(half, resume=True))
    same_run(settings.out, half.out)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_step_on_the_gpu_is_a_step_on_the_cpu(folder, tmp_path):
    runs = []
    for device in ("cpu", "cuda"):
        settings = sft_settings(folder, out=tmp_path / device, device=device, steps=3)
        sft.run(settings)
        runs.append([row["loss"] for row in read_jsonl(settings.out / "metrics.jsonl") if "loss" in row])
    np.testing.assert_allclose(runs[0], runs[1], rtol=1e-3)
