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
from vla.finetune.data.agreement import gripper_index
from vla.finetune.data.chunks import holdout_split
from vla.finetune.data.open_source import open_source
from vla.finetune.data.statistics import dataset_statistics
from vla.finetune.formats.source import FrameSource
from vla.finetune.tokenizer_fit import MAX_CHUNKS, fit_shown, normalized_chunks, save_tokenizer, takes_physical_units
from vla.finetune.tokenizer_measure import Measured, measure, plot
from vla.normalize import ActionNormalizer, action_normalizer
from vla.progress import Progress
from vla.tokenizers.code_length import CodeLength, code_lengths
from vla.tokenizers.learned import LearnedCodec
from vla.tokenizers.protocol import ActionTokenizer
from vla.tokenizers.schemes import SCHEMES, load_tokenizer, scheme_class
from vla.types import VlaError, problem

CODE_LENGTHS = {"vq": ("codebooks", (1, 2, 4, 7, 14)), "fsq": ("tokens", (2, 4, 8, 16))}
"""Scheme -> (its setting for the number of tokens, values for --code-lengths)."""


@dataclass(frozen=True)
class Data:
    """What the chunks are made of; the defaults are those of `vla finetune`."""

    horizon: int = 8
    """Actions per chunk."""
    gripper_dim: int | None = -1
    """Dimension left un-normalised; None normalises all. -1: the one called gripper, else the last, if its values lie in
    [-1, 1]."""
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
    steps: int | None = None
    """vq, fsq: training steps; None: 500 for vq, 3000 for fsq."""


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
    code_lengths: bool = False
    """Also fit vq with 1, 2, 4, 7 and 14 tokens and fsq with 2, 4, 8 and 16, and show what each loses."""


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
    data = read_chunks(settings.source, settings.data, takes_physical_units(settings.scheme))
    tokenizer = fit_scheme(settings.scheme, settings.settings, settings.data.seed, data.fit)
    row = measure(settings.scheme, tokenizer, data.held_out, [(len(data.held_out), data.normalizer)])
    save_tokenizer(tokenizer, settings.out)
    print_rows([row], data)
    print_clipped([row])
    print(f"action tokenizer: {settings.out}")
    return settings.out


def run_compare(settings: CompareSettings) -> list[Measured]:
    """Fit and measure each; what cannot encode this data is named and left out."""
    for name in settings.schemes:
        if not Path(name).is_dir():
            scheme_class(name)
    physical = all(takes_physical_units(name) for name in settings.schemes)
    data = read_chunks(settings.source, settings.data, physical)
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
    print_clipped(rows)
    lengths = measure_code_lengths(settings, data) if settings.code_lengths else []
    for name, why in left_out.items():
        print(f"{name} left out: {why}")
    if settings.json is not None:
        value = {"dataset": data.source.name, "chunks": len(data.held_out), "action_names": data.source.action_names,
                 "settings": asdict(settings), "schemes": [row.to_json() for row in rows], "left_out": left_out,
                 "code_lengths": [asdict(length) for length in lengths]}  # fmt: skip
        write_json(settings.json, value)
        print(f"figures: {settings.json}")
    if settings.plot is not None:
        write_bytes(settings.plot, plot(rows, data.source.name, lengths))
        print(f"plot: {settings.plot}")
    return rows


def read_chunks(text: str, settings: Data, physical: bool = False) -> Chunks:
    """The chunks of a dataset, by its own statistics; `physical`: as recorded."""
    source = open_source(text)
    gripper = gripper_index(settings.gripper_dim, [source])
    statistics = {source.name: dataset_statistics(source, gripper_dim=gripper)}
    if physical:
        statistics[source.name]["action"]["mask"] = [False] * source.action_dim
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
    if scheme in CODE_LENGTHS:
        return fit_shown(new_codec(scheme, settings, seed), chunks)
    options: dict[str, dict[str, Any]] = {
        "uniform": {"bins": settings.bins}, "quantile": {"bins": settings.bins},
        # Held-out chunks may have coefficients the fitted ones do not; these go to the nearest that they have.
        "fast": {"scale": settings.fast_scale, "max_vocab": settings.fast_vocab, "clip": True},
    }  # fmt: skip
    return fit_shown(scheme_class(scheme)(**options.get(scheme, {})), chunks)


def new_codec(scheme: str, settings: Schemes, seed: int, **changes: int) -> LearnedCodec:
    """A vq or fsq codec, not fitted yet."""
    own: dict[str, Any] = {"codebooks": settings.vq_codebooks, "codes": settings.vq_codes}
    if scheme == "fsq":
        own = {"levels": settings.fsq_levels, "tokens": settings.fsq_tokens}
    steps = {} if settings.steps is None else {"steps": settings.steps}
    return scheme_class(scheme)(**{**own, **steps, **changes}, seed=seed)


def measure_code_lengths(settings: CompareSettings, data: Chunks) -> list[CodeLength]:
    """Fit and show vq and fsq codecs of each of `CODE_LENGTHS`."""
    codecs = [
        new_codec(scheme, settings.settings, settings.data.seed, **{name: n})
        for scheme, (name, lengths) in CODE_LENGTHS.items()
        for n in lengths
    ]
    with Progress("code lengths", sum(codec.steps for codec in codecs)) as progress:
        before = 0

        def told(codec: LearnedCodec) -> Callable[[int, int, float], None]:
            nonlocal before
            start, before = before, before + codec.steps
            return lambda step, steps, loss: progress.advance(start + step - progress.done, codec.name)

        rows = code_lengths(codecs, data.fit, data.held_out, told)
    table = Table(
        "scheme", "settings", "tokens", "bits", "RMS error", "largest", title="Error over code length, held out"
    )
    for row in rows:
        table.add_row(row.scheme, row.settings, str(row.tokens), f"{row.bits:.0f}", f"{row.rms_error:.5f}",
                      f"{row.max_error:.4f}")  # fmt: skip
    Console().print(table)
    return rows


def print_clipped(rows: list[Measured]) -> None:
    """Of FAST: what lay outside its alphabet."""
    for row in rows:
        if row.clipped is not None:
            print(f"{row.name}: {row.clipped} coefficients of the held-out chunks are clipped")


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
