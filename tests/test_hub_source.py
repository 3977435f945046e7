"""Datasets on the Hub of which only some files are kept: the same data as on the disk, in as little space as is allowed."""

from __future__ import annotations

import multiprocessing
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import test_hub
from test_hdf5_reader import write as write_hdf5
from training import sft_settings

from vla.finetune.data.chunks import ChunkDataset
from vla.finetune.data.open_source import open_source
from vla.finetune.formats.source import FrameSource
from vla.finetune.sft_samples import Prepared, training_stream
from vla.finetune.sft_setup import open_datasets
from vla.spec import ImageSpec
from vla.types import VlaError

FIXTURES = Path(__file__).parent / "fixtures"
DATA = (".parquet", ".mp4", ".hdf5")


@pytest.fixture
def server(tmp_path, monkeypatch):
    monkeypatch.setenv("VLA_CACHE", str(tmp_path / "index"))
    for kind in ("v21_image", "v21_video", "v3_video", "v3_image"):
        shutil.copytree(FIXTURES / f"lerobot_{kind}", tmp_path / "hub/toy" / kind)
    shutil.copytree(FIXTURES / "rlds/tiny_arm", tmp_path / "hub/toy/rlds/tiny_arm")
    for k in range(3):
        write_hdf5(tmp_path / f"hub/toy/libero/libero_goal/task_{k}_demo.hdf5", {"demo_0": 2, "demo_1": 3}, seed=k)
    server = test_hub.Hub(tmp_path / "hub")
    with test_hub.running(server, monkeypatch, tmp_path / "cache"):
        yield server


def on_disk(tmp_path: Path) -> list[str]:
    """Names of the data files in the cache."""
    found = [p for p in (tmp_path / "cache").rglob("snapshots/**/*") if p.exists() and "meta" not in p.parts]
    return sorted(p.name for p in found if p.suffix in DATA or ".tfrecord-" in p.name)


def check_same(got: FrameSource, wanted: FrameSource, frames: list[int]) -> None:
    np.testing.assert_array_equal(got.actions(), wanted.actions())
    for mine, other in ((got.states(), wanted.states()), (got.rewards(), wanted.rewards())):
        assert (mine is None) == (other is None)
        if mine is not None and other is not None:
            np.testing.assert_array_equal(mine, other)
    for name in ("cameras", "action_names", "state_names", "fps", "gripper", "bad", "empty", "n_episodes"):
        assert getattr(got, name) == getattr(wanted, name), name
    for e in range(wanted.n_episodes):
        for name in ("success_of", "seed_of", "task_of"):
            assert getattr(got, name)(e) == getattr(wanted, name)(e), name
    assert [got.instruction_of(i) for i in range(len(got))] == [wanted.instruction_of(i) for i in range(len(wanted))]
    for i in frames:
        for camera, pixels in wanted.images(i).items():
            np.testing.assert_array_equal(got.images(i, [camera])[camera], pixels)
            assert got.image_shape(camera) == pixels.shape
            assert got.encoded(i, camera) == wanted.encoded(i, camera) and got.jpeg(i, camera) == wanted.jpeg(i, camera)


@pytest.mark.parametrize("kind", ["v21_image", "v21_video", "v3_image", "v3_video"])
def test_lerobot_is_the_dataset(server, kind):
    wanted = open_source(FIXTURES / f"lerobot_{kind}")
    got = open_source(f"toy/{kind}#cache_gb=0")
    assert got.name == kind and got.in_order and not wanted.in_order
    check_same(got, wanted, [0, 9, len(wanted) - 1, 1])
    first, other = got.episode(1), wanted.episode(1)
    assert (first.instruction, first.success, len(first)) == (other.instruction, other.success, len(other))


def test_hdf5_and_rlds_are_the_dataset(server, tmp_path):
    check_same(
        open_source("toy/libero/libero_goal#cache_gb=0"),
        open_source(server.root / "toy/libero/libero_goal"),
        [0, 14, 6],
    )
    assert len(on_disk(tmp_path)) == 1
    rlds = open_source("toy/rlds/tiny_arm#cache_gb=0")
    check_same(rlds, open_source(FIXTURES / "rlds/tiny_arm"), [0, len(rlds) - 1, 3])
    assert len(on_disk(tmp_path)) == 2 and not any("-val." in name for name in server.gets)


