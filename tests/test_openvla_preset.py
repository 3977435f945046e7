"""`vla finetune openvla` and `--from`: training on from whatever OpenVLA people own, with one preset and no code.

tests/golden/openvla_finetune.json holds the losses of three steps of the authors' own loop: the statements of
`vla-scripts/finetune.py` (openvla/openvla@c8f03f4), executed by `benchmarks/finetune_loop_peer.py` in float32 on a CPU with
torch 2.13, transformers 4.40.1, peft 0.11.1 and timm 0.9.16, on the checkpoint of `openvla_tiny` and the samples of
`fixed_loop`, LoRA's weights 0.3 * `openvla_tiny.fill`.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import openvla_tiny as tiny
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from families import FAMILIES
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from training import fake_dataset, sft_settings, tiny_backbone

from vla import cli, import_policy, merge
from vla.adapters import lora_targets, place_actions
from vla.backbone import load_backbone
from vla.finetune import sft, sft_start
from vla.finetune.formats.lerobot_writer import LeRobotWriter
from vla.finetune.sft_batch import ended
from vla.finetune.sft_setup import build_policy, open_datasets
from vla.finetune.sft_start import read_start, source_kind, started
from vla.import_policy import V01_TEMPLATE
from vla.openvla.checkpoint import weight_shapes
from vla.policy import LocalPolicy, load_policy
from vla.types import Episode, Observation, Step, VlaError

GOLDEN = Path(__file__).parent / "golden" / "openvla_finetune.json"
NAMES = import_policy.NAMES
FRAMES = tiny.frames()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """openvla/, its LoRA lora/, a policy directory imported/ of seven actions, and the data fake/ (two actions), arm/ (seven)."""
    folder = tmp_path_factory.mktemp("preset")
    tiny.write_checkpoint(folder / "openvla")
    tiny.write_adapter(folder / "lora")
    fake_dataset(folder)
    arm(folder / "arm")
    imported = import_policy.Settings(
        str(folder / "openvla"), folder / "imported", "libero_spatial", cameras=("front",), dtype="float32"
    )
    import_policy.run(imported)
    return folder


def arm(folder: Path) -> None:
    """Frames of 224 px, seven actions, the gripper 0 or 1."""
    rng = np.random.default_rng(0)
    writer = LeRobotWriter(folder, 10, {"front": (224, 224)}, ("s",), NAMES, "made", image_mode="image")
    for text in tiny.INSTRUCTIONS:
        steps = []
        for k in range(3):
            frame = np.kron(rng.integers(0, 256, (14, 14, 3)), np.ones((16, 16, 1))).astype(np.uint8)
            action = np.append(rng.normal(0, 0.4, 6), k % 2).astype(np.float32)
            steps.append(Step(Observation({"front": frame}, np.full(1, k, np.float32), text), action, success=k == 2))
        writer.add_episode(Episode(steps, text, "made", success=True))
    writer.finalize()


def recipe(folder: Path, out: Path, **changes: object) -> sft.Settings:
    base = {
        "data": (str(folder / "arm"),), "out": out, "backbone": str(folder / "openvla"), "precision": "float32", "steps": 1,
        "batch_size": 2, "device": "cpu", "log_every_steps": 1, "holdout_episodes": 0, "cache_images": True, "lora_r": 4, "lora_alpha": 4,
    }  # fmt: skip
    return dataclasses.replace(sft.PRESETS["openvla"], **{**base, **changes})  # pyright: ignore[reportArgumentType]


def losses(out: Path) -> list[float]:
    return [row["loss"] for row in map(json.loads, (out / "metrics.jsonl").open()) if "loss" in row]


def fixed_loop(settings: sft.Settings) -> sft.Loop:
    """The loop of these settings; samples come in the order of the data."""
    AcceleratorState._reset_state()
    dataset, statistics = open_datasets(settings)
    policy = build_policy(settings, dataset, statistics, "cpu")
    loop = sft.Loop(settings, Accelerator(cpu=True), dataset, policy)
    n = settings.batch_size
    loop.stream = iter([[dataset[i] for i in range(k * n, k * n + n)] for k in range(len(dataset) // n)])
    return loop


def fill_lora(policy: LocalPolicy) -> None:
    with torch.no_grad():
        for name, p in policy.backbone.model.named_parameters():
            if p.requires_grad:
                p.copy_(torch.from_numpy(0.3 * tiny.fill(name.replace(".default", ""), tuple(p.shape))))


def test_the_losses_are_those_of_the_authors_script(folder, tmp_path):
    """Same places of LoRA, same loss (stop token and all), same updates: the third loss follows two optimiser steps."""
    loop = fixed_loop(recipe(folder, tmp_path / "run", batch_size=4, augment=False, crop_area=1.0))
    fill_lora(loop.policy)
    found = [loop._optimizer_step(4)["loss"] for _ in range(3)]
    np.testing.assert_allclose(found, json.loads(GOLDEN.read_text())["losses"], atol=2e-5, rtol=0)


def test_the_loss_with_the_stop_token_by_hand(folder, tmp_path):
    loop = fixed_loop(recipe(folder, tmp_path / "run", augment=False, crop_area=1.0))
    samples = next(loop.stream)
    ids, valid = loop.batches.targets(samples)
    assert loop.batches.n_targets(valid) == 2 * 8 and int(valid.sum()) == 2 * 7
    rows, backbone = ended(ids, 2), loop.policy.backbone
    assert rows[:, -1].tolist() == [2, 2]
    inputs = loop.policy.encode([Observation(s.images, None, s.instruction) for s in samples])
    logits = backbone.action_logits(inputs, rows)
    wanted = torch.nn.functional.cross_entropy(logits.flatten(0, 1), rows.flatten(), reduction="sum")
    torch.testing.assert_close(loop.batches.loss(samples, ids, valid).loss, wanted)


def test_rows_of_different_lengths_end_where_they_end():
    assert ended(torch.tensor([[5, 6, -1], [7, 8, 9]]), 2).tolist() == [[5, 6, 2, -1], [7, 8, 9, 2]]


def test_fine_tuned_merged_imported(folder, tmp_path, capsys):
    """The command line alone; the merged weights have the published names, and statistics where the authors look for them."""
    out = tmp_path / "tuned"
    flags = "--precision float32 --steps 4 --batch-size 2 --lr 0.01 --device cpu --lora-r 4 --log-every-steps 1".split()
    data = ["--data", str(folder / "arm"), "--out", str(out), "--holdout-episodes", "1", "--free-running-samples", "2"]
    assert cli.main(["finetune", "openvla", "--from", str(folder / "openvla"), *data, *flags]) == 0
    assert "is an OpenVLA" in capsys.readouterr().out
    found = losses(out)
    assert min(found) < found[0]
    policy = load_policy(out / "policy")
    spec, config = policy.spec, json.loads((out / "policy" / "adapter" / "adapter_config.json").read_text())
    assert (spec.image.resize_filter, spec.image.crop_area, spec.image.crop_order, spec.image.size_px) == ("lanczos3", 0.9, "after_resize", 224)  # fmt: skip
    assert (
        spec.tokens.placement == {"kind": "tail", "first_id": 31999, "step": -1, "n": 256} and spec.tokens.n_added == 0
    )
    assert (spec.prompt.template, spec.unnorm_key, spec.action.horizon) == ("In: What action should the robot take to {instruction}?\nOut:", "arm", 1)  # fmt: skip
    assert config["init_lora_weights"] == "gaussian" and not config["trainable_token_indices"]
    names = {name.rpartition(".lora_A")[0] for name, _ in policy.backbone.model.named_parameters()}
    linear = ("language_model.lm_head", "vision_backbone.featurizer.patch_embed.proj", "projector.fc3")
    assert {f"base_model.model.{name}" for name in linear} <= names
    merged = merge.run(merge.Settings(out / "policy", tmp_path / "merged"))
    assert weight_shapes(merged / "model") == weight_shapes(folder / "openvla")
    again = import_policy.run(
        import_policy.Settings(str(merged / "model"), tmp_path / "again", cameras=("front",), dtype="float32")
    )
    imported, whole = load_policy(again), load_policy(merged)
    assert imported.unnorm_key == "arm" and imported.statistics == whole.statistics
    seen = [Observation({"front": frame}, None, "open the drawer") for frame in FRAMES]
    inputs = policy.encode(seen)
    with torch.no_grad():
        a, b, c = (p.backbone.model(**inputs).logits[:, -1] for p in (policy, whole, imported))
    torch.testing.assert_close(a, b, atol=1e-4, rtol=0)
    assert torch.equal(b, c) and all(chunk.ok for chunk in imported.act(seen))


@pytest.fixture(scope="module")
def owned(folder) -> dict[str, Path]:
    """By kind, what may be given to --from; all act on front pictures with seven actions."""
    adapter = sft.run(recipe(folder, folder / "first", steps=2, lr=0.01)).resolve()
    merged = merge.run(merge.Settings(adapter, folder / "merged", check=False))
    return {"adapter": adapter, "merged": merged, "imported": folder / "imported"}


@pytest.mark.parametrize("kind", ["adapter", "merged", "imported"])
def test_a_policy_goes_on_as_it_was(folder, owned, kind, tmp_path):
    """With a learning rate of 0 it acts as before; spec and statistics are kept, and what was done is added."""
    source = owned[kind]
    crops = {} if kind != "imported" else {"augment": False}
    out = sft.run(
        recipe(folder, tmp_path / "on", from_=str(source), backbone="nothing/here", lr=0.0, horizon=5, **crops)
    )
    old, new = load_policy(source), load_policy(out)
    assert (new.spec.image, new.spec.prompt, new.spec.tokens.placement) == (
        old.spec.image,
        old.spec.prompt,
        old.spec.tokens.placement,
    )
    assert new.spec.action.horizon == 1 and new.spec.backbone.weights == "adapter"
    assert [entry["stage"] for entry in new.spec.provenance] == [*[e["stage"] for e in old.spec.provenance], "finetune"]
    assert old.statistics.items() <= new.statistics.items() and new.unnorm_key == "arm"
    seen = [Observation({"front": frame}, None, "open the drawer") for frame in FRAMES]
    assert [c.token_ids.tolist() for c in new.act(seen)] == [c.token_ids.tolist() for c in old.act(seen)]
    whole = merge.run(
        merge.Settings(out, tmp_path / "whole", check=False)
    )  # the result merges, onto whatever it stands on
    assert weight_shapes(whole / "model") == weight_shapes(folder / "openvla")


def test_a_lora_of_the_authors_script_goes_on(folder, tmp_path, capsys):
    loop = fixed_loop(started(recipe(folder, tmp_path / "a", from_=str(folder / "lora"), lora_r=32)))
    assert "as in " in capsys.readouterr().out and loop.settings.lora_r == 4
    model = loop.policy.backbone.model
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    assert any("lm_head.lora_A" in n for n in names) and not any(
        "blocks.2." in n for n in names
    )  # the last, which nothing runs
    out = sft.run(recipe(folder, tmp_path / "on", from_=str(folder / "lora"), lr=0.0))
    imported = import_policy.run(import_policy.Settings(
        str(folder / "openvla"), tmp_path / "theirs", "plain", adapter=folder / "lora", cameras=("front",), dtype="float32"
    ))  # fmt: skip
    new, theirs = load_policy(out), load_policy(imported)
    inputs = new.encode([Observation({"front": FRAMES[0]}, None, "open the drawer")])
    with torch.no_grad():
        assert torch.equal(new.backbone.model(**inputs).logits, theirs.backbone.model(**inputs).logits)
    assert new.unnorm_key == "arm" and list(new.statistics) == ["arm"]


def test_a_run_from_a_policy_resumes(folder, owned, tmp_path):
    settings = recipe(folder, tmp_path / "run", from_=str(owned["adapter"]), steps=2, save_every_steps=1)
    sft.run(settings)
    straight = load_policy(settings.out / "policy")
    (settings.out / "checkpoints" / "latest.json").write_text('{"checkpoint": "step-00000002"}')
    again = load_policy(sft.run(dataclasses.replace(settings, resume=True)))
    for a, b in zip(straight.backbone.model.parameters(), again.backbone.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_statistics_are_chosen_checked_and_listed(folder, owned, tmp_path, capsys):
    def policy(**changes: object) -> LocalPolicy:
        settings = started(recipe(folder, tmp_path / "run", **changes))
        dataset, found = open_datasets(settings)
        return build_policy(settings, dataset, found, "cpu")

    known = load_policy(folder / "imported").statistics
    kept = policy(from_=str(folder / "imported"), augment=False, unnorm_key="libero_spatial")
    assert kept.statistics["arm"] == known["libero_spatial"] and kept.spec.unnorm_key == "libero_spatial"
    assert "lie outside them and are clipped" in capsys.readouterr().err
    from_checkpoint = policy(unnorm_key="bridge_orig")
    assert set(from_checkpoint.statistics) == {"arm", "bridge_orig"} and from_checkpoint.unnorm_key == "bridge_orig"
    with pytest.raises(VlaError, match="unnorm_key 'bridge'; expected one of: arm, bridge_orig, libero_spatial, plain"):
        policy(unnorm_key="bridge")
    with pytest.raises(VlaError, match="statistics of 'bridge_orig' for 7 dimensions; expected 2"):
        policy(unnorm_key="bridge_orig", data=(str(folder / "fake"),))
    with pytest.raises(
        VlaError, match=r"fake with 2 action dimensions \(dx, dy\); expected 7, as the policy has \(x, y, z"
    ):
        policy(from_=str(owned["adapter"]), data=(str(folder / "fake"),))


def test_pictures_and_prompt_of_an_openvla(folder, tmp_path):
    v01 = tmp_path / "openvla-v01-7b"
    v01.symlink_to(folder / "openvla")

    def spec(**changes: object):
        settings = started(recipe(folder, tmp_path / "run", **changes))
        dataset, found = open_datasets(settings)
        return build_policy(settings, dataset, found, "cpu").spec

    assert spec(from_=str(v01)).prompt.template == V01_TEMPLATE
    whole = spec(augment=False, crop_area=1.0, cameras=("image=front",)).image
    assert (whole.cameras, whole.resize_filter, whole.crop_order) == (("image",), "lanczos3", "before_resize")
    libero = spec(protocol="openvla").image
    assert (libero.jpeg_quality, libero.rotation_deg, libero.crop_area) == (95, 180, 0.9)
    with pytest.raises(
        VlaError, match="cameras a, b for an OpenVLA; expected one: it sees one picture; fix: pass --cameras a"
    ):
        spec(cameras=("a=front", "b=front"))
    with pytest.raises(VlaError, match="image_size_px 128 for an OpenVLA of 224 px"):
        spec(image_size_px=128)


@pytest.mark.parametrize("changes, text", [
    ({"cameras": ()}, r"camera 'image'; expected one of front, the cameras of 'arm'.*image=KEY"),
    ({"cameras": ("front", "wrist")}, "cameras front, wrist; expected image, as the policy sees; fix: name the data's: image=KEY"),
    ({"cameras": ("image=front",), "augment": True}, "--augment with a policy that crops nothing"),
    ({"cameras": ("image=front",), "protocol": "openvla"}, "protocol openvla with --from a policy"),
])  # fmt: skip
def test_settings_that_a_policy_cannot_follow(folder, tmp_path, changes, text):
    source = import_policy.run(
        import_policy.Settings(str(folder / "openvla"), tmp_path / "p", "plain", dtype="float32")
    )
    settings = recipe(folder, tmp_path / "run", from_=str(source), **{"augment": False, **changes})
    with pytest.raises(VlaError, match=text):
        sft.run(settings)
    assert not settings.out.exists()


def test_sources_that_are_refused(folder, owned, tmp_path):
    with pytest.raises(VlaError, match="method dora with an adapter trained by lora; expected lora, or merged weights"):
        started(recipe(folder, folder / "x", from_=str(owned["adapter"]), method="dora"))
    with pytest.raises(
        VlaError,
        match="LoRA .*lora with backbone 'tiny', which is no OpenVLA or cannot be had now; expected the OpenVLA it was trained on",
    ):
        read_start(recipe(folder, folder / "x", from_=str(folder / "lora"), backbone="tiny"))
    with pytest.raises(VlaError, match="'nowhere'; expected 'tiny', a checkpoint folder"):
        sft.run(recipe(folder, folder / "x", from_="nowhere"))
    oft = tmp_path / "oft"
    oft.mkdir()
    for path in (folder / "openvla").iterdir():
        (oft / path.name).symlink_to(path)
    (oft / "action_head--1_checkpoint.pt").touch()
    with pytest.raises(VlaError, match=r"action_head--1_checkpoint\.pt, an OpenVLA-OFT checkpoint"):
        read_start(recipe(folder, folder / "x", from_=str(oft)))


@pytest.mark.parametrize("changes, text", [
    ({"loss_over": "actions"}, "--stop-token with loss_over 'actions'"),
    ({"method": "full"}, "--lora-parts all-linear with --method full; .*--lora-parts all"),
    ({"clip_norm": -1.0}, "clip_norm -1; expected a limit above 0, or 0 for none"),
])  # fmt: skip
def test_contradictions(changes, text):
    with pytest.raises(VlaError, match=text):
        dataclasses.replace(sft.PRESETS["openvla"], **changes)


def test_all_linear_of_other_models(tmp_path):
    """A head of its own gets LoRA, one that is the embedding does not; new action ids keep trained rows of the embedding."""
    for family, has_head in (("llava", True), ("paligemma", False)):
        FAMILIES[family](tmp_path / family)
        backbone = load_backbone(str(tmp_path / family))
        found = lora_targets(backbone.model, ("all-linear",))
        assert any(name.endswith("lm_head") for name in found) == has_head
        assert not any(name.endswith("lm_head") for name in lora_targets(backbone.model, ("all",)))


def test_narrow_logits_see_the_lora_of_the_head(folder):
    """The loss over actions alone, and RL, ask for the logits of a few ids."""
    policy = build_policy(*_opened(recipe(folder, folder / "x")), "cpu")
    fill_lora(policy)
    inputs = policy.encode([Observation({"front": FRAMES[0]}, None, "open the drawer")])
    ids = torch.arange(31744, 31751)[None]
    with torch.no_grad():
        every = policy.backbone.action_logits(inputs, ids)
        narrow = policy.backbone.action_logits(inputs, ids, only_ids=policy.legal_ids)
    torch.testing.assert_close(narrow, every[..., policy.legal_ids])


def _opened(settings: sft.Settings):
    return (settings, *open_datasets(settings))


def test_auto_placement_adds_ids_to_a_model_that_knows_no_actions(folder, tmp_path):
    FAMILIES["llava"](tmp_path / "llava")
    policy = build_policy(
        *_opened(recipe(folder, folder / "x", backbone=str(tmp_path / "llava"), bins=64, image_size_px=32)), "cpu"
    )
    assert policy.spec.tokens.n_added == 64 and policy.spec.image.resize_filter == "lanczos"
    names = [
        name for name, p in policy.backbone.model.named_parameters() if p.requires_grad and "trainable_tokens" in name
    ]
    assert len(names) == 1 and "embed" in names[0]
    assert place_actions(load_backbone(str(folder / "openvla")), "tail", 256)[0].ids[-1] == 31744


@pytest.mark.parametrize("method", ["lora", "dora", "rslora"])
def test_any_policy_goes_on(tmp_path, method, capsys):
    """Added tokens, a state in the prompt, chunks of 3: by the adapter, and by the weights it was merged into."""
    fake_dataset(tmp_path)
    tiny_backbone(tmp_path)
    first = sft.run(sft_settings(tmp_path, steps=2, method=method))
    merged = merge.run(merge.Settings(first, tmp_path / "merged", check=False))
    capsys.readouterr()
    seen = [
        Observation({"front": np.full((32, 32, 3), k, np.uint8)}, np.full(2, 0.1 * k, np.float32), "reach")
        for k in (0, 90)
    ]
    old = load_policy(first)
    for k, source in enumerate((first, merged)):
        settings = sft_settings(
            tmp_path, out=tmp_path / f"on{k}", from_=str(source), lr=0.0, steps=1, horizon=8, bins=32
        )
        out = sft.run(dataclasses.replace(settings, backbone="nowhere/at-all"))
        told = capsys.readouterr().out
        assert "horizon 3" in told and (f"method '{method}'" in told) == (k == 0 and method != "lora")
        new = load_policy(out)
        assert new.spec.prompt == old.spec.prompt and new.spec.tokens.n_added == (64 if k == 0 else 0)
        assert [c.token_ids.tolist() for c in new.act(seen)] == [c.token_ids.tolist() for c in old.act(seen)]
    trained = json.loads((tmp_path / "on0" / "policy" / "adapter" / "adapter_config.json").read_text())
    assert (trained["use_dora"], trained["use_rslora"]) == (method == "dora", method == "rslora")


def test_a_source_on_the_hub_is_known_by_its_files(monkeypatch):
    held = {("me/policy", None): "policy.json", ("me/lora", "v1"): "adapter_config.json"}
    asked = []

    def download(repo: str, file: str, revision: str | None) -> str:
        asked.append(file)
        if repo == "me/far":
            raise LocalEntryNotFoundError("no connection")
        if held.get((repo, revision)) != file:
            raise EntryNotFoundError("404")
        return file

    monkeypatch.setattr(sft_start, "hf_hub_download", download)
    assert [source_kind(s) for s in ("me/policy", "hf://me/lora@v1", "me/model")] == ["policy", "adapter", "checkpoint"]
    asked.clear()
    assert source_kind("me/far") == source_kind("me/far") == "checkpoint" and asked == ["policy.json"]  # asked once
