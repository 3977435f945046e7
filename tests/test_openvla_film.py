"""OpenVLA-OFT with FiLM equals the authors' own code, given the same small random weights.

tests/golden/openvla_film.npz: `predict_action(..., use_film=True)` of `prismatic/extern/hf/modeling_prismatic.py` with
`FiLMedPrismaticVisionBackbone` of `prismatic/models/film_vit_wrapper.py` (moojink/openvla-oft@213c5ff, transformers 4.40.1,
timm 0.9.16, peft 0.11.1, eager attention, float32, batch 1) on the weights of tests/openvla_tiny.py, LIBERO's constants, and
the robot states `oft_states` of openvla.npz. Their fork of transformers was replaced by `LlamaModel._update_causal_mask` that
answers zeros. Image k of instruction i is frame (i + k) % 3. Keys `plain_{images}_{proprio}_{l1,discrete,hidden}`; `hidden`
holds the first 8 numbers of each hidden state.

`lora_*`, two images and proprio: the model of their `experiments/robot/openvla_utils.py::_apply_film_to_vla` with rank 32,
given a `vision_backbone--1_checkpoint.pt` saved as their `vla-scripts/finetune.py` does (PEFT `all-linear`, then FiLM, then
`torch.save(vla.vision_backbone.state_dict())`). tests/fixtures/openvla/film/weights.json: names and shapes of that file.
`adapter_*`: the same, on a base that their `merge_lora_weights_and_save.py` merged the run's `lora_adapter/` into; its vision
weights were then bit for bit those of the base. The adapter's names and shapes are those of tests/fixtures/openvla/lora, of
rank 32 and with the vision backbone's as in the file.
"""

import json
import re
from pathlib import Path

import numpy as np
import openvla_tiny as tiny
import pytest
import torch
from peft import LoraConfig, get_peft_model
from PIL import Image
from safetensors.torch import save_file

from vla.adapters import attach_lora
from vla.backbone import Backbone, load_backbone
from vla.gradient_checkpoint import checkpoint_layers
from vla.openvla import film
from vla.openvla.adapter import attach_adapter
from vla.openvla.film_file import load_vision_backbone
from vla.openvla.oft import STOP_ID, L1Head, ProprioProjector, action_states
from vla.tokenizers.uniform import UniformTokenizer
from vla.types import VlaError

GOLDEN = np.load(Path(__file__).parent / "golden" / "openvla_film.npz")
STATES = np.load(Path(__file__).parent / "golden" / "openvla.npz")["oft_states"]
NAMES = json.loads((tiny.FIXTURES / "film" / "weights.json").read_text())
PLAIN = {n.replace(".base_layer", ""): shape for n, shape in NAMES.items() if "lora_" not in n}
H, D, S = 8, 7, 8
PART = "vision_backbone."


def values(name: str, shape: list[int]) -> torch.Tensor:
    """What the authors' file held under `name`: FiLM and LoRA by its name in the file, the rest by the base's name."""
    if "lora_" in name:
        return torch.from_numpy((0.3 * tiny.fill(name, tuple(shape))).astype(np.float32))
    if ".scale." not in name and ".shift." not in name:
        name = name.replace(".block.", ".").replace(".base_layer", "")
    return torch.from_numpy(tiny.fill(name, tuple(shape)).astype(np.float32))


def write_file(path: Path, names: dict[str, list[int]], **changes: torch.Tensor | None) -> Path:
    state = {name: values(name, shape) for name, shape in names.items()} | changes
    torch.save({name: tensor for name, tensor in state.items() if tensor is not None}, path)
    return path


