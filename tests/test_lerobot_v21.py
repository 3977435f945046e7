"""The datasets and what lerobot reads from them (`*.npz`) were made once by lerobot 0.3.3, the last to write v2.1:
`LeRobotDataset.create -> add_frame -> save_episode`, 3 episodes of 7, 9 and 8 frames of 32 x 48 at 20 fps, then every
item read back. `sha.CAMERA` is the beginning of the SHA-256 of each frame's pixels; the npz of the video dataset also
holds some frames. torchvision dropped the video reader that lerobot 0.3.3 used; the same calls of PyAV stood in for it.
"""

from __future__ import annotations

import hashlib
import json
import pickle
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from vla.finetune.data.dataset_check import check_dataset
from vla.finetune.formats.lerobot_format import image_shape_of
from vla.finetune.formats.lerobot_reader import LeRobotReader
from vla.finetune.formats.source import FrameSource
from vla.types import VlaError

FIXTURES = Path(__file__).parent / "fixtures"
IMAGE, VIDEO = FIXTURES / "lerobot_v21_image", FIXTURES / "lerobot_v21_video"


@pytest.fixture
def copy(tmp_path):
    def make(source: Path) -> Path:
        return Path(shutil.copytree(source, tmp_path / source.name))

    return make


def sha(pixels: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(pixels).tobytes()).hexdigest()[:16]


@pytest.mark.parametrize("root", [IMAGE, VIDEO])
def test_numbers_and_texts_are_those_lerobot_reads(root):
    golden, reader = np.load(f"{root}.npz"), LeRobotReader(root)
    assert isinstance(reader, FrameSource) and reader.is_v2
    assert (len(reader), reader.n_episodes, reader.fps, reader.where) == (24, 3, 20.0, str(root))
    assert reader.cameras == ("top", "wrist") and reader.image_shape("top") == (32, 48, 3)
    assert reader.action_names == tuple("abcdef") and reader.state_names == tuple("abcdef")
    assert [(e.index, e.start, e.stop) for e in reader.episodes] == [(0, 0, 7), (1, 7, 16), (2, 16, 24)]
    np.testing.assert_array_equal(reader.actions(), golden["action"])
    np.testing.assert_array_equal(reader.states(), golden["observation.state"])
    np.testing.assert_array_equal(reader.rewards(), golden["next.reward"].reshape(-1))
    for key in ("timestamp", "frame_index", "episode_index", "index", "task_index", "next.success"):
        np.testing.assert_array_equal(reader.column(key), golden[key].reshape(-1))
    assert [reader.instruction_of(i) for i in range(24)] == golden["task"].tolist()
    assert [reader.success_of(e) for e in range(3)] == [True, False, True]


@pytest.mark.parametrize("root", [IMAGE, VIDEO])
def test_pixels_are_those_lerobot_reads_in_any_order(root):
    golden, reader = np.load(f"{root}.npz"), LeRobotReader(root)
    for i in [*np.random.default_rng(0).permutation(24), 0, 23, 7, 6, 16, 15]:
        for camera, pixels in reader.images(int(i)).items():
            if root == IMAGE:
                assert sha(pixels) == golden[f"sha.{camera}"][i]
    for k, i in enumerate(golden["frames"] if root == VIDEO else ()):
        for camera, pixels in reader.images(int(i)).items():  # another FFmpeg may round colours otherwise
            assert np.abs(pixels.astype(int) - golden[f"images.{camera}"][k]).max() <= 1


def test_episode_and_pickle():
    reader = pickle.loads(pickle.dumps(LeRobotReader(VIDEO, name="toy")))
    episode = reader.episode(2, cameras=["wrist"])
    assert (len(episode), episode.dataset, episode.instruction, episode.success) == (8, "toy", "push the block", True)
    assert [step.success for step in episode.steps] == [False] * 7 + [True]
    assert [step.reward for step in episode.steps] == [0.0] * 7 + [1.0]
    assert list(episode.steps[0].observation.images) == ["wrist"]


@pytest.mark.parametrize("root", [IMAGE, VIDEO])
def test_parts_are_the_whole(root):
    whole = LeRobotReader(root)
    parts = list(whole.parts())
    assert [len(part) for part in parts] == [7, 9, 8] and all(part.n_episodes == 1 for part in parts)
    np.testing.assert_array_equal(np.concatenate([part.actions() for part in parts]), whole.actions())
    part = pickle.loads(pickle.dumps(parts[1]))
    np.testing.assert_array_equal(part.images(3)["top"], whole.images(10)["top"])
    assert part.instruction_of(0) == "lift the block" and part.episode(0, cameras=()).success is False
    assert len(whole.files()) == (3 if root == IMAGE else 9) and all(path.is_file() for path in whole.files())
    assert len(part.files()) == (1 if root == IMAGE else 3)


