"""Batch norms computed by the convolutions before them: the same numbers, the same state, the same training."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import nn

from vla.backbone import load_backbone
from vla.fold_norms import fold_frozen_norms

# Norms that are folded; the MobileNets' stems are not.
FAMILIES = {"tf_efficientnet_lite0": 49, "mobilenetv3_small_050": 33, "mobilenetv4_conv_small": 44}


def _random(name: str) -> nn.Module:
    torch.manual_seed(0)
    model = timm.create_model(name, pretrained=False).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.5)
            nn.init.normal_(module.running_mean, std=0.5)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
    return model


@pytest.mark.parametrize("name", FAMILIES)
def test_outputs_equal_the_unfolded_ones(name: str) -> None:
    model, image = _random(name), torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        before = model(image)
        assert fold_frozen_norms(model) == FAMILIES[name]
        torch.testing.assert_close(model(image), before, rtol=1e-4, atol=1e-4)
        assert not torch.equal(model(image), before)  # it did take the other way


def test_other_architectures_are_left_alone() -> None:
    assert fold_frozen_norms(timm.create_model("resnet18", pretrained=False)) == 0


def test_state_is_unchanged_and_training_takes_the_original_way() -> None:
    model, reference = _random("tf_efficientnet_lite0"), _random("tf_efficientnet_lite0")
    fold_frozen_norms(model)
    assert list(model.state_dict()) == list(reference.state_dict())
    image = torch.randn(2, 3, 64, 64)
    for mode in (False, True):  # eval with gradients, then batch statistics
        outputs = [m.train(mode)(image) for m in (model, reference)]
        assert torch.equal(*outputs)
        for m, output in zip((model, reference), outputs, strict=True):
            m.zero_grad()
            output.square().mean().backward()
        gradients = [[p.grad for p in m.parameters()] for m in (model, reference)]
        assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True) if a is not None and b is not None)
    assert torch.equal(model.bn1.running_mean, reference.bn1.running_mean)


def test_the_built_in_backbone_is_folded() -> None:
    tower = load_backbone("tiny").model.model.vision_tower
    assert "forward" in vars(tower.timm_model.conv_stem)
