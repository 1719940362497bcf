"""Set running statistics anew after the weights have changed, and see how good the new ones are.

The same from the command line is ``03_recalibrate.sh``. Weights that were averaged, pruned or edited are another
network than the one whose batches the statistics are of. ``bnfix.recalibrate`` changes the model in place, all or
nothing: afterwards each norm's mean and variance are those of what it sees when the model runs in evaluation mode on
the data.
"""

from __future__ import annotations

import rich
import torch
from shop_net import batches, trained

import bnfix

model = trained()
with torch.no_grad():
    for parameter in model.parameters():
        parameter.mul_(1.1)  # stands for what you did to the weights

plan = bnfix.recalibrate(model, batches(), dry_run=True)  # measures, changes nothing
print(f"the outputs would change by {plan.output_change:.2f} of their spread")

report = bnfix.recalibrate(model, batches(), certify="full")
rich.print(report)  # in a notebook, `report` alone shows it as HTML
assert report.residual is not None
assert report.residual.mean < 1e-5  # in standard deviations, the worst channel of the worst layer
assert report.residual.var < 1e-5
print(f"1 % takes {report.needed_samples(0.01):,} more samples; drifted most: {report.worst(1)[0].name}")

bnfix.save(model, "shop_fixed.pt")
report.undo()  # the statistics of before, to the bit
