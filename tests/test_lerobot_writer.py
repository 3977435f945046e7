from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from episodes import CAMERAS, WRITER, assert_same_episode, make_episode, smooth_episode

from vla import files
from vla.finetune.formats import lerobot_stats, lerobot_tables, lerobot_writer
from vla.finetune.formats.lerobot_reader import LeRobotReader
from vla.finetune.formats.lerobot_writer import LeRobotWriter
from vla.types import VlaError

FIXTURES = Path(__file__).parent / "fixtures"


def write(root: Path, n: int, **changes: Any) -> LeRobotReader:
    with LeRobotWriter(root, **(WRITER | changes)) as writer:
        for k in range(n):
            assert writer.add_episode(make_episode(k, 4 + k)) == k
    return LeRobotReader(root)


def test_round_trip_is_exact(tmp_path):
    reader = write(tmp_path / "a", 3)
    assert (len(reader), reader.n_episodes, reader.cameras, reader.fps) == (4 + 5 + 6, 3, tuple(CAMERAS), 10.0)
    for k in range(3):
        assert_same_episode(reader.episode(k), make_episode(k, 4 + k))
    np.testing.assert_allclose(reader.timestamps()[4:9], np.arange(5) / 10, atol=1e-7)


@pytest.fixture(scope="module")
def rewritten(tmp_path_factory):
    """The golden image dataset, read and written again by us."""
    golden = LeRobotReader(FIXTURES / "lerobot_v3_image")
    roots = {}
    for mode in ("image", "video"):
        roots[mode] = tmp_path_factory.mktemp("rewritten") / mode
        cameras = {"image": (64, 64), "image2": (64, 64)}
        with LeRobotWriter(roots[mode], 10, cameras, golden.state_names, golden.action_names, "panda", mode) as writer:
            for episode in golden.iter_episodes():
                writer.add_episode(episode)
    return roots


OURS = {"next.reward", "seed", "task_name"}  # features lerobot's example does not have


@pytest.mark.parametrize("mode", ["image", "video"])
def test_info_as_lerobot_writes_it(rewritten, mode):
    golden = json.loads((FIXTURES / f"lerobot_v3_{mode}/meta/info.json").read_text())
    ours = json.loads((rewritten[mode] / "meta/info.json").read_text())
    assert list(ours) == list(golden)
    assert {k: v for k, v in ours.items() if k != "features"} == {k: v for k, v in golden.items() if k != "features"}
    features = {k: v for k, v in ours["features"].items() if k not in OURS}
    assert features == golden["features"] and list(features) == list(golden["features"])


@pytest.mark.parametrize("mode", ["image", "video"])
def test_data_files_as_lerobot_writes_them(rewritten, mode):
    golden = pq.ParquetFile(FIXTURES / f"lerobot_v3_{mode}/data/chunk-000/file-000.parquet")
    ours = [pq.ParquetFile(path) for path in sorted((rewritten[mode] / "data").rglob("*.parquet"))]
    assert [file.metadata.num_rows for file in ours] == [12, 13, 14]
    assert {file.metadata.row_group(0).column(0).compression for file in ours} == {"SNAPPY"}
    assert {file.num_row_groups for file in ours} == {1}  # one per episode, as there
    fields = [(f.name, f.type) for f in ours[0].schema_arrow if f.name not in OURS]
    assert fields == [(f.name, f.type) for f in golden.schema_arrow]
    described = json.loads(ours[0].schema_arrow.metadata[b"huggingface"])
    expected = json.loads(golden.schema_arrow.metadata[b"huggingface"])
    assert described.keys() == expected.keys()
    kept = {k: v for k, v in described["info"]["features"].items() if k not in OURS}
    assert kept == expected["info"]["features"]
    assert described["info"]["features"]["seed"] == {"dtype": "int64", "_type": "Value"}
    table, there = pa.concat_tables([file.read() for file in ours]), golden.read()
    for field in golden.schema_arrow:
        if not field.name.startswith("observation.images"):
            assert table.column(field.name).to_pylist() == there.column(field.name).to_pylist()
        else:
            paths = [[cell["path"] for cell in t.column(field.name).to_pylist()] for t in (table, there)]
            assert paths[0] == paths[1]


