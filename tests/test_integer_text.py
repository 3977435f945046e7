"""Actions as text beside VLA-0's.

`golden/integer_text.json`: 40 chunks (8, 7), the texts that VLA-0's `get_text_action` wrote for them with
num_bins_actions=1000 and statistics -1 and 1, and what its `get_action_from_text_action` read from those texts. Chunk 3
lies half-way between integers.
"""

import json
from pathlib import Path

import numpy as np
import pytest

from vla.tokenizers.integer_text import CHARACTERS, IntegerTextTokenizer, character_ids
from vla.tokenizers.protocol import PAD, ActionEncodeError
from vla.tokenizers.rows import padded
from vla.tokenizers.schemes import load_tokenizer
from vla.types import VlaError

TOKENIZER = IntegerTextTokenizer()
H, D = 8, 7


@pytest.fixture(scope="module")
def golden() -> tuple[np.ndarray, list[str], np.ndarray]:
    data = json.loads((Path(__file__).parent / "golden" / "integer_text.json").read_text())
    read = (np.frombuffer(bytes.fromhex(data[f"{name}_float32_hex"]), "<f4") for name in ("chunks", "values"))
    chunks, values = (array.reshape(-1, H, D) for array in read)
    return chunks, data["texts"], values


def symbols_of(text: str) -> list[int]:
    return [CHARACTERS.index(character) for character in text]


def test_texts_and_values_equal_vla_0s(golden: tuple[np.ndarray, list[str], np.ndarray]) -> None:
    chunks, texts, values = golden
    assert TOKENIZER.text(chunks) == texts
    parsed, ok, errors = TOKENIZER.parse(texts, H, D)
    assert ok.all() and errors == [None] * len(texts) and parsed.dtype == np.float32
    np.testing.assert_array_equal(parsed, values)
    rows = TOKENIZER.encode(chunks)
    assert ["".join(CHARACTERS[s] for s in row if s != PAD) for row in rows] == [text + "\n" for text in texts]
    np.testing.assert_array_equal(TOKENIZER.decode(rows, H, D)[0], values)


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("1 2 3", "3 numbers, not 2 x 2 = 4"),
        ("1 2 3 4 5", "5 numbers, not 2 x 2 = 4"),
        ("", "number 1 is '', not an integer"),
        ("1 2  3 4", "number 3 is '', not an integer"),
        ("1 2 3.5 4", "number 3 is '3.5', not an integer"),
        ("1 -2 3 4", "number 2 is '-2', not an integer"),
        ("1 2 3 04", "number 4 is '04', not an integer"),
        ("1 2 3 ٤", "number 4 is '٤', not an integer"),
        ("move left", "number 1 is 'move', not an integer"),
        ("1 2 1001 4", "number 3 is 1001, above 1000"),
        ("1 2 3 " + "9" * 40, "number 4 is 9{40}, above 1000"),
    ],
)
def test_parse_errors_are_reported(text: str, error: str) -> None:
    actions, ok, errors = TOKENIZER.parse(["0 500 1000 1", text], 2, 2)
    assert ok.tolist() == [True, False] and errors[0] is None
    assert errors[1] == error.replace("9{40}", "9" * 40)
    assert np.isnan(actions[1]).all() and actions[0].ravel()[:3].tolist() == [-1, 0, 1]


def test_space_around_a_text_is_left_out() -> None:
    assert TOKENIZER.parse([" 1 2\n"], 1, 2)[1].all()


def test_round_trip_is_within_the_bound_and_idempotent() -> None:
    for dtype in (np.float32, np.float64):
        chunks = np.random.default_rng(0).uniform(-1, 1, (500, 3, 4)).astype(dtype)
        symbols = TOKENIZER.encode(chunks)
        actions, ok = TOKENIZER.decode(symbols, 3, 4)
        assert ok.all() and np.abs(actions - chunks).max() <= TOKENIZER.bound + 1e-6
        np.testing.assert_array_equal(TOKENIZER.encode(actions), symbols)
    every = np.linspace(-1, 1, 1001, dtype=np.float32).reshape(-1, 1, 1)
    assert TOKENIZER.text(every) == [str(i) for i in range(1001)]
    assert TOKENIZER.text(np.array([[[-9.0, 9.0]]])) == ["0 1000"]


def test_order_and_padding_of_a_batch_change_nothing(golden: tuple[np.ndarray, list[str], np.ndarray]) -> None:
    symbols, order = TOKENIZER.encode(golden[0]), np.random.default_rng(1).permutation(40)
    np.testing.assert_array_equal(TOKENIZER.encode(golden[0][order]), symbols[order])
    wider = np.pad(symbols, ((0, 0), (0, 4)), constant_values=PAD)
    np.testing.assert_array_equal(TOKENIZER.decode(wider, H, D)[0], TOKENIZER.decode(symbols, H, D)[0])


@pytest.mark.parametrize("highest", [1000, 1, 9, 255, 1024])
def test_every_legal_row_decodes_and_is_what_encode_writes(highest: int) -> None:
    tokenizer, rng, rows = IntegerTextTokenizer(highest), np.random.default_rng(0), []
    grammar = tokenizer.grammar(2, 3)
    for _ in range(150):
        state, row = grammar.start, []
        while (legal := grammar.legal(state)).size:
            assert (np.diff(legal) > 0).all()
            row.append(int(rng.choice(legal)))
            state = grammar.advance(state, row[-1])
        assert len(row) <= grammar.max_tokens
        rows.append(row)
    actions, ok = tokenizer.decode(padded(rows), 2, 3)
    assert ok.all()
    np.testing.assert_array_equal(tokenizer.encode(actions), padded(rows))


def test_undecodable_rows_are_nan_and_not_ok() -> None:
    texts = ["5 6\n", "5 6", "5 6 \n", "5\n6\n", "5 6\n\n", "05 6\n", "5 1001\n", "\n", ""]
    actions, ok = TOKENIZER.decode(padded([symbols_of(text) for text in texts] + [[12, 11]]), 1, 2)
    assert ok.tolist() == [True] + [False] * 9 and np.isnan(actions[1:]).all()


def test_bad_input_is_refused() -> None:
    with pytest.raises(ActionEncodeError, match="NaN or infinite"):
        TOKENIZER.encode(np.full((1, 2, 3), np.nan))
    with pytest.raises(ActionEncodeError, match=r"expected \(B, H, D\)"):
        TOKENIZER.fit(np.zeros(3))
    with pytest.raises(VlaError, match="highest=0"):
        IntegerTextTokenizer(0)


def test_character_ids() -> None:
    digits = {digit: 100 + i for i, digit in enumerate("0123456789")}
    for space, newline in (("\u2581", "<0x0A>"), ("\u2581", "\n"), ("\u0120", "\u010a"), (" ", "\n")):
        vocabulary = {"12": 5, newline: 111, **digits, space: 110, "the": 6}
        assert character_ids(vocabulary) == list(range(100, 112)) and len(CHARACTERS) == 12
    del digits["3"]
    with pytest.raises(VlaError, match=r"no single token for '3', ' ', '\\n'; expected .*another action-token scheme"):
        character_ids(digits)


def test_save_and_load(tmp_path: Path) -> None:
    IntegerTextTokenizer(255).save(tmp_path)
    assert load_tokenizer(tmp_path) == IntegerTextTokenizer(255)
    assert TOKENIZER.vocab_size == 12 and TOKENIZER.grammar(1, 1).max_tokens == 5
