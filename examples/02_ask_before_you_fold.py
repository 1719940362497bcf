"""See what would happen, without changing anything, and use it in a script.

The same from the command line is ``02_ask_before_you_fold.sh``. A plan names every norm of the model: the
layer that would take it up, or the reason why none can. ``to_dict()`` is what ``--output-format json`` writes.
"""

from __future__ import annotations

import json

import torch
from shop_net import trained

import bnfix
from bnfix.render import to_concise

plan = bnfix.fold(trained(), torch.randn(2, 3, 24, 24), dry_run=True)
assert plan.model is None
print(to_concise(plan))

document = plan.to_dict()
print(json.dumps({"foldable": len(document["edits"]), "kept": [r["site"] for r in document["refusals"]]}))