def test_no_more_is_kept_than_allowed(server, tmp_path):
    got = open_source("toy/v21_video#cache_gb=0")
    assert not on_disk(tmp_path), "the pass for the numbers leaves nothing"
    assert not any(name.endswith(".mp4") for name in server.gets), "and needs no pictures"
    for i in (0, 9, 23, 0):
        got.images(i)
        assert len(on_disk(tmp_path)) <= 3, "one episode's rows and its two videos"
    before = server.gets["data/chunk-000/episode_000000.parquet"]
    open_source("toy/v21_video#cache_gb=0").states()
    assert server.gets["data/chunk-000/episode_000000.parquet"] == before, "the numbers are kept"
    large = open_source("toy/v21_video#cache_gb=1")
    for i in (0, 9, 23):
        large.images(i)
    assert len(on_disk(tmp_path)) >= 8, "all three episodes"


def test_files_that_were_there_are_left_alone(server, tmp_path):
    open_source("toy/v21_image").actions()
    before = on_disk(tmp_path)
    got = open_source("toy/v21_image#cache_gb=0")
    for i in (0, 9, 23):
        got.images(i)
    assert on_disk(tmp_path) == before != []


def walk(source: FrameSource, whole: FrameSource, seed: int) -> None:
    """Every frame, in a random order."""
    for i in np.random.default_rng(seed).integers(len(whole), size=60).tolist():
        np.testing.assert_array_equal(source.images(i)["agentview"], whole.images(i)["agentview"])


def test_processes_do_not_delete_each_others_files(server, tmp_path):
    shutil.copytree(server.root / "toy/libero/libero_goal", server.root / "toy/libero_whole")
    address = "hf://datasets/toy/libero/libero_goal#cache_gb=0"
    source = open_source(address)
    source.images(0)  # what is open here is not the children's
    context = multiprocessing.get_context("fork")
    jobs = [context.Process(target=walk, args=(source, open_source("toy/libero_whole"), seed)) for seed in range(3)]
    for job in jobs:
        job.start()
    for job in jobs:
        job.join(120)
    assert [job.exitcode for job in jobs] == [0, 0, 0]
    assert source.images(0)["agentview"].shape == source.image_shape("agentview")


def test_what_an_earlier_process_left_is_deleted(server, tmp_path):
    open_source("toy/v21_image#cache_gb=1").images(0)
    before = on_disk(tmp_path)
    assert len(before) == 3
    open_source("toy/v21_image#cache_gb=0").images(9)  # of the next run, say
    assert on_disk(tmp_path) == ["episode_000000.parquet", "episode_000001.parquet"], (
        "the first process still reads its own"
    )


def test_what_an_older_commit_left_is_deleted(server, tmp_path, monkeypatch):
    address = "toy/libero/libero_goal#cache_gb=0"
    source = open_source(address)
    source.images(0)
    source._cached.close()  # as that process ends
    del source
    for k in range(3):
        write_hdf5(server.root / f"toy/libero/libero_goal/task_{k}_demo.hdf5", {"demo_0": 2, "demo_1": 3}, seed=k + 5)
    monkeypatch.setattr(test_hub, "COMMIT", "1" * 40)
    open_source(address, skip_bad=True)
    assert not on_disk(tmp_path)


def test_a_file_that_another_commit_shares_is_left_alone(server, tmp_path, monkeypatch):
    open_source("hf://datasets/toy/libero/libero_goal").images(0)  # whole, as the user wants it
    before = on_disk(tmp_path)
    monkeypatch.setattr(test_hub, "COMMIT", "1" * 40)  # which changes another file of the repository
    open_source("toy/libero/libero_goal#cache_gb=0")
    assert on_disk(tmp_path) == before and len(before) == 3


def hold_nothing(source: FrameSource, tell, stop) -> None:
    source.images(len(source) - 1)
    tell.set()
    stop.wait(60)


def test_a_forked_process_does_not_hold_what_its_parent_had_open(server, tmp_path):
    source = open_source("toy/libero/libero_goal#cache_gb=0")
    source.images(0)
    context = multiprocessing.get_context("fork")
    tell, stop = context.Event(), context.Event()
    job = context.Process(target=hold_nothing, args=(source, tell, stop))
    job.start()
    try:
        assert tell.wait(60)
        assert on_disk(tmp_path) == ["task_0_demo.hdf5", "task_2_demo.hdf5"]
        source.images(7)  # the parent goes on to another file
        assert on_disk(tmp_path) == ["task_1_demo.hdf5", "task_2_demo.hdf5"]
    finally:
        stop.set()
        job.join(60)
    assert job.exitcode == 0


def test_damaged_or_stale_index(server, tmp_path):
    wanted = open_source(FIXTURES / "lerobot_v21_image").actions()
    open_source("toy/v21_image#cache_gb=0")
    (index,) = (tmp_path / "index/hub").glob("*.index")
    index.write_bytes(index.read_bytes()[:-7])
    np.testing.assert_array_equal(open_source("toy/v21_image#cache_gb=0").actions(), wanted)
    got = pickle.loads(pickle.dumps(open_source("toy/v21_image#cache_gb=0")))
    got._numbers.actions[0] += 1
    with pytest.raises(VlaError, match="with other actions than .*delete the index"):
        got.images(0)


