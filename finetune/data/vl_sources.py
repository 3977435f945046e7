"""Where vision-language rows come from: JSONL files beside their images, and datasets of the `datasets` library.

    rows.jsonl                                       one row a line, or .json: a list; images are paths from its folder
    hf:OWNER/NAME@REVISION#split=train               a dataset on the Hub, read as a stream
    FOLDER#split=train&image=picture                 one that is here: `save_to_disk`, parquet, or a folder as on the Hub
    FILE.parquet#question=ask&answer=reply

`vla_rows` says which columns are what, unless the address does (image, question, answer; name: the configuration).
A source is an endless stream of draws, in an order that depends on the seed alone.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

import numpy as np
from PIL import Image

from vla.finetune.data.order import epoch_order
from vla.finetune.data.vl_json import JsonRows
from vla.finetune.data.vl_rows import ANSWERS, CAPTIONS, IMAGES, Layout, VlRow, VlSource, guess_layout, pairs_of
from vla.types import VlaError, problem

NEEDS_DATASETS = "pip install 'vla-toolkit[datasets]'"
OPTIONS = ("split", "name", "image", "question", "answer")
SHUFFLE_ROWS = 1000
"""Rows in the shuffle buffer of a stream; its files come in random order besides."""


@dataclass(frozen=True)
class Address:
    """One entry of `--vl-data`."""

    text: str
    place: str
    """A path, or OWNER/NAME."""
    remote: bool
    revision: str | None
    options: Mapping[str, str]

    @property
    def name(self) -> str:
        """What its figures are called."""
        path = Path(self.place)
        return path.stem if path.suffix in (".jsonl", ".json", ".parquet") else path.name


def parse_address(text: str) -> Address:
    """VlaError for an option that does not exist."""
    remote = text.startswith("hf:")
    place, _, tail = text.removeprefix("hf:").removeprefix("//datasets/").partition("#")
    options = dict(parse_qsl(tail, keep_blank_values=True))
    wrong = [name for name, value in options.items() if name not in OPTIONS or not value]
    if wrong or bool(tail) != bool(options):
        raise problem(
            f"{text!r} with {', '.join(wrong) or tail}", f"#NAME=VALUE&... of {', '.join(OPTIONS)}", "correct --vl-data"
        )
    revision = None
    if remote:
        place, _, revision = place.partition("@")
        if place.count("/") != 1 or not all(place.split("/")):
            raise problem(f"{text!r}", "hf:OWNER/NAME", "correct --vl-data")
    return Address(text, place, remote, revision or None, options)


def open_vl_source(text: str, seed: int) -> VlSource:
    """Open one entry of `--vl-data`; its first row is read.

    Raises:
        VlaError: nothing there, the extra [datasets] is missing, columns that say too little (they are listed), a bad row.
    """
    address = parse_address(text)
    path = Path(address.place)
    if address.remote:
        return _opened(address, seed)
    if path.suffix in (".jsonl", ".json") or (not path.exists() and path.suffix != ".parquet"):
        if address.options:
            raise problem(f"options of {text!r}", "none for a JSONL file", "correct --vl-data")
        return JsonRows(path, seed)
    if not path.exists():
        raise problem(f"no file {path}", "JSONL, parquet, a folder, or hf:OWNER/NAME", "correct --vl-data")
    return _opened(address, seed)


class TableRows(VlSource):
    """A `datasets.Dataset`: rows in a new order each time it has been walked through."""

    def __init__(self, address: Address, table: Any, layout: Layout, seed: int) -> None:
        super().__init__(address.name)
        self.address, self.table, self.layout, self.seed = address, table, layout, seed
        self._order: tuple[int, np.ndarray] | None = None
        if not len(table):
            raise problem(f"{address.text} without a row", "at least one", "drop it from --vl-data")

    def row(self, draw: int) -> VlRow:
        walk, place = divmod(draw, len(self.table))
        if self._order is None or self._order[0] != walk:
            self._order = walk, epoch_order(len(self.table), self.seed, walk)
        i = int(self._order[1][place])
        return _table_row(self.table[i], self.layout, self.address, f"row {i}", walk)


class StreamedRows(VlSource):
    """A `datasets.IterableDataset`: files in random order, rows through a shuffle buffer, all of it anew in each walk.

    Draws before the one asked for are read and dropped, without decoding their images: so a run goes on exactly.
    """

    def __init__(self, address: Address, stream: Any, layout: Layout, seed: int) -> None:
        super().__init__(address.name)
        self.address, self.layout = address, layout
        self._stream = stream.shuffle(seed=seed, buffer_size=SHUFFLE_ROWS)
        self._at: int
        """The draw that was read last."""
        self._row: tuple[Mapping[str, Any], int] | None
        """That row, and in which walk it was."""
        self._restart()

    def row(self, draw: int) -> VlRow:
        if draw < self._at:
            self._restart()
        while self._at < draw:
            self._row = next(self._rows)
            self._at += 1
        assert self._row is not None
        found, walk = self._row
        return _table_row(found, self.layout, self.address, f"row {draw} of the stream", walk)

    def _restart(self) -> None:
        self._rows = self._all_walks()
        self._at, self._row = -1, None

    def _all_walks(self) -> Iterator[tuple[Mapping[str, Any], int]]:
        walk = 0
        while True:
            self._stream.set_epoch(walk)
            n = 0
            with _told(self.address):
                for row in self._stream:
                    n += 1
                    yield row, walk
            if not n:
                raise problem(f"{self.address.text} without a row", "at least one", "drop it from --vl-data")
            walk += 1


@contextlib.contextmanager
def _told(address: Address) -> Iterator[None]:
    """What the `datasets` library raises becomes a `VlaError`."""
    from datasets.exceptions import DatasetsError  # pyright: ignore[reportMissingImports]
    from httpx import HTTPError

    try:
        yield
    except VlaError:
        raise
    except (OSError, ValueError, RuntimeError, KeyError, DatasetsError, HTTPError) as error:
        said = " ".join(str(error).split())[:300] or type(error).__name__
        raise problem(f"{address.text}: {said}", "a dataset that the `datasets` library opens, with its split and "
                      "configuration (#split=...&name=...)", "correct --vl-data") from error  # fmt: skip


def _opened(address: Address, seed: int) -> VlSource:
    try:
        import datasets  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise problem(f"{address.text} without the package datasets", "datasets", NEEDS_DATASETS) from error
    split, name, path = address.options.get("split", "train"), address.options.get("name"), Path(address.place)
    with _told(address):
        if address.remote:
            table: Any = datasets.load_dataset(
                address.place, name, split=split, revision=address.revision, streaming=True
            )
        elif path.is_file():
            table = datasets.load_dataset("parquet", data_files=str(path), split=split)  # all is `train`
        elif (path / "state.json").is_file():
            table = datasets.load_from_disk(str(path))
        elif (path / "dataset_dict.json").is_file():
            parts: Any = datasets.load_from_disk(str(path))
            if split not in parts:
                raise problem(f"{address.text}: no split {split!r}", f"one of {', '.join(parts)}", "pass #split=...")
            table = parts[split]
        else:
            table = datasets.load_dataset(str(path), name, split=split)
        layout, table = _with_columns(address, table, datasets)
    streamed = isinstance(table, datasets.IterableDataset)
    source = (StreamedRows if streamed else TableRows)(address, table, layout, seed)
    source.row(0)
    return source


def _with_columns(address: Address, table: Any, datasets: Any) -> tuple[Layout, Any]:
    """The layout, and the dataset with only the columns it needs, images not decoded."""
    features = table.features
    if features is None:  # a stream whose types nobody wrote down
        first = next(iter(table), None)
        if first is None:
            raise problem(f"{address.text} without a row", "at least one", "drop it from --vl-data")
        features = dict.fromkeys(first)
    names = list(features)
    given = {role: column for role in ("image", "question", "answer") if (column := address.options.get(role))}
    shown = ", ".join(f"{name} ({_kind(kind)})" if kind else name for name, kind in features.items())
    absent = [column for column in given.values() if column not in names]
    if absent:
        raise problem(f"{address.text}: no column {', '.join(absent)}", f"one of {shown}", "correct the address")
    if "image" not in given and not any(name in IMAGES for name in names):
        pictures = [name for name, kind in features.items() if isinstance(kind, datasets.Image)]
        given |= {"image": pictures[0]} if len(pictures) == 1 else {}
    layout = guess_layout(names, given)
    if layout is None:
        raise problem(f"{address.text} with the columns {shown}", f"an image ({', '.join(IMAGES)}) with {', '.join(ANSWERS[:3])}, "
                      f"{', '.join(CAPTIONS[:2])}, points or conversations", "name them: "
                      f"{address.text.partition('#')[0]}#image=COLUMN&question=COLUMN&answer=COLUMN")  # fmt: skip
    kind: Any = features[layout.image]
    if _kind(kind) == "string":
        raise problem(f"{address.text}: column {layout.image} of texts", "pictures (the feature Image)",
                      "write the dataset with its images, or a JSONL file beside them")  # fmt: skip
    if isinstance(kind, datasets.Image):
        table = table.cast_column(layout.image, datasets.Image(decode=False))
    elif isinstance(kind, datasets.List) and isinstance(kind.feature, datasets.Image):
        table = table.cast_column(layout.image, datasets.List(datasets.Image(decode=False)))
    return layout, table


def _kind(feature: Any) -> str:
    """string, Image, List, ...: for messages, and to tell texts from pictures."""
    shown = str(feature)
    return "string" if shown.startswith("Value(") and "string" in shown else type(feature).__name__


def _table_row(row: Mapping[str, Any], layout: Layout, address: Address, which: str, walk: int) -> VlRow:
    where = f"{address.text} {which}"
    image = row.get(layout.image)
    if isinstance(image, list):
        if len(image) != 1:
            raise problem(f"{where}: {len(image)} images", "one image a row", "leave such rows out of the dataset")
        image = image[0]
    if image is None:
        raise problem(f"{where}: no image", "one image a row", "leave such rows out of the dataset")
    pairs = pairs_of(row, layout, where)
    return VlRow(lambda: _pixels(image, where), *pairs[walk % len(pairs)])


def _pixels(image: Any, where: str) -> np.ndarray:
    """A picture in one of the forms in which the library gives them."""
    import datasets  # pyright: ignore[reportMissingImports]

    try:
        if isinstance(image, bytes):
            image = {"bytes": image, "path": None}
        picture = datasets.Image().decode_example(image) if isinstance(image, dict) else image
        return np.asarray(picture.convert("RGB"))
    except (OSError, ValueError, KeyError, AttributeError, Image.DecompressionBombError) as error:
        raise problem(f"{where}: {error}", "an image", "leave the row out of the dataset") from error
