"""Every target that is found: what is kept of a norm, and that the exact ones are exact. And which norms are taken."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from nets import lived_in
from swaps.swap_nets import Head, Small, batches, fitted
from torch import nn

import bnfix
from bnfix.errors import BnfixError, PassError
from bnfix.graph import FrozenBatchNorm
from bnfix.swaps import all_targets
from bnfix.types import Diagnosis, Finding, Fix, Skipped

DATA = batches(8, 3, 8, 8)
NAMES = sorted(all_targets())
EXACT = [n for n in NAMES if not all_targets()[n].calibrated]


def synced(norm: nn.Module) -> nn.Module:
    return lived_in(nn.Sequential(nn.Conv2d(3, 16, 3), norm))


def source(to: str) -> nn.Module:
    return synced(nn.SyncBatchNorm(16, momentum=0.3) if to == "batch" else nn.BatchNorm2d(16, momentum=0.3))


def test_the_targets_of_the_design_are_there() -> None:
    assert set(NAMES) >= {"group", "layer", "instance", "frozen", "sync", "batch"}


@pytest.mark.parametrize("to", NAMES)
def test_what_every_target_keeps(to: str) -> None:
    """Shape, dtype, device, mode, attributes, the rest of the model; the same again from its recipe."""
    model = source(to).double().train()
    model[1].bnfix_ignore = ("BN301",)
    x = [d.double() for d in DATA]
    result = bnfix.swap(model, to, data=x)
    new = result.model[1]
    assert type(new) is not type(model[1])
    assert new.training
    assert new.bnfix_ignore == ("BN301",)
    assert new.num_features == 16
    assert {t.dtype for t in (*new.parameters(), *new.buffers()) if t.is_floating_point()} == {torch.float64}
    assert result.model.eval()(x[0]).shape == model.eval()(x[0]).shape
    assert torch.equal(result.model[0].weight, model[0].weight)
    assert result.recipe["edits"][0]["to"]["class"] == type(new).__name__
    assert result.verb == "swap"
    assert (result.norms, result.done) == (1, 1)


@pytest.mark.parametrize("to", EXACT)
@pytest.mark.parametrize("affine", [True, False])
def test_exact_targets_are_exact_to_the_bit(to: str, affine: bool) -> None:
    cls = nn.SyncBatchNorm if to == "batch" else nn.BatchNorm2d
    model = synced(cls(16, eps=1e-3, momentum=None, affine=affine))
    model[1].num_batches_tracked.fill_(7)
    result = bnfix.swap(model, to, data=DATA)
    assert torch.equal(result.model(DATA[0]), model(DATA[0]))
    for name, tensor in model[1].state_dict().items():
        if to != "frozen" or name != "num_batches_tracked":
            assert torch.equal(result.model[1].state_dict()[name], tensor)
    assert any("the same to the bit" in n for n in result.notes)
    if to != "frozen":
        assert result.model[1].momentum is None
        assert result.model[1].track_running_stats
        with torch.no_grad():  # and they go on as the old one would
            expected, found = model.train()(DATA[1]), result.model.train()(DATA[1])
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(result.model[1].running_var, model[1].running_var)
        assert result.model[1].num_batches_tracked == 8


def test_there_and_back() -> None:
    model = fitted(Small(), DATA)
    back = bnfix.swap(bnfix.swap(model, "sync", data=DATA).model, "batch", data=DATA).model
    assert {k: type(m) for k, m in back.named_modules()} == {k: type(m) for k, m in model.named_modules()}
    assert torch.equal(back(DATA[0]), model(DATA[0]))


def test_batch_takes_the_rank_that_is_seen() -> None:
    for shape, cls in (((8, 16), nn.BatchNorm1d), ((8, 16, 4), nn.BatchNorm1d), ((8, 16, 4, 4, 4), nn.BatchNorm3d)):
        assert type(bnfix.swap(lived_in(nn.SyncBatchNorm(16)), "batch", data=batches(*shape)).model) is cls


def test_frozen_stays_in_training_mode() -> None:
    model = fitted(Small(), DATA)
    frozen = bnfix.swap(model, "frozen", data=DATA).model.train()
    before = copy.deepcopy(frozen.bn1.state_dict())
    out = frozen(DATA[0])
    out.sum().backward()
    assert torch.equal(out.detach(), model(DATA[0]).detach())
    assert all(torch.equal(before[k], v) for k, v in frozen.bn1.state_dict().items())
    assert not list(frozen.bn1.parameters())
    assert frozen.c1.weight.grad.abs().sum() > 0
    assert isinstance(frozen.bn1, FrozenBatchNorm)
    frozen.bn1.load_state_dict(model.bn1.state_dict())  # with a counter that it has no use for


def test_exact_targets_need_no_example_at_all() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bn = nn.BatchNorm2d(7)

        def forward(self, images: Any, lengths: Any) -> Any:
            return self.bn(images[: int(lengths.max())])

    result = bnfix.swap(lived_in(Odd()), "sync")
    assert isinstance(result.model.bn, nn.SyncBatchNorm)
    assert any("was not run" in n for n in result.notes)
    with pytest.raises(PassError, match="none could be deduced"):
        bnfix.swap(lived_in(Odd()), "group", init="copy")


@pytest.mark.gpu
@pytest.mark.parametrize("to", NAMES)
def test_device_is_kept(to: str) -> None:
    model = source(to).cuda()
    result = bnfix.swap(model, to, data=DATA)
    assert {t.device.type for t in result.model.state_dict().values()} == {"cuda"}
    assert result.model(DATA[0].cuda()).is_cuda


# ---------------------------------------------------------------------------------------- which norms


def test_only_takes_a_pattern_paths_or_a_function() -> None:
    model = fitted(Small(), DATA)
    for only in (r"bn[12]$", ["bn1", "bn2"], lambda path, module: path != "bn3" and isinstance(module, nn.BatchNorm2d)):
        result = bnfix.swap(model, only=only, data=DATA)
        assert {e.site for e in result.edits} == {"bn1", "bn2"}
        assert not result.refusals
        assert type(result.model.bn3) is nn.BatchNorm2d
        assert any("1 norm was not asked for" in n for n in result.notes)
    with pytest.raises(ValueError, match=r"fits no norm of the model: bn3, bn2, bn1"):
        bnfix.swap(model, only="nothing", data=DATA)
    with pytest.raises(ValueError, match="no regular expression"):
        bnfix.swap(model, only="(", data=DATA)


FRAGILE = Finding(
    "BN301", "too-few-values", "error", "2 values a channel", ("top@1",), Fix("swap", "swap it", sites=("top",))
)


def _checking(monkeypatch: pytest.MonkeyPatch, diagnosis: Diagnosis) -> list[Any]:
    from bnfix.api import checking

    asked: list[Any] = []
    monkeypatch.setattr(checking, "check", lambda model, **kwargs: asked.append(kwargs) or diagnosis)
    return asked


def test_fragile_takes_what_the_rules_flagged(monkeypatch: pytest.MonkeyPatch) -> None:
    model = fitted(Head(64), DATA)
    other = Finding("BN204", "stale", "error", "…", ("bn",), Fix("recalibrate", "…", sites=("bn",)))
    told = Finding("BN301", "too-few-values", "info", "…", ("bn",), Fix("swap", "…", sites=("bn",)))
    asked = _checking(monkeypatch, Diagnosis((other, FRAGILE, told), checked=("BN301",)))
    result = bnfix.swap(model, only="fragile", data=DATA)
    assert [e.site for e in result.edits] == ["top"]
    assert asked[0]["data"] is DATA
    assert "BN301" in asked[0]["select"]
    once = bnfix.swap(model, only="fragile", data=iter(DATA))  # is not read twice
    assert [e.site for e in once.edits] == ["top"]
    assert len(asked[1]["data"]) == 4
    assert [e.site for e in bnfix.swap(model, only=Diagnosis((FRAGILE,)), data=DATA).edits] == ["top"]


@pytest.mark.parametrize("once", [False, True])
def test_fragile_with_the_rules_themselves(once: bool) -> None:
    """At batch size 2 the norm on vectors sees two values a channel, the convolution's seventy-two; at 32 neither."""
    samples = torch.cat(batches(8, 3, 8, 8, count=8))
    model = fitted(Head(64), DATA)
    two = list(samples.split(2))
    result = bnfix.swap(model, only="fragile", data=iter(two) if once else two)
    assert [e.site for e in result.edits] == ["top"]
    assert type(result.model.bn) is nn.BatchNorm2d
    assert not bnfix.swap(model, only="fragile", data=list(samples.split(32))).edits
    diagnosis = bnfix.check(model, data=two)
    assert [e.site for e in bnfix.swap(model, only=diagnosis, data=two).edits] == ["top"]


