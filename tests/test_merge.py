"""Merging shard by shard: equal to PEFT's own merge, resumable, checked, and opened by stock transformers."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from families import FAMILIES
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_policy import PROMPT, STATISTICS, make, observations

from vla import merge
from vla.backbone import TINY_PATH, load_backbone
from vla.merge_weights import Plan, add_adapter, open_base
from vla.new_policy import create_policy
from vla.policy import load_policy
from vla.spec import ActionSpec, ImageSpec, read_spec
from vla.tokenizers.uniform import UniformTokenizer
from vla.types import VlaError
from vla.weight_files import INDEX, Entry, read_headers, read_tensor, write_tensors

ALL = ("llm", "projector", "vision")


def stir(model, seed=1, scale=0.1) -> None:
    """A fresh adapter is zero: make it matter."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * scale)


def merged_by_peft(folder: Path) -> dict[str, torch.Tensor]:
    return load_policy(folder, full_base=True).backbone.model.merge_and_unload().state_dict()


def reloaded(folder: Path) -> dict[str, torch.Tensor]:
    return load_backbone(str(folder / "model"), processor_path=folder / "processor").model.state_dict()


def assert_same(mine: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor], atol: float = 1e-6) -> None:
    assert mine.keys() == theirs.keys()
    for name, tensor in theirs.items():
        torch.testing.assert_close(mine[name], tensor, atol=atol, rtol=0, msg=lambda text, name=name: f"{name}: {text}")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("merge")
    policy = make(folder / "base", "llava", lora_parts=ALL)
    policy.save(folder / "policy", stage="finetune", settings={})
    return policy, folder


@pytest.mark.parametrize("family", [*sorted(FAMILIES), "tiny"])
@pytest.mark.parametrize("method", ["lora", "dora", "rslora"])
def test_every_family_and_method_equals_peft(tmp_path, family, method, monkeypatch):
    if family == "tiny":  # batch norms that are folded when it is loaded, a tied head, and number rows
        policy = create_policy(
            "tiny", name="toy", action=ActionSpec(("a", "b"), 3), image=ImageSpec(("cam",), 64), prompt=PROMPT,
            statistics=STATISTICS, unnorm_key="toy", tokenizer=UniformTokenizer(64), lora_r=4, lora_parts=ALL,
            added_init="numbers", method=method,
        )  # fmt: skip
        stir(policy.backbone.model, scale=0.01)
    else:
        policy = make(tmp_path / "base", family, lora_parts=ALL, method=method)
    policy.save(tmp_path / "policy", stage="finetune", settings={})
    monkeypatch.setattr(merge, "_check", lambda *_: {})  # of its own test
    out = merge.run(merge.Settings(tmp_path / "policy", tmp_path / "merged"))
    mine, theirs = reloaded(out), merged_by_peft(tmp_path / "policy")
    if (
        family == "paligemma"
    ):  # its processor knows more tokens than the checkpoint has rows; those are random at each load
        first = read_spec(out).tokens.placement["first_id"]
        for state in (mine, theirs):
            for name in ("model.language_model.embed_tokens.weight", "lm_head.weight"):
                state[name] = torch.cat([state[name][:400], state[name][first:]])
    assert_same(mine, theirs)
    source = TINY_PATH if family == "tiny" else tmp_path / "base"
    assert {n for f in read_headers(out / "model").values() for n in f} == {
        n for f in read_headers(source).values() for n in f
    }
    spec = read_spec(out)
    assert (spec.backbone.weights, spec.provenance[-1]["stage"], spec.provenance[0]["stage"]) == (
        "merged",
        "merge",
        "finetune",
    )


