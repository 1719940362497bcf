"""What is said of a recalibration: no more than was measured, and every norm."""

from __future__ import annotations

import dataclasses
import io
import json
import math
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from render_statistics import (
    ALL_KEPT,
    FEW_NORMS,
    LEFT,
    MANY_NORMS,
    NO_NORM,
    ONE_SAMPLE,
    PLANNED,
    RECALIBRATIONS,
    dead,
    layer,
)
from rich.console import Console

from bnfix.render import render, to_concise, to_github, to_html, to_json, to_markdown, to_text
from bnfix.render.json_text import dumped
from bnfix.render.numbers import figure
from bnfix.render.pages import page_of
from bnfix.render.pages.recalibration import ROWS
from bnfix.types import Recalibration, Residual

replace = dataclasses.replace


def said(value: object) -> str:
    """All of the report in one line: nothing is broken by the width."""
    return " ".join(to_text(value, width=10_000).split())


@pytest.mark.parametrize("name", ["recalibrated-few", "recalibrated-plan", "recalibrated-one-sample"])
@pytest.mark.parametrize("format", ["concise", "github", "markdown"])
def test_formats(name: str, format: str, snapshot: object) -> None:
    file = io.StringIO()
    render(RECALIBRATIONS[name], format, Console(file=file))  # type: ignore[arg-type]
    assert file.getvalue() == snapshot


def test_the_verdict_says_how_many_on_what_and_how() -> None:
    assert page_of(MANY_NORMS).verdict == (
        "recalibrated 53 of 53 norms on 256 samples (staged, one pass)",
        "the outputs change by 0.82 of their spread on 64 samples (two halves of the data: 0.031)",
        "part of a chunk replayed alone: 0 apart",
        'residual not measured (certify="full")',
    )
    assert page_of(FEW_NORMS).verdict[0] == (
        "recalibrated 4 of 11 norms on 256 samples (staged, 2 passes, 8 iterations, 2 ranks)"
    )


@pytest.mark.parametrize(
    ("residual", "state", "words"),
    [
        (Residual(3.9e-7, 6.4e-8), "done", "at the fixed point of the data seen: residual 4e-07 σ / 6e-08"),
        (Residual(2e-3, 1e-6), "done", "residual 0.0020 σ / 1e-06"),
        (Residual(1e-6, 0.02), "unsure", "NOT at the fixed point of the data seen: residual 1e-06 σ / 0.020"),
        (Residual(math.nan, 0.0), "unsure", "NOT at the fixed point of the data seen: residual nan σ / 0"),
        (None, "done", 'residual not measured (certify="full")'),
    ],
)
def test_the_fixed_point_is_claimed_only_where_it_was_measured(
    residual: Residual | None, state: str, words: str
) -> None:
    page = page_of(replace(MANY_NORMS, residual=residual))
    assert page.verdict[-1] == words
    assert page.state == state
    text = said(replace(MANY_NORMS, residual=residual))
    assert ("at the fixed point" in text) == ("fixed point" in words)


@pytest.mark.parametrize("method", ["population", "online"])
def test_a_method_that_does_not_reach_the_fixed_point_says_so(method: str) -> None:
    words = "near the fixed point if they are alike, not at it"
    assert words in said(replace(MANY_NORMS, method=method))
    assert words not in said(MANY_NORMS)


def test_a_residual_stands_beside_the_one_before_and_that_of_a_new_draw() -> None:
    text = said(FEW_NORMS)
    assert "residual 4e-07 σ / 6e-08 (before: 1.20 σ / 0.85) · on a new draw 0.030 σ / 0.050" in text


def test_a_stream_that_was_certified_is_not_told_to_ask_for_it() -> None:
    text = said(replace(MANY_NORMS, method="population", passes=2, residual_fresh=Residual(0.012, 0.031)))
    assert "residual in one more pass over the loader 0.012 σ / 0.031" in text
    assert "not measured" not in text
    assert "new draw" not in text


def test_a_dry_run_promises_and_claims_nothing() -> None:
    page = page_of(PLANNED)
    assert page.verdict[0] == "would recalibrate 1 of 1 norm on 4,096 samples (population, one pass)"
    assert page.verdict[-1] == "nothing was changed"
    assert "the outputs would change by 0.12" in said(PLANNED)
    assert "residual as it is 0.42 σ / 0.30" in said(PLANNED)
    assert "not measured" not in said(PLANNED)
    assert all(row.state == "plain" for row in page.rows)


def test_what_needed_nothing_was_left_as_it_was() -> None:
    page = page_of(LEFT)
    assert (page.state, page.verdict[0]) == ("kept", "left as it was")
    assert "would change by 0.021 of their spread (two halves of the data: 0.018)" in page.verdict[1]
    assert "✓" not in said(LEFT)


def test_without_a_norm_there_is_nothing_to_do() -> None:
    assert said(NO_NORM).endswith("found no norm to recalibrate")
    assert "recalibrated 0 of 3 norms: every one was kept" in said(ALL_KEPT)
    assert "(root)" in said(ALL_KEPT)


