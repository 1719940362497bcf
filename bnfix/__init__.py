"""bnfix: the doctor for normalization layers in PyTorch models.

``import bnfix`` is cheap: names resolve on first use, and torch is imported only when a verb needs it.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from bnfix.api import (
        check,
        explain,
        export,
        fold,
        info,
        joint,
        load,
        merge_calls,
        recalibrate,
        save,
        swap,
        unshare,
        verify,
        watch,
    )
    from bnfix.graph import NormPerCall
    from bnfix.running import Call
    from bnfix.types import (
        Diagnosis,
        Edit,
        Export,
        FileInfo,
        Finding,
        Fix,
        LayerStats,
        Parity,
        Recalibration,
        Refusal,
        Residual,
        Result,
        Safety,
        Skipped,
    )

_VERBS = (
    *("check", "explain", "export", "fold", "info", "joint", "load", "merge_calls", "recalibrate", "save"),
    *("swap", "unshare", "verify", "watch"),
)
_TYPES = (
    *("Diagnosis", "Edit", "Export", "FileInfo", "Finding", "Fix", "LayerStats", "Parity", "Recalibration", "Refusal"),
    *("Residual", "Result", "Safety", "Skipped"),
)
_HOMES = {
    **dict.fromkeys(_VERBS, "bnfix.api"),
    "Call": "bnfix.running",
    "NormPerCall": "bnfix.graph",
    **dict.fromkeys(_TYPES, "bnfix.types"),
}

__all__ = [
    "Call",
    "Diagnosis",
    "Edit",
    "Export",
    "FileInfo",
    "Finding",
    "Fix",
    "LayerStats",
    "NormPerCall",
    "Parity",
    "Recalibration",
    "Refusal",
    "Residual",
    "Result",
    "Safety",
    "Skipped",
    "check",
    "explain",
    "export",
    "fold",
    "info",
    "joint",
    "load",
    "merge_calls",
    "recalibrate",
    "save",
    "swap",
    "unshare",
    "verify",
    "watch",
]


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'bnfix' has no attribute {name!r}")
    value = getattr(importlib.import_module(home), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
