"""`vla finetune` in OpenVLA-OFT's way: one pass per chunk, an L1 or a discrete head, the state as a token, FiLM."""

import dataclasses
from pathlib import Path

import numpy as np
import openvla_tiny as tiny
import pytest
import torch
from oft_tiny import write_oft
from safetensors.torch import load_file
from test_memory import measured
from training import fake_dataset, sft_settings

from vla import import_policy, merge
from vla.backbone import load_backbone
from vla.files import read_jsonl
from vla.finetune import rl, sft
from vla.finetune.data.chunks import Sample
from vla.finetune.sft_memory import estimate_step
from vla.finetune.sft_model import ready_model
from vla.finetune.sft_parallel import parallel_loss, parallel_targets
from vla.finetune.sft_setup import build_policy, open_datasets
from vla.openvla.oft_model import inner
from vla.policy import load_policy
from vla.spec import read_spec
from vla.testing import FakeSuite
from vla.types import Observation, VlaError

OFT = {
    "bins": 256, "image_size_px": 224, "horizon": 3, "head": "l1", "proprio": True, "state": False, "batch_size": 2, "lr": 5e-3,
    "steps": 4, "save_every_steps": 2, "eval_every_steps": 4, "lora_parts": ("llm", "projector"),
}  # fmt: skip
FRAMES = tiny.frames()[:2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("oft")
    fake_dataset(folder)
    tiny.write_checkpoint(folder / "openvla")
    return folder


def settings_of(folder: Path, out: Path, **changes: object) -> sft.Settings:
    return sft_settings(folder, **{**OFT, "out": out, "backbone": str(folder / "openvla"), **changes})


def seen(state: tuple[float, float] = (0.3, 0.6)) -> list[Observation]:
    return [Observation({"front": f}, np.array(state, np.float32), "reach the green square") for f in FRAMES]


def losses(run: Path) -> list[float]:
    return [row["loss"] for row in read_jsonl(run / "metrics.jsonl") if "loss" in row]


@pytest.fixture(scope="module")
def straight(folder) -> Path:
    """FiLM and LoRA on all linear layers, in one go."""
    out = folder / "straight"
    sft.run(settings_of(folder, out, steps=8, film=True, lora_parts=("all-linear",), lora_dropout=0.1, gradient_checkpointing=True))  # fmt: skip
    return out


def test_it_learns_and_opens(straight):
    rows = read_jsonl(straight / "metrics.jsonl")
    assert np.mean(losses(straight)[-3:]) < np.mean(losses(straight)[:3])
    held = next(row for row in rows if "holdout_loss" in row)
    assert held["holdout_loss"] == pytest.approx(held["holdout_l1"]) and held["holdout_l1_physical/dx"] > 0
    assert not any("accuracy" in name for row in rows for name in row)
    policy = load_policy(straight / "policy")
    chunks = policy.act(seen())
    assert chunks[0].actions.shape == (3, 2) and chunks[0].token_ids is None
    assert np.abs(policy.act(seen((0.9, 0.1)))[0].actions - chunks[0].actions).max() > 1e-5  # it sees the state
    files = {path.stem for path in (straight / "policy" / "head").iterdir()}
    assert files == {"action_head", "proprio_projector", "film"}
    assert not any("oft." in name for name in load_file(straight / "policy" / "adapter" / "adapter_model.safetensors"))


def test_all_of_head_projector_and_film_trains(straight):
    found = load_file(straight / "checkpoints" / "step-00000008" / "trainable.safetensors")
    names = {name.removeprefix("base_model.model.") for name in found if "lora_" not in name}
    parts = inner(load_policy(straight / "policy").backbone.model)
    wanted = {f"oft.{name}" for name, _ in parts.oft.named_parameters()}
    film = {n for n in names if n.startswith("vision_backbone")}
    assert names == wanted | film and any(name.endswith("blocks.1.scale.weight") for name in film)
    assert not any("blocks.2." in name for name in film)  # nothing runs the last block
    assert not any("lm_head" in name for name in found)  # nor, with an L1 head, the language model's
    earlier = load_file(straight / "checkpoints" / "step-00000006" / "trainable.safetensors")
    assert all(not torch.equal(found[name], earlier[name]) for name in found if "lora_" not in name)


def test_resumed_equals_uninterrupted(folder, straight):
    same = {
        "film": True,
        "lora_parts": ("all-linear",),
        "lora_dropout": 0.1,
        "gradient_checkpointing": True,
        "steps": 8,
    }
    stopped = settings_of(folder, folder / "stopped", **same)
    loop_steps, real = [], sft.Loop._optimizer_step

    def stop_after_five(loop, batch):
        loop_steps.append(loop.step)
        if len(loop_steps) == 5:
            loop._stop = True
        return real(loop, batch)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sft.Loop, "_optimizer_step", stop_after_five)
        with pytest.raises(SystemExit):
            sft.run(stopped)
    sft.run(dataclasses.replace(stopped, resume=True))
    assert losses(folder / "stopped") == losses(straight)
    for path in sorted((straight / "policy").rglob("*.safetensors")):
        a, b = load_file(path), load_file(folder / "stopped" / "policy" / path.relative_to(straight / "policy"))
        assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a), path.name


