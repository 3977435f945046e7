"""Co-training with vision-language rows: both losses fall, nothing depends on batches or restarts, bad rows are named.

Tests of the `datasets` library write what it writes itself (`to_parquet`, `save_to_disk`) and need the extra [datasets].
"""

from __future__ import annotations

import dataclasses
import io
import json
import re
import sys
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image
from test_sft_resume import same_run
from training import fake_dataset, in_two_parts, sft_settings, tiny_backbone

from vla.files import read_jsonl
from vla.finetune import sft
from vla.finetune.data.order import epoch_order
from vla.finetune.data.vl_data import PERIOD, CoTraining, Mixture, open_mixture
from vla.finetune.data.vl_json import JsonRows, read_rows
from vla.finetune.data.vl_rows import CAPTION_QUESTION, guess_layout, pairs_of, points_text
from vla.finetune.data.vl_sources import StreamedRows, TableRows, open_vl_source, parse_address
from vla.types import VlaError


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("vl")
    fake_dataset(folder)
    tiny_backbone(folder)
    lines = []
    for i, (colour, name) in enumerate([((255, 0, 0), "red"), ((0, 255, 0), "green and so on"), ((0, 0, 255), "blue")]):
        Image.fromarray(np.full((40 + i, 30, 3), colour, np.uint8)).save(folder / f"{i}.png")
        lines.append(json.dumps({"image": f"{i}.png", "question": "which colour?", "answer": name}))
    (folder / "rows.jsonl").write_text("\n".join(lines) + "\n\n")
    return folder


def settings_of(folder: Path, out: str, **changes: object) -> sft.Settings:
    base = {"out": folder / out, "vl_data": (str(folder / "rows.jsonl"),), "free_running_samples": 2}
    return sft_settings(folder, **{**base, **changes})


def rows_of(settings: sft.Settings) -> list[dict]:
    return [row for row in read_jsonl(settings.out / "metrics.jsonl") if "loss" in row]


def test_both_losses_fall(folder):
    settings = settings_of(
        folder, "falls", steps=60, lr=5e-3, batch_size=8, vl_weight=0.5, save_every_steps=60, eval_every_steps=60
    )
    sft.run(settings)
    rows = rows_of(settings)
    for name in ("loss", "vl_loss"):
        assert sum(row[name] for row in rows[-5:]) < 0.8 * sum(row[name] for row in rows[:5]), name
    assert all(0.0 <= row["vl_token_accuracy"] <= 1.0 for row in rows)


def test_the_weight_scales_the_gradient_and_not_the_losses(folder):
    rows = []
    for weight in (1e-9, 0.5):
        settings = settings_of(folder, f"weight {weight}", steps=1, vl_weight=weight)
        sft.run(settings)
        rows.append(rows_of(settings)[0])
    plain = sft_settings(folder, out=folder / "plain", steps=1)
    sft.run(plain)
    assert rows[0]["loss"] == rows[1]["loss"] and rows[0]["vl_loss"] == rows[1]["vl_loss"]
    assert rows[0]["grad_norm"] == pytest.approx(rows_of(plain)[0]["grad_norm"], rel=1e-5)
    assert rows[1]["grad_norm"] != pytest.approx(rows[0]["grad_norm"], rel=1e-3)


def test_accumulating_changes_nothing(folder):
    one = settings_of(folder, "1x4", steps=3, batch_size=4, vl_batch_size=4)
    four = settings_of(folder, "4x1", steps=3, batch_size=1, grad_accumulation=4, vl_batch_size=1)
    sft.run(one)
    sft.run(four)
    for a, b in zip(rows_of(one), rows_of(four), strict=True):
        for name in ("loss", "vl_loss", "grad_norm"):
            assert a[name] == pytest.approx(b[name], rel=2e-4), name


def test_resumed_exactly(folder):
    settings = settings_of(folder, "straight", lora_dropout=0.2)
    sft.run(settings)
    halves = dataclasses.replace(settings, out=folder / "halves")
    in_two_parts(halves)
    same_run(halves.out, settings.out)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2: .*one JSON object a line"),
        ("[1]", r"line 2: \[1\]; expected image, question and answer"),
        ('{"image": "0.png", "question": "q"}', "line 2.*expected image, question and answer"),
        ('{"image": "0.png", "question": "q", "answer": " "}', "texts that are not empty"),
        ('{"image": "no.png", "question": "q", "answer": "a"}', "line 2: no image .*no.png"),
    ],
)
def test_bad_rows_are_named_before_anything_is_written(folder, line, message):
    good = (folder / "rows.jsonl").read_text().splitlines()[0]
    (folder / "bad.jsonl").write_text(f"{good}\n{line}\n")
    with pytest.raises(VlaError, match=message):
        sft.run(settings_of(folder, "bad", vl_data=(str(folder / "bad.jsonl"),)))
    assert not (folder / "bad").exists()


