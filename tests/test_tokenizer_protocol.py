"""What `vla.tokenizers.protocol` promises, for every scheme; and the codec between a scheme and a model's ids."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from toy_scheme import WHERE, ToyTokenizer

from vla.tokenizers.chunk_codec import ActionCodec
from vla.tokenizers.fast import FastTokenizer
from vla.tokenizers.fsq import FsqTokenizer
from vla.tokenizers.grammar import FixedGrammar, IdGrammar, free_grammar
from vla.tokenizers.integer_text import IntegerTextTokenizer
from vla.tokenizers.keyboard_mouse import DIM, KeyboardMouseTokenizer
from vla.tokenizers.placement import Placement
from vla.tokenizers.protocol import PAD, ActionEncodeError, ActionTokenizer
from vla.tokenizers.quantile import QuantileTokenizer
from vla.tokenizers.schemes import SCHEMES, load_tokenizer, scheme_class, scheme_of
from vla.tokenizers.uniform import UniformTokenizer
from vla.tokenizers.vq import VqTokenizer
from vla.types import ActionDecodeError, VlaError

H, D = 6, 3


def smooth(n: int, horizon: int = H, dim: int = D, seed: int = 0) -> np.ndarray:
    """Trajectories such as a robot's: a slow wave per dimension and a gripper that opens or closes once."""
    rng = np.random.default_rng(seed)
    phase, speed, size = (
        rng.uniform(0, 7, (n, 1, dim)),
        rng.uniform(0.1, 0.5, (n, 1, dim)),
        rng.uniform(0, 1, (n, 1, dim)),
    )
    chunks = size * np.sin(phase + speed * np.arange(horizon)[None, :, None])
    chunks[..., -1] = np.where(np.arange(horizon) < rng.integers(0, horizon + 1, (n, 1)), -1, 1)
    return chunks.astype(np.float32)


def keyboard(n: int) -> np.ndarray:
    """Chunks that the keyboard can type: whatever its own grammar allows, decoded."""
    tokenizer = KeyboardMouseTokenizer()
    rows = random_rows(tokenizer, 2, DIM, n, 1)
    return tokenizer.decode(rows, 2, DIM)[0]


def random_rows(tokenizer: ActionTokenizer, horizon: int, dim: int, n: int, seed: int) -> np.ndarray:
    rng, grammar, rows = np.random.default_rng(seed), tokenizer.grammar(horizon, dim), []
    for _ in range(n):
        row, state = [], grammar.start
        while len(legal := grammar.legal(state)):
            assert (np.diff(legal) > 0).all() and 0 <= legal[0] and legal[-1] < tokenizer.vocab_size
            row.append(int(rng.choice(legal)))
            state = grammar.advance(state, row[-1])
        assert len(row) <= grammar.max_tokens
        rows.append(row)
    width = max(map(len, rows))
    return np.array([row + [PAD] * (width - len(row)) for row in rows])


MAKE: dict[str, Callable[[], Any]] = {
    "uniform": lambda: UniformTokenizer(),
    "uniform edges": lambda: UniformTokenizer(33, mode="edges"),
    "quantile": lambda: QuantileTokenizer(64).fit(smooth(400)),
    "fast": lambda: FastTokenizer(max_vocab=300).fit(smooth(400)),
    "fast byte level": lambda: FastTokenizer(max_vocab=300, byte_level=True).fit(smooth(400)),
    "vq": lambda: VqTokenizer(codebooks=3, codes=16, latents=8, hidden=32, steps=60).fit(smooth(400)),
    "fsq": lambda: FsqTokenizer(levels=(5, 5), tokens=4, hidden=32, steps=60).fit(smooth(400)),
    "integer_text": lambda: IntegerTextTokenizer(),
    "keyboard_mouse": lambda: KeyboardMouseTokenizer(),
    "toy": lambda: ToyTokenizer(),
}
LEARNED = ("vq", "fsq")
every = pytest.mark.parametrize("name", MAKE)
_made: dict[str, Any] = {}


def scheme(name: str) -> Any:
    if name not in _made:
        _made[name] = MAKE[name]()
    return _made[name]


def sample(name: str, n: int = 60) -> np.ndarray:
    return keyboard(n) if name == "keyboard_mouse" else smooth(400)[:n]


@pytest.fixture(autouse=True)
def toy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SCHEMES, "toy", WHERE)


def test_every_scheme_is_tested() -> None:
    assert set(SCHEMES) == {name.split()[0] for name in MAKE}


def bound_of(tokenizer: Any, chunks: np.ndarray) -> np.ndarray | float:
    """The error a scheme states."""
    if isinstance(tokenizer, FastTokenizer):
        return tokenizer.bound(chunks.shape[1])
    return tokenizer.max_error if isinstance(tokenizer, (VqTokenizer, FsqTokenizer)) else tokenizer.bound


