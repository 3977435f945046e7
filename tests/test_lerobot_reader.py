"""The golden datasets were made once by lerobot 0.6.1: 3 episodes of 12, 13 and 14 frames of noise at 10 fps."""

from __future__ import annotations

import hashlib
import json
import pickle
import shutil
from pathlib import Path

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from vla.finetune.formats.lerobot_format import camera_of, file_path, names_of
from vla.finetune.formats.lerobot_reader import LeRobotReader
from vla.finetune.formats.lerobot_video import encode_video
from vla.types import VlaError

FIXTURES = Path(__file__).parent / "fixtures"
IMAGE, VIDEO = FIXTURES / "lerobot_v3_image", FIXTURES / "lerobot_v3_video"
GOLDEN = (IMAGE, VIDEO)


def tree_hash(root: Path) -> str:
    """Names and contents of every file."""
    digest = hashlib.sha256()
    for path in sorted(p for p in root.rglob("*") if p.is_file()):
        digest.update(str(path.relative_to(root)).encode() + path.read_bytes())
    return digest.hexdigest()


@pytest.fixture
def copy(tmp_path):
    def make(source: Path) -> Path:
        return Path(shutil.copytree(source, tmp_path / source.name))

    return make


@pytest.mark.parametrize("root", GOLDEN)
def test_golden_numbers(root):
    reader = LeRobotReader(root)
    table = pq.read_table(root / "data/chunk-000/file-000.parquet")
    assert (len(reader), reader.n_episodes, reader.fps) == (39, 3, 10.0)
    assert reader.cameras == ("image", "image2") and reader.state_key == "observation.state"
    assert reader.action_names == ("dx", "dy", "dz", "drx", "dry", "drz", "gripper")
    assert (reader.action_dim, reader.state_dim) == (7, 8)
    assert reader.tasks == {0: "put the bowl on the plate", 1: "open the drawer"}
    assert [(e.index, e.start, e.stop) for e in reader.episodes] == [(0, 0, 12), (1, 12, 25), (2, 25, 39)]
    for got, key in ((reader.actions(), "action"), (reader.states(), "observation.state")):
        assert got is not None and got.dtype == np.float32
        np.testing.assert_array_equal(got, np.array(table.column(key).to_pylist(), np.float32))
    for key in ("timestamp", "frame_index", "episode_index", "index", "task_index", "next.success"):
        np.testing.assert_array_equal(reader.column(key), table.column(key).to_numpy())
    assert [reader.episode_of(i) for i in (0, 11, 12, 24, 25, 38)] == [0, 0, 1, 1, 2, 2]
    assert reader.instruction_of(12) == reader.tasks[int(table.column("task_index")[12].as_py())]


@pytest.mark.parametrize("root", GOLDEN)
def test_golden_episode(root):
    reader = LeRobotReader(root, name="libero")
    episode = reader.episode(1)
    assert (len(episode), episode.dataset, episode.success, episode.seed, episode.task) == (
        13,
        "libero",
        True,
        None,
        None,
    )
    frame = reader.frame(12 + 4)
    np.testing.assert_array_equal(episode.steps[4].observation.images["image2"], frame["images"]["image2"])
    np.testing.assert_array_equal(episode.steps[4].action, frame["action"])
    assert (frame["episode_index"], frame["frame_index"], frame["timestamp"]) == (1, 4, pytest.approx(0.4))
    assert [step.success for step in episode.steps] == [False] * 12 + [True]
    lengths = [len(e) for e in reader.iter_episodes(cameras=())]
    assert lengths == [12, 13, 14]


def test_video_frames_are_exact_in_any_order():
    """Every frame, at random and at both sides of the episode boundaries inside one MP4, equals a plain decode."""
    reader = LeRobotReader(VIDEO)
    for camera in reader.cameras:
        with av.open(str(VIDEO / f"videos/observation.images.{camera}/chunk-000/file-000.mp4")) as container:
            plain = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
        order = [11, 12, 24, 25, 38, 0, 38, 12, 11, *np.random.default_rng(0).permutation(39), *range(39)]
        for i in order:
            np.testing.assert_array_equal(reader.images(int(i), [camera])[camera], plain[i])


