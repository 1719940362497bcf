"""``bnfix explain``: the page of a rule, offline."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from bnfix.cli import options as o
from bnfix.cli.door import DONE, UsageError
from bnfix.cli.screen import show_markdown

ORDER = 36
EPILOG = """**Examples**

`bnfix explain BN204`

`bnfix explain stale-stats aliased-norm`

`bnfix explain` lists the rules, `bnfix explain BN2` those of a family

`bnfix explain --all > rules.md`

**Exit codes**  0 explained · 2 there is no such rule"""


def explain(
    rules: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="RULE", help="Codes or names of rules; the beginning of a code lists a family.", show_default=False
        ),
    ] = None,
    every: Annotated[bool, typer.Option("--all", help="The pages of all rules.")] = False,
    traceback: o.TracebackOption = False,
) -> int:
    """Say what a rule of `bnfix check` finds, why that is bad, with an example, and what heals it at which cost.

    Nothing is fetched, and neither torch nor numpy is imported. Into a pipe or a file the page goes as Markdown.
    """  # fmt: skip
    from bnfix.rules import all_rules, index_of, page_of_rule

    if every and rules:
        raise UsageError("--all and RULE exclude each other", hint="bnfix explain --all")
    if every:
        pages = [page_of_rule(rule) for rule in all_rules()]
    elif not rules:
        pages = [index_of(all_rules())]
    else:
        pages = [page for asked in dict.fromkeys(rules) for page in _pages(asked)]
    show_markdown("\n".join(pages), sys.stdout)
    return DONE


def _pages(asked: str) -> list[str]:
    from bnfix.rules import all_rules, index_of, near_codes, page_of_rule, rule_of

    rule = rule_of(asked)
    if rule is not None:
        return [page_of_rule(rule)]
    family = [r for r in all_rules() if len(asked) > 1 and r.code.startswith(asked.strip().upper())]
    if family:
        return [index_of(family)]
    near = near_codes(asked)
    lines = [f"did you mean   bnfix explain {code.partition(' ')[0]}   ({code.partition(' ')[2]})" for code in near]
    raise UsageError(f"there is no rule {asked!r}", hint="\n".join([*lines, "all there are:   bnfix explain"]))
