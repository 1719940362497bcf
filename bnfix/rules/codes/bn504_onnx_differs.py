from __future__ import annotations

from collections.abc import Iterator

from bnfix.rules.codes._onnx_files import norm_file, twin
from bnfix.rules.rule import Case, Rule
from bnfix.types import Evidence, Finding, Fix, Parity, Skipped


class OnnxDiffers(Rule):
    """An ONNX file that computes something else than the model it was made of.

    ## What it does

    Runs both on the example, as `bnfix verify` does, with ONNX Runtime's optimizations and without. The file fails
    where it is further from the model in float64 than 8 times the model's own rounding noise.

    ## Why is this bad

    Nothing in the pipeline notices: the file loads, runs, and is a few percent worse. Norms are a usual reason: another
    eps, statistics that were recalibrated after the export, a training mode in which the exporter caught the model.

    ## Example

    ```python
    bnfix.export(model, "m.onnx", example); bnfix.recalibrate(model, data)   # bad: the file has the old statistics
    bnfix.recalibrate(model, data); bnfix.export(model, "m.onnx", example)
    ```

    ## Fix

    Export again; `bnfix export` compares before it puts the file in place.
    """

    code = "BN504"
    name = "onnx-differs"
    needs = ("onnx",)

    def check(self, evidence: Evidence) -> Iterator[Finding | Skipped]:
        """One finding for the file."""
        assert evidence.onnx is not None
        parity = evidence.onnx.parity
        if not isinstance(parity, Parity):
            needs = "the model that it was made of, and example= (on the command line: --against, --input)"
            yield Skipped(self.code, f"needs {needs}", needs)
            return
        if parity.verdict == "inconclusive":
            reasons = [o.reason for o in parity.outputs if o.reason]
            yield Skipped(self.code, f"the comparison says nothing: {'; '.join(reasons[:2]) or 'no output to compare'}")
        if parity.verdict == "failed":
            worst = max(parity.outputs, key=lambda o: o.noise_ratio or 0.0)
            ratio = "" if worst.noise_ratio is None else f"{worst.noise_ratio:.3g} times the model's rounding noise"
            yield self.found(
                "error",
                f"the file does not compute what the model does: output {worst.name} is off by "
                f"{ratio or worst.reason or 'more than can be measured'}",
                fix=Fix("code", "export again: bnfix export"),
                noise_ratio=worst.noise_ratio,
                limit=parity.k,
                max_abs_err=worst.max_abs_err,
            )

    def bad(self) -> Case:
        """Another eps."""
        return Case(norm_file("other_eps", eps=1e-2), _images(), against=twin())

    def good(self) -> Case:
        """As it was exported."""
        return Case(norm_file("evaluation"), _images(), against=twin())


def _images() -> object:
    import torch

    return torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(0))
