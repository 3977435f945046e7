"""Dealing one evaluation's episodes to several machines: `--shard 2/4` is the second of four."""

from __future__ import annotations

import re
from collections.abc import Sequence

from vla.types import problem


def parse_shard(text: str | None) -> tuple[int, int]:
    """`"2/4"` -> (2, 4); None -> (1, 1), everything."""
    if text is None:
        return 1, 1
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if match is None or not 1 <= int(match[1]) <= int(match[2]):
        raise problem(f"shard {text!r}", "i/n with 1 <= i <= n", "for the second of four machines: --shard 2/4")
    return int(match[1]), int(match[2])


def deal(tasks: Sequence[str], episodes_per_task: int, shard: str | None = None) -> list[tuple[str, int]]:
    """The (task, index) of a shard, in the order in which they are run.

    Round robin within each task, and each task starts with another shard: every shard gets its share of every task, and
    raising `episodes_per_task` later takes no episode from the shard that has it. One task after the other, because an
    environment can be used again for the same task only.
    """
    number, n_shards = parse_shard(shard)
    every = [(k, task, i) for k, task in enumerate(tasks) for i in range(episodes_per_task)]
    return [(task, i) for k, task, i in every if (i + k) % n_shards == number - 1]