def test_accumulating_is_one_batch(folder):
    """Chunks that run beyond the end of their episode among them: the mean is over valid numbers of the whole batch."""
    runs = [
        sft.run(
            settings_of(folder, folder / f"batch{size}", batch_size=size, grad_accumulation=4 // size, steps=2, lr=1e-3)
        )
        for size in (1, 4)
    ]
    assert losses(folder / "batch1") == pytest.approx(losses(folder / "batch4"), rel=1e-4)
    a, b = (load_file(run / "head" / "action_head.safetensors") for run in runs)
    for name in a:
        torch.testing.assert_close(a[name], b[name], atol=2e-4, rtol=0)


@pytest.fixture(scope="module")
def discrete(folder) -> Path:
    return sft.run(settings_of(folder, folder / "discrete", head="discrete", steps=8, loss_over="actions")).parent


def test_discrete(folder, discrete):
    assert losses(discrete)[-1] < losses(discrete)[0]
    policy = load_policy(discrete / "policy")
    chunks = policy.act(seen())
    assert chunks[0].token_ids.shape == (6,) and chunks[0].logprobs.shape == (6,)
    assert set(chunks[0].token_ids) <= set(policy.legal_ids.tolist())
    assert "holdout_action_token_accuracy" in next(
        r for r in read_jsonl(discrete / "metrics.jsonl") if "holdout_loss" in r
    )
    inputs = policy.encode(seen())
    ids = torch.from_numpy(np.stack([c.token_ids for c in chunks]))
    valid = torch.ones_like(ids, dtype=torch.bool)
    narrow, wide = (
        float(parallel_loss(policy, policy.backbone.model, inputs, ids, valid, n)[0]) for n in (True, False)
    )
    assert 0 < narrow < wide  # of the same logits, over fewer of them
    assert narrow == pytest.approx(-sum(c.logprobs.sum() for c in chunks), rel=1e-4)


def test_merged_is_the_adapter(straight, discrete, tmp_path, capsys):
    out = merge.run(merge.Settings(straight / "policy", tmp_path / "merged"))
    assert "largest change of an action" in capsys.readouterr().out
    before, after = load_policy(straight / "policy"), load_policy(out)
    for a, b in zip(before.act(seen()), after.act(seen()), strict=True):
        np.testing.assert_allclose(a.actions, b.actions, atol=1e-4)
    assert 0 < after.spec.provenance[-1]["action_change"] < 1e-3 and after.spec.head == before.spec.head
    (tmp_path / "merged" / "head" / "film.safetensors").unlink()
    with pytest.raises(VlaError, match="no head/film.safetensors"):
        load_policy(out)
    logits = merge.probe_logits(load_policy(discrete / "policy"))
    assert logits.shape == (2, 6, 256)  # what a merge of it compares


def test_the_loss_is_the_mean_of_what_is_valid(straight):
    """By hand: |predicted - recorded| of the steps before the end of the episode."""
    policy = load_policy(straight / "policy")
    actions = np.array([[0.05, -0.05], [0.1, 0.1], [0.1, 0.1]], np.float32)
    samples = [
        Sample({"front": f}, np.array([0.2, 0.4], np.float32), "a", actions, np.array([False, False, True]), "fake")
        for f in FRAMES
    ]
    targets, valid = parallel_targets(policy, samples)
    assert valid.tolist() == [[True] * 4 + [False] * 2] * 2 and targets.shape == (2, 6)
    inputs = policy.encode([Observation(s.images, s.state, s.instruction) for s in samples], None, ["fake", "fake"])
    loss, figures, predicted = parallel_loss(policy, policy.backbone.model, inputs, targets, valid, False)
    wanted = policy.normalizer_of("fake").normalize(actions)[:2]
    got = np.abs(predicted.numpy().reshape(2, 3, 2)[:, :2] - wanted).sum()
    assert float(loss) == pytest.approx(got, rel=1e-5) == figures[0]
    acted = policy.normalizer.unnormalize(predicted.numpy().reshape(2, 3, 2))
    np.testing.assert_allclose(acted, [c.actions for c in policy.act([Observation(s.images, s.state, "a") for s in samples])], atol=1e-6)  # fmt: skip


def test_dry_run_estimates(folder, capsys):
    sft.run(settings_of(folder, folder / "dry", film=True, dry_run=True))
    shown = capsys.readouterr().out
    assert "peak of a training step" in shown and "adapters or trained weights" in shown
    assert not (folder / "dry").exists()
    for changes in ({"film": True, "gradient_checkpointing": True}, {"head": "discrete"}):
        settings = settings_of(folder, folder / "measured", **changes)
        dataset, statistics = open_datasets(settings)
        policy = build_policy(settings, dataset, statistics, "cpu")
        ready_model(settings, policy.backbone.model)
        estimated = estimate_step(settings, dataset, policy).peak_bytes
        assert estimated == pytest.approx(measured(settings, dataset, policy), rel=0.15)


def test_an_imported_policy_goes_on(folder, straight, tmp_path):
    """The authors' checkpoint, fine-tuned further: head, projector, statistics and chunk length stay."""
    source = write_oft(tmp_path / "oft", proprio=False)
    policy = import_policy.run(
        import_policy.Settings(str(source), tmp_path / "policy", dtype="float32", cameras=("front",))
    )
    with pytest.raises(VlaError, match="fake with 2 action dimensions"):
        sft.run(sft_settings(folder, out=tmp_path / "run", from_=str(policy), steps=1))
    ours = straight / "policy"
    again = sft.run(sft_settings(folder, out=tmp_path / "again", from_=str(ours), steps=2, batch_size=2, lr=1e-3))
    spec = load_policy(again).spec
    assert spec.head is not None and (spec.head.kind, spec.head.film, spec.action.horizon) == ("l1", True, 3)
    with pytest.raises(VlaError, match=r"an OpenVLA-OFT checkpoint.*vla import .*start --from"):
        sft.run(settings_of(folder, tmp_path / "no", backbone=str(source)))


def test_all_weights_can_train(folder):
    out = sft.run(settings_of(folder, folder / "full", method="full", lora_parts=("all",), film=True, steps=1))
    assert read_spec(out).backbone.weights == "merged"
    names = [name for path in (out / "model").glob("*.safetensors") for name in load_file(path)]
    assert names and not any("oft." in name or ".scale." in name for name in names)  # an OpenVLA as its authors know it
    chunks, policy = load_policy(out).act(seen()), load_policy(out, quantization="int8")
    np.testing.assert_allclose(policy.act(seen())[0].actions, chunks[0].actions, atol=0.05)


def test_reinforcement_learning_is_refused(straight, tmp_path):
    settings = rl.Settings(policy=straight / "policy", out=tmp_path / "rl", suite="fake")
    with pytest.raises(VlaError, match=r"parallel decoding \(l1\), which has no distribution"):
        rl.run(settings, FakeSuite())


def test_compiled_pass_is_the_pass(folder, straight):
    """Nothing in it looks at values, so it can be compiled."""
    policy = load_policy(straight / "policy")
    inputs = policy.encode(seen())
    ids = inputs["input_ids"]
    assert (ids == 0).sum(1).tolist() == [load_backbone(str(folder / "openvla")).model.n_image_tokens + 1] * 2
    want = policy.backbone.model(**inputs, n_actions=6)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.compiler, "is_compiling", lambda: True)
        torch.testing.assert_close(policy.backbone.model(**inputs, n_actions=6), want)
