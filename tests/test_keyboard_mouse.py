"""Keyboard and mouse tokens beside JARVIS-VLA's.

`golden/keyboard_mouse.json`: 300 random VPT actions (20 buttons, pitch and yaw in degrees), the ids that JARVIS-VLA's
`OneActionTokenizer(tokenizer_type="qwen2_vl")` wrote for them, with MineStudio's `vpt_lib`, and what its `decode`, VPT's
`to_factored` and `undiscretize_camera` made of those ids.
"""

import json
from pathlib import Path

import numpy as np
import pytest

from vla.tokenizers.chunk_codec import ActionCodec
from vla.tokenizers.keyboard_mouse import (
    BUTTONS,
    DIM,
    GROUPS,
    QWEN2_VL_IDS,
    KeyboardMouseTokenizer,
    buttons_of_groups,
    camera_bins,
    camera_degrees,
    groups_of_buttons,
)
from vla.tokenizers.placement import Placement
from vla.tokenizers.protocol import PAD, ActionEncodeError
from vla.tokenizers.rows import padded
from vla.tokenizers.schemes import load_tokenizer
from vla.types import ActionDecodeError

PUBLISHED = KeyboardMouseTokenizer(inventory=False)
TOKENIZER = KeyboardMouseTokenizer()
INVENTORY = list(GROUPS).index("inventory")


@pytest.fixture(scope="module")
def golden() -> dict[str, list]:
    return json.loads((Path(__file__).parent / "golden" / "keyboard_mouse.json").read_text())


@pytest.fixture(scope="module")
def actions(golden: dict[str, list]) -> np.ndarray:
    return np.concatenate([groups_of_buttons(np.array(golden["buttons"])), golden["camera"]], axis=1)


def random_rows(tokenizer: KeyboardMouseTokenizer, n: int, horizon: int) -> np.ndarray:
    rng, grammar, rows = np.random.default_rng(0), tokenizer.grammar(horizon), []
    for _ in range(n):
        state, row = grammar.start, []
        while (legal := grammar.legal(state)).size:
            assert (np.diff(legal) > 0).all()
            row.append(int(rng.choice(legal)))
            state = grammar.advance(state, row[-1])
        assert len(row) <= grammar.max_tokens
        rows.append(row)
    return padded(rows)


def test_ids_equal_the_published_ones(golden: dict[str, list], actions: np.ndarray) -> None:
    codec = ActionCodec(PUBLISHED, Placement.reserved(QWEN2_VL_IDS, model_vocab_size=151936), horizon=1, dim=DIM)
    ids = codec.encode(actions[:, None])
    assert [row[row >= 0].tolist() for row in ids] == golden["ids"]


def test_decoded_actions_equal_the_published_ones(golden: dict[str, list]) -> None:
    decoded, ok = PUBLISHED.decode(
        padded(golden["ids"]) - np.where(padded(golden["ids"]) == PAD, 0, QWEN2_VL_IDS[0]), 1
    )
    assert ok.all() and decoded.dtype == np.float32
    np.testing.assert_array_equal(buttons_of_groups(decoded[:, 0, :-2]), golden["decoded_buttons"])
    np.testing.assert_allclose(decoded[:, 0, -2:], golden["decoded_camera"], rtol=1e-6)


def test_every_camera_bin_is_its_own_inverse() -> None:
    assert camera_bins(camera_degrees(np.arange(21))).tolist() == list(range(21))
    assert camera_bins(np.array([-11, -10, 0, 10, 99])).tolist() == [0, 0, 10, 20, 20]
    # by hand: log(1 + 20 * 0.1) / log(21) = 0.3608, ten times that and 10 is 13.6
    assert camera_bins(np.array([1.0]))[0] == 14
    # by hand: (21 ** 0.5 - 1) / 20 * 10 degrees
    assert camera_degrees(np.array([15]))[0] == pytest.approx((21**0.5 - 1) / 2)


def test_buttons_and_groups() -> None:
    held = np.zeros((5, 20), int)
    for row, names in enumerate(
        (["forward", "back"], ["sprint", "sneak"], ["hotbar.2", "hotbar.9"], ["left", "use"], [])
    ):
        held[row, [BUTTONS.index(name) for name in names]] = 1
    groups = groups_of_buttons(held)
    named = [{name: int(c) for name, c in zip(GROUPS, row, strict=True) if c} for row in groups]
    assert named == [{}, {"sprint_sneak": 2}, {"hotbar": 9}, {"left_right": 1, "use": 1}, {}]
    np.testing.assert_array_equal(groups_of_buttons(buttons_of_groups(groups)), groups)


