from __future__ import annotations

from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from episodes import WRITER, make_episode

from vla.finetune import chunks
from vla.finetune.chunks import ChunkDataset, Sample, epoch_order, holdout_split
from vla.finetune.lerobot_reader import LeRobotReader
from vla.finetune.lerobot_writer import LeRobotWriter
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
    arrays = all((x == y).all() for x, y in ((a.actions, b.actions), (a.is_pad, b.is_pad), (a.state, b.state)))
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


def test_any_position_continues_the_same_stream(toy):
    dataset = ChunkDataset([("toy", toy)], 2, seed=5)
    n = len(dataset)
    stream = np.concatenate([epoch_order(n, 5, e) for e in range(4)])
    for position, size in ((0, 3), (n - 1, 3), (7, n), (0, 3 * n), (n, 1), (2 * n + 3, 11)):
        np.testing.assert_array_equal(dataset.indices(position, size), stream[position : position + size])
    batches = list(islice(dataset.batch_indices(4, 6), 5))
    np.testing.assert_array_equal(np.concatenate(batches), stream[4:34])


@pytest.mark.parametrize("source", ["toy", "lerobot_v3_video"])
def test_workers_change_nothing(toy, source):
    reader = toy if source == "toy" else LeRobotReader(FIXTURES / source)
    dataset = ChunkDataset([("d", reader)], 3, seed=1)
    dataset[0]  # decoders are open when the workers are forked
    alone, helped = dataset.batches(3, 4), dataset.batches(3, 4, workers=2)
    for a, b in islice(zip(alone, helped, strict=True), 12):
        assert all(same(x, y) for x, y in zip(a, b, strict=True))


def test_cached_images_are_the_same(toy):
    plain = ChunkDataset([("toy", toy)], 2, holdout_episodes=1)
    cached = ChunkDataset([("toy", toy)], 2, holdout_episodes=1, cache_images=True)
    assert all(same(plain[i], cached[i]) for i in range(len(toy)))


def test_cache_too_large(toy, monkeypatch):
    monkeypatch.setattr(chunks, "_available_bytes", lambda: 1000)
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
    with pytest.raises(VlaError, match=r"5 held-out episodes of 5; expected 0\.\.4"):
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