def test_video_shows_the_frames_of_the_image_dataset():
    images, video = LeRobotReader(IMAGE), LeRobotReader(VIDEO)
    exact = np.stack([images.images(i)["image"] for i in range(39)]).astype(int)
    for i in (0, 11, 12, 24, 25, 38):
        distance = np.abs(exact - video.images(i)["image"]).mean(axis=(1, 2, 3))
        assert distance.argmin() == i


def test_readers_survive_pickling_and_forks():
    reader = LeRobotReader(VIDEO)
    first = reader.images(7)["image"]
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(reader)).images(7)["image"], first)


@pytest.mark.parametrize("bframes", ["0", "3"])
def test_long_gops_and_b_frames(tmp_path, bframes):
    from vla.finetune.formats.lerobot_video import VideoFile

    path = tmp_path / "a.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=30, options={"g": "40", "bf": bframes, "crf": "1"})
        stream.width = stream.height = 64
        stream.pix_fmt = "yuv420p"
        for i in range(100):
            frame = av.VideoFrame.from_ndarray(np.full((64, 64, 3), 2 * i, np.uint8), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    file = VideoFile(path)
    for i in [0, 99, 1, 39, 40, 41, 40, 80, 79, 3, 98, *range(20)]:
        assert abs(int(file.frame_at(i / 30, 1e-4).mean()) - 2 * i) <= 1


def test_converted_datasets_variable_lists_and_one_row_group(copy):
    """What the official converter from v2.1 leaves: list<float>, one row group, no quantiles, no next.success."""
    root = copy(IMAGE)
    path = root / "data/chunk-000/file-000.parquet"
    table = pq.read_table(path).drop(["next.success"])
    for key in ("action", "observation.state"):
        values = pa.array(table.column(key).to_pylist(), pa.list_(pa.float32()))
        table = table.set_column(table.schema.get_field_index(key), key, values)
    pq.write_table(table, path, row_group_size=1000)
    info = json.loads((root / "meta/info.json").read_text())
    del info["features"]["next.success"]
    info["something_new"] = {"a": 1}
    (root / "meta/info.json").write_text(json.dumps(info))
    (root / "meta/stats.json").unlink()
    reader, golden = LeRobotReader(root), LeRobotReader(IMAGE)
    np.testing.assert_array_equal(reader.actions(), golden.actions())
    np.testing.assert_array_equal(reader.images(25)["image2"], golden.images(25)["image2"])
    assert reader.success_of(0) is None and reader.episode(0).success is None


def test_ragged_action_is_an_error(copy):
    root = copy(IMAGE)
    path = root / "data/chunk-000/file-000.parquet"
    table = pq.read_table(path)
    rows = table.column("action").to_pylist()
    rows[5] = rows[5][:6]
    table = table.set_column(table.schema.get_field_index("action"), "action", pa.array(rows, pa.list_(pa.float32())))
    pq.write_table(table, path)
    with pytest.raises(VlaError, match=r"file-000.parquet: action: 6 values in row 5; expected 7"):
        LeRobotReader(root).actions()


def _cut(path: Path, keep: float) -> None:
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * keep)])


@pytest.mark.parametrize("keep", [0.0, 0.5, 0.99])
def test_truncated_parquet(copy, keep):
    root = copy(IMAGE)
    _cut(root / "data/chunk-000/file-000.parquet", keep)
    before = tree_hash(root)
    for read in (lambda r: r.actions(), lambda r: r.images(3)):
        with pytest.raises(VlaError, match=r"data/chunk-000/file-000.parquet .*expected a whole parquet file.*fix: "):
            read(LeRobotReader(root))
    assert tree_hash(root) == before


def test_episode_table_without_footer(copy):
    root = copy(IMAGE)
    path = root / "meta/episodes/chunk-000/file-000.parquet"
    path.write_bytes(path.read_bytes()[:-8])  # the writer was never finalized
    with pytest.raises(VlaError, match=r"meta/episodes/chunk-000/file-000.parquet .*footer.*never finalized"):
        LeRobotReader(root)


@pytest.mark.parametrize("keep", [0.0, 0.5, 0.9])
def test_truncated_mp4(copy, keep):
    root = copy(VIDEO)
    _cut(root / "videos/observation.images.image/chunk-000/file-000.mp4", keep)
    before = tree_hash(root)
    with pytest.raises(VlaError, match=r"observation.images.image/chunk-000/file-000.mp4.*fix: the file is damaged"):
        LeRobotReader(root).images(38)
    assert tree_hash(root) == before


