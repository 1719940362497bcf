"""Every fault of the benchmark of recall does to a net what it says, and nothing else; and rows are counted right."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("sklearn")

from benchmarks.bench_check_recall import Row, diagnosed, report
from benchmarks.recall.faults import DOSES, FAULTS, Case
from benchmarks.recall.healthy import Store, norms
from benchmarks.recall.nets import HALVES, fit, loader
from rules.recall_proofs import CHECKS


@pytest.fixture(scope="module")
def store() -> Store:
    return Store(None)


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_does_what_it_says(name: str, store: Store) -> None:
    net = store.get("mlp", 0)
    case = FAULTS[name].case(net, len(DOSES) - 1)
    if case is None:  # for inputs of any size
        net = store.get("sequence", 0)
        case = FAULTS[name].case(net, len(DOSES) - 1)
    assert case is not None
    CHECKS[name](net, case)


def test_every_rule_on_trained_nets_has_a_fault_and_each_code_is_one() -> None:
    from bnfix.rules import all_rules

    known = {rule.code for rule in all_rules()}
    named = {code for fault in FAULTS.values() for code in fault.codes}
    assert named <= known
    assert len(FAULTS) >= 25
    assert len(HALVES) >= 8


def test_a_net_is_trained_as_with_another_momentum(store: Store) -> None:
    """The statistics of other momenta are kept beside a training: they are what that training would have stored."""
    net = store.get("mlp", 0)
    torch.manual_seed(0)
    model = net.arch.build()
    for norm in norms(model):
        norm.momentum = 0.01
    fit(net.arch, model, loader(net.arch, seed=0))
    for norm, (mean, var) in zip(norms(model), net.shadows[0.01], strict=True):
        # Read off float32 statistics, differences come out to some 1e-6 of a value, ten times as much for α = .1.
        torch.testing.assert_close(norm.running_mean, mean, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(norm.running_var, var, rtol=1e-4, atol=1e-4)


def test_rows_are_counted_by_measured_harm() -> None:
    def row(fault: str, score: float, *said: str, base: float | None = 0.9) -> Row:
        return Row("mlp", fault, "weak", 0, score, base, list(said))

    healthy = [Row("mlp", "", "", seed, score, None, []) for seed, score in enumerate((0.90, 0.91, 0.89, 0.90))]
    faulty = [
        row("means lost", 0.80, "BN204W"),  # harmful, found
        row("means lost", 0.80, "BN301I", "BN204I"),  # harmful: information is no find
        row("means lost", 0.89),  # harmless
        row("statistics reset", float("nan"), "BN204E"),  # harmful, found by its second code
        row("small batches", 0.86, "BN301W", base=None),  # harmful against the mean of healthy ones
    ]
    text = report([*healthy, *faulty])
    assert "| BN204 | 1/2 |" in text
    assert "| BN202 | 1/1 |" in text
    assert "| BN301 | 1/1 |" in text
    assert "75.0 % on half A" in text
    assert "(4 of 5)" in text
    assert "4 healthy nets: 0 errors, 0 warnings" in text


def test_a_case_is_checked_as_it_is_found(store: Store) -> None:
    net = store.get("mlp", 0)
    case = FAULTS["statistics reset"].case(net, 2)
    assert case is not None
    said, error, notes = diagnosed(case)
    assert "BN202E" in said
    assert not error
    assert "mean 0 and variance 1" in notes
    broken: list[Tensor] = []
    assert "CalibrationError" in diagnosed(Case(case.model, 0.0, data=broken))[1]
