"""`vla tokenizer fit` and `vla tokenizer compare`: action tokenizers from a dataset, and which one to take.

    vla tokenizer fit data/demos --scheme fast --out tokenizers/demos-fast
    vla tokenizer compare data/demos --plot compare.png --json compare.json
    vla finetune --data data/demos --tokenizer tokenizers/demos-fast --out runs/sft

Both normalise the actions with the dataset's own statistics, as fine-tuning does, and measure on episodes that the
tokenizer was not fitted to.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from rich.console import Console
from rich.table import Table

from vla.files import write_bytes, write_json
from vla.finetune.chunks import holdout_split
from vla.finetune.open_source import open_source
from vla.finetune.source import FrameSource
from vla.finetune.statistics import dataset_statistics
from vla.finetune.tokenizer_fit import MAX_CHUNKS, normalized_chunks, save_tokenizer
from vla.finetune.tokenizer_measure import Measured, measure, plot
from vla.normalize import ActionNormalizer, action_normalizer
from vla.progress import Progress
from vla.tokenizers.protocol import ActionTokenizer
from vla.tokenizers.schemes import SCHEMES, load_tokenizer, scheme_class
from vla.types import VlaError, problem


@dataclass(frozen=True)
class Data:
    """What the chunks are made of; the defaults are those of `vla finetune`."""

    horizon: int = 8
    """Actions per chunk."""
    gripper_dim: int | None = -1
    """Dimension left un-normalised; -1 is the last, None normalises all."""
    holdout: float = 0.1
    """Share of the episodes that is measured on and not fitted to; at least one, where there are two."""
    seed: int = 0
    """Which episodes those are."""
    max_chunks: int = MAX_CHUNKS
    """Chunks fitted to and measured on at most, spread evenly over the data."""

    def __post_init__(self) -> None:
        if self.horizon < 1 or self.max_chunks < 1 or not 0 <= self.holdout < 1:
            raise problem(f"horizon {self.horizon}, max_chunks {self.max_chunks}, holdout {self.holdout}",
                          "at least 1, at least 1, and 0 <= holdout < 1", "correct them")  # fmt: skip


@dataclass(frozen=True)
class Schemes:
    """Settings of the schemes; each scheme reads its own."""

    bins: int = 256
    """uniform, quantile: bins per dimension."""
    fast_scale: float = 10.0
    """fast: coefficients per unit; larger is finer and longer."""
    fast_vocab: int = 1024
    """fast: symbols."""
    vq_codebooks: int = 7
    """vq: residual codebooks, one token each."""
    vq_codes: int = 128
    """vq: codes per codebook."""
    fsq_levels: tuple[int, ...] = (8, 5, 5, 5)
    """fsq: levels of each number of a token; their product is the number of symbols."""
    fsq_tokens: int = 8
    """fsq: tokens per chunk."""
    steps: int = 3000
    """vq, fsq: training steps."""


@dataclass(frozen=True)
class FitSettings:
    """Fit an action tokenizer to a dataset."""

    source: tyro.conf.Positional[str]
    """The dataset: a folder or file of any format `vla data inspect` opens."""
    scheme: str
    """uniform, quantile, fast, vq, fsq, integer_text or keyboard_mouse."""
    out: Path
    """Folder to write; give it to `vla finetune --tokenizer`."""
    data: tyro.conf.OmitArgPrefixes[Data] = Data()
    """Chunks."""
    settings: tyro.conf.OmitArgPrefixes[Schemes] = Schemes()
    """Of the schemes."""
    overwrite: bool = False
    """Replace what is in `out`."""


@dataclass(frozen=True)
class CompareSettings:
    """Compare action tokenizers on a dataset: tokens, error, entropy, speed."""

    source: tyro.conf.Positional[str]
    """The dataset: a folder or file of any format `vla data inspect` opens."""
    schemes: tuple[str, ...] = ("uniform", "quantile", "fast", "vq", "fsq", "integer_text")
    """Schemes, which are fitted first, or folders that `vla tokenizer fit` wrote."""
    data: tyro.conf.OmitArgPrefixes[Data] = Data()
    """Chunks."""
    settings: tyro.conf.OmitArgPrefixes[Schemes] = Schemes()
    """Of the schemes."""
    plot: Path | None = None
    """PNG to write."""
    json: Path | None = None
    """JSON file to write, with the figures of each dimension."""


@dataclass(frozen=True)
class Chunks:
    """Normalised chunks of one dataset."""

    source: FrameSource
    fit: np.ndarray
    """float32 (N, H, D)."""
    held_out: np.ndarray
    """float32 (M, H, D); those of `fit` if there is only one episode."""
    normalizer: ActionNormalizer


def run_fit(settings: FitSettings) -> Path:
    """Fit, measure and write; returns the folder."""
    if settings.out.exists() and not settings.overwrite:
        raise problem(f"{settings.out} exists", "a new folder", "choose another --out, or pass --overwrite")
    scheme_class(settings.scheme)
    data = read_chunks(settings.source, settings.data)
    tokenizer = fit_scheme(settings.scheme, settings.settings, settings.data.seed, data.fit)
    row = measure(settings.scheme, tokenizer, data.held_out, [(len(data.held_out), data.normalizer)])
    save_tokenizer(tokenizer, settings.out)
    print_rows([row], data)
    print(f"action tokenizer: {settings.out}")
    return settings.out


def run_compare(settings: CompareSettings) -> list[Measured]:
    """Fit and measure each; what cannot encode this data is named and left out."""
    for name in settings.schemes:
        if not Path(name).is_dir():
            scheme_class(name)
    data = read_chunks(settings.source, settings.data)
    rows: list[Measured] = []
    left_out: dict[str, str] = {}
    for name in settings.schemes:
        try:
            folder = Path(name)
            if folder.is_dir() and name not in SCHEMES:
                tokenizer = load_tokenizer(folder)
            else:
                tokenizer = fit_scheme(name, settings.settings, settings.data.seed, data.fit)
            rows.append(measure(name, tokenizer, data.held_out, [(len(data.held_out), data.normalizer)]))
        except VlaError as error:
            left_out[name] = str(error)
    print_rows(rows, data)
    for name, why in left_out.items():
        print(f"{name} left out: {why}")
    if settings.json is not None:
        value = {"dataset": data.source.name, "chunks": len(data.held_out), "action_names": data.source.action_names,
                 "settings": asdict(settings), "schemes": [row.to_json() for row in rows], "left_out": left_out}  # fmt: skip
        write_json(settings.json, value)
        print(f"figures: {settings.json}")
    if settings.plot is not None:
        write_bytes(settings.plot, plot(rows, data.source.name))
        print(f"plot: {settings.plot}")
    return rows


def read_chunks(text: str, settings: Data) -> Chunks:
    """The chunks of a dataset, by its own statistics."""
    source = open_source(text)
    gripper = source.action_dim - 1 if settings.gripper_dim == -1 else settings.gripper_dim
    statistics = {source.name: dataset_statistics(source, gripper_dim=gripper)}
    n = source.n_episodes
    held = holdout_split(n, min(n - 1, max(1, round(settings.holdout * n))) if settings.holdout else 0, settings.seed)
    rest = frozenset(range(n)) - held

    def chunks(left_out: frozenset[int]) -> np.ndarray:
        return normalized_chunks([(source.name, source)], statistics, settings.horizon, [left_out], settings.max_chunks)

    fit = chunks(held)
    normalizer = action_normalizer(statistics, source.name, source.action_dim)
    return Chunks(source, fit, chunks(rest) if held else fit, normalizer)


def fit_scheme(scheme: str, settings: Schemes, seed: int, chunks: np.ndarray) -> ActionTokenizer:
    """A tokenizer of the scheme, fitted. The learned ones show their progress."""
    make = scheme_class(scheme)
    if scheme not in ("vq", "fsq"):
        options: dict[str, dict[str, Any]] = {
            "uniform": {"bins": settings.bins}, "quantile": {"bins": settings.bins},
            # Held-out chunks may have coefficients the fitted ones do not; these go to the nearest that they have.
            "fast": {"scale": settings.fast_scale, "max_vocab": settings.fast_vocab, "clip": True},
        }  # fmt: skip
        return make(**options.get(scheme, {})).fit(chunks)
    own: dict[str, Any] = {"codebooks": settings.vq_codebooks, "codes": settings.vq_codes}
    if scheme == "fsq":
        own = {"levels": settings.fsq_levels, "tokens": settings.fsq_tokens}
    with Progress(f"fit {scheme}", settings.steps) as progress:
        return make(**own, steps=settings.steps, seed=seed).fit(chunks, _shown_in(progress))


def print_rows(rows: list[Measured], data: Chunks) -> None:
    """One table of every figure over all dimensions, one of the error of each."""
    title = f"{data.source.name}: {len(data.held_out)} held-out chunks of {data.held_out.shape[1]} x {data.held_out.shape[2]}"
    table = Table(
        "scheme", "symbols", "tokens", "max", "RMS error", "largest", "bits", "encode/s", "decode/s", title=title
    )
    physical = Table("scheme", *data.source.action_names, title="RMS error in the units of the data")
    for row in rows:
        table.add_row(row.name, str(row.symbols), f"{row.tokens_mean:.1f}", str(row.tokens_max), f"{row.rms:.5f}",
                      f"{row.largest:.4f}", f"{row.bits:.0f}", f"{row.encode_per_s:,.0f}", f"{row.decode_per_s:,.0f}")  # fmt: skip
        physical.add_row(row.name, *(f"{value:.3g}" for value in row.rms_physical))
    Console().print(table)
    Console().print(physical)


def _shown_in(progress: Progress) -> Callable[[int, int, float], None]:
    def show(step: int, steps: int, loss: float) -> None:
        progress.advance(step - progress.done, f"loss {loss:.4f}")

    return show