def adapted(tmp_path, **options) -> Plan:
    """A bare PEFT adapter on llava, as another program may have made it, and the plan of its merge."""
    FAMILIES["llava"](tmp_path / "base")
    torch.manual_seed(0)
    backbone = load_backbone(str(tmp_path / "base"))
    model = get_peft_model(backbone.model, LoraConfig(**options))
    stir(model)
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    plan = open_base(tmp_path / "base", "llava")
    add_adapter(plan, tmp_path / "adapter")
    (tmp_path / "out").mkdir()
    plan.write("model.safetensors", tmp_path / "out" / "model.safetensors", None, lambda n: None)
    for name in ("config.json", "generation_config.json"):
        shutil.copy(tmp_path / "base" / name, tmp_path / "out" / name)
    assert_same(load_backbone(str(tmp_path / "out"), processor_path=tmp_path / "base").model.state_dict(), model.merge_and_unload().state_dict())  # fmt: skip
    return plan


Q = ["q_proj", "fc1"]


@pytest.mark.parametrize(
    "options",
    [
        {"r": 4, "target_modules": Q, "modules_to_save": ["linear_1", "lm_head"]},
        {"r": 4, "target_modules": Q, "bias": "all"},
        {"r": 4, "target_modules": ["fc1", "linear_2"], "lora_bias": True},
        {"r": 4, "target_modules": ["embed_tokens", "lm_head", "q_proj"], "use_rslora": True},
        {"r": 4, "target_modules": ["patch_embedding", "down_proj"], "alpha_pattern": {"down_proj": 64}, "rank_pattern": {"down_proj": 2}},
        {"r": 4, "target_modules": Q, "trainable_token_indices": {"embed_tokens": [3, 5], "lm_head": [7]}},
        {"r": 4, "target_modules": "all-linear", "use_dora": True},
    ],
)  # fmt: skip
def test_whatever_else_a_lora_holds(tmp_path, options):
    assert adapted(tmp_path, **options).n_modules > 0


def test_a_sharded_base_is_read_shard_by_shard_and_resumed(saved, tmp_path, monkeypatch):
    _, folder = saved
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    base = load_backbone(str(tmp_path / "base")).model
    (tmp_path / "base" / "model.safetensors").unlink()
    base.save_pretrained(tmp_path / "base", max_shard_size="100KB")
    files = sorted(read_headers(tmp_path / "base"))
    assert len(files) > 3
    spec = json.loads((tmp_path / "policy" / "policy.json").read_text())
    spec["backbone"]["source"] = str(tmp_path / "base")
    (tmp_path / "policy" / "policy.json").write_text(json.dumps(spec))
    written: list[str] = []
    write = Plan.write

    def dying(self, file, *rest):
        if len(written) == 2 and not (tmp_path / "revived").exists():
            raise KeyboardInterrupt
        written.append(file)
        return write(self, file, *rest)

    monkeypatch.setattr(Plan, "write", dying)
    settings = merge.Settings(tmp_path / "policy", tmp_path / "merged", check=False)
    with pytest.raises(KeyboardInterrupt):
        merge.run(settings)
    assert (
        not (tmp_path / "merged").exists()
        and len(list((tmp_path / ".merged.merging/model").glob("*.safetensors"))) == 2
    )
    (tmp_path / "revived").touch()
    merge.run(settings)
    assert sorted(written) == files, "each file was written once"
    assert not (tmp_path / ".merged.merging").exists() and not (tmp_path / "merged" / "merge.json").exists()
    assert sorted(read_headers(tmp_path / "merged" / "model")) == files
    assert_same(reloaded(tmp_path / "merged"), merged_by_peft(tmp_path / "policy"))
    index = json.loads((tmp_path / "merged" / "model" / INDEX).read_text())
    assert index["metadata"]["total_size"] == sum(e.n_bytes for f in read_headers(tmp_path / "merged/model").values() for e in f.values())  # fmt: skip


