from __future__ import annotations

from collections.abc import Iterator

from bnfix.rules.codes._examples import conv_norm, images
from bnfix.rules.reading import sites, some
from bnfix.rules.rule import Case, Rule
from bnfix.types import Evidence, Finding, Fix, Safety

_DIGITS = {"float16": 10, "bfloat16": 7}
"""Bits behind the binary point: one unit in the last place of 1 is 2 to the minus this."""
_MOMENTUM = 0.1


class HalfPrecisionStats(Rule):
    """Running statistics in 16 bits.

    ## What it does

    Finds norms whose running mean and variance are float16 or bfloat16, as `model.half()` leaves them. A warning where
    they learn: in training mode. Else it is information, for `model.half().eval()` is a usual way to deploy, and some
    libraries save their checkpoints in 16 bits.

    ## Why is this bad

    In training, each step adds α·(batch − running). What is smaller than half a unit in the last place is rounded away:
    at a value r, differences below ulp(r)/(2α) never arrive. With α = .1 that is .5 % in float16 and 4 % in bfloat16,
    and .01 makes it ten times as much. Variances above 65,504 become infinite in float16. In evaluation the loss is
    small, one rounding, but an overflow is final.

    ## Example

    ```python
    model.half()                                   # bad: statistics too
    model.half(); [m.float() for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    ```

    Better still, leave the model in float32 and run it under `torch.autocast`.

    ## Fix

    `.float()` on the norms alone: inputs and outputs stay in 16 bits, the layer computes with float32 weights and
    statistics, as cuDNN and the CPU kernels support. Outputs stay the same but for rounding; what was lost before comes
    back with a recalibration.
    """

    code = "BN107"
    name = "half-precision-stats"

    def check(self, evidence: Evidence) -> Iterator[Finding]:
        """One finding for each type, for norms that learn and for others."""
        norms = [n for n in evidence.norms or () if n.dtype in _DIGITS and not n.frozen_class]
        for dtype, learns in dict.fromkeys((str(n.dtype), bool(n.training)) for n in norms):
            same = [n for n in norms if n.dtype == dtype and bool(n.training) == learns]
            paths = sites(same)
            rate = min((n.momentum for n in same if n.momentum), default=_MOMENTUM)
            lost = 2.0 ** -_DIGITS[dtype] / (2 * rate)
            yield self.found(
                "warning" if learns else "info",
                f"{some(paths)}: running statistics in {dtype}; updates "
                f"of less than {lost:.2g} of a value are lost in training (momentum {rate:g})"
                f"{'' if learns else ', evaluation loses one rounding'}",
                paths,
                fix=Fix("float", "norms in float32, all else as it is", paths, safety=Safety.EXACT),
                dtype=dtype,
                lost=lost,
                momentum=rate,
            )

    def bad(self) -> Case:
        """Everything in 16 bits."""
        return Case(conv_norm()[0].half(), images().half())

    def good(self) -> Case:
        """Everything but the norm."""
        model, norm = conv_norm()
        model.half()
        norm.float()
        return Case(model, images().half())
