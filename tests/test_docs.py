"""The pages of the rules are those of their docstrings, and ``bnfix explain`` shows them offline."""

from __future__ import annotations

import inspect
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from torch import nn

import bnfix
from bnfix.cli import run
from bnfix.graph import norm_states
from bnfix.rules import Rule, all_rules, judge, rule_of, thresholds_of
from bnfix.rules.pages import FOLDER, HEADINGS, files, page_of_rule, summary_of
from bnfix.types import Evidence

Output = pytest.CaptureFixture[str]
ROOT = Path(bnfix.__file__).parents[1]
ENV = {**os.environ, "PYTHONPATH": str(ROOT)}
RULES = {rule.code: rule for rule in all_rules()}


def test_the_pages_are_current() -> None:
    there = {f.name: f.read_text(encoding="utf-8") for f in FOLDER.glob("*.md")}
    assert there == files(), "run: python -m bnfix.rules"


def test_codes_and_names_are_unlike() -> None:
    assert all(re.fullmatch(r"BN[1-9]\d\d", code) for code in RULES)
    names = [r.name for r in RULES.values()]
    assert len(set(names)) == len(names)
    assert all(re.fullmatch(r"[a-z]+(-[a-z]+)*", name) for name in names)


@pytest.mark.parametrize("code", RULES)
def test_a_page_says_what_why_an_example_and_the_fix(code: str) -> None:
    rule = RULES[code]
    page = page_of_rule(rule)
    assert page.startswith(f"# {rule.name} ({code})\n")
    headings = [h for h in re.findall(r"^## (.+)$", page, re.M) if h != "Thresholds"]
    assert tuple(headings) == HEADINGS, "in this order"
    assert 10 <= len(summary_of(rule)) <= 100
    for heading in HEADINGS:
        text = page.partition(f"## {heading}\n")[2].partition("\n## ")[0].strip()
        assert len(text) > 20, heading
    assert "```" in page.partition("## Example")[2].partition("\n## ")[0]
    assert page.count("```") % 2 == 0


@pytest.mark.parametrize("code", RULES)
def test_codes_that_a_page_names_are_rules(code: str) -> None:
    named = set(re.findall(r"\bBN\d{3}\b", page_of_rule(RULES[code])))
    assert named <= set(RULES)


class _Asked(Mapping[str, Any]):
    """Options that a user did not set, and which were asked for."""

    def __init__(self) -> None:
        self.names: set[str] = set()

    def get(self, key: str, default: Any = None) -> Any:
        self.names.add(key)
        return default

    def __getitem__(self, key: str) -> Any:
        raise KeyError(key)

    def __iter__(self) -> Any:
        return iter(())

    def __len__(self) -> int:
        return 0


@pytest.mark.parametrize("code", RULES)
def test_thresholds_are_read_off_the_code(code: str) -> None:
    """As many as the file asks for; and what a rule asks for when it runs is among them."""
    rule = RULES[code]
    source = inspect.getsource(sys.modules[type(rule).__module__])
    assert len(thresholds_of(rule)) == len(set(re.findall(r"\.option\(\s*\w+,\s*\"(\w+)\"", source)))
    asked = _Asked()
    norms = norm_states(nn.Sequential(nn.BatchNorm2d(4, momentum=0.95), nn.InstanceNorm1d(3)).half())
    evidence = Evidence(norms=norms, options={code: asked})
    if rule.needs == ("norms",):
        list(rule.check(evidence))
    assert asked.names <= set(thresholds_of(rule))


def test_thresholds_stand_on_the_page_as_toml() -> None:
    import importlib

    toml = importlib.import_module("tomllib" if sys.version_info >= (3, 11) else "tomli")
    for rule in RULES.values():
        block = page_of_rule(rule).partition("```toml\n")[2].partition("```")[0]
        table = toml.loads(block).get("tool", {}).get("bnfix", {}).get("thresholds", {})
        assert table == ({rule.code: dict(thresholds_of(rule))} if thresholds_of(rule) else {})


def test_explain_prints_the_page(capsys: Output) -> None:
    assert run(["explain", "BN101"]) == 0
    assert capsys.readouterr().out == page_of_rule(RULES["BN101"]) + "\n"
    assert bnfix.explain("BN101") == bnfix.explain("aliased-norm") == page_of_rule(RULES["BN101"])


