"""`vla data convert`: any dataset to LeRobot v3.0 or the cache."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from episodes import WRITER, assert_same_episode, make_episode
from sources import ArraySource, toy_source
from test_lerobot_reader import FIXTURES, VIDEO, tree_hash

from vla.cli import parse
from vla.finetune.data import data_convert
from vla.finetune.data.data_convert import Settings, bad_path, convert, run
from vla.finetune.data.dataset_check import check_dataset
from vla.finetune.data.subset_source import SubsetSource, parse_range
from vla.finetune.formats.cache_reader import CacheReader
from vla.finetune.formats.lerobot_reader import LeRobotReader
from vla.finetune.formats.lerobot_writer import LeRobotWriter
from vla.finetune.formats.rlds_reader import RldsReader
from vla.types import VlaError

RLDS = FIXTURES / "rlds/tiny_arm/1.0.0"


@pytest.fixture
def toy(tmp_path):
    with LeRobotWriter(tmp_path / "toy", **WRITER) as writer:
        for k in range(4):
            writer.add_episode(make_episode(k))
    return tmp_path / "toy"


def test_lerobot_to_cache_to_lerobot_loses_nothing(toy, tmp_path, capsys):
    first = run(Settings(str(toy), "cache", tmp_path / "cache", verify=True))
    assert (first.n_episodes, first.n_new, first.n_bad, first.n_frames) == (4, 4, 0, 20)
    assert "verified: 20 frames" in capsys.readouterr().out
    run(Settings(str(tmp_path / "cache"), "lerobot", tmp_path / "back", verify=True))
    assert [f for f in check_dataset(tmp_path / "back", all_frames=True) if f.level == "error"] == []
    a, b = LeRobotReader(toy), LeRobotReader(tmp_path / "back")
    for k in range(4):
        assert_same_episode(a.episode(k), b.episode(k))


def test_again_it_is_complete_and_otherwise_refused(toy, tmp_path, capsys):
    for to, images in (("cache", None), ("lerobot", None)):
        out = tmp_path / f"out-{to}"
        run(Settings(str(toy), to, out, images))
        before = tree_hash(out)
        again = run(Settings(str(toy), to, out, images, verify=True))
        assert again.n_new == 0 and again.n_episodes == 4 and tree_hash(out) == before
        with pytest.raises(VlaError, match="source_hash|is not empty|cameras"):
            run(Settings(str(toy), to, out, images, cameras=("front",)))
        with pytest.raises(VlaError, match="toy is not empty"):
            run(Settings(str(toy), to, toy))
        assert tree_hash(out) == before


def test_continues_where_it_stopped(toy, tmp_path, monkeypatch):
    run(Settings(str(toy), "lerobot", tmp_path / "whole"))
    run(Settings(str(toy), "cache", tmp_path / "whole-cache"))
    source = data_convert.open_source(str(toy))

    class Died(BaseException):
        pass

    for to, whole in (("lerobot", "whole"), ("cache", "whole-cache")):
        settings, calls = Settings(str(toy), to, tmp_path / f"cut-{to}"), 0
        original = type(source).images

        def images(self, i, cameras=None, original=original):
            nonlocal calls
            calls += 1
            if calls == 13:
                raise Died
            return original(self, i, cameras)

        monkeypatch.setattr(type(source), "images", images)
        with pytest.raises(Died):
            run(settings)
        monkeypatch.undo()
        done = run(settings)
        assert 0 < done.n_new < 4 and done.n_episodes == 4
        tables = [root / "meta/episodes/chunk-000/file-000.parquet" for root in (settings.out, tmp_path / whole)]
        if to == "lerobot":  # rewritten by every run: equal, though not to the byte
            assert pq.read_table(tables[0]).equals(pq.read_table(tables[1]))
            for table in tables:
                table.unlink()
        assert tree_hash(settings.out) == tree_hash(tmp_path / whole)


@pytest.mark.parametrize("to", ["lerobot", "cache"])
def test_bad_episodes_are_counted_and_listed(tmp_path, to, capsys):
    source = toy_source(6, cameras={"front": (16, 20)}, success=[True] * 6)
    source.broken.add(source.episodes[1].start + 2)
    source._actions[source.episodes[4].start, 0] = np.inf
    chosen = SubsetSource(source, [0, 1, 2, 4, 5])
    out = tmp_path / "out"
    with pytest.raises(VlaError, match=r"episode 1: got a broken frame 9; .*--skip-bad"):
        convert(chosen, Settings("x", to, out))
    assert not bad_path(out).exists()
    settings = Settings("x", to, out, skip_bad=True)
    done = convert(chosen, settings)
    assert (done.n_episodes, done.n_bad) == (3, 2)
    assert "2 bad episodes left out: " in capsys.readouterr().out
    rows = [json.loads(line) for line in bad_path(out).read_text().splitlines()]
    assert [row["episode"] for row in rows] == [1, 4] and "action inf at frame 0" in rows[1]["error"]
    again = convert(chosen, settings)
    assert (again.n_new, again.n_bad, again.n_episodes) == (0, 2, 3)
    assert len(bad_path(out).read_text().splitlines()) == 2
    reader = LeRobotReader(out) if to == "lerobot" else CacheReader(out)
    np.testing.assert_array_equal(reader.actions(), source.actions()[np.r_[0:7, 15:24, 45:57]])
    everything_bad = SubsetSource(source, [1, 4])
    with pytest.raises(VlaError, match="no episode"):
        convert(everything_bad, Settings("x", to, tmp_path / "none", skip_bad=True))


def test_what_lerobot_needs(tmp_path):
    actions = [np.zeros((3, 7))]
    with pytest.raises(VlaError, match="0 fps in memory/arrays; .*pass --fps"):
        convert(SubsetSource(ArraySource(actions, fps=0)), Settings("x", "lerobot", tmp_path / "a"))
    source = SubsetSource(ArraySource(actions, instructions=[""], fps=0))
    with pytest.raises(VlaError, match="without an instruction.*pass --instruction"):
        convert(source, Settings("x", "lerobot", tmp_path / "b", fps=5))
    convert(source, Settings("x", "lerobot", tmp_path / "c", fps=5, instruction="wave"))
    reader = LeRobotReader(tmp_path / "c")
    assert (reader.fps, reader.instruction_of(0), reader.success_of(0)) == (5.0, "wave", None)


def test_dry_run_writes_nothing_and_is_about_right(toy, tmp_path, capsys):
    for to, images in (("cache", "raw"), ("cache", "jpeg"), ("lerobot", "png")):
        out = tmp_path / f"{to}-{images}"
        settings = Settings(str(toy), to, out, images, episodes="1:", cameras=("front",), dry_run=True)  # type: ignore
        assert run(settings).n_episodes == 0 and not out.exists()
        said = capsys.readouterr().out
        assert "3 episodes, 15 frames, cameras front" in said and "about" in said
        if to == "cache":
            source = SubsetSource(data_convert.open_source(toy), [1, 2, 3], ["front"])
            estimate = data_convert.estimate_bytes(source, settings)
            run(Settings(str(toy), to, out, images, episodes="1:", cameras=("front",)))  # type: ignore
            size = sum(path.stat().st_size for path in (out / "images").rglob("*") if path.is_file())
            assert 0.8 < estimate / size < 1.2


def test_rlds(tmp_path):
    """Its JPEG files are kept to the byte and read as the RLDS reader reads them; a damaged record is listed."""
    source = RldsReader(RLDS)
    assert source.jpeg(0, source.cameras[0]) is not None
    run(Settings(str(RLDS), "cache", tmp_path / "c", "jpeg", verify=True))
    cache = CacheReader(tmp_path / "c")
    np.testing.assert_array_equal(cache.actions(), source.actions())
    for i in range(len(source)):
        for camera, image in source.images(i).items():
            if source.jpeg(i, camera) is not None:  # the wrist's are PNG
                assert cache.jpeg(i, camera) == source.jpeg(i, camera)
                np.testing.assert_array_equal(cache.images(i)[camera], image)
    run(Settings(str(RLDS), "lerobot", tmp_path / "l", fps=5, instruction="wave"))
    assert len(LeRobotReader(tmp_path / "l")) == len(source)
    damaged = Path(shutil.copytree(RLDS, tmp_path / "rlds"))
    shard = max(damaged.rglob("*-train.tfrecord*"), key=lambda path: path.stat().st_size)
    data = bytearray(shard.read_bytes())
    data[200] ^= 255
    shard.write_bytes(data)
    with pytest.raises(VlaError, match="tfrecord"):
        run(Settings(str(damaged), "cache", tmp_path / "d"))
    assert not (tmp_path / "d").exists()
    done = run(Settings(str(damaged), "cache", tmp_path / "d", skip_bad=True))
    assert (done.n_bad, done.n_episodes) == (1, source.n_episodes - 1)
    row = json.loads(bad_path(tmp_path / "d").read_text())
    assert row["file"] == str(shard) and row["record"] == 0 and row["episode"] is None
    assert run(Settings(str(damaged), "cache", tmp_path / "d", skip_bad=True)).n_bad == 1


def test_video_and_size(tmp_path):
    done = run(Settings(str(VIDEO), "cache", tmp_path / "c", size_px=24, episodes="0:1", cameras=("image",)))
    assert done.n_frames == 12 and CacheReader(tmp_path / "c").images(3)["image"].shape == (24, 24, 3)
    run(Settings(str(tmp_path / "c"), "lerobot", tmp_path / "v", "video", size_px=64))
    assert LeRobotReader(tmp_path / "v").images(3)["image"].shape == (64, 64, 3)


def test_episode_ranges():
    assert parse_range("", 3) == [0, 1, 2] == parse_range("0:100", 3)
    assert (
        parse_range("-2:", 5) == [3, 4] and parse_range("4,0:2", 5) == [4, 0, 1] and parse_range("::2", 5) == [0, 2, 4]
    )
    for text, message in (("a", "episodes 'a'"), ("7", "episode 7; expected 0..4"), ("1,1", "2, 1 different"),
                          ("3:3", "0, 0 different"), ("1:2:3:4", "such as"), (",", "such as"), ("::0", "such as")):  # fmt: skip
        with pytest.raises(VlaError, match=message):
            parse_range(text, 5)


def test_command_line(tmp_path):
    program, settings = parse(["data", "convert", "data/x", "--to", "cache", "--out", "y", "--episodes", "0:100",
                               "--images", "jpeg", "--cameras", "a", "b"])  # fmt: skip
    assert program.run == "run" and settings.cache.kind == "jpeg" and settings.cameras == ("a", "b")
    with pytest.raises(VlaError, match="--images video --to cache; expected raw or jpeg"):
        Settings("x", "cache", tmp_path, "video")
