"""Findings that were known before are told no more; whatever is new or worse is."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bnfix.errors import BnfixError
from bnfix.rules import read_baseline
from bnfix.types import SEVERITIES, Diagnosis, Finding, Mended

A = Finding("BN204", "stale", "warning", "off", ("a", "b"))
WHOLE = Finding("BN304", "sorted", "warning", "sorted")


def of(*findings: Finding) -> Diagnosis:
    return Diagnosis(findings, checked=("BN204",))


def left(now: Diagnosis, before: Diagnosis) -> tuple[Finding, ...]:
    return read_baseline(before).without_known(now).findings


def test_the_same_is_known_and_counted() -> None:
    now = read_baseline(of(A)).without_known(of(A, WHOLE))
    assert now.findings == (WHOLE,)
    assert now.ignored == (A,)
    assert now.notes == ("1 finding known from the baseline, not told again",)
    assert read_baseline(of()).without_known(of(A)) == of(A)


@pytest.mark.parametrize(
    ("change", "known"),
    [
        ({}, True),
        ({"message": "other figures"}, True),
        ({"sites": ("b", "a")}, True),  # sites are the worst first: their order is a matter of the run
        ({"sites": ("a",)}, True),  # better than it was
        ({"sites": ("a", "b", "c")}, False),
        ({"sites": ("c",)}, False),
        ({"sites": ()}, False),
        ({"severity": "error"}, False),
        ({"severity": "info"}, True),
        ({"code": "BN203"}, False),
    ],
)
def test_what_is_new_or_worse_is_told(change: dict[str, object], known: bool) -> None:
    assert (left(of(replace(A, **change)), of(A)) == ()) is known  # type: ignore[arg-type]


def test_one_about_the_whole_model_is_known_by_itself_alone() -> None:
    assert left(of(WHOLE), of(WHOLE)) == ()
    assert left(of(replace(WHOLE, code="BN204")), of(A)) != ()


def test_the_report_of_one_model_and_of_several(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    path.write_text(json.dumps({**of(A).to_dict(), "run": {"subject": "x.pt"}}))
    assert read_baseline(path, "another.pt").knows(A)
    values = [{**of(A).to_dict(), "run": {"subject": "x.pt"}}, {**of(WHOLE).to_dict(), "run": {"subject": "y.pt"}}]
    path.write_text(json.dumps({"type": "list", "schema_version": 1, "values": values}))
    assert read_baseline(path, "x.pt").knows(A)
    assert not read_baseline(path, "y.pt").knows(A)
    assert not read_baseline(path, "z.pt").knows(A)
    assert read_baseline(path, "y.pt").without_known(of(WHOLE)).notes == (
        f"1 finding known from {path}, not told again",
    )


def test_a_report_that_a_baseline_had_thinned_still_knows() -> None:
    thinned = read_baseline(of(A)).without_known(of(A))
    assert thinned.findings == ()
    assert left(of(A), thinned) == ()


def test_the_report_of_a_repair_knows_what_it_left(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    path.write_text(json.dumps(Mended((), of(A), of(A, WHOLE)).to_dict()))
    assert read_baseline(path).knows(A)
    assert not read_baseline(path).knows(WHOLE)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "is no JSON"),
        ("[1]", "is no report of bnfix check"),
        ('{"type": "Parity"}', "it says type 'Parity'"),
        ('{"type": "Diagnosis"}', "is no report"),
        ('{"type": "list", "values": 3}', "is no report"),
        ('{"type": "list", "values": []}', "is no report"),
        ('{"type": "Diagnosis", "findings": [{"code": "BN1"}]}', "is no report"),
        ('{"type": "Diagnosis", "findings": [{"code": "BN1", "severity": "bad", "sites": []}]}', "is no report"),
        ('{"type": "Diagnosis", "findings": ["x"]}', "is no report"),
    ],
)
def test_what_is_no_report_is_refused(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "report.json"
    path.write_text(text)
    with pytest.raises(BnfixError, match=said) as error:
        read_baseline(path)
    assert "--output-format json > report.json" in str(error.value.hint)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(BnfixError, match="can't be read: No such file"):
        read_baseline(tmp_path / "none.json")


FINDINGS = st.builds(
    Finding,
    code=st.sampled_from(["BN101", "BN204", "BN304"]),
    name=st.just("x"),
    severity=st.sampled_from(SEVERITIES),
    message=st.sampled_from(["far", "farther"]),
    sites=st.lists(st.sampled_from("abcd"), max_size=3, unique=True).map(tuple),
)


@given(st.lists(FINDINGS, max_size=6), st.lists(FINDINGS, max_size=6))
def test_laws(before: list[Finding], now: list[Finding]) -> None:
    """Nothing gets lost, what was there is known, and a second time changes nothing."""
    baseline = read_baseline(of(*before))
    found = baseline.without_known(of(*now))
    assert sorted(map(repr, (*found.findings, *found.ignored))) == sorted(map(repr, now))
    assert baseline.without_known(of(*before)).findings == ()
    assert baseline.without_known(found) == found
    assert read_baseline(found).without_known(of(*now)).findings == ()
