"""Orders with a window: complete, close to storage, the same however they are asked for."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
from sources import toy_source

from vla.finetune.data.chunks import ChunkDataset
from vla.finetune.data.order import epoch_order, windowed_order
from vla.types import VlaError


@pytest.mark.parametrize("window", [1, 5, 40, 10_000])
def test_each_sample_once_and_not_far_from_its_place(window):
    bounds = np.array([0, 30, 31, 60, 100])
    order = windowed_order(bounds, window, [1, 2])
    assert sorted(order) == list(range(100)) and order.dtype == np.int64
    files = np.searchsorted(bounds, order, side="right") - 1
    stored = windowed_order(bounds, 1, [1, 2])  # the files in the order that the seed gives them
    place = np.empty(100, int)
    place[stored] = np.arange(100)
    assert (np.abs(place[order] - np.arange(100)) < window).all()
    assert sum(np.diff(files) != 0) == 3 if window == 1 else sum(np.diff(files) != 0) >= 3
    np.testing.assert_array_equal(order, windowed_order(bounds, window, [1, 2]))
    assert not np.array_equal(order, windowed_order(bounds, window, [1, 3]))


def test_window_is_a_uniform_shuffle_of_what_it_covers():
    n, moved = 2000, []
    for seed in range(20):
        order = windowed_order(np.array([0, n]), 50, [seed])
        moved.append(order - np.arange(n))
    inner = np.concatenate([row[100:-100] for row in moved])
    # a place is k + U(0, 50) but for a constant, so what stands there was stored U(-25, 25) away
    assert abs(inner.mean()) < 0.1 and inner.std() == pytest.approx(50 / np.sqrt(12), rel=0.02)


def mixture(window: int, weights: list[float] | None = None, seed: int = 4) -> ChunkDataset:
    sources = [(name, toy_source(n, 5, name=name)) for name, n in (("a", 6), ("b", 3))]
    return ChunkDataset(
        sources, 2, weights=weights, window=window, seed=seed, holdout_episodes=1, balance=weights is not None
    )


def test_epochs_are_complete():
    data = mixture(7)
    for epoch in (0, 3):
        assert sorted(data.order(epoch)) == list(range(len(data)))
    assert not np.array_equal(data.order(0), data.order(1))
    full = mixture(0)
    np.testing.assert_array_equal(full.order(2), epoch_order(len(full), 4, 2))


def test_weights_decide_the_shares_and_each_pass_is_complete():
    data = mixture(7, [1.0, 3.0])
    drawn = np.concatenate([data.order(epoch) for epoch in range(8)])
    sources = np.array([data.locate(int(i))[0] for i in drawn])
    plain = mixture(0, [1.0, 3.0])
    assert [sum(sources == s) for s in (0, 1)] == [8 * int(n) for n in plain._draws]
    for s in (0, 1):
        mine = drawn[sources == s]
        size = len(set(mine.tolist()))
        for k in range(len(mine) // size):
            assert len(set(mine[k * size : (k + 1) * size].tolist())) == size


def test_any_position_continues_the_same_stream():
    data, again = mixture(7, [1.0, 2.0]), mixture(7, [1.0, 2.0])
    whole = data.indices(0, 4 * data.epoch_size)
    for position, n in ((0, 3), (17, 40), (data.epoch_size - 1, 2)):
        np.testing.assert_array_equal(again.indices(position, n), whole[position : position + n])


def test_files_are_read_one_after_another():
    source = toy_source(12, 4, name="a")
    source.place_of = lambda episode: (f"file {episode // 3}", episode)  # type: ignore[method-assign]
    data = ChunkDataset([("a", source)], 2, window=1)
    files = [source.place_of(source.episode_of(data.locate(int(i))[1]))[0] for i in data.order(0)]
    changes = [b for a, b in zip(files, files[1:], strict=False) if a != b]
    assert len(changes) == 3 and len({files[0], *changes}) == 4
    orders = {tuple(dict.fromkeys(source.place_of(source.episode_of(data.locate(int(i))[1]))[0] for i in data.order(e)))
              for e in range(6)}  # fmt: skip
    assert len(orders) > 1, "files come in another order each epoch"


def test_an_order_takes_no_more_memory_than_it_says():
    data = mixture(50)
    bounds = np.array([0, 10**6])
    tracemalloc.start()
    order = windowed_order(bounds, 1000, [0])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(order) == 10**6 and peak < 50 * 10**6 and data.window == 50


def test_a_negative_window_is_refused():
    with pytest.raises(VlaError, match="window -1; expected"):
        mixture(-1)