def test_tables_as_lerobot_writes_them(rewritten):
    for mode in ("image", "video"):
        golden_root = FIXTURES / f"lerobot_v3_{mode}"
        golden = pq.read_table(golden_root / "meta/episodes/chunk-000/file-000.parquet")
        ours = pq.read_table(rewritten[mode] / "meta/episodes/chunk-000/file-000.parquet")
        names = [n for n in ours.column_names if not (n.startswith("stats/") and n.split("/")[1] in OURS)]
        assert names == golden.column_names
        for name in names:
            assert ours.schema.field(name).type == golden.schema.field(name).type, name
        for name in ("episode_index", "tasks", "length", "dataset_from_index", "dataset_to_index"):
            assert ours.column(name).to_pylist() == golden.column(name).to_pylist()
        tasks = [pq.read_table(root / "meta/tasks.parquet") for root in (rewritten[mode], golden_root)]
        assert tasks[0].to_pylist() == tasks[1].to_pylist()
        pandas = [json.loads(t.schema.metadata[b"pandas"]) for t in tasks]
        for key in ("index_columns", "column_indexes", "columns"):
            assert pandas[0][key] == pandas[1][key]


def test_stats_are_lerobots_but_with_true_quantiles(rewritten):
    golden = json.loads((FIXTURES / "lerobot_v3_image/meta/stats.json").read_text())
    ours = json.loads((rewritten["image"] / "meta/stats.json").read_text())
    reader = LeRobotReader(rewritten["image"])
    assert set(ours) == set(golden) | OURS - {"task_name"}
    for key, expected in golden.items():
        assert set(ours[key]) == set(expected) and ours[key]["count"] == expected["count"] == [39]
        for name in ("min", "max", "mean", "std"):
            got, want = np.array(ours[key][name]), np.array(expected[name])
            assert got.shape == want.shape
            np.testing.assert_allclose(got, want, atol=5e-3 if "images" in key else 1e-5)  # it samples pixels
    for name, q in (("q01", 0.01), ("q10", 0.1), ("q50", 0.5), ("q90", 0.9), ("q99", 0.99)):
        np.testing.assert_array_equal(ours["action"][name], np.quantile(reader.actions().astype(np.float64), q, axis=0))
    assert abs(ours["action"]["q01"][1] - golden["action"]["q01"][1]) > 0.05  # what merging per episode costs


def test_histogram_statistics_equal_numpy():
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 256, (9, 7, 3), dtype=np.uint8) // (k + 1) for k in range(4)]
    stats = lerobot_stats.histogram_stats(lerobot_stats.image_histogram(images))
    pixels = np.stack(images).reshape(-1, 3) / 255.0
    expected = lerobot_stats.column_stats(pixels)
    for name in ("min", "max", "mean", "std", "q01", "q10", "q50", "q90", "q99"):
        np.testing.assert_allclose(stats[name].reshape(3), expected[name], atol=1e-12)
    assert stats["count"].tolist() == [4]


@pytest.mark.parametrize("encoder", ["libsvtav1", "libx264"])
def test_video_mode(tmp_path, monkeypatch, encoder):
    monkeypatch.setattr(lerobot_writer, "choose_encoder", lambda: encoder)
    changes = WRITER | {"cameras": {"front": (64, 64)}, "image_mode": "video"}
    with LeRobotWriter(tmp_path / "v", **changes) as writer:
        for k in range(3):
            writer.add_episode(smooth_episode(k))
    reader = LeRobotReader(tmp_path / "v")
    assert (
        reader.features["observation.images.front"]["info"]["video.codec"]
        == {"libsvtav1": "av1", "libx264": "h264"}[encoder]
    )
    for i in np.random.default_rng(1).permutation(18):
        episode, k = divmod(int(i), 6)
        assert abs(reader.images(int(i))["front"].mean() - (10 + 20 * k + 3 * episode)) < 2