def test_files_of_another_merge_are_not_taken_over(saved, tmp_path):
    _, folder = saved
    shutil.copytree(folder / "policy", tmp_path / "policy")
    stale = tmp_path / ".merged.merging" / "model"
    stale.mkdir(parents=True)
    (stale / "model.safetensors").write_bytes(b"of another merge")
    (stale.parent / "merge.json").write_text('{"merge": "another"}')
    merge.run(merge.Settings(tmp_path / "policy", tmp_path / "merged", check=False))
    assert_same(reloaded(tmp_path / "merged"), merged_by_peft(tmp_path / "policy"))


@pytest.mark.parametrize("dtype", ["bf16", "float16"])
def test_chosen_dtype(saved, tmp_path, dtype, capsys):
    _, folder = saved
    out = merge.run(merge.Settings(folder / "policy", tmp_path / "merged", dtype=dtype))
    kind = {"bf16": torch.bfloat16, "float16": torch.float16}[dtype]
    assert {e.dtype for f in read_headers(out / "model").values() for e in f.values()} == {kind}
    exact = merged_by_peft(folder / "policy")
    for name, tensor in reloaded(out).items():
        torch.testing.assert_close(tensor, exact[name].to(kind).float(), atol=1e-6, rtol=0)
    assert json.loads((out / "model" / "config.json").read_text())["dtype"] == str(kind).removeprefix("torch.")
    figures = read_spec(out).provenance[-1]
    assert 1e-5 < figures["logit_change"] < figures["tolerance"]
    assert f"at most {figures['tolerance']:g}" in capsys.readouterr().out


def test_a_bfloat16_base_stays_one_and_is_merged_in_float32(saved, tmp_path):
    _, folder = saved
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    file = tmp_path / "base" / "model.safetensors"
    save_file({name: tensor.bfloat16() for name, tensor in load_file(file).items()}, file, {"format": "pt"})
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    (tmp_path / "base" / "config.json").write_text(json.dumps({**config, "dtype": "bfloat16"}))
    spec = json.loads((tmp_path / "policy" / "policy.json").read_text())
    spec["backbone"] |= {"source": str(tmp_path / "base")}
    (tmp_path / "policy" / "policy.json").write_text(json.dumps(spec))
    out = merge.run(merge.Settings(tmp_path / "policy", tmp_path / "merged"))
    assert {e.dtype for f in read_headers(out / "model").values() for e in f.values()} == {torch.bfloat16}
    exact = merged_by_peft(tmp_path / "policy")
    for name, tensor in reloaded(out).items():
        torch.testing.assert_close(tensor, exact[name].bfloat16().float(), atol=1e-6, rtol=0)


CODE = """
import importlib.util
import sys
import torch
shim = importlib.util.spec_from_file_location("shim", sys.argv[2])  # for a torchvision that is built for CUDA, without it
module = importlib.util.module_from_spec(shim)
shim.loader.exec_module(module)
module.install()
from transformers import AutoModelForImageTextToText, AutoProcessor
model = AutoModelForImageTextToText.from_pretrained(sys.argv[1])
processor = AutoProcessor.from_pretrained(sys.argv[1])
assert not [name for name in sys.modules if name == "vla" or name.startswith("vla.")]
ids = torch.arange(10, 30)[None]
print(len(processor.tokenizer), model.get_input_embeddings().weight.shape[0])
print(*model(input_ids=ids).logits[0, -1, :5].tolist())
"""


