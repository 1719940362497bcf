"""Wrapping, grouping and numbers: the laws they keep."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bnfix.render import numbers
from bnfix.render.runs import ROWS, alike, together
from bnfix.render.wrap import shares, wrap
from bnfix.types import Edit, Refusal

words = st.text(st.sampled_from("abcd1._/-:"), min_size=1, max_size=50)
paths = st.lists(st.sampled_from(["a", "b", "0", "1", "layer1", "conv"]), min_size=1, max_size=5).map(".".join)


@given(st.lists(words, max_size=12), st.integers(1, 60))
def test_wrapping_loses_nothing_and_keeps_the_width(parts: list[str], width: int) -> None:
    lines = wrap(" ".join(parts), width)
    assert "".join(lines).replace(" ", "") == "".join(parts)
    assert max(map(len, lines)) <= width


def test_a_path_breaks_after_a_dot() -> None:
    assert wrap("stage3.blocks.11.norm", 14) == ["stage3.blocks.", "11.norm"]


@given(st.lists(paths, max_size=80))
def test_runs_are_all_norms_in_their_order(sites: list[str]) -> None:
    edits = [Edit("fold", site, "BatchNorm2d(1)", "") for site in sites]
    runs = together(edits)
    assert [e for run in runs for e in run] == edits
    assert len(runs) <= ROWS
    assert all(runs)


def test_few_norms_have_a_row_each() -> None:
    edits = [Edit("fold", f"a.{n}", "", "") for n in range(ROWS)]
    assert together(edits) == [[e] for e in edits]


def test_runs_follow_the_parts_of_the_model() -> None:
    edits = [Edit("fold", f"layer{n // 10}.{n % 10}.bn", "", "") for n in range(50)]
    assert [len(run) for run in together(edits)] == [10] * 5
    one_part = [Edit("fold", f"features.{n}.bn", "", "") for n in range(50)]
    assert 4 <= len(together(one_part)) <= ROWS


@given(st.lists(st.tuples(paths, st.sampled_from(["x", "y", "z"]), st.booleans()), max_size=30))
def test_alike_refusals_share_one_reason_and_none_is_lost(found: list[tuple[str, str, bool]]) -> None:
    refusals = [Refusal(site, reason, defect=defect) for site, reason, defect in found]
    groups = alike(refusals)
    assert sorted(map(id, (r for _, group in groups for r in group))) == sorted(map(id, refusals))
    assert all({r.reason for r in group} == {reason} for reason, group in groups)
    assert all(len(group) == 1 for _, group in groups if any(r.defect for r in group))


def test_reasons_that_differ_in_a_path_are_one_only_where_there_are_many() -> None:
    def refusals(count: int) -> list[Refusal]:
        return [
            Refusal(f"features.{n}.norm", f"its input comes from aten.cat in features.{n}.cat@{n}, which has 2 users")
            for n in range(count)
        ]

    assert len(alike(refusals(ROWS))) == ROWS
    ((reason, group),) = alike(refusals(ROWS + 1))
    assert reason == "its input comes from aten.cat in features.*, which has 2 users"
    assert len(group) == ROWS + 1
    other = [*refusals(ROWS + 1), Refusal("x", "conv has 3 users")]
    assert [len(group) for _, group in alike(other)] == [ROWS + 1, 1]


@given(st.lists(st.tuples(st.integers(1, 100), st.booleans()), min_size=1, max_size=6), st.integers(100, 200))
def test_columns_fit_and_no_narrow_one_wraps(columns: list[tuple[int, bool]], room: int) -> None:
    natural = [min(w, 10) if not may else w for w, may in columns]
    widths = shares(natural, [may for _, may in columns], room)
    assert all(got <= max(w, 14) for got, w in zip(widths, natural, strict=True))
    assert sum(widths) <= max(room, sum(min(w, 14) if may else w for w, (_, may) in zip(natural, columns, strict=True)))
    if sum(natural) <= room:
        assert widths == natural


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (None, "–"),
        (0.0, "0"),
        (0.0123, "0.012"),
        (0.76, "0.8"),
        (9.96, "10"),
        (1.3249, "1.3"),
        (42.4, "42"),
        (314159.0, "3.1e+05"),
        (math.nan, "nan"),
    ],
)
def test_ratio(value: float | None, shown: str) -> None:
    assert numbers.ratio(value) == shown


def test_percent_is_never_rounded_up_to_all() -> None:
    assert numbers.percent(0.999999) == "99.99 %"
    assert numbers.percent(1.0) == "100 %"


@pytest.mark.parametrize(
    ("count", "shown"), [(812, "812 bytes"), (97_800_000, "97.8 MB"), (999_999, "1 MB"), (2e9, "2 GB")]
)
def test_size(count: float, shown: str) -> None:
    assert numbers.size(int(count)) == shown


def test_nan_is_the_worst_and_nothing_measured_is_nothing() -> None:
    assert math.isnan(numbers.worst([1.0, math.nan, 3.0]) or 0.0)
    assert numbers.worst([None, 2.0, 1.0]) == 2.0
    assert numbers.worst([None]) is None
