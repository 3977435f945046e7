"""The peer of `benchmarks.finetune_loop`: the training loop of OpenVLA's own `vla-scripts/finetune.py`, one step per line on
stdin, answered by a line of JSON.

Runs in an environment of the authors' pins. Their code is read from their repository when this runs: classes are imported,
and the statements of `finetune()` from the LoRA's attachment to the loop are executed as they stand there. What is given
to them instead of a GPU's: `torch.bfloat16` means float32, autocast does nothing, DDP's wrapper is a plain one, and the data
loader hands out fixed samples, each through their own transform and collator. RLDS, W&B and saving are left out.
"""

from __future__ import annotations

import ast
import contextlib
import importlib
import json
import sys
import time
import types
from collections import deque
from pathlib import Path

import numpy as np
import timm
import torch
import tqdm
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch.optim import AdamW
from transformers.modeling_outputs import CausalLMOutputWithPast

PACKAGES = (
    "prismatic", "prismatic.extern", "prismatic.extern.hf", "prismatic.models", "prismatic.models.backbones",
    "prismatic.models.backbones.vision", "prismatic.models.backbones.llm", "prismatic.util", "prismatic.vla",
    "prismatic.vla.datasets",
)  # fmt: skip
"""Their `__init__`s import TensorFlow and more; the modules that are used do not need them."""
NAMES = ("lora_config", "trainable_params", "optimizer", "action_tokenizer", "batch_transform", "collator", "recent_losses",
         "recent_action_accuracies", "recent_l1_losses")  # fmt: skip
"""What is assigned by the statements of `finetune()` that are executed."""


def main(repo: Path, work: Path) -> None:
    job = json.loads((work / "job.json").read_text())
    torch.set_num_threads(job["threads"])
    torch.manual_seed(0)
    modules = import_theirs(repo)
    model, processor = load(modules, work / "model")
    scope = namespace(modules, job, model, processor)
    statements = theirs(repo / "vla-scripts" / "finetune.py")
    for statement in statements[:-1]:
        run(statement, scope)
        if "vla" in scope and isinstance(scope["vla"], PeftModel) and not isinstance(scope["vla"], Wrapped):
            copy_adapter(scope["vla"], work / "adapter.safetensors")
            scope["vla"] = Wrapped(scope["vla"])
    scope["dataloader"] = batches(scope, work, job)
    run(statements[-1], scope)


class Wrapped(torch.nn.Module):
    """In the place of DDP."""

    def __init__(self, module: torch.nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, **inputs):
        return self.module(**inputs)


class Torch:
    """torch, with float32 for bfloat16 and no autocast."""

    bfloat16 = torch.float32

    def __getattr__(self, name: str):
        return getattr(torch, name)

    @staticmethod
    def autocast(*_, **__):
        return contextlib.nullcontext()


def import_theirs(repo: Path) -> dict:
    """The modules of theirs that the loop uses, by their last name."""
    for name in PACKAGES:
        package = types.ModuleType(name)
        package.__path__ = [str(repo / name.replace(".", "/"))]
        sys.modules[name] = package
    setattr(sys.modules["prismatic.models.backbones.vision"], "ImageTransform", object)  # noqa: B010
    unused = {"rlds": ("make_interleaved_dataset", "make_single_dataset"), "rlds.oxe": ("OXE_NAMED_MIXTURES",
              "get_oxe_dataset_kwargs_and_weights"), "rlds.utils": (), "rlds.utils.data_utils": ("NormalizationType",)}  # fmt: skip
    for name, contents in unused.items():
        module = types.ModuleType(f"prismatic.vla.datasets.{name}")
        for item in contents:
            setattr(module, item, None)
        sys.modules[module.__name__] = module
    wanted = ("extern.hf.modeling_prismatic", "extern.hf.processing_prismatic", "util.data_utils", "vla.action_tokenizer",
              "vla.datasets.datasets", "models.backbones.llm.prompting")  # fmt: skip
    return {name.split(".")[-1]: importlib.import_module(f"prismatic.{name}") for name in wanted}


