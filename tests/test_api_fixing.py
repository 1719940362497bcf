"""Fixes in order, each all or nothing, and never one that needs training."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from nets import lived_in
from torch import nn

from bnfix import api
from bnfix.api.fixing import python_line
from bnfix.types import Diagnosis, Finding, Fix, Safety

EXACT, DATA, TRAINING = Safety.EXACT, Safety.NEEDS_DATA, Safety.NEEDS_TRAINING


def model() -> nn.Module:
    return lived_in(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)))


def finding(fix: Fix | None, code: str = "BN901") -> Finding:
    return Finding(code, "fake", "warning", "wrong", fix.sites if fix else (), fix)


def until(*tests: tuple[Finding, Callable[[nn.Module], bool]]) -> Callable[[nn.Module], Diagnosis]:
    """A check that has each finding as long as its test holds."""
    return lambda m: Diagnosis(tuple(f for f, test in tests if test(m)), checked=("BN901",))


def batches() -> list[torch.Tensor]:
    return [torch.randn(8, 3, 4, 4, generator=torch.Generator().manual_seed(n)) + 3 for n in range(3)]


SET = finding(Fix("set", "momentum 0.1", ("1",), {"momentum": 0.1}, EXACT))
STALE = finding(Fix("recalibrate", "anew", ("1", "3"), {}, DATA), "BN902")


def test_settings_first_then_statistics_and_the_rest_is_told() -> None:
    net = model()
    net[1].momentum = 0.99
    mean = net[3].running_mean.clone()
    code = finding(Fix("code", "write it otherwise", (), {}, EXACT), "BN903")
    swap = finding(Fix("swap", "swap it", ("3",), {}, TRAINING), "BN904")
    check = until(
        (STALE, lambda m: torch.equal(m[3].running_mean, mean)),
        (SET, lambda m: m[1].momentum == 0.99),
        (code, lambda m: True),
        (swap, lambda m: True),
    )
    said: list[str] = []
    fixed = api.fix(net, check, api.Fixing(data=batches), said.append)
    assert [e.action for e in fixed.report.edits] == ["set", "recalibrate", "recalibrate"]
    assert [f.code for f in fixed.report.fixed] == ["BN902", "BN901"]
    assert [f.code for f in fixed.report.diagnosis.findings] == ["BN903", "BN904"]
    assert {r.site: r.reason for r in fixed.report.refusals} == {
        "BN903": "it takes your own code: write it otherwise",
        "BN904": "it takes training: swap it",
    }
    assert said[0] == "set: momentum 0.1"
    assert fixed.model is net


def test_without_data_no_statistics() -> None:
    net = model()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    fixed = api.fix(net, until((STALE, lambda m: True)), api.Fixing())
    assert fixed.report.edits == ()
    assert [(r.site, r.reason) for r in fixed.report.refusals] == [("BN902", "it needs data")]
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


def test_what_a_fix_brings_to_light_is_fixed_too() -> None:
    """Setting one thing shows the next; a fix that heals nothing is not tried for ever."""
    net = model()
    net[1].momentum = 0.99
    looked: list[int] = []

    def check(m: nn.Module) -> Diagnosis:
        looked.append(1)
        return Diagnosis((SET,) if m[1].momentum == 0.99 else (STALE,), checked=("BN901",))

    fixed = api.fix(net, check, api.Fixing(data=batches))
    assert [e.action for e in fixed.report.edits] == ["set", "recalibrate", "recalibrate"]
    assert fixed.report.diagnosis.findings == (STALE,)
    assert len(looked) == 3


def test_one_recalibration_heals_the_findings_of_several_rules() -> None:
    net = model()
    calls: list[int] = []

    def data() -> list[torch.Tensor]:
        calls.append(1)
        return batches()

    mean = net[1].running_mean.clone()
    other = finding(Fix("recalibrate", "clean the data, then anew", ("1",), {}, DATA), "BN905")
    still = lambda m: torch.equal(m[1].running_mean, mean)  # noqa: E731
    fixed = api.fix(net, until((STALE, still), (other, still)), api.Fixing(data=data))
    assert calls == [1]
    assert len(fixed.report.fixed) == 2


def test_new_statistics_are_measured_before_anybody_uses_them() -> None:
    """mean 0 and variance 1 would be worse than what was there."""
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, track_running_stats=False)).eval()
    reset = finding(Fix("reset", "register statistics, then recalibrate", ("1",), {}, DATA))
    check = until((reset, lambda m: m[1].running_var is None))
    assert api.fix(net, check, api.Fixing()).report.edits == ()
    assert net[1].running_var is None
    fixed = api.fix(net, check, api.Fixing(data=batches))
    assert [e.action for e in fixed.report.edits] == ["reset", "recalibrate"]
    with torch.no_grad():
        x = net[0](torch.cat(batches()))
    torch.testing.assert_close(net[1].running_mean, x.mean((0, 2, 3)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "broken",
    [
        finding(Fix("set", "no such layer", ("nowhere",), {"momentum": 0.1}, EXACT)),
        finding(Fix("set", "no such thing", ("1",), {"colour": 1}, EXACT)),
    ],
)
def test_a_fix_that_fails_leaves_the_model_as_it_was_and_says_why(broken: Finding) -> None:
    net = model()
    before = [dict(vars(m)) for m in net.modules()]
    fixed = api.fix(net, until((broken, lambda m: True)), api.Fixing())
    assert fixed.report.edits == ()
    (refusal,) = fixed.report.refusals
    assert refusal.site == "BN901"
    assert [{k: v for k, v in vars(m).items() if not k.startswith("_")} for m in net.modules()] == [
        {k: v for k, v in b.items() if not k.startswith("_")} for b in before
    ]


def test_data_that_fails_half_way_changes_nothing() -> None:
    def failing() -> Iterator[torch.Tensor]:
        yield from batches()
        raise OSError("the disk is gone")

    net = model()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    fixed = api.fix(net, until((STALE, lambda m: True)), api.Fixing(data=failing))
    (refusal,) = fixed.report.refusals
    assert "the disk is gone" in refusal.reason
    assert fixed.report.edits == ()
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


def test_where_only_tensors_are_kept_settings_are_not_touched() -> None:
    net = model()
    net[1].momentum = 0.99
    fixed = api.fix(net, until((SET, lambda m: True)), api.Fixing(whole=False))
    assert net[1].momentum == 0.99
    assert "a file of weights does not" in fixed.report.refusals[0].reason


@pytest.mark.parametrize("verb", ["set", "float", "reset", "recalibrate", "unshare", "fold", "swap", "code"])
def test_nothing_that_needs_training_is_ever_applied(verb: str) -> None:
    net = model().half() if verb == "float" else model()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    asked = finding(Fix(verb, "t", ("1",), {"momentum": 0.5} if verb == "set" else {}, TRAINING))
    fixed = api.fix(net, until((asked, lambda m: True)), api.Fixing(data=batches))
    assert fixed.report.edits == ()
    assert net[1].momentum == 0.1
    assert all(torch.equal(v, before[k]) and v.dtype == before[k].dtype for k, v in net.state_dict().items())


@pytest.mark.parametrize(
    ("fix", "line"),
    [
        (Fix("recalibrate", "t"), "bnfix.recalibrate(model, data)"),
        (Fix("recalibrate", "t", options={"tol": 0.1}), "bnfix.recalibrate(model, data, tol=0.1)"),
        (Fix("unshare", "t"), "model = bnfix.unshare(model, example).model"),
        (Fix("swap", "t", options={"to": "group"}), "model = bnfix.swap(model, data=data, to='group').model"),
        (Fix("set", "t", ("a.bn",), {"momentum": 0.1}), "model.get_submodule('a.bn').momentum = 0.1"),
        (Fix("set", "t", ("a.bn", "b.bn"), {"momentum": 0.1}), ""),
        (Fix("float", "t", ("(root)",)), "model.get_submodule('').float()"),
        (Fix("code", "t"), ""),
    ],
)
def test_the_line_of_python(fix: Fix, line: str) -> None:
    assert python_line(fix) == line


def test_the_lines_of_python_run() -> None:
    import bnfix

    net = model()
    net[1].momentum = 0.99
    space: dict[str, Any] = {"bnfix": bnfix, "model": net, "data": batches(), "example": batches()[0]}
    exec(python_line(Fix("set", "t", ("1",), {"momentum": 0.1})), space)
    assert net[1].momentum == 0.1
    exec(python_line(Fix("recalibrate", "t")), space)
    exec(python_line(Fix("fold", "t")), space)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in space["model"].modules())
