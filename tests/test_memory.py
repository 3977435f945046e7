"""The estimate of a training step's memory, against what PyTorch's allocator gave out in the step."""

import dataclasses
import importlib.util

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from families import HIDDEN
from torch import nn
from training import fake_dataset, sft_settings, tiny_backbone

from vla.finetune import sft
from vla.finetune.optimizers import make_optimizer, state_bytes
from vla.finetune.sft_batch import Batches
from vla.finetune.sft_memory import estimate_step, remedies
from vla.finetune.sft_model import autocast_of, out_of_memory, ready_model
from vla.finetune.sft_setup import build_policy, open_datasets
from vla.kbit import quantize_linears
from vla.memory import estimate, held_bytes, measured_peak, static_parts, trained_sizes
from vla.memory_probe import Allocations
from vla.memory_shapes import openvla_7b, openvla_batch
from vla.types import VlaError

HAS_BNB = importlib.util.find_spec("bitsandbytes") is not None
needs_bnb = pytest.mark.skipif(not HAS_BNB, reason="bitsandbytes, extra [bnb], is not installed")
FULL_8BIT = {"method": "full", "gradient_checkpointing": True, "optimizer": "adamw8bit"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("memory")
    fake_dataset(folder)
    for family in ("llava", "paligemma"):
        tiny_backbone(folder, family)
    return folder


def built(settings: sft.Settings) -> tuple:
    dataset, statistics = open_datasets(settings)
    torch.manual_seed(0)
    policy = build_policy(settings, dataset, statistics, "cpu")
    ready_model(settings, policy.backbone.model)
    return dataset, policy


def measured(settings: sft.Settings, dataset, policy) -> int:
    """Bytes at the peak of two optimiser steps of the real loop."""
    AcceleratorState._reset_state()
    accelerator = Accelerator(mixed_precision=autocast_of(settings, "cpu"), cpu=True)
    loop = sft.Loop(dataclasses.replace(settings, gradient_checkpointing=False), accelerator, dataset, policy)
    size = settings.batch_size * settings.grad_accumulation
    return measured_peak(policy.backbone.model, lambda: [loop._optimizer_step(size) for _ in range(2)])


@pytest.mark.parametrize("family", ["llava", "paligemma"])
@pytest.mark.parametrize(
    "changes",
    [
        {"batch_size": 1},
        {"batch_size": 4},
        {"batch_size": 1, "gradient_checkpointing": True},
        {"batch_size": 4, "gradient_checkpointing": True},
        {"batch_size": 4, "loss_over": "actions"},
        {"batch_size": 1, "method": "full"},
        {"batch_size": 4, "method": "full"},
        {"batch_size": 2, "grad_accumulation": 2, "method": "full"},
        pytest.param({"batch_size": 4, **FULL_8BIT}, marks=needs_bnb),
        pytest.param({"batch_size": 4, "method": "qlora"}, marks=needs_bnb),
        {"batch_size": 4, "method": "dora"},
        {"batch_size": 4, "precision": "bf16"},
    ],
    ids=lambda changes: " ".join(f"{key}={value}" for key, value in changes.items()),
)
def test_estimate_is_within_15_percent_of_the_measured_peak(folder, family, changes):
    settings = sft_settings(folder, out=folder / "none", backbone=str(folder / family), steps=2, **changes)
    dataset, policy = built(settings)
    before = [p.data_ptr() for p in policy.backbone.model.parameters()]
    estimated = estimate_step(settings, dataset, policy)
    assert before == [p.data_ptr() for p in policy.backbone.model.parameters()]
    assert all(p.grad is None for p in policy.backbone.model.parameters())
    real = measured(settings, dataset, policy)
    assert abs(estimated.peak_bytes / real - 1) < 0.15, f"{estimated.table()}\nmeasured {real / 1e6:.2f} MB"


@pytest.mark.parametrize("family", ["qwen2_5_vl", "smolvlm", "paligemma"])
@pytest.mark.parametrize(
    "changes", [{}, {"precision": "bf16", "lora_parts": ("all",)}, {"method": "full"}], ids=["lora", "bf16", "full"]
)
def test_estimate_of_wider_models(folder, family, changes):
    """PaliGemma's output head is the widest here: no product with it may copy it for every row of the batch. Qwen's projector is
    the largest weight that trains: its update is the peak of `full`."""
    source = folder / "wide" / family
    if not source.exists():
        tiny_backbone(folder / "wide", family, width=4)
    settings = sft_settings(folder, out=folder / "none", backbone=str(source), image_size_px=64, steps=2, **changes)
    dataset, policy = built(settings)
    estimated = estimate_step(settings, dataset, policy)
    assert estimated.peak_bytes == pytest.approx(measured(settings, dataset, policy), rel=0.05), estimated.table()


@pytest.mark.parametrize("changes", [{}, {"method": "full"}], ids=["lora", "full"])
def test_estimate_of_the_built_in_model(folder, changes):
    settings = sft_settings(folder, out=folder / "none", backbone="tiny", image_size_px=160, steps=2, **changes)
    dataset, policy = built(settings)
    estimated = estimate_step(settings, dataset, policy)
    assert estimated.peak_bytes == pytest.approx(measured(settings, dataset, policy), rel=0.05)


def test_parts_move_with_the_settings(folder):
    def parts(**changes):
        settings = sft_settings(folder, out=folder / "none", **changes)
        dataset, policy = built(settings)
        held = held_bytes(policy.backbone.model)
        assert sum(static_parts(policy.backbone.model).values()) == pytest.approx(held, rel=0.01)
        return estimate_step(settings, dataset, policy).parts

    base = parts()
    assert base["optimizer state"] >= 2 * base["adapters or trained weights"]
    assert base["4-bit weights"] == 0
    assert parts(batch_size=8)["activations"] == pytest.approx(2 * base["activations"], rel=0.1)
    assert parts(gradient_checkpointing=True)["activations"] < 0.7 * base["activations"]
    assert parts(method="full")["frozen weights"] < 0.7 * base["frozen weights"]
    assert parts(precision="bf16")["frozen weights"] == pytest.approx(base["frozen weights"] / 2, rel=0.05)


def test_logits_of_the_whole_vocabulary_are_never_made(folder):
    """With loss_over actions, no activation or gradient of one is as wide as the vocabulary."""
    width = {}
    for over in ("actions", "vocabulary"):
        settings = sft_settings(folder, out=folder / over, loss_over=over, state=False)
        dataset, policy = built(settings)
        batches = Batches(settings, dataset, policy, policy.backbone.model)
        samples = [dataset[i] for i in range(4)]
        ids, valid = batches.targets(samples)
        n_rows = policy.backbone.n_embeddings
        widest: list[int] = []

        class Widths(Allocations):
            def count(self, tensor, label=None, found=widest):  # noqa: B006
                if tensor.ndim == 3 and tensor.shape[-1] == n_rows and tensor.shape[1] != HIDDEN:  # noqa: B023
                    found.append(tensor.shape[-2])
                super().count(tensor, label)

        with Widths(list(policy.backbone.model.parameters())):
            batches.loss(samples, ids, valid).loss.backward()
        width[over] = set(widest)
    assert width == {"actions": set(), "vocabulary": {ids.shape[1]}}, "(B, T, V) at the T action places at most"


@needs_bnb
@pytest.mark.parametrize("name", ["adamw", "adamw8bit"])
def test_optimizer_state_is_counted_to_the_byte_but_for_tables(name):
    parameters = [nn.Parameter(torch.randn(n)) for n in (10, 4095, 4096, 100_001)]
    optimizer = make_optimizer(name, parameters, 1e-3, 0.0)
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    made = sum(v.numel() * v.element_size() for s in optimizer.state.values() for v in s.values() if torch.is_tensor(v))
    assert state_bytes(name, [p.numel() for p in parameters]) == pytest.approx(made, rel=1e-3)


@needs_bnb
@pytest.mark.slow
def test_openvla_7b_fits_consumer_gpus():
    assert _peak_7b("qlora", True, "paged_adamw8bit").peak_bytes < 10e9
    lora = _peak_7b("lora", True, "adamw")
    assert lora.peak_bytes < 18e9
    n_published, n_kept = 7_541_237_184, 2 * 256 * 4096  # PEFT keeps the action rows of embedding and head as they were
    assert lora.parts["frozen weights"] == pytest.approx(2 * (n_published + n_kept), abs=4096)  # and small buffers


def test_openvla_is_estimated_without_its_weights():
    """Two of the language model's 32 layers; `python -m benchmarks.train_memory` prints the whole."""
    kept, again = (_peak_7b("lora", checkpointing, "adamw", 2) for checkpointing in (False, True))
    assert kept.parts["frozen weights"] == again.parts["frozen weights"]
    assert again.peak_bytes < 0.9 * kept.peak_bytes


def _peak_7b(method, checkpointing, optimizer, n_layers=32):
    backbone = openvla_7b(method, gradient_checkpointing=checkpointing, n_layers=n_layers)
    assert all(p.is_meta for p in backbone.model.parameters())
    inputs, ids = openvla_batch(1, torch.bfloat16)
    return estimate(
        backbone, lambda: dict(inputs), ids, only_ids=torch.arange(31744, 32000), autocast=torch.bfloat16,
        optimizer_bytes=state_bytes(optimizer, trained_sizes(backbone.model)),
    )  # fmt: skip


def test_dry_run_prints_parameters_share_and_memory(folder, capsys):
    sft.run(sft_settings(folder, out=folder / "dry", dry_run=True, gradient_checkpointing=True))
    said = capsys.readouterr().out
    assert "of which" in said and "train (" in said
    for part in (
        "frozen weights",
        "adapters or trained weights",
        "optimizer state",
        "activations",
        "peak of a training step",
    ):
        assert part in said
    assert not (folder / "dry").exists()


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"), RuntimeError("[enforce fail] not enough memory: you tried"),
     MemoryError()],
)  # fmt: skip
def test_out_of_memory_says_what_to_change_in_order_of_effect(folder, monkeypatch, error):
    assert out_of_memory(error)

    def full(*args, **kwargs):
        raise error

    monkeypatch.setattr(Batches, "loss", full)
    with pytest.raises(VlaError, match=r"out of memory at step 0; expected room for about [\d.]+ GB") as caught:
        sft.run(sft_settings(folder, out=folder / f"full-{type(error).__name__}"))
    for flags in ("--gradient-checkpointing", "--batch-size 2 --grad-accumulation 2", "--precision bf16"):
        assert flags in str(caught.value)