def test_other_bad_input(folder, tmp_path):
    with pytest.raises(VlaError, match="no file .*nowhere.jsonl"):
        read_rows(tmp_path / "nowhere.jsonl")
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(VlaError, match="without a row"):
        read_rows(tmp_path / "empty.jsonl")
    with pytest.raises(VlaError, match="vl_weight 0.0"):
        settings_of(folder, "no", vl_weight=0.0)
    (tmp_path / "0.png").write_bytes(b"not an image")
    (tmp_path / "rows.jsonl").write_text('{"image": "0.png", "question": "q", "answer": "a"}\n')
    with pytest.raises(VlaError, match="0.png.*an image"):
        sft.run(settings_of(folder, "broken image", vl_data=(str(tmp_path / "rows.jsonl"),)))


# What rows say


def said(row: dict[str, Any], **given: str) -> list[tuple[str, str]]:
    layout = guess_layout(list(row), given)
    assert layout is not None and layout.image == given.get("image", "image")
    return pairs_of(row, layout, "row 1")


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"question": "what?", "answer": " a cup "}, [("what?", "a cup")]),
        ({"question": "what?", "answers": ["a cup", "cup", "a cup"]}, [("what?", "a cup"), ("what?", "cup")]),
        ({"question": "what?", "answers": [{"answer": "cup", "answer_id": 1}]}, [("what?", "cup")]),
        ({"question": "q", "multiple_choice_answer": "b", "answers": [{"answer": "c"}]}, [("q", "b")]),
        ({"caption": "a dog"}, [(CAPTION_QUESTION, "a dog")]),
        ({"captions": ["a dog", "an animal"], "id": 3}, [(CAPTION_QUESTION, "a dog"), (CAPTION_QUESTION, "an animal")]),
        ({"conversations": [{"from": "human", "value": "<image>\nwhat?"}, {"from": "gpt", "value": "a cup"},
                            {"from": "human", "value": "where?"}, {"from": "gpt", "value": "there"}]},
         [("what?", "a cup"), ("what?\na cup\nwhere?", "there")]),
        ({"messages": [{"role": "system", "content": "be kind"},
                       {"role": "user", "content": [{"type": "image", "text": None}, {"type": "text", "text": "what?"}]},
                       {"role": "assistant", "content": [{"type": "text", "text": "a cup"}]}]}, [("what?", "a cup")]),
        ({"texts": [{"user": "what?", "assistant": "a cup", "source": "x"}]}, [("what?", "a cup")]),
        ({"question": "where is the cup?", "points": [[0.515, 0.2]]},
         [("where is the cup?", '<point x="51.5" y="20.0"></point>')]),
        ({"label": "cups", "points": [{"x": 10, "y": 20.06}, {"x": 100, "y": 0}], "count": 2},
         [("Point to cups.", '<points x1="10.0" y1="20.1" x2="100.0" y2="0.0" alt="cups">cups</points>')]),
        ({"label": "cup", "points": {"x": [50.0], "y": [50.0]}},
         [("Point to cup.", '<point x="50.0" y="50.0" alt="cup">cup</point>')]),
        ({"label": "cup", "points": []}, [("Point to cup.", "There are none.")]),
    ],
)  # fmt: skip
def test_layouts(row, expected):
    assert said({"image": "0.png", **row}) == expected


def test_columns_that_are_named_win():
    row = {"image": "a", "photo": "b", "question": "q", "answer": "a", "long": "a long answer", "ask": "what?"}
    assert said(row, image="photo", question="ask", answer="long") == [("what?", "a long answer")]
    assert guess_layout(["image", "width"]) is None
    assert guess_layout(["question", "answer"]) is None


