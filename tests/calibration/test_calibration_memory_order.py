"""Chunks run with channels last where that is faster and makes no difference; else as the loader gave images."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import pytest
import torch
from calib_nets import batched, residual
from torch import Tensor, nn

import bnfix
from bnfix.calibration.judging import change
from bnfix.calibration.norms import Norms
from tests.nets import bits, lived_in, same_bits

EXACT = 1e-5
"""Float32 sums and another order of additions in convolutions give up to 1e-6."""
NOTE = "in another memory order (channels_last): the loader's was kept"

pytestmark = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available(), reason="convolutions of this build gain nothing from it"
)


class Net(nn.Module):
    """Two norms behind convolutions and one behind what tests put in between."""

    def __init__(self, channels: int = 3) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(channels, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.second = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.last = nn.BatchNorm1d(8 * 36)

    def flat(self, h: Tensor) -> Tensor:
        return h.flatten(1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.flat(self.second(self.first(x))))


class Views(Net):
    """Flattens as half of all tutorials do: it fails where channels are last."""

    def flat(self, h: Tensor) -> Tensor:
        return h.view(h.size(0), -1)


class ViewsManyOnly(Net):
    """The same from five samples on: a first look at two finds nothing."""

    def flat(self, h: Tensor) -> Tensor:
        return h.view(h.size(0), -1) if len(h) > 4 else h.flatten(1)


class ReadsMemory(Net):
    """Takes values where it expects them in memory: silently others where channels are last."""

    def flat(self, h: Tensor) -> Tensor:
        return torch.as_strided(h, (len(h), 8 * 36), (8 * 36, 1)) * torch.linspace(1, 3, 8 * 36)


class Asks(Net):
    """Does something else where its input is not contiguous."""

    def flat(self, h: Tensor) -> Tensor:
        return h.flatten(1) * (1 if h.is_contiguous() else 2)


class WritesToItsInput(Net):
    """Centres the images in place."""

    def forward(self, x: Tensor) -> Tensor:
        x -= 0.5
        return super().forward(x)


class AsksAndMixes(Asks):
    """Samples of a batch are mixed as well."""

    def flat(self, h: Tensor) -> Tensor:
        return super().flat(h - h.mean(0, keepdim=True) if len(h) > 4 else h)


@pytest.fixture
def orders(monkeypatch: pytest.MonkeyPatch) -> Counter[bool]:
    """How often norms of images saw channels last, and how often not, where chunks of more than two samples ran."""
    seen: Counter[bool] = Counter()
    sums = Norms.sums

    def noted(norms: Norms, place: Any, x: Tensor, samples: int, mask: Tensor | None) -> Any:
        if x.dim() == 4 and samples > 2:
            seen[x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()] += 1
        return sums(norms, place, x, samples, mask)

    monkeypatch.setattr(Norms, "sums", noted)
    return seen


def images(n: int = 70, channels: int = 3) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(n, channels, 6, 6, generator=generator) * 2 + torch.randn(n, 1, 1, 1, generator=generator)
    return batched(x, 16)


def made(net: type[nn.Module], *args: int) -> nn.Module:
    torch.manual_seed(1)
    return lived_in(net(*args))


@pytest.mark.parametrize("channels", [1, 3])
def test_images_go_through_with_channels_last(channels: int, orders: Counter[bool]) -> None:
    """One channel too: its images are in both orders at once."""
    model, data = made(Net, channels), images(channels=channels)
    report = bnfix.recalibrate(model, data)
    assert orders[True] > 0
    assert orders[False] == 0
    assert max(residual(model, data)) <= EXACT
    assert report.replay is not None
    assert 0 < report.replay <= 1e-5  # the loader's order gives other rounding: it was in fact another
    assert report.notes == ()


def test_the_users_images_keep_values_and_order() -> None:
    model, data = made(WritesToItsInput), images()
    before = [(x.clone(), x.stride()) for x in data]
    bnfix.recalibrate(model, data)
    assert all(torch.equal(x, was) and x.stride() == stride for x, (was, stride) in zip(data, before, strict=True))
    assert max(residual(model, [x.clone() for x in data])) <= EXACT


def test_what_fails_with_channels_last_runs_as_the_loader_gave_it(orders: Counter[bool]) -> None:
    """The first look finds out: nothing is run twice, and there is nothing to be said."""
    model, data = made(Views), images()
    report = bnfix.recalibrate(model, data)
    assert orders[True] == 0
    assert orders[False] > 0
    assert max(residual(model, data)) <= EXACT
    assert report.notes == ()


@pytest.mark.parametrize("net", [ViewsManyOnly, ReadsMemory, Asks])
@pytest.mark.parametrize("batch", [16, 70])
def test_a_forward_that_minds_the_order_keeps_the_loaders(net: type[nn.Module], batch: int) -> None:
    model = made(net)
    data = batched(torch.cat(images()), batch)
    report = bnfix.recalibrate(model, data)
    assert max(residual(model, data)) <= EXACT
    assert [NOTE in note for note in report.notes] == [True]
    assert report.engine in ("fibers", "threads", "one chunk")  # not one by one


def test_of_two_things_that_are_wrong_both_are_minded() -> None:
    model, data = made(AsksAndMixes), images()
    bnfix.recalibrate(model, data)
    assert max(residual(model, data)) <= EXACT


def test_nothing_is_laid_out_without_a_proof(orders: Counter[bool]) -> None:
    """One batch and certify=None: nobody would compare."""
    model, data = made(Asks), [torch.cat(images())]
    bnfix.recalibrate(model, data, certify=None)
    assert orders[True] == 0
    assert max(residual(model, data)) <= EXACT


def test_batches_that_forward_takes_whole_are_left_as_they_are(orders: Counter[bool]) -> None:
    model, data = made(Net), images()
    bnfix.recalibrate(model, data, forward=lambda m, x: m(x))
    assert orders[True] == 0
    assert max(residual(model, data)) <= EXACT


def test_where_convolutions_gain_nothing_all_is_left_as_it_is(orders: Counter[bool]) -> None:
    model, data = made(Net), images()
    with torch.backends.mkldnn.flags(enabled=False):  # type: ignore[no-untyped-call]
        bnfix.recalibrate(model, data)
    model = made(Net).double()
    bnfix.recalibrate(model, [x.double() for x in data])
    assert orders[True] == 0


def test_the_order_that_images_come_in_is_kept(orders: Counter[bool]) -> None:
    """channels_last from the loader stays so, also in a forward that minds."""
    model = made(ReadsMemory)
    data = [x.to(memory_format=torch.channels_last) for x in images()]
    report = bnfix.recalibrate(model, data)
    assert orders[False] == 0
    assert max(residual(model, data)) <= EXACT
    assert report.notes == ()


def test_a_model_that_minds_is_left_bit_for_bit_by_a_dry_run() -> None:
    model = made(Asks)
    before = bits(model)
    report = bnfix.recalibrate(model, images(), dry_run=True)
    assert same_bits(model, before)
    assert not report.changed


def test_statistics_that_stand_already_change_no_output_beyond_rounding() -> None:
    """The outputs before are those of the first look, and those after of the replay: in two orders."""
    model, data = made(Net), images()
    bnfix.recalibrate(model, data)
    again = bnfix.recalibrate(model, data)
    assert again.output_change is not None
    assert again.output_change <= 1e-5


def test_rounding_of_outputs_without_spread_is_no_change() -> None:
    """0/0, but for rounding."""
    a = torch.full((4, 2), 3.0)
    assert change(a, a * (1 + 2**-22)) == 0
    assert change(a, a + 1e-3) == math.inf
