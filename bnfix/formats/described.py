"""The numbers of a set of weights, from the names, shapes and types that a file declares."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from bnfix.formats.names import Renaming, printable
from bnfix.formats.pickles.contents import TensorSpec
from bnfix.types import NormInfo

_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


def described(tensors: Mapping[str, TensorSpec], renaming: Renaming) -> dict[str, Any]:
    """The fields of ``FileInfo`` that tensors have: counts, bytes, dtypes, norms. Shared memory counts once.

    ``parameters`` counts elements of what is no running statistic, as a file does not tell buffers from parameters.
    """
    parameters = nbytes = 0
    seen: set[object] = set()
    for name, spec in tensors.items():
        if spec.storage and spec.storage in seen:
            continue
        seen.add(spec.storage)
        nbytes += spec.nbytes
        parameters += 0 if name.rpartition(".")[2] in _STATISTICS else spec.numel
    return {
        "tensors": len(tensors),
        "parameters": parameters,
        "bytes": nbytes,
        "dtypes": dict(Counter(t.dtype for t in tensors.values()).most_common()),
        "norms": tuple(_norms(tensors, renaming)),
        "prefix": str(renaming),
    }


def _norms(tensors: Mapping[str, TensorSpec], renaming: Renaming) -> list[NormInfo]:
    norms = []
    for name, spec in tensors.items():
        owner, dot, last = name.rpartition(".")
        if last == "running_mean" and f"{owner}{dot}running_var" in tensors and name not in renaming.dropped:
            path = printable(renaming(name).rpartition(".")[0], 500)
            norms.append(NormInfo(path, spec.numel, spec.dtype, f"{owner}{dot}weight" in tensors))
    return norms