def test_points_read_back():
    rng = np.random.default_rng(0)
    for n in range(1, 5):
        points = rng.random((n, 2))
        text = points_text(points, 'a "b" <c>')
        found = re.findall(r'x\d*="([\d.]+)" y\d*="([\d.]+)"', text)
        np.testing.assert_allclose(np.array(found, float) / 100, points, atol=6e-4)
        assert text.count('"') == 4 * n + 2 and "<c>" not in text


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"label": "cup", "points": [[64, 120]]}, "row 1: points .*divide pixels by width and height"),
        ({"label": "cup", "points": "here"}, r"points here; expected \[\[x, y\]"),
        ({"label": "cup", "points": [[0.1]]}, "expected"),
        ({"conversations": [{"from": "gpt", "value": "hi"}]}, "turn 1 of assistant"),
        ({"conversations": [{"from": "martian", "value": "hi"}]}, "turns of user"),
        ({"conversations": []}, "expected image, question and answer"),
        ({"question": "q", "answer": 3}, "texts that are not empty"),
        ({"question": None, "answer": "a"}, "texts that are not empty"),
    ],
)
def test_rows_that_say_nothing(row, message):
    with pytest.raises(VlaError, match=message):
        said({"image": "0.png", **row})


def test_jsonl_of_every_layout(folder, tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "0.png")
    lines = [{"caption": "a dog"}, {"question": "q", "answer": "a"}, {"label": "cup", "points": [[0.5, 0.5]]}]
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps({"image": "0.png", **line}) for line in lines))
    source = open_vl_source(str(tmp_path / "rows.jsonl"), seed=0)
    assert isinstance(source, JsonRows)
    assert {source.row(k).answer for k in range(3)} == {"a dog", "a", '<point x="50.0" y="50.0" alt="cup">cup</point>'}
    assert source.row(1).pixels().shape == (8, 8, 3)


def test_a_json_list_as_llavas(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "0.png")
    turns = [{"from": "human", "value": "<image>\nwhat?"}, {"from": "gpt", "value": "a cup"}]
    (tmp_path / "llava.json").write_text(json.dumps([{"id": "0", "image": "0.png", "conversations": turns}], indent=1))
    assert read_rows(tmp_path / "llava.json") == [(tmp_path / "0.png", [("what?", "a cup")])]
    for text, message in (("{}", "a JSON list of rows"), ("[", "a JSON list"), ('[{"id": 1}]', 'item 0: {"id": 1}')):
        (tmp_path / "llava.json").write_text(text)
        with pytest.raises(VlaError, match=message):
            read_rows(tmp_path / "llava.json")


# Mixing


class Counting:
    """A source that says which draw it is."""

    def __init__(self, name: str) -> None:
        self.name = name

    def row(self, draw: int) -> Any:
        return draw


def mixture(*weights: float, seed: int = 0, n: int = 2) -> Mixture:
    sources: list[Any] = [Counting(f"s{k}") for k in range(n)]
    return Mixture(sources, weights, seed)


def test_shares_are_exact_and_every_draw_comes_once_in_order():
    mix = mixture(3, 1)
    rows = [mix.row(k) for k in range(3 * PERIOD)]
    for source, share in ((0, 0.75), (1, 0.25)):
        draws = [draw for s, draw in rows if s == source]
        assert draws == list(range(int(share * len(rows))))
    assert [mixture(3, 1).row(k) for k in (2500, 17, 999, 1000)] == [rows[k] for k in (2500, 17, 999, 1000)]
    assert [mixture(3, 1, seed=1).row(k) for k in range(50)] != rows[:50]
    for start in range(0, len(rows) - 16, 7):
        assert (
            2 <= sum(source for source, _ in rows[start : start + 16]) <= 6
        )  # a step of 16 has about the share as well


