"""Residual VQ and FSQ, trained for a few steps on smooth chunks. What they cannot promise (a bound on the error) is said in
`vla.tokenizers.learned`; what they do promise is tested here."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from vla.tokenizers.code_length import code_lengths
from vla.tokenizers.fsq import FsqTokenizer, squeeze_constants
from vla.tokenizers.fsq_training import ScalarGrid
from vla.tokenizers.learned import LearnedCodec
from vla.tokenizers.protocol import PAD, ActionEncodeError
from vla.tokenizers.schemes import load_tokenizer
from vla.tokenizers.vq import VqTokenizer
from vla.types import ActionDecodeError, VlaError

H, D = 4, 3
QUICK = {"hidden": 64, "steps": 300, "batch": 64, "learning_rate": 3e-3}


def chunks(n: int, seed: int) -> np.ndarray:
    """Straight lines, with a gripper of -1 and 1."""
    rng = np.random.default_rng(seed)
    time = np.linspace(0, 1, H)[None, :, None]
    lines = rng.uniform(-0.7, 0.7, (n, 1, D)) + time * rng.uniform(-0.3, 0.3, (n, 1, D))
    lines[:, :, -1] = rng.choice([-1.0, 1.0], (n, 1))
    return lines.astype(np.float32)


DATA, HELD_OUT = chunks(1000, 0), chunks(200, 1)


@pytest.fixture(scope="module", params=["vq", "fsq"])
def codec(request: pytest.FixtureRequest) -> LearnedCodec:
    unfitted = {"vq": VqTokenizer(codebooks=4, codes=32, latents=8, **QUICK), "fsq": FsqTokenizer(tokens=3, **QUICK)}
    return unfitted[request.param].fit(DATA)


def test_chunks_come_back_better_than_their_mean(codec: LearnedCodec) -> None:
    for data in (DATA, HELD_OUT):
        actions, ok = codec.decode(codec.encode(data), H, D)
        assert ok.all() and actions.dtype == np.float32
        assert ((actions - data) ** 2).mean() < 0.15 * DATA.var(axis=0).mean()
    error = codec.decode(codec.encode(DATA), H, D)[0] - DATA
    assert codec.rms_error == pytest.approx(np.sqrt((error**2).mean()), rel=1e-4)
    assert codec.max_error == pytest.approx(np.abs(error).max(), rel=1e-4)


def test_symbols_fill_their_range(codec: LearnedCodec) -> None:
    symbols = codec.encode(DATA)
    assert symbols.shape == (1000, codec.n_tokens) and symbols.dtype == np.int64
    assert symbols.min() >= 0 and symbols.max() < codec.vocab_size
    assert all(len(np.unique(column)) >= 8 for column in symbols.T)


def test_order_and_size_of_a_batch_change_nothing(codec: LearnedCodec) -> None:
    symbols, order = codec.encode(DATA), np.random.default_rng(0).permutation(len(DATA))
    np.testing.assert_array_equal(codec.encode(DATA[order]), symbols[order])
    actions = codec.decode(symbols, H, D)[0]
    for i in range(20):
        np.testing.assert_array_equal(codec.encode(DATA[i : i + 1])[0], symbols[i])
        np.testing.assert_array_equal(codec.decode(symbols[i : i + 1], H, D)[0][0], actions[i])
    wider = np.pad(symbols, ((0, 0), (0, 3)), constant_values=PAD)
    np.testing.assert_array_equal(codec.decode(wider, H, D)[0], actions)


def test_every_legal_row_decodes_and_no_other(codec: LearnedCodec) -> None:
    grammar, rng = codec.grammar(H, D), np.random.default_rng(0)
    rows = rng.integers(0, codec.vocab_size, (100, codec.n_tokens))
    assert grammar.max_tokens == codec.n_tokens and len(grammar.legal(grammar.start)) == codec.vocab_size
    actions, ok = codec.decode(rows, H, D)
    assert ok.all() and np.isfinite(actions).all()
    rows[1, 0], rows[2, -1], rows[3, 0] = codec.vocab_size, PAD, PAD
    actions, ok = codec.decode(rows[:4], H, D)
    assert ok.tolist() == [True, False, False, False] and np.isnan(actions[1:]).all()


def test_the_same_seed_gives_the_same_weights() -> None:
    before = torch.get_rng_state()
    for kind in (VqTokenizer, FsqTokenizer):
        one, two, other = (kind(hidden=16, steps=20, batch=64, seed=seed).fit(DATA[:100]) for seed in (3, 3, 4))
        assert all((one.weights[name] == two.weights[name]).all() for name in one.weights)
        assert (one.weights["encoder.0.weight"] != other.weights["encoder.0.weight"]).any()
    assert torch.equal(torch.get_rng_state(), before)


def test_torch_is_only_imported_to_train() -> None:
    code = "import sys, vla.tokenizers.vq, vla.tokenizers.fsq, vla.tokenizers.fast; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"


def test_progress_is_told() -> None:
    told: list[tuple[int, int, float]] = []
    FsqTokenizer(hidden=8, steps=120, batch=32).fit(DATA[:64], lambda *now: told.append(now))
    assert [now[:2] for now in told] == [(50, 120), (100, 120), (120, 120)] and all(np.isfinite(now[2]) for now in told)


@pytest.mark.parametrize("levels", [(8, 5, 5, 5), (2,), (3, 3), (7, 4)])
def test_the_grid_of_fsq(levels: tuple[int, ...]) -> None:
    """Every symbol decodes to a different point that training can produce, and torch and numpy round alike."""
    codec = FsqTokenizer(levels=levels, tokens=1)
    every = np.arange(codec.vocab_size)[:, None]
    points = codec.dequantise(every)
    assert len(np.unique(points, axis=0)) == codec.vocab_size
    assert points.min() >= -1 and points.max() <= 1
    half, offset, shift = squeeze_constants(levels)
    latents = np.arctanh((points * (np.array(levels) // 2) + offset) / half) - shift
    np.testing.assert_array_equal(codec.candidates(latents)[:, 0], every)
    noise = np.random.default_rng(0).normal(0, 2, (500, len(levels))).astype(np.float32)
    trained, loss = ScalarGrid(levels, squeeze_constants(levels)).quantise(torch.from_numpy(noise))
    np.testing.assert_allclose(codec.dequantise(codec.candidates(noise)[:, 0]), trained.numpy(), atol=1e-6)
    assert loss == 0


def test_residual_codes_by_hand() -> None:
    books = np.array([[[0, 0], [10, 0]], [[0, 0], [1, 1]]], np.float32)
    codec = VqTokenizer(codebooks=2, codes=2, latents=2, weights={"codebooks": books})
    found = codec.candidates(np.array([[0.2, 0.1], [11, 1.2], [9, 0.2], [0.6, 0.7]], np.float32))
    assert found.shape == (4, 4, 2), "all codes: fewer than the beam is wide"
    assert found[:, 0].tolist() == [[0, 0], [1, 1], [1, 0], [0, 1]] and found[0].tolist()[1] == [0, 1]
    assert codec.dequantise(found[:, 0]).tolist() == [[0, 0], [11, 1], [10, 0], [1, 1]]


def test_a_beam_finds_what_nearest_codes_miss() -> None:
    """4.9 is nearest to 0, but 10 - 5 is nearer than 0 + 3."""
    books = np.array([[[0.0], [10.0]], [[3.0], [-5.0]]], np.float32)
    codec = VqTokenizer(codebooks=2, codes=2, latents=1, weights={"codebooks": books})
    assert codec.candidates(np.array([[4.9]], np.float32))[0].tolist() == [[1, 1], [0, 0], [1, 0], [0, 1]]


def test_neighbours_are_codes_with_one_number_a_level_off() -> None:
    codec = FsqTokenizer(levels=(3, 4), tokens=2)
    near = codec.neighbours(np.array([[0, 11]]))[0]
    assert near.shape == (9, 2) and near[0].tolist() == [0, 11] and len(np.unique(near, axis=0)) == 9
    digits = np.stack([near % 3, near // 3], axis=2).reshape(9, 4)
    assert sorted(map(tuple, digits[1:].tolist())) == sorted(
        [(1, 0, 2, 3), (2, 0, 2, 3), (0, 1, 2, 3), (0, 3, 2, 3), (0, 0, 0, 3), (0, 0, 1, 3), (0, 0, 2, 0), (0, 0, 2, 2)]
    )


class Circling(FsqTokenizer):
    """Codes of one number: 0 is found again from itself; 1 leads to 2, 2 to 3, 3 to 1; 4 leads to 3."""

    def _search(self, values: np.ndarray) -> np.ndarray:
        return np.array([0, 2, 3, 1, 3])[values.round().astype(int)][:, None]

    def _flat(self, symbols: np.ndarray) -> np.ndarray:
        return symbols.astype(np.float32)


def test_walks_that_end_in_a_circle_have_one_answer() -> None:
    codec = Circling(levels=(5,), tokens=1, horizon=1, dim=1, weights={"some": np.zeros(1)})
    assert codec.encode(np.arange(5.0).reshape(5, 1, 1)).tolist() == [[0], [1], [1], [1], [1]]


def test_decoded_chunks_are_encoded_to_what_they_came_from(codec: LearnedCodec) -> None:
    wild = np.random.default_rng(0).uniform(-2, 2, (100, H, D))
    for data in (HELD_OUT, wild):
        symbols = codec.encode(data)
        np.testing.assert_array_equal(codec.encode(codec.decode(symbols, H, D)[0]), symbols)


def test_training_begins_with_principal_components() -> None:
    """Before anything is learned, latents and chunks are rotations of each other."""
    codec = VqTokenizer(codebooks=1, codes=4, latents=16, steps=1, learning_rate=1e-12).fit(DATA)
    w = codec.weights
    latents = DATA.reshape(len(DATA), -1) @ w["encoder.linear.weight"] + w["encoder.linear.bias"]
    size = latents.std(axis=0)
    assert np.abs(latents.mean(axis=0)).max() < 1e-5 and (np.diff(size) < 1e-5).all() and (size[H * D :] < 1e-5).all()
    back = latents @ w["decoder.linear.weight"] + w["decoder.linear.bias"]
    np.testing.assert_allclose(back, DATA.reshape(len(DATA), -1), atol=1e-3)


def test_error_falls_with_code_length() -> None:
    table = code_lengths([VqTokenizer(codebooks=k, codes=16, latents=8, **QUICK) for k in (1, 4)], DATA, HELD_OUT)
    assert [row.tokens for row in table] == [1, 4] and [row.bits for row in table] == [4, 16]
    assert table[1].rms_error < 0.8 * table[0].rms_error
    assert (table[0].scheme, table[0].settings) == ("vq", '{"codebooks": 1, "codes": 16, "latents": 8}')


def test_bad_input_is_refused(codec: LearnedCodec) -> None:
    with pytest.raises(ActionEncodeError, match=r"shape \(2, 4, 4\); expected \(B, 4, 3\)"):
        codec.encode(np.zeros((2, 4, 4)))
    with pytest.raises(ActionEncodeError, match="NaN or infinite"):
        codec.fit(np.full((2, H, D), np.nan))
    with pytest.raises(VlaError, match="at least one chunk"):
        codec.fit(np.zeros((0, H, D)))
    with pytest.raises(ActionDecodeError, match="got chunks of 5 x 3; expected 4 x 3"):
        codec.decode(np.zeros((1, codec.n_tokens), int), 5, D)
    with pytest.raises(VlaError, match="was not fitted"):
        type(codec)().encode(DATA)
    with pytest.raises(VlaError, match="steps=0"):
        type(codec)(steps=0)
    with pytest.raises(VlaError, match="levels of at least 2"):
        FsqTokenizer(levels=(8, 1))
    with pytest.raises(VlaError, match="0 codebooks"):
        VqTokenizer(codebooks=0)


def test_save_and_load(codec: LearnedCodec, tmp_path: Path) -> None:
    codec.save(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["scheme.json", "weights.safetensors"]
    loaded = load_tokenizer(tmp_path)
    assert isinstance(loaded, type(codec)) and loaded.rms_error == codec.rms_error
    symbols = codec.encode(HELD_OUT)
    np.testing.assert_array_equal(loaded.encode(HELD_OUT), symbols)
    np.testing.assert_array_equal(loaded.decode(symbols, H, D)[0], codec.decode(symbols, H, D)[0])
    scheme = json.loads((tmp_path / "scheme.json").read_text())
    (tmp_path / "scheme.json").write_text(json.dumps({**scheme, "hidden": 32}))
    with pytest.raises(
        VlaError, match=r"weights.safetensors: decoder.0.bias: float32 \(64,\); expected float32 \(32,\)"
    ):
        load_tokenizer(tmp_path)
    (tmp_path / "scheme.json").write_text(json.dumps(scheme))
    (tmp_path / "weights.safetensors").write_bytes((tmp_path / "weights.safetensors").read_bytes()[:-9])
    with pytest.raises(VlaError, match=r"weights.safetensors: .*expected the weights of the codec"):
        load_tokenizer(tmp_path)
    (tmp_path / "weights.safetensors").unlink()
    with pytest.raises(VlaError, match=r"No such file .*expected the weights of the codec"):
        load_tokenizer(tmp_path)
