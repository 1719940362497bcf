"""One norm, one network, several calls: made one call, or given a norm each."""

from bnfix.sharing.joint import Joint, Split
from bnfix.sharing.unshare import Unshared, unshare

__all__ = ["Joint", "Split", "Unshared", "unshare"]
