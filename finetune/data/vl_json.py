"""Vision-language rows of a JSON file beside its images: {"image": "frames/0.png", "question": "what is this?", "answer": "a cup"},
or another layout of `vla.finetune.data.vl_rows`."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from vla.finetune.data.order import epoch_order
from vla.finetune.data.vl_rows import Pair, VlRow, VlSource, guess_layout, pairs_of
from vla.types import problem


class JsonRows(VlSource):
    """A JSONL file. All of it is checked and held, without the images."""

    def __init__(self, path: Path, seed: int) -> None:
        super().__init__(path.stem)
        self.path, self.seed = path, seed
        self.rows = read_rows(path)
        self._order: tuple[int, np.ndarray] | None = None

    def row(self, draw: int) -> VlRow:
        walk, place = divmod(draw, len(self.rows))
        if self._order is None or self._order[0] != walk:
            self._order = walk, epoch_order(len(self.rows), self.seed, walk)
        image, pairs = self.rows[int(self._order[1][place])]
        return VlRow(lambda: _file_pixels(image, self.path), *pairs[walk % len(pairs)])


def read_rows(path: Path) -> list[tuple[Path, list[Pair]]]:
    """(Image, its questions and answers) of each line.

    Raises:
        VlaError: no file, no rows, or a line that is not such a row, with its number.
    """
    if not path.is_file():
        raise problem(f"no file {path}", "JSONL with image, question and answer, or hf:OWNER/NAME", "correct --vl-data")
    rows = []
    for where, value in _values(path):
        layout = guess_layout(list(value)) if isinstance(value, dict) else None
        if layout is None or not isinstance(value[layout.image], str) or not value[layout.image].strip():
            raise problem(f"{where}: {json.dumps(value)[:80]}", "image, question and answer, texts that are not empty (or "
                          "caption, points, conversations)", "correct the line")  # fmt: skip
        image = path.parent / value[layout.image]
        if not image.is_file():
            raise problem(f"{where}: no image {image}", "a path from the file's folder", "correct it")
        rows.append((image, pairs_of(value, layout, where)))
    if not rows:
        raise problem(f"{path} without a row", "at least one", "drop --vl-data")
    return rows


def _values(path: Path) -> Iterator[tuple[str, Any]]:
    """(Where it stands, what) of each row: a line of JSONL, or an item of the one list of a .json file, as LLaVA's are."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".json":
        try:
            values = json.loads(text)
        except json.JSONDecodeError as error:
            raise problem(f"{path}: {error}", "a JSON list", "correct the file") from error
        if not isinstance(values, list):
            raise problem(f"{path}: {text[:80]}", "a JSON list of rows", "name a file with a row a line .jsonl")
        yield from ((f"{path} item {number}", value) for number, value in enumerate(values))
        return
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            try:
                yield f"{path} line {number}", json.loads(line)
            except json.JSONDecodeError as error:
                raise problem(f"{path} line {number}: {error}", "one JSON object a line", "correct the line") from error


def _file_pixels(path: Path, rows: Path) -> np.ndarray:
    try:
        with Image.open(io.BytesIO(path.read_bytes())) as image:
            return np.asarray(image.convert("RGB"))
    except (UnidentifiedImageError, OSError, Image.DecompressionBombError) as error:
        raise problem(f"{path}: {error}", "an image", f"replace it, or drop its row from {rows}") from error
