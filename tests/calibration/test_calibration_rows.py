"""Norms whose input has several rows a sample: neighbours, or all samples one time after the other (torch.cat)."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from calib_nets import distances
from nets import lived_in
from torch import Tensor, nn
from trap_nets import EXACT

import bnfix
from bnfix.errors import CalibrationError

SAMPLES = 48


def spread(model: nn.Module, batch: tuple[Tensor, ...]) -> object:
    """How ``distances`` calls a model of three inputs."""
    return model(*batch)


class Joint(nn.Module):
    """Several views of a sample go through one trunk together, with a head that sees single vectors."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 8, 3, 2))
        self.head = nn.Sequential(nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 4), nn.BatchNorm1d(4))

    def features(self, x: Tensor) -> Tensor:
        return self.trunk(x).mean((2, 3))  # type: ignore[no-any-return]


class Single(Joint):
    """Whatever views there are, somebody else joins them."""

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))  # type: ignore[no-any-return]


class Siamese(Joint):
    """As ``torch.cat`` has them."""

    def forward(self, a: Tensor, p: Tensor, n: Tensor) -> tuple[Tensor, ...]:
        return self.head(self.features(torch.cat([a, p, n]))).chunk(3)  # type: ignore[no-any-return]


class Frames(Joint):
    """As ``flatten`` has them."""

    def forward(self, a: Tensor, p: Tensor, n: Tensor) -> Tensor:
        return self.head(self.features(torch.stack([a, p, n], 1).flatten(0, 1)))  # type: ignore[no-any-return]


class Directions(nn.Module):
    """A bidirectional layer: both directions of all samples, one after the other, and every step of each as a row."""

    def __init__(self) -> None:
        super().__init__()
        self.inp, self.bn, self.out = nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        both = self.inp(torch.cat([x, x.flip(1)]))
        steps = self.bn(both.flatten(0, 1)).unflatten(0, both.shape[:2])
        there, back = self.out(torch.tanh(steps)).chunk(2)
        return there + back.flip(1)  # type: ignore[no-any-return]


def triplets(size: int) -> list[tuple[Tensor, ...]]:
    """Anchors and positives are alike: their errors do not cancel."""
    a = torch.randn(SAMPLES, 3, 16, 16) + 2 * torch.randn(SAMPLES, 1, 1, 1)
    p, n = a + 0.1 * torch.randn_like(a), torch.randn_like(a)
    return [*zip(a.split(size), p.split(size), n.split(size), strict=True)]


def standard_error(of_sample: Tensor) -> Tensor:
    """sd/√N of the means of samples, (N, C)."""
    return of_sample.double().std(0) / len(of_sample) ** 0.5


def assert_errors_of_views(report: bnfix.Recalibration, model: Joint, batches: list[tuple[Tensor, ...]]) -> None:
    """The first norm's standard errors are those of samples: means over all views of each."""
    views = torch.stack([torch.cat(views) for views in zip(*batches, strict=True)], 1)
    with torch.no_grad():
        first = model.trunk[0](views.flatten(0, 1)).mean((2, 3)).unflatten(0, (SAMPLES, 3)).mean(1)
    found = torch.tensor(report.layers[0].se_mean, dtype=torch.float64)
    # float32 sums over 196 positions
    torch.testing.assert_close(found, standard_error(first), rtol=1e-4, atol=0)


@pytest.mark.parametrize("net", [Siamese, Frames])
@pytest.mark.parametrize("size", [2, 16])
def test_views_joined_inside_a_forward_stay_with_their_sample(net: Callable[[], Joint], size: int) -> None:
    torch.manual_seed(0)
    model, batches = lived_in(net()), triplets(size)
    report = bnfix.recalibrate(model, batches)
    assert report.notes == ()  # nothing is mixed
    assert report.engine == "one chunk"  # small batches are joined
    assert max(max(d) for d in distances(model, batches, spread).values()) <= EXACT
    assert report.layers[0].samples == SAMPLES
    assert_errors_of_views(report, model, batches)


