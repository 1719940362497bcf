"""The page of a rule, out of its docstring: what ``bnfix explain`` shows and what lies in ``bnfix/docs/rules``.

``python -m bnfix.rules`` writes the files anew, after a rule was added or changed.
"""

from __future__ import annotations

import ast
import inspect
import sys
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from types import ModuleType

from bnfix.rules.rule import NEEDS, Rule

FOLDER = Path(__file__).resolve().parents[1] / "docs" / "rules"
HEADINGS = ("What it does", "Why is this bad", "Example", "Fix")
_READS = {
    "norms": "model or weights",
    "facts": "`--input`",
    "data": "`--data`",
    "loop": "`bnfix.watch`",
    "onnx": "ONNX file",
    "against": "`--against`",
}
_FAMILIES = {
    "BN1": "structure",
    "BN2": "stored statistics and their age",
    "BN3": "the batches a norm sees",
    "BN4": "the training loop",
    "BN5": "exported programs and ONNX files",
}


def page_of_rule(rule: Rule) -> str:
    """The page of ``rule`` in Markdown: name and code, what it reads, its text, its thresholds.

    Raises:
        LookupError: it has no text: Python ran with -OO, and there is no file of the page either.
    """
    text = inspect.cleandoc(type(rule).__doc__ or "")
    if not text:
        file = FOLDER / f"{rule.code}.md"
        if not file.is_file():
            raise LookupError(f"{rule.code} has no docstring")
        return file.read_text(encoding="utf-8")
    first, _, rest = text.partition("\n")
    return "\n".join([f"# {rule.name} ({rule.code})", "", first, "", *_facts(rule), rest.rstrip(), *_limits(rule), ""])


def summary_of(rule: Rule) -> str:
    """The first line of its text, without the full stop."""
    return (type(rule).__doc__ or rule.name).strip().split("\n", 1)[0].rstrip(".")


def index_of(rules: Sequence[Rule]) -> str:
    """``rules`` in one page, by family."""
    lines = [
        "# Rules",
        "",
        "What `bnfix check` and `bnfix.watch` look for. `bnfix explain BN101` shows a page, offline.",
    ]
    for family in sorted({r.code[:3] for r in rules}):
        lines += ["", f"## {family}: {_FAMILIES.get(family, 'others')}", "", "| code | name | finds | reads |"]
        lines.append("| --- | --- | --- | --- |")
        for rule in rules:
            if rule.code.startswith(family):
                off = " (off by default)" if rule.optional else ""
                finds = summary_of(rule).replace("|", "\\|")
                reads = ", ".join(_READS[part] for part in rule.needs)
                lines.append(f"| [{rule.code}]({rule.code}.md) | {rule.name}{off} | {finds} | {reads} |")
    return "\n".join([*lines, ""])


@cache
def thresholds_of(rule: Rule) -> Mapping[str, float]:
    """The thresholds that a user may set, by name, with their defaults: the calls of ``self.option`` in its file."""
    own = [c for c in type(rule).__mro__ if issubclass(c, Rule) and c is not Rule]
    found: dict[str, float] = {}
    for module in dict.fromkeys(sys.modules[c.__module__] for c in own):
        for node in _without_other_rules(module, own):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "option"):
                continue
            name, default = (ast.unparse(a) for a in (*node.args, *(k.value for k in node.keywords))[1:3])
            known = {**vars(module), "self": rule}
            found[str(ast.literal_eval(name))] = float(eval(default, known))  # the source of the rule itself, no input
    return found


def _without_other_rules(module: ModuleType, own: Sequence[type]) -> Iterator[ast.AST]:
    for statement in ast.parse(inspect.getsource(module)).body:
        value = vars(module).get(statement.name) if isinstance(statement, ast.ClassDef) else None
        if not (isinstance(value, type) and issubclass(value, Rule) and value not in own):
            yield from ast.walk(statement)


def files() -> dict[str, str]:
    """Every page under the name of its file."""
    from bnfix.rules.judging import all_rules

    return {"README.md": index_of(all_rules()), **{f"{r.code}.md": page_of_rule(r) for r in all_rules()}}


def write() -> None:
    """Write the pages into ``bnfix/docs/rules``, and take away those of rules that are gone."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    wanted = files()
    for file in FOLDER.glob("*.md"):
        if file.name not in wanted:
            file.unlink()
    for name, text in wanted.items():
        (FOLDER / name).write_text(text, encoding="utf-8")
    print(f"{len(wanted)} pages in {FOLDER}")


def _facts(rule: Rule) -> list[str]:
    reads = "; ".join(NEEDS[part] for part in rule.needs)
    off = [f"- Off by default; to switch it on: `--select {rule.code}`"] if rule.optional else []
    return [f"- Needs: {reads}", *off, f'- To silence it in one layer: `module.bnfix_ignore = {{"{rule.code}"}}`']


def _limits(rule: Rule) -> list[str]:
    known = thresholds_of(rule)
    if not known:
        return []
    lines = [f"{name} = {value:g}" for name, value in known.items()]
    return ["", "## Thresholds", "", "The defaults, for `pyproject.toml`:", "", "```toml",
            f"[tool.bnfix.thresholds.{rule.code}]", *lines, "```"]  # fmt: skip
