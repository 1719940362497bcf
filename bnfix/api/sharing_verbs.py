"""One norm for several inputs: called once for all of them, or taken apart."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from bnfix.api.asked import Progress, check_k, check_model, read_calls, silent

if TYPE_CHECKING:
    from torch import nn

    from bnfix.running.call import Forward
    from bnfix.sharing import Joint, Split
    from bnfix.types import Result


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


def unshare(
    model: nn.Module,
    example: Any = None,
    sites: str | Iterable[str] | None = None,
    share_affine: bool = False,
    *,
    data: Iterable[Any] | None = None,
    forward: Forward | None = None,
    inplace: bool = False,
    dry_run: bool = False,
    progress: Progress | None = None,
) -> Result:
    """Give each call site of a shared norm a norm of its own: returns a changed copy, ``model`` stays as it is.

    A norm under several names becomes one module under each. One that is called k times in a forward becomes k norms
    in its place (``bn.0``, ``bn.1`` …), of which each call gets its own by its number; so do buffers that a forward
    hands to ``F.batch_norm`` several times. Everything else stays shared: only norms are taken apart. All get the
    statistics and weights that the shared one had, and the outputs in evaluation mode are the same to the bit; that is
    seen to before this returns, and what changes them stays as it is, with the reason. Afterwards
    ``bnfix.recalibrate`` gives each the statistics of its own inputs.

    Calls are told apart by their number within one forward of the model. A forward with another number of them raises
    ``RuntimeError``, as does a call of such a norm outside of one: nothing is reused in silence.

    Args:
        model: in any mode. The calls have to be made by its own forward: of a network that training code calls three
            times a step, pass a module whose forward makes the three calls.
        example: what the model is called with, as for :func:`bnfix.fold`; a list of these for several signatures. None:
            the first batch of ``data``, else deduced from the layers.
        sites: which norms: module paths, of norms or of modules around them. Default: all that are shared.
        share_affine: all norms in place of one use its ``weight`` and ``bias``; else each gets a copy, the first keeps
            the parameters themselves.
        data: what a training loop would iterate over.
        forward: ``forward(model, batch)`` where the model isn't simply called with the batch; it has to call it once.
        inplace: change ``model`` itself, all or nothing, after everything was proven on a copy. An optimizer does not
            know the new weights then.
        dry_run: plan and proof only; ``Result.model`` is None.
        progress: called with a line before each step.

    Returns:
        ``edits`` name the norms and, as ``gains``, the entries of the ``state_dict`` that are new; ``refusals`` the
        shared norms that stay. ``recipe`` goes with a saved ``state_dict``, so that ``bnfix.load`` can read it again.

    Raises:
        PassError: the forward fails on the example.
        TraceError: the model can't be copied, or does not do the same twice.
        ValueError: ``sites`` names what is no norm.
    """
    from bnfix import sharing
    from bnfix.graph import no_footprints, take_apart, unwrap
    from bnfix.running import preserved
    from bnfix.types import Result

    say = progress or silent
    check_model(model)
    model, notes = unwrap(model)
    calls, assumed = read_calls(model, example, data, forward)
    with preserved(model), no_footprints(model, *(c.forward for c in calls)):
        found = sharing.unshare(model, calls, sites, share_affine=share_affine, say=say)
    if inplace and not dry_run:
        take_apart(model, found.steps)
    signatures = tuple(dict.fromkeys(c.signature for c in calls))
    return Result(
        model=None if dry_run else model if inplace else found.model,
        edits=found.edits,
        refusals=found.refusals,
        source="observed",
        signatures=signatures,
        notes=(*notes, *assumed, *found.notes, *_said(found, inplace=inplace, share_affine=share_affine)),
        recipe=found.recipe,
        dry_run=dry_run,
        verb="unshare",
    )


def merge_calls(
    model: nn.Module,
    example: Any = None,
    sites: str | Iterable[str] | None = None,
    *,
    data: Iterable[Any] | None = None,
    forward: Forward | None = None,
    verify: bool = True,
    k: float = 8.0,
    inplace: bool = False,
    dry_run: bool = False,
    progress: Progress | None = None,
) -> Result:
    """Make several calls of one network in the model's own forward one call: returns a changed copy.

    ``self.net(a), self.net(p), self.net(n)`` becomes one forward of ``net`` over all samples, as :func:`joint` does it:
    in training mode its norms then see all of them together. **This changes training**; outputs and gradients in
    evaluation mode stay as they are, which is compared before this returns. Where calls are separate on purpose (real
    and fake batches of a GAN, SimSiam), leave them so: nothing in bnfix merges them by itself.

    The forward that holds the calls is traced by torch.fx with every submodule left whole and written anew. It runs
    what it was proven for (the structure of the inputs, settings that are no tensors, both modes), and raises
    ``RuntimeError`` on anything else. Class, methods, submodules and ``state_dict`` keys stay. One update in place of k
    has the momentum m' = 1 − (1 − m)^k.

    A network keeps its calls, with the reason, where one needs the output of another (also by way of a merge before);
    where they differ in trailing shape, dtype, grad mode or autocast, or the forward works under ``no_grad`` or
    autocast anywhere; where an output has its batch elsewhere than on its first axis; where the network mixes samples,
    keeps something from call to call, has a hook, or changes its input in place; where the forward writes attributes,
    works in place, or can't be traced. Random draws (dropout) are allowed, and noted: they come out otherwise.

    Args:
        model: in any mode.
        example: what the model is called with, as for :func:`bnfix.fold`; a list of these for several signatures.
        sites: which networks, by module path. Default: all with norms in them that a forward calls several times.
        data: what a training loop would iterate over.
        forward: ``forward(model, batch)`` where the model isn't simply called with the batch.
        verify: False leaves out the comparison of outputs against the float64 model (not that of gradients).
        k: outputs may be ``k`` times the model's own rounding noise away from the float64 model.
        inplace: change ``model`` itself, all or nothing, after everything was proven on a copy.
        dry_run: plan and proof only; ``Result.model`` is None.
        progress: called with a line before each step.

    Returns:
        ``edits`` name the networks, their calls, and the norms whose momentum changed (``into``); ``refusals`` those
        that keep their calls. A ``state_dict`` of the result fits the original model, and needs no recipe.

    Raises:
        PassError: the forward fails on the example.
        TraceError: the model can't be copied.
        ValueError: ``sites`` names what is not called several times.
    """
    from bnfix import parity, sharing
    from bnfix.graph import copy_model, no_footprints, unwrap
    from bnfix.running import preserved
    from bnfix.types import Parity, Result

    say = progress or silent
    check_model(model)
    check_k(k)
    model, notes = unwrap(model)
    calls, assumed = read_calls(model, example, data, forward)
    compared: list[Parity] = []

    def prove(copy: nn.Module) -> str:
        if not verify:
            return ""
        say("comparing outputs in evaluation mode")
        compared.append(parity.verify(copy_model(model)[0].eval(), copy.eval(), calls, k=k))
        bad = [o for o in compared[-1].outputs if o.verdict == "failed"]
        return f"with one call output {bad[0].name} is another: {bad[0].reason}" if bad else ""

    with preserved(model), no_footprints(model, *(c.forward for c in calls)):
        found = sharing.merge_calls(model, calls, sites, prove=prove, say=say)
    if inplace and not dry_run:
        sharing.carry_out(model, found.steps)
    passed = [p for p in compared if p.verdict != "failed"]
    return Result(
        model=None if dry_run else model if inplace else found.model,
        edits=found.edits,
        refusals=found.refusals,
        parity=passed[-1] if passed and found.edits else None,
        source="observed",
        signatures=tuple(dict.fromkeys(c.signature for c in calls)),
        notes=(*notes, *assumed, *found.notes),
        dry_run=dry_run,
        verb="merge_calls",
    )


def _said(found: Any, *, inplace: bool, share_affine: bool) -> tuple[str, ...]:
    """What a reader has to know of the result besides."""
    if not found.edits and not found.refusals:
        return (
            "no norm is called more than once in one forward, or has several names. Where training code calls the "
            "model several times a step, put these calls into the forward of one module, and un-share that",
        )
    if not found.edits:
        return ()
    by_call = any(step["how"] in ("calls", "function") for step in found.steps)
    notes = ["which call is which is told by its number in one forward: another number of calls is an error"]
    notes = notes if by_call else []
    if inplace and not share_affine:
        notes.append("an optimizer made before knows the weights of the first call alone: give it the others as well")
    notes.append("each norm has the statistics of all: recalibrate them on data now, for each to get its own")
    return tuple(notes)
