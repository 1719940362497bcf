"""One short function per verb; the verbs are the public names. Here, and only here, rooms of one floor meet."""

from bnfix.api.asked import batches, examples, read_forward
from bnfix.api.calibrating import recalibrate
from bnfix.api.checking import check
from bnfix.api.deploying import export, fold, verify
from bnfix.api.sharing_verbs import joint, merge_calls, unshare
from bnfix.api.storing import converted, info, load, open_model, save, update_file
from bnfix.api.swapping import swap
from bnfix.api.watching import watch

__all__ = [
    "batches",
    "check",
    "converted",
    "examples",
    "export",
    "fold",
    "info",
    "joint",
    "load",
    "merge_calls",
    "open_model",
    "read_forward",
    "recalibrate",
    "save",
    "swap",
    "unshare",
    "update_file",
    "verify",
    "watch",
]