def test_skip_bad_lists_what_it_leaves_out(server, tmp_path):
    path = server.root / "toy/libero/libero_goal/task_1_demo.hdf5"
    path.write_bytes(path.read_bytes()[:600])
    (server.root / "toy/v21_image/data/chunk-000/episode_000001.parquet").write_bytes(b"PAR1")
    with pytest.raises(VlaError, match="task_1_demo.hdf5"):
        open_source("toy/libero/libero_goal#cache_gb=0")
    assert not list((tmp_path / "index/hub").glob("*.index")), "nothing half-made"
    got = open_source("toy/libero/libero_goal#cache_gb=0", skip_bad=True)
    assert (got.n_episodes, [Path(row.file).name for row in got.bad]) == (4, ["task_1_demo.hdf5"])
    got = open_source("toy/v21_image#cache_gb=0", skip_bad=True)
    assert (got.n_episodes, len(got.bad)) == (2, 1) and "episode_000001" in got.bad[0].file
    whole = open_source(FIXTURES / "lerobot_v21_image")
    mine, other = got.images(got.episodes[1].start), whole.images(whole.episodes[2].start)
    np.testing.assert_array_equal(mine["top"], other["top"])


def test_training_samples_are_those_of_the_local_data(server, tmp_path):
    addresses = ("toy/v21_video#cache_gb=0", "toy/v3_video#cache_gb=0")
    local = [open_source(FIXTURES / f"lerobot_{kind}") for kind in ("v21_video", "v3_video")]
    remote = [open_source(address) for address in addresses]
    streams = []
    for sources, workers in ((local, 0), (remote, 2)):
        one = [(source.name.removeprefix("lerobot_"), source) for source in sources[:1]]
        dataset = ChunkDataset(one, 2, seed=3, window=6, holdout_episodes=1)
        settings = sft_settings(tmp_path, data_workers=workers, cache_images=False, shuffle_window=6)
        streams.append(training_stream(Prepared(settings, dataset, ImageSpec(dataset.cameras, 32)), 2, 4))
    for _ in range(5):
        for mine, other in zip(next(streams[0]), next(streams[1]), strict=True):
            np.testing.assert_array_equal(mine.actions, other.actions)
            assert (mine.instruction, mine.dataset) == (other.instruction, other.dataset)
            for camera, pixels in mine.images.items():
                np.testing.assert_array_equal(pixels, other.images[camera])


def test_finetune_wants_a_window(server, tmp_path):
    with pytest.raises(VlaError, match=r"toy/v21_image@main with only some of its files.*--shuffle-window"):
        open_datasets(sft_settings(tmp_path, data=("toy/v21_image#cache_gb=0",), cache_images=False))
    with pytest.raises(VlaError, match=r"shuffle_window 9 with cache_images True.*--no-cache-images"):
        sft_settings(tmp_path, shuffle_window=9, cache_images=True)


def test_addresses(server, tmp_path):
    for text, said in (
        ("toy/v21_image#cache_gb=-1", "cache_gb -1"), ("toy/v21_image#cache_gb=much", "cache_gb 'much'; expected a number"),
        ("toy/v21_image#kept=3", r"expected PATH#split=SPLIT.*OWNER/NAME#cache_gb=GB"),
        (f"{FIXTURES}/lerobot_v21_image#cache_gb=3", "expected a dataset on the Hub"),
        ("toy/rlds#cache_gb=nan", "cache_gb nan"),
    ):  # fmt: skip
        with pytest.raises(VlaError, match=said):
            open_source(text)
    (server.root / "toy/texts").mkdir()
    (server.root / "toy/texts/a.txt").write_text("a")
    with pytest.raises(VlaError, match=r"toy/texts@main with a.txt; expected meta/info.json .LeRobot."):
        open_source("toy/texts#cache_gb=1")


def test_a_run_goes_on_at_the_commit_it_began_with(server, tmp_path):
    for address in ("toy/v21_image", "toy/v21_image#cache_gb=0"):
        source = open_source(address)
        assert source.revision == test_hub.COMMIT
        again = open_source(address, revisions={"v21_image": test_hub.COMMIT, "other": "f" * 40})
        assert again.revision == test_hub.COMMIT and test_hub.COMMIT in str(again.where)
        with pytest.raises(VlaError, match=r"no revision 'ffff"):
            open_source(address, revisions={"v21_image": "f" * 40})
        assert open_source(address.replace("image", "image@v3.0"), revisions={"v21_image": "f" * 40}).revision
