"""A call of a model, a pass over data, a model left as it was found."""

from bnfix.running.arguments import feeding
from bnfix.running.batches import Bound, batch_call, bind
from bnfix.running.call import Call, as_call, fit_call, map_tensors
from bnfix.running.garbage import young_garbage_only
from bnfix.running.guess import FAILURES, accepts, guess_call, random_call, variations
from bnfix.running.heap import kept_heap
from bnfix.running.memory import Footprint, free_bytes, give_back, parse_bytes
from bnfix.running.modes import let_go, modes_of_thread, set_modes
from bnfix.running.preserved import drawing, kept_random, preserved
from bnfix.running.samples import check_finite, count, join, replayable, size, split

__all__ = [
    "FAILURES",
    "Bound",
    "Call",
    "Footprint",
    "accepts",
    "as_call",
    "batch_call",
    "bind",
    "check_finite",
    "count",
    "drawing",
    "feeding",
    "fit_call",
    "free_bytes",
    "give_back",
    "guess_call",
    "join",
    "kept_heap",
    "kept_random",
    "let_go",
    "map_tensors",
    "modes_of_thread",
    "parse_bytes",
    "preserved",
    "random_call",
    "replayable",
    "set_modes",
    "size",
    "split",
    "variations",
    "young_garbage_only",
]
