"""A recipe replayed: a freshly built model is brought into the form that the state_dict of a repaired one fits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from bnfix.graph.channel_affine import affine_in_place_of
from bnfix.graph.norm_layers import build_norm, stand_in, type_of
from bnfix.graph.owners import Slot, find_owners
from bnfix.graph.plain_layers import rebuild
from bnfix.graph.surgery import Surgeon, all_or_nothing, placeholder
from bnfix.graph.unsharing import take_apart


def replay(model: nn.Module, recipe: Mapping[str, Any]) -> nn.Module:
    """Bring ``model``, freshly built, into the form that a repaired state_dict fits. In place, all or nothing.

    Shared norms become several, layers that computed their weight plain ones, norms become placeholders, affines or
    other norms, layers that gained a bias get one of zeros; the numbers come from the state_dict that is loaded
    afterwards. What a recipe was made ``before``, on a model that had been repaired already, is replayed first.

    Returns:
        ``model``, or what stands for it where it was itself a norm.

    Raises:
        KeyError: the model has no module of a name in the recipe.
        ValueError: settings that no layer has.
    """
    before = recipe.get("before")
    if before is not None:
        model = replay(model, before)
    edits = recipe.get("edits", ())
    take_apart(model, [edit["unshare"] for edit in edits if "unshare" in edit])
    rebuild(model, recipe.get("baked", ()))
    owners = find_owners(model)
    with all_or_nothing(Surgeon()) as surgeon:
        for edit in (e for e in edits if "unshare" not in e):
            norm = owners.module_at(edit["norm"][0])
            if norm is None:
                raise KeyError(edit["norm"][0])
            new = _replayed(norm, edit, model)
            for slot in owners.module_slots[id(norm)]:
                if slot.container is None:
                    model = new
                else:
                    surgeon.put(slot, new)
            for into in edit["into"]:
                layer = owners.module_at(into["module"])
                if layer is None:
                    raise KeyError(into["module"])
                if into.get("bias") and getattr(layer, "bias", None) is None:
                    weight = layer.get_parameter(into.get("weight", "weight"))
                    zeros = torch.zeros(into["channels"], dtype=weight.dtype, device=weight.device)
                    bias = nn.Parameter(zeros, weight.requires_grad)
                    surgeon.register(Slot(layer, "bias", f"{into['module']}.bias"), bias)
    return model


def _replayed(norm: nn.Module, edit: Mapping[str, Any], model: nn.Module) -> nn.Module:
    """What a recipe puts where a norm was."""
    after, channels = edit.get("keep", ()), edit.get("affine")
    if "to" in edit:
        kind = type_of(norm, next((p for p in model.parameters() if p.is_floating_point()), torch.zeros(())))
        new = build_norm(edit["to"], kind)
        new.requires_grad_(any(p.requires_grad for p in norm.parameters(recurse=False)))
        return stand_in(norm, new, after)
    if channels is None:
        return placeholder(norm, after)
    like = getattr(norm, "running_var", None)
    like = like if isinstance(like, Tensor) else next(norm.parameters(), torch.zeros(()))
    return affine_in_place_of(norm, after, like.new_ones(channels), like.new_zeros(channels))