def test_rollover(tmp_path, monkeypatch):
    """Two files per chunk folder and two rows per episode table, and a resumed writer goes on in the same pattern."""
    monkeypatch.setattr(lerobot_writer, "EPISODES_PER_TABLE", 2)
    monkeypatch.setattr(lerobot_tables, "EPISODES_PER_TABLE", 2)
    root = tmp_path / "r"
    write(root, 3, chunks_size=2)
    with LeRobotWriter(root, **WRITER, chunks_size=2, resume=True) as writer:
        for k in range(3, 6):
            writer.add_episode(make_episode(k))
    found = sorted(str(p.relative_to(root)) for p in (root / "data").rglob("*.parquet"))
    assert found == [f"data/chunk-00{c}/file-00{f}.parquet" for c in range(3) for f in range(2)]
    tables = sorted(str(p.relative_to(root / "meta/episodes")) for p in (root / "meta/episodes").rglob("*.parquet"))
    assert tables == ["chunk-000/file-000.parquet", "chunk-000/file-001.parquet", "chunk-001/file-000.parquet"]
    reader = LeRobotReader(root)
    for k in range(6):
        assert_same_episode(reader.episode(k), make_episode(k, 4 + k if k < 3 else 5))


class Killed(BaseException):
    """Stands for kill -9: nothing in the code may catch it."""


@pytest.mark.parametrize("mode", ["image", "video"])
def test_killed_at_any_moment(tmp_path, monkeypatch, mode):
    """The process dies at each of its writes in turn, with half a temporary file left; then it is started again."""
    settings = WRITER | {"image_mode": mode, "resume": True}
    if mode == "video":
        monkeypatch.setattr(lerobot_writer, "choose_encoder", lambda: "libx264")
    true_replace, n_calls = files.os.replace, 0
    with LeRobotWriter(tmp_path / "whole", **settings) as writer:
        for k in range(2):
            writer.add_episode(make_episode(k))
    whole = LeRobotReader(tmp_path / "whole")

    for deadline in range(1, 50):
        root, n_calls = tmp_path / f"killed-{deadline}", 0

        def replace(source, target, deadline=deadline):
            nonlocal n_calls
            n_calls += 1
            if n_calls == deadline:
                with open(source, "r+b") as file:
                    file.truncate(10)
                raise Killed
            true_replace(source, target)

        monkeypatch.setattr(files.os, "replace", replace)
        finished = True
        try:
            with LeRobotWriter(root, **settings) as writer:
                for k in range(2):
                    writer.add_episode(make_episode(k))
        except Killed:
            finished = False
        monkeypatch.setattr(files.os, "replace", true_replace)
        if finished:
            assert deadline > 8
            return
        with LeRobotWriter(root, **settings) as writer:
            n_kept = writer.n_episodes
            for k in range(n_kept, 2):
                writer.add_episode(make_episode(k))
        reader = LeRobotReader(root)
        assert reader.n_episodes == 2 and not list(root.rglob("*.tmp"))
        if mode == "image":
            assert_same_episode(reader.episode(1), make_episode(1))
        for path in (p for p in (tmp_path / "whole").rglob("*") if p.is_file()):
            other = root / path.relative_to(tmp_path / "whole")
            if path.suffix == ".parquet":  # names of list items in the arrow schema may differ
                assert pq.read_table(other).equals(pq.read_table(path)), (deadline, other)
            else:
                assert other.read_bytes() == path.read_bytes(), (deadline, other)
        assert {p.name for p in root.rglob("*")} == {p.name for p in (tmp_path / "whole").rglob("*")}
        np.testing.assert_array_equal(reader.actions(), whole.actions())
        shutil.rmtree(root)
    raise AssertionError("never finished")


def test_leftovers_are_removed_and_ignored(tmp_path):
    root = tmp_path / "a"
    write(root, 2)
    stray = root / "data/chunk-000/file-002.parquet"
    stray.write_bytes(b"half an episode")
    assert LeRobotReader(root).n_episodes == 2
    with LeRobotWriter(root, **WRITER, resume=True):
        pass
    assert not stray.exists() and LeRobotReader(root).n_episodes == 2


