"""The rules on data: each finds its own bad example and nothing in the good one; what must stay clean does."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from rules.data_common import DATA_RULES, alarms, checked, codes, reason, untouched
from torch import Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import bnfix
from bnfix.rules.data_cases import batches, conv_net, fit, head_net, images, norms_of, trained
from bnfix.rules.judging import rule_of
from bnfix.rules.rule import Case
from bnfix.types import SEVERITIES, Safety


def both(model: nn.Module, batch: Any) -> Any:
    return tuple(model(x) for x in batch)


# ------------------------------------------------------------------------------------------- laws


@pytest.mark.parametrize("code", DATA_RULES)
def test_a_rule_finds_its_bad_example_first_and_nothing_in_the_good_one(code: str) -> None:
    rule = rule_of(code)
    assert rule is not None
    bad, good = rule.bad(), rule.good()
    with untouched(bad.model), untouched(good.model):
        found, clean = checked(bad), checked(good)
    assert found.by_code(code)
    first = found.findings[0]
    worst = min(found.findings, key=lambda f: SEVERITIES.index(f.severity))
    assert first.severity == worst.severity
    assert code in {f.code for f in found.findings if f.severity == rule_severity(code)}
    assert not clean.by_code(code)
    assert not alarms(clean)
    assert code in clean.checked


def rule_severity(code: str) -> str:
    """Of the finding in the bad example."""
    return {"BN204": "error", "BN301": "error", "BN302": "error", "BN303": "error"}.get(
        code, "info" if code in ("BN205", "BN306") else "warning"
    )


@pytest.mark.parametrize("code", ["BN204", "BN305"])
def test_recalibration_removes_what_it_is_the_fix_of(code: str) -> None:
    rule = rule_of(code)
    assert rule is not None
    case = rule.bad()
    (finding,) = checked(case).by_code(code)
    assert finding.fix is not None
    assert (finding.fix.verb, finding.fix.safety) == ("recalibrate", Safety.NEEDS_DATA)
    bnfix.recalibrate(case.model, case.data, mask=(case.options or {}).get("mask"), **finding.fix.options)
    assert not alarms(checked(case))


def test_the_fixes_in_the_users_own_code_remove_the_finding() -> None:
    tail, order = rule_of("BN302"), rule_of("BN304")
    assert tail is not None
    assert order is not None
    case = tail.bad()
    case.data = DataLoader(case.data.dataset, batch_size=16, drop_last=True)  # type: ignore[union-attr]
    assert "BN302" not in codes(checked(case))
    case = order.bad()
    x = torch.cat(list(case.data or ()))
    case.data = DataLoader(x, batch_size=16, shuffle=True)  # type: ignore[arg-type]
    assert not alarms(checked(case))


def test_a_norm_for_each_branch_removes_call_sites_that_differ() -> None:
    rule = rule_of("BN303")
    assert rule is not None
    case = rule.bad()

    class Unshared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.branches = nn.ModuleList([conv_net(), conv_net()])

        def forward(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
            return self.branches[0](a), self.branches[1](b)

    model = fit(Unshared().eval(), case.data or (), lambda m, pair: m(*pair))
    assert not alarms(bnfix.check(model, data=case.data))


def test_pages_have_their_headings() -> None:
    for code in DATA_RULES:
        page = type(rule_of(code)).__doc__ or ""
        assert all(f"## {h}\n" in page for h in ("What it does", "Why is this bad", "Example", "Fix")), code


# ------------------------------------------------------------------------------------ BN204, BN306


def test_thresholds_are_the_users() -> None:
    from dataclasses import replace

    from bnfix.evidence import of_model
    from bnfix.rules.judging import judge

    rule = rule_of("BN204")
    assert rule is not None
    evidence = of_model(rule.bad().model, data=rule.bad().data)
    assert [f.severity for f in judge(evidence).by_code("BN204")] == ["error"]
    assert [f.severity for f in judge(replace(evidence, options={"BN204": {"error": 5}})).by_code("BN204")] == [
        "warning"
    ]
    assert not judge(replace(evidence, options={"BN204": {"change": 5}})).by_code("BN204")


def test_a_model_that_is_not_trained_yet_has_no_stale_statistics() -> None:
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(96, 5)).eval()
    found = bnfix.check(model, data=batches(images()))
    assert not alarms(found)
    assert "not trained yet" in reason(found, "BN204")


def test_statistics_that_were_reset_are_found_though_they_look_like_new_ones() -> None:
    data = batches(images())
    model = fit(conv_net(), data)
    norms_of(model)[0].reset_running_stats()
    found = alarms(bnfix.check(model, data=data))
    assert {f.code for f in found} == {"BN202", "BN204"}  # by their values, and by what they do


def test_sorted_validation_data_that_is_too_long_to_read_is_no_drift() -> None:
    # Two hundred batches, dark ones first: the first 2,048 samples alone would be a third of the range.
    x = images(6400)
    x = x[x.mean((1, 2, 3)).argsort()]
    model = fit(conv_net(), [x])
    dataset = TensorDataset(x, torch.arange(len(x)) * 10 // len(x))
    for data in (DataLoader(dataset, 32), list(zip(batches(x, 32), batches(x, 32), strict=True))):
        forward = None if isinstance(data, DataLoader) else (lambda m, b: m(b[0]))
        found = bnfix.check(model, data=data, role="val", forward=forward)
        assert "every" in found.seen[0]
        assert not alarms(found)
    stream = (pair for pair in DataLoader(dataset, 32))  # no batch of it can be reached by number
    assert not alarms(bnfix.check(model, data=stream, role="val", forward=lambda m, b: m(b[0])))


def test_stale_statistics_are_found_with_sorted_validation_data_too() -> None:
    x = images(6400)
    x = x[x.mean((1, 2, 3)).argsort()]
    model = fit(conv_net(), [x])
    norms_of(model)[0].reset_running_stats()
    for data in (DataLoader(x, 32), batches(x, 32), batches(x[::10], 32)):  # type: ignore[arg-type]
        assert codes(bnfix.check(model, data=data, role="val")) == {"BN202", "BN204"}
    found = bnfix.check(model, data=(b for b in batches(x, 32)), role="val")
    assert "BN204" in codes(found) or "two halves of the data differ" in reason(found, "BN204")


def test_adapted_statistics_fit_the_data_that_they_were_adapted_to() -> None:
    source, target = batches(images()), batches(-images(seed=1))
    model = fit(conv_net(), source)
    bnfix.recalibrate(model, target)  # AdaBN
    assert not alarms(bnfix.check(model, data=target))


def test_deployment_data_is_compared_and_the_training_data_is_the_verdict() -> None:
    data, there = batches(images()), batches(-images(seed=1))
    model = fit(conv_net(), data)
    found = bnfix.check(model, data=data, val_data=there)
    assert found.clean
    assert [f.severity for f in found.by_code("BN306")] == ["info"]
    assert "no data of deployment" in reason(bnfix.check(model, data=data), "BN306")


# ------------------------------------------------------------------------------------------- BN205


def test_dead_channels_are_a_question_without_data_and_denied_by_data_that_says_otherwise() -> None:
    rule = rule_of("BN205")
    assert rule is not None
    case = rule.bad()
    found = bnfix.check(case.model)
    assert not found.by_code("BN205")
    assert "is it so in data?" in reason(found, "BN205")
    alive = rule.good()
    norms_of(alive.model)[0].running_var[:4] = 1e-12
    said = checked(alive)
    assert not said.by_code("BN205")
    assert "BN204" in codes(said)  # that is what is wrong there


# ------------------------------------------------------------------------------------ BN301, BN302


@pytest.mark.parametrize(
    ("batch", "severity"), [(2, "error"), (4, "warning"), (6, "warning"), (8, "info"), (32, "info"), (33, "")]
)
def test_values_a_batch(batch: int, severity: str) -> None:
    data = batches(images(40 * batch), batch)
    found = bnfix.check(fit(head_net(), data), data=data).by_code("BN301")
    mine = [f for f in found if "5" in f.sites]  # the norm behind the linear layer
    assert [f.severity for f in mine] == ([severity] if severity else [])
    if mine:
        assert mine[0].measured["values"]["5"] == batch
        fix = mine[0].fix
        assert (fix is None) is (severity == "info")  # nor would only="fragile" take it
        if fix is not None:
            assert (fix.verb, fix.options) == ("swap", {"only": "fragile"})
            assert set(fix.sites) == set(mine[0].sites)


def test_only_the_layers_concerned_are_named() -> None:
    data = batches(images(80), 2)
    found = bnfix.check(fit(head_net(), data), data=data)
    assert [f.sites for f in alarms(found)] == [("5",)]


def test_the_usual_batch_counts_not_the_tail_nor_the_part_that_was_measured() -> None:
    x = images(25 * 40 + 3)
    found = bnfix.check(fit(head_net(), [x]), data=batches(x, 40), max_samples=200)
    assert not alarms(found)  # a few of each batch were measured, and the last one is of three
    assert not found.by_code("BN301")


def test_frozen_norms_and_norms_without_statistics() -> None:
    data = batches(images(80), 2)
    frozen = fit(head_net(), data).train()
    for norm in norms_of(frozen):
        norm.eval()
    with untouched(frozen):
        assert "BN301" not in codes(bnfix.check(frozen, data=data))
    tracking = trained(
        nn.Sequential(nn.Flatten(), nn.Linear(108, 8), nn.BatchNorm1d(8, track_running_stats=False), nn.Linear(8, 5))
    )
    with untouched(tracking):
        found = bnfix.check(tracking, data=data)
    assert [(f.code, f.sites) for f in found.of("error")] == [("BN301", ("2",))]


def test_validation_data_is_not_judged_by_its_batches() -> None:
    x = images(16 * 24 + 1)
    x = x[x.mean((1, 2, 3)).argsort()]
    model = fit(head_net(), [x])
    loader = DataLoader(x, batch_size=16)  # type: ignore[arg-type]
    assert {"BN302", "BN304"} <= codes(bnfix.check(model, data=loader))
    found = bnfix.check(model, data=loader, role="val")
    assert found.clean
    assert all("no training data" in reason(found, code) for code in ("BN301", "BN302", "BN304"))


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda x: DataLoader(x, batch_size=16), True),
        (lambda x: DataLoader(x, batch_size=16, drop_last=True), False),
        (lambda x: DataLoader(x, batch_size=16, shuffle=True), True),
        (lambda x: DataLoader(x, batch_size=15), False),  # 385 = 25·15 + 10
        (lambda x: DataLoader(x, batch_size=16, sampler=DistributedSampler(x, 2, 0)), True),  # 193 each
        (lambda x: batches(x, 16), True),  # read to its end
        (lambda x: (b for b in batches(x, 16)), True),
    ],
)
def test_the_last_batch(make: Any, expected: bool) -> None:
    x = images(385)
    found = bnfix.check(fit(head_net(), [x]), data=make(x))
    assert ("BN302" in codes(found)) is expected
    assert not reason(found, "BN302")


def test_a_tail_is_no_matter_where_every_layer_has_positions() -> None:
    x = images(385)
    assert not alarms(bnfix.check(fit(conv_net(), [x]), data=DataLoader(x, batch_size=16)))  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------------- BN303


def two_modalities() -> Case:
    rule = rule_of("BN303")
    assert rule is not None
    return rule.bad()


def test_too_few_batches_for_call_sites_is_said() -> None:
    case = two_modalities()
    found = bnfix.check(case.model, data=list(case.data or ())[:6], forward=both)
    assert not found.by_code("BN303")
    assert "6 batches are too few" in reason(found, "BN303")


def test_pooled_statistics_are_no_error_and_fine_for_validation() -> None:
    # What one forward over all leaves behind: the variance between the branches is in it.
    case = two_modalities()
    model = fit(case.model, case.data or (), both)
    found = bnfix.check(model, data=case.data, forward=both)
    assert [(f.code, f.severity) for f in alarms(found)] == [("BN303", "warning")]
    assert bnfix.check(model, data=case.data, forward=both, role="val").clean
    # The same data through one forward is what such a model was trained with.
    assert bnfix.check(model, data=case.data, forward=lambda m, b: m(torch.cat(b))).clean


@pytest.mark.parametrize("seed", range(3))
def test_views_of_one_distribution_stay_clean(seed: int) -> None:
    pairs = list(zip(batches(images(seed=seed)), batches(images(seed=seed + 10)), strict=True))
    assert bnfix.check(fit(conv_net(), pairs, both), data=pairs, forward=both).clean


def test_two_parts_of_one_batch_stay_clean() -> None:
    # FixMatch: labelled, weakly and strongly augmented samples in one forward.
    weak, strong = images(), images(seed=1) * 1.5
    data = [torch.cat(pair) for pair in zip(batches(weak), batches(strong), strict=True)]
    assert bnfix.check(fit(conv_net(), data), data=data).clean


# ------------------------------------------------------------------------------------------- BN304


def by_class(p: int, k: int, classes: int = 40, count: int = 30) -> list[Tensor]:
    """Batches of ``p`` classes with ``k`` samples each, in the order of the classes; a class has a brightness."""
    rng = torch.Generator().manual_seed(0)
    level = torch.randn(classes, 3, 1, 1, generator=rng)
    out = []
    for _ in range(count):
        chosen = torch.randperm(classes, generator=rng)[:p].repeat_interleave(k)
        out.append(3 + level[chosen] + 2 * torch.randn(p * k, 3, 6, 6, generator=rng))
    return out


@pytest.mark.parametrize(("p", "k"), [(16, 4), (8, 4), (32, 8)])
def test_samplers_of_p_classes_stay_clean(p: int, k: int) -> None:
    data = by_class(p, k)
    model = fit(conv_net(), data)
    assert bnfix.check(model, data=data).clean
    assert bnfix.check(model, data=data, max_samples=300).clean  # a part of each batch, which is in order


@pytest.mark.parametrize(("p", "k"), [(1, 32), (2, 16)])
def test_batches_of_one_class_or_two_are_found(p: int, k: int) -> None:
    data = by_class(p, k)
    (finding,) = bnfix.check(fit(conv_net(), data), data=data).by_code("BN304")
    assert finding.measured["ratio"] > 3
    assert finding.fix is not None
    assert finding.fix.verb == "code"


def test_a_sorted_dataset_is_found_though_its_first_batches_are_alike() -> None:
    # 300 batches: the first 24 are of one class.
    data = DataLoader(torch.cat(by_class(1, 320, classes=10)), batch_size=32)  # type: ignore[arg-type]
    assert "BN304" in codes(bnfix.check(fit(conv_net(), data), data=data))


# ------------------------------------------------------------------------------------------- BN305


def test_a_mask_without_padding_and_no_mask() -> None:
    rule = rule_of("BN305")
    assert rule is not None
    case = rule.good()
    full = [{"input": b["input"], "mask": torch.ones_like(b["mask"])} for b in case.data or ()]
    model = fit(case.model, [b["input"] for b in full])
    assert bnfix.check(model, data=full, mask="mask").clean
    assert "padding" in reason(bnfix.check(model, data=full), "BN305")


def test_outputs_that_are_no_numbers_are_said_to_be_none() -> None:
    data = batches(images())
    model = fit(conv_net(), data)
    norms_of(model)[0].running_mean[0] = float("nan")
    (finding,) = bnfix.check(model, data=data).by_code("BN204")
    assert finding.severity == "error"
    assert "hold NaN or infinities" in finding.message
    assert "inf of" not in finding.message
