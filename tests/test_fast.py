"""FAST beside the processor it reproduces.

`golden/fast/chunks.npz` was made with the published `processing_action_tokenizer.py` (transformers 5.23, tokenizers
0.23.3): its `fit` on `train_157ths / 15.7` with vocab_size=640 wrote `golden/fast/processor`, and `ids` and `values` are
what its call and its `decode` answered for `chunks_4096ths / 4096`. All numbers are synthetic trajectories.
"""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from vla.tokenizers.fast import FastTokenizer, transform
from vla.tokenizers.fast_text import byte_characters
from vla.tokenizers.protocol import PAD, ActionEncodeError, ActionTokenizer
from vla.tokenizers.rows import padded
from vla.tokenizers.schemes import load_tokenizer
from vla.types import ActionDecodeError, VlaError

GOLDEN = Path(__file__).parent / "golden" / "fast"
H, D = 10, 7


@pytest.fixture(scope="module")
def golden() -> dict[str, np.ndarray]:
    with np.load(GOLDEN / "chunks.npz", allow_pickle=False) as data:
        return {
            "train": data["train_157ths"] / 15.7,
            "chunks": data["chunks_4096ths"] / 4096.0,
            "ids": data["ids"].astype(np.int64),
            "values": data["values"],
        }


@pytest.fixture(scope="module")
def released() -> FastTokenizer:
    return FastTokenizer.from_processor(GOLDEN / "processor")


@pytest.fixture(scope="module")
def fitted(golden: dict[str, np.ndarray]) -> FastTokenizer:
    return FastTokenizer(max_vocab=640).fit(golden["train"])


def random_rows(tokenizer: ActionTokenizer, n: int, horizon: int, dim: int, seed: int = 0) -> np.ndarray:
    """Rows drawn uniformly among the legal symbols."""
    rng, grammar, rows = np.random.default_rng(seed), tokenizer.grammar(horizon, dim), []
    for _ in range(n):
        state, row = grammar.start, []
        while (legal := grammar.legal(state)).size:
            assert (np.diff(legal) > 0).all() and legal.dtype == np.int64
            row.append(int(rng.choice(legal)))
            state = grammar.advance(state, row[-1])
        assert len(row) <= grammar.max_tokens
        rows.append(row)
    return padded(rows)


def test_ids_and_values_equal_the_processors(released: FastTokenizer, golden: dict[str, np.ndarray]) -> None:
    np.testing.assert_array_equal(released.encode(golden["chunks"]), golden["ids"])
    actions, ok = released.decode(golden["ids"], H, D)
    assert ok.all() and actions.dtype == np.float32
    np.testing.assert_allclose(actions, golden["values"], rtol=0, atol=5e-7)


def test_fit_over_bytes_gives_the_processors_files(golden: dict[str, np.ndarray], released: FastTokenizer) -> None:
    mine = FastTokenizer(max_vocab=640, byte_level=True).fit(golden["train"])
    assert mine.bpe is not None and released.bpe is not None
    assert mine.min_token == released.min_token == -193
    assert json.loads(mine.bpe.to_str())["model"] == json.loads(released.bpe.to_str())["model"]
    np.testing.assert_array_equal(mine.encode(golden["chunks"]), golden["ids"])


def test_fit_over_coefficients_needs_fewer_tokens_and_is_deterministic(
    fitted: FastTokenizer, released: FastTokenizer, golden: dict[str, np.ndarray]
) -> None:
    ours, theirs = ((tokenizer.encode(golden["train"]) != PAD).sum() for tokenizer in (fitted, released))
    assert ours < theirs < golden["train"].size
    again = FastTokenizer(max_vocab=640).fit(golden["train"])
    assert again.bpe is not None and fitted.bpe is not None and again.bpe.to_str() == fitted.bpe.to_str()


def test_transform_is_orthonormal() -> None:
    for horizon in (1, 2, 7, 50):
        np.testing.assert_allclose(transform(horizon) @ transform(horizon).T, np.eye(horizon), atol=1e-13)
    assert transform(4)[0].tolist() == [0.5] * 4
    assert transform(2)[1] == pytest.approx([np.cos(np.pi / 4), -np.cos(np.pi / 4)])


