"""New norms put where old ones stood, in a copy or in the user's own model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from bnfix.graph import Surgeon, as_parameter, build_norm, inner_name, stand_in, type_of
from bnfix.graph.owners import Owners
from bnfix.swaps.pairing import Init
from bnfix.swaps.site import Site, tensor_holders
from bnfix.swaps.target import Spec, Target


@dataclass
class Move:
    """One site, and what it becomes: the settings to choose from, the first of them until calibration chooses.

    ``weight`` and ``bias`` (float64, shape (C,)) are the affine that calibration found, ``r2`` its forecast.
    """

    site: Site
    specs: list[Spec]
    weight: Tensor | None = None
    bias: Tensor | None = None
    r2: float | None = None

    @property
    def spec(self) -> Spec:
        """The settings as they are now."""
        return self.specs[0]

    @property
    def kept(self) -> tuple[str, ...]:
        """Submodules of the old norm that stay behind the new one; those that do nothing go with it."""
        if all(type(self.site.module.get_submodule(name)) is nn.Identity for name in self.site.after):
            return ()
        return self.site.after


@dataclass
class Operated:
    """A model with its new norms: ``norms`` by the id of their site, and what stands for each old parameter (or None).

    ``outer`` is what stands in the slots: the norm itself, or with what follows it.
    """

    model: nn.Module
    norms: dict[int, nn.Module] = field(default_factory=dict)
    outer: dict[int, nn.Module] = field(default_factory=dict)
    replaced: list[tuple[nn.Parameter, nn.Parameter | None, str]] = field(default_factory=list)


def operate(
    model: nn.Module, owners: Owners, moves: Sequence[Move], target: Target, init: Init, surgeon: Surgeon
) -> Operated:
    """Put the new norm of each of ``moves`` into every slot of the old one, so that what was shared stays shared.

    ``owners`` are those of the user's model; ``surgeon.memo`` leads from its objects to those of ``model``, None if it
    is the same. The old norms are left as they are.
    """
    done = Operated(model)
    home = next((p for p in model.parameters() if p.is_floating_point()), torch.zeros(()))
    for move in moves:
        site = move.site
        old = site.module if surgeon.memo is None else surgeon.memo[id(site.module)]
        new = build_norm(move.spec, type_of(old, home))
        if target.calibrated:
            _fill(old, new, move, init)
        else:
            target.take_over(site, old, new)
            for name, value in new._parameters.items():
                if value is not None and value is not old._parameters.get(name):
                    value.requires_grad_(False)
        outer = stand_in(old, new, move.kept)
        done.norms[id(site)], done.outer[id(site)] = new, outer
        for slot in site.slots:
            if slot.container is None:
                done.model = outer
            else:
                surgeon.put(slot, outer)
        for name in ("weight", "bias"):
            before, after = old._parameters.get(name), new._parameters.get(name)
            if before is None or after is before:
                continue
            path = ".".join(filter(None, (site.path, inner_name(move.kept) if move.kept else "", name)))
            done.replaced.append((before, after, path))
            held = new._buffers.get(name) if after is None else after
            for slot in tensor_holders(site, name, owners):
                surgeon.put(slot, held)
    return done


def _fill(old: nn.Module, new: nn.Module, move: Move, init: Init) -> None:
    """The affine of ``new``: what calibration found, the old one, or that of a fresh norm.

    What the old norm has no parameter for (``affine=False``, a class that is frozen) does not train.
    """
    for name, fresh in (("weight", 1.0), ("bias", 0.0)):
        now = new._parameters.get(name)
        if now is None:
            continue
        before: Tensor | None = old._parameters.get(name)
        before = old._buffers.get(name) if before is None else before
        found: Tensor | None = getattr(move, name)
        if found is not None:
            value = found.to(now)
        elif init == "copy" and before is not None:
            value = before.detach().to(now)
        else:
            value = torch.full_like(now.detach(), fresh)
        like = before if isinstance(before, nn.Parameter) else nn.Parameter(now.detach(), requires_grad=False)
        made = as_parameter(value.to(like.dtype), like)
        marked = move.site.module._parameters.get(name)
        vars(made).update(vars(marked) if marked is not None else {})  # a copied parameter has lost what was hung on it
        new._parameters[name] = made  # type: ignore[assignment]


def keys(move: Move, new: nn.Module) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The ``state_dict`` keys that a model gains and loses by one move, under each registered name of the norm."""
    paths = [p for p in move.site.paths if "[" not in p and "(" not in p]
    before = list(move.site.module.state_dict())
    inner = f"{inner_name(move.kept)}." if move.kept else ""
    after = [inner + k for k in new.state_dict()] + [k for k in before if k.partition(".")[0] in move.kept]

    def under(names: Sequence[str]) -> tuple[str, ...]:
        return tuple(f"{path}.{name}" if path else name for path in paths for name in names)

    return under([k for k in after if k not in before]), under([k for k in before if k not in after])


def recipe(moves: Sequence[Move]) -> Mapping[str, Any]:
    """What a saved state_dict carries, so that a freshly built model can be brought into its form."""
    edits = [
        {"norm": list(m.site.paths), "to": {**m.spec, "args": dict(m.spec["args"])}, "keep": list(m.kept), "into": []}
        for m in moves
    ]
    return {"version": 2, "edits": edits}
