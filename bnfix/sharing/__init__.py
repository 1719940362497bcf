"""One norm, one network, several calls: made one call, or given a norm each."""

from bnfix.sharing.joint import Joint, Split
from bnfix.sharing.merging import Merged, carry_out, merge_calls
from bnfix.sharing.unshare import Unshared, unshare

__all__ = ["Joint", "Merged", "Split", "Unshared", "carry_out", "merge_calls", "unshare"]