@every
def test_round_trip_is_within_the_stated_bound(name: str) -> None:
    tokenizer, chunks = scheme(name), sample(name)
    symbols = tokenizer.encode(chunks)
    assert symbols.dtype == np.int64 and symbols.ndim == 2 and symbols.max() < tokenizer.vocab_size
    actions, ok = tokenizer.decode(symbols, *chunks.shape[1:])
    assert ok.all() and ok.dtype == bool and actions.dtype == np.float32 and actions.shape == chunks.shape
    assert (np.abs(actions.astype(np.float64) - chunks) <= bound_of(tokenizer, chunks) + 1e-6).all()


@every
def test_encoding_what_was_decoded_changes_nothing(name: str) -> None:
    tokenizer, chunks = scheme(name), sample(name)
    shape = chunks.shape[1:]
    decoded, _ = tokenizer.decode(tokenizer.encode(chunks), *shape)
    again, ok = tokenizer.decode(tokenizer.encode(decoded), *shape)
    assert ok.all()
    np.testing.assert_array_equal(again, decoded)
    np.testing.assert_array_equal(tokenizer.encode(again), tokenizer.encode(decoded))
    if name in LEARNED:  # symbols too, also of chunks unlike those they were fitted to
        for values in (chunks, np.random.default_rng(0).uniform(-3, 3, chunks.shape).astype(np.float32)):
            symbols = tokenizer.encode(values)
            np.testing.assert_array_equal(tokenizer.encode(tokenizer.decode(symbols, *shape)[0]), symbols)


@every
def test_order_and_padding_of_a_batch_change_nothing(name: str) -> None:
    tokenizer, chunks = scheme(name), sample(name)
    shape = chunks.shape[1:]
    symbols = tokenizer.encode(chunks)
    actions, _ = tokenizer.decode(symbols, *shape)
    order = np.random.default_rng(5).permutation(len(chunks))
    np.testing.assert_array_equal(tokenizer.encode(chunks[order]), symbols[order])
    for i in range(0, len(chunks), 7):
        alone = tokenizer.encode(chunks[i : i + 1])
        row = symbols[i][symbols[i] != PAD]
        assert alone[0].tolist() == row.tolist()
        np.testing.assert_array_equal(tokenizer.decode(alone, *shape)[0][0], actions[i])
    wider = np.pad(symbols, ((0, 0), (0, 3)), constant_values=PAD)
    np.testing.assert_array_equal(tokenizer.decode(wider, *shape)[0], actions)
    assert tokenizer.decode(wider, *shape)[1].all()
    empty = tokenizer.encode(chunks[:0])
    assert len(empty) == 0 and tokenizer.decode(empty, *shape)[0].shape == (0, *shape)


@every
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_nan_and_infinity_are_refused(name: str, bad: float) -> None:
    chunks = sample(name, 4).copy()
    chunks[2, 1, 0] = bad
    with pytest.raises(ActionEncodeError, match=r"NaN or infinite, the first at index \(2, 1, 0\)"):
        scheme(name).encode(chunks)
    with pytest.raises(ActionEncodeError, match="shape"):
        scheme(name).encode(chunks[0])


