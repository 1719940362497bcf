"""What a person reads of a diagnosis and of a repair, and what other programs do."""

from __future__ import annotations

import io
import json
import re
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from render_diagnoses import (
    ABOUT,
    ALIASES,
    CHECKED,
    DIAGNOSES,
    FEW_VALUES,
    HEALED,
    HEALTHY,
    ILL,
    LOOP_RULES,
    MENDED,
    MOMENTUM,
    NOTHING,
    PLANNED,
    RECALIBRATED,
    SITES,
    STALE,
    WHOLE,
)  # fmt: skip
from rich.console import Console
from test_render_formats import Checked, written
from test_render_terminal import Ascii, drawn

from bnfix.render import FORMATS, About, render_all, to_concise, to_github, to_html, to_markdown, to_text
from bnfix.render.pages.diagnosis import _ranges
from bnfix.render.several import Failure
from bnfix.types import Diagnosis, Finding, Fix, Safety, Skipped


@pytest.mark.parametrize("name", DIAGNOSES)
def test_in_80_columns(name: str, snapshot: object) -> None:
    assert drawn(DIAGNOSES[name], about=ABOUT) == snapshot


@pytest.mark.parametrize("format", ["concise", "github", "markdown"])
@pytest.mark.parametrize("name", ["diagnosis-ill", "mended-some"])
def test_formats(name: str, format: str, snapshot: object) -> None:
    assert written(DIAGNOSES[name], format, about=ABOUT) == snapshot


@pytest.mark.parametrize("name", DIAGNOSES)
@pytest.mark.parametrize("width", [60, 80, 120])
def test_no_line_but_what_is_to_be_pasted_is_wider_than_the_terminal(name: str, width: int) -> None:
    lines = drawn(DIAGNOSES[name], width, about=ABOUT).splitlines()
    steps = max(i for i, line in enumerate(lines) if not line.strip())
    assert [line for line in lines[:steps] if len(line) > width] == []


def test_the_worst_stands_first_and_says_where_what_and_what_heals_it() -> None:
    shuffled = replace(ILL, findings=tuple(reversed(ILL.findings)))
    text = drawn(shuffled, 200)
    order = re.findall(r"^  [✗!i] (BN\d+)", text, re.M)
    assert order == ["BN201", "BN204", "BN304", "BN301", "BN106", "BN101"]
    block = text[text.index("BN204 stale-stats") :]
    assert "0.62 of their spread" in block
    assert "fix (needs data: bnfix.recalibrate): estimate the running statistics anew" in block


def test_many_sites_are_counted_and_each_is_in_the_concise_report() -> None:
    one = Diagnosis((STALE,), (), CHECKED, norms=53)
    head = next(line for line in drawn(one).splitlines() if "BN204" in line)
    assert head == "  ✗ BN204 stale-stats  layer4.2.bn3, layer4.2.bn2, layer4.2.bn1 and 50 more"
    lines = to_concise(one).splitlines()
    assert [line.partition(":")[0] for line in lines[:-1]] == list(SITES)
    assert all("BN204 error stale-stats" in line for line in lines[:-1])
    text = Checked(to_html(one)).text
    assert all(site in text for site in SITES)
    assert "every one by itself: --output-format concise" in drawn(one)


def test_what_is_shown_whole_is_not_said_to_be_short() -> None:
    assert "every one by itself" not in drawn(Diagnosis((MOMENTUM, WHOLE), (), CHECKED))


def test_many_findings_of_one_rule_are_one_with_their_number() -> None:
    text = drawn(Diagnosis(ALIASES, (), CHECKED))
    assert text.count("BN101 aliased-norm") == 1
    assert "(and 4 more like this)" in text
    assert text.count("give each place its own norm") == 1
    assert to_github(Diagnosis(ALIASES, (), CHECKED)).count("::notice title=bnfix%3A a.0.bn") == 1
    few = drawn(Diagnosis(ALIASES[:3], (), CHECKED))
    assert few.count("BN101 aliased-norm") == 3


def test_findings_of_unlike_severity_are_never_run_together() -> None:
    grave = tuple(replace(f, severity="error") for f in ALIASES)
    assert drawn(Diagnosis((*grave, *ALIASES), (), CHECKED)).count("BN101 aliased-norm") == 2


