"""OpenVLA-OFT as a policy directory: imported from the authors' files, opened, asked, saved, refused.

The numbers in tests/golden/openvla.npz are the authors' own (see tests/test_openvla_oft.py).
"""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import oft_tiny
import openvla_tiny as tiny
import pytest
import torch
from oft_tiny import KEY, D, H, S, write_heads, write_oft
from safetensors.torch import load_file, save_file
from serving import running

from vla import push
from vla.import_policy import Settings, run
from vla.normalize import action_normalizer, state_normalizer
from vla.openvla.oft_model import inner
from vla.policy import load_policy
from vla.serve.app import make_app
from vla.serve.client import PolicyClient
from vla.spec import HeadSpec, from_json, read_spec, to_json
from vla.types import Observation, VlaError

GOLDEN = np.load(Path(__file__).parent / "golden" / "openvla.npz")


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    return write_oft(tmp_path_factory.mktemp("oft") / "openvla-oft--150000_chkpt")


@pytest.fixture(scope="module")
def policy_dir(source, tmp_path_factory) -> Path:
    return run(Settings(str(source), tmp_path_factory.mktemp("policy") / "oft", dtype="float32"))


@pytest.fixture(scope="module")
def policy(policy_dir):
    return load_policy(policy_dir)


@pytest.fixture(scope="module")
def seen(policy) -> list[Observation]:
    return oft_tiny.observations(policy.statistics, GOLDEN["oft_states"])


def test_imported_l1_acts_as_the_authors(policy, seen):
    chunks = policy.act(seen)  # all at once: theirs were asked one by one
    got = np.stack([chunk.actions for chunk in chunks])
    np.testing.assert_allclose(got, GOLDEN["oft_l1"], atol=2e-5, rtol=0)
    assert all(chunk.ok and chunk.token_ids is None and chunk.logprobs is None for chunk in chunks)
    alone = policy.act(seen[1:2])[0].actions
    np.testing.assert_allclose(alone, chunks[1].actions, atol=1e-5)


def test_what_is_imported_is_written_down(policy_dir, policy, capsys, tmp_path, source):
    spec = read_spec(policy_dir)
    assert spec.head == HeadSpec("l1", policy.spec.head.state_names) and len(spec.head.state_names) == S
    assert (spec.action.horizon, spec.action.dim, spec.action.normalization) == (H, D, "bounds_q99")
    assert spec.image.cameras == ("image", "wrist_image") and spec.backbone.weights == "base"
    assert sorted(p.name for p in (policy_dir / "head").iterdir()) == ["action_head.safetensors", "proprio_projector.safetensors"]  # fmt: skip
    assert policy.metadata["state_names"][:3] == ["x_m", "y_m", "z_m"] and policy.metadata["horizon"] == H
    assert "an L1 regression head" in (policy_dir / "README.md").read_text()
    run(Settings(str(source), tmp_path / "again"))
    assert "OpenVLA-OFT, l1: chunks of 8, a state of 8, cameras image, wrist_image" in capsys.readouterr().out


def test_discrete_is_told_by_its_projector(tmp_path, seen):
    source = write_oft(tmp_path / "discrete", head=False)
    out = run(Settings(str(source), tmp_path / "policy", dtype="float32"))
    policy = load_policy(out)
    chunks = policy.act(seen)
    np.testing.assert_allclose([c.actions for c in chunks], GOLDEN["oft_discrete"], atol=1e-6, rtol=0)
    assert chunks[0].token_ids.shape == (H * D,) and (chunks[0].logprobs <= 0).all()
    sampling = load_policy(out, temperature=1.0)
    keyed = [dataclasses.replace(o, key=(1, i)) for i, o in enumerate(seen)]
    drawn = sampling.act(keyed)
    alone = sampling.act(keyed[2:3])[0]
    assert (drawn[2].token_ids == alone.token_ids).all() and (drawn[2].token_ids != chunks[2].token_ids).any()


def test_saved_again_and_copied_it_acts_the_same(policy, seen, source, tmp_path):
    want = [chunk.actions for chunk in policy.act(seen)]
    policy.save(tmp_path / "saved", stage="test", settings={}, refer=True)
    assert np.array_equal([c.actions for c in load_policy(tmp_path / "saved").act(seen)], want)
    copied = run(Settings(str(source), tmp_path / "copied", dtype="float32", copy=True))
    assert read_spec(copied).backbone.weights == "merged"
    assert not any("oft." in name for name in load_file(copied / "model" / "model.safetensors"))
    assert np.array_equal([c.actions for c in load_policy(copied).act(seen)], want)
    assert "head/action_head.safetensors" in push.files_of(copied)
    half = load_policy(copied, dtype="bfloat16").act(seen)
    np.testing.assert_allclose([c.actions for c in half], want, atol=0.2)


