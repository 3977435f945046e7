import json
from pathlib import Path

import numpy as np
import pytest

from vla.tokenizers.protocol import PAD, ActionEncodeError
from vla.tokenizers.quantile import QuantileTokenizer
from vla.tokenizers.schemes import load_tokenizer
from vla.types import ActionDecodeError, VlaError


def data(n: int = 2000, horizon: int = 4) -> np.ndarray:
    """Dimensions: normal, heavy-tailed, gripper of -1 and 1, half zeros, constant."""
    rng = np.random.default_rng(0)
    shape = (n, horizon)
    columns = [rng.normal(0, 0.3, shape), rng.standard_cauchy(shape), np.where(rng.random(shape) < 0.3, -1.0, 1.0),
               np.where(rng.random(shape) < 0.5, 0.0, rng.uniform(-1, 1, shape)), np.full(shape, 0.25)]  # fmt: skip
    return np.stack(columns, axis=-1).astype(np.float32)


CHUNKS = data()
TOKENIZER = QuantileTokenizer(64).fit(CHUNKS)


def test_bins_have_equal_mass_where_values_do_not_repeat() -> None:
    symbols = TOKENIZER.encode(CHUNKS).reshape(-1, 5)
    for d in (0, 1):
        counts = np.bincount(symbols[:, d], minlength=64)
        assert counts.min() >= 124 and counts.max() <= 126  # 8000 / 64 = 125


def test_repeated_values_share_a_bin() -> None:
    gripper, zeros, constant = TOKENIZER.values[2], TOKENIZER.values[3], TOKENIZER.values[4]
    assert gripper.tolist() == [-1, 1] and TOKENIZER.edges[2].tolist() == [0.0]
    assert 0.0 in zeros and 30 <= len(zeros) <= 35
    assert constant.tolist() == [0.25]
    decoded = TOKENIZER.decode(TOKENIZER.encode(CHUNKS), 4, 5)[0]
    for d in (2, 4):
        np.testing.assert_array_equal(decoded[..., d], CHUNKS[..., d])
    assert (decoded[..., 3][CHUNKS[..., 3] == 0] == 0).all()


def test_encoding_is_monotonic() -> None:
    line = np.linspace(-3, 3, 4001)
    symbols = TOKENIZER.encode(np.repeat(line[:, None, None], 5, axis=2))
    assert (np.diff(symbols, axis=0) >= 0).all()
    for edges, values in zip(TOKENIZER.edges, TOKENIZER.values, strict=True):
        assert (np.diff(edges) > 0).all() and (np.diff(values) > 0).all()


def test_round_trip_is_within_the_bound_and_idempotent() -> None:
    rng = np.random.default_rng(1)
    inside = rng.uniform(TOKENIZER.ranges[:, 0], TOKENIZER.ranges[:, 1], (500, 4, 5))
    for chunks in (CHUNKS, CHUNKS.astype(np.float64), inside):
        symbols = TOKENIZER.encode(chunks)
        decoded, ok = TOKENIZER.decode(symbols, 4, 5)
        assert ok.all() and decoded.dtype == np.float32
        assert (np.abs(decoded - chunks).max(axis=(0, 1)) <= TOKENIZER.bound + 1e-9).all()
        np.testing.assert_array_equal(TOKENIZER.encode(decoded), symbols)


def test_values_that_lie_close_together_keep_apart() -> None:
    close = np.float32(0.1) + np.arange(40, dtype=np.float32) * np.spacing(np.float32(0.1))
    tokenizer = QuantileTokenizer(40).fit(close.reshape(-1, 1, 1))
    symbols = tokenizer.encode(close.reshape(-1, 1, 1))
    assert symbols.ravel().tolist() == list(range(40))
    np.testing.assert_array_equal(tokenizer.encode(tokenizer.decode(symbols, 1, 1)[0]), symbols)


