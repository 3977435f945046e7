"""Leave the episodes out of a dataset that cannot be used, whatever its format.

The readers, opened with `skip_bad`, leave out what they cannot read. Here the rest is looked at, through the readers' own
methods: the numbers of every step, the pixels of the first and the last, and of the steps between the structure of the
image files (JPEG's markers, PNG's checksums). What only decoding every frame would show is found in training: see
`vla.finetune.data.chunks`.
"""

from __future__ import annotations

import struct
import sys
import zlib
from collections.abc import Sequence

from vla.finetune.data.subset_source import SubsetSource
from vla.finetune.formats.cache_writer import check_numbers
from vla.finetune.formats.source import BadEpisode, FrameSource, Unreachable
from vla.progress import Progress
from vla.types import VlaError, problem

SHOWN = 3
"""Bad episodes that are named on stderr."""
_PNG = b"\x89PNG\r\n\x1a\n"
_JPEG = b"\xff\xd8\xff"


def without_bad(source: FrameSource, *, probe_all: bool = False) -> FrameSource:
    """The episodes that can be used; `bad` lists the others, those that the reader left out first.

    Args:
        probe_all: decode every frame, which takes as long as an epoch of training without a model.

    Raises:
        VlaError: no episode is left, or the data cannot be had now (`Unreachable`).
    """
    kept, bad = [], list(source.bad)
    with Progress(f"looking at {source.where}", len(source)) as progress:
        for episode, span in enumerate(source.episodes):
            try:
                check_episode(source, episode, probe_all)
                kept.append(episode)
            except Unreachable:
                raise
            except VlaError as error:
                bad.append(BadEpisode(*source.place_of(episode), str(error)))
            progress.advance(span.stop - span.start)
    if not kept:
        raise nothing_left(source.where, bad)
    found = SubsetSource(source, kept) if len(kept) < source.n_episodes else source
    found.bad = tuple(bad)
    if bad:
        shown = "".join(f"\n  {row.why}" for row in bad[:SHOWN])
        rest = f"\n  and {len(bad) - SHOWN} more" if len(bad) > SHOWN else ""
        print(f"{source.where}: {len(bad)} bad episodes left out:{shown}{rest}", file=sys.stderr)
    return found


def nothing_left(where: str, bad: Sequence[BadEpisode]) -> VlaError:
    """Every episode was bad."""
    first = f" (first: {bad[0].why})" if bad else ""
    return problem(f"{where} without one usable episode{first}", "at least one", "copy the dataset again")


def check_episode(source: FrameSource, episode: int, probe_all: bool = False) -> None:
    """VlaError saying what is wrong with an episode; see the top of this file for what is looked at."""
    span = source.episodes[episode]
    if span.stop <= span.start:
        raise problem(f"episode {episode} of {source.where} without a step", "at least one", "leave it out")
    check_numbers(source, episode)
    for name, of in (("success", source.success_of), ("seed", source.seed_of), ("task", source.task_of)):
        try:
            of(episode)
        except (ValueError, TypeError) as error:
            raise problem(f"{name} of episode {episode} of {source.where}: {error}", "a value", "mend it") from error
    for i in range(span.start, span.stop):
        source.instruction_of(i)
        at_end = probe_all or i in (span.start, span.stop - 1)
        for camera in source.cameras:
            data = source.encoded(i, camera)
            fault = None if data is None else image_fault(data)
            if at_end or fault is not None:
                source.images(i, [camera])
            if fault is not None and fault.startswith("PNG"):  # decoders let a wrong checksum of the pixels pass
                raise problem(f"frame {i}, camera {camera!r} of {source.where}: {fault}", "a whole PNG",
                              "the frame is damaged: copy the file again")  # fmt: skip


def image_fault(data: bytes) -> str | None:
    """What is wrong with the outside of an image file, None if nothing is; nothing is decoded.

    A JPEG must begin and end with its markers (ITU-T T.81, B.1.1.3; zeros may follow), the chunks of a PNG must be whole,
    have the CRCs they name and end with IEND (W3C PNG, 5.3).
    """
    if data.startswith(_JPEG):
        return None if data.rstrip(b"\0").endswith(b"\xff\xd9") else "JPEG without its end"
    if not data.startswith(_PNG):
        return "neither JPEG nor PNG"
    at = len(_PNG)
    while at + 12 <= len(data):
        (length,), kind = struct.unpack_from(">I", data, at), data[at + 4 : at + 8]
        stop = at + 8 + length
        if stop + 4 > len(data):
            break
        if zlib.crc32(data[at + 4 : stop]) != int.from_bytes(data[stop : stop + 4], "big"):
            return f"PNG with a wrong checksum at byte {at}"
        if kind == b"IEND":
            return None
        at = stop + 4
    return f"PNG that is cut off at byte {len(data)}"
