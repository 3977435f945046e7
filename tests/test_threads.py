"""Threads are taken back after, whatever happens inside."""

import os

import pytest
import torch

from vla.threads import leave_cores_to


def test_threads_are_limited_and_given_back():
    before = torch.get_num_threads()
    with leave_cores_to(10_000):
        assert torch.get_num_threads() == 1
    with pytest.raises(KeyError), leave_cores_to(0):
        assert torch.get_num_threads() == min(before, len(os.sched_getaffinity(0)))
        raise KeyError
    assert torch.get_num_threads() == before
