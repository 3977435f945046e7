"""Planted faults in every format: the bad episodes are counted and listed, the others are as they were, training goes on."""

from __future__ import annotations

import json
import pickle
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from episodes import WRITER, assert_same_episode, make_episode
from sources import toy_source
from test_hdf5_reader import change
from test_hdf5_reader import write as write_hdf5
from test_hub import server  # noqa: F401
from test_rlds_reader import flip, rewrite, shard
from training import sft_settings, tiny_backbone

from vla.finetune import sft
from vla.finetune.data import data_convert
from vla.finetune.data.chunks import ChunkDataset
from vla.finetune.data.open_source import open_source
from vla.finetune.data.without_bad import image_fault, without_bad
from vla.finetune.formats.bad_list import BAD_JSONL, bad_summary
from vla.finetune.formats.cache_format import CacheSettings
from vla.finetune.formats.cache_writer import CacheWriter
from vla.finetune.formats.lerobot_format import encode_png
from vla.finetune.formats.lerobot_reader import LeRobotReader
from vla.finetune.formats.lerobot_writer import LeRobotWriter
from vla.finetune.formats.rlds_reader import RldsReader
from vla.finetune.formats.source import FrameSource, Unreachable
from vla.finetune.formats.tfrecord import read_records
from vla.types import VlaError

FIXTURES = Path(__file__).parent / "fixtures"
RLDS = FIXTURES / "rlds" / "tiny_arm"


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("VLA_CACHE", str(tmp_path / "index"))


def write_lerobot(root: Path, n: int = 4) -> Path:
    """v3.0, one data file per episode."""
    with LeRobotWriter(root, **WRITER) as writer:
        for k in range(n):
            writer.add_episode(make_episode(k))
    return root


def data_file(root: Path, episode: int) -> Path:
    return sorted(root.glob("data/*/*.parquet"))[episode]


def edit(path: Path, f: Callable[[pa.Table], pa.Table]) -> None:
    table = pq.read_table(path)
    pq.write_table(f(table), path, row_group_size=len(table))


def with_cell(table: pa.Table, key: str, row: int, value: Any) -> pa.Table:
    """Another value in one cell."""
    values = table.column(key).to_pylist()
    values[row] = value
    k = table.column_names.index(key)
    kind = pa.list_(pa.float32()) if isinstance(value, list) else table.schema.field(key).type
    return table.set_column(k, key, pa.array(values, kind))


def assert_rest(found: FrameSource, clean: FrameSource, bad: list[int]) -> None:
    """`found` is `clean` without the episodes `bad`, bit for bit, also in another process."""
    kept = [k for k in range(clean.n_episodes) if k not in bad]
    assert (found.n_episodes, len(found.bad)) == (len(kept), len(bad)), found.bad
    for source in (found, pickle.loads(pickle.dumps(found))):
        assert source.bad == found.bad and [span.index for span in source.episodes] == list(range(len(kept)))
        for k, episode in enumerate(kept):
            assert_same_episode(source.episode(k), clean.episode(episode))
            assert source.place_of(k) != found.bad[0].record


def test_lerobot_v3(tmp_path, capsys):
    clean = LeRobotReader(write_lerobot(tmp_path / "clean" / "d", 8))
    root = Path(shutil.copytree(clean.root, tmp_path / "d"))
    edit(data_file(root, 1), lambda t: with_cell(t, "action", 2, [0.0, float("nan"), 0.0]))
    data_file(root, 2).write_bytes(data_file(root, 2).read_bytes()[:-300])
    edit(data_file(root, 3), lambda t: t.drop_columns(["observation.state"]))
    edit(data_file(root, 4), lambda t: t.drop_columns(["observation.images.wrist"]))
    edit(data_file(root, 5), lambda t: t.slice(0, 4))
    png = encode_png(make_episode(6).steps[2].observation.images["front"])
    broken = png[:60] + bytes([png[60] ^ 1]) + png[61:]
    edit(data_file(root, 6), lambda t: with_cell(t, "observation.images.front", 2, {"bytes": broken, "path": None}))
    with pytest.raises(VlaError):
        open_source(root).actions()
    found = open_source(root, skip_bad=True)
    assert_rest(found, clean, [1, 2, 3, 4, 5, 6])
    assert sorted(bad.record for bad in found.bad) == [1, 2, 3, 4, 5, 6]  # type: ignore[type-var]
    why = {bad.record: bad.why for bad in found.bad}
    assert "episode 1: nan in action, dimension 1, step 2" in why[1] and "whole parquet file" in why[2]
    assert "without column observation.state" in why[3] and "observation.images.wrist" in why[4]
    assert "with 4 rows; expected 5" in why[5] and "observation.images.front in row 2" in why[6]
    assert all(Path(bad.file).name == data_file(root, int(bad.record or 0)).name for bad in found.bad)
    said = capsys.readouterr().err
    assert "6 bad episodes left out:" in said and "and 3 more" in said and "ETA" in said
    assert open_source(clean.root, skip_bad=True).bad == ()


