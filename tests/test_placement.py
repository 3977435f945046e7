import json

import numpy as np
import pytest

from vla.tokenizers.placement import Placement
from vla.types import VlaError

LLAMA = Placement.tail(32000, 256, model_vocab_size=32064, tokenizer_length=32001, special_ids=(0, 1, 2, 32000))
SCATTERED = Placement.reserved([90, 7, 45, 11], model_vocab_size=100)
ADDED = Placement.added(500, 16, model_vocab_size=516)


def test_tail_is_openvla() -> None:
    d = np.arange(1, 257)
    np.testing.assert_array_equal(LLAMA.encode(d - 1), 32000 - d)
    assert (LLAMA.ids[0], LLAMA.ids[-1]) == (31999, 31744)


def test_padded_size_in_place_of_the_tokenizers_is_caught() -> None:
    with pytest.raises(VlaError, match="OpenVLA: 32064 for a tokenizer of 32000"):
        Placement.tail(32064, model_vocab_size=32064)
    with pytest.raises(VlaError, match="only 32001 tokens"):
        Placement.tail(32064, model_vocab_size=32064, tokenizer_length=32001)
    with pytest.raises(VlaError, match="swapped"):
        Placement.tail(32064, model_vocab_size=32000)


def test_equal_sizes_are_fine_once_shown_to_be_real() -> None:
    assert Placement.tail(512, 256, model_vocab_size=512, tokenizer_length=512).ids[0] == 511


def test_bad_placements() -> None:
    with pytest.raises(VlaError, match=r"special tokens: \[31999\]"):
        Placement.tail(32000, model_vocab_size=32064, special_ids=(2, 31999))
    with pytest.raises(VlaError, match=r"special tokens: \[7, 45\]"):
        Placement.reserved([90, 7, 45], model_vocab_size=100, special_ids={7, 45})
    with pytest.raises(VlaError, match="ids below 515"):
        Placement.added(500, 16, model_vocab_size=515)
    with pytest.raises(VlaError, match="different ids"):
        Placement.reserved([1, 2, 1], model_vocab_size=100)
    with pytest.raises(VlaError, match="none negative"):
        Placement.reserved([-1, 2], model_vocab_size=100)
    with pytest.raises(VlaError, match="300 symbols"):
        Placement.tail(256, 300, model_vocab_size=300)
    with pytest.raises(VlaError, match="one of tail, reserved, added"):
        Placement("middle", (1, 2))  # pyright: ignore[reportArgumentType]


def test_a_large_vocabulary_below_ids_that_keep_their_meaning() -> None:
    """openpi's PaliGemma: id = 257152 - 1 - 128 - symbol, below the 128 <seg...> tokens, embedding padded to 257216."""
    fast = Placement.tail(257_152, 2048, model_vocab_size=257_216, tokenizer_length=257_153, skip=128)
    np.testing.assert_array_equal(fast.encode(np.arange(2048)), 257_152 - 1 - 128 - np.arange(2048))
    assert Placement.load(json.loads(json.dumps(fast.save()))) == fast
    with pytest.raises(VlaError, match=r"special tokens: \[257000\]"):
        Placement.tail(257_152, 2048, model_vocab_size=257_216, skip=128, special_ids=[257_000])
    with pytest.raises(VlaError, match="300 symbols below 128 skipped ids"):
        Placement.tail(400, 300, model_vocab_size=464, skip=128)
    with pytest.raises(VlaError, match="skipped"):
        Placement.tail(400, 3, model_vocab_size=464, skip=-1)
    with pytest.raises(VlaError, match="OpenVLA: 32064 for a tokenizer of 32000"):
        Placement.tail(257_216, 2048, model_vocab_size=257_216, skip=128)


@pytest.mark.parametrize("placement", [LLAMA, SCATTERED, ADDED], ids=lambda placement: placement.kind)
def test_round_trips(placement: Placement) -> None:
    symbols = np.arange(placement.n_symbols)[None]
    back, ok = placement.decode(placement.encode(symbols))
    np.testing.assert_array_equal(back, symbols)
    assert ok.tolist() == [True] and back.dtype == np.int64
    loaded = Placement.load(json.loads(json.dumps(placement.save())))
    assert loaded == placement and loaded.check(32064) is loaded


def test_ranges_are_saved_short_and_lists_whole() -> None:
    assert LLAMA.save() == {"kind": "tail", "first_id": 31999, "step": -1, "n": 256}
    assert SCATTERED.save() == {"kind": "reserved", "ids": [90, 7, 45, 11]}
    single = Placement.reserved([3], model_vocab_size=4)
    assert Placement.load(single.save()) == single
    with pytest.raises(VlaError, match="restore the file"):
        Placement.load({"kind": "tail"})
    with pytest.raises(VlaError, match="none negative"):
        Placement.load({"kind": "tail", "first_id": 3, "step": -1, "n": 9})


@pytest.mark.parametrize("placement", [LLAMA, SCATTERED, ADDED], ids=lambda placement: placement.kind)
def test_every_other_id_is_not_ok(placement: Placement) -> None:
    every = np.arange(-5, 32100)
    symbols, ok = placement.decode(every[:, None])
    np.testing.assert_array_equal(ok, np.isin(every, placement.ids))
    assert (symbols[~ok] == -1).all() and (symbols[ok] >= 0).all()


def test_one_bad_id_spoils_its_row_only() -> None:
    symbols, ok = LLAMA.decode(np.array([[31999, 31744], [31999, 31743], [2**40, 31999], [-(2**40), 31999]]))
    assert ok.tolist() == [True, False, False, False]
    assert symbols.tolist() == [[0, 255], [0, -1], [-1, 0], [-1, 0]]


def test_legal_ids() -> None:
    assert SCATTERED.legal_ids(0).tolist() == [7, 11, 45, 90]
    np.testing.assert_array_equal(LLAMA.legal_ids(6), np.arange(31744, 32000))
    with pytest.raises(IndexError, match="-1 is negative"):
        LLAMA.legal_ids(-1)


def test_symbols_outside_raise() -> None:
    with pytest.raises(IndexError, match="negative"):
        LLAMA.encode(np.array([-1]))
    with pytest.raises(IndexError):
        LLAMA.encode(np.array([256]))
