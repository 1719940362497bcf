"""One norm for several inputs: called once for all of them, or taken apart."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bnfix.sharing import Joint, Split


def joint(net: Callable[..., Any], *, split: Split | None = None) -> Joint:
    """``joint(net)(a, p, n)`` is ``net(a), net(p), net(n)`` in one forward: changes nothing, shares everything.

    The inputs are concatenated along their first axis, ``net`` runs once, and its output is split again. In training
    mode each norm then normalises with the statistics of all samples together and updates its running ones once; in
    evaluation mode the outputs are those of separate calls: to the bit where each value is computed by itself (norms,
    activations, pooling), and up to their rounding where kernels sum in another order for another batch size
    (convolutions, matrix products: about 1e-6 relative in float32). Dropout draws other random numbers than in
    separate calls.

    Args:
        net: a module, or any callable such as ``model.encode``. No module is made: ``state_dict`` and ``parameters`` of
            whoever holds the result stay as they are.
        split: ``split(output, sizes)`` gives one output for each call where the output is not tensors with the batch
            first: ``sizes`` are the numbers of samples.

    Returns:
        A callable. It takes one input for each call: a tensor, a tuple of positional arguments, a dict of keyword
        arguments or a ``bnfix.Call``; batches may differ in size. It returns a tuple of as many outputs: tensors, or
        tuples, namedtuples, lists, mappings and dataclasses of them. Each is a view of one joint output.

    Raises:
        TypeError: ``net`` can't be called.

    When called, it raises ``ValueError`` where inputs differ in structure, trailing shape, dtype, device or inference
    mode, and where an output is no batch (a scalar such as a loss, a table of pairs, a weight): never a guess.
    """
    from bnfix.sharing import Joint

    if not callable(net):
        raise TypeError(f"joint(net) takes a module or another callable, not {type(net).__name__}")
    return Joint(net, split)
