"""Files: what they are, what is in them, how they are written. Cheap to import: torch comes with the first load."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from bnfix.formats.recognition import sniff

if TYPE_CHECKING:
    from bnfix.formats.data import load_data, load_input
    from bnfix.formats.images import ImageTransform, image_transform
    from bnfix.formats.loading import Loaded, load, weights
    from bnfix.formats.saving import save
    from bnfix.formats.shards import shard
    from bnfix.formats.specs import parse_kwargs

_HOMES = {
    **dict.fromkeys(("Loaded", "load", "weights"), "loading"),
    **dict.fromkeys(("load_data", "load_input"), "data"),
    **dict.fromkeys(("ImageTransform", "image_transform"), "images"),
    "parse_kwargs": "specs",
    "save": "saving",
    "shard": "shards",
}

__all__ = [
    "ImageTransform",
    "Loaded",
    "image_transform",
    "load",
    "load_data",
    "load_input",
    "parse_kwargs",
    "save",
    "shard",
    "sniff",
    "weights",
]


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{home}"), name)
