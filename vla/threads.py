"""Sharing a few CPU cores between the model and the simulators beside it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def leave_cores_to(n_workers: int) -> Iterator[None]:
    """While inside, torch computes on the cores that `n_workers` busy processes leave over, at least one.

    torch's threads wait for each other spinning; with more threads than free cores a call can take several times as long.
    """
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(max(1, min(before, len(os.sched_getaffinity(0)) - n_workers)))
    try:
        yield
    finally:
        torch.set_num_threads(before)
