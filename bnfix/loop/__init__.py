"""``watch``: the guard of a training loop. Counts what norms do, step by step, and tells it as plain data."""

from bnfix.loop.hooks import hung_on
from bnfix.loop.watch import Watch

__all__ = ["Watch", "hung_on"]