def write_adapter(folder: Path) -> Path:
    """The `lora_adapter/` of the run that wrote the file of `NAMES`."""
    folder.mkdir()
    config = json.loads((tiny.FIXTURES / "lora" / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "r": 32, "lora_alpha": 16}))
    tensors = {}
    for name, shape in json.loads((tiny.FIXTURES / "lora" / "weights.json").read_text()).items():
        if "lora_" not in name:
            tensors[name] = values("language_model.lm_head.weight", shape)
            continue
        shape = [32, *shape[1:]] if "lora_A" in name else [shape[0], 32, *shape[2:]]
        wrapped = re.sub(r"blocks\.(\d+)\.", r"blocks.\1.block.", name)
        wrapped = wrapped.replace(".model.vision_backbone.", ".model.vision_backbone.vision_backbone.")
        tensors[wrapped] = values(name, shape)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    return folder


def film_values() -> dict[str, torch.Tensor]:
    names = {name: shape for name, shape in PLAIN.items() if ".scale." in name or ".shift." in name}
    return {name.removeprefix(PART): values(name, shape) for name, shape in names.items()}


def filled(module: torch.nn.Module, prefix: str) -> torch.nn.Module:
    state = {name: values(prefix + name, list(tensor.shape)) for name, tensor in module.state_dict().items()}
    module.load_state_dict(state)
    return module.eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tiny.write_checkpoint(tmp_path_factory.mktemp("openvla") / "fused")


@pytest.fixture(scope="module")
def filmed(folder) -> Backbone:
    """With the goldens' FiLM; not to be changed."""
    backbone = load_backbone(str(folder), attn_implementation="eager")
    film.load_film(backbone.model, film_values(), "the goldens")
    return backbone


def inputs_of(backbone: Backbone, rows: range, images: int = 2) -> dict[str, torch.Tensor]:
    frames = [Image.fromarray(frame) for frame in tiny.frames()]
    prompts = [tiny.PROMPT.format(tiny.INSTRUCTIONS[i].lower()) + " " for i in rows]
    inputs = backbone.processor(prompts, [frames[i % 3] for i in rows], padding=True)
    views = [backbone.processor.image_processor([frames[(i + k) % 3] for i in rows]) for k in range(1, images)]
    return {**inputs, "pixel_values": torch.cat([inputs["pixel_values"], *views], dim=1)}


def unnormalized(backbone: Backbone, actions: np.ndarray) -> np.ndarray:
    entry = backbone.config.norm_stats["bridge_orig"]["action"]
    low, high = np.array(entry["q01"]), np.array(entry["q99"])
    return np.where(entry["mask"], 0.5 * (actions + 1) * (high - low + 1e-8) + low, actions)


