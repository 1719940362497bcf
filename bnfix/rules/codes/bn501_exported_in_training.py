from __future__ import annotations

from collections.abc import Iterator

from bnfix.rules.reading import site, some
from bnfix.rules.rule import Case, Rule
from bnfix.types import Evidence, Facts, Finding, Fix, Op


class ExportedInTraining(Rule):
    """An exported program whose batch norms run in training mode.

    ## What it does

    Looks through the graph of an exported program (`torch.export`, `.pt2`) for batch norms with `training=True`.

    ## Why is this bad

    What mode a model was in is written into the graph, and `eval()` on the program does nothing. Each output depends
    on its batch, a batch of one is normalised with itself, and the program writes to its own statistics as it runs.
    Every backend that takes the program inherits it.

    ## Example

    ```python
    torch.export.export(model, args)           # bad: modules are in training mode unless told otherwise
    torch.export.export(model.eval(), args)
    ```

    ## Fix

    Export again, after `model.eval()`. The program alone can't be repaired: what else training mode changed (dropout,
    heads) is written into it too.
    """

    code = "BN501"
    name = "exported-in-training"
    needs = ("facts",)

    def check(self, evidence: Evidence) -> Iterator[Finding]:
        """One finding for all; a model that is no program has no mode in its graph."""
        facts = evidence.facts
        if facts is None or not evidence.program:
            return
        found: dict[str, None] = {}
        for route in facts.routes:
            for op in route.ops:
                if "batch_norm" in op.target and op.attrs.get("training", op.attrs.get("train")) is True:
                    found.setdefault(_name(facts, op))
        if found:
            paths = tuple(found)
            yield self.found(
                "error",
                f"{some(paths)}: in training mode in the exported program, so each output depends on its batch",
                paths,
                fix=Fix("code", "torch.export.export(model.eval(), args)", paths),
            )

    def bad(self) -> Case:
        """Exported as it was trained."""
        import torch

        model = _model().train()  # type: ignore[attr-defined]
        return Case(torch.export.export(model, (torch.randn(4, 3, 6, 6),)))

    def good(self) -> Case:
        """Exported for evaluation."""
        import torch

        model = _model().eval()  # type: ignore[attr-defined]
        return Case(torch.export.export(model, (torch.randn(4, 3, 6, 6),)))


def _name(facts: Facts, op: Op) -> str:
    key = op.tensors.get("running_mean")
    if key is not None:
        return site(facts.tensors[key].owners[0].removesuffix("running_mean").removesuffix("."))
    return site(op.site.path)


def _model() -> object:
    import torch
    from torch import nn

    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU())
    with torch.no_grad():
        model(torch.randn(4, 3, 6, 6))
    return model
