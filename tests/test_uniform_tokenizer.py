import json
from pathlib import Path

import numpy as np
import pytest

from vla.tokenizers.chunk_codec import ActionCodec
from vla.tokenizers.placement import Placement
from vla.tokenizers.protocol import ActionEncodeError, ActionTokenizer
from vla.tokenizers.schemes import load_tokenizer
from vla.tokenizers.uniform import UniformTokenizer
from vla.types import ActionDecodeError, VlaError

TOKENIZER = UniformTokenizer()
LLAMA = Placement.tail(32000, 256, model_vocab_size=32064, tokenizer_length=32001)


def digitize(actions: np.ndarray) -> np.ndarray:
    """OpenVLA's own arithmetic: 1 .. 256."""
    return np.digitize(np.clip(actions, -1.0, 1.0), np.linspace(-1.0, 1.0, 256))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_every_edge_and_its_neighbours_equal_digitize(dtype: type) -> None:
    edges = np.linspace(-1, 1, 256).astype(dtype)
    centres = TOKENIZER.centres.astype(dtype)
    around = [np.nextafter(table, dtype(side)) for table in (edges, centres) for side in (-np.inf, np.inf)]
    values = np.concatenate([edges, centres, *around])
    np.testing.assert_array_equal(TOKENIZER.to_symbols(values) + 1, digitize(values))


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_a_million_random_values_equal_digitize(dtype: type) -> None:
    values = np.random.default_rng(0).uniform(-1.05, 1.05, (142858, 7)).astype(dtype)
    symbols = TOKENIZER.to_symbols(values)
    assert symbols.dtype == np.int64 and symbols.shape == values.shape
    np.testing.assert_array_equal(symbols + 1, digitize(values))


def test_the_dtype_is_part_of_the_definition() -> None:
    edges = np.linspace(-1, 1, 256)
    assert (TOKENIZER.to_symbols(edges) != TOKENIZER.to_symbols(edges.astype(np.float32))).sum() == 127


@pytest.mark.parametrize(("low", "high", "bins"), [(0.3, 0.7, 10), (-3.0, 5.5, 1000), (0.0, 1.0, 2), (-1e-3, 1e-3, 64)])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_other_ranges_equal_digitize_inside_the_range(low: float, high: float, bins: int, dtype: type) -> None:
    tokenizer = UniformTokenizer(bins, low, high)
    values = np.concatenate([np.random.default_rng(1).uniform(low, high, 10000), tokenizer.edges[1:-1]]).astype(dtype)
    values = values[(values >= low) & (values <= high)]
    np.testing.assert_array_equal(
        tokenizer.to_symbols(values) + 1, np.digitize(values.astype(np.float64), tokenizer.edges)
    )
    np.testing.assert_array_equal(tokenizer.to_symbols(np.array([low - 1, high + 1], dtype)), [0, bins - 1])


OPENVLA_CASES = [  # action, id, decoded value
    (-1.0, 31999, -0.99607843),
    (-7.0, 31999, -0.99607843),
    (0.0, 31872, 0.0),
    (np.nextafter(1.0, 0.0), 31745, 0.99607843),
    (1.0, 31744, 0.99607843),
    (9.0, 31744, 0.99607843),
]


@pytest.mark.parametrize(("action", "token_id", "decoded"), OPENVLA_CASES)
def test_openvla_cases(action: float, token_id: int, decoded: float) -> None:
    symbols = TOKENIZER.to_symbols(np.array([action]))
    assert LLAMA.encode(symbols).tolist() == [token_id]
    assert TOKENIZER.to_values(symbols)[0] == pytest.approx(decoded, abs=1e-8)


def test_zero_decodes_to_exactly_zero() -> None:
    assert TOKENIZER.to_values(TOKENIZER.to_symbols(np.zeros(1)))[0] == 0.0


