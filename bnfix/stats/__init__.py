"""Statistics: moments of a norm's inputs, its affine map in evaluation mode, drift, and rounding."""

from bnfix.stats.affine import Affine, affine_of
from bnfix.stats.drift import kl
from bnfix.stats.gathering import Gathering
from bnfix.stats.moments import Moments, Spread, merge_all
from bnfix.stats.pooling import pool
from bnfix.stats.rounding import round_once, ulp
from bnfix.stats.sums import SampleSums, sample_sums

__all__ = [
    "Affine",
    "Gathering",
    "Moments",
    "SampleSums",
    "Spread",
    "affine_of",
    "kl",
    "merge_all",
    "pool",
    "round_once",
    "sample_sums",
    "ulp",
]