def test_few_layers_have_a_row_each_in_the_order_of_the_model_the_worst_marked() -> None:
    rows = page_of(FEW_NORMS).rows
    assert [row.cells[0] for row in rows[:5]] == [s.name for s in FEW_NORMS.layers]
    assert [row.cells[0] for row in rows if "drifted most" in row.cells[-1]] == [FEW_NORMS.worst(1)[0].name]
    assert [row.cells[-1] for row in rows[2:4]] == ["pooled over 2 calls"] * 2


@pytest.mark.parametrize("count", [1, ROWS, ROWS + 1, 160])
def test_of_many_layers_those_that_drifted_most_and_what_the_others_do_not_exceed(count: int) -> None:
    # 0.37·n mod 1 goes up and down: the worst are not neighbours, and none is as bad as another.
    layers = tuple(layer(f"b{n}.bn", drift=0.02 + 0.37 * n % 1, samples=100 + n) for n in range(count))
    page = page_of(replace(MANY_NORMS, layers=layers))
    assert len(page.rows) == min(count, ROWS + 1)
    worst = sorted(layers, key=lambda s: -max(s.kl))[:ROWS]
    assert [row.cells[0] for row in page.rows[:ROWS]] == [s.name for s in layers if s in worst]
    marked = [row.cells[0] for row in page.rows if "drifted most" in row.cells[-1]]
    assert marked == ([worst[0].name] if count > 1 else [])
    assert [line.site for line in page.lines] == [s.name for s in layers]
    rest = [s for s in layers if s not in worst]
    if rest:
        name, _, shift, ratio, se, kl, result = page.rows[-1].cells
        assert (name, result) == (f"… {count - ROWS} more", "the worst of them")
        assert shift == figure(max(s.mean_shift for s in rest))
        assert ratio == figure(math.exp(max((math.log(s.var_ratio) for s in rest), key=abs)))
        assert (se, kl) == (figure(max(s.se for s in rest)), figure(max(s.worst_kl for s in rest)))


def test_figures_of_a_row_are_those_of_the_layer() -> None:
    s = FEW_NORMS.layers[1]
    wanted = f"{s.n:,}", *map(figure, (s.mean_shift, s.var_ratio, s.se, s.worst_kl))
    assert page_of(FEW_NORMS).rows[1].cells[1:6] == wanted
    c = s.kl.index(max(s.kl))
    words = (
        f"channel {c}: mean {s.mean_before[c]:.4g} → {s.mean[c]:.4g}, variance {s.var_before[c]:.4g} → {s.var[c]:.4g}"
    )
    assert f"drifted most: body.0.bn, {words}" in said(FEW_NORMS)


def test_every_kept_norm_is_named_with_its_reason() -> None:
    text = to_concise(FEW_NORMS)
    for site in FEW_NORMS.frozen:
        assert f"{site}: kept: frozen in evaluation mode (include_frozen=True takes it)" in text
    assert "aux.bn: kept: no forward reached it" in text
    assert "head.bn: kept: not selected" in text
    assert "teacher.bn: kept: a script module, whose norms can't be seen" in text
    shown = [row.cells for row in page_of(FEW_NORMS).rows if row.state == "kept"]
    assert [cells[0] for cells in shown] == [", ".join(FEW_NORMS.frozen), "aux.bn", "head.bn", "teacher.bn"]


def test_a_norm_that_was_measured_and_yet_kept_counts_once_and_as_kept() -> None:
    """A single value a channel has a mean and no variance: it stands in ``layers`` and in ``left``."""
    why = {"stem.bn": "one value a channel: that leaves no variance"}
    page = page_of(replace(FEW_NORMS, left=("stem.bn",), left_why=why))
    assert page.verdict[0].startswith("recalibrated 3 of 9 norms")
    assert [row.cells[-1] for row in page.rows if row.cells[0] == "stem.bn"] == [f"kept: {why['stem.bn']}"]
    assert [line.text for line in page.lines if line.site == "stem.bn"] == [f"kept: {why['stem.bn']}"]


def test_what_was_wanted_raises_no_warning_what_nobody_reached_does() -> None:
    warnings = [line for line in to_github(FEW_NORMS).splitlines() if line.startswith("::warning")]
    assert warnings == ["::warning title=bnfix%3A aux.bn::kept: no forward reached it"]


def test_advice_with_a_line_to_paste_is_a_next_step_other_advice_a_note() -> None:
    page = page_of(FEW_NORMS)
    assert page.next == (("a norm for each call site", "model = bnfix.unshare(model, example).model"),)
    assert page.notes[-1] == "the call sites of shared.bn differ by 0.6 σ: no statistics fit both"
    assert "model = bnfix.unshare(model, example).model" in to_markdown(FEW_NORMS)


def test_what_the_figures_rest_on() -> None:
    text = said(FEW_NORMS)
    assert "staged: shared.bn is called twice in a forward" in text
    assert "4 batches, 2 passes over the loader, 9 forwards a sample, all samples in one chunk" in text
    assert "taken from a batch: key 'image' → x, key 'mask' → mask" in text
    assert "41 s of CPU time (estimating 38, judging 2.3)" in said(MANY_NORMS)


