"""A tiny OpenVLA through the stages every other backbone goes through."""

import json

import openvla_tiny as tiny
import pytest
from safetensors.torch import load_file
from training import fake_dataset, sft_settings

from vla import merge
from vla.finetune import sft
from vla.import_policy import Settings, run
from vla.openvla.checkpoint import weight_shapes
from vla.policy import load_policy
from vla.types import Observation


def test_fine_tune_merge_and_act(tmp_path):
    fake_dataset(tmp_path)
    source = tiny.write_checkpoint(tmp_path / "openvla")
    settings = sft_settings(
        tmp_path, backbone=str(source), placement="tail", bins=256, image_size_px=224, horizon=1, steps=6, batch_size=2, lr=2e-2, eval_every_steps=100, save_every_steps=100,
        lora_parts=("llm", "projector", "vision"), state=False,
    )  # fmt: skip
    tuned = load_policy(sft.run(settings))
    losses = [row["loss"] for row in map(json.loads, open(tmp_path / "run" / "metrics.jsonl")) if "loss" in row]
    assert losses[-1] < losses[0]
    assert tuned.spec.tokens.placement["first_id"] == 31999 and tuned.spec.backbone.model_type == "openvla"
    merged = load_policy(merge.run(merge.Settings(settings.out / "policy", tmp_path / "merged")))
    frames = [Observation({"front": frame}, None, "reach the green square") for frame in tiny.frames()]
    for a, b in zip(tuned.act(frames), merged.act(frames), strict=True):
        assert a.ok and a.token_ids.tolist() == b.token_ids.tolist()
    assert weight_shapes(tmp_path / "merged" / "model") == weight_shapes(source)  # the authors' loader opens it


def test_quantized(tmp_path):
    pytest.importorskip("bitsandbytes")
    source = tiny.write_checkpoint(tmp_path / "openvla")
    out = run(Settings(str(source), tmp_path / "policy", unnorm_key="plain", dtype="float32"))
    frames = [Observation({"image": frame}, None, "open the drawer") for frame in tiny.frames()]
    full, quantized = load_policy(out), load_policy(out, quantization="int8")
    assert quantized.metadata["weight_bytes"] < full.metadata["weight_bytes"]
    assert all(chunk.ok for chunk in quantized.act(frames))


def test_files_of_a_copied_policy(tmp_path):
    source = tiny.write_checkpoint(tmp_path / "openvla", "single")
    out = run(Settings(str(source), tmp_path / "policy", unnorm_key="plain", copy=True))
    stored = load_file(out / "model" / "model.safetensors")
    assert {str(tensor.dtype) for tensor in stored.values()} == {"torch.bfloat16"}
    assert json.loads((out / "model" / "config.json").read_text())["torch_dtype"] == "bfloat16"
    assert load_policy(out, dtype="bfloat16").metadata["backbone"]["weights"] == "merged"