def test_the_inventory_is_kept_unless_the_published_rows_are_asked_for(actions: np.ndarray) -> None:
    opened = actions[:, INVENTORY] == 1
    assert 3 < opened.sum() < 60
    decoded, ok = TOKENIZER.decode(TOKENIZER.encode(actions[:, None]), 1)
    assert ok.all()
    np.testing.assert_array_equal(decoded[:, 0, INVENTORY], opened)
    assert (np.delete(decoded[opened, 0], INVENTORY, axis=1) == 0).all()
    assert (PUBLISHED.decode(PUBLISHED.encode(actions[opened, None]), 1)[0] == 0).all()


def test_round_trip_is_within_the_bound_and_idempotent(actions: np.ndarray) -> None:
    chunks = actions.reshape(60, 5, DIM)
    for dtype in (np.float32, np.float64):
        symbols = TOKENIZER.encode(chunks.astype(dtype))
        decoded, ok = TOKENIZER.decode(symbols, 5)
        kept = chunks[..., INVENTORY] == 0
        error = np.abs(decoded - np.clip(chunks, -10, 10))[kept]
        assert ok.all() and (error.max(axis=0) <= TOKENIZER.bound + 1e-6).all()
        np.testing.assert_array_equal(TOKENIZER.encode(decoded), symbols)


def test_order_and_padding_of_a_batch_change_nothing(actions: np.ndarray) -> None:
    chunks = actions.reshape(60, 5, DIM)
    symbols, order = TOKENIZER.encode(chunks), np.random.default_rng(1).permutation(60)
    np.testing.assert_array_equal(TOKENIZER.encode(chunks[order]), symbols[order])
    alone = TOKENIZER.encode(chunks[3:4])[0]
    np.testing.assert_array_equal(alone, symbols[3][symbols[3] != PAD])
    wider = np.pad(symbols, ((0, 0), (0, 4)), constant_values=PAD)
    np.testing.assert_array_equal(TOKENIZER.decode(wider, 5)[0], TOKENIZER.decode(symbols, 5)[0])


@pytest.mark.parametrize("tokenizer", [TOKENIZER, PUBLISHED])
@pytest.mark.parametrize("horizon", [1, 4])
def test_every_legal_row_decodes_and_is_what_encode_writes(tokenizer: KeyboardMouseTokenizer, horizon: int) -> None:
    rows = random_rows(tokenizer, 200, horizon)
    decoded, ok = tokenizer.decode(rows, horizon)
    assert ok.all()
    np.testing.assert_array_equal(tokenizer.encode(decoded), rows)


def test_undecodable_rows_are_nan_and_not_ok(actions: np.ndarray) -> None:
    chunk = np.zeros((1, 1, DIM))
    chunk[0, 0, :3] = 2
    good = TOKENIZER.encode(chunk)[0].tolist()
    begin, hotbar, fore, left, pitch, yaw, end = good
    rows = [good, good[:-1], [*good, *good], [begin, fore, hotbar, left, pitch, yaw, end], [begin, hotbar, hotbar, pitch, yaw, end],
            [begin, hotbar, yaw, end], [begin, 1, hotbar, pitch, yaw, end], [begin, 75, pitch, yaw, end], [], good[1:]]  # fmt: skip
    decoded, ok = TOKENIZER.decode(padded(rows), 1)
    assert ok.tolist() == [True] + [False] * 9 and np.isnan(decoded[1:]).all()


def test_bad_actions_are_refused() -> None:
    chunk = np.zeros((2, 3, DIM))
    chunk[1, 2, 1] = 0.5
    with pytest.raises(ActionEncodeError, match=r"0.5 for fore_back \(chunk 1, step 2\); expected 0 \.\. 2"):
        TOKENIZER.encode(chunk)
    chunk[1, 2, 1] = np.nan
    with pytest.raises(ActionEncodeError, match="NaN or infinite"):
        TOKENIZER.fit(chunk)
    with pytest.raises(ActionEncodeError, match=r"expected \(B, H, 11\)"):
        TOKENIZER.encode(np.zeros((2, 3, 7)))
    with pytest.raises(ActionDecodeError, match="got dim 7; expected 11"):
        TOKENIZER.grammar(1, 7)


def test_save_and_load(tmp_path: Path) -> None:
    for tokenizer in (TOKENIZER, PUBLISHED):
        tokenizer.save(tmp_path)
        assert load_tokenizer(tmp_path) == tokenizer
    assert TOKENIZER.vocab_size == 75 and TOKENIZER.grammar(4).max_tokens == 48
