from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from bnfix.rules.codes._examples import statistics
from bnfix.rules.reading import needs_module, sites, some
from bnfix.rules.rule import Case, Rule
from bnfix.types import Evidence, Finding, Fix, NormState, Safety, Skipped

if TYPE_CHECKING:
    from torch import nn


class EpsAgainstReference(Rule):
    """Another eps than the model it came from, where it matters.

    ## What it does

    Compares eps with that of a reference (`--against`), and computes what the difference makes of each channel: the
    ratio of the deviations, √((v + e₁)/(v + e₂)). It warns where a channel comes out below .95.

    ## Why is this bad

    TensorFlow's default is .001, torch's .00001. A converted model with the wrong one scales channels of small variance
    by a wrong factor, up to ten times, and nothing fails: accuracy drops by a few percent and nobody knows why.
    For channels whose variance is far above both, any eps will do.

    ## Example

    ```python
    nn.BatchNorm2d(64)              # bad for weights from Keras
    nn.BatchNorm2d(64, eps=1e-3)
    ```

    ## Fix

    Set eps to that of the reference. Exact: it is what the weights were trained with.
    """

    code = "BN208"
    name = "eps-against-reference"
    needs = ("norms", "against")

    def check(self, evidence: Evidence) -> Iterator[Finding | Skipped]:
        """One finding for each eps of the reference."""
        theirs = {n.path: n for n in evidence.against or ()}
        pairs = [(n, theirs[n.path]) for n in evidence.norms or () if n.path in theirs and n.var is not None]
        known = [(a, b) for a, b in pairs if a.eps is not None and b.eps is not None]
        if pairs and not known:
            yield from needs_module(self.code, evidence, "eps")
            if all(a.module for a, _ in pairs):
                reason = "the reference is weights alone, and a state_dict does not hold eps"
                yield Skipped(self.code, reason, "a reference that is a model")
            return
        limit = self.option(evidence, "ratio", 0.95)
        found: dict[float, list[tuple[float, NormState]]] = {}
        for mine, other in known:
            worst = _worst(mine, other)
            if worst < limit:
                found.setdefault(float(other.eps or 0), []).append((worst, mine))
        for eps, entries in found.items():
            entries.sort(key=lambda e: e[0])
            norms = [n for _, n in entries]
            paths = sites(norms)
            yield self.found(
                "warning",
                f"{some(paths)}: eps {norms[0].eps:g} here, {eps:g} in the reference, which scales a channel of "
                f"{paths[0]} by {entries[0][0]:.2g} or its inverse",
                paths,
                fix=Fix("set", f"eps={eps:g}", paths, {"eps": eps}, Safety.EXACT),
                ratio=entries[0][0],
                limit=limit,
            )

    def bad(self) -> Case:
        """TensorFlow's eps lost."""
        return Case(_model(1e-5), against=_model(1e-3))

    def good(self) -> Case:
        """The same eps; and another one where variances are large."""
        model, reference = _model(1e-3), _model(1e-3)
        model.append(_norm(1e-5, 1.0))
        reference.append(_norm(1e-3, 1.0))
        return Case(model, against=reference)


def _worst(mine: NormState, other: NormState) -> float:
    """The smallest ratio of the two deviations, whichever is the larger."""
    assert mine.var is not None
    low, high = sorted((float(mine.eps or 0), float(other.eps or 0)))
    var = mine.var[mine.var >= 0]
    if high == 0 or not len(var):
        return 1.0
    ratios = ((var + low) / (var + high)) ** 0.5
    return float(ratios.min())


def _model(eps: float) -> nn.Sequential:
    from torch import nn

    return nn.Sequential(nn.Conv2d(3, 4, 1), _norm(eps, 0.001))


def _norm(eps: float, var: float) -> nn.BatchNorm2d:
    from torch import nn

    norm = nn.BatchNorm2d(4, eps=eps)
    for tensor, value in zip(statistics(norm), (0.1, var), strict=True):
        tensor.fill_(value)
    return norm