def check(backbone: Backbone, key: str, images: int, proprio: bool, batch: int) -> None:
    head, projector = filled(L1Head(64, 64, D), "action_head."), filled(ProprioProjector(64, S), "proprio_projector.")
    for start in range(0, 4, batch):
        rows = range(start, start + batch)
        state = projector(torch.from_numpy(STATES[rows.start : rows.stop])) if proprio else None
        inputs = inputs_of(backbone, rows, images)
        states = action_states(backbone.model, **inputs, n_actions=H * D, proprio=state)
        want = {name: GOLDEN[f"{key}_{name}"][rows.start : rows.stop] for name in ("hidden", "l1", "discrete")}
        np.testing.assert_allclose(states[:, :, :8].numpy(), want["hidden"], atol=1e-5, rtol=0)
        actions = unnormalized(backbone, head(states).numpy().astype(np.float64))
        np.testing.assert_allclose(actions, want["l1"], atol=1e-5, rtol=0)
        ids = backbone.model.get_output_embeddings()(states).argmax(-1).numpy()
        discrete = UniformTokenizer().to_values((31999 - ids).clip(0, 255)).reshape(-1, H, D)
        np.testing.assert_allclose(unnormalized(backbone, discrete), want["discrete"], atol=1e-7, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize(("images", "proprio"), [(1, False), (1, True), (2, False), (2, True), (3, True)])
def test_chunks_are_the_authors(filmed, images, proprio, batch):
    check(filmed, f"plain_{images}_{int(proprio)}", images, proprio, batch)


@torch.no_grad()
@pytest.mark.parametrize(("names", "key"), [(PLAIN, "plain_2_1"), (NAMES, "lora")], ids=["merged", "lora"])
def test_the_authors_file_gives_the_authors_chunks(folder, tmp_path, names, key):
    path = write_file(tmp_path / "vision_backbone--1_checkpoint.pt", names)
    backbone = load_backbone(str(folder), attn_implementation="eager")
    load_vision_backbone(backbone.model, path)
    check(backbone, key, 2, True, 4)
    load_vision_backbone(backbone.model, path)  # once more, onto a model with FiLM
    check(backbone, key, 2, True, 4)


@torch.no_grad()
def test_the_authors_adapter_goes_with_their_file(folder, tmp_path):
    adapter = write_adapter(tmp_path / "lora_adapter")
    backbone = load_backbone(str(folder), attn_implementation="eager")
    with pytest.raises(VlaError, match="an adapter of a run with FiLM, on a model without.*vision_backbone--"):
        attach_adapter(backbone.model, adapter)
    load_vision_backbone(backbone.model, write_file(tmp_path / "v.pt", NAMES))
    adapted = attach_adapter(backbone.model, adapter)
    assert not any("vision_backbone" in name for name, _ in adapted.named_parameters() if "lora_" in name)
    check(backbone, "adapter", 2, True, 4)
    backbone.model = adapted.merge_and_unload()
    check(backbone, "adapter", 2, True, 4)


def test_lora_is_scaled_by_the_runs_alpha(folder, tmp_path):
    path, layer = write_file(tmp_path / "v.pt", NAMES), PART + "featurizer.blocks.0.block.attn.qkv"
    model = load_backbone(str(folder)).model
    own = model.vision_backbone.featurizer.blocks[0].attn.qkv.weight
    base, product = own.detach().clone(), values(f"{layer}.lora_B.default.weight", [96, 32])
    product = product @ values(f"{layer}.lora_A.default.weight", [32, 32])
    for alpha, scale in ((None, 0.5), (32, 1.0), (0, 0.0)):
        load_vision_backbone(model, path, alpha)
        torch.testing.assert_close(own.detach(), base + scale * product)


BAD = [
    ({PART + "featurizer.blocks.1.shift.bias": None}, "missing featurizer.blocks.1.shift.bias"),
    ({PART + "featurizer.blocks.1.block.norm1.bias": None}, "missing featurizer.blocks.1.norm1.bias"),
    ({PART + "featurizer.blocks.3.scale.bias": torch.zeros(32)}, "unexpected featurizer.blocks.3.scale.bias"),
    ({PART + "featurizer.blocks.0.scale.weight": torch.zeros(32, 65)}, r"scale.weight \[32, 65\] for \[32, 64\]"),
    ({PART + "featurizer.blocks.0.block.attn.qkv.lora_A.default.weight": None}, "without .*lora_A.* both factors"),
    ({PART + "featurizer.blocks.0.block.attn.qkv.lora_B.default.weight": None}, "without .*lora_B"),
    ({PART + "featurizer.blocks.0.block.attn.qkv.base_layer.weight": None}, "without .*qkv.base_layer.weight"),
    ({PART + "featurizer.blocks.0.block.attn.qkv.lora_A.default.weight": torch.zeros(8, 32)}, r"shapes \[8, 32\], \[96, 32\]"),
    ({PART + "featurizer.blocks.0.block.attn.qkv.lora_magnitude_vector": torch.zeros(96)}, "magnitude.*named as peft's"),
    ({PART + "featurizer.blocks.0.block.attn.qkv.lora_A.other.weight": torch.zeros(8, 32)}, "lora_A.other.* named as peft's"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "message"), BAD)
def test_a_wrong_file_is_refused_and_changes_nothing(folder, tmp_path, changes, message):
    model = load_backbone(str(folder)).model
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(VlaError, match=message):
        load_vision_backbone(model, write_file(tmp_path / "v.pt", NAMES, **changes))
    assert not model.vision_backbone.film
    after = model.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)


