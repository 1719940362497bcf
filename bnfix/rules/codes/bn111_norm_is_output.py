from __future__ import annotations

from collections.abc import Iterator

from bnfix.rules.reading import SHAPING, base, sites, some
from bnfix.rules.rule import Case, Rule
from bnfix.types import Evidence, Finding, Op, Route


class NormIsOutput(Rule):
    """The model ends with a batch norm.

    ## What it does

    Finds norms whose output the model returns, as it is or reshaped.

    ## Why is this bad

    Logits behind a norm have a fixed scale, whatever the layers in front say, and every error of its statistics is an
    error of the output. Necks of re-identification models, projectors of self-supervised ones and feature extractors
    do it on purpose, which is why this rule is off.

    ## Example

    ```python
    nn.Sequential(backbone, nn.Linear(512, 10), nn.BatchNorm1d(10))   # found
    nn.Sequential(backbone, nn.BatchNorm1d(512), nn.Linear(512, 10))
    ```

    ## Fix

    None that keeps the function: put the norm in front of the last layer, and train again.
    """

    code = "BN111"
    name = "norm-is-output"
    needs = ("facts",)
    optional = True

    def check(self, evidence: Evidence) -> Iterator[Finding]:
        """One finding for all."""
        facts = evidence.facts
        assert facts is not None
        norms = [n for n in facts.norms if any(_returned(facts.routes[r], facts.routes[r].ops[i]) for r, i in n.calls)]
        if norms:
            paths = sites(norms)
            yield self.found("info", f"{some(paths)}: the model returns its output", paths)

    def bad(self) -> Case:
        """It ends with the norm."""
        from torch import nn, randn

        return Case(nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4)), randn(4, 6))

    def good(self) -> Case:
        """A layer behind it."""
        from torch import nn, randn

        return Case(nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)), randn(4, 6))


def _returned(route: Route, op: Op) -> bool:
    pending = [op]
    while pending:
        for user in route.users(pending.pop().index):
            if user.kind == "output":
                return True
            if user.kind == "other" and base(user) in SHAPING:
                pending.append(user)
    return False
