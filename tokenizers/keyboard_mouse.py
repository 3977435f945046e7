"""Keyboard and mouse: the Minecraft actions of VPT, as JARVIS-VLA writes them with Qwen2-VL's reserved tokens.

VPT (arXiv 2206.11795, `lib/actions.py`, `lib/action_mapping.py`) sorts 20 buttons into groups of which one button can be
held, and quantises the camera by mu-law: x in [-10, 10] degrees becomes
round(10 + 10 sign(x) log(1 + mu |x| / 10) / log(1 + mu)), 21 bins. JARVIS-VLA (arXiv 2503.16365,
`jarvisvla/inference/action_mapping.py`, mu = 20) has 12 groups, one token for each choice in each group, and writes an
action as

    begin  [hotbar] [forward/back] [left/right] [sprint/sneak] [use] [drop] [attack] [jump]  pitch  yaw  end

where a group of which nothing is held is left out. The twelve groups are the eight, inventory, pitch, yaw and a camera
flag, which follows from pitch and yaw and is never written. Actions of a chunk follow one another.

Numbers of an action (D = 11): the choice in each of `GROUPS` (0: none; hotbar 1 .. 9, the others in the order of their
names), then pitch and yaw in degrees. They are no normalised numbers: the dataset's statistics must leave them alone (mask
all dimensions out). `groups_of_buttons` and `buttons_of_groups` translate VPT's 20 buttons.

Opening the inventory excludes everything else, as in VPT: the other groups and the camera are not kept. The published
encoder leaves the inventory token out, so that the action is lost, though its decoder reads it. Here it stands after
`begin`; `inventory=False` gives the published rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np

from vla.files import write_json
from vla.tokenizers.protocol import ActionEncodeError
from vla.tokenizers.rows import finite_chunks, padded, whole_rows
from vla.tokenizers.schemes import FILE, field_of, read_scheme
from vla.types import ActionDecodeError

GROUPS: dict[str, tuple[str, ...]] = {
    "hotbar": tuple(f"hotbar.{i}" for i in range(1, 10)),
    "fore_back": ("forward", "back"),
    "left_right": ("left", "right"),
    "sprint_sneak": ("sprint", "sneak"),
    "use": ("use",),
    "drop": ("drop",),
    "attack": ("attack",),
    "jump": ("jump",),
    "inventory": ("inventory",),
}
"""Group -> its buttons, of which one at most is held."""
BUTTONS = ("attack", "back", "forward", "jump", "left", "right", "sneak", "sprint", "use", "drop", "inventory",
           *GROUPS["hotbar"])  # fmt: skip
"""VPT's order of the buttons."""
DIM = len(GROUPS) + 2
QWEN2_VL_IDS = range(151833, 151908)
"""Qwen2-VL's ids <|reserved_special_token_176|> .. 250 that JARVIS-VLA uses, by symbol: for `Placement.reserved`."""

N_BINS, MAX_DEGREES, MU = 21, 10.0, 20.0
NULL_BIN = N_BINS // 2

# Symbols in the order of JARVIS-VLA's ids.
_INVENTORY, _BEGIN, _END = 0, 2, 3  # 0, 1: inventory no, yes
_SIZES = np.array([len(buttons) + 1 for buttons in list(GROUPS.values())[:-1]])
_BASES = np.array([4 + size for size in np.concatenate([[0], np.cumsum(_SIZES)[:-1]])])
_PITCH = int(_BASES[-1] + _SIZES[-1]) + 2  # 2: the camera flag
_YAW = _PITCH + N_BINS
_MAX_ROW = 3 + len(_SIZES) + 1


def camera_bins(degrees: np.ndarray) -> np.ndarray:
    """Degrees (...), clipped to [-10, 10] -> int64 bins (...) in 0 .. 20."""
    x = np.clip(degrees, -MAX_DEGREES, MAX_DEGREES) / MAX_DEGREES
    encoded = np.sign(x) * (np.log(1.0 + MU * np.abs(x)) / np.log(1.0 + MU)) * MAX_DEGREES
    return np.round(encoded + MAX_DEGREES).astype(np.int64)