def test_ranks_share_one_stream(folder):
    settings = settings_of(folder, "never", vl_batch_size=3, grad_accumulation=2)
    co: Any = CoTraining.__new__(CoTraining)
    co.settings, co.mixture = settings, mixture(1, 2)
    for step in (0, 5):
        ranks = [co.rows(step, rank, 4) for rank in range(4)]
        assert all(len(rows) == 6 for rows in ranks)
        together = [ranks[k % 4][k // 4] for k in range(24)]
        assert together == [co.mixture.row(k) for k in range(step * 24, step * 24 + 24)]


@pytest.mark.parametrize(
    ("weights", "message"), [((1.0, 0.0), "numbers above 0"), ((1.0,), "2 numbers"), ((1e-5, 1.0), "at least 1/1000")]
)
def test_bad_shares(weights, message):
    with pytest.raises(VlaError, match=message):
        mixture(*weights)


def test_losses_by_source(folder, tmp_path):
    Image.new("RGB", (20, 20), (9, 9, 9)).save(tmp_path / "0.png")
    (tmp_path / "captions.jsonl").write_text(
        json.dumps({"image": "0.png", "caption": "a grey square, and nothing else"})
    )
    both = (str(folder / "rows.jsonl"), str(tmp_path / "captions.jsonl"))
    settings = settings_of(folder, "both", steps=3, vl_data=both, vl_weights=(1.0, 3.0), vl_batch_size=16)
    sft.run(settings)
    for row in rows_of(settings):
        assert (
            min(row["vl_loss/rows"], row["vl_loss/captions"])
            <= row["vl_loss"]
            <= max(row["vl_loss/rows"], row["vl_loss/captions"])
        )
        assert 0 <= row["vl_token_accuracy/captions"] <= 1
    with pytest.raises(VlaError, match="1 vl_weights for 2 of vl_data"):
        settings_of(folder, "no", vl_data=both, vl_weights=(1.0,))
    assert [s.name for s in open_mixture(settings_of(folder, "no", vl_data=(both[0], both[0]))).sources] == [
        "rows",
        "rows-2",
    ]


# The `datasets` library


@pytest.fixture(scope="module")
def hf(tmp_path_factory) -> Any:
    datasets = pytest.importorskip("datasets", reason="needs the extra [datasets]")
    patch = pytest.MonkeyPatch()
    patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
    patch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0.2)  # seconds, at the end of each walk
    datasets.disable_progress_bars()
    yield datasets
    patch.undo()


def picture(k: int) -> dict[str, Any]:
    """As the library stores one: the bytes of a PNG."""
    data = io.BytesIO()
    Image.fromarray(np.full((10, 12, 3), k, np.uint8)).save(data, "PNG")
    return {"bytes": data.getvalue(), "path": None}


def table(hf: Any, n: int = 6, column: str = "image", **more: list[Any]) -> Any:
    made = hf.Dataset.from_dict({column: [picture(k) for k in range(n)], **more})
    return made.cast_column(column, hf.Image())


def answers(n: int = 6) -> dict[str, list[Any]]:
    return {"question": [f"what is {k}?" for k in range(n)], "answer": [f"number {k}" for k in range(n)]}


def test_parquet_files_and_folders(hf, tmp_path):
    made = table(hf, **answers())
    made.to_parquet(str(tmp_path / "rows.parquet"))
    (tmp_path / "repo" / "data").mkdir(parents=True)
    made.to_parquet(str(tmp_path / "repo" / "data" / "train-00000-of-00001.parquet"))
    made.save_to_disk(str(tmp_path / "disk"))
    hf.DatasetDict({"train": made, "test": made.select([0])}).save_to_disk(str(tmp_path / "splits"))
    for place in ("rows.parquet", "repo", "disk", "splits"):
        source = open_vl_source(str(tmp_path / place), seed=3)
        assert isinstance(source, TableRows) and source.name == Path(place).stem
        rows = [source.row(k) for k in range(12)]
        assert (
            sorted(row.answer for row in rows[:6])
            == sorted(answers()["answer"])
            == sorted(row.answer for row in rows[6:])
        )
        assert [row.answer for row in rows[:6]] != [row.answer for row in rows[6:]]
        for row in rows:
            assert row.question == f"what is {row.answer.split()[1]}?"
            assert (row.pixels() == int(row.answer.split()[1])).all() and row.pixels().shape == (10, 12, 3)
        again = open_vl_source(str(tmp_path / place), seed=3)
        assert [again.row(k).answer for k in (7, 2)] == [rows[k].answer for k in (7, 2)]
    assert open_vl_source(f"{tmp_path / 'splits'}#split=test", 0).row(4).answer == "number 0"
    with pytest.raises(VlaError, match="no split 'val'; expected one of train, test"):
        open_vl_source(f"{tmp_path / 'splits'}#split=val", 0)
    part = open_vl_source(f"{tmp_path / 'rows.parquet'}#split=train[:3]", 0)
    assert sorted(part.row(k).answer for k in range(3)) == ["number 0", "number 1", "number 2"]
    with pytest.raises(VlaError, match='rows.parquet#split=val: Unknown split "val"'):
        open_vl_source(f"{tmp_path / 'rows.parquet'}#split=val", 0)


def test_columns_are_guessed_or_named_or_listed(hf, tmp_path):
    made = table(hf, column="photo", ask=["q"] * 6, reply=["a"] * 6, width=[3] * 6)
    made.save_to_disk(str(tmp_path / "odd"))
    with pytest.raises(
        VlaError, match=r"columns photo \(Image\), ask \(string\), reply \(string\), width \(Value\).*#image=COLUMN&"
    ):
        open_vl_source(str(tmp_path / "odd"), 0)
    named = f"{tmp_path / 'odd'}#question=ask&answer=reply"  # the only picture is the image
    assert (open_vl_source(named, 0).row(0).question, open_vl_source(named, 0).row(0).answer) == ("q", "a")
    with pytest.raises(VlaError, match="no column nothing; expected one of photo"):
        open_vl_source(f"{tmp_path / 'odd'}#image=nothing", 0)
    texts = hf.Dataset.from_dict({"image": ["0.png"], "caption": ["c"]})
    texts.save_to_disk(str(tmp_path / "paths"))
    with pytest.raises(VlaError, match="column image of texts; expected pictures"):
        open_vl_source(str(tmp_path / "paths"), 0)


def test_layouts_of_the_hub(hf, tmp_path):
    turns = [[{"from": "human", "value": "<image> what?"}, {"from": "gpt", "value": f"number {k}"}] for k in range(2)]
    table(hf, 2, conversations=turns).save_to_disk(str(tmp_path / "llava"))
    lists = hf.Dataset.from_dict(
        {"images": [[picture(k)] for k in range(2)], "texts": [[{"user": "u", "assistant": "a"}]] * 2}
    )
    lists.cast_column("images", hf.List(hf.Image())).save_to_disk(str(tmp_path / "cauldron"))
    points = table(
        hf, 2, label=["cup"] * 2, points=[[{"x": 5.0, "y": 6.0}], [{"x": 7.0, "y": 8.0}, {"x": 1.0, "y": 2.0}]]
    )
    points.save_to_disk(str(tmp_path / "points"))
    captions = table(hf, 2, captions=[["one", "two"]] * 2)
    captions.save_to_disk(str(tmp_path / "captions"))
    assert open_vl_source(str(tmp_path / "llava"), 0).row(0).question == "what?"
    source = open_vl_source(str(tmp_path / "cauldron"), 0)
    assert source.row(0).answer == "a" and source.row(0).pixels().shape == (10, 12, 3)
    found = {open_vl_source(str(tmp_path / "points"), 0).row(k).answer for k in range(2)}
    assert '<points x1="7.0" y1="8.0" x2="1.0" y2="2.0" alt="cup">cup</points>' in found
    source = open_vl_source(str(tmp_path / "captions"), 0)
    assert [source.row(k).answer for k in range(5)] == ["one", "one", "two", "two", "one"]


def test_rows_without_an_image_are_named(hf, tmp_path):
    made = hf.Dataset.from_dict({"image": [picture(0), None], "caption": ["a", "b"]}).cast_column("image", hf.Image())
    made.save_to_disk(str(tmp_path / "gap"))
    source = (
        open_vl_source(str(tmp_path / "gap"), 1) if _first_is(2, 1, 0) else open_vl_source(str(tmp_path / "gap"), 0)
    )
    with pytest.raises(VlaError, match="gap row 1: no image; expected one image a row"):
        [source.row(k) for k in range(2)]
    two = hf.Dataset.from_dict({"images": [[picture(0), picture(1)]], "caption": ["a"]})
    two.cast_column("images", hf.List(hf.Image())).save_to_disk(str(tmp_path / "two"))
    with pytest.raises(VlaError, match="row 0: 2 images"):
        open_vl_source(str(tmp_path / "two"), 0)
    broken = hf.Dataset.from_dict({"image": [{"bytes": b"no picture", "path": None}], "caption": ["a"]})
    broken.cast_column("image", hf.Image()).save_to_disk(str(tmp_path / "broken"))
    with pytest.raises(VlaError, match="broken row 0: .*expected an image"):
        open_vl_source(str(tmp_path / "broken"), 0).row(0).pixels()


def _first_is(n: int, seed: int, row: int) -> bool:
    return int(epoch_order(n, seed, 0)[0]) == row


@pytest.fixture
def hub(hf, tmp_path, monkeypatch) -> list[tuple[Any, ...]]:
    """`load_dataset` of a name reads parquet files here, as a stream; what it was asked is kept."""
    for part in range(3):
        made = table(hf, 20, **answers(20)).add_column("part", [part] * 20)
        made = made.map(lambda row, k: {"answer": f"{row['part']}/{k}"}, with_indices=True)
        made.to_parquet(str(tmp_path / f"{part}.parquet"))
    calls: list[tuple[Any, ...]] = []
    load = hf.load_dataset

    def stream(path: str, name: str | None = None, **options: Any) -> Any:
        calls.append((path, name, options))
        files = sorted(str(file) for file in tmp_path.glob("*.parquet"))
        return load("parquet", data_files=files, split=options["split"], streaming=True)

    monkeypatch.setattr(hf, "load_dataset", stream)
    return calls


def test_the_hub_is_read_as_a_stream(hub):
    source = open_vl_source("hf:owner/name@main#split=train&name=small", seed=0)
    assert isinstance(source, StreamedRows) and source.name == "name"
    assert hub[0] == ("owner/name", "small", {"split": "train", "revision": "main", "streaming": True})
    rows = [source.row(k) for k in range(120)]
    first, second = ([row.answer for row in rows[s : s + 60]] for s in (0, 60))
    assert len(set(first)) == 60 and set(first) == set(second) and first != second and first != sorted(first)
    assert rows[5].pixels().shape == (10, 12, 3)
    later = open_vl_source("hf:owner/name", seed=0)
    assert [later.row(k).answer for k in (70, 75, 3)] == [rows[k].answer for k in (70, 75, 3)]
    other = open_vl_source("hf:owner/name", seed=1)
    assert [other.row(k).answer for k in range(60)] != first


def test_training_on_a_stream_resumes_exactly(folder, hub):
    both = ("hf:owner/name", str(folder / "rows.jsonl"))
    settings = settings_of(folder, "stream", vl_data=both, vl_weights=(2.0, 1.0), lora_dropout=0.2)
    sft.run(settings)
    halves = dataclasses.replace(settings, out=folder / "stream halves")
    in_two_parts(halves)
    same_run(halves.out, settings.out)


def test_what_the_library_says_is_passed_on(hf, tmp_path, monkeypatch):
    def fails(*arguments: Any, **options: Any) -> Any:
        raise hf.exceptions.DatasetNotFoundError("Dataset 'a/b' doesn't exist on the Hub")

    def breaks(*arguments: Any, **options: Any) -> Any:
        raise httpx.ConnectError("Connection refused")

    monkeypatch.setattr(hf, "load_dataset", fails)
    with pytest.raises(VlaError, match="hf:a/b: Dataset 'a/b' doesn't exist.*correct --vl-data"):
        open_vl_source("hf:a/b", 0)
    monkeypatch.setattr(hf, "load_dataset", breaks)
    with pytest.raises(VlaError, match="hf:a/b: Connection refused"):
        open_vl_source("hf:a/b", 0)
    monkeypatch.undo()
    (tmp_path / "bad.parquet").write_bytes(b"no parquet")
    with pytest.raises(VlaError, match="bad.parquet: "):
        open_vl_source(str(tmp_path / "bad.parquet"), 0)
    (tmp_path / "empty").mkdir()
    with pytest.raises(VlaError, match="empty: "):
        open_vl_source(str(tmp_path / "empty"), 0)


def test_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(VlaError, match=r"without the package datasets.*pip install 'vla-toolkit\[datasets\]'"):
        open_vl_source("hf:owner/name", 0)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("hf:name", "expected hf:OWNER/NAME"),
        ("hf:a/b/c", "expected hf:OWNER/NAME"),
        ("hf:a/b#picture=x", "with picture; expected #NAME=VALUE"),
        ("hf:a/b#split=", "with split"),
        ("hf:a/b#train", "with train"),
        ("rows.jsonl#split=train", "none for a JSONL file"),
        ("no.parquet", "no file no.parquet; expected JSONL, parquet, a folder"),
        ("nothing", "no file nothing; expected JSONL"),
    ],
)
def test_bad_addresses(text, message):
    with pytest.raises(VlaError, match=message):
        open_vl_source(text, 0)


def test_addresses():
    address = parse_address("hf:owner/name@abc#split=train[:10%]&image=img")
    assert (address.place, address.revision, dict(address.options)) == (
        "owner/name", "abc", {"split": "train[:10%]", "image": "img"},
    )  # fmt: skip
    assert parse_address("hf://datasets/owner/name").place == "owner/name"
