"""OpenVLA behind the `Backbone` interface: what is seen matters, rows are independent, everything trains that should."""

import dataclasses
from pathlib import Path

import numpy as np
import openvla_tiny as tiny
import pytest
import torch
import torchvision.transforms.functional as tvf
from PIL import Image

from vla.adapters import attach_lora, place_actions
from vla.backbone import Backbone, load_backbone
from vla.new_policy import create_policy
from vla.openvla.config import IMAGE_TOKEN_ID
from vla.openvla.model import place_images
from vla.openvla.processor import OpenVlaImageProcessor
from vla.policy import load_policy
from vla.spec import ActionSpec, ImageSpec, PromptSpec
from vla.tokenizers.grammar import free_grammar
from vla.types import Observation, VlaError

PROMPTS = [tiny.PROMPT.format(text.lower()) for text in tiny.INSTRUCTIONS]
IMAGES = [Image.fromarray(frame) for frame in tiny.frames()]
LEGAL = list(range(31744, 32000))
GRAMMAR = free_grammar(LEGAL, 7)


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    return tiny.write_checkpoint(tmp_path_factory.mktemp("openvla") / "fused")


@pytest.fixture(scope="module")
def backbone(source) -> Backbone:
    return load_backbone(str(source))


@torch.no_grad()
def test_image_and_instruction_both_change_the_output(backbone):
    def logits(prompt: str, image: Image.Image) -> torch.Tensor:
        inputs = backbone.encode([prompt], [[image]])
        return backbone.action_logits(inputs, torch.tensor([[31800]]))

    reference = logits(PROMPTS[0], IMAGES[0])
    assert (reference - logits(PROMPTS[0], IMAGES[1])).abs().max() > 0.1
    assert (reference - logits(PROMPTS[2], IMAGES[0])).abs().max() > 1e-3
    flat = Image.fromarray(np.full((224, 224, 3), 128, np.uint8))
    assert (reference - logits(PROMPTS[0], flat)).abs().max() > 0.1


def test_the_bare_space_is_there_once_and_seen(backbone):
    for prompts in (PROMPTS, [prompt + " " for prompt in PROMPTS], [PROMPTS[0] + " ", *PROMPTS[1:]]):
        inputs = backbone.encode(prompts, [[IMAGES[0]]] * 4)
        assert inputs["input_ids"].shape == inputs["attention_mask"].shape
        assert (inputs["input_ids"][:, -2:] == torch.tensor([29901, 29871])).all()
        assert (inputs["attention_mask"][:, -2:] == 1).all()
        assert ((inputs["input_ids"] == IMAGE_TOKEN_ID).sum(1) == 256).all()


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_sampling_is_teacher_forcing_in_batches_and_alone(backbone, temperature):
    keys = [(7, i) for i in range(4)] if temperature else []
    inputs = backbone.encode(PROMPTS, [[IMAGES[i % 3]] for i in range(4)])
    ids, logprobs = backbone.sample(inputs, GRAMMAR, temperature, keys)
    with torch.no_grad():
        logits = backbone.action_logits(inputs, ids)[..., LEGAL].float()
    forced = torch.log_softmax(logits, -1).gather(2, (ids - LEGAL[0])[..., None])[..., 0]
    torch.testing.assert_close(logprobs, forced, atol=1e-4, rtol=0)
    for i in range(4):
        alone, _ = backbone.sample(
            backbone.encode([PROMPTS[i]], [[IMAGES[i % 3]]]), GRAMMAR, temperature, keys[i : i + 1]
        )
        assert alone.tolist() == ids[i : i + 1].tolist()


def test_generation_without_a_cache_is_the_same(backbone):
    inputs = backbone.encode(PROMPTS[:2], [[IMAGES[0]], [IMAGES[2]]])
    with_cache, without = (
        backbone.model.generate(**inputs, max_new_tokens=5, do_sample=False, use_cache=use_cache)
        for use_cache in (True, False)
    )
    assert torch.equal(with_cache, without)


