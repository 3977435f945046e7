"""Samples per second of `vla finetune openvla`, beside the training loop of OpenVLA's own `vla-scripts/finetune.py`.

    python -m venv theirs
    theirs/bin/pip install torch torchvision transformers==4.40.1 tokenizers==0.19.1 timm==0.9.16 peft==0.11.1 'numpy<2' \
        accelerate==0.30.1
    git clone https://github.com/openvla/openvla
    python -m benchmarks.finetune_loop --peer-python theirs/bin/python --peer-repo openvla

A small random OpenVLA in the published layout, LoRA on all linear layers from the same values, AdamW, float32, one thread
each, the same batches. Both sides start from frames in memory and do all the rest: pixels, prompts, tokens, forward,
backward, figures, optimiser. Reading and augmenting data is left out on both. The two take turns, and their losses are
compared at every step, so that LoRA's places, the loss and the updates are known to be the same.

Theirs computes logits of every place, ours of those that carry loss. What that saves depends on the share of the output head
in the weights, 2 % in the model of 7B. With all of Llama's 32,064 ids it would be 40 % of a small model: hence `--vocabulary
scaled`, of about 900 ids; `full` shows the other.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import io
import json
import os
import statistics
import subprocess
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import tyro
from safetensors.torch import save_file

from vla.adapters import parameter_counts
from vla.finetune import sft
from vla.finetune.data.chunks import Sample
from vla.finetune.formats.lerobot_writer import LeRobotWriter
from vla.finetune.sft_launch import make_accelerator
from vla.finetune.sft_setup import build_policy, open_datasets
from vla.types import Episode, Observation, Step, problem

PEER = Path(__file__).parent / "finetune_loop_peer.py"
NAMES = ("x", "y", "z", "roll", "pitch", "yaw", "gripper")


@dataclass(frozen=True)
class Settings:
    peer_python: Path
    """Python of an environment with the authors' pins."""
    peer_repo: Path
    """Checkout of openvla/openvla."""
    batch_size: int = 4
    """Samples per step."""
    steps: int = 6
    """Timed steps of each side; the median is reported."""
    threads: int = 1
    """Of each side; while one works the other waits."""
    hidden: int = 256
    """Width of the language model; 4096 in the model of 7B."""
    layers: int = 8
    """Of the language model; 32 in the model of 7B."""
    vocabulary: Literal["scaled", "full"] = "scaled"
    """scaled: only the ids that prompts and actions use; full: as many as Llama-2 has."""
    tolerance: float = 1e-4
    """Largest difference of the losses of a step."""


def run(settings: Settings) -> dict[str, Any]:
    """Samples per second (CPU and wall time), their ratios, and the largest difference of a loss."""
    if not (settings.peer_repo / "vla-scripts" / "finetune.py").is_file() or not settings.peer_python.is_file():
        raise problem(f"--peer-python {settings.peer_python}, --peer-repo {settings.peer_repo}", "an environment with the "
                      "authors' pins and a checkout of openvla/openvla", "make them as the top of this file says")  # fmt: skip
    torch.set_num_threads(settings.threads)
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        write_model(work / "model", settings)
        write_data(work / "made", settings)
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            loop, batches = our_side(work, settings)
        with their_side(settings, work, loop, batches) as peer:
            return measure(settings, loop, batches, peer)


def our_side(work: Path, settings: Settings) -> tuple[sft.Loop, list[list[Sample]]]:
    """The loop of `vla finetune openvla`, its data replaced by fixed batches in memory."""
    given = dataclasses.replace(
        sft.PRESETS["openvla"], data=(str(work / "made"),), out=work / "run", backbone=str(work / "model"), precision="float32",
        batch_size=settings.batch_size, augment=False, crop_area=1.0, holdout_episodes=0, device="cpu", cache_images=True,
    )  # fmt: skip
    dataset, found = open_datasets(given)
    policy = build_policy(given, dataset, found, "cpu")
    loop = sft.Loop(given, make_accelerator(given, "cpu"), dataset, policy)
    batches = [next(loop.stream) for _ in range(settings.steps + 1)]
    loop.stream = iter(batches)
    return loop, batches


@contextlib.contextmanager
def their_side(settings: Settings, work: Path, loop: sft.Loop, batches: list[list[Sample]]) -> Any:
    """The other process, with the same weights, LoRA and batches."""
    parameters = loop.policy.backbone.model.named_parameters()
    save_file(
        {n: p.detach().clone().contiguous() for n, p in parameters if p.requires_grad}, work / "adapter.safetensors"
    )
    np.save(work / "frames.npy", np.array([[next(iter(s.images.values())) for s in batch] for batch in batches]))
    normalizer = loop.policy.normalizer
    np.save(work / "actions.npy", np.array([[normalizer.normalize(s.actions[0]) for s in batch] for batch in batches]))
    job = {
        "batch_size": settings.batch_size, "threads": settings.threads, "lr": loop.settings.lr, "lora_r": loop.settings.lora_r,
        "instructions": [[s.instruction for s in batch] for batch in batches],
    }  # fmt: skip
    (work / "job.json").write_text(json.dumps(job))
    n = str(settings.threads)
    with subprocess.Popen(
        [settings.peer_python, PEER, settings.peer_repo, work], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        stderr=open(work / "peer.log", "w"), env={**os.environ, "OMP_NUM_THREADS": n, "MKL_NUM_THREADS": n},
    ) as peer:  # fmt: skip
        try:
            yield peer
        except BrokenPipeError as error:
            raise problem(f"the peer ended: {(work / 'peer.log').read_text()[-2000:]}", "one that runs",
                          "install what it lacks into its environment") from error  # fmt: skip
        finally:
            peer.kill()


