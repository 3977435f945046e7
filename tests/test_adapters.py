"""What trains with each method, what does not, and that a saved policy acts as the one that was trained."""

import importlib.util

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from families import FAMILIES
from peft.utils.other import TrainableTokensWrapper
from PIL import Image
from torch import nn
from training import fake_dataset, sft_settings, tiny_backbone

from vla.adapters import attach_lora, chosen_parts, lora_targets, parameter_counts, part_of, place_actions, train_parts
from vla.backbone import Backbone, load_backbone
from vla.files import read_jsonl
from vla.finetune import sft
from vla.finetune.checkpoint import trainable
from vla.finetune.optimizers import make_optimizer
from vla.finetune.sft_setup import build_policy, observation_of, open_datasets
from vla.gradient_checkpoint import checkpoint_layers
from vla.kbit import is_packed, packed_bytes, quantize_linears
from vla.memory import held_bytes
from vla.policy import load_policy
from vla.types import VlaError

HAS_BNB = importlib.util.find_spec("bitsandbytes") is not None
needs_bnb = pytest.mark.skipif(not HAS_BNB, reason="bitsandbytes, extra [bnb], is not installed")
METHODS = ["lora", pytest.param("qlora", marks=needs_bnb), "dora", "rslora", "full"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters")
    fake_dataset(folder)
    tiny_backbone(folder)
    return folder


@pytest.fixture(scope="module", params=["llava", "paligemma"])
def source(request, tmp_path_factory) -> str:
    """LLaVA's output head is its own, PaliGemma's is its embedding, which it scales."""
    folder = tmp_path_factory.mktemp(request.param)
    FAMILIES[request.param](folder)
    return str(folder)


def loop_of(settings: sft.Settings) -> sft.Loop:
    AcceleratorState._reset_state()
    accelerator = Accelerator(cpu=True)
    dataset, statistics = open_datasets(settings)
    torch.manual_seed(settings.seed)
    settings.out.mkdir(parents=True)
    return sft.Loop(settings, accelerator, dataset, build_policy(settings, dataset, statistics, "cpu"))


def state_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("method", METHODS)
def test_each_method_learns_leaves_the_rest_alone_and_loads_as_it_was(folder, method):
    settings = sft_settings(
        folder, out=folder / method, method=method, steps=24, lr=2e-3 if method == "full" else 1e-2, warmup_steps=0,
        batch_size=8, schedule="constant", eval_every_steps=24, save_every_steps=24, loss_over="actions",
    )  # fmt: skip
    loop = loop_of(settings)
    model = loop.policy.backbone.model
    before, trains = state_of(model), {name for name, _ in trainable(model)}
    loop.train()
    target = loop.finish()
    losses = [row["loss"] for row in read_jsonl(settings.out / "metrics.jsonl") if "loss" in row]
    assert all(torch.isfinite(torch.tensor(losses))) and sum(losses[-4:]) < 0.9 * sum(losses[:4])
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) != (name in trains), name
    again = load_policy(target)
    seen = [observation_of(loop.dataset[i]) for i in range(3)]
    ids = loop.policy.action_token_ids(loop.dataset[0].actions[None].repeat(3, 0), "fake")
    with torch.no_grad():  # bitsandbytes has another kernel where gradients are wanted
        logits = [p.backbone.action_logits(p.encode(seen), ids) for p in (loop.policy, again)]
    assert torch.equal(*logits)
    assert [a.token_ids.tolist() for a in loop.policy.act(seen)] == [b.token_ids.tolist() for b in again.act(seen)]
    assert again.spec.backbone.weights == ("merged" if method == "full" else "adapter")
    assert again.quantization == ("bitsandbytes-nf4" if method == "qlora" else "none")


@pytest.mark.parametrize("method", METHODS)
def test_what_trains(source, method):
    backbone, ids = prepared(source, method)
    names = {name for name, _ in trainable(backbone.model)}
    assert names and all(p.dtype == torch.float32 for _, p in trainable(backbone.model))
    if method == "full":
        assert {part_of(name) for name in names} == {"llm", "projector"}
        assert any("embed_tokens" in name for name in names)
        return
    kinds = ("lora_A", "lora_B", "trainable_tokens_delta") + ("lora_magnitude_vector",) * (method == "dora")
    assert {kind for kind in kinds if any(kind in name for name in names)} == set(kinds)
    assert all(any(kind in name for kind in kinds) for name in names)
    rows = [p for name, p in trainable(backbone.model) if "trainable_tokens_delta" in name]
    assert all(len(row) == len(ids) for row in rows), "only the new ids train, not the vocabulary"
    layer = next(m for name, m in backbone.model.named_modules() if name.endswith("q_proj") and "language" in name)
    assert layer.scaling["default"] == pytest.approx(8 / 4**0.5 if method == "rslora" else 8 / 4)


