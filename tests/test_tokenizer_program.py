"""`vla tokenizer fit` and `vla tokenizer compare`."""

import json
from pathlib import Path

import numpy as np
import pytest
from training import fake_dataset

from vla import cli
from vla.finetune.data.statistics import dataset_statistics
from vla.finetune.formats.lerobot_reader import LeRobotReader
from vla.finetune.tokenizer_fit import normalized_chunks
from vla.finetune.tokenizer_measure import measure
from vla.finetune.tokenizer_program import Data, read_chunks
from vla.normalize import action_normalizer
from vla.tokenizers.fast import FastTokenizer
from vla.tokenizers.schemes import load_tokenizer
from vla.tokenizers.uniform import UniformTokenizer
from vla.types import VlaError


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fake_dataset(tmp_path_factory.mktemp("tokenizer"), episodes_per_task=6)


def test_fit_writes_a_folder_that_opens(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["tokenizer", "fit", str(data), "--scheme", "fast", "--out", str(tmp_path / "t"), "--horizon", "4"]
    assert cli.main([*command, "--gripper-dim", "None"]) == 0
    assert isinstance(load_tokenizer(tmp_path / "t"), FastTokenizer)
    assert "RMS error" in capsys.readouterr().out
    assert cli.main(command) == 2
    assert "choose another --out, or pass --overwrite" in capsys.readouterr().err
    assert cli.main([*command, "--overwrite"]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["t"]


def test_nothing_is_written_for_an_unknown_scheme(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["tokenizer", "fit", str(data), "--scheme", "fsat", "--out", str(tmp_path / "t")]) == 2
    assert "did you mean 'fast'" in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_compare_shows_every_scheme_and_names_what_cannot(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    saved = tmp_path / ("a folder far down" * 8)  # no room for that in a plot
    saved.mkdir()
    UniformTokenizer(9, mode="edges").save(saved)
    schemes = ["uniform", "quantile", "fast", "integer_text", "fsq", "keyboard_mouse", str(saved)]
    command = ["tokenizer", "compare", str(data), "--schemes", *schemes, "--steps", "20", "--horizon", "4"]
    files = ["--json", str(tmp_path / "c.json"), "--plot", str(tmp_path / "c.png"), "--gripper-dim", "None"]
    assert cli.main([*command, *files]) == 0
    assert "keyboard_mouse left out: got" in capsys.readouterr().out
    found = json.loads((tmp_path / "c.json").read_text())
    rows = {row["name"]: row for row in found["schemes"]}
    assert list(rows) == [name for name in schemes if name != "keyboard_mouse"] and found["action_names"] == [
        "dx",
        "dy",
    ]
    assert rows["uniform"]["tokens_mean"] == rows["uniform"]["tokens_max"] == 8
    assert rows["uniform"]["largest"] <= 1 / 255 + 1e-6 and rows["integer_text"]["largest"] <= 1 / 1000 + 1e-6
    assert rows["fast"]["tokens_mean"] < 8 < rows["integer_text"]["tokens_mean"]
    for row in rows.values():
        assert 0 < row["bits"] <= row["tokens_mean"] * np.log2(row["symbols"]) + 1e-9
        assert row["encode_per_s"] > 0 and len(row["rms_physical"]) == 2
    assert (tmp_path / "c.png").stat().st_size > 10_000


def test_code_lengths(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Longer codes lose less; both the table and the files have them."""
    command = [
        "tokenizer",
        "compare",
        str(data),
        "--schemes",
        "fast",
        "--steps",
        "20",
        "--horizon",
        "4",
        "--code-lengths",
    ]
    files = ["--json", str(tmp_path / "c.json"), "--plot", str(tmp_path / "c.png"), "--gripper-dim", "None"]
    assert cli.main([*command, *files, "--vq-codes", "8"]) == 0
    said = capsys.readouterr()
    assert "Error over code length" in said.out and "code lengths: 180/180" in said.err
    assert "fast: " in said.out and "coefficients of the held-out chunks are clipped" in said.out
    found = json.loads((tmp_path / "c.json").read_text())
    lengths = {(row["scheme"], row["tokens"]): row for row in found["code_lengths"]}
    assert list(lengths) == [*(("vq", n) for n in (1, 2, 4, 7, 14)), *(("fsq", n) for n in (2, 4, 8, 16))]
    assert lengths["vq", 4]["bits"] == 12 and lengths["vq", 7]["rms_error"] < lengths["vq", 1]["rms_error"]
    assert found["schemes"][0]["clipped"] >= 0 and (tmp_path / "c.png").stat().st_size > 10_000


def test_the_figures_by_hand() -> None:
    """Two values, half of each: 1 bit a token, 2 tokens a chunk; errors of 0.5 and, in the data's units, 5."""
    tokenizer = UniformTokenizer(3)  # edges -1, 0, 1; values -0.5 and 0.5
    chunks = np.array([[[-1.0], [0.5]], [[-0.5], [1.0]]], np.float32)
    bounds = action_normalizer({"d": {"action": {"q01": [0.0], "q99": [20.0], "mask": [True]}}}, "d", 1)
    row = measure(
        "x", tokenizer, np.where(chunks == 1.0, 0.999, chunks).astype(np.float32), [(2, bounds)], seconds=0.01
    )
    assert (row.tokens_mean, row.tokens_max, row.bits) == (2.0, 2, 2.0)
    assert row.largest == pytest.approx(0.5) and row.largest_physical[0] == pytest.approx(5.0, rel=1e-4)
    assert row.rms == pytest.approx(np.sqrt((0.25 + 0.499**2) / 4), rel=1e-5)


def test_chunks_are_those_of_training(data: Path) -> None:
    reader = LeRobotReader(data)
    statistics = {"fake": dataset_statistics(reader)}
    chunks = normalized_chunks([("fake", reader)], statistics, 3)
    assert chunks.shape == (len(reader), 3, 2) and np.abs(chunks).max() <= 1
    last = reader.episodes[0].stop - 1
    assert (chunks[last, 0] == chunks[last, 2]).all(), "the last action is repeated"
    without = normalized_chunks([("fake", reader)], statistics, 3, [{0}])
    np.testing.assert_array_equal(without, chunks[last + 1 :])
    few = normalized_chunks([("fake", reader)], statistics, 3, limit=5)
    assert len(few) == 5 and (few[0] == chunks[0]).all() and (few[-1] == chunks[-1]).all()
    split = read_chunks(str(data), Data(horizon=3, gripper_dim=None, holdout=0.25))
    assert len(split.fit) + len(split.held_out) == len(reader)
    with pytest.raises(VlaError, match="no frames"):
        normalized_chunks([("fake", reader)], statistics, 3, [set(range(reader.n_episodes))])
