"""OpenVLA-OFT+ (FiLM) as a policy directory, and OFT from the Hub: imported from the authors' files, their actions are theirs.

Goldens and files as in tests/test_openvla_film.py.
"""

import json
from pathlib import Path

import numpy as np
import oft_tiny
import openvla_tiny as tiny
import pytest
from oft_tiny import KEY, write_heads, write_oft
from test_hub import COMMIT, running
from test_openvla_film import GOLDEN, NAMES, PLAIN, STATES, write_adapter, write_file
from test_push import ModelHub

from vla.import_policy import Settings, run
from vla.openvla.checkpoint import weight_shapes
from vla.policy import load_policy
from vla.spec import read_spec
from vla.types import VlaError


def acted(out: Path) -> np.ndarray:
    policy = load_policy(out)
    return np.stack([chunk.actions for chunk in policy.act(oft_tiny.observations(policy.statistics, STATES))])


def test_merged_weights_and_a_vision_backbone_of_its_own(tmp_path):
    source = write_oft(tmp_path / "oft", step="1")
    write_file(source / "vision_backbone--1_checkpoint.pt", NAMES)
    out = run(Settings(str(source), tmp_path / "policy", dtype="float32"))
    spec = read_spec(out)
    assert (
        spec.head is not None and spec.head.film and spec.backbone.weights == "merged"
    )  # the vision weights are others
    assert sorted(p.stem for p in (out / "head").iterdir()) == ["action_head", "film", "proprio_projector"]
    np.testing.assert_allclose(acted(out), GOLDEN["lora_l1"], atol=2e-5, rtol=0)
    assert weight_shapes(out / "model") == weight_shapes(source)  # what the authors' loader opens, without FiLM
    assert "FiLM in the vision transformers" in (out / "README.md").read_text()


def test_discrete_without_lora(tmp_path):
    source = write_oft(tmp_path / "oft", head=False, step="1")
    write_file(source / "vision_backbone--1_checkpoint.pt", PLAIN)
    out = run(Settings(str(source), tmp_path / "policy", dtype="float32"))
    np.testing.assert_allclose(acted(out), GOLDEN["plain_2_1_discrete"], atol=1e-6, rtol=0)


def test_lora_that_was_not_merged(tmp_path):
    base = tiny.write_checkpoint(tmp_path / "base")
    run_folder = tmp_path / "run--1_chkpt"
    write_heads(run_folder, step="1")
    write_file(run_folder / "vision_backbone--1_checkpoint.pt", NAMES)
    adapter = write_adapter(run_folder / "lora_adapter")
    statistics = {KEY: oft_tiny.statistics_of(base)}
    (run_folder / "dataset_statistics.json").write_text(json.dumps(statistics))
    out = run(Settings(str(base), tmp_path / "policy", adapter=adapter, dtype="float32"))
    np.testing.assert_allclose(acted(out), GOLDEN["adapter_l1"], atol=2e-5, rtol=0)
    (run_folder / "vision_backbone--1_checkpoint.pt").unlink()
    with pytest.raises(VlaError, match=r"a run with FiLM, on a model without.*vision_backbone--\*_checkpoint.pt"):
        run(Settings(str(base), tmp_path / "other", adapter=adapter, dtype="float32"))
    assert not (tmp_path / "other").exists()


@pytest.fixture
def hub(tmp_path, monkeypatch):
    server = ModelHub(tmp_path / "hub")
    with running(server, monkeypatch, tmp_path / "cache"):
        yield server


def test_from_the_hub(hub, tmp_path):
    """Its .pt files are fetched one by one; code and other pickles never."""
    source = write_oft(hub.root / "authors" / "oft")
    (source / "modeling_prismatic.py").write_text("raise SystemExit")
    (source / "optimizer.pt").write_bytes(b"a pickle")
    out = run(Settings("authors/oft", tmp_path / "policy", dtype="float32"))
    spec = read_spec(out)
    assert (spec.backbone.source, spec.backbone.revision) == ("authors/oft", COMMIT) and spec.head is not None
    fetched = {path.name for path in (tmp_path / "cache").rglob("snapshots/*/*")}
    assert "action_head--150000_checkpoint.pt" in fetched
    assert not fetched & {"modeling_prismatic.py", "optimizer.pt"}
    np.testing.assert_allclose(
        acted(out), np.load(Path(__file__).parent / "golden" / "openvla.npz")["oft_l1"], atol=2e-5, rtol=0
    )