def test_decode_then_encode_is_the_identity_except_for_plus_one() -> None:
    symbols = np.arange(256)
    for dtype in (np.float32, np.float64):
        again = TOKENIZER.to_symbols(TOKENIZER.to_values(symbols).astype(dtype))
        np.testing.assert_array_equal(again, np.minimum(symbols, 254))


def test_round_trip_is_within_half_a_bin() -> None:
    values = np.random.default_rng(2).uniform(-1, 1, 100000)
    values = np.concatenate([values, TOKENIZER.edges])
    assert np.abs(TOKENIZER.to_values(TOKENIZER.to_symbols(values)) - values).max() <= 1 / 255 + 1e-12


def test_encoding_is_monotonic_and_rows_are_independent() -> None:
    values = np.linspace(-1.2, 1.2, 5000, dtype=np.float32)
    symbols = TOKENIZER.to_symbols(values)
    assert (np.diff(symbols) >= 0).all()
    np.testing.assert_array_equal(symbols[::7], TOKENIZER.to_symbols(values[::7]))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_nan_and_infinity_raise(bad: float, dtype: type) -> None:
    actions = np.zeros((2, 7), dtype)
    actions[1, 3] = bad
    with pytest.raises(ActionEncodeError, match=r"1 action values .* NaN or infinite, the first at index \(1, 3\)"):
        TOKENIZER.to_symbols(actions)
    assert issubclass(ActionEncodeError, VlaError)


def test_other_dtypes() -> None:
    np.testing.assert_array_equal(TOKENIZER.to_symbols(np.array([-1, 0, 1])), [0, 127, 255])
    assert TOKENIZER.to_symbols(np.zeros((0, 7))).shape == (0, 7)
    with pytest.raises(ActionEncodeError, match="dtype complex128"):
        TOKENIZER.to_symbols(np.zeros(3, complex))
    with pytest.raises(ActionDecodeError, match="dtype float64"):
        TOKENIZER.to_values(np.zeros(3))
    with pytest.raises(ActionDecodeError, match=r"got symbols -1 \.\. 256; expected 0 \.\. 255"):
        TOKENIZER.to_values(np.array([-1, 256]))


def test_input_is_left_alone() -> None:
    actions = np.full((2, 3), 0.123)
    TOKENIZER.to_symbols(actions)
    assert (actions == 0.123).all()


def test_save_and_load(tmp_path: Path) -> None:
    tokenizer: ActionTokenizer = UniformTokenizer(64, -2.0, 3.0, "edges").fit(np.zeros((5, 2, 7)))
    tokenizer.save(tmp_path)
    assert load_tokenizer(tmp_path) == tokenizer and tokenizer.vocab_size == 64
    scheme = json.loads((tmp_path / "scheme.json").read_text())
    assert scheme == {"scheme": "uniform", "bins": 64, "low": -2.0, "high": 3.0, "mode": "edges"}


SCHEME = {"scheme": "uniform", "bins": 64, "low": -1, "high": 1, "mode": "centres"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scheme": "unifrom"}, "'unifrom'; expected one of uniform, .*did you mean 'uniform'"),
        ({"scheme": 3}, "scheme.json without a scheme"),
        ({"bins": "64"}, r"scheme.json: bins = '64'; expected a field 'bins' of type int"),
        ({"bins": True}, "bins = True"),
        ({"low": None}, "low = None"),
        ({"mode": "middles"}, "centres or edges"),
    ],
)
def test_damaged_scheme_files_are_refused(tmp_path: Path, change: dict[str, object], message: str) -> None:
    (tmp_path / "scheme.json").write_text(json.dumps(SCHEME))
    assert load_tokenizer(tmp_path) == UniformTokenizer(64)
    (tmp_path / "scheme.json").write_text(json.dumps({**SCHEME, **change}))
    with pytest.raises(VlaError, match=message):
        load_tokenizer(tmp_path)


def test_no_scheme_file_and_half_of_one(tmp_path: Path) -> None:
    with pytest.raises(VlaError, match="no scheme.json in"):
        load_tokenizer(tmp_path)
    (tmp_path / "scheme.json").write_text("{")
    with pytest.raises(VlaError, match="expected JSON"):
        load_tokenizer(tmp_path)