def test_round_trip_is_within_the_bound_and_idempotent(fitted: FastTokenizer, golden: dict[str, np.ndarray]) -> None:
    for dtype in (np.float32, np.float64):
        chunks = golden["train"].astype(dtype)
        symbols = fitted.encode(chunks)
        actions, ok = fitted.decode(symbols, H, D)
        assert ok.all() and np.abs(actions - chunks).max() <= fitted.bound(H) + 1e-6
        np.testing.assert_array_equal(fitted.encode(actions), symbols)


def test_order_and_padding_of_a_batch_change_nothing(fitted: FastTokenizer, golden: dict[str, np.ndarray]) -> None:
    chunks = golden["train"][:40]
    symbols, order = fitted.encode(chunks), np.random.default_rng(0).permutation(40)
    shuffled = fitted.encode(chunks[order])
    np.testing.assert_array_equal(shuffled, symbols[order])
    for i in range(5):
        alone = fitted.encode(chunks[i : i + 1])[0]
        np.testing.assert_array_equal(alone, symbols[i][symbols[i] != PAD])
    wider = np.pad(symbols, ((0, 0), (0, 5)), constant_values=PAD)
    np.testing.assert_array_equal(fitted.decode(wider, H, D)[0], fitted.decode(symbols, H, D)[0])


@pytest.mark.parametrize("name", ["released", "fitted"])
@pytest.mark.parametrize(("horizon", "dim"), [(10, 7), (1, 1), (3, 2)])
def test_every_legal_row_decodes(name: str, horizon: int, dim: int, request: pytest.FixtureRequest) -> None:
    tokenizer = request.getfixturevalue(name)
    rows = random_rows(tokenizer, 60, horizon, dim)
    actions, ok = tokenizer.decode(rows, horizon, dim)
    assert ok.all() and np.isfinite(actions).all()
    for row in rows[:20]:  # no row may stop early, nor go on
        length = int((row != PAD).sum())
        assert not tokenizer.decode(row[None, : length - 1], horizon, dim)[1].any()


def test_encoded_rows_are_legal(released: FastTokenizer, golden: dict[str, np.ndarray]) -> None:
    grammar = released.grammar(H, D)
    for row in golden["ids"][:50]:
        state = grammar.start
        for symbol in row[row != PAD].tolist():
            assert symbol in grammar.legal(state)
            state = grammar.advance(state, symbol)
        assert not grammar.legal(state).size
    longest = int(grammar.table.n_characters[0].argmax())
    with pytest.raises(ValueError, match="may not stand there"):  # one character left, and a token of several
        grammar.advance(grammar.table.n_beginnings, longest)


def test_undecodable_rows_are_nan_and_not_ok(released: FastTokenizer, golden: dict[str, np.ndarray]) -> None:
    good = golden["ids"][0][golden["ids"][0] != PAD].tolist()
    assert released.bpe is not None
    lead = released.bpe.token_to_id(byte_characters()[0xC3])  # begins a character of two bytes
    continuation = released.bpe.token_to_id(byte_characters()[0x80])
    rows = [
        good,
        good[:-1],
        [*good, good[0]],
        [],
        [*good[:-1], lead],
        [continuation, *good],
        [*good[:-1], 640],
        [-2, *good],
    ]
    actions, ok = released.decode(padded(rows), H, D)
    assert ok.tolist() == [True] + [False] * 7
    assert np.isnan(actions[1:]).all() and np.isfinite(actions[0]).all()
    hole = np.array([[good[0], PAD, *good[1:]]])
    assert not released.decode(hole, H, D)[1].any()
    assert not released.decode(padded([good]), H, D + 1)[1].any()
    with pytest.raises(ActionDecodeError, match=r"dtype float64; expected integers \(B, T\)"):
        released.decode(np.zeros((1, 3)), H, D)


