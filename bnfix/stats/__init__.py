"""Statistics: the per-channel affine map of a norm in evaluation mode."""

from bnfix.stats.affine import Affine, affine_of

__all__ = ["Affine", "affine_of"]
