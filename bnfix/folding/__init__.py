"""Folding norms into the layers that feed them: algebra, planner, operation, proof by weights."""

from bnfix.folding.carrier import Carrier
from bnfix.folding.engine import Folded, compute, edits, operate, recipe
from bnfix.folding.fold import Example, Fold
from bnfix.folding.leftovers import affine_recipe, as_affines
from bnfix.folding.planner import Plan, PlannedFold, plan
from bnfix.folding.proof import isolate, structure_differs, ulp_limit, weight_errors, worst_weight

__all__ = [
    "Carrier",
    "Example",
    "Fold",
    "Folded",
    "Plan",
    "PlannedFold",
    "affine_recipe",
    "as_affines",
    "compute",
    "edits",
    "isolate",
    "operate",
    "plan",
    "recipe",
    "structure_differs",
    "ulp_limit",
    "weight_errors",
    "worst_weight",
]
