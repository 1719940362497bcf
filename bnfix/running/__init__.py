"""A call of a model, a pass over data, a model left as it was found."""

from bnfix.running.call import Call, as_call, batch_call, map_tensors
from bnfix.running.preserved import preserved

__all__ = ["Call", "as_call", "batch_call", "map_tensors", "preserved"]