def test_edges_reproduce_both_ends() -> None:
    tokenizer = UniformTokenizer(257, mode="edges")
    values = np.array([-1.0, -0.5, 0.0, 0.25, 1.0, 7.0], np.float32).reshape(1, 2, 3)
    decoded, ok = tokenizer.decode(tokenizer.encode(values), 2, 3)
    assert ok.all() and decoded.tolist() == np.clip(values, -1, 1).tolist()
    wild = np.random.default_rng(4).uniform(-1, 1, 100_000)
    assert np.abs(tokenizer.to_values(tokenizer.to_symbols(wild)) - wild).max() <= tokenizer.bound + 1e-12
    for bins in (2, 3, 256, 1000):
        every = UniformTokenizer(bins, mode="edges")
        for dtype in (np.float32, np.float64):
            again = every.to_symbols(every.to_values(np.arange(bins)).astype(dtype))
            np.testing.assert_array_equal(again, np.arange(bins))


def test_rows_that_are_no_chunk_are_not_ok() -> None:
    tokenizer = UniformTokenizer(8)
    rows = np.array([[1, 2, -1], [1, -1, -1], [1, 8, -1], [1, 2, 3]])
    actions, ok = tokenizer.decode(rows, 1, 2)
    assert ok.tolist() == [True, False, False, False]
    assert np.isfinite(actions[0]).all() and np.isnan(actions[1:]).all() and actions.shape == (4, 1, 2)
    assert not tokenizer.decode(rows[:, :1], 1, 2)[1].any()


@pytest.mark.parametrize("settings", [(1, -1.0, 1.0), (256, 1.0, -1.0), (256, 0.0, float("nan")), (256, 1e6, 1e6 + 1)])
def test_impossible_bins_are_refused(settings: tuple[int, float, float]) -> None:
    with pytest.raises(VlaError, match="got .* expected .* fix:"):
        UniformTokenizer(*settings)


def test_codec_is_row_major_and_round_trips() -> None:
    codec = ActionCodec(TOKENIZER, LLAMA, horizon=4, dim=3)
    actions = np.random.default_rng(3).uniform(-1, 1, (5, 4, 3)).astype(np.float32)
    ids = codec.encode(actions)
    assert ids.shape == (5, codec.max_tokens) == (5, 12) and ids.dtype == np.int64
    for step in range(4):
        for dimension in range(3):
            assert ids[2, step * 3 + dimension] == 32000 - digitize(actions[2, step, dimension])
    decoded, ok = codec.decode(ids)
    assert decoded.dtype == np.float32 and ok.all()
    assert np.abs(decoded - actions).max() <= 1 / 255 + 1e-6
    np.testing.assert_array_equal(codec.encode(decoded), ids)


def test_codec_marks_undecodable_rows() -> None:
    codec = ActionCodec(TOKENIZER, LLAMA, horizon=1, dim=2)
    decoded, ok = codec.decode(np.array([[31744, 31999], [31744, 31743], [32000, 31999], [31999, -1]]))
    assert ok.tolist() == [True, False, False, False]
    assert np.isnan(decoded[1:]).all() and np.isfinite(decoded[0]).all()


def test_codec_refuses_wrong_shapes() -> None:
    codec = ActionCodec(TOKENIZER, LLAMA, horizon=2, dim=3)
    with pytest.raises(ActionEncodeError, match=r"shape \(1, 3, 3\); expected \(B, 2, 3\)"):
        codec.encode(np.zeros((1, 3, 3)))
    with pytest.raises(ActionDecodeError, match=r"expected integers \(B, 6\)"):
        codec.decode(np.full((1, 5), 31800))
    with pytest.raises(VlaError, match="256 ids for a tokenizer of 64 symbols"):
        ActionCodec(UniformTokenizer(64), LLAMA, 1, 7)
