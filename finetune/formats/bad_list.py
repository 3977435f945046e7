"""RUN/bad.jsonl: what a training run with `skip_bad` left out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vla.files import append_jsonl, read_jsonl
from vla.finetune.data.chunks import ChunkDataset

BAD_JSONL = "bad.jsonl"


def list_bad(out: Path, dataset: ChunkDataset) -> None:
    """Append what is not in the list yet: an episode {dataset, file, record, error}, or a sample {dataset, file, record,
    frame, error}, whose `frame` is counted from the beginning of its episode."""
    path = out / BAD_JSONL
    rows = _rows(dataset)
    found = read_jsonl(path) if rows and path.is_file() else []
    for row in rows:
        if row not in found:
            append_jsonl(path, row)


def bad_summary(out: Path) -> list[str]:
    """One line for a person; none if nothing was left out."""
    path = out / BAD_JSONL
    rows = {
        (r["dataset"], r["file"], r["record"], r.get("frame")) for r in (read_jsonl(path) if path.is_file() else ())
    }
    samples = sum(row[3] is not None for row in rows)
    return [f"{len(rows) - samples} bad episodes and {samples} samples left out: {path}"] if rows else []


def _rows(dataset: ChunkDataset) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = [
        {"dataset": name, "file": bad.file, "record": bad.record, "error": bad.why}
        for name, source in dataset.sources
        for bad in source.bad
    ]
    for (s, frame), why in sorted(dataset.bad_frames.items()):
        name, source = dataset.sources[s]
        episode = source.episode_of(frame)
        file, record = source.place_of(episode)
        at = frame - source.episodes[episode].start
        rows.append({"dataset": name, "file": file, "record": record, "frame": at, "error": why})
    return rows
