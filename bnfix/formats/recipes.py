"""The recipe that folded weights carry: which norms went, and where to. It comes from files: nothing is believed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from bnfix import __version__
from bnfix.errors import LoadError

if TYPE_CHECKING:
    from torch import nn

KEY = "__bnfix__"
"""Under which a ``.pt`` file holds it, as a string of JSON; no class has such a key, so a raw strict load fails."""

METADATA_KEY = "bnfix"
"""The same in the metadata of a safetensors file."""

VERSION = 1
MAX_CHANNELS = 1 << 24


def to_text(recipe: Mapping[str, Any] | None) -> str | None:
    """``recipe`` as one line of JSON; None where nothing was folded."""
    return json.dumps({"bnfix": __version__, **recipe}, sort_keys=True) if recipe and recipe.get("edits") else None


def from_text(text: str, where: str) -> dict[str, Any]:
    """The recipe in ``text``, checked.

    Raises:
        LoadError: it is no recipe, or one of a newer bnfix.
    """
    try:
        recipe = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise LoadError(f"{where}: the recipe of the fold in it is damaged") from error
    version = recipe.get("version") if isinstance(recipe, dict) else None
    if isinstance(version, int) and version > VERSION:
        raise LoadError(
            f"{where} was folded by a newer bnfix ({recipe.get('bnfix', '')}): its recipe version {version} is unknown",
            hint="pip install -U bnfix",
        )
    if version != VERSION or not _well_formed(recipe.get("edits")) or not _baked(recipe.get("baked", [])):
        raise LoadError(f"{where}: the recipe of the fold in it is damaged")
    return dict(recipe)


def _well_formed(edits: Any) -> bool:
    return isinstance(edits, list) and all(
        isinstance(e, dict)
        and _strings(e.get("norm"))
        and e["norm"]
        and _strings(e.get("keep", []))
        and _count(e.get("affine", 1))
        and isinstance(e.get("into"), list)
        and all(_well_formed_target(t) for t in e["into"])
        for e in edits
    )


def _well_formed_target(target: Any) -> bool:
    if not isinstance(target, dict) or not isinstance(target.get("module"), str):
        return False
    channels, weight = target.get("channels", 1), target.get("weight", "weight")
    return isinstance(target.get("bias"), bool) and _count(channels) and isinstance(weight, str)


def _baked(entries: Any) -> bool:
    """Layers that computed their weight; what their settings are worth is seen when they are built."""
    return isinstance(entries, list) and all(
        isinstance(e, dict) and _strings(e.get("module")) and e["module"] and isinstance(e.get("settings"), dict)
        for e in entries
    )


def _count(channels: Any) -> bool:
    return type(channels) is int and 0 < channels <= MAX_CHANNELS


def _strings(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(v, str) for v in value)


def replay(model: nn.Module, recipe: Mapping[str, Any], where: str) -> None:
    """Give ``model`` the shape that the fold gave to the model the weights are of. Changes ``model`` in place.

    Raises:
        LoadError: the recipe names modules that ``model`` has not.
    """
    from bnfix.graph import replay as replay_in_graph

    try:
        replay_in_graph(model, recipe)
    except (KeyError, AttributeError, ValueError, TypeError) as error:
        name = error.args[0] if error.args else ""
        raise LoadError(
            f"{where} was folded from another model: --arch does not fit ({name})",
            hint="give the architecture that the weights were folded from, with the same --arch-kw",
        ) from error
