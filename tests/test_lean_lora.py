"""A lean LoRA layer computes what PEFT's does, and leaves to PEFT what is not plain."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from vla.lean_lora import lean_lora


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(16, 24), nn.Linear(24, 8, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(torch.tanh(self.first(x)))


def pair(**options: object) -> tuple[nn.Module, nn.Module]:
    """PEFT's own, and a lean copy."""
    torch.manual_seed(0)
    config = LoraConfig(r=4, lora_alpha=2, target_modules=["first", "second"], init_lora_weights=False, **options)  # pyright: ignore[reportArgumentType]
    plain = get_peft_model(Net(), config)  # pyright: ignore[reportArgumentType]
    lean = copy.deepcopy(plain)
    assert lean_lora(lean) == 2
    return plain, lean


def results(model: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    """The output, and the gradients of the input and of every parameter that trains."""
    given = x.clone().requires_grad_(True)
    out = model(given)
    out.float().square().sum().backward()
    return [out, *(p.grad for p in (given, *model.parameters()) if p.grad is not None)]


@pytest.mark.parametrize("shape", [(5, 16), (2, 5, 16), (2, 3, 5, 16)])
def test_outputs_and_gradients_are_pefts(shape):
    x = torch.randn(shape)
    plain, lean = pair()
    found, wanted = results(lean, x), results(plain, x)
    assert len(found) == len(wanted) == 2 + 4
    for a, b in zip(found, wanted, strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def test_under_autocast():
    x = torch.randn(2, 5, 16)
    with torch.autocast("cpu", torch.bfloat16):
        plain, lean = pair()
        found, wanted = results(lean, x), results(plain, x)
    assert found[0].dtype == torch.bfloat16
    for a, b in zip(found, wanted, strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a.float(), b.float(), atol=0.1, rtol=0.05)


@pytest.mark.parametrize(
    "options", [{"use_dora": True}, {"lora_bias": True}, {"lora_dropout": 0.5}, {"use_rslora": True}]
)
def test_what_is_not_plain_is_left_to_peft(options):
    x = torch.randn(3, 16)
    plain, lean = pair(**options)
    for model in (plain, lean):
        torch.manual_seed(1)
        model.train()
    outs = []
    for model in (plain, lean):
        torch.manual_seed(1)
        outs.append(results(model, x))
    for a, b in zip(*outs, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def test_switched_off_merged_or_of_another_type():
    x = torch.randn(3, 16)
    plain, lean = pair()
    with plain.disable_adapter(), lean.disable_adapter():  # pyright: ignore[reportCallIssue]
        torch.testing.assert_close(lean(x), plain(x))
    for model in (plain, lean):
        model.merge_adapter()  # pyright: ignore[reportCallIssue]
    torch.testing.assert_close(lean(x), plain(x))
    plain, lean = (model.to(torch.bfloat16) for model in pair())
    for model in (plain, lean):  # a policy that acts in bfloat16, its adapter in float32
        for name, p in model.named_parameters():
            p.data = p.data.float() if "lora_" in name else p.data
    torch.testing.assert_close(lean(x.bfloat16()), plain(x.bfloat16()))
