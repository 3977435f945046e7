"""Our OpenVLA equals the authors' own code, given the same small random weights.

tests/golden/openvla.npz and tests/fixtures/openvla were made by the authors' modelling and processing code
(`prismatic/extern/hf` of openvla/openvla@c8f03f4) with torch 2.13 on CPU, transformers 4.40.1, tokenizers 0.19.1, timm
0.9.16 and Pillow 13: `OpenVLAForActionPrediction` with two variants of `vision_backbone_id`, `timm.create_model` made to
build the widths of `openvla_tiny.TIMM_ARGS`, every parameter set by `openvla_tiny.fill`; `save_pretrained` wrote the JSON
files (`timm_model_args` was then added to config.json). The image processor was made as their conversion script does,
under a default dtype of bfloat16. For each of 3 frames x 4 instructions, batch 1, float32, eager attention: the
processor's ids; logits with token 29871 appended; greedy ids of `generate` (eager and SDPA agreed); `predict_action` for
two `unnorm_key`s (SDPA, as its mask is one short). Their own eager and SDPA logits differ by 9.5e-6.

tests/fixtures/openvla/lora is the adapter that peft 0.11.1 saved of the same model with the settings of their
`vla-scripts/finetune.py` (all-linear, gaussian; rank 4), every LoRA weight 0.3 * `fill`; `lora_last` are its logits.

Run once by hand, both with difference 0: what `vla import --copy` writes, opened by the authors' loader (logits, actions);
the ids of 303 prompts by the full Llama-2 vocabulary, ours, theirs, and theirs from the tokenizer that we saved.
"""

import hashlib
from pathlib import Path

import numpy as np
import openvla_tiny as tiny
import pytest
import torch
from PIL import Image

from vla.backbone import Backbone, load_backbone
from vla.import_policy import Settings, run
from vla.policy import load_policy
from vla.types import Observation

GOLDEN = np.load(Path(__file__).parent / "golden" / "openvla.npz")
PROMPTS = [tiny.PROMPT.format(text.lower()) for text in tiny.INSTRUCTIONS]
FRAMES = tiny.frames()
IMAGES = [Image.fromarray(frame) for frame in FRAMES]
PAIRS = [(image, prompt) for image in IMAGES for prompt in PROMPTS]


@pytest.fixture(scope="module", params=["fused", "single"])
def variant(request, tmp_path_factory) -> tuple[str, Path]:
    return request.param, tiny.write_checkpoint(tmp_path_factory.mktemp("openvla") / request.param, request.param)


@pytest.fixture(scope="module", params=["eager", "sdpa"])
def opened(request, variant) -> tuple[str, str, Backbone]:
    name, folder = variant
    return name, request.param, load_backbone(str(folder), attn_implementation=request.param)


def golden_rows(logits: torch.Tensor, name: str) -> np.ndarray:
    """The columns that were kept: (..., V) -> (..., 256 + 64)."""
    return torch.cat([logits[..., tiny.ACTION_IDS], logits[..., GOLDEN[f"{name}_columns"]]], -1).numpy()


def test_images_and_ids_are_the_authors(variant):
    name, folder = variant
    processor = load_backbone(str(folder)).processor
    for i, image in enumerate(IMAGES):
        pixels = processor.image_processor([image])
        np.testing.assert_allclose(pixels[0, :, ::16, ::16].numpy(), GOLDEN[f"{name}_pix"][i], atol=1e-6, rtol=0)
        assert hashlib.sha256(pixels.numpy().tobytes()).digest() == GOLDEN[f"{name}_sha"][i].tobytes()
    for (image, prompt), want in zip(PAIRS, GOLDEN[f"{name}_tok"], strict=True):
        got = processor(prompt, image)
        assert got["input_ids"][0].tolist() == want[want >= 0].tolist()
        assert got["attention_mask"].shape == got["input_ids"].shape


@torch.no_grad()
def test_logits_are_the_authors(opened):
    name, attention, backbone = opened
    assert backbone.model.language_model.config._attn_implementation == attention
    for i, (image, prompt) in enumerate(PAIRS):
        logits = backbone.model(**backbone.encode([prompt], [[image]])).logits[0]
        np.testing.assert_allclose(golden_rows(logits[-1], name), GOLDEN[f"{name}_last"][i], atol=1e-5, rtol=0)
        every = logits[:, GOLDEN[f"{name}_columns"][:4]].abs().mean(0).numpy()
        np.testing.assert_allclose(every, GOLDEN[f"{name}_every"][i], atol=1e-5, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_batch_is_its_rows(opened, side):
    name, _, backbone = opened
    tokenizer = backbone.processor.tokenizer
    tokenizer.padding_side = side
    try:
        for i in range(0, 12, 4):
            pairs = PAIRS[i : i + 4]
            inputs = backbone.encode([prompt for _, prompt in pairs], [[image] for image, _ in pairs])
            assert inputs["attention_mask"].min() == 0  # the prompts do differ in length
            logits = backbone.model(**inputs).logits
            mask = inputs["attention_mask"]
            last = mask.shape[1] - 1 - mask.flip(1).argmax(1)
            got = golden_rows(logits[torch.arange(4), last], name)
            np.testing.assert_allclose(got, GOLDEN[f"{name}_last"][i : i + 4], atol=2e-5, rtol=0)
    finally:
        tokenizer.padding_side = "left"


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
def test_the_authors_ids_are_taken_as_they_are(opened, side):
    """Without places for the patches, in batches, padded on either side; `forward` and `generate` make room."""
    name, _, backbone = opened
    tokenizer = backbone.processor.tokenizer
    tokenizer.padding_side = side
    try:
        raw = backbone.processor([prompt + " " for prompt in PROMPTS], [IMAGES[0]] * 4, padding=True)
    finally:
        tokenizer.padding_side = "left"
    assert 29871 in raw["input_ids"][0]
    logits = backbone.model(**raw).logits
    assert logits.shape[1] == raw["input_ids"].shape[1] + backbone.model.n_image_tokens
    last = (raw["input_ids"] == 29871).long().cumsum(1).argmax(1) + backbone.model.n_image_tokens
    np.testing.assert_allclose(
        golden_rows(logits[torch.arange(4), last], name), GOLDEN[f"{name}_last"][:4], atol=2e-5, rtol=0
    )
    if side == "left":
        generated = backbone.model.generate(**raw, max_new_tokens=7, do_sample=False)[:, -7:]
        assert generated.tolist() == GOLDEN[f"{name}_ids"][:4].tolist()


@pytest.mark.parametrize("unnorm_key", ["bridge_orig", "plain"])
def test_actions_are_the_authors(variant, unnorm_key, tmp_path):
    """`predict_action` = `act`, one observation at a time and all twelve at once."""
    name, folder = variant
    out = run(Settings(str(folder), tmp_path / "policy", unnorm_key=unnorm_key, dtype="float32"))
    policy = load_policy(out)
    observations = [
        Observation({"image": frame}, None, text) for frame in FRAMES for text in tiny.INSTRUCTIONS
    ]  # fmt: skip
    wanted = GOLDEN[f"{name}_acts"][:, ("bridge_orig", "plain").index(unnorm_key)]
    for chunks in (policy.act(observations), [policy.act([observation])[0] for observation in observations]):
        assert [chunk.token_ids.tolist() for chunk in chunks] == GOLDEN[f"{name}_ids"].tolist()
        actions = np.concatenate([chunk.actions for chunk in chunks])
        np.testing.assert_allclose(actions, wanted.astype(np.float32), atol=2e-7, rtol=0)  # ours are float32