@pytest.mark.parametrize("size", [4, 16])
@pytest.mark.parametrize("join", [torch.cat, lambda views: torch.stack(views, 1).flatten(0, 1)], ids=["cat", "stack"])
def test_views_that_forward_joins_stay_with_their_sample(join: Callable[..., Tensor], size: int) -> None:
    """The line that bnfix itself proposes for triplets."""
    torch.manual_seed(0)
    model, batches = lived_in(Single()), triplets(size)
    report = bnfix.recalibrate(model, batches, forward=lambda m, views: m(join(views)))
    assert max(max(d) for d in distances(model, [join(views) for views in batches]).values()) <= EXACT
    assert report.layers[0].samples == SAMPLES
    assert_errors_of_views(report, model, batches)


def test_a_forward_that_takes_no_single_sample() -> None:
    """Rows can't be told apart then, and are taken as neighbours; nothing fails."""

    def forward(model: nn.Module, views: tuple[Tensor, ...]) -> object:
        assert len(views[0]) > 1
        return model(torch.cat(views))

    torch.manual_seed(0)
    model, batches = lived_in(Single()), triplets(8)
    assert bnfix.recalibrate(model, batches, forward=forward).layers[0].samples == SAMPLES
    assert max(max(d) for d in distances(model, [torch.cat(views) for views in batches]).values()) <= EXACT


@pytest.mark.filterwarnings("ignore:Sparse")
@pytest.mark.parametrize("sparse", [Tensor.to_sparse, Tensor.to_sparse_csr], ids=["coo", "csr"])
def test_views_in_a_layout_that_has_no_rows_to_be_cut(sparse: Callable[[Tensor], Tensor]) -> None:
    torch.manual_seed(0)
    model, x = lived_in(nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 2))), torch.randn(SAMPLES, 3)
    pairs = [(sparse(b), sparse(b + 1)) for b in x.split(8)]
    dense = [torch.cat([a.to_dense() for a in pair]) for pair in pairs]
    bnfix.recalibrate(model, pairs, forward=lambda m, b: m(torch.cat([a.to_dense() for a in b])))
    assert max(max(d) for d in distances(model, dense).values()) <= EXACT


def test_both_directions_of_a_recurrent_layer() -> None:
    torch.manual_seed(0)
    model = lived_in(Directions())
    x = torch.randn(SAMPLES, 7, 5) + torch.randn(SAMPLES, 1, 5)
    report = bnfix.recalibrate(model, [*x.split(5)])
    assert report.notes == ()
    assert max(max(d) for d in distances(model, [*x.split(5)]).values()) <= EXACT
    with torch.no_grad():
        expected = standard_error(model.inp(x).mean(1))
    found = torch.tensor(report.layers[0].se_mean, dtype=torch.float64)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=0)


@pytest.mark.parametrize("method", ["population", "online"])
def test_streams_too(method: str) -> None:
    torch.manual_seed(0)
    model = lived_in(Siamese())
    batches = triplets(12)
    report = bnfix.recalibrate(model, batches, method=method)
    assert_errors_of_views(report, model, batches)


def test_the_batch_whose_activations_overflow_is_the_one_that_is_named() -> None:
    torch.manual_seed(0)
    batches = triplets(4)
    batches[7][2][1] = 3e38
    with pytest.raises(CalibrationError, match=r"^batch 7: trunk\.1"):
        bnfix.recalibrate(lived_in(Siamese()), batches)


class Centred(Siamese):
    """Samples are mixed, besides."""

    def features(self, x: Tensor) -> Tensor:
        seen = super().features(x)
        return seen - 0.5 * seen.mean(0)


class Counting(Siamese):
    """What norms see depends on how many samples there are, not on which."""

    def features(self, x: Tensor) -> Tensor:
        return super().features(x) * (1 + 1e-3 * len(x))


@pytest.mark.parametrize(
    ("net", "why"), [(Centred, "samples are mixed within a batch"), (Counting, "samples alone and among others differ")]
)
def test_what_depends_on_the_others_and_what_on_their_number(net: Callable[[], nn.Module], why: str) -> None:
    torch.manual_seed(0)
    model, batches = lived_in(net()), triplets(8)
    report = bnfix.recalibrate(model, batches)
    assert report.notes[0].startswith(why)
    assert "the loader's batches were kept as they are" in report.notes[0]
    assert max(max(d) for d in distances(model, batches, spread).values()) <= EXACT
