"""What others get wrong, row by row: the exact answer is asked of bnfix, and each peer is shown to miss it.

That the peer misses is asserted too: a scenario that has lost its bite fails. Peers that are not installed are passed
over. The row 'several ranks' is in the tests of distributed recalibration.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from benchmarks.peers import PEERS, present
from calib_nets import TwoInputs, TwoSites, Unreached, batched, norms, pairs, residual, running, standardised
from nets import bits, lived_in, same_bits
from torch import Tensor, nn

import bnfix
from bnfix.errors import CalibrationError

EXACT = {"rtol": 1e-6, "atol": 1e-6}  # float64 sums of float32 values, rounded once to float32


def one_norm(channels: int = 1) -> nn.BatchNorm1d:
    norm = nn.BatchNorm1d(channels)
    lived_in(norm)
    return norm


def by_peer(name: str, model: nn.Module, batches: list[Any]) -> nn.Module:
    """A copy of ``model``, in training mode as those tools want it, after the peer; skips where that is absent."""
    if name not in present():
        pytest.skip(f"{name} is not installed")
    model = copy.deepcopy(model).train()
    PEERS[name][0](model, batches)
    return model.eval()


def stored(model: nn.Module) -> tuple[float, float]:
    """Running mean and variance of the model's first norm, first channel."""
    mean, var = running(model)[0]
    return mean[0].item(), var[0].item()


# Dropout active while estimating: the variance after the norm should be 1.


def after_dropout() -> tuple[nn.Module, list[Tensor]]:
    return nn.Sequential(nn.Dropout(0.5), one_norm(8)), batched(standardised(4096, 8), 64)


def var_after(model: nn.Module, batches: list[Tensor]) -> float:
    """The norm's own output, eps and affine weights taken out: its variance in the worst channel."""
    norm: Any = model[1]  # type: ignore[index]
    with torch.no_grad():
        y = torch.cat([model.eval()(b) for b in batches]).double()
    y = (y - norm.bias) / norm.weight * ((norm.running_var.double() + norm.eps) / norm.running_var.double()).sqrt()
    off = (y.var(0) - 1).abs()
    return y.var(0)[off.argmax()].item()


def test_dropout_is_off_while_estimating() -> None:
    model, batches = after_dropout()
    model.train()
    bnfix.recalibrate(model, batches)
    assert var_after(model, batches) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("name", ["update_bn", "fvcore"])
def test_peers_estimate_with_dropout_on(name: str) -> None:
    model, batches = after_dropout()
    peer = by_peer(name, model, batches)
    assert stored(peer)[1] == pytest.approx(2, abs=0.15)  # keeping half of the values, doubled, has twice the variance
    assert var_after(peer, batches) < 0.6


# Variance between batches: 0, 1 … 63 in order, eight at a time, has variance 64·65/12, and 8·9/12 in a batch.


def in_order() -> tuple[nn.Module, list[Tensor]]:
    return one_norm(), batched(torch.arange(64.0)[:, None], 8)


def test_variance_between_batches_counts() -> None:
    model, batches = in_order()
    bnfix.recalibrate(model, batches)
    assert stored(model) == pytest.approx((31.5, 64 * 65 / 12), rel=1e-6)


@pytest.mark.parametrize(("name", "found"), [("update_bn", 6.0), ("AIMET", 6.0), ("fvcore", 64**2 / 12 - 1 / 12)])
def test_peers_lose_variance_between_batches(name: str, found: float) -> None:
    model, batches = in_order()
    assert stored(by_peer(name, model, batches))[1] == pytest.approx(found, rel=1e-3)


# An uneven last batch: sixty values of variance 1.21, then two 14.1 apart, of variance 100; all together 2.81.


def uneven() -> tuple[nn.Module, list[Tensor]]:
    most = standardised(60) * (1.2103 * 59 / 60) ** 0.5
    return one_norm(), [most, torch.tensor([[50**0.5], [-(50**0.5)]])]


def test_uneven_last_batch_has_its_own_weight() -> None:
    model, batches = uneven()
    bnfix.recalibrate(model, batches)
    assert stored(model) == pytest.approx((0, (1.2103 * 59 + 100) / 61), abs=1e-5)
    assert stored(model)[1] == pytest.approx(2.81, abs=0.005)


