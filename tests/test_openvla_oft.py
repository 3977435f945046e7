"""OpenVLA-OFT's pass equals the authors' own code, given the same small random weights.

`oft_*` in tests/golden/openvla.npz: `predict_action` of `prismatic/extern/hf/modeling_prismatic.py`, `L1RegressionActionHead`
and `ProprioProjector` (moojink/openvla-oft@213c5ff, transformers 4.40.1, SDPA) on the weights of tests/openvla_tiny.py,
LIBERO's constants (8 x 7 actions, 8 state dimensions), two images, batch 1, statistics `bridge_orig`. Their fork of
transformers was replaced by `LlamaModel._update_causal_mask` that answers zeros. With stock transformers the same calls
gave actions up to 0.20 away.
"""

from pathlib import Path

import numpy as np
import openvla_tiny as tiny
import pytest
import torch
from PIL import Image

from vla.backbone import load_backbone
from vla.openvla.oft import L1Head, ProprioProjector, action_states
from vla.tokenizers.uniform import UniformTokenizer
from vla.types import VlaError

GOLDEN = np.load(Path(__file__).parent / "golden" / "openvla.npz")
H, D, S = 8, 7, 8


def filled(module: torch.nn.Module, prefix: str) -> torch.nn.Module:
    state = {
        name: torch.from_numpy(tiny.fill(prefix + name, tuple(tensor.shape)).astype(np.float32))
        for name, tensor in module.state_dict().items()
    }
    module.load_state_dict(state)
    return module.eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tiny.write_checkpoint(tmp_path_factory.mktemp("openvla") / "fused")


def inputs_of(backbone, rows: range) -> dict[str, torch.Tensor]:
    frames = [Image.fromarray(frame) for frame in tiny.frames()]
    prompts = [tiny.PROMPT.format(tiny.INSTRUCTIONS[i].lower()) + " " for i in rows]
    inputs = backbone.processor(prompts, [frames[i % 3] for i in rows], padding=True)
    wrist = backbone.processor.image_processor([frames[(i + 1) % 3] for i in rows])
    return {**inputs, "pixel_values": torch.cat([inputs["pixel_values"], wrist], dim=1)}


def unnormalized(backbone, actions: np.ndarray) -> np.ndarray:
    entry = backbone.config.norm_stats["bridge_orig"]["action"]
    low, high = np.array(entry["q01"]), np.array(entry["q99"])
    return np.where(entry["mask"], 0.5 * (actions + 1) * (high - low + 1e-8) + low, actions)


@torch.no_grad()
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("batch", [1, 4])
def test_chunks_are_the_authors(folder, attention, batch):
    backbone = load_backbone(str(folder), attn_implementation=attention)
    head, projector = filled(L1Head(64, 64, D), "action_head."), filled(ProprioProjector(64, S), "proprio_projector.")
    for start in range(0, 4, batch):
        rows = range(start, start + batch)
        state = projector(torch.from_numpy(GOLDEN["oft_states"][rows.start : rows.stop]))
        states = action_states(backbone.model, **inputs_of(backbone, rows), n_actions=H * D, proprio=state)
        want = GOLDEN["oft_hidden"][rows.start : rows.stop]
        np.testing.assert_allclose(states[:, :, :8].numpy(), want, atol=1e-5, rtol=0)
        actions = unnormalized(backbone, head(states).numpy().astype(np.float64))
        np.testing.assert_allclose(actions, GOLDEN["oft_l1"][rows.start : rows.stop], atol=1e-5, rtol=0)
        ids = backbone.model.get_output_embeddings()(states).argmax(-1).numpy()
        values = UniformTokenizer().to_values((31999 - ids).clip(0, 255)).reshape(-1, H, D)
        want = GOLDEN["oft_discrete"][rows.start : rows.stop]
        np.testing.assert_allclose(unnormalized(backbone, values), want, atol=1e-7, rtol=0)


@torch.no_grad()
def test_early_places_see_late_ones(folder):
    """Causal attention would leave the first hidden state as it is when the number of places changes."""
    backbone = load_backbone(str(folder))
    inputs = inputs_of(backbone, range(1))
    few, many = (action_states(backbone.model, **inputs, n_actions=n)[:, 0] for n in (7, 56))
    assert (few - many).abs().max() > 1e-3


def test_attention_that_takes_no_mask_is_refused(folder):
    backbone = load_backbone(str(folder))
    backbone.model.language_model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(VlaError, match="flash_attention_2 attention; expected eager or sdpa"):
        action_states(backbone.model, **inputs_of(backbone, range(1)), n_actions=56)


def test_right_padding_is_refused(folder):
    backbone = load_backbone(str(folder))
    backbone.processor.tokenizer.padding_side = "right"
    with pytest.raises(VlaError, match="padded on the right; expected left"):
        action_states(backbone.model, **inputs_of(backbone, range(4)), n_actions=56)
