"""``joint``: one forward for several inputs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bnfix.errors import one_line
from bnfix.graph import unwrap
from bnfix.running import FAILURES, Call, preserved
from bnfix.sharing.concatenating import as_calls, concatenated, parted

Split = Callable[[Any, tuple[int, ...]], Sequence[Any]]

SAY_HOW = "say how it is divided: joint(net, split=lambda output, sizes: ...)"


class Joint:
    """Calls a network once for several inputs; made by :func:`bnfix.joint`. No module: it owns no tensor.

    As an attribute of a module it leaves ``state_dict`` as it is, and a deep copy of that module holds one that calls
    the copied network.
    """

    def __init__(self, net: Callable[..., Any], split: Split | None = None) -> None:
        self.net, self.split = net, split
        self._axes: dict[tuple[str, int], _Axes] = {}

    def __call__(self, *inputs: Any) -> tuple[Any, ...]:
        """One output for each of ``inputs``: concatenated, one forward, split.

        Raises:
            ValueError: the inputs don't go together, or the output can't be divided among them.
            TypeError: one of them is nothing that a network is called with.
        """
        whole, sizes = concatenated(as_calls(inputs))
        output = whole.apply(self.net)  # type: ignore[arg-type]
        if self.split is None:
            return parted(output, sizes, lambda where, tensor: self._check(where, tensor, whole, sum(sizes)))
        parts = tuple(self.split(output, sizes))
        if len(parts) != len(sizes):
            raise ValueError(f"split= gave {len(parts)} outputs for {len(sizes)} calls")
        return parts

    def __repr__(self) -> str:
        """Which network it calls."""
        return f"joint({type(self.net).__name__ if isinstance(self.net, nn.Module) else self.net!r})"

    def _check(self, where: str, tensor: Tensor, whole: Call, count: int) -> None:
        """Whether the first axis of an output is its batch, of ``count`` samples.

        Raises:
            ValueError: it is not, or it can't be told.
        """
        check_first(where, tensor, count)
        if torch.compiler.is_compiling():  # sizes may be symbols there, and looking closer would fix them
            return
        axes = self._axes.setdefault((where, tensor.dim()), _Axes(frozenset(range(tensor.dim())), count))
        axes.see(tuple(tensor.shape), count)
        if axes.proven:
            return
        if len(axes.candidates) > 1:
            axes.candidates &= self._probed(where, tensor, whole, count)
            axes.proven = axes.candidates == {0}
        if 0 not in axes.candidates or self._holds(tensor):
            raise ValueError(
                f"{where} of shape {tuple(tensor.shape)} is not one value for each sample, though its first axis is as "
                f"long as the batch: leave it out of the output, or {SAY_HOW}"
            )
        if len(axes.candidates) > 1:
            raise ValueError(
                f"{where} of shape {tuple(tensor.shape)} grows with the batch along axes {sorted(axes.candidates)}: it "
                f"holds values of pairs of samples, which belong to no single call. Compute it outside, or {SAY_HOW}"
            )

    def _module(self) -> nn.Module | None:
        found = self.net if isinstance(self.net, nn.Module) else getattr(self.net, "__self__", None)
        return unwrap(found)[0] if isinstance(found, nn.Module) else None

    def _holds(self, tensor: Tensor) -> bool:
        """Whether the network gives out one of its own parameters or buffers."""
        module = self._module()
        if module is None or not tensor.numel():
            return False
        pointer = tensor.untyped_storage().data_ptr()
        own = (*module.parameters(), *module.buffers())
        return any(t.layout == torch.strided and t.untyped_storage().data_ptr() == pointer for t in own)

    def _probed(self, where: str, tensor: Tensor, whole: Call, count: int) -> frozenset[int]:
        """The axes of an output that grow with the batch, by a run on one sample more, which leaves no trace.

        Needed only where an output has as many values a sample as there are samples, and then once.
        """
        module = self._module()
        if module is None:
            raise ValueError(f"several axes of {where} {tuple(tensor.shape)} are as long as the batch: {SAY_HOW}")
        longer = whole.map(lambda t: torch.cat([t, t[-1:]]) if t.dim() and t.shape[0] == count else t)
        shapes: dict[str, tuple[int, ...]] = {}

        def note(place: str, found: Tensor) -> None:
            shapes[place] = tuple(found.shape)

        try:
            with preserved(module), torch.no_grad():
                module.eval()
                target = module if isinstance(self.net, nn.Module) else self.net
                parted(longer.run(target), (0,), note)  # type: ignore[arg-type]
        except FAILURES as error:
            raise ValueError(
                f"several axes of {where} {tuple(tensor.shape)} are as long as the batch, and a run on one sample "
                f"more, to tell them apart, failed ({one_line(error, 100)}): {SAY_HOW}"
            ) from error
        shape = shapes.get(where, ())
        return frozenset(i for i, size in enumerate(shape) if len(shape) == tensor.dim() and size == count + 1)


@dataclass
class _Axes:
    """Which axes of an output could be its batch, by all that was seen of it. ``count`` is the first batch."""

    candidates: frozenset[int]
    count: int
    proven: bool = False

    def see(self, shape: tuple[int, ...], count: int) -> None:
        """One more output; ``proven`` once the first axis alone has followed two different batches."""
        self.candidates &= {i for i, size in enumerate(shape) if size == count}
        self.proven = self.proven or (count != self.count and self.candidates == {0})


def check_first(where: str, tensor: Tensor, count: int) -> None:
    """Whether an output has ``count`` samples along its first axis.

    Raises:
        ValueError: it has not, or is nothing that can be cut.
    """
    if tensor.layout != torch.strided or tensor.is_nested:
        raise ValueError(f"{where} is a sparse or nested tensor, which has no batch to cut: {SAY_HOW}")
    if not tensor.dim():
        raise ValueError(
            f"{where} is a scalar, such as a loss over all samples: no part of it belongs to one call. Return the "
            f"outputs of the samples and compute the loss from them, or {SAY_HOW}"
        )
    if tensor.shape[0] != count:
        raise ValueError(
            f"{where} has shape {tuple(tensor.shape)}, and the calls hold {count} samples together: its first axis is "
            f"not the batch; {SAY_HOW}"
        )
