"""One norm, one network, several calls: made one call, or given a norm each."""

from bnfix.sharing.joint import Joint, Split

__all__ = ["Joint", "Split"]
