"""Published files in, published files out; every tensor accounted for; adapters of the authors' script."""

import json
import math
import shutil
from pathlib import Path

import numpy as np
import openvla_tiny as tiny
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from vla import cli, merge
from vla.backbone import load_backbone
from vla.import_policy import V01_TEMPLATE, Settings, run
from vla.openvla.checkpoint import model_shapes, read_config, weight_shapes
from vla.openvla.config import OpenVlaConfig
from vla.policy import load_policy
from vla.types import Observation, VlaError

GOLDEN = np.load(Path(__file__).parent / "golden" / "openvla.npz")
FRAMES = tiny.frames()
OBSERVATIONS = [
    Observation({"image": frame}, None, text) for frame, text in zip(FRAMES, tiny.INSTRUCTIONS, strict=False)
]


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    return tiny.write_checkpoint(tmp_path_factory.mktemp("openvla") / "fused")


@pytest.fixture
def copy(source, tmp_path) -> Path:
    """A checkpoint to damage; its weights are links until they are written."""
    folder = tmp_path / "copy"
    folder.mkdir()
    for path in source.iterdir():
        if path.suffix == ".safetensors":
            (folder / path.name).symlink_to(path)
        else:
            shutil.copy(path, folder)
    return folder


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def rewrite(path: Path, change) -> None:
    """Change a shard's tensors and its index."""
    tensors = change(load_file(path))
    path.unlink()
    save_file(tensors, path, metadata={"format": "pt"})
    index = path.parent / "model.safetensors.index.json"
    names = json.loads(index.read_text())
    kept = {name: file for name, file in names["weight_map"].items() if file != path.name}
    index.write_text(json.dumps({**names, "weight_map": {**kept, **dict.fromkeys(tensors, path.name)}}))


def test_names_and_shapes_are_the_published_ones(source):
    assert model_shapes(read_config(source)) == weight_shapes(source)
    assert "vision_backbone.featurizer.blocks.0.ls1.scale_factor" in weight_shapes(source)


def test_the_full_model_has_the_published_size():
    shapes = model_shapes(OpenVlaConfig(text_config={"vocab_size": 32064, "pad_token_id": 32000}))
    assert sum(map(math.prod, shapes.values())) == 7_541_237_184  # openvla-7b: 15,082,474,368 bytes in bfloat16
    assert shapes["projector.fc1.weight"] == (8704, 2176)


def test_what_is_saved_is_what_was_read(source, tmp_path):
    backbone = load_backbone(str(source))
    backbone.model.save_pretrained(tmp_path, max_shard_size="5MB")
    backbone.processor.save_pretrained(tmp_path)
    assert len(shards(tmp_path)) > 1
    assert weight_shapes(tmp_path) == weight_shapes(source)
    for folder in (source, tmp_path):
        stored = {name: tensor for path in shards(folder) for name, tensor in load_file(path).items()}
        assert all(np.array_equal(tensor, tiny.fill(name, tuple(tensor.shape))) for name, tensor in stored.items())
    old, new = (json.loads((folder / "config.json").read_text()) for folder in (source, tmp_path))
    assert new.pop("text_config").items() >= {**old.pop("text_config"), "rope_theta": 10000.0}.items()
    assert new.pop("auto_map")["AutoConfig"] == "openvla/openvla-7b--configuration_prismatic.OpenVLAConfig"
    assert new == {name: value for name, value in old.items() if name != "transformers_version"}
    for name in ("preprocessor_config.json", "tokenizer_config.json"):
        old, new = (json.loads((folder / name).read_text()) for folder in (source, tmp_path))
        assert all(new[key] == value for key, value in old.items())
    prompt = tiny.PROMPT.format("open the drawer")
    image = [[Image.fromarray(FRAMES[1])]]
    with torch.no_grad():
        before, after = (b.model(**b.encode([prompt], image)).logits for b in (backbone, load_backbone(str(tmp_path))))
    assert torch.equal(before, after)