@pytest.mark.parametrize("family", ["llava", "tiny"])
def test_stock_transformers_opens_it_without_us(tmp_path, family):
    if family == "tiny":
        policy = create_policy(
            "tiny", name="toy", action=ActionSpec(("a", "b"), 3), image=ImageSpec(("cam",), 64), prompt=PROMPT,
            statistics=STATISTICS, unnorm_key="toy", tokenizer=UniformTokenizer(64), lora_r=4,
        )  # fmt: skip
        stir(policy.backbone.model, scale=0.01)
    else:
        policy = make(tmp_path / "base", family)
    policy.save(tmp_path / "policy", stage="finetune", settings={})
    out = merge.run(merge.Settings(tmp_path / "policy", tmp_path / "merged", check=False))
    environment = {**os.environ, "PYTHONPATH": "", "HF_HUB_OFFLINE": "1"}
    ran = subprocess.run([sys.executable, "-c", CODE, str(out / "model"), str(TINY_PATH.parent / "torchvision_shim.py")], cwd=tmp_path, env=environment, capture_output=True, text=True)  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    sizes, logits = ran.stdout.splitlines()[-2:]
    assert [int(n) for n in sizes.split()] == [len(policy.backbone.processor.tokenizer), policy.backbone.n_embeddings]
    with torch.no_grad():
        mine = policy.backbone.model(input_ids=torch.arange(10, 30)[None]).logits[0, -1, :5]
    np.testing.assert_allclose([float(x) for x in logits.split()], mine.numpy(), atol=1e-4)


def test_a_merge_that_changes_logits_says_where_and_is_not_written(saved, tmp_path, monkeypatch):
    _, folder = saved
    write = Plan.tensor

    def wrong(self, file, name, dtype):
        tensor = write(self, file, name, dtype)
        return tensor * 3 if name.endswith("layers.1.mlp.down_proj.weight") and "vision" not in name else tensor

    monkeypatch.setattr(Plan, "tensor", wrong)
    with pytest.raises(VlaError, match=r"logits that moved by .*modules differ first at model.language_model.layers.1.mlp.down_proj .*at most 0.001") as caught:  # fmt: skip
        merge.run(merge.Settings(folder / "policy", tmp_path / "merged"))
    assert "--tolerance" in str(caught.value)
    assert not list(tmp_path.iterdir())
    monkeypatch.undo()
    merge.run(merge.Settings(folder / "policy", tmp_path / "merged"))