def test_the_verdict_counts_what_was_not_checked() -> None:
    verdict = to_concise(HEALTHY).splitlines()[-1]
    assert verdict == "no error, no warning · 53 norms, 12 rules checked · NOT checked: 15 rules"
    partly = Diagnosis((), (Skipped("BN101", "not here", sites=("a",)),), ("BN101",))
    assert to_concise(partly) == "no error, no warning · 0 norms, 1 rule checked · 1 rule not everywhere"


def test_nothing_checked_is_no_pass() -> None:
    text = drawn(NOTHING)
    assert "✓" not in text
    assert "? nothing was checked" in text


def test_what_is_missing_is_told_once_with_what_it_needs() -> None:
    text = to_text(HEALTHY, width=200)
    assert "not checked: BN102, BN103: need example=\n" in text
    assert "not checked: BN205, BN302, BN303, BN305: need data=\n" in text
    assert text.count("BN401–BN409: need a training loop: bnfix.watch(model, optimizer)") == 1
    one = Diagnosis((), (Skipped("BN502", "needs an ONNX file", "an ONNX file"),), CHECKED)
    assert "not checked: BN502: needs an ONNX file" in to_text(one)
    here = Diagnosis((), (Skipped("BN301", "no batch reached it", sites=("aux.bn", "")),), CHECKED)
    assert "not checked: BN301 at aux.bn, (root): no batch reached it" in to_text(here)


def test_rules_with_unlike_reasons_are_not_run_together() -> None:
    skipped = (Skipped("BN102", "the graph can't be had: x"), Skipped("BN103", "the graph can't be had: y"))
    text = to_text(Diagnosis((), skipped, CHECKED))
    assert "BN102: the graph can't be had: x" in text
    assert "BN103: the graph can't be had: y" in text


def test_one_line_for_all_that_it_heals() -> None:
    text = drawn(ILL, 300)
    assert text.count("bnfix recalibrate weights.pt") == 1
    assert re.search(r"^  fix BN204, BN201 +bnfix recalibrate weights\.pt --arch", text, re.M)


def test_what_takes_training_has_no_line() -> None:
    text = drawn(Diagnosis((FEW_VALUES,), (), CHECKED))
    assert "fix (in your code): larger batches" in text
    assert "fix BN301" not in text


def test_annotations_are_few_and_levelled() -> None:
    levels = [line.split()[0] for line in to_github(ILL, ABOUT).splitlines()]
    assert levels == ["::error"] * 2 + ["::warning"] * 3 + ["::notice", "::error"]
    assert to_github(HEALTHY).splitlines()[0].startswith("::notice title=bnfix::no error")


def test_a_repair_shows_each_change_and_what_is_left() -> None:
    text = drawn(MENDED, 200)
    assert "✓ set  head.norm  momentum 0.99 → momentum 0.01" in text
    assert "! fixed 2 of 3 findings (4 norms changed) · left: 1 warning" in text
    assert "note: BN301: not fixed: needs training" in text
    assert "✓ fixed 3 of 3 findings" in drawn(HEALED, 200)
    plan = drawn(PLANNED, 200)
    assert "would fix 2 of 3 findings" in plan
    assert "nothing was written, this is the plan" in plan
    assert not re.search(r"\bfixed \d", plan)


def test_every_change_of_many_is_in_the_concise_report() -> None:
    text = drawn(RECALIBRATED, 200)
    assert "42 more changes" in text
    assert [line.partition(":")[0] for line in to_concise(RECALIBRATED).splitlines()[:-1]] == list(SITES)


def test_several_files_are_one_table_and_name_themselves() -> None:
    file = io.StringIO()
    values = [ILL, HEALTHY, Failure("c.pt", "LoadError", "c.pt is cut off")]
    about = [About("bnfix check", name) for name in ("a.pt", "b.pt", "c.pt")]
    render_all(values, "full", Console(file=file, width=160, color_system=None), about, About("bnfix check", "3 files"))
    text = file.getvalue()
    assert re.search(r"✗ a\.pt +2 errors, 3 warnings, 5 infos", text)
    assert re.search(r"✓ b\.pt +no error, no warning", text)
    assert re.search(r"✗ c\.pt +error: c\.pt is cut off", text)
    assert "1 of 2 files not clean" in text
    assert "1 of 3 files failed: c.pt" in text
    assert "a.pt: BN204 stale-stats at layer4.2.bn3" in text
    file = io.StringIO()
    render_all(values, "github", Console(file=file), about, About("bnfix check"))
    lines = file.getvalue().splitlines()
    assert lines[0].startswith("::error title=bnfix check%3A a.pt%3A layer4.2.bn3")
    assert "::error title=bnfix check%3A c.pt::error: c.pt is cut off" in lines