@needs_bnb
def test_qlora_packs_linear_layers_and_nothing_else(source):
    whole, packed = prepared(source, "lora")[0].model, prepared(source, "qlora")[0].model
    weights = {name: p for name, p in packed.named_parameters() if is_packed(p)}
    linear = {name for name, m in load_backbone(source).model.named_modules() if type(m) is nn.Linear}
    assert len(weights) == len(linear - {"lm_head"}) and all("lm_head" not in name for name in weights)
    assert all(p.dtype == torch.uint8 for p in weights.values())
    assert all(p.dtype == torch.float32 for p in packed.parameters() if not is_packed(p))
    assert parameter_counts(packed) == parameter_counts(whole)
    assert held_bytes(packed) < 0.75 * held_bytes(whole)
    for weight in weights.values():
        assert weight.quant_state.nested and weight.quant_state.quant_type == "nf4"
        assert packed_bytes(weight.quant_state.shape.numel())[0] == weight.numel()


@needs_bnb
def test_an_adapter_on_a_packed_base_can_be_put_on_the_full_one(folder):
    settings = sft_settings(folder, out=folder / "whole", method="qlora", steps=2)
    target = sft.run(settings)
    assert any(is_packed(p) for p in load_policy(target).backbone.model.parameters())
    assert not any(is_packed(p) for p in load_policy(target, full_base=True).backbone.model.parameters())


def test_without_bitsandbytes_the_error_names_the_extra(folder, monkeypatch):
    monkeypatch.setattr("vla.kbit.importlib.util.find_spec", lambda name: None)
    with pytest.raises(VlaError, match=r"method qlora without bitsandbytes.*pip install 'vla-toolkit\[bnb\]'"):
        sft.run(sft_settings(folder, out=folder / "none", method="qlora"))
    with pytest.raises(VlaError, match=r"optimizer paged_adamw8bit without bitsandbytes"):
        make_optimizer("paged_adamw8bit", [nn.Parameter(torch.zeros(2))], 1e-3, 0.0)
    assert not (folder / "none").exists()


def test_parts_can_be_chosen(source):
    model = load_backbone(source).model
    assert chosen_parts(["all"]) == ("llm", "projector", "vision")
    assert set(lora_targets(model, ["all"])) == {
        name for part in ("llm", "projector", "vision") for name in lora_targets(model, [part])
    }
    with pytest.raises(VlaError, match="some of llm, projector, vision, or all"):
        chosen_parts(["head"])
    with pytest.raises(VlaError, match="llm among them: it holds the action tokens"):
        train_parts(load_backbone(source), ["vision"])


def test_full_training_of_folded_convolutions_takes_the_weights_that_train():
    backbone = load_backbone("tiny")
    place_actions(backbone, "added", 8)
    train_parts(backbone, ["all"])
    inputs = backbone.encode(["a"], [[Image.new("RGB", (160, 160), (9, 99, 200))]])
    ids = torch.tensor([[5, 6]])
    with torch.no_grad():
        before = backbone.action_logits(inputs, ids)
        for name, parameter in backbone.model.named_parameters():
            if part_of(name) == "vision" and parameter.ndim == 4:
                parameter.mul_(1.5)
        assert not torch.equal(before, backbone.action_logits(inputs, ids))


@needs_bnb
@pytest.mark.parametrize("optimizer", ["adamw8bit", "paged_adamw8bit"])
def test_8bit_optimizers_resume_exactly(folder, optimizer):
    common = {"method": "full", "optimizer": optimizer, "steps": 4, "lr": 1e-3, "save_every_steps": 2}
    straight = loop_of(sft_settings(folder, out=folder / f"{optimizer}-4", **common))
    straight.train()
    first = loop_of(sft_settings(folder, out=folder / f"{optimizer}-2", **common))
    first._optimizer_step(4)
    first._optimizer_step(4)
    first._save()
    second = resumed(sft_settings(folder, out=folder / f"{optimizer}-2", resume=True, **common))
    second.train()
    moments = [s for s in second.optimizer.optimizer.state.values() if s["state1"].dtype == torch.uint8]
    assert second.step == 4 and moments and all(type(s["step"]) is int and s["step"] == 4 for s in moments)
    for (name, mine), (_, theirs) in zip(
        trainable(second.policy.backbone.model), trainable(straight.policy.backbone.model), strict=True
    ):
        assert torch.equal(mine, theirs), name


def test_only_the_legal_rows_of_the_head_are_computed(source):
    for method in ("lora", "full"):
        backbone, ids = prepared(source, method)
        inputs, targets = batch(backbone, ids)
        legal = torch.tensor(sorted(ids))
        found = {}
        for only in (None, legal):
            backbone.model.zero_grad(set_to_none=True)
            logits = backbone.action_logits(inputs, targets, only_ids=only)
            logits = logits[..., legal] if only is None else logits
            assert logits.shape == (2, 7, len(legal))
            loss = nn.functional.cross_entropy(logits.flatten(0, 1), torch.searchsorted(legal, targets).flatten())
            loss.backward()
            found[only is None] = (loss.detach(), {n: p.grad for n, p in trainable(backbone.model)})
        torch.testing.assert_close(found[True][0], found[False][0], atol=1e-6, rtol=0)
        for name, gradient in found[True][1].items():
            torch.testing.assert_close(gradient, found[False][1][name], atol=1e-6, rtol=1e-4, msg=name)
        assert backbone.action_logits(inputs, targets).shape[-1] == backbone.n_embeddings  # as before, outside


