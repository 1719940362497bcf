"""One short function per verb; the verbs are the public names. Here, and only here, rooms of one floor meet."""

from bnfix.api.asked import batches, examples, read_forward
from bnfix.api.calibrating import recalibrate
from bnfix.api.checking import check, explain
from bnfix.api.deploying import export, fold, verify
from bnfix.api.fixing import Fixing, fix, refusal_of, with_lines
from bnfix.api.sharing_verbs import joint, merge_calls, unshare
from bnfix.api.storing import converted, info, load, open_model, save, update_file
from bnfix.api.swapping import swap
from bnfix.api.watching import watch

__all__ = [
    "Fixing",
    "batches",
    "check",
    "converted",
    "examples",
    "explain",
    "export",
    "fix",
    "fold",
    "info",
    "joint",
    "load",
    "merge_calls",
    "open_model",
    "read_forward",
    "recalibrate",
    "refusal_of",
    "save",
    "swap",
    "unshare",
    "update_file",
    "verify",
    "watch",
    "with_lines",
]