def test_lora_that_was_not_merged(tmp_path, seen):
    """checkpoint/lora_adapter and checkpoint/*.pt, with the base elsewhere."""
    base = tiny.write_checkpoint(tmp_path / "base")
    write_heads(tmp_path / "run--50000_chkpt", step="50000")
    tiny.write_adapter(tmp_path / "run--50000_chkpt" / "lora_adapter")
    statistics = {"mine": oft_tiny.statistics_of(base)}
    (tmp_path / "run--50000_chkpt" / "dataset_statistics.json").write_text(json.dumps(statistics))
    adapter = tmp_path / "run--50000_chkpt" / "lora_adapter"
    policy = load_policy(run(Settings(str(base), tmp_path / "policy", adapter=adapter, dtype="float32")))
    assert policy.spec.backbone.weights == "adapter" and policy.unnorm_key == "mine" and policy.spec.head is not None
    names = [name for name, _ in policy.backbone.model.named_modules() if ".oft." in name]
    assert names and not any("lora" in name for name in names)
    got = np.stack([chunk.actions for chunk in policy.act(seen)])
    assert 1e-3 < np.abs(got - GOLDEN["oft_l1"]).max() and np.isfinite(got).all()
    merged = run(Settings(str(base), tmp_path / "merged", adapter=adapter, dtype="float32", copy=True))
    np.testing.assert_allclose([c.actions for c in load_policy(merged).act(seen)], got, atol=1e-4)
    with pytest.raises(VlaError, match=r"a LoRA and no model.*--adapter .*lora_adapter"):
        run(Settings(str(adapter.parent), tmp_path / "none"))


def test_platforms(tmp_path, source):
    """ALOHA's bounds are minimum and maximum."""
    statistics = json.loads((source / "dataset_statistics.json").read_text())
    bridge = run(Settings(str(source), tmp_path / "bridge", platform="bridge", cameras=("image", "wrist_image")))
    assert read_spec(bridge).action.horizon == 5
    longer = run(Settings(str(source), tmp_path / "longer", horizon=12))
    assert read_spec(longer).action.horizon == 12
    action, state = statistics[KEY]["action"], statistics[KEY]["proprio"]
    assert action_normalizer(statistics, KEY, D, "bounds").q01.tolist() == action["min"]
    assert state_normalizer(statistics, KEY, S, "bounds").q99.tolist() == state["max"]
    low = np.array(state["min"], np.float32)
    assert np.allclose(state_normalizer(statistics, KEY, S, "bounds").normalize(low), -1, atol=1e-5)
    with pytest.raises(VlaError, match="platform aloha with 7 action dimensions; expected 14"):
        run(Settings(str(source), tmp_path / "no", platform="aloha"))


def test_diffusion_is_refused_by_name(tmp_path, source):
    folder = tmp_path / "diffusion"
    folder.mkdir()
    torch.save({"noise_predictor.mlp_resnet.fc1.weight": torch.zeros(2, 2)}, folder / "action_head--1_checkpoint.pt")
    with pytest.raises(VlaError, match=r"action_head--1_checkpoint.pt, of a diffusion head; expected an L1 head"):
        run(Settings(str(source), tmp_path / "out", heads=folder))
    torch.save({"fc1.weight": torch.zeros(2, 1)}, folder / "noisy_action_projector--1_checkpoint.pt")
    with pytest.raises(VlaError, match=r"noisy_action_projector--1_checkpoint.pt, of a diffusion head"):
        run(Settings(str(source), tmp_path / "out", heads=folder))


def other_head(folder: Path) -> None:
    torch.save(oft_tiny.filled(oft_tiny.L1Head(32, 32, D), "a."), folder / "action_head--1_checkpoint.pt")


def other_actions(folder: Path) -> None:
    torch.save(oft_tiny.filled(oft_tiny.L1Head(64, 64, 14), "a."), folder / "action_head--1_checkpoint.pt")


def other_state(folder: Path) -> None:
    write_heads(folder, proprio=False)
    torch.save(oft_tiny.filled(oft_tiny.ProprioProjector(64, 5), "p."), folder / "proprio_projector--1_checkpoint.pt")


