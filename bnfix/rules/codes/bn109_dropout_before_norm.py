from __future__ import annotations

from collections.abc import Iterator

from bnfix.rules.reading import ELEMENTWISE, POOLING, SHAPING, base, before, listed, site, some
from bnfix.rules.rule import Case, Rule
from bnfix.types import Evidence, Finding, Fix, Skipped

_DROPOUT = frozenset({"dropout", "feature_dropout", "native_dropout"})
_BETWEEN = ELEMENTWISE | POOLING | SHAPING


class DropoutBeforeNorm(Rule):
    """Dropout in front of a batch norm.

    ## What it does

    Runs the model in training mode (its norms evaluated) and looks for dropout with p > 0 whose output reaches a batch
    norm through nothing but activations, pooling and reshaping. Alpha dropout keeps mean and variance, and is left out.

    ## Why is this bad

    Dropout scales what it keeps by 1/(1 − p): the mean stays, the variance grows. Running statistics are gathered in
    training, with dropout; evaluation has none, and divides by a deviation that is too large. Behind a ReLU the
    variance is 1.37 times too large at p = .2, and 2.47 times at p = .5. The error runs through the whole net behind
    it. Through a convolution or linear layer it gets smaller, and is not reported.

    ## Example

    ```python
    nn.Sequential(conv, nn.ReLU(), nn.Dropout(0.5), nn.BatchNorm2d(64))   # bad
    nn.Sequential(conv, nn.BatchNorm2d(64), nn.ReLU(), nn.Dropout(0.5))
    ```

    ## Fix

    Move the dropout behind the norm, best behind the last one; that needs a new training. A trained model is repaired
    by `recalibrate`: it measures the statistics without dropout, as evaluation will have them.
    """

    code = "BN109"
    name = "dropout-before-norm"
    needs = ("facts",)

    def check(self, evidence: Evidence) -> Iterator[Finding | Skipped]:
        """One finding for each probability."""
        facts = evidence.facts_training
        if evidence.training_missing or facts is None:
            part = "" if facts is None else "; of dropout, only modules were looked at, not F.dropout"
            sites = () if facts is None else tuple(site(n.path) for n in facts.norms)
            reason = f"{evidence.training_missing or 'dropout shows in training mode alone'}{part}"
            yield Skipped(self.code, reason, "an example that runs in training mode", sites)
        if facts is None:
            return
        found: dict[float, dict[str, str]] = {}
        for norm in facts.norms:
            for r, i in norm.calls:
                route = facts.routes[r]
                op = before(route, route.ops[i], _BETWEEN)
                if op is None or base(op) not in _DROPOUT or op.attrs.get("train") is False:
                    continue
                p = float(op.attrs.get("p", 0.0))
                if p > 0:
                    found.setdefault(p, {})[site(norm.path)] = str(op.site)
        for p in sorted(found, reverse=True):
            paths = tuple(found[p])
            layers = listed([f"behind {d}" for d in dict.fromkeys(found[p].values())], 2)
            growth = 1 + p / (1 - p) * _RELU if p < 1 else float("inf")
            yield self.found(
                "warning",
                f"{some(paths)}: {layers}, dropout with p = {p:g}; the variance stored is that of training, some "
                f"{growth:.2g} times that of evaluation behind a ReLU",
                paths,
                fix=Fix("code", "move the dropout behind the norm; a trained model: bnfix recalibrate", paths),
                p=p,
                growth=growth,
            )

    def bad(self) -> Case:
        """Dropout first."""
        from torch import nn, randn

        layers = (nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Dropout(0.3), nn.MaxPool2d(2), nn.BatchNorm2d(4))
        return Case(nn.Sequential(*layers), randn(4, 3, 6, 6))

    def good(self) -> Case:
        """The norm first, a layer between, and dropout that never drops."""
        from torch import nn, randn

        layers = (nn.Dropout(0.0), nn.BatchNorm2d(3), nn.ReLU(), nn.Dropout(0.3), nn.Conv2d(3, 4, 1))
        return Case(nn.Sequential(*layers, nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1)), randn(4, 3, 6, 6))


# E[x²]/Var(x) of max(0, N(0, 1)) is ½ / (½ − 1/2π) = 1.467: dropout adds p/(1 − p) times that to the variance.
_RELU = 1.467
