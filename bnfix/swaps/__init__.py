"""Norms swapped for norms of another kind, with what the model knows kept."""

from bnfix.swaps.batches import Read, read
from bnfix.swaps.swapping import Options, plan
from bnfix.swaps.target import all_targets

__all__ = ["Options", "Read", "all_targets", "plan", "read"]
