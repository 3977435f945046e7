"""Peak memory and time of merging an adapter, tensor by tensor, against PEFT's way with the whole model.

Run it with `python -m benchmarks.merge_memory`.

A random llava of `layers` Llama blocks is written in bfloat16, in shards, with a LoRA on every linear layer of its language
model. Each way runs in a process of its own; `libraries` is such a process that only imports and builds the plan. The merged
weights are compared: equal to PEFT's merge in float32, rounded to bfloat16 at the end.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers as tf
import tyro

from vla.merge_weights import add_adapter, open_base
from vla.weight_files import read_headers, read_tensor

WAYS = ("libraries", "tensor by tensor", "whole, bfloat16", "whole, float32")


@dataclass(frozen=True)
class Settings:
    layers: int = 12
    """Of the language model."""
    hidden: int = 1024
    """Its width."""
    shard: str = "100MB"
    """Largest file of the base."""
    way: str = ""
    """Internal: what a child process does."""
    folder: Path = Path()
    """Internal: where the base is."""


def write_base(settings: Settings, folder: Path) -> None:
    from peft import LoraConfig, get_peft_model

    text = dict(model_type="llama", hidden_size=settings.hidden, intermediate_size=settings.hidden * 11 // 4, vocab_size=32064,
                num_hidden_layers=settings.layers, num_attention_heads=16, num_key_value_heads=16)  # fmt: skip
    vision = dict(model_type="siglip_vision_model", hidden_size=64, intermediate_size=128, num_hidden_layers=1,
                  num_attention_heads=2, image_size=32, patch_size=16, vision_use_head=False)  # fmt: skip
    config = tf.LlavaConfig(text_config=text, vision_config=vision, tie_word_embeddings=False, dtype="bfloat16")
    torch.manual_seed(0)
    model = tf.LlavaForConditionalGeneration(config).bfloat16()
    model.save_pretrained(folder / "base", max_shard_size=settings.shard)
    names = [n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and "language_model" in n]
    adapted: Any = get_peft_model(model, LoraConfig(r=32, lora_alpha=16, target_modules=names))
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data.normal_(std=0.02)
    adapted.save_pretrained(folder / "adapter", save_embedding_layers=False)


def merge(way: str, folder: Path) -> None:
    out = folder / way.replace(" ", "-")
    if way.startswith("whole"):
        from peft import PeftModel

        dtype = torch.float32 if way.endswith("32") else torch.bfloat16
        model = tf.AutoModelForImageTextToText.from_pretrained(folder / "base", dtype=dtype)
        merged: Any = PeftModel.from_pretrained(model, str(folder / "adapter")).merge_and_unload()
        merged.bfloat16().save_pretrained(out, max_shard_size="100MB")
        return
    plan = open_base(folder / "base", "llava")
    add_adapter(plan, folder / "adapter")
    if way != "libraries":
        out.mkdir()
        for file in plan.files:
            plan.write(file, out / file, None, lambda n: None)


def largest_difference(a: Path, b: Path) -> float:
    """Of the tensors of two checkpoints, in units of the last place of bfloat16 (2^-8 of the value)."""
    where = {name: b / file for file, names in read_headers(b).items() for name in names}
    worst = 0.0
    for file, names in read_headers(a).items():
        for name in names:
            x, y = read_tensor(a / file, name).float(), read_tensor(where[name], name).float()
            worst = max(worst, float(((x - y).abs() / (x.abs() * 2**-8).clamp(min=1e-9)).max()))
    return worst


def run(settings: Settings) -> dict[str, Any]:
    """Peak resident memory in MB and seconds of each way."""
    with tempfile.TemporaryDirectory() as text:
        folder = Path(text)
        write_base(settings, folder)
        found: dict[str, Any] = {}
        for way in WAYS:
            command = [sys.executable, "-m", "benchmarks.merge_memory", "--way", way, "--folder", str(folder)]
            ran = subprocess.run(command, capture_output=True, text=True, check=True, env=dict(os.environ))
            found[way] = json.loads(ran.stdout.splitlines()[-1])
        (folder / "tensor-by-tensor" / "model.safetensors.index.json").write_bytes(
            (folder / "base" / "model.safetensors.index.json").read_bytes()
        )
        sizes = [path.stat().st_size / 1e6 for path in (folder / "base").glob("*.safetensors")]
        found["base_mb"], found["largest_file_mb"] = sum(sizes), max(sizes)
        found["difference_to_float32"] = largest_difference(folder / "tensor-by-tensor", folder / "whole,-float32")
        found["difference_to_bfloat16"] = largest_difference(folder / "tensor-by-tensor", folder / "whole,-bfloat16")
        changed = largest_difference(folder / "tensor-by-tensor", folder / "base")
    assert found["difference_to_float32"] == 0.0 and changed > 1.0
    return found


def main() -> None:
    settings = tyro.cli(Settings)
    if settings.way:
        start = time.monotonic()
        merge(settings.way, settings.folder)
        status = Path("/proc/self/status").read_text()  # ru_maxrss would include what the parent had at the fork
        peak_mb = int(status.split("VmHWM:")[1].split()[0]) / 1024
        print(json.dumps({"peak_mb": peak_mb, "seconds": time.monotonic() - start}))
        return
    found = run(settings)
    print(f"base {found['base_mb']:.0f} MB in files of up to {found['largest_file_mb']:.0f} MB")
    none = found["libraries"]["peak_mb"]
    for way in WAYS:
        row = found[way]
        print(
            f"{way:18s} peak {row['peak_mb']:6.0f} MB, {row['peak_mb'] - none:6.0f} above the libraries, {row['seconds']:5.1f} s"
        )
    print(f"largest difference: {found['difference_to_float32']:g} to the whole model in float32, "
          f"{found['difference_to_bfloat16']:g} (last places) to the whole model in bfloat16")  # fmt: skip


if __name__ == "__main__":
    main()
