"""Samples that depend on the batch that the loader gave them in: its batches are kept as they are, or it is said."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from calib_nets import residual
from nets import lived_in
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from trap_nets import EXACT, sizes_of_calls

import bnfix

Between = Callable[..., Tensor]


class Net(nn.Module):
    """Two norms, and ``between`` before the first of them."""

    def __init__(self, between: Between, **parts: nn.Module) -> None:
        super().__init__()
        self.a, self.bn1, self.b, self.bn2 = nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 8), nn.BatchNorm1d(8)
        self.between, self.parts = between, nn.ModuleDict(parts)

    def forward(self, x: Tensor) -> Tensor:
        return self.rest(x)

    def rest(self, x: Tensor, *more: Tensor) -> Tensor:
        y = self.bn1(self.between(self, self.a(x), *more))
        out: Tensor = self.bn2(self.b(y.relu()))
        return out


class Net2(Net):
    """The same, with another input."""

    def forward(self, x: Tensor, other: Tensor) -> Tensor:  # type: ignore[override]
        return self.rest(x, other)


def feed(model: nn.Module, batch: Any) -> Any:
    return model(*batch)


def cut(size: int, *tensors: Tensor) -> list[tuple[Tensor, ...]]:
    return list(zip(*(t.split(size) for t in tensors), strict=True))


def fixed(model: nn.Module, data: Sequence[Any], **options: Any) -> bnfix.Recalibration:
    """Recalibrated, and at the fixed point of the loader's own batches, by plain forwards in float64."""
    report = bnfix.recalibrate(lived_in(model), data, **options)
    assert max(residual(model, data, feed)) <= EXACT
    return report


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def relative(_net: Net, h: Tensor, t: Tensor) -> Tensor:
    return h * (t / t.max())[:, None]


@pytest.mark.parametrize("size", [16, 60, 120])
def test_relative_to_the_longest_of_the_batch_where_the_longest_come_first(size: int) -> None:
    """The first samples hold what is the longest of any batch that they are in."""
    t = torch.randint(3, 21, (120,)).sort(descending=True).values
    fixed(Net2(relative), cut(size, torch.randn(120, 8), t))


@pytest.mark.parametrize("share", [0.3, 0.6])
def test_relative_to_the_longest_of_the_batch_where_many_are_as_long(share: float) -> None:
    t = torch.where(torch.rand(96) < share, 20, torch.randint(3, 12, (96,)))
    fixed(Net2(relative), cut(4, torch.randn(96, 8), t))


@pytest.mark.parametrize("size", [4, 8, 96])
@pytest.mark.parametrize("views", [4, 8])
def test_places_within_a_batch(size: int, views: int) -> None:
    """Some views a sample, told apart by their place: a single batch of the loader's keeps its order."""
    by_place = lambda _net, h: h * (torch.arange(len(h)) % views + 1).to(h)[:, None]  # noqa: E731
    fixed(Net(by_place), cut(size, torch.randn(96, 8)))


@pytest.mark.parametrize("values", [1, 8, 64])
def test_an_input_of_the_whole_batch_of_which_the_first_row_is_used(values: int) -> None:
    tilt = lambda _net, h, table: h * table[0].flatten().tanh().sum()  # noqa: E731
    data = [(torch.randn(48, 8), torch.randn(1, values).expand(48, values).contiguous()) for _ in range(6)]
    fixed(Net2(tilt), data)


@pytest.mark.parametrize(("total", "size"), [(33, 16), (33, 1)])
def test_batches_of_one_sample_that_the_forward_treats_as_such(total: int, size: int) -> None:
    several = lambda net, h: net.parts["c"](h) if len(h) > 1 else h  # noqa: E731
    report = bnfix.recalibrate(
        model := lived_in(Net(several, c=nn.BatchNorm1d(8))), data := cut(size, torch.randn(total, 8) * 2)
    )
    assert max(residual(model, data, feed)) <= EXACT
    assert ("parts.c" in {layer.site for layer in report.layers}) == (size > 1)


