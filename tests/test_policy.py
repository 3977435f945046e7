"""The policy directory: save -> load -> identical actions; every kind of damage is one clear error."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
import torch
from families import FAMILIES
from safetensors.torch import load_file, save_file

from vla import merge
from vla.adapters import parameter_counts, place_actions
from vla.backbone import load_backbone
from vla.new_policy import create_policy
from vla.policy import LocalPolicy, load_policy
from vla.quantize import quantized_options, weight_bytes
from vla.spec import ActionSpec, ImageSpec, PromptSpec, from_json, to_json
from vla.tokenizers.fast import FastTokenizer
from vla.tokenizers.fsq import FsqTokenizer
from vla.tokenizers.integer_text import IntegerTextTokenizer
from vla.tokenizers.quantile import QuantileTokenizer
from vla.tokenizers.uniform import UniformTokenizer
from vla.types import Observation, Policy, VlaError

STATISTICS = {
    "toy": {"action": {"q01": [-1.0, -2.0], "q99": [1.0, 2.0], "mask": [True, True]}, "num_transitions": 10},
    "other": {"action": {"q01": [0.0, 0.0], "q99": [10.0, 10.0], "mask": [True, False]}, "num_transitions": 5},
}
PROMPT = PromptSpec("{instruction} State: {state}", True, ("u", "v"), (0.0, 0.0), (1.0, 1.0))


def make(folder, family="llava", **options) -> LocalPolicy:
    FAMILIES[family](folder)
    torch.manual_seed(0)
    policy = create_policy(
        str(folder), name="toy", action=ActionSpec(("a", "b"), 3), image=ImageSpec(("cam",), 32), prompt=PROMPT,
        statistics=STATISTICS, unnorm_key="toy", **{"tokenizer": UniformTokenizer(64), "lora_r": 4, **options},
    )  # fmt: skip
    with torch.no_grad():
        for parameter in policy.backbone.model.parameters():
            if parameter.requires_grad:  # a fresh LoRA is zero: make the adapter matter
                parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) * 0.1)
    return policy


def observations(n=2):
    rng = np.random.default_rng(0)
    words = ["open the drawer", "close the window right now", "press it"]
    return [
        Observation(
            {"cam": rng.integers(0, 255, (48, 40, 3), dtype=np.uint8)}, np.float32([0.1, 0.7]), words[i], (3, i)
        )
        for i in range(n)
    ]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("policy")
    policy = make(folder / "base")
    policy.save(folder / "policy", stage="finetune", settings={"lr": 1e-3})
    return policy, folder


@pytest.mark.parametrize("family", sorted(FAMILIES))
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_save_load_gives_identical_actions(tmp_path, family, temperature):
    policy = make(tmp_path / "base", family)
    policy.temperature = temperature
    policy.save(tmp_path / "policy", stage="finetune", settings={})
    again = load_policy(tmp_path / "policy", temperature=temperature)
    assert isinstance(again, Policy)
    for mine, theirs in zip(policy.act(observations()), again.act(observations()), strict=True):
        assert np.array_equal(mine.actions, theirs.actions)
        assert np.array_equal(mine.token_ids, theirs.token_ids)
        np.testing.assert_allclose(mine.logprobs, theirs.logprobs, atol=1e-5)
        assert mine.ok and mine.actions.shape == (3, 2) and mine.actions.dtype == np.float32


def test_actions_are_in_the_units_of_the_unnorm_key(saved):
    policy, folder = saved
    a = policy.act(observations(1))[0].actions
    b = load_policy(folder / "policy", unnorm_key="other").act(observations(1))[0].actions
    normalized = a / [1.0, 2.0]
    np.testing.assert_allclose(b[:, 0], 5 * (normalized[:, 0] + 1), atol=1e-5)
    np.testing.assert_allclose(b[:, 1], normalized[:, 1], atol=1e-5)  # masked out: as it is


def test_decoded_tokens_are_the_actions_that_were_encoded(saved):
    policy, _ = saved
    actions = np.random.default_rng(0).uniform([-1, -2], [1, 2], (5, 3, 2)).astype(np.float32)
    ids = policy.action_token_ids(actions, "toy")
    back = policy.normalizer.unnormalize(policy.codec.decode(ids.numpy())[0])
    assert np.abs((back - actions) / [1, 2]).max() <= 1 / 63 + 1e-6  # half a bin


def test_only_adapter_and_action_rows_train(saved):
    policy, _ = saved
    names = [n for n, p in policy.backbone.model.named_parameters() if p.requires_grad]
    assert all("lora_" in n or "trainable_tokens" in n for n in names)
    assert not any("vision" in n for n in names)
    assert 0 < parameter_counts(policy.backbone.model)[0] < parameter_counts(policy.backbone.model)[1] / 2


def test_directory_has_the_documented_parts(saved):
    _, folder = saved
    names = {p.name for p in (folder / "policy").iterdir()}
    assert names == {
        "policy.json",
        "adapter",
        "processor",
        "tokenizer",
        "action_tokenizer",
        "dataset_statistics.json",
        "README.md",
    }
    card = (folder / "policy" / "README.md").read_text()
    assert "pipeline_tag: robotics" in card and '{"lr": 0.001}' in card
    assert not list((folder / "policy").rglob("*.bin")) and not list((folder / "policy").rglob("*.pt"))


def test_spec_survives_json(saved):
    policy, _ = saved
    assert from_json(json.loads(json.dumps(to_json(policy.spec)))) == policy.spec


def damage_json(change):
    def damage(folder):
        value = json.loads((folder / "policy.json").read_text())
        change(value)
        (folder / "policy.json").write_text(json.dumps(value))

    return damage


def cut(name):
    def damage(folder):
        path = next(folder.rglob(name))
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])

    return damage


DAMAGE = {
    "no policy.json": (lambda f: (f / "policy.json").unlink(), "no policy.json"),
    "cut policy.json": (cut("policy.json"), "expected JSON"),
    "unknown field": (damage_json(lambda v: v.update(colour="red")), "unknown colour"),
    "missing field": (damage_json(lambda v: v["action"].pop("names")), "no 'names'"),
    "wrong type": (damage_json(lambda v: v["action"].update(horizon="8")), "policy.action.horizon: '8'; expected int"),
    "wrong choice": (damage_json(lambda v: v["image"].update(resize_filter="fancy")), "one of nearest"),
    "newer format": (damage_json(lambda v: v.update(format_version=99)), "policy format 99"),
    "other horizon": (damage_json(lambda v: v["action"].update(horizon=0)), "at least 1 x 1"),
    "ids that are not there": (
        damage_json(lambda v: v["tokens"]["placement"].update(first_id=99999)),
        "embedding matrix",
    ),
    "no statistics": (lambda f: (f / "dataset_statistics.json").unlink(), "no dataset_statistics.json"),
    "cut statistics": (cut("dataset_statistics.json"), "expected JSON"),
    "wrong action size": (
        damage_json(lambda v: v["action"].update(names=["a", "b", "c"])),
        "3, the policy's action size",
    ),
    "no adapter": (lambda f: shutil.rmtree(f / "adapter"), "no adapter/"),
    "cut weights": (cut("adapter_model.safetensors"), "cannot be loaded"),
    "other backbone": (damage_json(lambda v: v["backbone"].update(model_type="qwen2_5_vl")), "got a llava model"),
}


@pytest.mark.parametrize("name", sorted(DAMAGE))
def test_damage_is_one_clear_error(saved, tmp_path, name):
    _, folder = saved
    copy = tmp_path / "policy"
    shutil.copytree(folder / "policy", copy)
    damage, message = DAMAGE[name]
    damage(copy)
    before = sorted((p, p.stat().st_size) for p in copy.rglob("*"))
    with pytest.raises(VlaError, match=message):
        load_policy(copy)
    assert sorted((p, p.stat().st_size) for p in copy.rglob("*")) == before


def test_an_adapter_on_other_weights_is_refused(tmp_path):
    policy = make(tmp_path / "base")
    policy.save(tmp_path / "policy", stage="finetune", settings={})
    load_policy(tmp_path / "policy")
    weights = tmp_path / "base" / "model.safetensors"
    tensors = {name: tensor * 1.01 for name, tensor in load_file(weights).items()}
    save_file(tensors, weights, metadata={"format": "pt"})
    with pytest.raises(VlaError, match="which the adapter was trained on"):
        load_policy(tmp_path / "policy")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": {"wrong": np.zeros((8, 8, 3), np.uint8)}}, r"cameras \['wrong'\]; expected all of \['cam'\]"),
        ({"images": {"cam": np.zeros((8, 8), np.uint8)}}, r"shape \(8, 8\)"),
        ({"images": {"cam": np.zeros((8, 8, 3), np.float32)}}, "float32; expected uint8"),
        ({"state": None}, "no state"),
        ({"state": np.zeros(3, np.float32)}, r"shape \(3,\)"),
        ({"state": np.float32([np.nan, 0])}, "finite"),
        ({"instruction": " "}, "empty instruction"),
    ],
)
def test_bad_observations_are_refused(saved, change, message):
    policy, _ = saved
    with pytest.raises(VlaError, match=message):
        policy.act([dataclasses.replace(observations(1)[0], **change)])


def test_unknown_unnorm_key_lists_the_known_ones(saved):
    _, folder = saved
    with pytest.raises(VlaError, match="'nope'; expected one of: other, toy"):
        load_policy(folder / "policy", unnorm_key="nope")


def test_overwriting_a_policy_leaves_no_other_files(saved, tmp_path):
    policy, _ = saved
    for _ in range(2):
        policy.save(tmp_path / "p", stage="finetune", settings={})
    assert [p.name for p in tmp_path.iterdir()] == ["p"]


TOKENIZERS = {
    "edges": lambda chunks: UniformTokenizer(33, mode="edges"),
    "quantile": lambda chunks: QuantileTokenizer(16).fit(chunks),
    "fast": lambda chunks: FastTokenizer(max_vocab=120).fit(chunks),
    "fsq": lambda chunks: FsqTokenizer(levels=(5, 5), tokens=3, hidden=16, steps=30).fit(chunks),
    "integer_text": lambda chunks: IntegerTextTokenizer(),
}


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("temperature", [0.0, 2.0])
def test_any_tokenizer_acts_the_same_after_saving_loading_and_merging(tmp_path, name, temperature):
    chunks = np.cumsum(np.random.default_rng(0).uniform(-0.3, 0.3, (300, 3, 2)), axis=1).clip(-1, 1).astype(np.float32)
    tokenizer = TOKENIZERS[name](chunks)
    policy = make(tmp_path / "base", tokenizer=tokenizer)
    policy.temperature = temperature
    policy.save(tmp_path / "policy", stage="finetune", settings={})
    again = load_policy(tmp_path / "policy", temperature=temperature)
    merged = load_policy(merge.run(merge.Settings(tmp_path / "policy", tmp_path / "merged")), temperature=temperature)
    assert (again.spec.tokens.scheme, again.spec.tokens.n_symbols) == (
        name.replace("edges", "uniform"),
        tokenizer.vocab_size,
    )
    seen = observations(3)
    answers = [p.act(seen) for p in (policy, again, merged)]
    for mine, theirs, third in zip(*answers, strict=True):
        assert mine.ok and mine.actions.shape == (3, 2) and np.isfinite(mine.actions).all()
        assert np.array_equal(mine.actions, theirs.actions) and np.array_equal(mine.token_ids, theirs.token_ids)
        assert np.array_equal(mine.token_ids, third.token_ids)
        assert (
            (mine.token_ids >= 0).all() and mine.logprobs.shape == mine.token_ids.shape and (mine.logprobs <= 0).all()
        )
    alone = policy.act(seen[1:2])[0]
    assert np.array_equal(alone.token_ids, answers[0][1].token_ids), "whatever the lengths of the others"
    np.testing.assert_allclose(alone.logprobs, answers[0][1].logprobs, atol=1e-5)
    ids = policy.action_token_ids(chunks[:20] * [1.0, 2.0], "toy")
    back, ok = policy.codec.decode(ids.numpy())
    assert ok.all() and np.abs(back - chunks[:20]).mean() < 0.4


def test_a_policy_from_before_other_schemes_opens(saved, tmp_path):
    policy, folder = saved
    old = tmp_path / "policy"
    shutil.copytree(folder / "policy", old)
    shutil.rmtree(old / "action_tokenizer")  # it held a file of another form, which nobody read
    value = json.loads((old / "policy.json").read_text())
    value["format_version"] = 1
    value["tokens"]["bins"] = value["tokens"].pop("n_symbols")
    (old / "policy.json").write_text(json.dumps(value))
    again = load_policy(old)
    for mine, theirs in zip(policy.act(observations()), again.act(observations()), strict=True):
        assert np.array_equal(mine.actions, theirs.actions)
    again.save(tmp_path / "new", stage="again", settings={})
    assert load_policy(tmp_path / "new").spec.format_version == 2


def test_a_tokenizer_that_is_not_the_policys_is_refused(saved, tmp_path):
    copy = tmp_path / "policy"
    shutil.copytree(saved[1] / "policy", copy)
    UniformTokenizer(32).save(copy / "action_tokenizer")
    with pytest.raises(VlaError, match="uniform with 32 symbols in .*expected uniform with 64, as policy.json says"):
        load_policy(copy)
    (copy / "action_tokenizer" / "scheme.json").unlink()
    with pytest.raises(VlaError, match="no scheme.json"):
        load_policy(copy)


@pytest.mark.parametrize(
    "family", ["llava", "qwen2_5_vl", "paligemma"]
)  # heads of their own, and tied to the embedding
def test_many_symbols_are_added_with_mean_rows(tmp_path, family):
    FAMILIES[family](tmp_path / "base")
    backbone = load_backbone(str(tmp_path / "base"))
    tokenizer, model = backbone.processor.tokenizer, backbone.model
    first = len(tokenizer)
    known = min(first, backbone.n_embeddings)
    before = [
        layer.weight[:known].detach().clone() for layer in (model.get_input_embeddings(), model.get_output_embeddings())
    ]
    placement, n = place_actions(backbone, "added", 2048)
    assert n == 2048 and placement.ids[0] == first and backbone.n_embeddings >= first + 2048 == len(tokenizer)
    for layer, rows in zip((model.get_input_embeddings(), model.get_output_embeddings()), before, strict=True):
        torch.testing.assert_close(layer.weight[:known], rows)
        torch.testing.assert_close(layer.weight[first : first + 2048], rows.mean(0).expand(2048, -1))
    with pytest.raises(VlaError, match="skip 128 with placement 'added'"):
        place_actions(backbone, "added", 8, skip=128)
    with pytest.raises(VlaError, match="symbols that are no numbers"):
        make(tmp_path / "other", tokenizer=IntegerTextTokenizer(), added_init="numbers")


def test_merge_equals_adapter_and_opens_in_stock_transformers(saved, tmp_path):
    from transformers import AutoModelForImageTextToText, AutoProcessor

    policy, folder = saved
    merged = load_policy(merge.run(merge.Settings(folder / "policy", tmp_path / "merged")))
    for mine, theirs in zip(policy.act(observations()), merged.act(observations()), strict=True):
        assert np.array_equal(mine.actions, theirs.actions)
        np.testing.assert_allclose(mine.logprobs, theirs.logprobs, atol=1e-4)
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "merged" / "model")
    assert model.get_input_embeddings().weight.shape[0] == policy.backbone.n_embeddings
    assert len(AutoProcessor.from_pretrained(tmp_path / "merged" / "model").tokenizer) == len(
        policy.backbone.processor.tokenizer
    )
    with pytest.raises(VlaError, match="exists"):
        merge.run(merge.Settings(folder / "policy", tmp_path / "merged"))


def test_torch_int8_is_used_and_named_without_bitsandbytes(saved, tmp_path, monkeypatch):
    policy, folder = saved
    merge.run(merge.Settings(folder / "policy", tmp_path / "merged"))
    monkeypatch.setattr("vla.quantize.importlib.util.find_spec", lambda name: None)
    quantized = load_policy(tmp_path / "merged", quantization="int8")
    assert quantized.metadata["quantization"] == "torch-dynamic-int8"
    assert weight_bytes(quantized.backbone.model) < 0.8 * weight_bytes(load_policy(tmp_path / "merged").backbone.model)
    exact, rough = policy.act(observations(1))[0], quantized.act(observations(1))[0]
    assert rough.ok and abs(float(exact.logprobs[0] - rough.logprobs[0])) < 0.5
    with pytest.raises(VlaError, match=r"vla-toolkit\[bnb\]"):
        load_policy(tmp_path / "merged", quantization="nf4")


@pytest.mark.parametrize("method", ["int8", "nf4"])
def test_bitsandbytes_is_used_and_named(saved, tmp_path, method):
    pytest.importorskip("bitsandbytes", reason="needs bitsandbytes: pip install 'vla-toolkit[bnb]'")
    policy, folder = saved
    merge.run(merge.Settings(folder / "policy", tmp_path / "merged"))
    quantized = load_policy(tmp_path / "merged", quantization=method)
    assert quantized.metadata["quantization"] == f"bitsandbytes-{method}"
    assert all(chunk.ok for chunk in quantized.act(observations()))
    assert weight_bytes(quantized.backbone.model) < weight_bytes(policy.backbone.model)


def test_quantizing_an_adapter_policy_points_to_merge(saved):
    _, folder = saved
    with pytest.raises(VlaError, match="vla merge"):
        load_policy(folder / "policy", quantization="int8")
    with pytest.raises(VlaError, match="one of none, int8, nf4"):
        quantized_options("int3", "cpu")
