"""A call of a model, a pass over data, a model left as it was found."""

from bnfix.running.call import Call, as_call, batch_call, map_tensors
from bnfix.running.guess import FAILURES, accepts, guess_call, random_call, variations
from bnfix.running.preserved import preserved

__all__ = [
    "FAILURES",
    "Call",
    "accepts",
    "as_call",
    "batch_call",
    "guess_call",
    "map_tensors",
    "preserved",
    "random_call",
    "variations",
]
