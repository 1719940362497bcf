from __future__ import annotations

from collections.abc import Iterator

from bnfix.rules.codes._onnx_files import norm_file
from bnfix.rules.reading import some
from bnfix.rules.rule import Case, Rule
from bnfix.types import Evidence, Finding, Fix


class OnnxTrainingMode(Rule):
    """An ONNX file with BatchNormalization in training mode.

    ## What it does

    Looks for `training_mode = 1` in the file; in opsets before 14, for nodes that give their statistics as well.

    ## Why is this bad

    The runtime normalises with the statistics of the batch: results depend on what else is in it, and a batch of one is
    normalised with itself. Many runtimes and converters refuse such a node, or read over the attribute and compute
    something else.

    ## Example

    ```python
    torch.onnx.export(model, args, path, training=TrainingMode.TRAINING)   # bad
    bnfix.export(model.eval(), path, example)
    ```

    ## Fix

    Export again, in evaluation mode. Setting the attribute to 0 by hand gives a model that runs, but whether its
    statistics are good is for `bnfix check` on the model to say.
    """

    code = "BN502"
    name = "onnx-training-mode"
    needs = ("onnx",)

    def check(self, evidence: Evidence) -> Iterator[Finding]:
        """One finding for all."""
        assert evidence.onnx is not None
        paths = tuple(n.name for n in evidence.onnx.norms if n.training_mode)
        if paths:
            yield self.found(
                "error",
                f"{some(paths)}: BatchNormalization in training mode, so each output depends on its batch",
                paths,
                fix=Fix("code", "export again in evaluation mode: bnfix.export(model.eval(), path, example)", paths),
                opset=evidence.onnx.opset,
            )

    def bad(self) -> Case:
        """`training_mode = 1`."""
        return Case(norm_file("training", training=True))

    def good(self) -> Case:
        """0, as is the default."""
        return Case(norm_file("evaluation"))
