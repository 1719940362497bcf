"""Memory asked of the system once: it is there inside, stays or goes back as promised, and nothing else is touched."""

from __future__ import annotations

import ctypes
import os
import resource
import subprocess
import sys

import pytest
import torch

from bnfix.running import kept_heap

MB = 1 << 20
GLIBC = sys.platform == "linux" and hasattr(ctypes.CDLL(None), "gnu_get_libc_version")
ALONE = """
import resource, torch
from bnfix.running import give_back, heap, kept_heap
def resident(): return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()
def faults(): return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
def waves():
    for size in (9, 5, 10, 4, 11) * 3:  # MB: as activations grow and shrink from norm to norm
        held = [torch.ones(size << 20, dtype=torch.uint8) for _ in range(20)]
        del held
waves()
give_back()
before = resident()
heap._KEPT = int(__import__("sys").argv[1]) << 20
with kept_heap(280 << 20):
    inside, start = resident(), faults()
    waves()
    within = faults() - start
    below = [torch.ones(1 << 20, dtype=torch.uint8) for _ in range(200)]
    pinned = torch.ones(30_000)  # a small one that stays, above all that
    del below
left, start = resident(), faults()
with kept_heap(280 << 20):
    waves()
again = faults() - start
give_back()
print(within, (inside - before) >> 20, (left - before) >> 20, again, (resident() - before) >> 20)
"""
PAGES = 220 * MB // resource.getpagesize()
"""What the largest wave needs. 280 MB are made ready: with less, the one small tensor that stays can lie where there is
no room for the last block of a wave, which is then fetched each time."""


def alone(most: int) -> list[int]:
    """In a process of its own: what other tests left in the heap would be used first."""
    plain = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    call = [sys.executable, "-c", ALONE, str(most)]
    done = subprocess.run(call, capture_output=True, text=True, check=True, env=plain)
    found = [*map(int, done.stdout.split())]
    if found[1] < 200:
        pytest.skip("the kernel does not fetch pages at once")
    return found


@pytest.mark.skipif(not GLIBC, reason="glibc's allocator")
def test_pages_are_fetched_once_and_go_back() -> None:
    within, gained, left, _, kept = alone(200)
    assert gained < 300
    assert within < PAGES / 10  # each page of the first wave, at least, without
    assert left < 10
    assert kept < 10


@pytest.mark.skipif(not GLIBC, reason="glibc's allocator")
def test_what_stays_serves_the_next_time_and_can_be_given_back() -> None:
    _, _, left, again, kept = alone(300)
    assert 250 < left < 300
    assert again < PAGES / 10
    assert kept < 10


def test_values_inside_are_those_written() -> None:
    with kept_heap(8 * MB):
        held = [torch.full((MB,), i, dtype=torch.uint8) for i in range(12)]
    assert all(bool((t == i).all()) for i, t in enumerate(held))


@pytest.mark.parametrize("count", [0, 5, MB, 3 * MB + 17])
def test_any_count_and_an_exception(count: int) -> None:
    with pytest.raises(KeyError), kept_heap(count):
        raise KeyError