def test_remedies_are_sorted_and_add_up(folder):
    settings = sft_settings(folder, out=folder / "none", method="full")
    dataset, policy = built(settings)
    now = estimate_step(settings, dataset, policy).peak_bytes
    need, ways = remedies(settings, dataset, policy)
    assert need == now and [n for n, _ in ways] == sorted((n for n, _ in ways), reverse=True)
    assert {flags for _, flags in ways} >= {"--method lora", "--optimizer paged_adamw8bit", "--gradient-checkpointing"}
    assert all(0 < n < need for n, _ in ways)


def test_other_errors_pass(folder, monkeypatch):
    def broken(*args, **kwargs):
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr(Batches, "loss", broken)
    with pytest.raises(RuntimeError, match="shapes do not match"):
        sft.run(sft_settings(folder, out=folder / "broken"))


def test_float16_on_a_cpu_is_refused(folder):
    with pytest.raises(VlaError, match="precision fp16 on cpu; expected a GPU"):
        sft.run(sft_settings(folder, out=folder / "half", precision="fp16"))


@needs_bnb
def test_packed_layers_need_no_weights_to_be_counted():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.head = nn.Linear(64, 128), nn.Linear(128, 10)

        def get_output_embeddings(self):
            return self.head

    with torch.device("meta"):
        shapes = Model()
    quantize_linears(shapes, torch.float32)
    real = Model()
    quantize_linears(real, torch.float32)
    assert sum(static_parts(shapes).values()) == pytest.approx(held_bytes(real), rel=0.01)
