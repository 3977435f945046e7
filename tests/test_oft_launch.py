"""OpenVLA-OFT's head in several processes: it is within the model that is called, so its gradients are averaged, and its
weights sharded, like all others."""

import openvla_tiny as tiny
import pytest
import torch
from safetensors.torch import load_file
from test_oft_train import OFT, losses, settings_of
from test_sft_launch import run_two, same_files
from training import fake_dataset

from vla.finetune import sft
from vla.policy import load_policy

MORE = {
    "steps": 3,
    "lr": 1e-3,
    "eval_every_steps": 3,
    "film": True,
    "lora_parts": ("all-linear",),
    "free_running_samples": 0,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("oft launch")
    fake_dataset(folder)
    tiny.write_checkpoint(folder / "openvla")
    sft.run(settings_of(folder, folder / "alone", **MORE, batch_size=4))
    return folder


@pytest.mark.parametrize("how", ["ddp", "fsdp2"])
def test_two_processes_train_what_one_trains(folder, how):
    run_two(folder, how, {"out": how, "changes": {**OFT, **MORE, "family": "openvla", "batch_size": 2}})
    assert losses(folder / how) == pytest.approx(losses(folder / "alone"), rel=1e-3)
    for file in ("action_head", "proprio_projector", "film"):
        one, two = (load_file(folder / run / "policy" / "head" / f"{file}.safetensors") for run in ("alone", how))
        assert one.keys() == two.keys()
        for name in one:
            if "blocks.2." not in name:  # the last block, which nothing runs
                torch.testing.assert_close(two[name], one[name], atol=1e-3, rtol=0)
    same_files(folder / "alone" / "policy" / "adapter", folder / how / "policy" / "adapter", 1e-3)
    spec = load_policy(folder / how / "policy").spec
    assert spec.head is not None and spec.head.film