@pytest.mark.parametrize(("n", "bins"), [(1, 256), (3, 256), (7, 3), (1000, 2)])
def test_any_number_of_data(n: int, bins: int) -> None:
    chunks = np.random.default_rng(n).normal(size=(n, 1, 2)).astype(np.float32)
    tokenizer = QuantileTokenizer(bins).fit(chunks)
    assert [len(values) for values in tokenizer.values] == [min(n, bins)] * 2
    if n <= bins:
        np.testing.assert_array_equal(tokenizer.decode(tokenizer.encode(chunks), 1, 2)[0], chunks)


def test_order_and_padding_of_a_batch_change_nothing() -> None:
    symbols, order = TOKENIZER.encode(CHUNKS[:50]), np.random.default_rng(1).permutation(50)
    np.testing.assert_array_equal(TOKENIZER.encode(CHUNKS[:50][order]), symbols[order])
    wider = np.pad(symbols, ((0, 0), (0, 4)), constant_values=PAD)
    np.testing.assert_array_equal(TOKENIZER.decode(wider, 4, 5)[0], TOKENIZER.decode(symbols, 4, 5)[0])


def test_every_legal_row_decodes_and_no_other() -> None:
    rng, grammar = np.random.default_rng(0), TOKENIZER.grammar(2, 5)
    for _ in range(50):
        state, row = grammar.start, []
        while (legal := grammar.legal(state)).size:
            row.append(int(rng.choice(legal)))
            state = grammar.advance(state, row[-1])
        assert len(row) == grammar.max_tokens == 10
        actions, ok = TOKENIZER.decode(np.array([row]), 2, 5)
        assert ok.all()
        np.testing.assert_array_equal(TOKENIZER.encode(actions), [row])
    rows = np.tile(row, (5, 1))
    rows[1, 4], rows[2, 0], rows[3, 9], rows[4, 3] = 1, 64, PAD, PAD  # the constant dimension has one symbol
    actions, ok = TOKENIZER.decode(rows, 2, 5)
    assert ok.tolist() == [True, False, False, False, False] and np.isnan(actions[1:]).all()
    assert not TOKENIZER.decode(rows[:1, :5], 2, 5)[1].any()


def test_bad_input_is_refused() -> None:
    with pytest.raises(VlaError, match="not fitted"):
        QuantileTokenizer().encode(CHUNKS)
    with pytest.raises(VlaError, match="at least one action"):
        QuantileTokenizer().fit(np.zeros((0, 4, 2)))
    with pytest.raises(VlaError, match="at least 2 bins"):
        QuantileTokenizer(1)
    with pytest.raises(ActionEncodeError, match=r"shape \(1, 4, 3\); expected \(B, H, 5\)"):
        TOKENIZER.encode(np.zeros((1, 4, 3)))
    with pytest.raises(ActionEncodeError, match="NaN or infinite"):
        QuantileTokenizer().fit(np.full((1, 4, 3), np.inf))
    with pytest.raises(ActionDecodeError, match="got dim 3; expected 5"):
        TOKENIZER.decode(np.zeros((1, 12), int), 4, 3)


def test_save_and_load(tmp_path: Path) -> None:
    TOKENIZER.save(tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert isinstance(loaded, QuantileTokenizer) and loaded.vocab_size == 64
    np.testing.assert_array_equal(loaded.encode(CHUNKS), TOKENIZER.encode(CHUNKS))
    np.testing.assert_array_equal(loaded.bound, TOKENIZER.bound)
    symbols = TOKENIZER.encode(CHUNKS[:9])
    np.testing.assert_array_equal(loaded.decode(symbols, 4, 5)[0], TOKENIZER.decode(symbols, 4, 5)[0])
    scheme = json.loads((tmp_path / "scheme.json").read_text())
    scheme["dimensions"][1]["edges"].pop()
    (tmp_path / "scheme.json").write_text(json.dumps(scheme))
    with pytest.raises(VlaError, match=r"scheme.json: dimension 1; expected ascending edges"):
        load_tokenizer(tmp_path)