def test_explain_by_name_and_several_each_once(capsys: Output) -> None:
    assert run(["explain", "aliased-norm", "bn101", "BN101"]) == 0
    assert capsys.readouterr().out.count("# aliased-norm (BN101)") >= 1


def test_explain_all_has_every_page(capsys: Output) -> None:
    assert run(["explain", "--all"]) == 0
    out = capsys.readouterr().out
    assert all(page_of_rule(rule) in out for rule in RULES.values())


def test_explain_lists_the_rules_and_a_family(capsys: Output) -> None:
    assert run(["explain"]) == 0
    assert re.findall(r"^\| \[(BN\d+)\]", capsys.readouterr().out, re.M) == list(RULES)
    assert run(["explain", "BN1"]) == 0
    found = re.findall(r"^\| \[(BN\d+)\]", capsys.readouterr().out, re.M)
    assert found == [code for code in RULES if code.startswith("BN1")]


@pytest.mark.parametrize(
    ("asked", "near"),
    [("BN1O1", "bnfix explain BN101"), ("alised-norm", "bnfix explain BN101"), ("aliased", "bnfix explain BN101")],
)
def test_an_unknown_rule_names_what_is_near(asked: str, near: str, capsys: Output) -> None:
    assert run(["explain", asked]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines()[0] == f"error: there is no rule {asked!r}"
    assert near in err
    with pytest.raises(ValueError, match=r"there is no rule .*BN101 aliased-norm"):
        bnfix.explain(asked)


def test_all_and_one_exclude_each_other(capsys: Output) -> None:
    assert run(["explain", "--all", "BN101"]) == 2
    assert "exclude each other" in capsys.readouterr().err


def test_explain_imports_nothing_slow() -> None:
    code = (
        "import sys; from bnfix.cli import run; code = run(['explain', 'BN101']);"
        "print(code, [m for m in ('torch', 'numpy', 'rich.markdown', 'onnx') if m in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=ENV, check=True)
    assert done.stderr.splitlines()[-1] == "0 []"
    assert "# aliased-norm (BN101)" in done.stdout


def test_pages_are_there_without_docstrings() -> None:
    """Under -OO docstrings are gone: the files that are shipped stand in."""
    code = "import bnfix; assert bnfix.check.__doc__ is None; print(bnfix.explain('BN101'), end='')"
    done = subprocess.run([sys.executable, "-OO", "-c", code], capture_output=True, text=True, env=ENV, check=True)
    assert done.stdout == page_of_rule(RULES["BN101"])


def test_explain_to_a_reader_that_leaves_is_quiet() -> None:
    shell = f"{sys.executable} -m bnfix explain --all | true"
    done = subprocess.run(["bash", "-c", shell], capture_output=True, text=True, env=ENV, check=False)
    assert done.stderr == ""


def test_a_rule_file_that_is_new_is_found_by_its_name() -> None:
    for rule in all_rules():
        file = type(rule).__module__.rpartition(".")[2]
        assert file == f"{rule.code.lower()}_{rule.name.replace('-', '_')}"
        assert rule_of(rule.name) is rule_of(rule.code) is rule


def test_no_evidence_at_all_is_no_finding() -> None:
    nothing = judge(Evidence())
    assert nothing.findings == ()
    assert nothing.checked == ()
    assert isinstance(all_rules()[0], Rule)


def test_the_guide_names_what_there_is() -> None:
    guide = (ROOT / "bnfix" / "docs" / "check.md").read_text(encoding="utf-8")
    assert set(re.findall(r"\bBN\d{3}\b", guide)) <= set(RULES)
    import typer

    from bnfix.cli.app import build

    commands: dict[str, Any] = typer.main.get_command(build()).commands  # type: ignore[attr-defined]
    options = {o for p in commands["check"].params for o in (*p.opts, *p.secondary_opts)}
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", guide))
    others = {o for c in commands.values() for p in c.params for o in p.opts}
    assert named <= options | others
    assert {o for o in options if o.startswith("--")} - named - {"--help"} == set()