def two_steps(folder: Path) -> None:
    write_heads(folder)
    write_heads(folder, step="5")


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (other_head, "for 32 hidden size; expected 64"),
        (other_actions, "for 14 action dimensions; expected 7"),
        (other_state, r"for 5 state dimensions, in the statistics of 'bridge_orig'; expected 8"),
        (two_steps, "one action_head"),
    ],
)
def test_files_of_another_model(make, text, tmp_path, source):
    (tmp_path / "heads").mkdir()
    make(tmp_path / "heads")
    with pytest.raises(VlaError, match=text):
        run(Settings(str(source), tmp_path / "out", heads=tmp_path / "heads"))
    assert not (tmp_path / "out").exists()


def test_head_is_named_against_the_files(tmp_path, source):
    plain = tiny.write_checkpoint(tmp_path / "plain")
    with pytest.raises(VlaError, match="no action_head--"):
        run(Settings(str(plain), tmp_path / "out", unnorm_key="plain", head="l1"))
    with pytest.raises(VlaError, match="--head tokens with action_head--150000_checkpoint.pt"):
        run(Settings(str(source), tmp_path / "out", head="tokens"))
    with pytest.raises(VlaError, match="--cameras a b; expected one"):
        run(Settings(str(plain), tmp_path / "out", unnorm_key="plain", cameras=("a", "b")))
    with pytest.raises(VlaError, match="--horizon 8 of a policy that answers in tokens"):
        run(Settings(str(plain), tmp_path / "out", unnorm_key="plain", horizon=8))
    found = run(Settings(str(plain), tmp_path / "discrete", unnorm_key="plain", head="discrete", cameras=("image",)))
    assert read_spec(found).head == HeadSpec("discrete")


def test_bad_observations(policy, seen):
    with pytest.raises(VlaError, match=r"no state; expected \(8,\): x_m"):
        policy.act([dataclasses.replace(seen[0], state=None)])
    with pytest.raises(VlaError, match=r"a state of shape \(3,\)"):
        policy.act([dataclasses.replace(seen[0], state=np.zeros(3, np.float32))])
    with pytest.raises(VlaError, match="expected finite numbers"):
        policy.act([dataclasses.replace(seen[0], state=np.full(8, np.nan, np.float32))])
    with pytest.raises(VlaError, match="send wrist_image"):
        policy.act([dataclasses.replace(seen[0], images={"image": seen[0].images["image"]})])


def test_bad_policy_directories(policy_dir, tmp_path):
    def copy(name: str) -> Path:
        return Path(shutil.copytree(policy_dir, tmp_path / name))

    with pytest.raises(VlaError, match="temperature 1.0 with an L1 head; expected 0"):
        load_policy(policy_dir, temperature=1.0)
    (missing := copy("missing") / "head" / "proprio_projector.safetensors").unlink()
    with pytest.raises(VlaError, match="no head/proprio_projector.safetensors"):
        load_policy(missing.parent.parent)
    damaged = copy("damaged") / "head" / "action_head.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:100])
    with pytest.raises(VlaError, match="a whole safetensors file"):
        load_policy(damaged.parent.parent)
    other = copy("other") / "head" / "action_head.safetensors"
    save_file({name: t[..., :3].contiguous() for name, t in load_file(other).items()}, other)
    with pytest.raises(VlaError, match="misshaped model.fc1"):
        load_policy(other.parent.parent)


def test_spec_of_before_opens_and_contradictions_do_not(policy):
    value = to_json(policy.spec)
    old = {name: item for name, item in value.items() if name != "head"}
    old["action"] = {name: item for name, item in value["action"].items() if name != "normalization"}
    assert from_json(old).head is None and from_json(old).action.normalization == "bounds_q99"
    with pytest.raises(VlaError, match="policy.head.kind: 'diffusion'"):
        from_json({**value, "head": {"kind": "diffusion"}})


def test_served(policy, seen):
    """Over HTTP an L1 chunk arrives as it left, without token ids."""
    with running(make_app(policy)) as address:
        chunk = PolicyClient(address).act(seen[:1])[0]
    np.testing.assert_allclose(chunk.actions, policy.act(seen[:1])[0].actions, atol=1e-5)
    assert chunk.token_ids is None and chunk.logprobs is None


def test_head_is_within_the_model(policy):
    """So that whatever wraps the model has it too."""
    names = {name for name, _ in policy.backbone.model.named_parameters()}
    assert {"oft.action_head.model.fc1.weight", "oft.proprio_projector.fc1.weight"} <= names
    assert inner(policy.backbone.model) is policy.backbone.model