def _tree(root: Path) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"resume": False}, "is not empty; expected a new folder"),
        ({"fps": 20}, "with fps 10; expected 20"),
        ({"action_names": ("a", "b")}, r"features action: .*'shape': \[3\].*; expected action: .*'shape': \[2\]"),
        ({"cameras": {"front": (16, 20)}}, "features"),
        ({"image_mode": "video", "cameras": {"front": (16, 20)}}, "with video_path None"),
    ],
)
def test_other_settings_change_nothing(tmp_path, changes, message):
    root = tmp_path / "a"
    write(root, 1)
    (root / "data/chunk-000/file-001.parquet").write_bytes(b"a leftover")
    before = _tree(root)
    with pytest.raises(VlaError, match=message):
        LeRobotWriter(root, **(WRITER | {"resume": True} | changes))
    assert _tree(root) == before


def test_datasets_of_other_programs_are_not_appended_to(tmp_path):
    root = tmp_path / "a"
    write(root, 2)
    table = pq.read_table(root / "meta/episodes/chunk-000/file-000.parquet")
    files_0 = pa.array([0, 0], pa.int64())
    table = table.set_column(table.schema.get_field_index("data/file_index"), "data/file_index", files_0)
    pq.write_table(table, root / "meta/episodes/chunk-000/file-000.parquet")
    with pytest.raises(VlaError, match="another program wrote this dataset"):
        LeRobotWriter(root, **WRITER, resume=True)


def test_bad_episodes_change_nothing(tmp_path):
    root = tmp_path / "a"
    writer = LeRobotWriter(root, **WRITER)
    writer.add_episode(make_episode(0))
    before, good = _tree(root), make_episode(1)
    step = good.steps[2]

    def with_step(**changes: Any) -> Any:
        return dataclasses.replace(good, steps=[*good.steps[:2], dataclasses.replace(step, **changes), *good.steps[3:]])

    nan = np.array([0, np.nan, 0], np.float32)
    blind = dataclasses.replace(step.observation, images={"front": step.observation.images["front"]})
    small = dataclasses.replace(
        step.observation, images=dict(step.observation.images, wrist=np.zeros((8, 8, 3), np.uint8))
    )
    stateless = dataclasses.replace(step.observation, state=None)
    for episode, message in (
        (dataclasses.replace(good, steps=[]), "0 steps"),
        (dataclasses.replace(good, instruction=""), "instruction ''"),
        (dataclasses.replace(good, success=None), "an episode without success"),
        (with_step(action=nan), "action .*nan.* at step 2; expected 3 finite numbers"),
        (with_step(action=np.zeros(2, np.float32)), "action .* at step 2"),
        (with_step(observation=stateless), "state None at step 2"),
        (with_step(observation=blind), r"no image of camera 'wrist' at step 2 \(there: front\)"),
        (with_step(observation=small), r"uint8 \(8, 8, 3\) of camera 'wrist' at step 2.*expected uint8 \(12, 12, 3\)"),
    ):
        with pytest.raises(VlaError, match=message):
            writer.add_episode(episode)
    assert _tree(root) == before
    writer.add_episode(good)
    writer.finalize()
    assert_same_episode(LeRobotReader(root).episode(1), good)


def test_unknown_seed_and_task_and_no_state(tmp_path):
    episode = dataclasses.replace(make_episode(0), seed=None, task=None, success=False)
    episode = dataclasses.replace(episode, steps=[dataclasses.replace(s, success=False) for s in episode.steps])
    with LeRobotWriter(tmp_path / "a", **dict(WRITER, state_names=())) as writer:
        writer.add_episode(episode)
    reader = LeRobotReader(tmp_path / "a")
    assert (reader.seed_of(0), reader.task_of(0), reader.success_of(0)) == (None, None, False)
    assert reader.states() is None and reader.state_dim == 0 and reader.episode(0).steps[0].observation.state is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"fps": 12.5}, "fps 12.5; expected a whole positive number"),
        ({"cameras": {"a/b": (16, 16)}}, "camera name 'a/b'"),
        ({"cameras": {"odd": (15, 16)}, "image_mode": "video"}, "camera odd of 15x16; expected even sides"),
    ],
)
def test_bad_writer_settings(tmp_path, changes, message):
    with pytest.raises(VlaError, match=message):
        LeRobotWriter(tmp_path / "a", **(WRITER | changes))
    assert not (tmp_path / "a").exists()