def test_coefficients_outside_the_alphabet(fitted: FastTokenizer, golden: dict[str, np.ndarray]) -> None:
    chunks = golden["train"][:3].copy()
    chunks[2, :, 4] += 100  # the lowest frequency grows by 100 * sqrt(10) * 10
    assert fitted.n_outside(chunks) == 1 and fitted.n_outside(golden["train"]) == 0
    with pytest.raises(
        ActionEncodeError, match=r"1 coefficients .* the first 31\d\d \(chunk 2, frequency 0, dimension 4\)"
    ):
        fitted.encode(chunks)
    clipping = FastTokenizer(max_vocab=640, clip=True).fit(golden["train"])
    symbols = clipping.encode(chunks)
    np.testing.assert_array_equal(
        symbols[:2][symbols[:2] >= 0], fitted.encode(chunks[:2])[fitted.encode(chunks[:2]) >= 0]
    )
    assert clipping.decode(symbols, H, D)[1].all()


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_bad_chunks_are_refused(fitted: FastTokenizer, bad: float) -> None:
    chunks = np.zeros((2, H, D))
    chunks[1, 3, 2] = bad
    with pytest.raises(ActionEncodeError, match=r"1 action values .* first at index \(1, 3, 2\)"):
        fitted.encode(chunks)
    with pytest.raises(ActionEncodeError, match=r"expected \(B, H, D\)"):
        fitted.encode(np.zeros((H, D)))
    with pytest.raises(ActionEncodeError, match="dtype complex128"):
        fitted.encode(np.zeros((1, H, D), complex))
    assert fitted.encode(np.zeros((0, H, D))).shape == (0, 0)


def test_fit_refuses_what_it_cannot_learn() -> None:
    with pytest.raises(VlaError, match=r"different coefficients, from .* at most max_vocab = 8"):
        FastTokenizer(max_vocab=8).fit(np.random.default_rng(0).uniform(-1, 1, (9, 4, 2)))
    with pytest.raises(VlaError, match="at least one chunk"):
        FastTokenizer().fit(np.zeros((0, 4, 2)))
    with pytest.raises(VlaError, match="was not fitted"):
        FastTokenizer().encode(np.zeros((1, 4, 2)))
    with pytest.raises(VlaError, match="a scale above 0"):
        FastTokenizer(scale=0.0)


def test_save_and_load(
    fitted: FastTokenizer, released: FastTokenizer, golden: dict[str, np.ndarray], tmp_path: Path
) -> None:
    for i, tokenizer in enumerate((fitted, released)):
        folder = tmp_path / str(i)
        folder.mkdir()
        tokenizer.save(folder)
        assert sorted(path.name for path in folder.iterdir()) == ["scheme.json", "tokenizer.json"]
        loaded = load_tokenizer(folder)
        assert isinstance(loaded, FastTokenizer) and loaded.vocab_size == tokenizer.vocab_size
        np.testing.assert_array_equal(loaded.encode(golden["train"][:9]), tokenizer.encode(golden["train"][:9]))
    scheme = json.loads((tmp_path / "0" / "scheme.json").read_text())
    del scheme["min_token"]
    (tmp_path / "0" / "scheme.json").write_text(json.dumps(scheme))
    with pytest.raises(VlaError, match=r"scheme.json: min_token = None"):
        load_tokenizer(tmp_path / "0")
    (tmp_path / "1" / "tokenizer.json").write_text("{")
    with pytest.raises(VlaError, match=r"tokenizer.json: .*expected a tokenizer.json of HF tokenizers"):
        load_tokenizer(tmp_path / "1")
    (tmp_path / "1" / "tokenizer.json").write_text((tmp_path / "0" / "tokenizer.json").read_text())
    with pytest.raises(VlaError, match="not the BPE of FAST"):  # over characters, where scheme.json says bytes
        load_tokenizer(tmp_path / "1")


def test_processor_folders(tmp_path: Path) -> None:
    with pytest.raises(VlaError, match="no processor_config.json"):
        FastTokenizer.from_processor(tmp_path)
    (tmp_path / "bpe_tokenizer").mkdir()  # where newer transformers put it
    shutil.copy(GOLDEN / "processor" / "tokenizer.json", tmp_path / "bpe_tokenizer")
    config = json.loads((GOLDEN / "processor" / "processor_config.json").read_text())
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(config))
    assert FastTokenizer.from_processor(tmp_path, clip=True).vocab_size == 640
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({**config, "scale": None}))
    with pytest.raises(VlaError, match="scale = None; expected a number"):
        FastTokenizer.from_processor(tmp_path)