@pytest.mark.parametrize("name", ["update_bn", "AIMET"])
def test_peers_weight_batches_alike(name: str) -> None:
    model, batches = uneven()
    assert stored(by_peer(name, model, batches))[1] == pytest.approx((1.2103 + 100) / 2, abs=0.01)


# The loader raises half-way.


class Breaking:
    """A loader of eight batches that fails in the fifth."""

    def __len__(self) -> int:
        return 8

    def __iter__(self) -> Iterator[Tensor]:
        for i in range(8):
            if i == 4:
                raise OSError("the disk is gone")
            yield torch.randn(16, 3, 6, 6, generator=torch.Generator().manual_seed(i))


def two_norms() -> nn.Module:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, momentum=0.03), nn.Dropout(), nn.BatchNorm2d(4))
    lived_in(model)
    model.train()
    model[2].eval()
    return model


def state(model: nn.Module) -> tuple[Any, ...]:
    """Everything beside tensors that a failed run could leave behind."""
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
    momenta = [getattr(m, "momentum", 0) for m in model.modules()]
    return hooks, momenta, [m.training for m in model.modules()], [sorted(vars(m)) for m in model.modules()]


def test_a_loader_that_raises_leaves_the_model_as_it_was() -> None:
    model = two_norms()
    before, rest = bits(model), state(model)
    with pytest.raises(CalibrationError, match="the disk is gone"):
        bnfix.recalibrate(model, Breaking())
    assert same_bits(model, before)
    assert state(model) == rest


@pytest.mark.parametrize("name", ["update_bn", "fvcore"])
def test_peers_leave_a_broken_model(name: str) -> None:
    if name not in present():
        pytest.skip(f"{name} is not installed")
    model = two_norms().train()
    before, rest = bits(model), state(model)
    loader: Any = Breaking()
    with pytest.raises(OSError, match="the disk is gone"):
        PEERS[name][0](model, loader)
    assert not same_bits(model, before)
    assert state(model) != rest


# One norm at two call sites, N(0, 1) and N(10, 1): the pool has mean 5 and variance 1 + 5².


def test_two_call_sites_are_pooled() -> None:
    x = standardised(64, 2)
    model = TwoSites()
    lived_in(model)
    report = bnfix.recalibrate(model, batched(x, 16))
    mean, var = running(model)[0]
    torch.testing.assert_close(mean, torch.full((2,), 5.0), **EXACT)
    torch.testing.assert_close(var, torch.full((2,), 26.0 * 128 / 127), **EXACT)
    assert [(s.site, s.call) for s in report.layers] == [("bn", 0), ("bn", 1)]
    model.bn.running_var.fill_(7)
    bnfix.recalibrate(model, batched(x, 16), unbiased=False)
    torch.testing.assert_close(running(model)[0][1], torch.full((2,), 26.0), **EXACT)


@pytest.mark.parametrize("name", ["update_bn", "AIMET"])
def test_peers_lose_a_call_site(name: str) -> None:
    model = TwoSites()
    lived_in(model)
    assert stored(by_peer(name, model, batched(standardised(64, 2), 16)))[1] < 2


def test_fvcore_refuses_two_call_sites() -> None:
    with pytest.raises(AssertionError):
        by_peer("fvcore", TwoSites(), batched(standardised(64, 2), 16))


# A norm frozen on purpose, in eval mode while the model trains.


def frozen() -> tuple[nn.Module, list[Tensor]]:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 4), nn.BatchNorm1d(4))
    lived_in(model)
    model.train()
    model[1].eval()
    return model, batched(standardised(64, 3) * 3 + 1, 16)


