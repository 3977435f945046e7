"""Is a cache what its source is? Everything is read again, on both sides."""

from __future__ import annotations

import numpy as np

from vla.finetune.cache_format import CacheSettings, encode_frame
from vla.finetune.cache_reader import CacheReader
from vla.finetune.source import FrameSource
from vla.progress import Progress
from vla.types import problem


def verify_cache(reader: CacheReader, source: FrameSource, settings: CacheSettings) -> None:
    """Compare checksums, then every frame and number with the source, encoded anew.

    Raises:
        VlaError: naming the first file, frame or column that differs.
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
                if mine is not None and theirs is not None and not np.array_equal(mine[both[0]], theirs[both[1]]):
                    raise problem(
                        f"{name} of episode {span.index} of {reader.where}",
                        f"those of {source.where}",
                        "write it again",
                    )
            for k in range(span.stop - span.start):
                for camera in reader.cameras:
                    if reader.record(span.start + k, camera) != encode_frame(
                        source, original.start + k, camera, settings
                    ):
                        raise problem(f"frame {span.start + k}, camera {camera} of {reader.where}",
                                      f"frame {original.start + k} of {source.where}", "write the cache again")  # fmt: skip
                progress.advance()
    print(f"verified: {len(reader)} frames, {len(reader.info['files'])} files")