def test_another_module_and_a_model_with_lora_are_refused(folder, tmp_path):
    model = load_backbone(str(folder)).model
    torch.save(L1Head(8, 8, 2).state_dict(), tmp_path / "head.pt")
    with pytest.raises(VlaError, match="a vision backbone with FiLM"):
        load_vision_backbone(model, tmp_path / "head.pt")
    backbone = load_backbone(str(folder))
    attach_lora(backbone, r=2, alpha=2, dropout=0.0, parts=("vision",), train_ids=[])
    with pytest.raises(VlaError, match="missing .*lora_A"):
        load_vision_backbone(backbone.model.get_base_model(), write_file(tmp_path / "v.pt", NAMES))


@torch.no_grad()
def test_fresh_film_is_a_new_linear_layer_near_the_identity(folder):
    """Bit for bit what the authors' `nn.Linear(llm_dim, width)` draws; maps of zeros change nothing at all."""
    backbone = load_backbone(str(folder))
    inputs = inputs_of(backbone, range(1))
    without = action_states(backbone.model, **inputs, n_actions=H * D)
    torch.manual_seed(5)
    film.add_film(backbone.model)
    torch.manual_seed(5)
    for i, width in ((0, 32), (1, 32), (2, 32)):
        for part in film.MAPS:
            linear, made = (
                torch.nn.Linear(64, width),
                getattr(backbone.model.vision_backbone.featurizer.blocks[i], part),
            )
            assert torch.equal(linear.weight, made.weight) and torch.equal(linear.bias, made.bias)
    fresh = action_states(backbone.model, **inputs, n_actions=H * D)
    assert 1e-3 < (fresh - without).abs().max() < 1
    for parameter in film.film_parameters(backbone.model).values():
        parameter.zero_()
    torch.testing.assert_close(action_states(backbone.model, **inputs, n_actions=H * D), without, atol=1e-6, rtol=0)


def test_names_and_shapes_are_the_authors(filmed):
    found = {PART + name: list(parameter.shape) for name, parameter in film.film_parameters(filmed.model).items()}
    assert found == {name: shape for name, shape in PLAIN.items() if ".scale." in name or ".shift." in name}
    assert {PART + name: list(shape) for name, shape in film.film_shapes(filmed.model).items()} == found


def test_the_mean_is_over_prompt_and_stop_and_leaves_padding_out(filmed):
    model, inputs = filmed.model, inputs_of(filmed, range(4))
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    assert mask.min() == 0
    for flipped in ((), (1,)):  # padding on the left, and on the right
        found = film.mean_language(model, ids.flip(flipped), mask.flip(flipped), STOP_ID)
        for i in range(4):
            words = model.get_input_embeddings()(torch.cat([ids[i][mask[i] == 1], torch.tensor([STOP_ID])]))
            torch.testing.assert_close(found[i], words.mean(0))


def test_saved_and_loaded_again(folder, filmed):
    tensors = {name: parameter.detach() for name, parameter in film.film_parameters(filmed.model).items()}
    model = load_backbone(str(folder)).model
    assert film.film_parameters(model) == {}
    with pytest.raises(VlaError, match=r"at some\.safetensors: missing featurizer\.blocks\.0\.scale\.bias"):
        film.load_film(
            model, {k: v for k, v in tensors.items() if k != "featurizer.blocks.0.scale.bias"}, "some.safetensors"
        )
    assert not model.vision_backbone.film
    film.load_film(model, tensors, "some.safetensors")
    assert all(torch.equal(tensors[name], parameter) for name, parameter in film.film_parameters(model).items())