def test_need_is_asked_before_a_file_is_opened():
    asked: list[Path] = []
    reader = LeRobotReader(VIDEO, need=asked.append)
    assert asked == []
    reader.images(8, ["wrist"])
    assert {path.name for path in asked} == {"episode_000000.parquet", "episode_000001.parquet",
                                             "episode_000002.parquet", "episode_000001.mp4"}  # fmt: skip
    reader.actions()
    assert set(asked) <= set(reader.files())


def test_images_that_are_files_of_their_own(copy):
    """Cells with a path and no bytes, both as the whole path from the root and as the file's name alone."""
    root, golden = copy(IMAGE), LeRobotReader(IMAGE)
    for e in range(3):
        path = root / f"data/chunk-000/episode_{e:06d}.parquet"
        table = pq.read_table(path)
        for key in ("observation.images.top", "observation.images.wrist"):
            cells = table.column(key).to_pylist()
            for k, cell in enumerate(cells):
                name = f"images/{key}/episode_{e:06d}/frame_{k:06d}.png"
                (root / name).parent.mkdir(parents=True, exist_ok=True)
                (root / name).write_bytes(cell["bytes"])
                cells[k] = {"bytes": None, "path": name if "top" in key else Path(name).name}
            column = table.schema.get_field_index(key)
            table = table.set_column(column, key, pa.array(cells, table.schema.field(key).type))
        pq.write_table(table, path)
    reader = LeRobotReader(root)
    for i in (0, 6, 7, 23):
        for camera, pixels in reader.images(i).items():
            np.testing.assert_array_equal(pixels, golden.images(i)[camera])
    (root / "images/observation.images.top/episode_000001/frame_000002.png").unlink()
    with pytest.raises(VlaError, match=r"episode_000001.parquet: observation.images.top in row 2: no image bytes"):
        reader.images(9)


def test_v20_is_read_too(copy):
    root = copy(IMAGE)
    info = json.loads((root / "meta/info.json").read_text())
    (root / "meta/info.json").write_text(json.dumps(info | {"codebase_version": "v2.0"}))
    (root / "meta/episodes_stats.jsonl").unlink()
    np.testing.assert_array_equal(LeRobotReader(root).actions(), LeRobotReader(IMAGE).actions())


def test_clean_datasets_pass_the_check():
    for root in (IMAGE, VIDEO):
        assert [f for f in check_dataset(root, all_frames=True) if f.level == "error"] == []


def test_image_shapes():
    assert image_shape_of({"shape": [3, 48, 64], "names": ["channel", "height", "width"]}) == (48, 64, 3)
    assert image_shape_of({"shape": [3, 48, 64]}) == image_shape_of({"shape": [48, 64, 3]}) == (48, 64, 3)
    with pytest.raises(VlaError, match=r"an image of shape \[48, 64\]"):
        image_shape_of({"shape": [48, 64]})


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("meta/episodes.jsonl", lambda t: t.split("\n", 1)[1], r"episode 1 of length 9 in .*expected episode 0"),
        ("meta/episodes.jsonl", lambda t: t[:-30], r"episodes.jsonl, line 3: .*expected a JSON object"),
        ("meta/episodes.jsonl", lambda t: t.replace('"length": 9', '"length": 8'), "total_frames is 24 .* has 23"),
        ("meta/episodes.jsonl", lambda t: t.replace('"length": 9', '"length": "x"'), "line 2: .*length of type int"),
        ("meta/tasks.jsonl", lambda t: t.replace('"task":', '"name":'), "tasks.jsonl, line 1: .*task of type str"),
        ("meta/tasks.jsonl", lambda t: t.split("\n", 1)[1], "task_index 0 at frame 0 .*expected one of .1.; fix: add the task to meta/tasks.jsonl"),
        ("meta/info.json", lambda t: t.replace('"chunks_size": 1000', '"chunks_size": 0'), "chunks_size is 0"),
    ],
)  # fmt: skip
def test_damaged_tables(copy, file, change, message):
    root = copy(IMAGE)
    (root / file).write_text(change((root / file).read_text()))
    with pytest.raises(VlaError, match=message):
        LeRobotReader(root).episode(0)


def test_missing_and_cut_files(copy):
    root = copy(VIDEO)
    (root / "videos/chunk-000/observation.images.top/episode_000001.mp4").unlink()
    with pytest.raises(VlaError, match=r"no file .*observation.images.top/episode_000001.mp4; expected an MP4"):
        LeRobotReader(root).images(7)
    data = root / "data/chunk-000/episode_000002.parquet"
    data.write_bytes(data.read_bytes()[:-100])
    with pytest.raises(VlaError, match=r"episode_000002.parquet .*expected a whole parquet file"):
        LeRobotReader(root).actions()
    (root / "meta/tasks.jsonl").unlink()
    with pytest.raises(VlaError, match=r"no file .*tasks.jsonl"):
        LeRobotReader(root)
