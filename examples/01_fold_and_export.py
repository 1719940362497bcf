"""Fold a model, export it, and see it proven.

The same from the command line is ``01_fold_and_export.sh``. Run it in a folder where it may write::

    python examples/01_fold_and_export.py

``bnfix.fold`` returns a copy: the model that you pass stays as it is, bit for bit. The result says of every norm
into what it was folded, or why it was kept, and carries the proof: each stored number within half a unit in
the last place of its exact value, and outputs within a few times the noise that float32 itself makes.
``bnfix.export`` writes ONNX and runs it in ONNX Runtime at once; ``bnfix.verify`` does so again, whenever you like.
"""

from __future__ import annotations

import rich
import torch
from shop_net import ShopNet, trained

import bnfix

model = trained()
example = torch.randn(2, 3, 24, 24)

result = bnfix.fold(model, example)
rich.print(result)  # in a notebook, `result` alone shows it as HTML
assert result.parity is not None
assert result.parity.passed
for refusal in result.refusals:
    print(f"{refusal.site} was kept: {refusal.reason}")

# A folded state_dict fits no class, so it carries its recipe, and bnfix.load replays it.
bnfix.save(result.model, "shop_folded.pt", recipe=result.recipe)
again = bnfix.load("shop_folded.pt", arch=ShopNet)
with torch.no_grad():
    assert torch.equal(again(example), result.model(example))

exported = bnfix.export(result.model, "shop.onnx", example)
rich.print(exported)

parity = bnfix.verify(model, "shop.onnx", [example])  # the model as it was trained against the file
assert parity.passed
