"""Every rule about training loops finds its own bad loop, by its code, and leaves the good one alone."""

from __future__ import annotations

import pytest

import bnfix
from bnfix.rules import Rule, all_rules

RULES = [r for r in all_rules() if "loop" in r.needs]


@pytest.mark.parametrize("rule", RULES, ids=lambda r: r.code)
def test_the_bad_loop_is_found_by_this_code(rule: Rule) -> None:
    loop = rule.bad().loop
    assert loop is not None
    report = loop(bnfix.watch)
    assert rule.code in report.checked
    assert rule.code in {f.code for f in report.findings}


@pytest.mark.parametrize("rule", RULES, ids=lambda r: r.code)
def test_the_good_loop_is_left_alone(rule: Rule) -> None:
    loop = rule.good().loop
    assert loop is not None
    report = loop(bnfix.watch)
    assert rule.code in report.checked
    assert rule.code not in {f.code for f in report.findings}
    assert report.clean


def test_all_nine_are_there() -> None:
    assert [r.code for r in RULES if r.code.startswith("BN4")] == [f"BN40{i}" for i in range(1, 10)]
