from __future__ import annotations

import base64
import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from episodes import WRITER, make_episode
from test_lerobot_reader import IMAGE, VIDEO, tree_hash

from vla.finetune.data_check import Settings as CheckSettings
from vla.finetune.data_check import run as run_check
from vla.finetune.data_convert import Settings as ConvertSettings
from vla.finetune.data_convert import run as convert
from vla.finetune.data_inspect import Settings as InspectSettings
from vla.finetune.data_inspect import run as run_inspect
from vla.finetune.data_program import CollectSettings, StatsSettings, run_collect, run_stats
from vla.finetune.dataset_check import check_dataset
from vla.finetune.lerobot_format import encode_png
from vla.finetune.lerobot_reader import LeRobotReader
from vla.finetune.lerobot_writer import LeRobotWriter
from vla.finetune.statistics import read_statistics
from vla.testing import FakeSuite
from vla.types import VlaError


@pytest.fixture
def toy(tmp_path) -> Path:
    with LeRobotWriter(tmp_path / "toy", **WRITER) as writer:
        for k in range(3):
            writer.add_episode(make_episode(k))
    return tmp_path / "toy"


def edit(root: Path, file: int, key: str, change) -> None:
    """Replace one column of a data file."""
    path = root / f"data/chunk-000/file-{file:03d}.parquet"
    table = pq.read_table(path)
    values = table.column(key).to_pylist()
    change(values)
    column = pa.array(values, table.schema.field(key).type)
    pq.write_table(table.set_column(table.schema.get_field_index(key), key, column), path)


def texts(root: Path, level: str = "error", **options) -> list[str]:
    return [finding.text for finding in check_dataset(root, **options) if finding.level == level]


def test_clean_datasets(toy, capsys):
    for root in (toy, IMAGE, VIDEO):
        assert check_dataset(root, all_frames=True) == []
    assert run_check(CheckSettings(str(toy))) == []
    assert "no errors, 0 warnings" in capsys.readouterr().out


def test_every_damaged_file_is_named(toy, capsys):
    for file in (0, 2):
        path = toy / f"data/chunk-000/file-{file:03d}.parquet"
        path.write_bytes(path.read_bytes()[:2000])
    before = tree_hash(toy)
    with pytest.raises(VlaError, match="toy: 2 errors, 0 warnings"):
        run_check(CheckSettings(str(toy)))
    out = capsys.readouterr().out
    assert "file-000.parquet (2000 bytes)" in out and "file-002.parquet" in out and "file-001.parquet" not in out
    assert tree_hash(toy) == before


def test_nan_constants_and_clocks(toy):
    def nan(values):
        values[1][2] = float("nan")

    def late(values):
        values[3] += 0.02

    edit(toy, 1, "action", nan)
    edit(toy, 2, "timestamp", late)
    edit(toy, 0, "frame_index", lambda values: values.reverse())
    found = texts(toy)
    assert found[0] == "action: nan at frame 6, dimension 2; episodes with such values: [1]"
    assert "episode 0: frame_index does not count 0..4" in found
    assert "episode 2: timestamp 0.320000 s at frame 3, 0.300000 s by 10 fps" in found and len(found) == 3
    for file in range(3):
        edit(toy, file, "observation.state", lambda values: [v.__setitem__(0, 2.0) for v in values])
    assert texts(toy, "warning") == ["observation.state: dimension 0 (x) is 2 in every frame"]


def test_instructions(toy):
    edit(toy, 0, "task_index", lambda values: values.__setitem__(slice(None), [7] * 5))
    tasks = pq.read_table(toy / "meta/tasks.parquet")
    pq.write_table(tasks.set_column(1, "task", pa.array(["open the drawer", "  "])), toy / "meta/tasks.parquet")
    found = texts(toy)
    assert "task_index 7 is used but meta/tasks.parquet does not have it" in found
    assert "task_index 1 is used but has no instruction" in found


def test_damaged_video_and_frames(tmp_path, toy):
    root = Path(shutil.copytree(VIDEO, tmp_path / "v"))
    path = root / "videos/observation.images.image2/chunk-000/file-000.mp4"
    path.write_bytes(path.read_bytes()[:5000])
    found = texts(root)
    assert len(found) == 1 and "observation.images.image2/chunk-000/file-000.mp4 (5000 bytes)" in found[0]

    def damage(values):
        values[2]["bytes"] = b"not a picture"

    edit(toy, 1, "observation.images.wrist", damage)
    assert texts(toy) == []  # only the ends of an episode are looked at
    assert ["observation.images.wrist in row 2" in text for text in texts(toy, all_frames=True)] == [True]