def camera_degrees(bins: np.ndarray) -> np.ndarray:
    """Bins (...) in 0 .. 20 -> float64 degrees (...)."""
    x = (np.asarray(bins) - MAX_DEGREES) / MAX_DEGREES
    return np.sign(x) * (1.0 / MU) * ((1.0 + MU) ** np.abs(x) - 1.0) * MAX_DEGREES


def groups_of_buttons(buttons: np.ndarray) -> np.ndarray:
    """Held buttons 0 or 1 (..., 20), in the order of `BUTTONS` -> float32 choices (..., 9), in the order of `GROUPS`.

    As VPT: forward with back, and left with right, are neither; of other buttons of a group the last one counts."""
    held = np.asarray(buttons) == 1
    choices = np.zeros((*held.shape[:-1], len(GROUPS)), np.float32)
    for g, (name, members) in enumerate(GROUPS.items()):
        for i, button in enumerate(members):
            choices[..., g][held[..., BUTTONS.index(button)]] = i + 1
        if name in ("fore_back", "left_right"):
            choices[..., g][held[..., [BUTTONS.index(button) for button in members]].all(axis=-1)] = 0
    return choices


def buttons_of_groups(choices: np.ndarray) -> np.ndarray:
    """Choices (..., 9) -> int64 held buttons (..., 20)."""
    held = np.zeros((*choices.shape[:-1], len(BUTTONS)), np.int64)
    for g, members in enumerate(GROUPS.values()):
        for i, button in enumerate(members):
            held[..., BUTTONS.index(button)] = choices[..., g] == i + 1
    return held


