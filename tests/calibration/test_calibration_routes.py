"""Which norms are met, how often, in which order and by which samples: by the data, by the code, or out of sight."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from calib_nets import FIBERS, Forward, distances, residual
from nets import CalledTwice, InPlainList, lived_in
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from trap_nets import EXACT, Two, as_is, exact, images, vectors

import bnfix
from bnfix.errors import CalibrationError
from bnfix.types import Recalibration

ways = pytest.mark.parametrize("forward", [None, as_is], ids=["joined", "as they are"])


def left_and_named(model: nn.Module, batches: list[Tensor], name: str, why: str) -> Recalibration:
    """One norm stays as it was and is named; all others are exact, given what it does."""
    lived_in(model)
    norm = model.get_submodule(name)
    before = (norm.running_mean.clone(), norm.running_var.clone())  # type: ignore[union-attr, operator]
    report = bnfix.recalibrate(model, batches)
    assert why in report.left_why[name]
    assert torch.equal(norm.running_mean, before[0])  # type: ignore[arg-type]
    assert torch.equal(norm.running_var, before[1])  # type: ignore[arg-type]
    others = {k: d for k, d in distances(model, batches).items() if k != name}
    assert max(max(d) for d in others.values()) <= EXACT
    return report


# One norm, several times.


class Recurrent(nn.Module):
    """One norm at eight time steps, each behind the one before; another behind all of them."""

    def __init__(self, steps: int = 8) -> None:
        super().__init__()
        self.inp, self.rec, self.steps = nn.Linear(4, 4), nn.Linear(4, 4), steps
        self.bn, self.out = nn.BatchNorm1d(4), nn.BatchNorm1d(4)

    def forward(self, x: Tensor) -> Tensor:
        h = self.inp(x)
        for _ in range(self.steps):
            h = torch.tanh(self.bn(self.rec(h) + self.inp(x)))
        return self.out(h)


class WhileLarge(Recurrent):
    """As often as the data of each batch asks for."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.inp(x)
        for _ in range(1 + int(x.abs().mean())):
            h = torch.tanh(self.bn(self.rec(h)))
        return self.out(h)


@ways
@pytest.mark.parametrize("count", [40, 400])
def test_the_same_norm_at_eight_time_steps(count: int, forward: Forward | None) -> None:
    report = exact(Recurrent(), vectors(count), forward)
    assert report.iterations > 1
    assert [s.call for s in report.layers if s.site == "bn"] == list(range(8))


@ways
def test_a_norm_behind_itself(forward: Forward | None) -> None:
    x = [torch.cat([b, b[:, :1]], 1) for b in images()]
    assert exact(CalledTwice(), x, forward).iterations > 1


def test_a_norm_in_a_loop_whose_length_depends_on_the_data() -> None:
    report = exact(WhileLarge(), vectors(), as_is)
    assert len({s.samples for s in report.layers if s.site == "bn"}) > 1  # not all batches go round as often


# Routes that depend on the data.


class Experts(nn.Module):
    """Each sample goes to one of three experts; a batch may leave one out."""

    def __init__(self) -> None:
        super().__init__()
        self.inp, self.out = nn.BatchNorm1d(4), nn.BatchNorm1d(4)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        h, route = self.inp(x), (x[:, 0] > 0).long() + (x[:, 0] > 2).long()
        out = torch.zeros_like(h)
        for i, expert in enumerate(self.experts):
            mine = (route == i).nonzero().flatten()
            if len(mine):
                out[mine] = expert(h[mine])
        return self.out(out)


@ways
@pytest.mark.parametrize("size", [3, 16])
def test_samples_that_go_to_different_experts(size: int, forward: Forward | None) -> None:
    report = exact(Experts(), vectors(240, size), forward)
    assert not report.never_called


class EarlyExit(nn.Module):
    """Easy batches leave early; behind the last norm comes most of the work."""

    def __init__(self) -> None:
        super().__init__()
        self.lin, self.bn1, self.bn2 = nn.Linear(4, 4), nn.BatchNorm1d(4), nn.BatchNorm1d(4)
        self.tail = nn.Sequential(nn.Linear(4, 1500), nn.ReLU(), nn.Linear(1500, 1500), nn.ReLU(), nn.Linear(1500, 4))

    def forward(self, x: Tensor) -> Tensor:
        h = self.bn1(self.lin(x))
        if x[:, 3].max() < 50:
            return self.tail(h)  # type: ignore[no-any-return]
        return self.bn2(self.tail(h))  # type: ignore[no-any-return]