def test_fragile_is_never_guessed(monkeypatch: pytest.MonkeyPatch) -> None:
    model = fitted(Head(64), DATA)
    _checking(monkeypatch, Diagnosis((), skipped=(Skipped("BN301", "no data"),)))
    with pytest.raises(BnfixError, match="BN301 was not checked: no data"):
        bnfix.swap(model, only="fragile", data=DATA)
    with pytest.raises(ValueError, match="data=loader"):
        bnfix.swap(model, only="fragile")
    _checking(monkeypatch, Diagnosis((), checked=("BN301",)))
    result = bnfix.swap(model, only="fragile", data=DATA)
    assert not result.edits
    assert any("no norm was found that a swap would heal" in n for n in result.notes)
    assert torch.equal(result.model(DATA[0]), model(DATA[0]))


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"to": "weight"}, "to is one of"),
        ({"init": "best"}, "init is one of"),
        ({"groups": 0}, "groups is 'auto' or a positive number"),
        ({"groups": True}, "groups is 'auto' or a positive number"),
        ({"groups": 4, "to": "layer"}, "has none to choose"),
        ({"init": "ls", "data": None}, "none was given: data=loader"),
        ({"optimizer": SimpleNamespace()}, "inplace=True"),
        ({"max_samples": 0}, "at least 1"),
    ],
)
def test_wrong_arguments_are_named(options: dict[str, Any], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        bnfix.swap(fitted(Small(), DATA), **{"data": DATA, **options})
    with pytest.raises(TypeError, match=r"nn\.Module"):
        bnfix.swap({}, data=DATA)


def test_groups_that_do_not_divide_are_refused_by_name() -> None:
    result = bnfix.swap(fitted(Small(), DATA), groups=5, data=DATA)
    assert {r.reason for r in result.refusals} == {"5 groups do not divide its 16 channels"}


def test_samples_that_still_mix_are_told() -> None:
    class Mixing(Small):
        def forward(self, x: Any) -> Any:
            y = super().forward(x)
            return y - y.mean(0)

    notes = bnfix.swap(fitted(Mixing(), DATA), data=DATA).notes
    assert any("samples still depend on one another" in n for n in notes)
    assert "samples don't depend on one another" in bnfix.swap(fitted(Small(), DATA), data=DATA).notes


def test_without_data_the_affine_is_copied_and_that_is_said() -> None:
    model = fitted(Small(), DATA)
    result = bnfix.swap(model, example=DATA[0])
    assert torch.equal(result.model.bn1.weight, model.bn1.weight)
    assert any("expect a model near chance" in n for n in result.notes)
    assert all(e.r2 is None for e in result.edits)


def test_ddp_cannot_be_changed_in_place() -> None:
    class Wrapped(nn.parallel.DistributedDataParallel):
        def __init__(self, module: nn.Module) -> None:
            nn.Module.__init__(self)
            self.module = module

    with pytest.raises(ValueError, match="before it is wrapped"):
        bnfix.swap(Wrapped(fitted(Small(), DATA)), data=DATA, inplace=True)
    result = bnfix.swap(Wrapped(fitted(Small(), DATA)), data=DATA)
    assert type(result.model) is Small
