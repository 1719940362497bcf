"""What rules read, gathered: here the rooms of the work floor meet, once for all rules."""

from bnfix.evidence.gathering import of_model

__all__ = ["of_model"]
