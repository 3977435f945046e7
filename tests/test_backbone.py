"""Every family: left padding, teacher forcing = generation, legal ids only, keyed draws, images and words matter."""

import numpy as np
import pytest
import torch
from families import FAMILIES
from PIL import Image

from vla.adapters import lora_targets, part_of, place_actions
from vla.backbone import Backbone, load_backbone
from vla.tokenizers.grammar import free_grammar
from vla.types import VlaError

PROMPTS = ["open the drawer", "close the window State: 12 200 31 255 and a longer text", "open the drawer"]
LEGAL = torch.arange(300, 400)
T = 5
GRAMMAR = free_grammar(LEGAL.tolist(), T)


@pytest.fixture(scope="module", params=sorted(FAMILIES))
def backbone(request, tmp_path_factory) -> Backbone:
    folder = tmp_path_factory.mktemp(request.param)
    FAMILIES[request.param](folder)
    return load_backbone(str(folder))


@pytest.fixture(scope="module")
def images() -> list[Image.Image]:
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 255, (64, 64, 3), dtype=np.uint8)) for _ in range(3)]


def test_sampled_logprobs_equal_a_teacher_forced_pass(backbone, images):
    inputs = backbone.encode(PROMPTS, [[image] for image in images])
    ids, logprobs = backbone.sample(inputs, GRAMMAR)
    with torch.no_grad():
        logits = backbone.action_logits(inputs, ids)[..., LEGAL].float()
    forced = torch.log_softmax(logits, -1).gather(2, (ids - LEGAL[0])[..., None])[..., 0]
    torch.testing.assert_close(logprobs, forced, atol=1e-4, rtol=0)
    assert torch.equal(logits.argmax(-1) + LEGAL[0], ids)  # greedy


def test_a_row_does_not_depend_on_its_batch(backbone, images):
    keys = [(7, 0), (7, 1), (7, 2)]
    together, logprobs = backbone.sample(backbone.encode(PROMPTS, [[i] for i in images]), GRAMMAR, 1.0, keys)
    order = [2, 0]
    apart, apart_logprobs = backbone.sample(
        backbone.encode([PROMPTS[i] for i in order], [[images[i]] for i in order]),
        GRAMMAR,
        1.0,
        [keys[i] for i in order],
    )
    assert torch.equal(together[order], apart)
    torch.testing.assert_close(logprobs[order], apart_logprobs, atol=1e-4, rtol=0)


def test_only_legal_ids_are_produced(backbone, images):
    legal = torch.tensor([301, 317, 399])
    inputs = backbone.encode(PROMPTS, [[image] for image in images])
    ids, _ = backbone.sample(inputs, free_grammar(legal.tolist(), 40), 3.0, [(i,) for i in range(3)])
    assert set(ids.unique().tolist()) <= set(legal.tolist())


def test_image_and_instruction_change_the_logits(backbone, images):
    ids = LEGAL[:T][None]

    def logits(prompt, image):
        with torch.no_grad():
            return backbone.action_logits(backbone.encode([prompt], [[image]]), ids)

    base = logits(PROMPTS[0], images[0])
    assert (logits(PROMPTS[0], images[1]) - base).abs().max() > 1e-3
    assert (logits("close the door now", images[0]) - base).abs().max() > 1e-3


def test_two_images_per_prompt(backbone, images):
    inputs = backbone.encode(PROMPTS[:1], [[images[0], images[1]]])
    swapped = backbone.encode(PROMPTS[:1], [[images[1], images[0]]])
    ids = LEGAL[:T][None]
    with torch.no_grad():
        assert (backbone.action_logits(inputs, ids) - backbone.action_logits(swapped, ids)).abs().max() > 1e-4


def test_lora_targets_cover_the_chosen_parts(backbone):
    vision = lora_targets(backbone.model, ["vision"])
    projector = lora_targets(backbone.model, ["projector"])
    llm = lora_targets(backbone.model, ["llm"])
    assert vision and projector and llm and not set(vision) & set(llm)
    assert len(llm) == 2 * 7, "two layers of q k v o gate up down"
    assert not any("lm_head" in name for name in llm)
    assert all(part_of(name) == "projector" for name in projector)


@pytest.mark.parametrize("init", ["mean"])
def test_added_tokens_start_at_the_mean(tmp_path, init):
    FAMILIES["llava"](tmp_path)
    backbone = load_backbone(str(tmp_path))
    n_before = len(backbone.processor.tokenizer)
    mean = backbone.model.get_input_embeddings().weight[:n_before].mean(0)
    placement, n_added = place_actions(backbone, "added", 200, init)
    assert (placement.ids[0], n_added) == (n_before, 200)
    assert backbone.n_embeddings >= n_before + 200
    rows = backbone.model.get_input_embeddings().weight[list(placement.ids)]
    torch.testing.assert_close(rows, mean.expand(200, -1))
    head = backbone.model.get_output_embeddings().weight[list(placement.ids)]
    assert head.std(0).max() < 1e-6, "untied head rows are equal too"


def test_reserved_needs_reserved_tokens(backbone):
    with pytest.raises(VlaError, match="got 0 reserved tokens; expected at least 256"):
        place_actions(backbone, "reserved", 256)


def test_unknown_backbone_says_what_to_do():
    with pytest.raises(VlaError, match="did you mean 'tiny'"):
        load_backbone("tinny")


def test_missing_checkpoint_is_one_clear_error(tmp_path):
    with pytest.raises(VlaError, match="cannot be opened as an image-text-to-text model"):
        load_backbone(str(tmp_path))