@ways
def test_a_norm_behind_an_early_exit_that_most_chunks_take(forward: Forward | None) -> None:
    x = torch.cat(vectors(640))
    x[:, 3] -= 100
    x[300:330, 3] += 200
    report = exact(EarlyExit(), list(x.split(16)), forward)
    assert [s.site for s in report.layers] == ["bn1", "bn2"]


class Domains(nn.Module):
    """Domain-specific norms: the first sample's domain counts for the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.lin, self.out = nn.Linear(4, 4), nn.BatchNorm1d(4)
        self.norms = nn.ModuleList(nn.BatchNorm1d(4) for _ in range(3))

    def forward(self, x: Tensor, domain: Any) -> Tensor:
        of_batch = int(domain[0]) if isinstance(domain, Tensor) and domain.dim() else int(domain)
        return self.out(self.norms[of_batch](self.lin(x)))  # type: ignore[no-any-return]


@pytest.mark.parametrize("turns", [1, 7], ids=["in turns", "in blocks"])
@pytest.mark.parametrize("kind", ["each sample", "one-hot", "scalar", "number"])
def test_norms_of_the_domain_that_a_batch_comes_from(kind: str, turns: int) -> None:
    domains = [i // turns % 3 for i in range(25)]
    told: dict[str, Callable[[int, int], Any]] = {
        "each sample": lambda d, n: torch.full((n,), d),
        "one-hot": lambda d, n: torch.full((n, 1), float(d)),
        "scalar": lambda d, _: torch.tensor(d),
        "number": lambda d, _: d,
    }
    batches = [(x + d, told[kind](d, len(x))) for x, d in zip(vectors(), domains, strict=True)]
    model = lived_in(Domains())
    report = bnfix.recalibrate(model, batches)
    assert {s.site for s in report.layers} == {"norms.0", "norms.1", "norms.2", "out"}
    assert max(residual(model, batches, lambda m, b: m(*b))) <= EXACT


# Samples of a batch that know of one another: batches stay as they are.

KINSHIP: dict[str, Callable[[Tensor], Tensor]] = {
    "less the first": lambda y: y - y[:1],
    "less the last": lambda y: y - y[-1:],
    "less the mean": lambda y: y - y.mean(0),
    "added up": lambda y: y.cumsum(0) / len(y),
    "mirrored": lambda y: y + 0.3 * y.flip(0),
    "shifted": lambda y: y + y.roll(1, 0),
    "twenty before": lambda y: y + F.pad(y, (0, 0, 20, 0))[: len(y)],
    "halves": lambda y: y + 0.5 * torch.cat([y[len(y) // 2 :], y[: len(y) // 2]]),
}


class Related(nn.Module):
    """A layer that mixes the samples of a batch, and a norm."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.lin, self.bn, self.mix = nn.Linear(4, 4), nn.BatchNorm1d(4), KINSHIP[how]

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.mix(self.lin(x)))


@pytest.mark.parametrize("size", [24, 48])
@pytest.mark.parametrize("how", list(KINSHIP))
def test_samples_that_know_of_one_another(how: str, size: int) -> None:
    for count in (96, 480):
        report = exact(Related(how), vectors(count, size))
        assert any("kept as they are" in note for note in report.notes)


class Frames(nn.Module):
    """Temporal shift modules: eight frames of a video lie along the first axis."""

    def __init__(self) -> None:
        super().__init__()
        self.bn = nn.BatchNorm1d(4)

    def forward(self, x: Tensor) -> Tensor:
        video = x.view(-1, 8, 4)
        return self.bn(video[:, 0] + video.mean(1))


def test_frames_folded_into_the_first_axis() -> None:
    report = exact(Frames(), vectors(320, 32))
    assert "does not take a part of a batch" in report.why


def test_an_exported_program_for_one_batch_size_only() -> None:
    model = lived_in(
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))
    )
    exported = torch.export.export(model, (images()[0],)).module()
    report = bnfix.recalibrate(exported, images())
    assert len(report.layers) == 2
    model.load_state_dict(exported.state_dict())
    assert max(residual(model, images())) <= EXACT


# Out of sight: left, and named.


class InAThread(Two):
    """A norm that runs in a thread of the model's own."""

    def forward(self, x: Tensor) -> Tensor:
        done: list[Tensor] = []
        worker = threading.Thread(target=lambda: done.append(self.first(x).detach()))
        worker.start()
        worker.join()
        return self.second(done[0])


class InAThreadToo(Two):
    """One that runs there and here."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn1(self.conv1(x))
        done: list[Tensor] = []
        worker = threading.Thread(target=lambda: done.append(self.bn1(y * 2).detach()))
        worker.start()
        worker.join()
        return self.second(done[0])


class Disabled(Two):
    """A norm where no torch function is seen."""

    def forward(self, x: Tensor) -> Tensor:
        with torch._C.DisableTorchFunction():
            y = self.first(x)
        return self.second(y)


class DisabledToo(Two):
    """One that is called there and here."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn1(self.conv1(x))
        with torch._C.DisableTorchFunction():
            y = self.bn1(y + 3)
        return self.second(y)


