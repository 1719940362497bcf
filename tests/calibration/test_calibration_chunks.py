"""How samples are cut into chunks, and that those which are looked at first are those which are run again."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from calib_nets import batched, residual
from hypothesis import given
from hypothesis import strategies as st
from nets import lived_in
from torch import nn
from trap_nets import EXACT, sizes_of_calls

import bnfix
from bnfix.calibration.chunks import LEAST, Chunk, pieces
from bnfix.running import Call


def cut(total: int, most: int) -> list[Chunk]:
    numbers = torch.arange(float(total)).unsqueeze(1)
    return pieces([Chunk(Call((numbers,)), total, (0,) * total)], most)


@given(st.integers(1, 3000), st.integers(LEAST, 200))
def test_all_samples_in_order_in_chunks_alike_but_the_last(total: int, most: int) -> None:
    chunks = cut(total, most)
    found = torch.cat([c.call.args[0] for c in chunks]).flatten().tolist()
    assert found == [*range(total)]
    sizes = [c.samples for c in chunks]
    assert min(sizes) >= min(LEAST, total)
    assert max(sizes) <= most or len(sizes) == total // LEAST  # no smaller ones than LEAST to be had
    changes = [b - a for a, b in pairwise(sizes) if a != b]
    assert len(changes) <= 1  # two sizes at most, each in one run
    assert len(sizes) < 3 or sizes.count(sizes[0]) >= len(sizes) / 2


@pytest.mark.parametrize(
    ("samples", "looks"), [(16, 2), (40, 2), (128, 2), (150, 3), (256, 3), (384, 2), (601, 2), (640, 2), (1020, 2)]
)
def test_the_samples_looked_at_are_run_again_and_no_others(
    samples: int, looks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two looks at two samples: their outputs before and after tell how far the outputs change.

    Of two chunks both are proven: what the one leaves behind, only the other may read.
    """
    ran = sizes_of_calls(monkeypatch)
    torch.manual_seed(0)
    model = lived_in(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 5, 3)))
    data = batched(torch.randn(samples, 3, 6, 6), 16)
    report = bnfix.recalibrate(model, data)
    small = [size for size in ran if size < LEAST]
    assert (small, sum(ran)) == ([2] * looks, samples + 2 * looks)
    assert report.replay is not None
    assert report.output_change is not None
    assert max(residual(model, data)) <= EXACT
