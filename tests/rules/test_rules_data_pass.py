"""The one pass over the data: what is read, what is measured, and that nothing is left of it."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import numpy
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from nets import Stashing, lived_in
from rules.data_common import Counting, alarms, codes, reason, untouched
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import bnfix
from bnfix.errors import BnfixError, CalibrationError
from bnfix.evidence.loading import read
from bnfix.evidence.measuring import of_data
from bnfix.rules.data_cases import batches, conv_net, fit, head_net, images, norms_of

# ---------------------------------------------------------------------------------------- reading


def test_one_pass_serves_all_rules_and_the_graph() -> None:
    data = Counting(batches(images()))
    found = bnfix.check(fit(conv_net(), data.batches), data=data)
    assert (data.passes, data.taken) == (1, 24)
    assert {"BN204", "BN301", "BN303", "BN304"} <= set(found.checked)


def test_a_generator_gives_its_first_batch_to_the_graph_as_well() -> None:
    x = images(160)
    drawn: list[int] = []

    def stream() -> Iterator[Tensor]:
        for i, batch in enumerate(batches(x)):
            drawn.append(i)
            yield batch

    model = fit(conv_net(), [x])
    from bnfix.evidence import of_model

    evidence = of_model(model, data=stream())
    assert drawn == list(range(10))
    assert evidence.facts is not None
    assert evidence.data is not None
    assert evidence.data.samples == 160
    assert evidence.data.whole


def test_data_without_an_end_is_read_in_part() -> None:
    taken = itertools.count()

    def endless() -> Iterator[Tensor]:
        while True:
            next(taken)
            yield images(64, seed=1)

    found = bnfix.check(fit(conv_net(), [images(64, seed=1)]), data=endless())
    assert found.clean
    assert next(taken) <= 33
    assert found.seen == ("measured on 2,048 samples, 32 batches",)


@pytest.mark.parametrize(
    "shape", [lambda x: x, lambda x: (x, torch.zeros(len(x), dtype=torch.long)), lambda x: {"input": x, "label": 1}]
)
def test_batches_of_every_kind(shape: Any) -> None:
    data = [shape(x) for x in batches(images())]
    assert bnfix.check(fit(conv_net(), [images()]), data=data).clean


def test_large_batches_give_a_part_drawn_at_random_and_enough_of_them_are_read() -> None:
    rows = torch.arange(256.0)
    data = Counting([(rows + 256 * i)[:, None] for i in range(40)])
    model = nn.Sequential(nn.BatchNorm1d(1), nn.Linear(1, 2)).eval()
    sample = read(data, model)
    assert 20 <= data.taken == len(sample.chunks) <= 24
    assert sample.sizes == (256,) * len(sample.chunks)
    assert 2048 <= sample.samples < 2200
    for chunk in sample.chunks:
        taken = chunk.call.args[0].flatten() % 256
        assert len(set(taken.tolist())) == len(taken)
        assert taken.min() < 64
        assert taken.max() > 192
    assert sample.cut
    assert not sample.whole


def test_large_samples_are_kept_within_memory() -> None:
    from bnfix.evidence import loading

    data = [torch.zeros(4, 3, 512, 512) for _ in range(40)]  # 12.6 MB each
    sample = read(data, nn.Sequential(nn.BatchNorm2d(3)))
    held = sum(t.numel() * 4 for c in sample.chunks for t in c.call.tensors())
    assert held <= loading.BYTES + 4 * 3 * 512 * 512 * 4
    assert len(sample.chunks) >= 20


def test_a_loader_in_order_is_read_all_over_and_a_shuffled_one_as_it_comes() -> None:
    x = torch.arange(9600.0)[:, None]
    model = nn.Sequential(nn.BatchNorm1d(1)).eval()
    ordered = read(DataLoader(TensorDataset(x), 32), model)
    firsts = [c.call.args[0][0].item() for c in ordered.chunks]
    assert ordered.step == 4
    assert firsts == [128.0 * i for i in range(len(firsts))]
    assert max(firsts) > 0.85 * 9600 or len(firsts) == 64
    assert ordered.seen() == "2,048 of 9,600 samples, 64 batches, every 4th one"
    shuffled = read(DataLoader(TensorDataset(x), 32, shuffle=True), model)
    assert shuffled.step == 1
    assert shuffled.loader.shuffles is True
    assert shuffled.stands_for_all


def test_what_loaders_say_of_themselves() -> None:
    class Stream(IterableDataset[Tensor]):
        def __iter__(self) -> Iterator[Tensor]:
            return iter(torch.arange(64.0)[:, None])

    model = nn.Sequential(nn.BatchNorm1d(1)).eval()
    stream = read(DataLoader(Stream(), batch_size=16), model).loader
    assert (stream.batch_size, stream.dataset, stream.batches) == (16, None, None)
    own = DataLoader(TensorDataset(torch.arange(64.0)[:, None]), batch_sampler=[[0, 1, 2], [3, 4]])
    facts = read(own, model).loader
    assert (facts.batch_size, facts.drop_last, facts.batches) == (None, None, 2)


def test_generators_of_a_loader_are_as_they_were() -> None:
    rng = torch.Generator().manual_seed(3)
    loader = DataLoader(images(), batch_size=16, shuffle=True, generator=rng)  # type: ignore[arg-type]
    before = rng.get_state()
    bnfix.check(fit(conv_net(), [images()]), data=loader)
    assert torch.equal(before, rng.get_state())


# ------------------------------------------------------------------------------------- left alone


def test_a_model_in_any_state_is_left_as_it_was() -> None:
    model = lived_in(Stashing()).train()
    model.bn.eval()
    model.conv.weight.grad = torch.ones_like(model.conv.weight)
    model.last = None
    data = batches(images(192), 8)
    with untouched(model):
        bnfix.check(model, data=data)


def test_a_loader_that_raises_is_one_clear_error() -> None:
    def failing() -> Iterator[Tensor]:
        yield from batches(images(48))
        raise OSError("disk on fire")

    model = fit(conv_net(), [images()])
    with (
        untouched(model),
        pytest.raises(CalibrationError, match="the data raised after batch 2: OSError: disk on fire"),
    ):
        bnfix.check(model, data=failing())


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ([], "the data holds no batch"),
        ([torch.full((4, 3, 6, 6), float("nan"))], "batch 0 holds NaN or Inf"),
        ([(torch.ones(4, 3, 6, 6), torch.ones(4, 3, 6, 6))], "several inputs"),
        ([torch.ones(4, 5, 6, 6)], "the forward failed"),
    ],
)
def test_data_that_is_unusable_is_said(data: Any, said: str) -> None:
    model = fit(conv_net(), [images()])
    with untouched(model), pytest.raises(BnfixError, match=said):
        bnfix.check(model, data=data)


@pytest.mark.parametrize("at", [3, 20, 45])
def test_an_interrupt_leaves_nothing(at: int) -> None:
    class Interrupted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = fit(conv_net(), [images()])

        def forward(self, x: Tensor) -> Any:
            counts["calls"] += 1
            if counts["calls"] == at:
                raise KeyboardInterrupt
            return self.net(x)

    counts = {"calls": 0}
    model = Interrupted().eval()
    with untouched(model), pytest.raises(KeyboardInterrupt):
        bnfix.check(model, data=batches(images()))


def test_progress_says_what_is_done() -> None:
    lines: list[str] = []
    bnfix.check(fit(conv_net(), [images()]), data=batches(images()), progress=lines.append)
    assert "measuring: batch 24 of 24" in lines
    assert any("halves" in line for line in lines)


# --------------------------------------------------------------------------------------- measured


@given(
    sizes=st.lists(st.integers(2, 9), min_size=2, max_size=6),
    scale=st.sampled_from([1e-3, 1.0, 1e3]),
    shift=st.sampled_from([0.0, 5.0, -300.0]),
)
@settings(max_examples=25)
def test_moments_are_those_of_the_inputs(sizes: list[int], scale: float, shift: float) -> None:
    rng = torch.Generator().manual_seed(sum(sizes))
    data = [scale * (shift + torch.randn(n, 3, 2, 2, generator=rng)) for n in sizes]
    model = nn.Sequential(nn.BatchNorm2d(3)).eval()
    (site,) = of_data(model, data).sites
    exact = [x.double() for x in data]
    everything = torch.cat(exact)
    assert site.positions == 4
    assert site.batch_n.tolist() == [4 * n for n in sizes]
    sigma = everything.std((0, 2, 3)).numpy()
    # float32 sums of squares: 1e-6 of the variance, or an exact second look where that would cancel
    for i, x in enumerate(exact):
        assert numpy.allclose((site.batch_mean[i] - x.mean((0, 2, 3)).numpy()) / sigma, 0, atol=1e-4)
        assert numpy.allclose(site.batch_var[i], x.var((0, 2, 3), correction=0).numpy(), rtol=1e-3)
    assert numpy.allclose(site.var, everything.var((0, 2, 3)).numpy(), rtol=1e-3)
    assert numpy.allclose(site.sample_var, everything.mean((2, 3)).var(0).numpy(), rtol=2e-3)
    # the law of total variance
    weights = site.batch_n[:, None] / site.batch_n.sum()
    between = (weights * (site.batch_mean - (weights * site.batch_mean).sum(0)) ** 2).sum(0)
    n = site.batch_n.sum()
    assert numpy.allclose(((weights * site.batch_var).sum(0) + between) * n / (n - 1), site.var, rtol=1e-3)


def test_deeper_norms_are_measured_with_fitting_statistics_whatever_is_stored() -> None:
    data = batches(images())
    healthy = fit(head_net(), data)
    want = [s.var for s in of_data(healthy, data).sites]
    for norm in norms_of(healthy):
        norm.running_var.mul_(1e-4)
        norm.running_mean.add_(30)
    broken = of_data(healthy, data)
    assert broken.fitted
    for site, var in zip(broken.sites, want, strict=True):
        assert numpy.allclose(site.var, var, rtol=1e-3)


def test_masked_moments_leave_padding_out() -> None:
    x = torch.randn(8, 3, 5) + 4
    mask = torch.arange(5) < torch.tensor([[1], [2], [3], [4], [5], [5], [5], [2]])
    data = [{"input": x[:4], "m": mask[:4]}, {"input": x[4:], "m": mask[4:]}]
    (site,) = of_data(nn.Sequential(nn.BatchNorm1d(3)).eval(), data, mask="m").sites
    kept = x.double().transpose(0, 1)[:, mask]
    assert site.masked is not None
    assert numpy.allclose(site.masked, torch.stack((kept.mean(1), kept.var(1))).numpy(), rtol=1e-5)
    assert numpy.allclose(site.mean, x.double().mean((0, 2)).numpy(), rtol=1e-6)


def test_every_call_of_a_norm_is_a_site_functional_ones_too() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bn = nn.BatchNorm1d(3)
            self.register_buffer("mean", torch.zeros(3))
            self.register_buffer("var", torch.ones(3))

        def forward(self, x: Tensor) -> Tensor:
            return F.batch_norm(self.bn(self.bn(x) + 2), self.mean, self.var)

    found = of_data(Twice().eval(), [torch.randn(8, 3) for _ in range(3)])
    assert [s.name for s in found.sites] == ["bn", "bn@1", "mean"]


# ----------------------------------------------------------------------------------- awkward ones


def test_a_model_that_takes_whole_batches_alone() -> None:
    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn, self.out = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(F.relu(self.bn(self.conv(x))).mean((2, 3)).view(256, 8))

    torch.manual_seed(1)
    data = [images(256, seed=i) for i in range(9)]
    model = fit(lived_in(Fixed()), data)
    found = bnfix.check(model, data=data)
    assert not alarms(found)
    assert "BN204" in found.checked
    norms_of(model)[0].running_mean.sub_(40)
    assert codes(bnfix.check(model, data=data)) == {"BN204"}


class Boxes(nn.Module):
    """As many rows as there are scores above 0, and a class for each sample."""

    def __init__(self) -> None:
        super().__init__()
        self.net = conv_net()

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        scores = self.net(x)
        return {"boxes": scores[scores[:, 0] > 0], "label": scores.argmax(1)}


def test_outputs_that_have_no_row_a_sample() -> None:
    data = batches(images())
    model = fit(Boxes().eval(), data)
    with untouched(model):
        assert bnfix.check(model, data=data).clean
    norms_of(model)[0].running_var.mul_(9)
    (finding,) = alarms(bnfix.check(model, data=data))
    assert finding.code == "BN204"
    assert "net.1" in finding.message


def test_a_loss_beside_the_outputs_is_no_output() -> None:
    class WithLoss(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = conv_net()

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            y = self.net(x)
            return y, y.square().mean() * 1e-6, torch.full_like(y, 3.0)

    data = batches(images())
    assert bnfix.check(fit(WithLoss().eval(), data), data=data).clean


def test_what_cannot_be_listened_to_is_said_by_every_rule_on_data() -> None:
    model = nn.Sequential(torch.jit.trace(nn.Conv2d(3, 4, 3), torch.ones(1, 3, 6, 6)), nn.BatchNorm2d(4)).eval()
    found = bnfix.check(model, data=batches(images(64)))
    assert all("ScriptModule" in reason(found, code) for code in ("BN204", "BN301", "BN304"))


def test_models_without_norms_and_tiny_data() -> None:
    found = bnfix.check(nn.Linear(4, 2), data=[torch.randn(8, 4)] * 3)
    assert found.clean
    assert "no norm with running statistics" in reason(found, "BN204")
    few = bnfix.check(fit(conv_net(), [images(16)]), data=[images(8)])
    assert "too few" in reason(few, "BN204")


def test_arguments_are_looked_at() -> None:
    model = conv_net()
    with pytest.raises(ValueError, match="role"):
        bnfix.check(model, data=[images(8)], role="test")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="max_samples"):
        bnfix.check(model, data=[images(8)], max_samples=0)


def test_ghost_batches_are_call_sites_of_one_distribution() -> None:
    class Ghost(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bn, self.out = nn.BatchNorm1d(4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(torch.cat([self.bn(part) for part in x.split(4)]))

    data = batches(torch.randn(640, 4) * 2 + 3)
    found = bnfix.check(fit(lived_in(Ghost()), data), data=data)
    assert [(f.code, f.severity, f.measured["values"]) for f in alarms(found)] == [("BN301", "warning", {"bn": 4})]


def test_of_many_batches_the_moments_of_the_first_are_kept() -> None:
    from bnfix.evidence import measuring

    data = [torch.randn(4, 3) + i for i in range(300)]
    (site,) = of_data(nn.Sequential(nn.BatchNorm1d(3)).eval(), data).sites
    assert site.batch_mean.shape == (measuring.EACH, 3)
    assert site.numbers == tuple(range(measuring.EACH))
    everything = torch.cat(data).double()
    assert numpy.allclose(site.mean, everything.mean(0).numpy(), rtol=1e-6)


def test_views_that_a_forward_joins_stay_with_their_sample() -> None:
    """Anchor and positive are alike: neighbours in torch.cat((a, p)) are others."""
    torch.manual_seed(0)
    a = torch.randn(96, 3, 4, 4) + 2 * torch.randn(96, 1, 1, 1)
    p = a + 0.1 * torch.randn_like(a)
    model = nn.Sequential(nn.BatchNorm2d(3)).eval()
    pairs = [*zip(a.split(12), p.split(12), strict=True)]
    (site,) = of_data(model, pairs, forward=lambda m, b: m(torch.cat(b))).sites
    of_sample = ((a + p) / 2).double().mean((2, 3)).var(0).numpy()
    assert numpy.allclose(site.sample_var, of_sample, rtol=2e-3)