@pytest.mark.parametrize(
    ("net", "why"),
    [
        (InAThread, "can't see it (a thread"),
        (Disabled, "can't see it (a thread"),
        (InAThreadToo, "also called where"),
        (DisabledToo, "also called where"),
    ],
)
def test_norms_that_run_out_of_sight(net: type[nn.Module], why: str) -> None:
    left_and_named(net(), images(), "bn1", why)


@pytest.mark.slow
def test_norms_inside_torch_cond() -> None:
    class Either(Two):
        def forward(self, x: Tensor) -> Any:
            y = self.conv1(x)
            return self.second(torch.cond(y.sum() > 0, self.bn1, torch.relu, (y,)))

    model = lived_in(Either())
    report = bnfix.recalibrate(model, images())
    assert [s.site for s in report.layers] == ["bn2"]
    assert "bn1" in (*report.never_called, *report.left)


def test_norms_that_a_lazy_forward_never_reaches() -> None:
    class Lazily(Two):
        def forward(self, x: Tensor) -> Any:
            y = self.first(x)
            return (self.second(v) for v in (y, y))

    model = lived_in(Lazily())
    assert bnfix.recalibrate(model, images()).never_called == ("bn2",)

    def all_of_it(m: nn.Module, b: Tensor) -> list[Tensor]:
        return list(m(b))

    assert exact(Lazily(), images(), all_of_it).never_called == ()

    class AllLazy(Two):
        def forward(self, x: Tensor) -> Any:
            yield self.second(self.first(x))

    with pytest.raises(CalibrationError, match="no batch norm was reached"):
        bnfix.recalibrate(lived_in(AllLazy()), images())


# Out of the ordinary, and seen all the same.


class Checkpointed(Two):
    """Activation checkpoints."""

    reentrant = True

    def forward(self, x: Tensor) -> Any:
        y = checkpoint(self.first, x, use_reentrant=self.reentrant)
        return checkpoint(self.second, y, use_reentrant=self.reentrant)


class CheckpointedAnew(Checkpointed):
    """The other kind."""

    reentrant = False


class Functional(Two):
    """torch.func.functional_call on its own parts."""

    def forward(self, x: Tensor) -> Any:
        for conv, norm in ((self.conv1, self.bn1), (self.conv2, self.bn2)):
            state = {**dict(norm.named_parameters()), **dict(norm.named_buffers())}
            x = torch.func.functional_call(norm, state, (conv(x),))
        return x


class Grads(Two):
    """Gradients inside of the forward."""

    def forward(self, x: Tensor) -> Any:
        with torch.enable_grad():
            x = x.requires_grad_()
            (slope,) = torch.autograd.grad(self.first(x).square().sum(), x)
        return self.second(F.relu(self.conv1(slope)))


@ways
@pytest.mark.parametrize("net", [Checkpointed, CheckpointedAnew, Functional, Grads])
def test_unusual_ways_to_call_a_norm(net: type[nn.Module], forward: Forward | None) -> None:
    assert exact(net(), images(), forward).engine == ("threads" if net is Grads else FIBERS)


def test_norms_inside_vmap() -> None:
    class Mapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lin, self.bn = nn.Linear(4, 4), nn.BatchNorm1d(4)

        def forward(self, x: Tensor) -> Tensor:
            return torch.vmap(lambda v: self.bn(self.lin(v)), in_dims=1)(x.view(-1, 2, 4))

    model = lived_in(Mapped())
    batches = vectors(400, 16, 8)
    bnfix.recalibrate(model, batches)
    with torch.no_grad():
        seen = model.lin(torch.cat(batches).view(-1, 4)).double()  # type: ignore[operator]
    torch.testing.assert_close(model.bn.running_mean.double(), seen.mean(0), rtol=1e-6, atol=1e-6)  # type: ignore[union-attr, operator]
    torch.testing.assert_close(model.bn.running_var.double(), seen.var(0), rtol=1e-6, atol=0)  # type: ignore[union-attr, operator]


def test_norms_in_a_plain_list() -> None:
    model = InPlainList()
    bnfix.recalibrate(model.eval(), images())
    with torch.no_grad():
        seen = model.layers[0](torch.cat(images())).double().transpose(0, 1).flatten(1)
    torch.testing.assert_close(model.layers[1].running_mean.double(), seen.mean(1), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(model.layers[1].running_var.double(), seen.var(1), rtol=1e-6, atol=0)
