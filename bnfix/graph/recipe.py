"""A recipe replayed: a freshly built model is brought into the form that a folded state_dict fits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from bnfix.graph.channel_affine import affine_in_place_of
from bnfix.graph.owners import Slot, find_owners
from bnfix.graph.plain_layers import rebuild
from bnfix.graph.surgery import Surgeon, all_or_nothing, placeholder


def replay(model: nn.Module, recipe: Mapping[str, Any]) -> None:
    """Bring ``model``, freshly built, into the form that a folded state_dict fits. In place, all or nothing.

    Layers that computed their weight become plain ones, norms become placeholders or affines, layers that gained a bias
    get one of zeros; the numbers come from the state_dict that is loaded afterwards.

    Raises:
        KeyError: the model has no module of a name in the recipe.
        ValueError: settings that no layer has.
    """
    rebuild(model, recipe.get("baked", ()))
    owners = find_owners(model)
    with all_or_nothing(Surgeon()) as surgeon:
        for edit in recipe.get("edits", ()):
            norm = owners.module_at(edit["norm"][0])
            if norm is None:
                raise KeyError(edit["norm"][0])
            stand_in = _replayed(norm, edit)
            for slot in owners.module_slots[id(norm)]:
                surgeon.put(slot, stand_in)
            for into in edit["into"]:
                layer = owners.module_at(into["module"])
                if layer is None:
                    raise KeyError(into["module"])
                if into.get("bias") and getattr(layer, "bias", None) is None:
                    weight = layer.get_parameter(into.get("weight", "weight"))
                    zeros = torch.zeros(into["channels"], dtype=weight.dtype, device=weight.device)
                    bias = nn.Parameter(zeros, weight.requires_grad)
                    surgeon.register(Slot(layer, "bias", f"{into['module']}.bias"), bias)


def _replayed(norm: nn.Module, edit: Mapping[str, Any]) -> nn.Module:
    """What a recipe puts where a norm was."""
    after, channels = edit.get("keep", ()), edit.get("affine")
    if channels is None:
        return placeholder(norm, after)
    like = getattr(norm, "running_var", None)
    like = like if isinstance(like, Tensor) else next(norm.parameters(), torch.zeros(()))
    return affine_in_place_of(norm, after, like.new_ones(channels), like.new_zeros(channels))
