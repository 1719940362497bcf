"""A norm that may be swapped, and what is known of it."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from bnfix.graph import Slot, describe_norm
from bnfix.graph.owners import Owners
from bnfix.stats import Affine, affine_of

PLAIN = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
"""Classes of which everything is known without a run."""
_OWN = {"weight", "bias", "running_mean", "running_var", "num_batches_tracked"}


@dataclass(eq=False)
class Site:
    """One norm of the model: ``module`` is the user's own object, ``paths`` are all its names.

    What a run shows: ``after``, the submodules that it runs behind the normalization; ``shapes`` of its inputs
    (N, C, *positions); ``calls``, how often one forward of the model comes by; ``frozen``, that it never learns
    statistics, whatever its mode.
    """

    module: nn.Module
    paths: tuple[str, ...]
    slots: tuple[Slot, ...]
    after: tuple[str, ...] = ()
    shapes: list[tuple[int, ...]] = field(default_factory=list)
    calls: int = 0
    frozen: bool = False

    @property
    def path(self) -> str:
        """Its first name; empty for a model that is itself a norm."""
        return self.paths[0] if self.paths else ""

    @property
    def names(self) -> tuple[str, ...]:
        """Its call sites, such as ``head.bn`` and ``head.bn@1``."""
        return tuple(f"{self.path}@{i}" if i else self.path for i in range(self.calls))

    @property
    def before(self) -> str:
        """What it is, for a reader."""
        if isinstance(self.module, torch.jit.ScriptModule):
            return f"{self.module.original_name}, scripted"
        return describe_norm(self.module)

    @property
    def plain(self) -> bool:
        """Whether it is one of torch's own classes, which do nothing but normalise."""
        return type(self.module) in PLAIN

    def tensor(self, name: str) -> Tensor | None:
        """One of its own tensors by its role, parameter or buffer."""
        found = self.module._parameters.get(name, self.module._buffers.get(name))
        return found if found is not None else None

    @property
    def channels(self) -> int:
        """C."""
        found = getattr(self.module, "num_features", None)
        mean = self.tensor("running_mean")
        return int(found) if isinstance(found, int) else mean.numel() if mean is not None else 0

    @property
    def eps(self) -> float:
        """What is added to variances."""
        found = getattr(self.module, "eps", 1e-5)
        return float(found) if isinstance(found, (int, float)) else 1e-5

    @property
    def affine(self) -> Affine | None:
        """What it computes in evaluation mode; None where that takes the statistics of the batch at hand."""
        mean, var = self.tensor("running_mean"), self.tensor("running_var")
        if mean is None or var is None:
            return None
        return affine_of(mean, var, self.tensor("weight"), self.tensor("bias"), self.eps)

    @property
    def positions(self) -> int:
        """S, the values a sample and channel, the fewest seen; 0 if it was never called."""
        return min((torch.Size(s[2:]).numel() for s in self.shapes), default=0)

    @property
    def rank(self) -> int | None:
        """How many axes its inputs have; None if that varies, or it was never called."""
        ranks = {len(s) for s in self.shapes}
        return ranks.pop() if len(ranks) == 1 else None


def out_of_reach(site: Site, owners: Owners, keeps_parameters: bool = False) -> str:
    """Why a norm can't be swapped, whatever its forward does; empty if nothing speaks against it.

    Parameters that another module holds as well would be torn apart, unless the new norm ``keeps_parameters``.
    """
    module = site.module
    if isinstance(module, torch.jit.ScriptModule):
        return "it is a ScriptModule: swap before scripting"
    if isinstance(module, _InstanceNorm):
        return (
            "an instance norm with running statistics: another norm in training than in evaluation, and no batch norm"
        )
    if "parametrizations" in module._modules:
        return "its weight is computed by a parametrization: torch.nn.utils.parametrize.remove_parametrizations first"
    extra = [k for t in (module._parameters, module._buffers) for k, v in t.items() if v is not None and k not in _OWN]
    if extra:
        return f"{type(module).__name__} has more than the tensors of a norm: {', '.join(extra)}"
    if "forward" in vars(module):
        return "it has its own forward set on the instance: del module.forward first"
    if isinstance(module, _BatchNorm) and module.affine and site.tensor("weight") is None:
        return "its weight is computed (pruned, or normalised by a hook): make it a parameter first"
    for name in () if keeps_parameters else ("weight", "bias"):
        tensor = site.tensor(name)
        for slot in owners.tensor_slots.get(id(tensor), ()) if tensor is not None else ():
            if slot.registered and slot.container is not module:
                return f"its {name} is tied to {slot.path}: one parameter of two modules"
    for slot in site.slots:
        if slot.container is not None and not _writable(slot):
            kind = type(slot.container).__name__
            return f"it is held in a {kind}, where it can't be replaced ({slot.path})"
    return ""


def _writable(slot: Slot) -> bool:
    if isinstance(slot.container, (nn.Module, list, dict)):
        return True
    return hasattr(slot.container, "__dict__") and isinstance(slot.key, str)


def tensor_holders(site: Site, name: str, owners: Owners) -> list[Slot]:
    """Where else than in the norm itself one of its tensors is held: lists of parameters, say."""
    tensor = site.tensor(name)
    slots = owners.tensor_slots.get(id(tensor), ()) if tensor is not None else ()
    return [slot for slot in slots if slot.container is not site.module and _writable(slot)]