def test_video_that_ends_too_early(copy):
    root = copy(VIDEO)
    path = root / "videos/observation.images.image/chunk-000/file-000.mp4"
    path.write_bytes(encode_video([np.full((64, 64, 3), 9, np.uint8)] * 20, 10, "libx264"))
    reader = LeRobotReader(root)
    assert reader.images(19, ["image"])["image"].shape == (64, 64, 3)
    with pytest.raises(VlaError, match=r"no frame at 2\.5\d* s in .*file-000.mp4: the file ends before it"):
        reader.images(25, ["image"])


def test_unknown_camera_and_frame():
    reader = LeRobotReader(IMAGE)
    with pytest.raises(VlaError, match=r"got camera 'wrist'; expected one of image, image2"):
        reader.images(0, ["wrist"])
    with pytest.raises(VlaError, match=r"got frame 39; expected 0\.\.38"):
        reader.images(39)
    with pytest.raises(VlaError, match=r"got episode 3; expected 0\.\.2"):
        reader.episode(3)
    with pytest.raises(VlaError, match=r"no feature 'effort'"):
        reader.column("effort")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"codebase_version": "v1.6"}, r"codebase_version 'v1.6'; expected v3.0, v2.1 or v2.0; fix: convert"),
        ({"fps": None}, "fps is None"),
        ({"features": {"action": {"shape": [7]}}}, "feature 'action'"),
        ({"total_episodes": 4}, "total_episodes is 4 but the table of episodes has 3"),
        ({"data_path": "../../{chunk_index}.parquet"}, "expected a path inside the dataset"),
        ({"data_path": "data/{nonsense}.parquet"}, "file pattern"),
        ({"data_path": "data/{chunk_index}.parquet"}, "no file .*data/0.parquet"),
    ],
)
def test_bad_info(copy, change, message):
    root = copy(IMAGE)
    info = json.loads((root / "meta/info.json").read_text())
    (root / "meta/info.json").write_text(json.dumps(info | change))
    with pytest.raises(VlaError, match=message):
        LeRobotReader(root).actions()


def test_missing_pieces(copy, tmp_path):
    with pytest.raises(VlaError, match=r"no .*meta/info.json; expected the root of a LeRobotDataset"):
        LeRobotReader(tmp_path / "nothing")
    root = copy(IMAGE)
    (root / "meta/info.json").write_text("{")
    with pytest.raises(VlaError, match=r"info.json: .*expected JSON"):
        LeRobotReader(root)
    shutil.copy(IMAGE / "meta/info.json", root / "meta/info.json")
    (root / "data/chunk-000/file-000.parquet").unlink()
    with pytest.raises(VlaError, match=r"no file .*file-000.parquet"):
        LeRobotReader(root).actions()


def test_damaged_png(copy):
    root = copy(IMAGE)
    path = root / "data/chunk-000/file-000.parquet"
    table = pq.read_table(path)
    cells = table.column("observation.images.image").to_pylist()
    cells[2]["bytes"] = cells[2]["bytes"][:500]
    cells[3] = {"bytes": None, "path": "frame-000003.png"}
    kind = table.schema.field("observation.images.image").type
    pq.write_table(table.set_column(0, "observation.images.image", pa.array(cells, kind)), path)
    reader = LeRobotReader(root)
    with pytest.raises(VlaError, match=r"file-000.parquet: observation.images.image in row 2: .*damaged"):
        reader.images(2)
    with pytest.raises(VlaError, match=r"row 3: no image bytes"):
        reader.images(3)
    np.testing.assert_array_equal(reader.images(4)["image"], LeRobotReader(IMAGE).images(4)["image"])


def test_names():
    assert camera_of("observation.images.wrist_left") == "wrist_left"
    assert camera_of("observation.image") == "image" and camera_of("action") is None
    assert names_of({"shape": [2], "names": ["a", "b"]}) == ("a", "b")
    assert names_of({"shape": [2], "names": {"motors": ["a", "b"]}}) == ("a", "b")
    assert names_of({"shape": [2], "names": None}) == names_of({"shape": [2], "names": ["a"]}) == ("0", "1")
    assert file_path(Path("r"), "v/{video_key}/{chunk_index:03d}-{file_index}.mp4", 1, 2, "k") == Path(
        "r/v/k/001-2.mp4"
    )
