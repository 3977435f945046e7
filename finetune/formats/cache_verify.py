"""Is a cache what its source is? Everything is read again, on both sides."""

from __future__ import annotations

import numpy as np

from vla.finetune.formats.cache_format import CacheSettings, encode_frame
from vla.finetune.formats.cache_reader import CacheReader
from vla.finetune.formats.source import FrameSource
from vla.progress import Progress
from vla.types import problem


def verify_cache(reader: CacheReader, source: FrameSource, settings: CacheSettings) -> None:
    """Compare checksums, then with the source every frame, encoded anew as the writer did, number, instruction, and each
    episode's success, seed and task.

    Raises:
        VlaError: naming the first file, frame, column or fact that differs.
    """
    damaged = reader.damaged_files()
    if damaged:
        raise problem(f"{damaged[0]} with another checksum ({len(damaged)} such files)", "the content that was written",
                      "the disk or a copy changed it: write the cache again")  # fmt: skip
    with Progress("verified frames", len(reader)) as progress:
        for span, row in zip(reader.episodes, reader.rows, strict=True):
            original = source.episodes[row["source_episode"]]
            both = slice(span.start, span.stop), slice(original.start, original.stop)
            pairs = (("actions", reader.actions(), source.actions()), ("states", reader.states(), source.states()),
                     ("rewards", reader.rewards(), source.rewards()))  # fmt: skip
            for name, mine, theirs in pairs:
                if mine is None or theirs is None:
                    alike = mine is theirs
                else:
                    alike = np.array_equal(mine[both[0]], theirs[both[1]], equal_nan=True)
                if not alike:
                    raise problem(
                        f"{name} of episode {span.index} of {reader.where}",
                        f"those of {source.where}",
                        "write it again",
                    )
            _verify_facts(reader, source, span.index, row["source_episode"])
            for k in range(span.stop - span.start):
                instruction = source.instruction_of(original.start + k)
                if reader.instruction_of(span.start + k) != instruction:
                    raise problem(f"another instruction at frame {span.start + k} of {reader.where}",
                                  f"{instruction!r}, as in {source.where}", "write the cache again")  # fmt: skip
                for camera in reader.cameras:
                    if reader.record(span.start + k, camera) != encode_frame(
                        source, original.start + k, camera, settings, reader.info["jpeg_decoder"]
                    ):
                        raise problem(f"frame {span.start + k}, camera {camera} of {reader.where}",
                                      f"frame {original.start + k} of {source.where}", "write the cache again")  # fmt: skip
                progress.advance()
    print(f"verified: {len(reader)} frames, {len(reader.info['files'])} files")


def _verify_facts(reader: CacheReader, source: FrameSource, k: int, number: int) -> None:
    """Success, seed and task of the cache's episode `k`, which is the source's `number`."""
    facts = {
        "success": (reader.success_of(k), source.success_of(number)),
        "seed": (reader.seed_of(k), source.seed_of(number)),
        "task": (reader.task_of(k), source.task_of(number)),
    }
    for name, (mine, theirs) in facts.items():
        if mine != theirs:
            raise problem(f"{name} {mine!r} of episode {k} of {reader.where}",
                          f"{theirs!r}, of episode {number} of {source.where}", "write the cache again")  # fmt: skip
