"""Engines that re-estimate the statistics of norms, and the transaction that takes it all back."""

from bnfix.calibration.ranks import Ranks, ranks_of
from bnfix.calibration.recalibration import recalibrate
from bnfix.calibration.session import Options

__all__ = ["Options", "Ranks", "ranks_of", "recalibrate"]
