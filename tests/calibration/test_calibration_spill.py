"""``spill_dir``: inputs and waiting activations in files, the memory free for one chunk."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import bnfix
from bnfix.calibration.spill import LEAST, Spiller

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="spilling to files needs Linux")

BATCHES, SIZE = 24, (16, 3, 160, 160)
INPUTS = BATCHES * 16 * 3 * 160 * 160 * 4


def anonymous() -> int:
    """Bytes of this process that no file stands behind."""
    found = re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


class Watched:
    """Batches made as they are asked for; notes how much memory is taken then."""

    def __init__(self) -> None:
        self.seen: list[int] = []

    def __iter__(self) -> Iterator[Tensor]:
        for seed in range(BATCHES):
            self.seen.append(anonymous())
            yield torch.randn(SIZE, generator=torch.Generator().manual_seed(seed)) + seed / 10


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 8, stride=8), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 1))


@pytest.mark.parametrize("spilled", [True, False])
def test_inputs_do_not_stay_in_memory(tmp_path: Path, spilled: bool) -> None:
    model, data = net(), Watched()
    model[0].register_forward_hook(lambda *_: data.seen.append(anonymous()))
    report = bnfix.recalibrate(model, data, spill_dir=tmp_path if spilled else None)
    assert report.n == BATCHES * SIZE[0]
    assert report.method == "staged"
    taken = max(data.seen) - data.seen[0]
    # One chunk of 128 samples and the batch being read come to less than half of all, twice over where they are joined.
    assert taken < INPUTS * 0.6 if spilled else taken > INPUTS * 0.9
    x = torch.cat([model[0](batch).detach() for batch in Watched()]).double()
    torch.testing.assert_close(model[1].running_mean.double(), x.mean((0, 2, 3)), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(model[1].running_var.double(), x.var((0, 2, 3)), rtol=1e-5, atol=1e-6)
    assert not list(tmp_path.iterdir())


def test_an_input_in_a_file_is_the_same(tmp_path: Path) -> None:
    spiller = Spiller(tmp_path)
    whole = torch.randn(8, 6, 40, 40)
    for tensor in (
        whole,
        whole[2:5],
        whole.contiguous(memory_format=torch.channels_last),
        whole.permute(0, 2, 3, 1),
        whole[:, ::2],
        whole[:1].expand(8, 6, 40, 40),
        torch.randint(0, 1 << 40, (300, 100)),
    ):
        there = spiller.kept(tensor)
        assert there.dtype == tensor.dtype
        assert torch.equal(there, tensor)
        assert there.is_contiguous(memory_format=torch.channels_last) == tensor.is_contiguous(
            memory_format=torch.channels_last
        )
        assert there.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
        assert spiller.drop(there.untyped_storage())  # it does lie in a file
        assert torch.equal(there, tensor)
    for tensor in (torch.ones(3), torch.ones(LEAST // 4 - 1), torch.ones(400, 400).to_sparse(), nn.Parameter(whole)):
        assert spiller.kept(tensor) is tensor
    assert not list(tmp_path.iterdir())


def test_files_take_no_descriptors(tmp_path: Path) -> None:
    """Each mapping kept one: behind a thousand batches it was "too many open files"."""
    spiller, held = Spiller(tmp_path), len(os.listdir("/proc/self/fd"))
    kept = [spiller.kept(torch.full((200, 200), float(i))) for i in range(20)]
    assert len(os.listdir("/proc/self/fd")) == held
    assert all(spiller.drop(t.untyped_storage()) for t in kept)
    assert [t.mean().item() for t in kept] == list(range(20))
    maps = Path("/proc/self/maps")
    mine = f"{tmp_path}/"
    assert maps.read_text().count(mine) == 20
    del kept
    assert maps.read_text().count(mine) == 0
