from __future__ import annotations

import tracemalloc
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from episodes import WRITER, make_episode
from sources import ArraySource, toy_source
from training import sft_settings

from vla.finetune.data import image_cache
from vla.finetune.data.chunks import ChunkDataset, Sample, holdout_split
from vla.finetune.data.order import epoch_order
from vla.finetune.formats.lerobot_reader import LeRobotReader
from vla.finetune.formats.lerobot_writer import LeRobotWriter
from vla.finetune.formats.source import Span
from vla.finetune.sft_samples import Prepared, training_stream
from vla.spec import ImageSpec
from vla.types import VlaError

FIXTURES = Path(__file__).parent / "fixtures"


@pytest.fixture(scope="module")
def toy(tmp_path_factory) -> LeRobotReader:
    root = tmp_path_factory.mktemp("data") / "toy"
    with LeRobotWriter(root, **WRITER) as writer:
        for k in range(5):
            writer.add_episode(make_episode(k, 3 + k))
    return LeRobotReader(root)


def same(a: Sample, b: Sample) -> bool:
    images = a.images.keys() == b.images.keys() and all((a.images[c] == b.images[c]).all() for c in a.images)
    arrays = all(np.array_equal(x, y) for x, y in ((a.actions, b.actions), (a.is_pad, b.is_pad), (a.state, b.state)))
    return images and arrays and (a.instruction, a.dataset) == (b.instruction, b.dataset)


def test_chunks_and_padding_at_both_ends():
    reader = LeRobotReader(FIXTURES / "lerobot_v3_image")
    dataset, actions = ChunkDataset([("golden", reader)], 4), reader.actions()
    assert len(dataset) == 39
    first, last, middle = dataset[12], dataset[24], dataset[22]  # episode 1 is frames 12..24
    np.testing.assert_array_equal(first.actions, actions[12:16])
    assert first.is_pad.tolist() == [False] * 4
    np.testing.assert_array_equal(last.actions, np.repeat(actions[24:25], 4, 0))
    assert last.is_pad.tolist() == [False, True, True, True] and last.is_pad.dtype == bool
    np.testing.assert_array_equal(middle.actions, actions[[22, 23, 24, 24]])
    assert middle.is_pad.tolist() == [False, False, False, True]
    assert (first.actions.dtype, first.actions.shape, first.dataset) == (np.float32, (4, 7), "golden")
    states = reader.states()
    assert states is not None and first.state is not None
    np.testing.assert_array_equal(first.state, states[12])
    assert first.instruction == reader.instruction_of(12) and set(first.images) == {"image", "image2"}
    with pytest.raises(IndexError):
        dataset[39]


def test_order_is_a_permutation_and_fixed():
    for n in (1, 7, 100):
        order = epoch_order(n, 3, 2)
        assert order.dtype == np.int64 and sorted(order) == list(range(n))
        np.testing.assert_array_equal(order, epoch_order(n, 3, 2))
    assert not np.array_equal(epoch_order(100, 3, 2), epoch_order(100, 3, 3))
    assert not np.array_equal(epoch_order(100, 3, 2), epoch_order(100, 4, 2))
    assert epoch_order(8, 0, 0).tolist() == [2, 4, 3, 6, 5, 0, 1, 7]  # a saved run must find its order again


def batches(dataset: ChunkDataset, position: int, **changes: Any) -> Iterator[list[Sample]]:
    """As `vla finetune` takes them, four at a time."""
    settings = sft_settings(Path("."), **changes)
    return training_stream(Prepared(settings, dataset, ImageSpec(dataset.cameras, 32)), position, 4)


def test_workers_change_neither_augmentation_nor_ranks(toy):
    dataset = ChunkDataset([("toy", toy)], 2, seed=5)
    for rank in range(2):
        streams = []
        for workers in (0, 2):
            settings = sft_settings(Path("."), augment=True, crop_area=0.9, state_dropout=0.5, data_workers=workers)
            prepared = Prepared(settings, dataset, ImageSpec(dataset.cameras, 32, crop_area=0.9))
            streams.append(training_stream(prepared, 3, 6, rank, 2))
        for a, b in islice(zip(*streams, strict=True), 4):
            assert len(a) == 3 and all(same(x, y) for x, y in zip(a, b, strict=True))


def test_any_position_continues_the_same_stream(toy):
    dataset = ChunkDataset([("toy", toy)], 2, seed=5)
    n = len(dataset)
    stream = np.concatenate([epoch_order(n, 5, e) for e in range(4)])
    for position, size in ((0, 3), (n - 1, 3), (7, n), (0, 3 * n), (n, 1), (2 * n + 3, 11)):
        np.testing.assert_array_equal(dataset.indices(position, size), stream[position : position + size])