def test_places_for_patches_go_after_bos_wherever_it_is():
    ids = torch.tensor([[9, 9, 1, 5, 6], [1, 7, 8, 5, 6]])
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    placed, grown, labels = place_images(ids, mask, ids, 2, 2)
    assert placed.tolist() == [[9, 9, 1, 0, 0, 5, 6], [1, 0, 0, 7, 8, 5, 6]]
    assert grown is not None and grown.tolist() == [[0, 0, 1, 1, 1, 1, 1], [1] * 7]
    assert labels is not None and labels.tolist() == [[9, 9, 1, -100, -100, 5, 6], [1, -100, -100, 7, 8, 5, 6]]
    again = place_images(placed, grown, labels, 2, 2)
    assert all(a is b for a, b in zip(again, (placed, grown, labels), strict=True))
    with pytest.raises(VlaError, match="take <unk> out"):
        place_images(torch.tensor([[1, 0, 4]]), None, None, 2, 1)
    with pytest.raises(VlaError, match="1 images for 2 prompts"):
        place_images(ids, mask, None, 2, 1)


def test_what_openvla_cannot_see_is_said(backbone):
    with pytest.raises(VlaError, match="2 images for a prompt; expected one"):
        backbone.encode(PROMPTS[:1], [IMAGES[:2]])
    with pytest.raises(VlaError, match="<unk>"):
        backbone.encode(["pick up <unk>"], [IMAGES[:1]])


def test_everything_that_runs_trains_and_checkpointing_changes_nothing(source):
    gradients = []
    for checkpointing in (False, True):
        backbone = load_backbone(str(source))
        torch.manual_seed(0)
        attach_lora(backbone, r=2, alpha=2, dropout=0.0, parts=("llm", "projector", "vision"), train_ids=[])
        model = backbone.model
        if checkpointing:
            model.gradient_checkpointing_enable()
        model.train()
        inputs = backbone.encode(PROMPTS[:2], [[IMAGES[0]], [IMAGES[1]]])
        backbone.action_logits(inputs, torch.full((2, 7), 31800)).square().mean().backward()
        assert model.base_model.model.vision_backbone.fused_featurizer.grad_checkpointing == checkpointing
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    assert all(gradient is not None for gradient in gradients[0].values())
    assert {"vision", "projector", "language"} <= {name.split(".")[2].split("_")[0] for name in gradients[0]}
    assert not any("blocks.2." in name or "attn_pool" in name for name in gradients[0])  # these never run
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, atol=1e-6, rtol=1e-4)


def test_labels_give_the_loss_of_the_logits(backbone):
    inputs = backbone.processor([prompt + " " for prompt in PROMPTS[:1]], IMAGES[:1])
    ids = torch.cat([inputs["input_ids"], torch.tensor([[31800, 31900, 2]])], 1)
    labels = ids.masked_fill(torch.arange(ids.shape[1])[None] < ids.shape[1] - 3, -100)
    with torch.no_grad():
        out = backbone.model(input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=inputs["pixel_values"], labels=labels)  # fmt: skip
    expected = torch.nn.functional.cross_entropy(out.logits[0, -4:-1], ids[0, -3:])
    torch.testing.assert_close(out.loss, expected)


def test_added_tokens_grow_the_model(source, tmp_path):
    backbone = load_backbone(str(source))
    placement, n_added = place_actions(backbone, "added", 256)
    assert (n_added, placement.ids[0], backbone.n_embeddings) == (256, 32001, 32257)
    backbone.model.save_pretrained(tmp_path)
    backbone.processor.save_pretrained(tmp_path)
    again = load_backbone(str(tmp_path))
    assert again.n_embeddings == 32257 and again.processor.tokenizer.convert_tokens_to_ids("<act_255>") == 32256
    inputs = again.encode(PROMPTS[:1], [IMAGES[:1]])
    ids, _ = again.sample(inputs, free_grammar(list(placement.ids), 3))
    assert ids.shape == (1, 3)


