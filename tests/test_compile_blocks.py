"""`--compile`: all graphs are made in the first step, whatever the lengths of later batches, and give eager mode's figures."""

import dataclasses
import functools
import hashlib

import numpy as np
import pytest
import torch
from safetensors import safe_open
from torch import nn
from torch._dynamo.utils import counters
from training import fake_dataset, sft_settings, tiny_backbone

from vla.compile_blocks import compile_blocks
from vla.files import read_jsonl
from vla.finetune import sft, sft_model
from vla.finetune.sft_setup import observation_of
from vla.policy import load_policy
from vla.types import VlaError


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("compile")
    fake_dataset(folder)
    for family in ("smolvlm", "llava"):
        tiny_backbone(folder, family)
    return folder


def test_a_model_without_blocks_is_refused():
    with pytest.raises(VlaError, match="--compile with Linear, which has no transformer blocks"):
        compile_blocks(nn.Linear(2, 2))


def losses(run) -> np.ndarray:
    rows = read_jsonl(run / "metrics.jsonl")
    return np.array([row[key] for row in rows for key in ("loss", "holdout_loss") if key in row])


def weights(policy) -> bytes:
    return hashlib.sha256((policy / "adapter" / "adapter_model.safetensors").read_bytes()).digest()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "backend", "checkpointing"),
    [("smolvlm", "aot_eager", False), ("smolvlm", "aot_eager", True), ("llava", "inductor", True)],
)
def test_trains_as_eager_mode_does_and_goes_on_after_a_stop(folder, monkeypatch, family, backend, checkpointing):
    """aot_eager traces as inductor does and runs PyTorch's own kernels; inductor makes C++ of it, which takes a minute."""
    monkeypatch.setattr(sft_model, "compile_blocks", functools.partial(compile_blocks, backend=backend))
    torch._dynamo.reset()
    counters.clear()
    here = folder / f"{family}-{backend}-{checkpointing}"
    base = sft_settings(folder, backbone=str(folder / family), out=here / "eager", lora_parts=("all",), image_size_px=64,
                        gradient_checkpointing=checkpointing)  # fmt: skip
    sft.run(base)
    assert not counters["stats"]
    lengths, graphs, pass_through = set(), [], sft.Batches.loss

    def loss(self, samples, *rest, **more):
        graphs.append(counters["stats"]["unique_graphs"])
        lengths.add(self.policy.encode([observation_of(s) for s in samples])["input_ids"].shape[1])
        return pass_through(self, samples, *rest, **more)

    monkeypatch.setattr(sft.Batches, "loss", loss)
    policy = sft.run(dataclasses.replace(base, out=here / "whole", compile=True))
    assert len(lengths) > 1, "batches of one length would prove nothing"
    made = counters["stats"]["unique_graphs"]
    assert graphs[0] == 0 and set(graphs[1:]) == {made}, "later steps compile nothing"
    if family == "smolvlm":
        assert made == 2, "the block of the vision tower and those of the language model"
    np.testing.assert_allclose(losses(here / "whole"), losses(here / "eager"), atol=1e-4)
    with safe_open(policy / "adapter" / "adapter_model.safetensors", "pt") as file:
        assert not [name for name in file.keys() if "_orig_mod" in name]  # noqa: SIM118
    load_policy(policy)

    class Stopped(Exception):
        pass

    def stop(self, batch, step=sft.Loop._optimizer_step):
        if self.step == 3:
            raise Stopped
        return step(self, batch)

    with monkeypatch.context() as patch:
        patch.setattr(sft.Loop, "_optimizer_step", stop)
        with pytest.raises(Stopped):
            sft.run(dataclasses.replace(base, out=here / "parts", compile=True))
    again = sft.run(dataclasses.replace(base, out=here / "parts", compile=True, resume=True))
    assert weights(again) == weights(policy)


@pytest.mark.slow
def test_the_dry_run_of_a_compiled_model_estimates_its_memory(folder, capsys):
    sft.run(sft_settings(folder, out=folder / "dry", compile=True, dry_run=True))
    assert "peak of a training step" in capsys.readouterr().out