def test_trained_rows_without_copies_of_the_vocabulary_equal_pefts(source):
    backbone, ids = prepared(source, "lora")
    inputs, targets = batch(backbone, ids)
    wrappers = [m for m in backbone.model.modules() if isinstance(m, TrainableTokensWrapper)]
    found = {}
    for lean in (True, False):
        if not lean:
            for wrapper in wrappers:
                del wrapper.__dict__["forward"]
        backbone.model.zero_grad(set_to_none=True)
        logits = backbone.action_logits(inputs, targets)
        logits.sum().backward()
        found[lean] = (logits.detach(), {n: p.grad for n, p in trainable(backbone.model)})
    assert len(wrappers) == 2
    torch.testing.assert_close(found[True][0], found[False][0], atol=1e-5, rtol=1e-5)
    for name, gradient in found[True][1].items():
        torch.testing.assert_close(gradient, found[False][1][name], atol=1e-4, rtol=1e-4, msg=name)


def test_switched_off_adapters_leave_the_old_rows(source):
    backbone, ids = prepared(source, "lora")
    inputs, targets = batch(backbone, ids)
    with torch.no_grad():
        on = backbone.action_logits(inputs, targets)
        with backbone.model.disable_adapter():
            off = backbone.action_logits(inputs, targets)
        fresh = load_backbone(source)
        place_actions(fresh, "added", len(ids))
        stored = [*range(400), *ids]  # rows between them, which PaliGemma's tokenizer asks for, are drawn at each load
        torch.testing.assert_close(off[..., stored], fresh.action_logits(inputs, targets)[..., stored])
    assert not torch.equal(on, off)


def test_checkpointing_changes_memory_and_nothing_else(source):
    found = []
    for checkpointed in (False, True):
        torch.manual_seed(1)
        backbone, ids = prepared(source, "lora")
        assert not checkpointed or checkpoint_layers(backbone.model) >= 3
        inputs, targets = batch(backbone, ids)
        logits = backbone.action_logits(inputs, targets)
        logits.sum().backward()
        generated = backbone.model.generate(**inputs, max_new_tokens=5, min_new_tokens=5, do_sample=False)
        found.append((logits.detach(), {n: p.grad for n, p in trainable(backbone.model)}, generated))
    assert torch.equal(found[0][0], found[1][0]) and torch.equal(found[0][2], found[1][2])
    for name, gradient in found[0][1].items():
        torch.testing.assert_close(gradient, found[1][1][name], atol=1e-6, rtol=1e-5, msg=name)


@pytest.mark.slow
def test_a_compiled_model_gives_the_same(source):
    """Traced by torch.compile but run by PyTorch itself, whose numbers are then the same."""
    backbone, ids = prepared(source, "lora")
    inputs, targets = batch(backbone, ids)
    legal = torch.tensor(sorted(ids))
    plain = backbone.action_logits(inputs, targets, only_ids=legal)
    backbone.model.compile(backend="eager")
    for _ in range(3):
        compiled = backbone.action_logits(inputs, targets, only_ids=legal)
        compiled.sum().backward()
        torch.testing.assert_close(compiled, plain)


def test_checkpointing_needs_blocks():
    with pytest.raises(VlaError, match="no transformer blocks"):
        checkpoint_layers(nn.Linear(2, 2))


def prepared(source: str, method: str) -> tuple[Backbone, tuple[int, ...]]:
    backbone = load_backbone(source)
    placed, _ = place_actions(backbone, "added", 16)
    if method == "full":
        train_parts(backbone, ["llm", "projector"])
        return backbone, tuple(placed.ids)
    if method == "qlora":
        quantize_linears(backbone.model, torch.float32)
    attach_lora(backbone, r=4, alpha=8, dropout=0.0, parts=["llm", "projector"], train_ids=placed.ids, method=method)  # pyright: ignore[reportArgumentType]
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for _, parameter in trainable(backbone.model):
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return backbone, tuple(placed.ids)


def batch(backbone: Backbone, ids: tuple[int, ...]) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    inputs = backbone.encode(["open", "close the window"], [[Image.new("RGB", (32, 32), (9, 99, 200))]] * 2)
    return inputs, torch.tensor(ids)[torch.arange(14).view(2, 7) % len(ids)]


def resumed(settings: sft.Settings) -> sft.Loop:
    AcceleratorState._reset_state()
    dataset, statistics = open_datasets(settings)
    torch.manual_seed(settings.seed)
    return sft.Loop(settings, Accelerator(cpu=True), dataset, build_policy(settings, dataset, statistics, "cpu"))