def test_a_policy_on_it_saves_and_loads(source, tmp_path):
    statistics = {"d": {"action": {"q01": [-1.0] * 7, "q99": [1.0] * 7, "mask": [True] * 6 + [False]}}}
    policy = create_policy(
        str(source), name="p", action=ActionSpec(tuple("xyzabg"), 1), image=ImageSpec(("image",), 224),
        prompt=PromptSpec(), statistics={"d": {"action": {k: v[:6] for k, v in statistics["d"]["action"].items()}}},
        placement="tail", lora_r=2, lora_parts=("llm", "projector", "vision"),
    )  # fmt: skip
    with torch.no_grad():
        for name, parameter in policy.backbone.model.named_parameters():
            if parameter.requires_grad and "lora_B" in name:
                parameter.copy_(torch.from_numpy(0.1 * tiny.fill(name, tuple(parameter.shape))))
    policy.save(tmp_path / "policy", stage="test", settings={})
    observations = [Observation({"image": frame}, None, "open the drawer") for frame in tiny.frames()]
    for a, b in zip(policy.act(observations), load_policy(tmp_path / "policy").act(observations), strict=True):
        assert np.array_equal(a.actions, b.actions) and a.ok


def test_bfloat16_stays_near(source, backbone):
    half = load_backbone(str(source), dtype="bfloat16")
    assert half.model.dtype == torch.bfloat16
    with torch.no_grad():
        a, b = (
            x.action_logits(x.encode(PROMPTS, [[IMAGES[0]]] * 4), torch.full((4, 1), 31800)) for x in (half, backbone)
        )
    assert (a.float() - b).abs().max() < 0.6 and (a.float() - b).abs().mean() < 0.05  # logits reach 15


SINGLE = {
    "input_sizes": [[3, 224, 224]], "interpolations": ["bicubic"], "means": [[0.485, 0.456, 0.406]], "stds": [[0.229, 0.224, 0.225]],
}  # fmt: skip


@pytest.mark.parametrize("size", [(300, 200), (201, 333), (224, 224), (100, 640)])
@pytest.mark.parametrize("strategy", ["resize-naive", "resize-crop", "letterbox"])
def test_every_resize_strategy_is_torchvisions(strategy, size):
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))
    seen = image
    if strategy == "letterbox":
        border = [int((max(size) - size[0]) / 2), int((max(size) - size[1]) / 2)]
        seen = tvf.pad(image, border * 2, fill=(123, 116, 103), padding_mode="constant")
    target = (224, 224) if strategy == "resize-naive" else 224
    seen = tvf.center_crop(tvf.resize(seen, target, tvf.InterpolationMode.BICUBIC, antialias=True), [224, 224])
    want = tvf.normalize(tvf.to_tensor(seen), *SINGLE["means"], *SINGLE["stds"])
    got = OpenVlaImageProcessor({**SINGLE, "image_resize_strategy": strategy})([image])[0]
    torch.testing.assert_close(got, want, atol=1e-6, rtol=0)


def test_grey_and_transparent_images_become_rgb(backbone):
    for mode in ("L", "RGBA"):
        image = IMAGES[0].convert(mode)
        got = backbone.processor.image_processor([image])
        torch.testing.assert_close(got, backbone.processor.image_processor([image.convert("RGB")]))


def test_the_spec_of_a_policy_is_the_processors_image_path(backbone):
    """vla.inputs resizes first; the processor then finds the size it wants."""
    from vla.inputs import prepare_image

    spec = dataclasses.replace(ImageSpec(("image",), 224), resize_filter="bicubic")
    for frame in tiny.frames():
        torch.testing.assert_close(
            backbone.processor.image_processor([prepare_image(frame, spec)]),
            backbone.processor.image_processor([Image.fromarray(frame)]), atol=0, rtol=0,
        )  # fmt: skip