@pytest.mark.parametrize("value", [[0.0] * 6, [float("inf")] * 7])
def test_one_data_file_with_several_episodes(tmp_path, value):
    """lerobot's own: a row of another width, or not finite, costs its episode only."""
    clean = LeRobotReader(FIXTURES / "lerobot_v3_image")
    root = Path(shutil.copytree(clean.root, tmp_path / "lerobot_v3_image"))
    edit(data_file(root, 0), lambda t: with_cell(t, "action", 15, value))
    assert_rest(open_source(root, skip_bad=True), clean, [1])
    edit(data_file(root, 0), lambda t: t.slice(0, 30))  # and the third is cut
    assert_rest(open_source(root, skip_bad=True), clean, [1, 2])
    edit(data_file(root, 0), lambda t: t.slice(1))  # all rows have moved
    with pytest.raises(VlaError, match="without one usable episode"):
        open_source(root, skip_bad=True)


@pytest.mark.parametrize("kind", ["image", "video"])
def test_lerobot_v21(tmp_path, kind):
    clean = LeRobotReader(FIXTURES / f"lerobot_v21_{kind}")
    root = Path(shutil.copytree(clean.root, tmp_path / clean.root.name))
    if kind == "video":
        path = next(root.glob("videos/*/*wrist/episode_000001.mp4"))
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    else:
        data_file(root, 1).unlink()
    found = open_source(root, skip_bad=True)
    assert_rest(found, clean, [1])
    assert ("episode_000001.mp4" if kind == "video" else "no file") in found.bad[0].why


def test_images_beside_the_parquet_files_keep_their_numbers(tmp_path):
    """v2.x with paths in its cells: an episode left out does not move the folders of the others."""
    clean = LeRobotReader(FIXTURES / "lerobot_v21_image")
    root = Path(shutil.copytree(clean.root, tmp_path / clean.root.name))
    for k, span in enumerate(clean.episodes):
        for camera, key in clean.camera_keys.items():
            folder = root / f"images/{key}/episode_{k:06d}"
            folder.mkdir(parents=True)
            cells = []
            for i in range(span.start, span.stop):
                name = f"frame_{i - span.start:06d}.png"
                (folder / name).write_bytes(encode_png(clean.images(i, [camera])[camera]))
                cells.append({"bytes": None, "path": name})
            edit(data_file(root, k), lambda t, key=key, cells=cells: t.set_column(
                t.column_names.index(key), key, pa.array(cells, t.schema.field(key).type)))  # fmt: skip
    data_file(root, 0).unlink()
    assert_rest(open_source(root, skip_bad=True), clean, [0])
    parts = list(LeRobotReader(FIXTURES / "lerobot_v21_image").parts())
    assert [part.place_of(0)[1] for part in parts] == [0, 1, 2]


def test_hdf5(tmp_path):
    clean_root, root = tmp_path / "clean" / "suite", tmp_path / "suite"
    for task in ("a", "b"):
        write_hdf5(clean_root / f"{task}_demo.hdf5", {f"demo_{k}": 4 + k for k in range(5)}, seed=ord(task))
    shutil.copytree(clean_root, root)
    a = root / "a_demo.hdf5"
    change(a, "data/demo_0/obs/eye_in_hand_rgb", None)  # the first one: the others say what there should be
    actions = np.zeros((5, 7))
    actions[3, 2] = np.nan
    change(a, "data/demo_1/actions", actions)
    change(a, "data/demo_3/obs/ee_states", np.zeros((3, 6)))
    with h5py.File(a, "r+") as file:
        del file["data/demo_4/obs"]
    (root / "c_demo.hdf5").write_bytes((root / "b_demo.hdf5").read_bytes()[:2000])
    with pytest.raises(VlaError):
        open_source(root)
    found, clean = open_source(root, skip_bad=True), open_source(clean_root)
    assert_rest_but_file(found, clean, [0, 1, 3, 4])
    assert [(Path(bad.file).name, bad.record) for bad in found.bad] == [
        *(("a_demo.hdf5", f"demo_{k}") for k in (0, 1, 3, 4)), ("c_demo.hdf5", None)]  # fmt: skip
    assert "nan at step 3, dimension 2" in found.bad[1].why and "eye_in_hand_rgb" in found.bad[0].why
    done = data_convert.run(data_convert.Settings(str(root), "cache", tmp_path / "out", skip_bad=True))
    assert (done.n_episodes, done.n_bad) == (6, 5)
    rows = [json.loads(line) for line in data_convert.bad_path(tmp_path / "out").read_text().splitlines()]
    assert [row["record"] for row in rows] == ["demo_0", "demo_1", "demo_3", "demo_4", None]