@pytest.mark.parametrize("change, text", [
    (lambda t: {k: v for k, v in t.items() if "fc3" not in k}, r"missing projector\.fc3"),
    (lambda t: {**t, "projector.fc9.weight": torch.zeros(2)} if "projector.fc3.weight" in t else t,
     r"unexpected projector\.fc9\.weight"),
    (lambda t: {k: v[:-1] if k.endswith("embed_tokens.weight") else v for k, v in t.items()},
     r"misshaped language_model\.model\.embed_tokens\.weight \[32063, 64\] for \[32064, 64\]"),
    (lambda t: {k.replace("scale_factor", "gamma"): v for k, v in t.items()}, r"look like .*gamma' for .*scale_factor'"),
])  # fmt: skip
def test_weights_that_are_not_the_models_are_refused_by_name(copy, change, text):
    for path in shards(copy):
        rewrite(path, change)
    with pytest.raises(VlaError, match=text):
        load_backbone(str(copy))


def test_damaged_files_are_named(copy):
    path = shards(copy)[1]
    data = path.read_bytes()[:-100]
    path.unlink()
    path.write_bytes(data)
    with pytest.raises(VlaError, match=r"model-00002-of-00003\.safetensors.*whole safetensors file"):
        load_backbone(str(copy))
    path.unlink()
    with pytest.raises(VlaError, match=r"no model-00002-of-00003\.safetensors"):
        load_backbone(str(copy))
    index = copy / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"x": "../elsewhere.safetensors"}}))
    with pytest.raises(VlaError, match="files of the same folder"):
        load_backbone(str(copy))
    index.unlink()
    (copy / "pytorch_model.bin").touch()
    with pytest.raises(VlaError, match=r"but pytorch_model\.bin; .*never opened"):
        load_backbone(str(copy))


@pytest.mark.parametrize("file, change, text", [
    ("config.json", {"vision_backbone_id": "resnet"}, "one of clip-vit-l"),
    ("config.json", {"llm_backbone_id": "phi-2-3b"}, "llama2-7b-pure"),
    ("config.json", {"image_sizes": [224]}, "2 of each"),
    ("preprocessor_config.json", {"image_resize_strategy": "none"}, "resize-naive, resize-crop, letterbox"),
    ("preprocessor_config.json", {"input_sizes": [[3, 224, 224]], "tvf_crop_params": []}, "1 input_sizes, 2 interpolations"),
    ("tokenizer_config.json", {"pad_token": None}, "without pad_token"),
])  # fmt: skip
def test_wrong_files_are_named(copy, file, change, text):
    (copy / file).write_text(json.dumps({**json.loads((copy / file).read_text()), **change}))
    with pytest.raises(VlaError, match=text):
        load_backbone(str(copy))


def test_import_refuses_what_it_cannot_know(copy, tmp_path):
    out = tmp_path / "policy"
    with pytest.raises(VlaError, match="no unnorm_key; expected one of: bridge_orig, libero_spatial, plain"):
        run(Settings(str(copy), out))
    with pytest.raises(VlaError, match="'bridge'; expected one of: bridge_orig, libero_spatial, plain"):
        run(Settings(str(copy), out, unnorm_key="bridge"))
    with pytest.raises(VlaError, match="protocol 'openvl'"):
        run(Settings(str(copy), out, unnorm_key="plain", protocol="openvl"))
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "pad_to_multiple_of": 32}))
    with pytest.raises(VlaError, match="32064 padded by 32, and a tokenizer of 32000"):
        run(Settings(str(copy), out, unnorm_key="plain"))
    (copy / "config.json").write_text(json.dumps({**config, "norm_stats": None}))
    with pytest.raises(VlaError, match="no statistics in .*dataset_statistics.json"):
        run(Settings(str(copy), out))
    (copy / "action_head--150000_checkpoint.pt").touch()
    with pytest.raises(
        VlaError, match="action_head--150000_checkpoint.pt: .*expected a state dict that torch.save wrote"
    ):
        run(Settings(str(copy), out))
    assert not out.exists()


def test_statistics_of_fine_tuning_win_over_those_of_pre_training(copy, tmp_path):
    config = json.loads((copy / "config.json").read_text())
    mine = {"mine": config["norm_stats"]["plain"]}
    (copy / "dataset_statistics.json").write_text(json.dumps(mine))
    policy = load_policy(run(Settings(str(copy), tmp_path / "a", dtype="float32")))
    assert policy.statistics == mine and policy.unnorm_key == "mine"
    other = tmp_path / "other.json"
    other.write_text(json.dumps({"theirs": mine["mine"]}))
    policy = load_policy(run(Settings(str(copy), tmp_path / "b", statistics=other, dtype="float32")))
    assert policy.unnorm_key == "theirs"