@every
def test_save_and_load_are_equal(name: str, tmp_path: Path) -> None:
    tokenizer, chunks = scheme(name), sample(name)
    tokenizer.save(tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert type(loaded) is type(tokenizer) and loaded.vocab_size == tokenizer.vocab_size
    assert scheme_of(loaded) == name.split()[0]
    symbols = tokenizer.encode(chunks)
    np.testing.assert_array_equal(loaded.encode(chunks), symbols)
    for mine, theirs in zip(
        loaded.decode(symbols, *chunks.shape[1:]), tokenizer.decode(symbols, *chunks.shape[1:]), strict=True
    ):
        np.testing.assert_array_equal(mine, theirs)
    assert loaded.grammar(*chunks.shape[1:]).max_tokens == tokenizer.grammar(*chunks.shape[1:]).max_tokens


@every
def test_every_row_the_grammar_allows_decodes(name: str) -> None:
    tokenizer, shape = scheme(name), sample(name, 1).shape[1:]
    rows = random_rows(tokenizer, *shape, n=300, seed=3)
    actions, ok = tokenizer.decode(rows, *shape)
    assert ok.all() and np.isfinite(actions).all() and actions.shape == (300, *shape)


@every
def test_the_grammar_allows_every_encoded_row_and_nothing_shorter(name: str) -> None:
    tokenizer, chunks = scheme(name), sample(name)
    grammar = tokenizer.grammar(*chunks.shape[1:])
    symbols = tokenizer.encode(chunks)
    for row in symbols:
        state = grammar.start
        for symbol in row[row != PAD]:
            assert symbol in grammar.legal(state)
            state = grammar.advance(state, int(symbol))
        assert not len(grammar.legal(state))
    short = symbols.copy()
    short[np.arange(len(short)), (short != PAD).sum(1) - 1] = PAD
    actions, ok = tokenizer.decode(short, *chunks.shape[1:])
    assert not ok.any() and np.isnan(actions).all()


@every
def test_symbols_that_do_not_exist_spoil_their_row_only(name: str) -> None:
    tokenizer, chunks = scheme(name), sample(name, 5)
    symbols = tokenizer.encode(chunks)
    symbols[1, 0], symbols[3, 0] = tokenizer.vocab_size, -2
    actions, ok = tokenizer.decode(symbols, *chunks.shape[1:])
    assert ok.tolist() == [True, False, True, False, True] and np.isnan(actions[[1, 3]]).all()


# ------------------------------------------------------------------------------------------------------ ids of a model


def codec_of(name: str) -> ActionCodec:
    tokenizer, shape = scheme(name), sample(name, 1).shape[1:]
    n = tokenizer.vocab_size
    return ActionCodec(tokenizer, Placement.tail(n + 200, n, model_vocab_size=n + 264, skip=128), *shape)


@every
def test_the_codec_is_the_scheme_in_other_ids(name: str) -> None:
    codec, chunks = codec_of(name), sample(name)
    ids = codec.encode(chunks)
    symbols = codec.tokenizer.encode(chunks)
    assert ids.dtype == np.int64 and ((ids == -1) == (symbols == PAD)).all()
    np.testing.assert_array_equal(ids[symbols != PAD], codec.placement.encode(symbols[symbols != PAD]))
    mine, theirs = codec.decode(ids), codec.tokenizer.decode(symbols, codec.horizon, codec.dim)
    np.testing.assert_array_equal(mine[0], theirs[0])
    assert mine[1].all() and ids.shape[1] <= codec.max_tokens


@every
def test_the_codec_refuses_ids_that_mean_nothing(name: str) -> None:
    codec, chunks = codec_of(name), sample(name, 5)
    ids = codec.encode(chunks)
    for row, id_ in ((0, 3), (1, 10**6), (2, -7)):
        ids[row, (ids[row] != -1).sum() - 1] = id_
    if ids.shape[1] > 1:
        ids[3, 0] = -1  # a hole, not an end
    actions, ok = codec.decode(ids)
    assert ok.tolist() == [False, False, False, False, True] and np.isnan(actions[:4]).all()
    with pytest.raises(ActionDecodeError, match="expected integers"):
        codec.decode(ids.astype(float))


@every
def test_masks_of_recorded_rows(name: str) -> None:
    codec, chunks = codec_of(name), sample(name, 8)
    ids = codec.encode(chunks)
    masks = codec.grammar.row_masks(ids)
    assert masks.shape == (*ids.shape, len(codec.legal_ids))
    columns = np.searchsorted(codec.legal_ids, ids)
    for i, t in np.argwhere(ids != -1):
        assert masks[i, t, columns[i, t]]
    assert masks[ids == -1].all()
    if not codec.grammar.free:
        wrong = ids.copy()
        wrong[0, 0] = 5
        with pytest.raises(ValueError, match="row 0: id 5 at place 0"):
            codec.grammar.row_masks(wrong)


def test_which_tokens_stand_for_which_actions() -> None:
    steps = np.array([[True, True, False, False, False, False], [True] * 6, [False] * 6])
    ids = codec_of("quantile").encode(smooth(3))
    mask = codec_of("quantile").token_mask(ids, steps)
    assert codec_of("quantile").per_dimension and mask.sum(1).tolist() == [2 * D, 6 * D, 0] and mask[0, : 2 * D].all()
    toy = codec_of("toy")
    ids = toy.encode(np.stack([np.zeros((H, D)), smooth(1)[0], smooth(1)[0]]))
    assert not toy.per_dimension and (ids[0] != -1).sum() == 2
    assert toy.token_mask(ids, steps).sum(1).tolist() == [2, (ids[1] != -1).sum(), 0]


def test_fixed_and_free_grammars() -> None:
    grammar = IdGrammar(FixedGrammar(2, 4), Placement.reserved([9, 3, 5, 7], model_vocab_size=10))
    assert grammar.free and grammar.ids.tolist() == [3, 5, 7, 9] and not grammar.per_dimension
    assert grammar.mask(0).all() and grammar.complete(grammar.advance(grammar.advance(grammar.start, 2), 0))
    assert free_grammar([9, 3, 5, 7], 2).ids.tolist() == [3, 5, 7, 9]
    with pytest.raises(VlaError, match="0 tokens of 4 symbols"):
        FixedGrammar(0, 4)


def test_unknown_schemes_and_classes_are_named() -> None:
    with pytest.raises(VlaError, match="scheme 'fsat'; expected one of uniform, quantile, .*did you mean 'fast'"):
        scheme_class("fsat")
    with pytest.raises(VlaError, match=r"action tokenizer builtins:int; expected one of .*add it to SCHEMES"):
        scheme_of(3)  # pyright: ignore[reportArgumentType]