def test_standard_errors_and_what_would_make_them_small() -> None:
    # SE of a mean: √(0.1/256) σ = 0.0198 σ; of a variance √(0.2/256) = 0.028; 256·(0.2/256/0.01² − 1) = 1744 more,
    # or one more by rounding up what is not quite whole.
    needed = MANY_NORMS.needed_samples()
    assert needed in (1744, 1745)
    assert "at most 0.020 σ of a mean" in said(MANY_NORMS)
    assert f"0.028 of a variance: 0.01 takes {needed:,} more samples" in said(MANY_NORMS)
    enough = replace(MANY_NORMS, layers=(layer("bn", samples=2001),))
    assert "0.0071 σ of a mean (bn), 0.010 of a variance: within 0.01" in said(enough)
    assert "standard error unknown: it takes at least two samples" in said(ONE_SAMPLE)
    still = replace(layer("bn", samples=20), var=(0.0,) * len(layer("bn").var))
    assert "no standard error: no channel has any spread" in said(replace(MANY_NORMS, layers=(still,)))


def test_unknown_is_not_zero() -> None:
    page = page_of(replace(MANY_NORMS, layers=(layer("bn", samples=1),)))
    assert page.rows[0].cells[4] == "–"
    assert "the outputs change by nan of their spread" in said(ONE_SAMPLE)
    assert page_of(ONE_SAMPLE).rows[0].cells[5] == "inf"


def test_layers_and_residuals_are_one_line() -> None:
    s = FEW_NORMS.layers[3]
    assert str(s) == f"shared.bn@1: mean_shift=0.38 var_ratio=0.69 se=0.020 kl=0.089 n={s.n} samples=256"
    assert str(Residual(3.9e-7, 6.4e-8)) == "residual: 4e-07 σ / 6e-08"
    assert "shared.bn@1" in s._repr_html_()
    assert "4e-07" in Residual(3.9e-7, 6.4e-8)._repr_html_()


def test_ascii_keeps_the_words() -> None:
    file = type("Ascii", (io.StringIO,), {"encoding": "ascii"})()
    render(FEW_NORMS, "full", Console(file=file, width=200))
    assert "residual 4e-07 sd / 6e-08" in file.getvalue()
    assert "mean 1.522 -> 0.5918" in file.getvalue()
    assert "\\u" not in file.getvalue()


def test_html_holds_every_layer() -> None:
    html = to_html(MANY_NORMS)
    assert all(f"{s.name}  mean_shift=" in html for s in MANY_NORMS.layers)
    assert MANY_NORMS._repr_html_() == html


def test_json_is_the_whole_value_each_list_of_numbers_on_one_line() -> None:
    text = to_json(MANY_NORMS)
    assert json.loads(text) == MANY_NORMS.to_dict()
    assert sum(s.channels for s in MANY_NORMS.layers) == 26_560
    # 53 layers of 15 fields and 2 braces, and what stands around them: not 265,600 numbers.
    assert text.count("\n") < 53 * 17 + 60
    nan = json.loads(to_json(ONE_SAMPLE))
    assert nan["layers"][0]["se_mean"][0] == "nan"
    assert nan["layers"][0]["kl"][1] == "inf"
    assert re.search(r'"se_mean": \["nan", "nan", ', to_json(ONE_SAMPLE))


scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()
documents = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4), max_leaves=20
)


@given(documents)
def test_json_on_few_lines_is_json(document: object) -> None:
    text = dumped(document)
    assert json.loads(text) == document
    assert text.isascii()
    # Spaces and line breaks apart, it is what the standard library writes.
    assert re.sub(r"\s", "", text) == re.sub(r"\s", "", json.dumps(document, indent=2, sort_keys=True))


def test_json_has_no_numbers_that_json_has_not() -> None:
    for number in (math.nan, math.inf):
        with pytest.raises(ValueError, match="JSON compliant"):
            dumped({"a": [1.0, number]})


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (None, "–"), (math.nan, "–"), (0.0, "0"), (3.9e-7, "4e-07"), (9.6e-4, "0.00096"), (0.02, "0.020"),
        (0.0949, "0.095"), (0.095, "0.10"), (1.0, "1.00"), (9.96, "10"), (346.7, "347"), (9999.4, "9,999"),
        (2e12, "2e+12"), (math.inf, "inf"), (-0.5, "-0.50"),
    ],
)  # fmt: skip
def test_figure(value: float | None, shown: str) -> None:
    assert figure(value) == shown


def test_a_dead_channel_is_not_what_drifted_most() -> None:
    healthy = layer("bn2", drift=0.2)
    was_dead = replace(dead(layer("bn1", drift=0.1)), var=(0.0,) * 16, var_after=(0.0,) * 16, var_before=(1e-30,) * 16)
    was_dead = replace(was_dead, mean_before=was_dead.mean, kl=(math.inf,) * 16)
    report = Recalibration((was_dead, healthy), "staged", "", 256)
    assert report.worst(1) == (healthy,)
    assert "drifted most: bn2" in said(report)