def test_the_protocol_sets_frames_and_gripper(source, tmp_path):
    out = run(Settings(str(source), tmp_path / "p", unnorm_key="libero_spatial", protocol="openvla", dtype="float32"))
    spec = load_policy(out).spec
    assert (spec.image.cameras, spec.image.resize_filter, spec.image.jpeg_quality) == (("agentview",), "lanczos3", 95)
    assert (spec.image.crop_area, spec.image.rotation_deg, spec.image.size_px) == (0.9, 180, 224)
    assert (spec.action.gripper_threshold, spec.action.gripper_invert) == (0.5, True)
    assert spec.action.names == ("x", "y", "z", "roll", "pitch", "yaw", "gripper")
    assert spec.tokens.placement == {"kind": "tail", "first_id": 31999, "step": -1, "n": 256}


def test_version_01_has_its_own_prompt(copy, tmp_path):
    v01 = copy.rename(tmp_path / "openvla-v01-7b")
    policy = load_policy(run(Settings(str(v01), tmp_path / "p", unnorm_key="plain", dtype="float32")))
    assert policy.spec.prompt.template == V01_TEMPLATE
    ids = policy.encode([Observation({"image": FRAMES[0]}, None, "open the drawer")])["input_ids"][0]
    assert ids[-2:].tolist() == [29901, 29871]


def test_the_authors_adapter_loads_saves_and_merges(source, tmp_path):
    adapter = tiny.write_adapter(tmp_path / "lora")
    out = run(Settings(str(source), tmp_path / "policy", adapter=adapter, unnorm_key="plain", dtype="float32"))
    policy = load_policy(out)
    assert any("lm_head.lora_A" in name for name, _ in policy.backbone.model.named_parameters())
    columns = GOLDEN["fused_columns"]
    with torch.no_grad():
        for observation, want in zip(OBSERVATIONS, GOLDEN["lora_last"], strict=True):
            last = policy.backbone.model(**policy.encode([observation])).logits[0, -1]
            np.testing.assert_allclose(torch.cat([last[tiny.ACTION_IDS], last[columns]]), want, atol=2e-5, rtol=0)
    merged = load_policy(merge.run(merge.Settings(out, tmp_path / "merged")))
    copied = load_policy(run(Settings(str(source), tmp_path / "copied", adapter=adapter, unnorm_key="plain", copy=True, dtype="float32")))  # fmt: skip
    assert (tmp_path / "merged" / "model" / "preprocessor_config.json").is_file()
    chunks = [p.act(OBSERVATIONS) for p in (policy, merged, copied)]
    for a, b, c in zip(*chunks, strict=True):
        assert a.token_ids.tolist() == b.token_ids.tolist() == c.token_ids.tolist()


def test_a_wrong_adapter_is_refused(source, tmp_path):
    def settings(folder: Path) -> Settings:
        return Settings(str(source), tmp_path / "policy", adapter=folder, unnorm_key="plain", dtype="float32")

    adapter = tiny.write_adapter(tmp_path / "lora")
    file = adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    head = "base_model.model.language_model.lm_head.base_layer.weight"
    save_file({**tensors, head: tensors[head] + 1}, file)
    with pytest.raises(VlaError, match="whose copy of language_model.lm_head.*its own base model"):
        run(settings(adapter))
    save_file({k: v for k, v in tensors.items() if "fc3" not in k}, file)
    with pytest.raises(VlaError, match=r"missing base_model\.model\.projector\.fc3\.lora_A\.weight"):
        run(settings(adapter))
    save_file({**tensors, "base_model.model.nothing.lora_A.weight": torch.zeros(1)}, file)
    with pytest.raises(VlaError, match=r"unexpected base_model\.model\.nothing"):
        run(settings(adapter))
    file.unlink()
    (adapter / "adapter_model.bin").touch()
    with pytest.raises(VlaError, match="pickled adapter_model.bin"):
        run(settings(adapter))


def test_the_command_line(source, tmp_path, capsys):
    out = tmp_path / "policy"
    assert cli.main(["import", str(source), "--out", str(out), "--unnorm-key", "plain"]) == 0
    assert "statistics of plain of 3: bridge_orig, libero_spatial, plain" in capsys.readouterr().out
    assert not (out / "model").exists()  # the weights stay where they are
    assert cli.main(["import", str(source), "--out", str(out), "--unnorm-key", "plain"]) == 2
    policy = load_policy(out, dtype="bfloat16")
    assert policy.metadata["backbone"]["weights"] == "base" and policy.act(OBSERVATIONS[:1])[0].ok