def test_a_frozen_norm_keeps_its_statistics() -> None:
    model, batches = frozen()
    before = bits(model[1])  # type: ignore[index]
    report = bnfix.recalibrate(model, batches)
    assert same_bits(model[1], before)  # type: ignore[index]
    assert report.frozen == ("1",)
    assert [m.training for m in model] == [True, False, True, True]  # type: ignore[attr-defined]
    x = model.eval()[:3](torch.cat(batches)).detach().double()  # type: ignore[operator, index]
    torch.testing.assert_close(running(model)[1][0].double(), x.mean(0), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(running(model)[1][1].double(), x.var(0), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["update_bn", "AIMET"])
def test_peers_overwrite_a_frozen_norm(name: str) -> None:
    model, batches = frozen()
    if name not in present():
        pytest.skip(f"{name} is not installed")
    before = bits(model[1])  # type: ignore[index]
    PEERS[name][0](model, batches)
    assert not same_bits(model[1], before)  # type: ignore[index]


# A bfloat16 model and 2,500 batches: mean 10, variance .25.


def in_bfloat16() -> tuple[nn.Module, list[Tensor]]:
    x = (standardised(10_000, 2) * 0.5 + 10).bfloat16()
    return one_norm(2).bfloat16(), batched(x, 4)


def test_a_bfloat16_model_is_summed_in_float64() -> None:
    model, batches = in_bfloat16()
    x = torch.cat(batches).double()
    bnfix.recalibrate(model, batches)
    mean, var = running(model)[0]
    assert torch.equal(mean, x.mean(0).bfloat16())  # the true one, rounded once
    assert torch.equal(var, x.var(0).bfloat16())
    assert mean.tolist() == [10, 10]
    assert var.tolist() == pytest.approx([0.25, 0.25], rel=2**-8)


@pytest.mark.parametrize(("name", "field"), [("update_bn", 0), ("fvcore", 1), ("AIMET", 0)])
def test_peers_sum_in_bfloat16(name: str, field: int) -> None:
    model, batches = in_bfloat16()
    assert abs(stored(by_peer(name, model, batches))[field] / (10, 0.25)[field] - 1) > 0.1


# A norm that no forward reaches.


def test_a_norm_that_no_forward_reaches_stays() -> None:
    model = Unreached()
    lived_in(model)
    before = bits(model.spare)
    report = bnfix.recalibrate(model, batched(standardised(64, 2), 16))
    assert same_bits(model.spare, before)
    assert report.never_called == ("spare",)
    assert stored(model) == pytest.approx((0, 64 / 63), abs=1e-6)


@pytest.mark.parametrize("name", ["update_bn", "fvcore", "AIMET"])
def test_peers_reset_a_norm_that_no_forward_reaches(name: str) -> None:
    model = Unreached()
    lived_in(model)
    peer = by_peer(name, model, batched(standardised(64, 2), 16))
    assert norms(peer)["spare"].running_mean.tolist() == [0, 0]


# A batch of one value a channel.


@pytest.mark.parametrize("sizes", [[8, 8, 8, 1], [1] * 25])
def test_a_batch_of_one_value_a_channel(sizes: list[int]) -> None:
    x = torch.randn(25, 3) * 2 + 1
    model = one_norm(3)
    bnfix.recalibrate(model, list(x.split(sizes)))
    torch.testing.assert_close(model.running_mean, x.double().mean(0).float(), **EXACT)
    torch.testing.assert_close(model.running_var, x.double().var(0).float(), **EXACT)


@pytest.mark.parametrize("name", ["update_bn", "fvcore", "AIMET"])
def test_peers_refuse_a_batch_of_one_value_a_channel(name: str) -> None:
    with pytest.raises(ValueError, match="more than 1 value"):
        by_peer(name, one_norm(3), list(torch.randn(25, 3).split([8, 8, 8, 1])))


# Batches that are dicts, models with two inputs.


@pytest.mark.parametrize("as_dict", [True, False])
def test_dict_batches_and_two_inputs(as_dict: bool) -> None:
    model = TwoInputs()
    lived_in(model)
    batches = pairs(48, 16)
    given: list[Any] = [
        {"image": image, "vector": vector, "label": torch.zeros(16)} if as_dict else (image, vector)
        for image, vector in batches
    ]
    report = bnfix.recalibrate(model, given)
    assert len(report.layers) == 3
    assert max(residual(model, batches, lambda m, b: m(*b))) < 1e-5


@pytest.mark.parametrize("name", ["update_bn", "fvcore", "AIMET"])
def test_peers_take_no_dict(name: str) -> None:
    with pytest.raises(TypeError):
        by_peer(name, TwoInputs(), [{"image": a, "vector": b} for a, b in pairs(48, 16)])