def gradients(backbone: Backbone) -> dict[str, torch.Tensor]:
    inputs = inputs_of(backbone, range(2))
    base = backbone.model.get_base_model() if hasattr(backbone.model, "peft_config") else backbone.model
    head = filled(L1Head(64, 64, D), "action_head.")
    head(action_states(base, **inputs, n_actions=H * D)).square().mean().backward()
    return {name: p.grad for name, p in base.named_parameters() if p.requires_grad}  # pyright: ignore[reportReturnType]


@pytest.mark.parametrize("film_first", [True, False])
def test_film_trains_beside_lora_and_checkpointing_changes_nothing(folder, film_first):
    found = []
    for checkpointing in ("none", "transformers", "blocks"):
        backbone = load_backbone(str(folder))
        base = backbone.model
        if film_first:
            film.load_film(base, film_values(), "the goldens")
        torch.manual_seed(0)
        attach_lora(backbone, r=2, alpha=2, dropout=0.0, parts=("llm", "projector", "vision"), train_ids=[])
        if not film_first:
            film.load_film(base, film_values(), "the goldens")
        trained = film.train_film(base)
        assert len(trained) == 2 * 2 * 2 * 2  # two featurizers, two blocks that run, scale and shift, weight and bias
        backbone.model.train()
        if checkpointing == "transformers":
            backbone.model.gradient_checkpointing_enable()
        elif checkpointing == "blocks":
            assert checkpoint_layers(backbone.model) == 2 + 3 + 3
        found.append(gradients(backbone))
    assert all(
        gradient is not None and gradient.abs().max() > 0 for name, gradient in found[0].items() if "lora_A" not in name
    )
    assert sum(".scale." in name or ".shift." in name for name in found[0]) == 16
    assert not any("lora_" in name and (".scale" in name or ".shift" in name) for name in found[0])
    assert not any("blocks.2." in name for name in found[0])
    for other in found[1:]:
        assert other.keys() == found[0].keys()
        for name, gradient in found[0].items():
            torch.testing.assert_close(other[name], gradient, atol=1e-6, rtol=1e-4)


def test_pefts_own_all_linear_leaves_film_alone(folder):
    model = load_backbone(str(folder)).model
    film.add_film(model)
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear"))
    names = [name for name, _ in adapted.named_parameters() if "lora_" in name]
    assert any("blocks.0.attn.qkv" in name for name in names)
    assert not any(".scale." in name or ".shift." in name for name in names)


@torch.no_grad()
def test_float32_film_in_a_bfloat16_model(folder, filmed):
    backbone = load_backbone(str(folder), dtype="bfloat16")
    film.load_film(backbone.model, film_values(), "the goldens")
    assert {p.dtype for p in film.film_parameters(backbone.model).values()} == {torch.bfloat16}
    film.train_film(backbone.model)
    inputs = inputs_of(filmed, range(1))
    want = action_states(filmed.model, **inputs, n_actions=H * D)
    inputs["pixel_values"] = inputs["pixel_values"].bfloat16()
    found = action_states(backbone.model, **inputs, n_actions=H * D)
    assert found.dtype == torch.bfloat16
    assert (found.float() - want).abs().mean() < 0.05


def test_misuse_is_refused(folder, filmed):
    inputs = inputs_of(filmed, range(1), images=1)
    with pytest.raises(VlaError, match="no mean embedding of the prompt, with FiLM.*action_states"):
        filmed.model(**inputs)
    with pytest.raises(VlaError, match="a model with FiLM; expected one without"):
        film.add_film(filmed.model)
    backbone = load_backbone(str(folder))
    with pytest.raises(VlaError, match="a mean embedding of the prompt, without FiLM"):
        backbone.model.get_image_features(inputs["pixel_values"], torch.zeros(1, 64))
    checkpoint_layers(backbone.model)
    with pytest.raises(VlaError, match="add FiLM before gradient checkpointing"):
        film.add_film(backbone.model)
