"""The shipped `tiny` VLM: opens with the stock classes, is small, and looks at the picture and the question."""

from __future__ import annotations

import importlib.util
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

import vla.pretrain.eval as pretrain_eval
from vla.backbone import TINY_PATH
from vla.pretrain.data import IMAGE_SIZE_PX, NO_COLOUR, TASKS, render_chunk
from vla.pretrain.model import build_tokenizer
from vla.pretrain.text import make_turn

N_IMAGES = 20
needs_metaworld = pytest.mark.skipif(
    importlib.util.find_spec("metaworld") is None, reason="needs pictures from the extra [metaworld]"
)


@pytest.fixture(scope="module")
def tiny() -> tuple[Any, Any]:
    return AutoModelForImageTextToText.from_pretrained(TINY_PATH), AutoProcessor.from_pretrained(TINY_PATH)


@pytest.fixture(scope="module")
def pictures() -> tuple[np.ndarray, np.ndarray]:
    """Pictures of episodes that neither training nor the shipped figures used."""
    return render_chunk("heldout", 901, n_images=N_IMAGES)


def test_it_is_small_and_loads_in_float32(tiny: tuple[Any, Any]) -> None:
    model, processor = tiny
    assert sum(p.numel() for p in model.parameters()) <= 8_000_000
    assert sum(path.stat().st_size for path in TINY_PATH.iterdir()) <= 16 * 2**20
    assert model.dtype == torch.float32 and not model.training
    assert type(model).__name__ == "FastVlmForConditionalGeneration" and type(processor).__name__ == "LlavaProcessor"
    assert all(torch.isfinite(p).all() for p in model.parameters())
    assert {path.suffix for path in TINY_PATH.iterdir()} <= {".json", ".safetensors", ".jinja", ".md"}


def test_its_tokenizer_is_the_one_the_code_builds(tiny: tuple[Any, Any]) -> None:
    assert tiny[1].tokenizer.get_vocab() == build_tokenizer().get_vocab()
    assert tiny[0].get_input_embeddings().weight.shape[0] == len(tiny[1].tokenizer)


def test_rows_do_not_depend_on_the_batch(tiny: tuple[Any, Any]) -> None:
    image = np.random.default_rng(0).integers(0, 255, size=(2, IMAGE_SIZE_PX, IMAGE_SIZE_PX, 3)).astype(np.uint8)
    questions = [
        "Where is the gripper?",
        "The robot should open the drawer. Where is the goal relative to the gripper?",
    ]
    alone = [pretrain_eval.ask(*tiny, image[i : i + 1], [questions[i]])[0] for i in range(2)]
    assert pretrain_eval.ask(*tiny, image, questions) == alone


@needs_metaworld
def test_answers_depend_on_the_picture_and_on_the_question(
    tiny: tuple[Any, Any], pictures: tuple[np.ndarray, np.ndarray]
) -> None:
    images, _ = pictures
    where = pretrain_eval.ask(*tiny, images, ["Where is the gripper?"] * N_IMAGES)
    assert len(set(where)) > N_IMAGES // 2
    questions = ["Where is the gripper?", "Is the gripper open or closed?", "What is on the table?"]
    assert len(set(pretrain_eval.ask(*tiny, images[[0, 0, 0]], questions))) == 3


@needs_metaworld
def test_it_knows_what_is_on_the_table(tiny: tuple[Any, Any], pictures: tuple[np.ndarray, np.ndarray]) -> None:
    images, facts = pictures
    rows = np.flatnonzero(facts["colour"] == NO_COLOUR)
    rng = np.random.default_rng(0)
    turns = [make_turn("object", facts[row], rng) for row in rows]
    answers = pretrain_eval.ask(*tiny, images[rows], [turn.question for turn in turns])
    right = np.mean([turn.answer == answer for turn, answer in zip(turns, answers, strict=True)])
    assert right > 0.6, {TASKS[facts[row]["task"]] for row in rows}


@needs_metaworld
@pytest.mark.parametrize("kind", ["hand_position", "part_position"])
def test_places_beat_a_blind_answer(kind: str, tiny: tuple[Any, Any], pictures: tuple[np.ndarray, np.ndarray]) -> None:
    images, facts = pictures
    rng = np.random.default_rng(0)
    turns = [make_turn(kind, fact, rng) for fact in facts]
    questions = [turn.question for turn in turns]
    seen = pretrain_eval.score(kind, turns, pretrain_eval.ask(*tiny, images, questions))
    blind = pretrain_eval.score(kind, turns, pretrain_eval.ask(*tiny, np.roll(images, N_IMAGES // 2, 0), questions))
    assert seen["error"] < 0.5 * blind["error"]
