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
from test_hdf5_reader import change
from test_hdf5_reader import write as write_hdf5
from test_lerobot_reader import FIXTURES, IMAGE, VIDEO, tree_hash

from vla.finetune.data.data_check import Settings as CheckSettings
from vla.finetune.data.data_check import run as run_check
from vla.finetune.data.data_convert import Settings as ConvertSettings
from vla.finetune.data.data_convert import run as convert
from vla.finetune.data.data_filter import Settings as FilterSettings
from vla.finetune.data.data_filter import run as run_filter
from vla.finetune.data.data_inspect import Settings as InspectSettings
from vla.finetune.data.data_inspect import run as run_inspect
from vla.finetune.data.data_program import CollectSettings, StatsSettings, run_collect, run_stats
from vla.finetune.data.dataset_check import check_dataset
from vla.finetune.data.statistics import read_statistics
from vla.finetune.formats.lerobot_format import encode_png
from vla.finetune.formats.lerobot_reader import LeRobotReader
from vla.finetune.formats.lerobot_writer import LeRobotWriter
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
        (StatsSettings((toy, toy), tmp_path / "x.json"), "two datasets called 'toy'"),
    ):
        with pytest.raises(VlaError, match=message):
            run_stats(settings)
    assert not (tmp_path / "x.json").exists()


def test_collect_through_the_program(tmp_path):
    result = run_collect(CollectSettings(tmp_path / "d", episodes_per_task=1), FakeSuite())
    assert (result.n_episodes, result.n_new) == (2, 2)
    assert texts(tmp_path / "d") == []


def test_stats_of_any_format(toy, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("VLA_CACHE", str(tmp_path / "index"))
    hdf5 = write_hdf5(tmp_path / "suite/open_the_drawer_demo.hdf5")
    convert(ConvertSettings(str(toy), "cache", tmp_path / "cache"))
    expected = run_stats(StatsSettings((str(toy),)))
    value = run_stats(StatsSettings((str(tmp_path / "cache"),)))
    assert value == expected and read_statistics(tmp_path / "cache") == value
    rlds = FIXTURES / "rlds/tiny_arm"
    value = run_stats(StatsSettings((str(rlds), str(hdf5.parent)), tmp_path / "both.json"))
    assert sorted(value) == ["suite", "tiny_arm"] and value["suite"]["num_transitions"] == 18
    for data in (rlds, hdf5, hdf5.parent):
        with pytest.raises(VlaError, match=r"no --out; expected a file to write; fix: pass --out"):
            run_stats(StatsSettings((str(data),)))
        assert not list(Path(data).rglob("dataset_statistics.json"))


def found(data: Path | str, capsys, **options) -> list[dict]:
    """The findings that `vla data check --json` prints."""
    capsys.readouterr()
    try:
        run_check(CheckSettings(str(data), json=True, **options))
    except VlaError:
        pass
    return json.loads(capsys.readouterr().out)["findings"]


def test_what_check_finds_filter_drops(toy, tmp_path, capsys):
    def nan(values):
        values[1][2] = float("nan")

    def damage(values):
        values[0]["bytes"] = b"no image"

    edit(toy, 1, "action", nan)
    edit(toy, 2, "observation.images.front", damage)
    findings = found(toy, capsys)
    assert sorted(f["episodes"] for f in findings if f["level"] == "error") == [[1], [2]]
    assert not any("object at 0x" in f["text"] for f in findings)
    assert any("row 0: not of a known kind, or cut short; expected a PNG or JPEG image" in f["text"] for f in findings)
    (tmp_path / "found.json").write_text(json.dumps({"findings": findings}))
    kept = run_filter(FilterSettings(str(toy), tmp_path / "out", drop_found=tmp_path / "found.json")).kept
    assert kept == [0] and found(tmp_path / "out", capsys, content=False) == []


def test_every_finding_about_episodes_names_them(toy, capsys):
    def late(values):
        values[3] += 0.02

    def other(values):
        values[0] = 7

    edit(toy, 0, "timestamp", late)
    edit(toy, 1, "task_index", other)
    edit(toy, 2, "frame_index", other)
    assert {f["text"].split(":")[0]: f["episodes"] for f in found(toy, capsys)} == {
        "episode 0": [0], "task_index 7 is used but meta/tasks.parquet does not have it": [1], "episode 2": [2],
    }  # fmt: skip
    path = toy / "data/chunk-000/file-002.parquet"
    path.write_bytes(path.read_bytes()[:2000])
    assert [f["episodes"] for f in found(toy, capsys) if "file-002" in f["text"]] == [[2]]


def test_check_of_hdf5_goes_on_after_a_nan(tmp_path, capsys):
    file = write_hdf5(tmp_path / "open_the_drawer_demo.hdf5", {"demo_0": 5, "demo_1": 0, "demo_2": 4})
    actions = np.zeros((5, 7))
    actions[3, 2] = np.nan
    change(file, "data/demo_0/actions", actions)
    change(file, "data/demo_2/obs/ee_states", np.full((4, 6), np.inf))
    findings = found(file, capsys)
    errors = [f["text"] for f in findings if f["level"] == "error"]
    assert len(errors) == 2 and "demo_0/actions: nan at step 3, dimension 2" in errors[0] and "inf" in errors[1]
    assert [f["text"] for f in findings if f["level"] == "warning"] == [f"{file}: demo_1 has no step: it is left out"]


def test_inspect_names_empty_demonstrations_and_refuses_negative_samples(tmp_path, capsys):
    file = write_hdf5(tmp_path / "open_the_drawer_demo.hdf5", {"demo_0": 5, "demo_1": 0})
    run_inspect(InspectSettings(str(file)))
    assert "1 demonstrations without a step left out: " in capsys.readouterr().out
    with pytest.raises(VlaError, match="samples -3; expected 0 or more"):
        run_inspect(InspectSettings(str(file), tmp_path / "a.html", samples=-3))
