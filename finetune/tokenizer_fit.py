"""Action tokenizers from data: the chunks that training sees, and a tokenizer fitted to them."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from vla.files import swap_folder
from vla.finetune.formats.source import EpisodeSpan
from vla.normalize import Statistics, action_normalizer
from vla.progress import Progress
from vla.tokenizers.fast import FastTokenizer
from vla.tokenizers.learned import LearnedCodec
from vla.tokenizers.learned import Progress as Told
from vla.tokenizers.protocol import ActionTokenizer
from vla.tokenizers.schemes import SCHEMES, load_tokenizer, read_scheme, scheme_class
from vla.types import problem

MAX_CHUNKS = 20_000
WITH_BINS = ("uniform", "quantile")


class ActionSource(Protocol):
    """What is needed of a `vla.finetune.formats.source.FrameSource`."""

    @property
    def action_dim(self) -> int: ...
    @property
    def episodes(self) -> Sequence[EpisodeSpan]: ...
    def actions(self) -> np.ndarray: ...


def normalized_chunks(
    sources: Sequence[tuple[str, ActionSource]],
    statistics: Statistics,
    horizon: int,
    held_out: Sequence[Collection[int]] = (),
    limit: int = MAX_CHUNKS,
    normalization: str = "bounds_q99",
) -> np.ndarray:
    """float32 (N, H, D) chunks as training encodes them: normalised, the last action repeated at the end of an episode.

    Args:
        sources: (dataset name, reader); the name is the one its statistics go by.
        held_out: of each source, the episodes to leave out.
        limit: N at most; the frames are then spread evenly over all.
        normalization: as in `vla.spec.ActionSpec`.
    """
    parts: list[tuple[int, int, int]] = []  # (source, frame, end of its episode)
    for s, (_, source) in enumerate(sources):
        rows = [row for row in source.episodes if not held_out or row.index not in held_out[s]]
        parts += [(s, k, row.stop) for row in rows for k in range(row.start, row.stop)]
    if not parts:
        raise problem("no frames", "at least one episode to learn from", "hold out fewer episodes")
    chosen = np.array(parts)[np.unique(np.linspace(0, len(parts) - 1, min(limit, len(parts))).round().astype(int))]
    chunks = []
    for s, (name, source) in enumerate(sources):
        mine = chosen[chosen[:, 0] == s]
        wanted = np.minimum(mine[:, 1:2] + np.arange(horizon), mine[:, 2:] - 1)  # (n, H)
        normalizer = action_normalizer(statistics, name, source.action_dim, normalization)
        chunks.append(normalizer.normalize(source.actions()[wanted]))
    return np.concatenate(chunks)


def takes_physical_units(name: str) -> bool:
    """Whether a scheme, or that of a folder, encodes recorded numbers as they are: no dimension is normalised then."""
    scheme = name if name in SCHEMES else read_scheme(Path(name))["scheme"] if Path(name).is_dir() else ""
    return scheme == "keyboard_mouse"


def action_tokenizer(name: str, bins: int, chunks: Callable[[], np.ndarray]) -> ActionTokenizer:
    """The tokenizer of a folder that `vla tokenizer fit` wrote, or one of a scheme, fitted.

    Args:
        name: a scheme or a folder.
        bins: of the schemes `WITH_BINS`.
        chunks: called for the normalised chunks (N, H, D) to fit to.
    """
    if name in SCHEMES:
        return fit_shown(new_tokenizer(name, bins), chunks())
    folder = Path(name)
    if not folder.is_dir() and folder.name != name:
        raise problem(f"no folder {folder}", "the folder of an action tokenizer", "make one with `vla tokenizer fit`")
    return load_tokenizer(folder) if folder.is_dir() else scheme_class(name)


def fit_shown(tokenizer: ActionTokenizer, chunks: np.ndarray) -> ActionTokenizer:
    """Fitted to chunks (N, H, D): a codec that trains shows its progress, FAST says how many coefficients it clips. Of
    several processes only the first shows anything."""
    if os.environ.get("RANK", "0") != "0":
        return tokenizer.fit(chunks)
    if isinstance(tokenizer, LearnedCodec):
        with Progress(f"fit {tokenizer.name}", tokenizer.steps) as progress:
            return tokenizer.fit(chunks, told_to(progress))
    fitted = tokenizer.fit(chunks)
    clipped = n_clipped(fitted, chunks)
    if clipped is not None:
        print(f"fast: {clipped} of {chunks.size} coefficients of {len(chunks)} training chunks are clipped")
    return fitted


def told_to(progress: Progress) -> Told:
    """What a codec calls while it trains."""
    return lambda step, steps, loss: progress.advance(step - progress.done, f"loss {loss:.4f}")


def n_clipped(tokenizer: ActionTokenizer, chunks: np.ndarray) -> int | None:
    """Coefficients of the chunks that FAST has no character for and moves to the nearest; None of any other tokenizer."""
    return tokenizer.n_outside(chunks) if isinstance(tokenizer, FastTokenizer) and tokenizer.clip else None


def save_tokenizer(tokenizer: ActionTokenizer, folder: Path) -> None:
    """Write the folder, whole or not at all; an existing one is replaced."""
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    tokenizer.save(temporary)
    swap_folder(temporary, folder)


def new_tokenizer(scheme: str, bins: int = 256) -> ActionTokenizer:
    """A tokenizer of the scheme with its usual settings, not fitted yet."""
    make = scheme_class(scheme)
    if scheme == "fast":  # rare coefficients that the chunks do not have go to the nearest that they have
        return make(clip=True)
    return make(bins) if scheme in WITH_BINS else make()
