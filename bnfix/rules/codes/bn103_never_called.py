from __future__ import annotations

from collections.abc import Iterator

from bnfix.rules.reading import is_used, listed, site, some
from bnfix.rules.rule import Case, Rule
from bnfix.types import Evidence, Finding, Fix, Skipped


class NeverCalled(Rule):
    """A norm that the model holds and never calls.

    ## What it does

    Runs the model on the example, in evaluation and in training mode, and looks for norms that neither calls, and whose
    tensors nothing reads. Auxiliary heads that run in training alone are no finding.

    ## Why is this bad

    Often it is left over from an edit, and harmless. Sometimes it is a layer that was meant to run and doesn't: a
    forward that goes around it, a second name for another layer. Its statistics stay at their initial values, its
    parameters get no gradients, and DDP stops with "expected to have finished reduction" because of it.

    ## Example

    ```python
    self.bn1, self.bn2 = nn.BatchNorm2d(64), nn.BatchNorm2d(64)
    x = self.bn1(self.conv2(self.bn1(self.conv1(x))))  # bad: bn2 was meant
    x = self.bn2(self.conv2(self.bn1(self.conv1(x))))
    ```

    ## Fix

    In the code: call it or remove it. Removing changes no output; a checkpoint then has keys too many, so load it with
    `strict=False` once.
    """

    code = "BN103"
    name = "never-called"
    needs = ("facts",)

    def check(self, evidence: Evidence) -> Iterator[Finding | Skipped]:
        """One finding for all of them."""
        facts = evidence.facts
        assert facts is not None
        idle = [n for n in facts.norms if not is_used(facts, n)]
        if not idle:
            return
        training = evidence.facts_training
        if training is None or evidence.training_missing:
            reason = f"not called in evaluation mode; {evidence.training_missing}"
            yield Skipped(self.code, reason, "an example that runs in training mode", tuple(site(n.path) for n in idle))
            return
        used = {n.path for n in training.norms if is_used(training, n)}
        paths = tuple(site(n.path) for n in idle if n.path not in used)
        if paths:
            on = listed([r.signature for r in facts.routes], 2)
            yield self.found(
                "info",
                f"{some(paths)}: never called on {on}, in evaluation or in training mode",
                paths,
                fix=Fix("code", "call it, or remove it from the model", paths),
            )

    def bad(self) -> Case:
        """One norm is forgotten."""
        from torch import Tensor, nn, randn

        class Forgotten(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.conv1, self.bn1 = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)
                self.conv2, self.bn2 = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)

            def forward(self, x: Tensor) -> Tensor:
                y: Tensor = self.bn1(self.conv2(self.bn1(self.conv1(x)).relu()))
                return y

        return Case(Forgotten(), randn(4, 3, 6, 6))

    def good(self) -> Case:
        """A norm that runs in training alone."""
        from torch import Tensor, nn, randn

        class Auxiliary(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.body = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU())
                self.head = nn.BatchNorm2d(4)

            def forward(self, x: Tensor) -> Tensor:
                y: Tensor = self.body(x)
                return self.head(y) if self.training else y  # type: ignore[no-any-return]

        return Case(Auxiliary(), randn(4, 3, 6, 6))
