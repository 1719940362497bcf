from __future__ import annotations

from collections.abc import Iterator

from bnfix.rules.codes._onnx_files import norm_file
from bnfix.rules.reading import some
from bnfix.rules.rule import Case, Rule
from bnfix.types import Evidence, Finding, Fix

_STATISTICS = {"mean", "var"}


class OnnxBatchStats(Rule):
    """An ONNX file that normalises with the mean and variance of the batch.

    ## What it does

    Finds BatchNormalization nodes whose mean or variance is no constant of the file, and norms taken apart:
    (x − mean(x)) over a deviation of x, both over the batch and all positions. Layer, group and instance norms, which
    reduce over the positions of one sample, are none.

    ## Why is this bad

    Results depend on what else is in the batch. It is what a model with `track_running_stats=False` exports to,
    silently and in evaluation mode too: what looked like a remedy in training is part of the product now.

    ## Example

    ```python
    nn.BatchNorm2d(64, track_running_stats=False)   # bad: exported as ReduceMean over the batch
    nn.BatchNorm2d(64)
    ```

    ## Fix

    Give the model running statistics (BN104), recalibrate, and export again. In the file alone there are none to use.
    """

    code = "BN503"
    name = "onnx-batch-stats"
    needs = ("onnx",)

    def check(self, evidence: Evidence) -> Iterator[Finding]:
        """One finding for nodes, one for norms taken apart."""
        assert evidence.onnx is not None
        fix = Fix("code", "register running statistics, bnfix recalibrate, export again")
        paths = tuple(n.name for n in evidence.onnx.norms if _STATISTICS & set(n.computed))
        if paths:
            yield self.found(
                "error",
                f"{some(paths)}: its mean or variance is no constant, so each output depends on its batch",
                paths,
                fix=fix,
            )
        apart = tuple(p for p in evidence.onnx.batch_statistics if p not in paths)
        if apart:
            yield self.found(
                "error",
                f"{some(apart)}: normalises with mean and variance of the batch, so each output depends on it",
                apart,
                fix=fix,
            )

    def bad(self) -> Case:
        """Computed mean and variance."""
        return Case(norm_file("batch", batch=True))

    def good(self) -> Case:
        """Constants."""
        return Case(norm_file("evaluation"))
