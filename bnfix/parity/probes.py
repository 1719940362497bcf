"""Inputs like a given one: other numbers, other batch sizes. What an export is tried on besides the example."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from bnfix.errors import PassError
from bnfix.parity.oracle import record
from bnfix.running import Call


def batch_size(call: Call) -> int | None:
    """The size along axis 0 that the tensors of ``call`` share: the first one's; None without any tensor of rank 1."""
    return next((t.shape[0] for t in call.tensors() if t.dim() > 0), None)


def probe_calls(call: Call, batches: Sequence[int] = (1, 2, 5), seeds: Sequence[int] = (0,)) -> list[Call]:
    """Calls derived from ``call``, one for each batch size and seed.

    Floating tensors are drawn anew with the mean, the standard deviation and the range of the example's tensor
    (an example of zeros or ones was given for its shape: standard normal numbers take its place). Integers,
    booleans and masks kept as float are permuted along the batch. Every tensor whose first size is
    the example's batch gets the new size; the others keep theirs.
    """
    size = batch_size(call)
    made = []
    for seed in seeds:
        for batch in batches if size else (None,):
            generator = torch.Generator().manual_seed(1_000_003 * seed + (batch or 0))
            made.append(call.map(lambda t, b=batch, g=generator: _like(t, size, b, g)))  # type: ignore[misc]
    return made


def accepted(model: nn.Module, calls: Sequence[Call]) -> tuple[list[Call], list[Call]]:
    """``calls`` that ``model`` runs on, and those that it doesn't (a size built into its forward)."""
    good: list[Call] = []
    bad: list[Call] = []
    for call in calls:
        try:
            record(model, call)
        except PassError:
            bad.append(call)
        else:
            good.append(call)
    return good, bad


def _like(tensor: Tensor, size: int | None, batch: int | None, generator: torch.Generator) -> Tensor:
    batched = batch is not None and tensor.dim() > 0 and tensor.shape[0] == size
    shape = (batch or 0, *tensor.shape[1:]) if batched else tuple(tensor.shape)
    levels: Tensor = torch.unique(tensor.detach())  # type: ignore[no-untyped-call]
    whole = not tensor.is_floating_point() or bool((levels == levels.round()).all())
    if not tensor.is_floating_point() or (whole and (tensor.dim() < 3 or len(levels) == 2)):
        if not batched:
            return tensor.clone()
        rows = torch.randperm(max(shape[0], tensor.shape[0]), generator=generator)[: shape[0]] % tensor.shape[0]
        return tensor[rows.to(tensor.device)].clone()
    drawn = torch.randn(shape, generator=generator, dtype=torch.float64).to(tensor.device)
    if len(levels) > 1:
        wide = tensor.detach().double()
        drawn = (drawn * wide.std(correction=0) + wide.mean()).clamp(levels[0].double(), levels[-1].double())
    return (drawn.round() if whole and len(levels) > 1 else drawn).to(tensor.dtype)
