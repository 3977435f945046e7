"""What every scheme does to its input: check chunks of actions, and pad or measure rows of symbols."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from vla.tokenizers.protocol import PAD, ActionEncodeError
from vla.types import ActionDecodeError


def finite_chunks(chunks: np.ndarray, horizon: int | None = None, dim: int | None = None) -> np.ndarray:
    """The chunks, (B, H, D) of finite real numbers, their dtype kept (integers become float64).

    Raises `ActionEncodeError` for another number of axes, another H or D where one is asked for, a dtype that is not a
    real number, NaN or infinity.
    """
    values = np.asarray(chunks)
    wanted = f"(B, {horizon or 'H'}, {dim or 'D'})"
    if (
        values.ndim != 3
        or values.shape[1] != (horizon or values.shape[1])
        or values.shape[2] != (dim or values.shape[2])
    ):
        raise ActionEncodeError(
            f"got actions of shape {values.shape}; expected {wanted}; fix: chunk and batch the actions, or fit again"
        )
    if values.dtype.kind in "iub":
        values = values.astype(np.float64)
    if values.dtype.kind != "f":
        raise ActionEncodeError(
            f"got actions of dtype {values.dtype}; expected float32 or float64; fix: convert them first"
        )
    check_finite(values)
    return values


def check_finite(values: np.ndarray) -> None:
    """`ActionEncodeError` that counts the NaN and infinite values of actions (...) and says where the first is."""
    if not np.isfinite(values).all():
        bad = np.argwhere(~np.isfinite(values))
        raise ActionEncodeError(
            f"got {len(bad)} action values that are NaN or infinite, the first at index {tuple(bad[0].tolist())}; "
            "expected finite numbers; fix: drop those steps, or check the normalisation statistics for a zero range"
        )


def padded(rows: Sequence[Sequence[int] | np.ndarray]) -> np.ndarray:
    """Rows of symbols -> int64 (B, T), filled with PAD at their ends."""
    lengths = np.array([len(row) for row in rows], np.int64)
    symbols = np.full((len(rows), int(lengths.max(initial=0))), PAD, np.int64)
    inside = np.arange(symbols.shape[1]) < lengths[:, None]
    symbols[inside] = [symbol for row in rows for symbol in row]
    return symbols


def whole_rows(symbols: np.ndarray, vocab_size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Symbols (B, T) -> (int64 symbols (B, T), int64 lengths (B,), bool ok (B,)).

    A row is not ok if it has anything but 0 .. vocab_size - 1 followed by PAD. `ActionDecodeError` unless the rows are
    integers (B, T).
    """
    symbols = np.asarray(symbols)
    if symbols.ndim != 2 or symbols.dtype.kind not in "iu":
        raise ActionDecodeError(
            f"got symbols of shape {symbols.shape} and dtype {symbols.dtype}; expected integers (B, T); "
            "fix: one row per chunk, short rows padded with -1"
        )
    symbols = symbols.astype(np.int64, copy=False)
    lengths = (symbols != PAD).sum(axis=1)
    inside = np.arange(symbols.shape[1]) < lengths[:, None]
    return symbols, lengths, (~inside | ((symbols >= 0) & (symbols < vocab_size))).all(axis=1)