@pytest.mark.parametrize("source", ["toy", "lerobot_v3_video"])
def test_workers_change_nothing(toy, source):
    reader = toy if source == "toy" else LeRobotReader(FIXTURES / source)
    dataset = ChunkDataset([("d", reader)], 3, seed=1)
    dataset[0]  # decoders are open when the workers are forked
    for a, b in islice(zip(batches(dataset, 3), batches(dataset, 3, data_workers=2), strict=True), 12):
        assert all(same(x, y) for x, y in zip(a, b, strict=True))


def test_cached_images_are_the_same(toy):
    plain = ChunkDataset([("toy", toy)], 2, holdout_episodes=1)
    cached = ChunkDataset([("toy", toy)], 2, holdout_episodes=1, cache_images=True)
    assert all(same(plain[i], cached[i]) for i in range(len(toy)))


def test_cache_too_large(toy, monkeypatch):
    monkeypatch.setattr(image_cache, "available_bytes", lambda: 1000)
    with pytest.raises(VlaError, match="of images to cache.*set cache_images to False"):
        ChunkDataset([("toy", toy)], 2, cache_images=True)


def test_holdout_by_episode(toy):
    dataset = ChunkDataset([("a", toy), ("b", toy)], 2, holdout_episodes=2, seed=9)
    held = holdout_split(5, 2, 9)
    assert len(held) == 2 and held == holdout_split(5, 2, 9) and held != holdout_split(5, 2, 10)
    n_held = sum(len(toy.episodes[i]) for i in held)
    assert len(dataset) == 2 * (len(toy) - n_held) and len(dataset.holdout_indices) == 2 * n_held
    frames = {int(i) for e in held for i in range(toy.episodes[e].start, toy.episodes[e].stop)}
    held_actions = {dataset[int(i)].actions.tobytes() for i in dataset.holdout_indices}
    assert held_actions == {
        toy.actions()[[i, min(i + 1, toy.episodes[toy.episode_of(i)].stop - 1)]].tobytes() for i in frames
    }
    trained = {dataset[int(i)].actions.tobytes() for i in dataset.indices(0, len(dataset))}
    assert not trained & held_actions
    with pytest.raises(
        VlaError, match=r"5 held-out episodes of 5 in 'toy'; expected 0\.\.4; fix: hold out fewer: --holdout-episodes"
    ):
        ChunkDataset([("a", toy)], 2, holdout_episodes=5)


