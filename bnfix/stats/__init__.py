"""Statistics: the per-channel affine map of a norm in evaluation mode, and rounding."""

from bnfix.stats.affine import Affine, affine_of
from bnfix.stats.rounding import round_once, ulp

__all__ = ["Affine", "affine_of", "round_once", "ulp"]