def assert_rest_but_file(found: FrameSource, clean: FrameSource, bad: list[int]) -> None:
    """As `assert_rest`; one more is listed, a file that cannot be opened."""
    kept = [k for k in range(clean.n_episodes) if k not in bad]
    assert (found.n_episodes, len(found.bad)) == (len(kept), len(bad) + 1)
    for source in (found, pickle.loads(pickle.dumps(found))):
        for k, episode in enumerate(kept):
            assert_same_episode(source.episode(k), clean.episode(episode))


def test_rlds(tmp_path):
    clean = RldsReader(RLDS)
    root = Path(shutil.copytree(RLDS, tmp_path / "tiny_arm"))
    version = root / "1.0.0"
    flip(shard(version, 1), list(read_records(shard(version, 1)))[1].offset + 50)  # CRC
    shard(version, 0).unlink()  # of two episodes
    image = clean.encoded(clean.episodes[-1].start + 1, "image")

    def spoil(data: bytearray) -> None:
        at = data.find(image)
        data[at : at + 4] = b"none"

    rewrite(shard(version, 2), 1, spoil)
    found = open_source(root, skip_bad=True)
    assert [(Path(bad.file).name[-14:], bad.record) for bad in found.bad] == [
        ("00000-of-00003", 0), ("00000-of-00003", 1), ("00001-of-00003", 1), ("00002-of-00003", 1)]  # fmt: skip
    assert_rest(found, clean, [0, 1, 3, clean.n_episodes - 1])


@pytest.mark.parametrize("kind", ["raw", "jpeg"])
def test_our_cache(tmp_path, monkeypatch, kind):
    monkeypatch.setattr(CacheSettings, "frames_per_shard", lambda self, shape: 8)
    original, root = toy_source(5, n=7), tmp_path / "clean" / "c"
    writer = CacheWriter(root, original, CacheSettings(kind))
    for i in range(5):
        writer.add_episode(i)
    writer.finish()
    clean = open_source(root)
    damaged = Path(shutil.copytree(root, tmp_path / "c"))
    path = next(damaged.glob("images/00_front/shard-00001.*[gy]"))  # frames 8..15
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(VlaError, match="bytes; expected"):
        open_source(damaged)
    found = open_source(damaged, skip_bad=True)
    assert_rest(found, clean, [1, 2])  # frames 7..14 and 15..23
    assert all("shard-00001" in bad.why for bad in found.bad)
    if kind == "jpeg":  # and a file inside another shard
        path = damaged / "images/00_front/shard-00003.jpg"  # frames 24..31, all of the fourth episode
        data, offsets = bytearray(path.read_bytes()), np.load(path.with_suffix(".offsets.npy"))
        data[offsets[3] : offsets[3] + 4] = b"none"
        path.write_bytes(data)
        assert_rest(open_source(damaged, skip_bad=True), clean, [1, 2, 3])
    for path in damaged.glob("images/01_*/*"):
        path.unlink()
    with pytest.raises(VlaError, match="without one usable episode"):
        open_source(damaged, skip_bad=True)
    column = root / "columns" / "action.npy"
    column.write_bytes(column.read_bytes()[:-4])
    with pytest.raises(VlaError, match="action.npy"):
        open_source(root, skip_bad=True)


def test_hub(server, monkeypatch):  # noqa: F811
    clean = LeRobotReader(FIXTURES / "lerobot_v21_image")
    root = server.root / "toy/v21_image"
    data_file(root, 1).unlink()
    edit(data_file(root, 1), lambda t: with_cell(t, "action", 0, [float("nan")] * clean.action_dim))  # the third's
    found = open_source("hf://datasets/toy/v21_image", skip_bad=True)
    assert_rest(found, clean, [1, 2])
    assert "every file that the dataset's tables name" in found.bad[0].why
    monkeypatch.setattr(LeRobotReader, "there", _no_connection)
    with pytest.raises(Unreachable):  # that is no fault of the data
        open_source("hf://datasets/toy/v21_image", skip_bad=True)


