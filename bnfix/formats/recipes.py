"""The recipe that the weights of a repaired model carry: which norms went, and where to, or what stands there now.

It comes from files: nothing is believed.
"""

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

VERSION, WITH_SWAPS = 1, 2
"""Of recipes of folds alone, which an older bnfix reads as well; and of those that hold more (``to``, ``before``)."""

MAX_CHANNELS = 1 << 24
MAX_STAGES = 16
"""Of repairs one after the other."""


def to_text(recipe: Mapping[str, Any] | None) -> str | None:
    """``recipe`` as one line of JSON; None where nothing was changed."""
    return json.dumps({"bnfix": __version__, **recipe}, sort_keys=True) if recipe and recipe.get("edits") else None


def following(before: Mapping[str, Any] | None, recipe: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
    """The ``recipe`` of a repair of a model that had come with one itself, ``before``: both, one after the other."""
    if not before or not before.get("edits"):
        return recipe
    if not recipe or not recipe.get("edits"):
        return before
    return {**recipe, "version": WITH_SWAPS, "before": {k: v for k, v in before.items() if k != "bnfix"}}


def stages(recipe: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The repairs of ``recipe`` by themselves, the first one first."""
    before = recipe.get("before")
    return [*(stages(before) if before is not None else ()), recipe]


def has_folds(recipe: Mapping[str, Any] | None) -> bool:
    """Whether norms are gone by it, into other layers or affines."""
    return any(
        "to" not in e and "unshare" not in e for stage in stages(recipe or {"edits": ()}) for e in stage["edits"]
    )


def told(recipe: Mapping[str, Any]) -> str:
    """What was done to the norms, for a reader: ``1 norm un-shared, 5 norms folded by bnfix``."""
    edits = [e for stage in stages(recipe) for e in stage["edits"]]
    swapped, apart = sum("to" in e for e in edits), sum("unshare" in e for e in edits)
    done = ((apart, "un-shared"), (len(edits) - swapped - apart, "folded"), (swapped, "swapped"))
    return ", ".join(f"{n} norm{'s' if n != 1 else ''} {what}" for n, what in done if n) + " by bnfix"


def from_text(text: str, where: str) -> dict[str, Any]:
    """The recipe in ``text``, checked.

    Raises:
        LoadError: it is no recipe, or one of a newer bnfix.
    """
    try:
        recipe = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise LoadError(f"{where}: the recipe in it is damaged") from error
    version = recipe.get("version") if isinstance(recipe, dict) else None
    if isinstance(version, int) and version > WITH_SWAPS:
        raise LoadError(
            f"{where} comes from a newer bnfix ({recipe.get('bnfix', '')}): its recipe version {version} is unknown",
            hint="pip install -U bnfix",
        )
    if not _whole(recipe, MAX_STAGES):
        raise LoadError(f"{where}: the recipe in it is damaged")
    return dict(recipe)


def _whole(recipe: Any, deep: int) -> bool:
    return (
        isinstance(recipe, dict)
        and deep > 0
        and recipe.get("version") in (VERSION, WITH_SWAPS)
        and _well_formed(recipe.get("edits"))
        and _baked(recipe.get("baked", []))
        and ("before" not in recipe or _whole(recipe["before"], deep - 1))
    )


def _well_formed(edits: Any) -> bool:
    return isinstance(edits, list) and all(
        isinstance(e, dict)
        and _strings(e.get("norm"))
        and e["norm"]
        and _strings(e.get("keep", []))
        and _count(e.get("affine", 1))
        and ("to" not in e or (isinstance(e["to"], dict) and isinstance(e["to"].get("args"), dict)))
        and ("unshare" not in e or _step(e["unshare"]))
        and isinstance(e.get("into"), list)
        and all(_well_formed_target(t) for t in e["into"])
        for e in edits
    )


def _step(step: Any) -> bool:
    """How a shared norm was taken apart; what is at its sites is seen when it is done again."""
    return (
        isinstance(step, dict)
        and isinstance(step.get("how"), str)
        and (_strings(step.get("sites")) if step["how"] in ("names", "buffers") else isinstance(step.get("site"), str))
        and all(isinstance(step.get(k), (str, type(None))) for k in ("mean", "var", "weight", "bias"))
        and isinstance(step.get("share_affine", False), bool)
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


def replay(model: nn.Module, recipe: Mapping[str, Any], where: str) -> nn.Module:
    """Give ``model`` the shape that the repair gave to the model the weights are of. Changes ``model`` in place.

    Returns:
        ``model``, or what stands for it where it is itself a norm.

    Raises:
        LoadError: the recipe names modules that ``model`` has not.
    """
    from bnfix.errors import TraceError
    from bnfix.graph import replay as replay_in_graph

    try:
        return replay_in_graph(model, recipe)
    except (KeyError, AttributeError, ValueError, TypeError, TraceError) as error:
        name = error.args[0] if error.args else ""
        kinds = {k for e in recipe["edits"] for k in ("to", "unshare") if k in e}
        done = "swapped in" if "to" in kinds else "un-shared in" if kinds else "folded from"
        raise LoadError(
            f"{where} was {done} another model: --arch does not fit ({name})",
            hint=f"give the architecture that the weights were {done}, with the same --arch-kw",
        ) from error