def test_no_dataset_at_all(tmp_path):
    with pytest.raises(VlaError, match="1 errors"):
        run_check(CheckSettings(str(tmp_path)))
    assert texts(tmp_path)[0].startswith("got no ")
    LeRobotWriter(tmp_path / "empty", **WRITER)
    assert texts(tmp_path / "empty") == [f"{tmp_path / 'empty'} has no episodes"]
    with pytest.raises(VlaError, match="without episodes"):
        run_inspect(InspectSettings(str(tmp_path / "empty")))


def test_inspect_prints_and_writes_one_page(toy, tmp_path, capsys):
    info = json.loads((toy / "meta/info.json").read_text())
    info["features"]["action"]["names"] = ["<b>dx", "dy", "gripper"]
    (toy / "meta/info.json").write_text(json.dumps(info))
    run_inspect(InspectSettings(str(toy), tmp_path / "page.html", samples=2))
    out = capsys.readouterr().out
    assert "toy: 3 episodes, 15 frames, 10 fps, cameras front, wrist, state 3, action 3" in out
    assert "open the drawer" in out and "gripper" in out
    page = (tmp_path / "page.html").read_text()
    assert page.count("<img") == 2 + 2 * 3 * 2  # actions and lengths; two episodes, three frames, two cameras
    assert "src='http" not in page and "<b>dx" not in page and "&lt;b&gt;dx" in page
    assert "Episode 0: open the drawer" in page and "<td>102</td>" in page  # the seed of the last episode


def test_inspect_any_format_the_right_way_up(toy, tmp_path):
    convert(ConvertSettings(str(toy), "cache", tmp_path / "cache"))
    pages = []
    for data, rotation_deg in ((toy, 0), (tmp_path / "cache", 0), (tmp_path / "cache", 180)):
        run_inspect(InspectSettings(str(data), tmp_path / "page.html", 1, rotation_deg))
        pages.append((tmp_path / "page.html").read_text())
    assert pages[0] == pages[1] != pages[2]
    upright = encode_png(np.ascontiguousarray(LeRobotReader(toy).images(0)["front"][::-1, ::-1]))
    assert base64.b64encode(upright).decode() in pages[2]


def test_check_prints_json_with_episodes_and_fixes(toy, tmp_path, capsys):
    convert(ConvertSettings(str(toy), "cache", tmp_path / "cache"))
    capsys.readouterr()
    with pytest.raises(VlaError, match="1 errors, 0 warnings"):
        run_check(CheckSettings(str(tmp_path / "cache"), against=str(toy), json=True))
    findings = json.loads(capsys.readouterr().out)["findings"]
    assert [(f["check"], f["episodes"], f["level"]) for f in findings] == [("leaks", [0, 1, 2], "error")]
    with pytest.raises(VlaError, match="1 errors"):
        run_check(CheckSettings(str(toy), against=str(toy)))
    assert "episodes 0, 1, 2; fix: drop them from one of the two" in capsys.readouterr().out
    assert run_check(CheckSettings(str(tmp_path / "cache"), content=False)) == []


def test_stats(toy, tmp_path, capsys):
    value = run_stats(StatsSettings((toy,)))
    assert read_statistics(toy) == value and value["toy"]["action"]["mask"] == [True, True, False]
    assert "statistics: " in capsys.readouterr().out
    value = run_stats(StatsSettings((toy, IMAGE), tmp_path / "both.json"))
    assert sorted(value) == ["lerobot_v3_image", "toy"]
    assert run_stats(StatsSettings((toy,), gripper="dx"))["toy"]["action"]["mask"] == [False, True, True]
    np.testing.assert_allclose(value["toy"]["action"]["min"], read_statistics(toy)["toy"]["action"]["min"])
    for settings, message in (
        (StatsSettings((toy, IMAGE)), "2 datasets and no --out"),
        (StatsSettings((toy,), gripper="hand"), "gripper 'hand'; expected one of dx, dy, gripper"),
        (StatsSettings((toy, toy), tmp_path / "x.json"), "datasets named toy, toy"),
    ):
        with pytest.raises(VlaError, match=message):
            run_stats(settings)
    assert not (tmp_path / "x.json").exists()


def test_collect_through_the_program(tmp_path):
    result = run_collect(CollectSettings(tmp_path / "d", episodes_per_task=1), FakeSuite())
    assert (result.n_episodes, result.n_new) == (2, 2)
    assert texts(tmp_path / "d") == []