def _no_connection(self: LeRobotReader, path: Path) -> Path:
    raise Unreachable(f"no connection for {path}")


def test_probe_all_and_nothing_left():
    source = toy_source(3)
    source.broken = {source.episodes[1].start + 3}
    assert without_bad(source) is source and source.bad == ()  # in the middle: training will find it
    found = without_bad(source, probe_all=True)
    assert found.n_episodes == 2 and found.bad[0].record == 1 and "broken frame" in found.bad[0].why
    source.broken = {span.start for span in source.episodes}
    with pytest.raises(VlaError, match=r"without one usable episode \(first: .*broken frame 0"):
        without_bad(source)


def test_structure_of_image_files():
    png = encode_png(np.arange(600, dtype=np.uint8).reshape(10, 20, 3))
    assert image_fault(png) is None and image_fault(png + b"\0") is None
    assert image_fault(b"") == image_fault(b"GIF89a") == "neither JPEG nor PNG"
    for k in range(8, len(png) - 12):
        spoilt = png[:k] + bytes([png[k] ^ 4]) + png[k + 1 :]
        assert str(image_fault(spoilt)).startswith("PNG"), k
        assert str(image_fault(png[:k])).startswith("PNG that is cut off")
    jpeg = b"\xff\xd8\xff\xe0" + zlib.compress(b"x") + b"\xff\xd9"
    assert image_fault(jpeg) is None and image_fault(jpeg + b"\0\0") is None
    assert image_fault(jpeg[:-1]) == "JPEG without its end"


@pytest.mark.parametrize("cached", [True, False])
def test_samples_that_cannot_be_decoded(cached):
    source = toy_source(3)
    a, b = source.episodes[0].start + 3, source.episodes[-1].stop - 1
    source.broken = {a, a + 1, b}
    with pytest.raises(VlaError, match="broken frame"):
        [ChunkDataset([("x", source)], 2, cache_images=cached)[i] for i in range(len(source))]
    dataset = ChunkDataset([("x", source)], 2, cache_images=cached, skip_bad=True)
    order = [b, a, a + 1, a]
    states = source.states()
    assert states is not None
    for index, expected in zip(order, [0, a + 2, a + 2, a + 2], strict=True):
        sample = dataset[index]
        np.testing.assert_array_equal(sample.state, states[expected])
        np.testing.assert_array_equal(sample.images["front"], source.images(expected)["front"])
    assert sorted(dataset.bad_frames) == [(0, a), (0, a + 1), (0, b)]
    source.broken = set(range(len(source)))
    with pytest.raises(VlaError, match="frames that cannot be decoded"):
        ChunkDataset([("x", source)], 2, cache_images=cached, skip_bad=True)[0]


def test_training_goes_on_and_lists_what_it_left_out(tmp_path, capsys):
    root, broken = write_lerobot(tmp_path / "fake"), b"\xff\xd8\xff" + b"\0" * 50 + b"\xff\xd9"
    edit(data_file(root, 1), lambda t: with_cell(t, "action", 0, [float("nan")] * 3))
    edit(data_file(root, 2), lambda t: with_cell(t, "observation.images.front", 2, {"bytes": broken, "path": None}))
    tiny_backbone(tmp_path)
    plain = {"cameras": ("front",), "holdout_episodes": 0, "gripper_dim": None}
    out = tmp_path / "run"
    changes = {"skip_bad": True, "steps": 4, "cache_images": False, **plain}  # 4 x 4 samples of 15: every frame is met
    sft.run(sft_settings(tmp_path, **changes))
    sft.run(sft_settings(tmp_path, resume=True, **changes))  # lists nothing twice
    rows = [json.loads(line) for line in (out / BAD_JSONL).read_text().splitlines()]
    assert [(row["dataset"], row["record"], row.get("frame")) for row in rows] == [("fake", 1, None), ("fake", 2, 2)]
    assert "nan in action" in rows[0]["error"] and rows[1]["file"] == str(data_file(root, 2))
    assert bad_summary(out) == [f"1 bad episodes and 1 samples left out: {out / BAD_JSONL}"]
    assert "1 bad episodes and 1 samples left out" in capsys.readouterr().out
    edit(data_file(root, 1), lambda t: with_cell(t, "action", 0, [0.0] * 3))
    with pytest.raises(VlaError, match="image"):  # without it, the reader's error, and before anything is written
        sft.run(sft_settings(tmp_path, out=tmp_path / "stops", **plain))
    assert not (tmp_path / "stops").exists()