def test_single_samples_of_which_the_first_tells_the_domain() -> None:
    by_domain = lambda net, h, d: h + net.parts["e"](d[:1])  # noqa: E731
    fixed(Net2(by_domain, e=nn.Embedding(3, 8)), cut(1, torch.randn(40, 8), torch.arange(40) // 20))


class Deep(nn.Module):
    """As many blocks as the deepest sample of the batch asks for, behind them a head that takes its time."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(16, 16) for _ in range(6))
        self.norms = nn.ModuleList(nn.BatchNorm1d(16) for _ in range(6))
        self.head, self.order = nn.Linear(16, 10), torch.arange(6)

    def forward(self, x: Tensor, depth: Tensor) -> Tensor:
        for _, block, norm in zip(self.order[: depth.max()], self.blocks, self.norms, strict=False):
            x = x + norm(block(x)).relu()
        return self.head(x).softmax(1)  # type: ignore[no-any-return]


def test_chunks_with_norms_ahead_are_not_ended_with_the_first() -> None:
    depth = torch.cat((torch.full((256,), 3), torch.full((128,), 6)))
    assert not fixed(Deep(), cut(128, torch.randn(384, 16), depth)).never_called


@torch.jit.script
def damped(x: Tensor) -> Tensor:
    if bool(x.max() > 1.2):
        x = x / 10
    return x


def test_a_branch_in_torchscript() -> None:
    model = lived_in(Net(lambda _net, h: damped(h)))
    x = torch.randn(96, 8) * 0.3
    x[::11] = model.a.weight[0].detach().sign() * 3
    bnfix.recalibrate(model, data := cut(4, x))
    assert max(residual(model, data, feed)) <= EXACT


def sized(_net: Net, h: Tensor, t: Tensor) -> Tensor:
    """Tensors as large as the batch's longest, whatever takes their size from it."""
    longest = t.max()
    takes = [h[:, :longest], torch.zeros(longest), h.narrow(1, 0, longest), F.one_hot(t), h.split(longest, 1)[0]]  # type: ignore[arg-type,call-overload]
    return h + sum(part.shape[-1] for part in takes) / 8


def test_sizes_that_are_taken_from_tensors() -> None:
    t = torch.where(torch.rand(96) < 0.5, 8, torch.randint(1, 8, (96,)))
    report = fixed(Net2(sized), cut(4, torch.randn(96, 8), t))
    assert "the way through the model may depend on what is in a batch" in report.why


class Packed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words, self.lstm = nn.Embedding(50, 12), nn.LSTM(12, 8, batch_first=True, bidirectional=True)
        self.bn, self.conv, self.bn2 = nn.BatchNorm1d(16), nn.Conv1d(16, 8, 3, padding=1), nn.BatchNorm1d(8)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        packed = pack_padded_sequence(self.words(x), lengths, batch_first=True, enforce_sorted=False)
        h, _ = pad_packed_sequence(self.lstm(packed)[0], batch_first=True)
        out: Tensor = self.bn2(self.conv(self.bn(h.transpose(1, 2))))
        return out


@pytest.mark.parametrize("seed", range(3))
def test_packed_sequences_are_as_long_as_the_longest_of_the_batch(seed: int) -> None:
    torch.manual_seed(seed)
    lengths = torch.where(torch.rand(96) < 0.5, torch.randint(3, 15, (96,)), 20)
    fixed(Packed(), cut(4, torch.randint(0, 50, (96, 20)), lengths))


def test_a_rare_way_among_very_many_batches_is_said_to_be_possible() -> None:
    model = lived_in(Net(lambda _net, h: h / 10 if h.max() > 100 else h))
    report = bnfix.recalibrate(model, cut(2, torch.randn(600, 8)))
    assert any("there are more than 256 batches" in note for note in report.notes)


def test_the_full_certificate_is_of_the_loaders_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a user would run them: joined ones would repeat what joining them may have changed."""
    sizes = sizes_of_calls(monkeypatch)
    report = bnfix.recalibrate(lived_in(Net(lambda _net, h: h)), cut(3, torch.randn(60, 8)), certify="full")
    assert sizes.count(3) == 40  # before, and after
    assert report.residual is not None
    assert max(report.residual.mean, report.residual.var) <= EXACT


class Reused(nn.Module):
    """Returns the same memory each time."""

    def __init__(self) -> None:
        super().__init__()
        self.bn, self.head = nn.BatchNorm1d(8), nn.Linear(8, 3)
        self.outputs: dict[int, Tensor] = {}

    def forward(self, x: Tensor) -> Tensor:
        y = self.head(self.bn(x))
        return self.outputs.setdefault(len(x), torch.empty_like(y)).copy_(y)


@pytest.mark.parametrize("options", [{"when": "needed"}, {"dry_run": True}, {}])
def test_outputs_in_memory_that_the_model_uses_again(options: dict[str, Any]) -> None:
    model = lived_in(Reused())
    model.bn.running_mean += 20
    report = bnfix.recalibrate(model, list(torch.randn(96, 8).split(16)), **options)
    assert report.output_change is not None
    assert report.output_change > 5
    assert report.changed == (not options.get("dry_run", False))


def test_what_the_first_batch_sets_up_in_an_attribute() -> None:
    class First(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bn = nn.BatchNorm1d(8)
            self.centre: Tensor | None = None

        def forward(self, x: Tensor) -> Tensor:
            if self.centre is None:
                self.centre = x.detach().mean(0)
            return self.bn(x - self.centre)  # type: ignore[no-any-return]

    x = torch.randn(96, 8) + torch.arange(96.0)[:, None] / 20
    report = bnfix.recalibrate(model := lived_in(First()), list(x.split(8)))
    assert any("depends on earlier calls" in note for note in report.notes)
    torch.testing.assert_close(model.bn.running_mean, x.mean(0) - x[:8].mean(0), rtol=0, atol=1e-5)


@pytest.mark.parametrize(("total", "size"), [(134, 2), (402, 2), (300, 6), (96, 4)])
def test_pairs_within_a_batch_are_not_cut_apart(total: int, size: int) -> None:
    def centred(_net: Net, h: Tensor) -> Tensor:
        pairs = h.view(-1, 2, 8)
        return (pairs - pairs.mean(1, keepdim=True)).flatten(0, 1)

    x = torch.randn(total, 8) * 2 + 3 * torch.randn(total // 2, 8).repeat_interleave(2, 0)
    fixed(Net(centred), cut(size, x))


@pytest.mark.parametrize("seed", range(3))
def test_single_samples_of_mixed_domains_of_which_the_first_tells(seed: int) -> None:
    torch.manual_seed(seed)
    by_domain = lambda net, h, d: h + net.parts["e"](d[:1])  # noqa: E731
    fixed(Net2(by_domain, e=nn.Embedding(3, 8)), cut(1, torch.randn(40, 8), torch.randint(0, 2, (40,))))
