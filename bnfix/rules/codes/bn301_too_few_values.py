from __future__ import annotations

from collections.abc import Iterator

from bnfix.rules.measured import batch_values, by_path, learns, not_for_training
from bnfix.rules.reading import some
from bnfix.rules.rule import Case, Rule
from bnfix.types import Evidence, Finding, Fix, Safety, Severity, Skipped


class TooFewValues(Rule):
    """A norm that gets too few values a channel in a batch to tell their mean and variance.

    ## What it does

    Counts the values m that each channel of each norm gets in a usual training batch: samples × height × width. The
    variance of m values is off by √(2/(m − 1)) of itself on average. Above .6 (m ≤ 6) that is a warning, at m ≤ 2 an
    error, above .25 (m < 33) an information.

    Measured on networks for digits: with two values accuracy falls by 10 to 15 points, with three by 4 to 8, with four
    by 1 to 6, with eight and more by nothing that can be told from chance.

    ## Why is this bad

    With two values a channel the normalised ones are +1 and −1, whatever they were. With three or four they are mostly
    noise; and in evaluation mode, where the running statistics normalise, the layers behind see inputs that they
    were never trained on. It is seldom the whole model: a convolution of 8 × 8 positions has 128 values at batch
    size 2. It is the hidden layer behind the pooling.

    ## Example

    ```python
    head = nn.Sequential(nn.Linear(512, 256), nn.BatchNorm1d(256), nn.ReLU())  # bad at batch size 2
    head = nn.Sequential(nn.Linear(512, 256), nn.LayerNorm(256), nn.ReLU())    # good at any
    ```

    ## Fix

    `swap` of these layers alone, then training: at batch size 2, one head swapped gave 98.7 % on a network where the
    norm left as it was gave 43.8 %, and all ten swapped 94.0 %. Or larger batches; gradient accumulation does not help
    (a norm never sees more than one forward), synchronised norms over several GPUs do.
    """

    code = "BN301"
    name = "too-few-values"
    needs = ("norms", "data")

    def check(self, evidence: Evidence) -> Iterator[Finding | Skipped]:
        """One finding a severity, with all layers concerned."""
        data = evidence.data
        assert data is not None
        if data.role != "train":
            yield not_for_training(self.code)
            return
        noise = {"warning": self.option(evidence, "noise", 0.6), "info": self.option(evidence, "info", 0.25)}
        norms = by_path(evidence)
        least: dict[str, int] = {}
        for site in data.sites:
            if learns(norms.get(site.path)):
                m = batch_values(data, site)
                least[site.path] = min(m, least.get(site.path, m))
        found: dict[Severity, list[str]] = {"error": [], "warning": [], "info": []}
        for path, m in sorted(least.items(), key=lambda item: item[1]):
            off = (2 / (m - 1)) ** 0.5 if m > 1 else float("inf")
            severity: Severity | None = "error" if m <= 2 else next((s for s in noise if off > noise[s]), None)  # type: ignore[misc]
            if severity is not None:
                found[severity].append(path)
        for severity, paths in found.items():
            if paths:
                names = tuple(p or "(root)" for p in paths)
                heals = Fix(
                    "swap",
                    "a norm that needs no batch, in these layers alone",
                    names,
                    {"only": "fragile"},
                    Safety.NEEDS_TRAINING,
                )
                yield self.found(
                    severity,
                    f"{some(names)}: {self._said([least[p] for p in paths])}",
                    names,
                    fix=None if severity == "info" else heals,  # what does no harm that shows needs no healing
                    values={n: least[p] for n, p in zip(names, paths, strict=True)},
                )

    def _said(self, values: list[int]) -> str:
        low, high = min(values), max(values)
        count = str(low) if low == high else f"{low} to {high}"
        if high == 1:
            return "a batch holds one value a channel: there is no variance to normalise with"
        if high == 2:
            return f"a batch holds {count} values a channel: normalised, two values are +1 and −1, whatever they were"
        return f"a batch holds {count} values a channel: its variance is off by {(2 / (low - 1)) ** 0.5:.0%} on average"

    def bad(self) -> Case:
        """A hidden layer at batch size 2."""
        return self._case(2)

    def good(self) -> Case:
        """The same at 48."""
        return self._case(48)

    def _case(self, batch: int) -> Case:
        from bnfix.rules.data_cases import batches, fit, head_net, images

        data = batches(images(24 * batch), batch)
        return Case(fit(head_net(), data), data=data)