@pytest.mark.parametrize("name", DIAGNOSES)
def test_json_is_the_value(name: str) -> None:
    document = json.loads(written(DIAGNOSES[name], "json"))
    assert document == json.loads(json.dumps(DIAGNOSES[name].to_dict()))  # type: ignore[attr-defined]
    assert document["schema_version"] == 1


def test_json_is_plain_data() -> None:
    fix = ILL.to_dict()["findings"][0]["fix"]
    assert type(fix["safety"]) is str
    assert fix["safety"] == "needs data"


@pytest.mark.parametrize("name", DIAGNOSES)
def test_html_is_whole_and_fetches_nothing(name: str) -> None:
    page = Checked(written(DIAGNOSES[name], "html", about=ABOUT).replace("<br>", ""))
    assert page.tags.isdisjoint({"script", "link", "img", "iframe", "style", "object"})
    assert page.attributes <= {"style", "lang", "charset", "name", "content"}


def test_html_and_markdown_keep_the_fix_on_a_line_of_its_own() -> None:
    assert "<br>fix (needs data" in to_html(ILL)
    assert "<br>fix (needs data" in to_markdown(ILL)
    assert ILL._repr_html_() == to_html(ILL)


def test_what_a_model_names_is_escaped() -> None:
    hostile = Finding("BN101", "x", "error", "<b>bold</b> | \x1b[2J", ("<script>alert(1)</script>", "[bold]a[/]"))
    value = Diagnosis((hostile,), (), CHECKED)
    page = Checked(to_html(value).replace("<br>", ""))
    assert "script" not in page.tags
    assert "b" not in page.tags
    for format in ("full", "concise", "github", "markdown", "html"):
        assert "\x1b" not in written(value, format)
    assert "[bold]a[/]" in drawn(value)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("name", ["diagnosis-ill", "mended-some"])
def test_any_encoding_can_take_it(format: str, name: str) -> None:
    assert written(DIAGNOSES[name], format, "cp1252").encode("cp1252")
    text = drawn(DIAGNOSES[name], about=ABOUT, file=Ascii())
    assert text.isascii()


def test_piped_output_is_plain_and_not_wrapped() -> None:
    text = drawn(ILL, 40, terminal=False, about=ABOUT)
    assert "\x1b" not in text
    assert f"      {STALE.message}\n" in text


def test_parts_show_themselves_in_a_line() -> None:
    assert str(STALE).startswith("layer4.2.bn3, layer4.2.bn2, layer4.2.bn1 and 50 more: BN204 stale-stats: ")
    assert str(WHOLE).startswith("(the model): BN304 sorted-batches")
    assert str(LOOP_RULES[0]) == "not checked: BN401: needs a training loop: bnfix.watch(model, optimizer)"
    assert str(Fix("float", "statistics in float32", ("bn",), safety=Safety.EXACT)) == (
        "bn: float: statistics in float32 (exact)"
    )


@pytest.mark.parametrize(
    ("message", "sites", "said"),
    [
        ("bn: off by 3", ("bn",), "off by 3"),
        ("(root): off by 3", ("",), "off by 3"),
        ("2 norms (a.bn, b.bn): off by 3", ("a.bn", "b.bn"), "off by 3"),
        ("4 call sites (bn@1 and 3 more): off by 3", ("bn@1",), "off by 3"),
        ("bn called twice: off by 3", ("bn",), "bn called twice: off by 3"),
        ("bn: off by 3", ("abn",), "bn: off by 3"),
        ("b+n: off by 3", ("bbn",), "b+n: off by 3"),
        ("bn: off by 3", (), "bn: off by 3"),
    ],
)
def test_a_place_is_not_told_twice(message: str, sites: tuple[str, ...], said: str) -> None:
    value = Diagnosis((Finding("BN101", "x", "info", message, sites),), (), CHECKED)
    assert f"      {said}\n" in drawn(value)
    assert f": BN101 info x: {said}" in to_concise(value)
    assert value.to_dict()["findings"][0]["message"] == message


@given(st.sets(st.integers(101, 140), max_size=20))
def test_runs_of_codes_hold_each_once(numbers: set[int]) -> None:
    codes = [f"BN{n}" for n in numbers]
    found: list[str] = []
    for part in _ranges(codes):
        first, dash, last = part.partition("–")
        found += [f"BN{n}" for n in range(int(first[2:]), int(last[2:]) + 1)] if dash else [first]
    assert found == sorted(codes)