def load(modules: dict, folder: Path):
    """Their model and processor from a folder in the published layout. A small model's timm arguments are in its config."""
    from transformers import AutoTokenizer

    config = json.loads((folder / "config.json").read_text())
    sizes, create = dict(zip(config["timm_model_ids"], config["timm_model_args"], strict=True)), timm.create_model
    modules["modeling_prismatic"].timm.create_model = lambda name, **given: create(name, **{**given, **sizes[name]})
    model = modules["modeling_prismatic"].OpenVLAForActionPrediction.from_pretrained(folder, torch_dtype=torch.float32)
    processing = modules["processing_prismatic"]
    images = processing.PrismaticImageProcessor.from_pretrained(folder)
    return model, processing.PrismaticProcessor(image_processor=images, tokenizer=AutoTokenizer.from_pretrained(folder))


def namespace(modules: dict, job: dict, model, processor) -> dict:
    """The names that the statements of `finetune()` use."""
    prompting = modules["prompting"]
    cfg = types.SimpleNamespace(
        use_lora=True, lora_rank=job["lora_r"], lora_dropout=0.0, learning_rate=job["lr"], grad_accumulation_steps=1,
        vla_path="openvla", max_steps=10**9, save_steps=10**9, batch_size=job["batch_size"],
    )  # fmt: skip
    return {
        "cfg": cfg, "vla": model, "processor": processor, "device_id": "cpu", "torch": Torch(), "tqdm": tqdm, "deque": deque,
        "distributed_state": types.SimpleNamespace(is_main_process=False), "LoraConfig": LoraConfig, "AdamW": AdamW,
        "get_peft_model": get_peft_model, "CausalLMOutputWithPast": CausalLMOutputWithPast,
        "ActionTokenizer": modules["action_tokenizer"].ActionTokenizer,
        "RLDSBatchTransform": modules["datasets"].RLDSBatchTransform,
        "PaddedCollatorForActionPrediction": modules["data_utils"].PaddedCollatorForActionPrediction,
        "PurePromptBuilder": prompting.PurePromptBuilder, "VicunaV15ChatPromptBuilder": prompting.VicunaV15ChatPromptBuilder,
    }  # fmt: skip


def theirs(path: Path) -> list:
    """The statements of `finetune()` that are executed, in their order; the last one is the loop."""
    tree = ast.parse(path.read_text())
    body = next(n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == "finetune").body
    chosen = [node for node in body if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") in NAMES]
    chosen += [n for n in body if isinstance(n, ast.If) and "get_peft_model" in ast.unparse(n)]
    chosen += [n for n in body if isinstance(n, ast.With) and "enumerate(dataloader)" in ast.unparse(n)]
    chosen.sort(key=lambda node: node.lineno)
    assert isinstance(chosen[-1], ast.With), "another finetune.py than openvla/openvla@c8f03f4"
    return chosen


def run(statement, scope: dict) -> None:
    module = ast.Module([statement], [])
    with contextlib.redirect_stdout(sys.stderr):
        exec(compile(module, "finetune.py", "exec"), scope)


def copy_adapter(model, path: Path) -> None:
    """LoRA as the other side begins; theirs on layers that are never run stays."""
    given, own = load_file(path), dict(model.named_parameters())
    with torch.no_grad():
        for name, tensor in given.items():
            own[name].copy_(tensor)


def batches(scope: dict, work: Path, job: dict):
    """In the place of their DataLoader: a batch for each line read, with the time that the last step took."""
    frames, actions = np.load(work / "frames.npy"), np.load(work / "actions.npy")
    print(json.dumps({"trains": sum(p.numel() for p in scope["trainable_params"])}), file=sys.__stdout__, flush=True)
    for line in sys.stdin:
        k = int(line)
        cpu, wall = time.process_time(), time.perf_counter()
        rows = [
            {"dataset_name": "made", "action": action[None], "observation": {"image_primary": frame[None]},
             "task": {"language_instruction": text.encode()}}
            for frame, action, text in zip(frames[k], actions[k], job["instructions"][k], strict=True)
        ]  # fmt: skip
        yield scope["collator"]([scope["batch_transform"](row) for row in rows])
        cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
        print(
            json.dumps({"loss": scope["recent_losses"][-1], "cpu_s": cpu, "wall_s": wall}),
            file=sys.__stdout__,
            flush=True,
        )


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