def test_what_cannot_be_merged(saved, tmp_path):
    _, folder = saved
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    settings = merge.Settings(tmp_path / "policy", tmp_path / "merged", check=False)

    def refused(words: str, **changes) -> None:
        with pytest.raises(VlaError, match=words):
            merge.run(dataclasses.replace(settings, **changes))
        assert not (tmp_path / "merged").exists()

    refused("dtype 'int7'; expected one of keep, float32", dtype="int7")
    weights = tmp_path / "policy" / "adapter" / "adapter_model.safetensors"
    whole, tensors = weights.read_bytes(), load_file(weights)
    name = next(name for name in tensors if "lora_A" in name)
    save_file({k: v for k, v in tensors.items() if k != name}, weights)
    refused(rf"no {name} in .*it, of shape")
    save_file({**tensors, name: tensors[name][:, 1:].contiguous()}, weights)
    refused(r"restore the adapter, or its own base")
    save_file({**tensors, "base_model.model.nothing.lora_A.weight": torch.zeros(2)}, weights)
    refused(r"with base_model.model.nothing.lora_A.weight; expected tensors of this model")
    save_file({**tensors, name: torch.full_like(tensors[name], float("nan"))}, weights)
    refused("expected finite weights")
    weights.write_bytes(whole[: len(whole) // 2])
    refused("expected a whole safetensors file")
    weights.unlink()
    refused("no adapter/adapter_model.safetensors")
    weights.write_bytes(whole)
    config = tmp_path / "policy" / "adapter" / "adapter_config.json"
    plain = json.loads(config.read_text())
    config.write_text(json.dumps({**plain, "init_lora_weights": "pissa"}))
    refused("init_lora_weights 'pissa', which changed the base")
    config.write_text(json.dumps({"peft_type": "IA3", "target_modules": ["q_proj"], "feedforward_modules": []}))
    refused("expected LoRA, DoRA or rsLoRA")
    config.write_text(json.dumps(plain))
    spec = json.loads((tmp_path / "policy" / "policy.json").read_text())
    for file, words in (
        ("model.safetensors", "which the adapter was trained on"),
        ("config.json", "quantized weights at"),
    ):
        copy = tmp_path / f"other-{file}"
        shutil.copytree(tmp_path / "base", copy)
        if file == "config.json":
            value = json.loads((copy / file).read_text())
            (copy / file).write_text(json.dumps({**value, "quantization_config": {"quant_method": "bitsandbytes"}}))
        else:
            save_file({k: v + 1 for k, v in load_file(copy / file).items()}, copy / file, {"format": "pt"})
        changed = {**spec, "backbone": {**spec["backbone"], "source": str(copy)}}
        (tmp_path / "policy" / "policy.json").write_text(json.dumps(changed))
        refused(words)


def test_lora_on_a_tied_head_is_refused(tmp_path):
    FAMILIES["paligemma"](tmp_path / "base")
    model = load_backbone(str(tmp_path / "base")).model
    get_peft_model(model, LoraConfig(r=2, target_modules=["lm_head", "q_proj"])).save_pretrained(tmp_path / "adapter", save_embedding_layers=False)  # fmt: skip
    with pytest.raises(
        VlaError, match="adapter of lm_head, whose weights are also those of model.language_model.embed_tokens.weight"
    ):
        add_adapter(open_base(tmp_path / "base", ""), tmp_path / "adapter")


def test_a_full_disk_is_known_beforehand(saved, tmp_path, monkeypatch):
    _, folder = saved
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(merge.shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(VlaError, match="full disk at .*expected 1 MB .*the same command again"):
        merge.run(merge.Settings(folder / "policy", tmp_path / "merged"))
    assert not (tmp_path / "merged").exists()


def test_an_adapter_on_a_quantized_base(tmp_path, capsys):
    pytest.importorskip("bitsandbytes", reason="needs bitsandbytes: pip install 'vla-toolkit[bnb]'")
    policy = make(tmp_path / "base", "llava", method="qlora", lora_parts=("llm",))
    policy.save(tmp_path / "policy", stage="finetune", settings={})
    out = merge.run(merge.Settings(tmp_path / "policy", tmp_path / "merged"))
    assert_same(reloaded(out), merged_by_peft(tmp_path / "policy"))
    spec = read_spec(out)
    entry = spec.provenance[-1]
    assert (
        spec.backbone.quantization == "none"
        and entry["logit_change"] < 1e-3 < entry["adapter_on_quantized"]["logit_change"]
    )
    assert "trained on a base in 4 bits" in capsys.readouterr().out
    assert "merged into the unquantized one: logits moved by up to" in (out / "README.md").read_text()
    again = load_policy(out, quantization="nf4")
    assert again.metadata["quantization"] == "bitsandbytes-nf4" and all(chunk.ok for chunk in again.act(observations()))


def test_written_tensors_are_safetensors(tmp_path):
    tensors = {
        "b": torch.randn(3, 5).bfloat16(), "a": torch.arange(7), "scalar": torch.tensor(2.5), "none": torch.zeros(0, 3),
        "bool": torch.tensor([True, False, True]), "turned": torch.randn(4, 6).t(), "half": torch.randn(2).half(),
    }  # fmt: skip
    entries = {name: Entry(tuple(t.shape), t.dtype) for name, t in tensors.items()}
    write_tensors(tmp_path / "x.safetensors", entries, tensors.__getitem__)
    back = load_file(tmp_path / "x.safetensors")
    assert back.keys() == tensors.keys() and all(
        torch.equal(back[n], t) and back[n].dtype == t.dtype for n, t in tensors.items()
    )
    with safe_open(tmp_path / "x.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
    with pytest.raises(AssertionError, match="a"):
        write_tensors(tmp_path / "y.safetensors", {"a": Entry((3,), torch.int64)}, tensors.__getitem__)
    assert not (tmp_path / "y.safetensors").exists()
    assert torch.equal(read_tensor(tmp_path / "x.safetensors", "turned"), tensors["turned"])