@dataclass(frozen=True)
class KeyboardMouseTokenizer:
    """Rows of different lengths: 4 to 12 symbols an action."""

    inventory: bool = True
    """Write the inventory token; False is the published encoder, which loses it."""

    @property
    def vocab_size(self) -> int:
        """Begin, end and 73 choices."""
        return len(QWEN2_VL_IDS)

    @property
    def bound(self) -> np.ndarray:
        """float64 (11,): largest error of an action that does not open the inventory. Choices are exact; the camera,
        inside +-10 degrees, is off by at most what the outermost bin, half a bin in mu-law, is wide."""
        widest = MAX_DEGREES - float(camera_degrees(np.array(N_BINS - 1.5)))
        return np.array([0.0] * len(GROUPS) + [widest, widest])

    def fit(self, chunks: np.ndarray) -> Self:
        """Nothing is learned; checks that `chunks` could be encoded."""
        self.encode(chunks)
        return self

    def encode(self, chunks: np.ndarray) -> np.ndarray:
        """Actions (B, H, 11), see the top of this file -> int64 symbols (B, T), padded with PAD.

        `ActionEncodeError` for NaN, infinity, another D, or a choice that is none of its group's.
        """
        values = finite_chunks(chunks, dim=DIM)
        choices, bins = values[..., :-2], camera_bins(values[..., -2:])
        sizes = np.append(_SIZES, 2)
        bad = np.argwhere((choices != np.round(choices)) | (choices < 0) | (choices >= sizes))
        if len(bad):
            b, h, g = bad[0].tolist()
            raise ActionEncodeError(
                f"got {choices[b, h, g]} for {list(GROUPS)[g]} (chunk {b}, step {h}); expected 0 .. {sizes[g] - 1}; "
                "fix: leave these dimensions out of the normalisation, and use groups_of_buttons for VPT's buttons"
            )
        rows = []
        for actions, cameras in zip(choices.astype(np.int64).tolist(), bins.tolist(), strict=True):
            rows.append([s for a, c in zip(actions, cameras, strict=True) for s in self._write(a, c)])
        return padded(rows)

    def decode(self, symbols: np.ndarray, horizon: int, dim: int = DIM) -> tuple[np.ndarray, np.ndarray]:
        """Symbols (B, T) -> (float32 actions (B, H, 11), bool ok (B,)). Only what `encode` writes is ok, where the
        published decoder skips what it does not understand."""
        grammar = self.grammar(horizon, dim)
        symbols, lengths, ok = whole_rows(symbols, self.vocab_size)
        actions = np.full((len(symbols), horizon, DIM), np.nan, np.float32)
        for i in np.flatnonzero(ok):
            read = np.zeros((horizon, DIM))
            state = grammar.start
            for symbol in symbols[i, : lengths[i]].tolist():
                if symbol not in grammar.legal(state):
                    ok[i] = False
                    break
                _read(symbol, read[state // _PLACES])
                state = grammar.advance(state, symbol)
            ok[i] = ok[i] and state == horizon * _PLACES
            if ok[i]:
                actions[i] = read
        return actions, ok

    def grammar(self, horizon: int, dim: int = DIM) -> KeyboardMouseGrammar:
        """`horizon` actions as written above."""
        if dim != DIM:
            raise ActionDecodeError(f"got dim {dim}; expected {DIM}; fix: set the action dimension to {DIM}")
        return KeyboardMouseGrammar(horizon, self.inventory, horizon * _MAX_ROW)

    def save(self, folder: Path) -> None:
        """Write scheme.json."""
        write_json(folder / FILE, {"scheme": "keyboard_mouse", "inventory": self.inventory})

    @classmethod
    def load(cls, folder: Path) -> Self:
        """From a folder that `save` wrote."""
        return cls(field_of(read_scheme(folder), "inventory", bool, folder))

    def _write(self, choices: list[int], bins: list[int]) -> list[int]:
        """The symbols of one action."""
        if choices[-1]:  # the inventory excludes everything else
            opened = [_INVENTORY + 1] if self.inventory else []
            return [_BEGIN, *opened, _PITCH + NULL_BIN, _YAW + NULL_BIN, _END]
        held = [int(base) + choice for base, choice in zip(_BASES, choices, strict=False) if choice]
        return [_BEGIN, *held, _PITCH + bins[0], _YAW + bins[1], _END]


# Places in an action: 0 before begin, 1 .. 9 groups from number place - 1 on may follow, then these.
_PITCH_NULL, _YAW_NULL, _YAW_ANY, _LAST, _PLACES = 10, 11, 12, 13, 14


@dataclass(frozen=True)
class KeyboardMouseGrammar:
    """The state is 14 * actions finished + the place in the action."""

    horizon: int
    inventory: bool
    max_tokens: int
    start: int = 0

    def legal(self, state: int) -> np.ndarray:
        finished, place = divmod(state, _PLACES)
        if finished == self.horizon:
            return np.zeros(0, np.int64)
        return _LEGAL[place] if self.inventory or place != 1 else _LEGAL[place][1:]

    def advance(self, state: int, symbol: int) -> int:
        finished, place = divmod(state, _PLACES)
        if symbol == _END:
            return (finished + 1) * _PLACES
        if symbol == _BEGIN:
            place = 1
        elif symbol == _INVENTORY + 1:
            place = _PITCH_NULL
        elif symbol >= _YAW:
            place = _LAST
        elif symbol >= _PITCH:
            place = _YAW_NULL if place == _PITCH_NULL else _YAW_ANY
        else:
            place = int(np.searchsorted(_BASES, symbol, side="right")) + 1
        return finished * _PLACES + place


def _legal_symbols(place: int) -> np.ndarray:
    if place in (0, _LAST):
        return np.array([_BEGIN if place == 0 else _END], np.int64)
    if place in (_PITCH_NULL, _YAW_NULL):
        return np.array([(_PITCH if place == _PITCH_NULL else _YAW) + NULL_BIN], np.int64)
    if place == _YAW_ANY:
        return np.arange(_YAW, _YAW + N_BINS, dtype=np.int64)
    opened = [_INVENTORY + 1] if place == 1 else []
    held = [int(_BASES[g]) + i for g in range(place - 1, len(_SIZES)) for i in range(1, int(_SIZES[g]))]
    return np.array([*opened, *held, *range(_PITCH, _PITCH + N_BINS)], np.int64)


_LEGAL = [_legal_symbols(place) for place in range(_PLACES)]


def _read(symbol: int, action: np.ndarray) -> None:
    """Put what a symbol says into an action (11,)."""
    if symbol >= _YAW:
        action[-1] = camera_degrees(np.array(symbol - _YAW))
    elif symbol >= _PITCH:
        action[-2] = camera_degrees(np.array(symbol - _PITCH))
    elif symbol == _INVENTORY + 1:
        action[-3] = 1
    elif symbol >= _BASES[0]:
        group = int(np.searchsorted(_BASES, symbol, side="right")) - 1
        action[group] = symbol - _BASES[group]