def test_weights_set_how_often_sources_are_drawn(toy):
    golden = LeRobotReader(FIXTURES / "lerobot_v3_image")
    with pytest.raises(VlaError, match="7 action dimensions in 'golden'; expected 3"):
        ChunkDataset([("toy", toy), ("golden", golden)], 2, cameras=())
    dataset = ChunkDataset([("a", toy), ("b", toy), ("c", toy)], 2, cameras=("front",), weights=(1, 3, 0))
    n = len(dataset)
    drawn = dataset.indices(0, 4 * n)
    counts = np.bincount(drawn // len(toy), minlength=3)
    assert counts[2] == 0 and abs(counts[0] / counts.sum() - 0.25) < 0.01
    for source in (0, 1):  # a source is walked through before it repeats
        times = np.bincount(drawn[drawn // len(toy) == source] % len(toy), minlength=len(toy))
        assert times.max() - times.min() <= 1
    np.testing.assert_array_equal(dataset.indices(n - 5, 20), drawn[n - 5 : n + 15])
    for weights in ((1, 1), (0, 0, 0), (1, -1, 1), (1, float("nan"), 1)):
        with pytest.raises(VlaError, match="weights"):
            ChunkDataset([("a", toy), ("b", toy), ("c", toy)], 2, weights=weights)


def test_wrong_camera_and_nothing(toy):
    with pytest.raises(VlaError, match=r"got camera 'top'; expected one of front, wrist"):
        ChunkDataset([("toy", toy)], 2, cameras=("front", "top"))
    with pytest.raises(VlaError, match="0 sources"):
        ChunkDataset([], 2)


def sources_of_two_kinds():
    rng = np.random.default_rng(3)
    a = toy_source(3, 5, name="a", cameras={"front": (16, 20), "wrist": (8, 8)})
    actions = [rng.uniform(-1, 1, (n, 3)) for n in (4, 9)]
    b = ArraySource(actions, [rng.normal(size=(n, 2)) for n in (4, 9)], name="b", cameras={"image_0": (10, 12)},
                    action_names=("dx", "dy", "gripper"), state_names=("u", "v"))  # fmt: skip
    return a, b


def test_each_dataset_has_its_own_cameras_and_states():
    a, b = sources_of_two_kinds()
    plain = ChunkDataset([("a", a), ("b", b)], 2, cameras=("primary=front|image_0",))
    cached = ChunkDataset([("a", a), ("b", b)], 2, cameras=("primary=front|image_0",), cache_images=True)
    assert plain.cameras == ("primary",) and len(plain) == 31
    first, last = plain[0], plain[30]
    assert list(first.images) == ["primary"] and first.images["primary"].shape == (16, 20, 3)
    np.testing.assert_array_equal(last.images["primary"], b.images(12)["image_0"])
    assert (first.dataset, last.dataset) == ("a", "b")
    assert first.state is not None and last.state is not None and (first.state.shape, last.state.shape) == ((3,), (2,))
    assert all(same(plain[i], cached[i]) for i in range(31))
    message = r"camera 'front' or 'wrist'; expected one of image_0, the cameras of 'b' \(memory/b\); fix: .*primary=KEY"
    with pytest.raises(VlaError, match=message):
        ChunkDataset([("a", a), ("b", b)], 2, cameras=("primary=front|wrist",))
    with pytest.raises(VlaError, match="expected different names"):
        ChunkDataset([("a", a)], 2, cameras=("x=front", "x=wrist"))


def test_weights_per_frame_as_openvla():
    a, b = sources_of_two_kinds()  # 18 and 13 frames
    sources = [("a", a), ("b", b)]
    same_weight = ChunkDataset(sources, 1, (), (1, 1), balance=True)
    assert same_weight.epoch_size == len(same_weight) == 31
    assert sorted(same_weight.indices(0, 31)) == list(range(31))  # each frame once
    half = ChunkDataset(sources, 1, (), (1, 0.5), balance=True, seed=2)
    share = 18 / (18 + 6.5)
    assert half.epoch_size == int(18 / share) == 24
    counts = np.bincount(half.indices(0, 24 * 50) >= 18)
    assert counts[0] / counts.sum() == pytest.approx(share, abs=0.02)
    rare = ChunkDataset(
        sources, 1, (), (0.1, 1), balance=True
    )  # the epoch lasts until b, whose weight is 1, is through
    assert rare.epoch_size == int(13 / (13 / (1.8 + 13)) + 1e-6) == 14
    no_one = ChunkDataset(sources, 1, (), (0.5, 2), balance=True)  # no weight is 1: until each has been through
    assert no_one.epoch_size == int(18 / (9 / (9 + 26)) + 1e-6) == 70
    np.testing.assert_array_equal(no_one.indices(60, 100), no_one.indices(0, 160)[60:])


@pytest.mark.parametrize("options", [{}, {"weights": (1, 3)}, {"weights": (1, 0.5), "balance": True}])
def test_ranks_workers_and_restarts_see_one_stream(options):
    """What `vla finetune` does: a global batch is split over the ranks; a restart begins at a saved position."""
    sources = [(s.name, s) for s in sources_of_two_kinds()]
    dataset = ChunkDataset(sources, 2, ("c=front|image_0",), seed=7, holdout_episodes=1, **options)
    one = np.concatenate([dataset.indices(k * 12, 12) for k in range(9)])
    ranks = [np.concatenate([dataset.indices(k * 12, 12)[rank::3] for k in range(9)]) for rank in range(3)]
    np.testing.assert_array_equal(np.stack(ranks, 1).reshape(-1), one)
    again = ChunkDataset(sources, 2, ("c=front|image_0",), seed=7, holdout_episodes=1, **options)
    np.testing.assert_array_equal(again.indices(41, 60), one[41:101])
    for a, b in islice(zip(batches(dataset, 5), batches(again, 5, data_workers=2), strict=True), 6):
        assert all(same(x, y) for x, y in zip(a, b, strict=True))


class ManyFrames(ArraySource):
    """Millions of frames that are never read."""

    def __init__(self, n_episodes: int, n: int) -> None:
        super().__init__([np.zeros((1, 7))], cameras={})
        self.episodes = [Span(k, k * n, (k + 1) * n) for k in range(n_episodes)]


def test_millions_of_frames_cost_little():
    tracemalloc.start()
    try:
        dataset = ChunkDataset([("m", ManyFrames(2_000, 1000)), ("n", ManyFrames(10, 1000))], 8, holdout_episodes=5)
        assert tracemalloc.get_traced_memory()[1] < 5e6  # tables of episodes, none of frames
        assert dataset.locate(0)[0] == 0 and dataset.locate(dataset.holdout_indices[-1])[0] == 1
        dataset.indices(3, 16)
        assert tracemalloc.get_traced_memory()[1] < 24 * len(dataset)
    finally:
        tracemalloc.stop()
    frames = [dataset.locate(i)[1] for i in dataset.indices(0, 2000).tolist()]
    assert len(set(frames)) > 1990


def test_episodes_without_an_instruction_are_left_out_if_wanted():
    source = toy_source(4, 5, instructions=["open", "", " ", "close"])
    dataset = ChunkDataset([("a", source)], 2, skip_unlabelled=True)
    assert len(dataset) == 5 + 8 and dataset.n_unlabelled == 2
    assert {dataset[i].instruction for i in range(len(dataset))} == {"open", "close"}
    assert len(ChunkDataset([("a", source)], 2)) == 26
    with pytest.raises(VlaError, match="no frame to train on in a, 2 episodes left out that have no instruction"):
        ChunkDataset([("a", toy_source(2, 5, instructions=["", ""]))], 2, skip_unlabelled=True)