def measure(settings: Settings, loop: sft.Loop, batches: list[list[Sample]], peer: Any) -> dict[str, Any]:
    """Both sides in turns; the first step of each warms up."""
    theirs = _line(peer)["trains"]
    ours: dict[str, list[float]] = {"cpu_s": [], "wall_s": []}
    them: dict[str, list[float]] = {"cpu_s": [], "wall_s": []}
    apart = 0.0
    for k in range(len(batches)):
        cpu, wall = time.process_time(), time.perf_counter()
        row = loop._optimizer_step(settings.batch_size)
        ours["cpu_s"].append(time.process_time() - cpu)
        ours["wall_s"].append(time.perf_counter() - wall)
        print(k, file=peer.stdin, flush=True)
        answer = _line(peer)
        for name, values in them.items():
            values.append(answer[name])
        apart = max(apart, abs(row["loss"] - answer["loss"]))
        assert apart <= settings.tolerance, f"step {k}: loss {row['loss']} here, {answer['loss']} there"
    model, head = loop.policy.backbone.model, loop.policy.backbone.model.get_output_embeddings()
    trains, total = parameter_counts(model)
    assert trains <= theirs  # there, layers that are never run have LoRA too
    found: dict[str, Any] = {"loss_largest_difference": apart, "parameters": total, "trainable": trains, "trainable_theirs": theirs,
                             "head_share": round(head.weight.numel() / total, 3)}  # fmt: skip
    for name in ("cpu_s", "wall_s"):
        a, b = (statistics.median(side[name][1:]) for side in (ours, them))
        found |= {
            f"ours_per_{name}": round(settings.batch_size / a, 3),
            f"theirs_per_{name}": round(settings.batch_size / b, 3),
        }
        found[f"ratio_{name}"] = round(b / a, 2)
    return found


def _line(peer: Any) -> dict[str, Any]:
    line = peer.stdout.readline()
    if not line:
        raise BrokenPipeError("no answer")
    return json.loads(line)


def write_model(folder: Path, settings: Settings) -> None:
    """A random checkpoint in the published layout; its vision transformers are as wide as its language model, and half as
    deep."""
    from vla.openvla.checkpoint import model_shapes, read_config

    tiny = importlib.import_module("tests.openvla_tiny")
    tiny.write_checkpoint(folder)
    path = folder / "config.json"
    config, side, depth = json.loads(path.read_text()), settings.hidden, max(2, settings.layers // 2)
    heads = {"num_attention_heads": side // 64, "num_key_value_heads": side // 64}
    config["text_config"] |= {
        "hidden_size": side,
        "intermediate_size": side * 43 // 16,
        "num_hidden_layers": settings.layers,
    } | heads
    config["timm_model_args"] = [{"embed_dim": side // 2, "depth": depth, "num_heads": side // 128}] * 2
    if settings.vocabulary == "scaled":
        n = _drop_unused(folder / "tokenizer.json")
        config["pad_token_id"] = config["text_config"]["pad_token_id"] = n
        config["text_config"]["vocab_size"] = n + config["pad_to_multiple_of"]
        words = json.loads((folder / "tokenizer_config.json").read_text())
        words["added_tokens_decoder"] = {
            str(n) if v["content"] == "<PAD>" else k: v for k, v in words["added_tokens_decoder"].items()
        }
        (folder / "tokenizer_config.json").write_text(json.dumps(words))
    path.write_text(json.dumps(config))
    for shard in folder.glob("*.safetensors*"):
        shard.unlink()
    tensors = {
        n: torch.from_numpy(tiny.fill(n, shape).astype(np.float32))
        for n, shape in model_shapes(read_config(folder)).items()
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def _drop_unused(path: Path) -> int:
    """Without the words that no prompt uses; the others move up, in their order. The size of the vocabulary."""
    tokenizer = json.loads(path.read_text())
    vocab = tokenizer["model"]["vocab"]
    kept = sorted((word for word in vocab if not word.startswith("<filler_")), key=vocab.__getitem__)
    tokenizer["model"]["vocab"] = {word: i for i, word in enumerate(kept)}
    for token in tokenizer["added_tokens"]:
        token["id"] = len(kept) if token["content"] == "<PAD>" else token["id"]
    path.write_text(json.dumps(tokenizer))
    return len(kept)


def write_data(folder: Path, settings: Settings) -> None:
    """Frames of 224 px, so that neither side resizes, with actions of seven numbers."""
    rng, tiny = np.random.default_rng(0), importlib.import_module("tests.openvla_tiny")
    writer = LeRobotWriter(folder, 10, {"image": (224, 224)}, ("s",), NAMES, "made", image_mode="image")
    for e in range(4):
        steps = []
        for k in range(settings.batch_size * (settings.steps + 1) // 4 + 1):
            frame = np.kron(rng.integers(0, 256, (14, 14, 3)), np.ones((16, 16, 1))).astype(np.uint8)
            actions = np.clip(rng.normal(0, 0.4, 7), -1, 1).astype(np.float32)
            seen = Observation({"image": frame}, np.zeros(1, np.float32), tiny.INSTRUCTIONS[e])
            steps.append(Step(seen, actions, success=k == 0))
        writer.add_episode(Episode(steps, tiny.INSTRUCTIONS[e], "made", success=True))
    writer.finalize()


if __name__ == "__main__":
    print(json.dumps(run(tyro.cli(Settings)), indent=2))
