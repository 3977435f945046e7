"""Streamed mixtures: one stream for any number of ranks, exact resume, a buffer that does not grow."""

import json
from itertools import islice

import numpy as np
import pytest
from sources import toy_source

from vla.finetune.data.chunks import Sample
from vla.finetune.data.stream import IterableEpisodes, SourceEpisodes, StreamMixture
from vla.types import VlaError


def mixture(**changes) -> StreamMixture:
    a, b = toy_source(3, 5, name="a"), toy_source(6, 2, name="b", instructions=["b"] * 6)
    sources = [("a", SourceEpisodes(a), 1.0), ("b", IterableEpisodes(b.iter_episodes), 3.0)]
    return StreamMixture(sources, **{"horizon": 3, "buffer_size": 10, "seed": 4} | changes)


def same(x: Sample, y: Sample) -> bool:
    arrays = all(np.array_equal(p, q) for p, q in ((x.actions, y.actions), (x.is_pad, y.is_pad), (x.state, y.state)))
    pictures = x.images.keys() == y.images.keys() and all(np.array_equal(x.images[c], y.images[c]) for c in x.images)
    return arrays and pictures and (x.instruction, x.dataset) == (y.instruction, y.dataset)


def test_samples_are_those_of_the_data():
    a = toy_source(3, 5, name="a")
    stream = StreamMixture([("a", SourceEpisodes(a), 1.0)], horizon=4, buffer_size=1)
    for i, sample in enumerate(islice(stream, 18)):  # a buffer of one does not shuffle
        span = a.episodes[a.episode_of(i)]
        wanted = np.arange(i, i + 4)
        np.testing.assert_array_equal(sample.actions, a.actions()[np.minimum(wanted, span.stop - 1)])
        np.testing.assert_array_equal(sample.is_pad, wanted >= span.stop)
        np.testing.assert_array_equal(sample.images["front"], a.images(i)["front"])
        assert sample.actions.dtype == np.float32 and sample.instruction == a.instruction_of(i)


def test_weights_are_shares_of_the_frames_and_a_pass_is_complete():
    stream = mixture(buffer_size=50)
    drawn = list(islice(stream, 1200))
    assert np.mean([s.dataset == "b" for s in drawn]) == pytest.approx(0.75, abs=0.04)
    a = toy_source(3, 5, name="a")  # 18 frames; what has come in is a whole number of passes and a rest
    times = {row.tobytes(): 0 for row in a.actions()}
    for s in drawn:
        if s.dataset == "a":
            times[s.actions[0].tobytes()] += 1
    assert max(times.values()) - min(times.values()) <= 8 and min(times.values()) >= 10


def test_the_seed_decides():
    one, two, other = (list(islice(mixture(seed=seed), 40)) for seed in (4, 4, 5))
    assert all(same(x, y) for x, y in zip(one, two, strict=True))
    assert not all(same(x, y) for x, y in zip(one, other, strict=True))


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_share_one_stream(world):
    one = list(islice(mixture(), 12 * world))
    ranks = [list(islice(mixture(rank=rank, world=world), 12)) for rank in range(world)]
    for k, sample in enumerate(one):
        assert same(sample, ranks[k % world][k // world])


@pytest.mark.parametrize("position", [0, 1, 7, 60, 4200])
def test_exact_resume(position):
    changes = {"horizon": 1} if position > 1000 else {}  # beyond one block of random numbers
    stream = mixture(**changes)
    list(islice(stream, position))
    state = json.loads(json.dumps(stream.state_dict()))
    assert stream.position == position
    again = mixture(**changes)
    again.load_state_dict(state)
    assert again.state_dict() == stream.state_dict()
    assert all(same(x, y) for x, y in zip(islice(stream, 40), islice(again, 40), strict=True))


def test_a_state_of_something_else_is_refused():
    stream = mixture()
    list(islice(stream, 5))
    with pytest.raises(VlaError, match="a state with seed 4; expected 5"):
        mixture(seed=5).load_state_dict(stream.state_dict())
    short = StreamMixture([(n, SourceEpisodes(toy_source(1, 1)), 1.0) for n in "ab"], 3, 10, 4)
    with pytest.raises(VlaError, match="frames of the saved state that '[ab]' does not have"):
        short.load_state_dict(stream.state_dict())


def test_bad_arguments():
    episodes = SourceEpisodes(toy_source(1, 1))
    for weights in ((), (0.0,), (-1.0,), (float("nan"),)):
        with pytest.raises(VlaError, match="expected numbers >= 0"):
            StreamMixture([("a", episodes, w) for w in weights], 1)
    with pytest.raises(VlaError, match="rank 2 of 2"):
        StreamMixture([("a", episodes, 1.0)], 1, rank=2, world=2)
    with pytest.raises(VlaError, match="no frame in 'a'"):
        next(iter(StreamMixture([("a", IterableEpisodes(lambda: ()), 1.0)], 1)))
