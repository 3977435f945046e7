"""Files of torch.save are read without unpickling; whatever is not a state dict is refused."""

import collections
import os
from pathlib import Path

import pytest
import torch

from vla.openvla.oft import L1Head, ProprioProjector, load_head, load_proprio
from vla.openvla.torch_file import read_tensors
from vla.types import VlaError


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64])
def test_tensors_come_back(tmp_path, dtype):
    base = torch.arange(24).to(dtype)
    shared = base.view(4, 6)
    state = collections.OrderedDict(
        a=shared, b=shared.t(), c=base[5:9], d=torch.nn.Parameter(torch.ones(2, 3)), e=torch.zeros(0, 4), f=torch.tensor(3.0)
    )  # fmt: skip
    torch.save(state, tmp_path / "x.pt")
    found = read_tensors(tmp_path / "x.pt")
    assert set(found) == set(state)
    for name, tensor in state.items():
        assert torch.equal(found[name], tensor) and found[name].dtype == tensor.dtype


def test_heads_load_as_ddp_saved_them(tmp_path):
    torch.manual_seed(0)
    for module, load in ((L1Head(8, 16, 7), load_head), (ProprioProjector(8, 5), load_proprio)):
        torch.save({f"module.{name}": t for name, t in module.state_dict().items()}, tmp_path / "h.pt")
        again = load(tmp_path / "h.pt")
        assert all(torch.equal(t, module.state_dict()[name]) for name, t in again.state_dict().items())
    head = {name: t for name, t in L1Head(8, 16, 7).state_dict().items() if "layer_norm2" not in name}
    torch.save(head, tmp_path / "h.pt")
    with pytest.raises(VlaError, match=r"missing model\.layer_norm2\.bias"):
        load_head(tmp_path / "h.pt")
    with pytest.raises(VlaError, match="a proprio projector"):
        load_proprio(tmp_path / "h.pt")


class Evil:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_nothing_is_run(tmp_path):
    target = tmp_path / "made"
    torch.save({"a": torch.zeros(1), "b": Evil(target)}, tmp_path / "evil.pt")
    with pytest.raises(VlaError, match="mkdir"):
        read_tensors(tmp_path / "evil.pt")
    assert not target.exists()


@pytest.mark.parametrize("value, text", [
    ({"a": 3}, "more than tensors"),
    ({"a": {"b": torch.zeros(1)}}, "more than tensors"),
    ([torch.zeros(1)], "EMPTY_LIST"),
])  # fmt: skip
def test_what_is_no_state_dict_is_refused(tmp_path, value, text):
    torch.save(value, tmp_path / "x.pt")
    with pytest.raises(VlaError, match=text):
        read_tensors(tmp_path / "x.pt")


def test_damaged_files_are_refused(tmp_path):
    torch.save({"a": torch.zeros(1000)}, tmp_path / "x.pt")
    data = (tmp_path / "x.pt").read_bytes()
    for i in range(0, len(data), 97):
        (tmp_path / "cut.pt").write_bytes(data[:i])
        with pytest.raises(VlaError, match=r"cut\.pt"):
            read_tensors(tmp_path / "cut.pt")
    (tmp_path / "text.pt").write_text("no archive")
    with pytest.raises(VlaError, match="not a zip file"):
        read_tensors(tmp_path / "text.pt")
