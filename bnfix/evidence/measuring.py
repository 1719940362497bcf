"""One pass over a part of the data, for all rules that read it: moments a batch and call site, and the gate of BN204.

The loader is read once and a part of each batch is kept (``loading``). From these tensors come the statistics that
recalibration would give, and with just these in the norms the model runs in evaluation mode once more, with an ear at
each call site. Why not with the stored ones: where they are off (lost, stale, another domain), activations die or
explode on their way, and what deeper norms see says nothing about the data. Why not with those of each batch, as in
training: then what separate forwards differ by is normalised away in front of all norms but the first.
"""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.instancenorm import _InstanceNorm

from bnfix.calibration import Options, ranks_of
from bnfix.calibration.chunks import Chunk, mask_at
from bnfix.calibration.listening import Listener, Seen
from bnfix.calibration.norms import Norms, find_norms
from bnfix.calibration.reading import Mask
from bnfix.calibration.session import Session
from bnfix.errors import CalibrationError, one_line
from bnfix.evidence.drifting import gauge
from bnfix.evidence.loading import Sample, Say, read
from bnfix.graph import Outside, find_owners, no_footprints, replicator
from bnfix.running import accepts, preserved, young_garbage_only
from bnfix.running.call import Forward
from bnfix.stats import Moments, pool, sample_sums
from bnfix.types import DataEvidence, Drift, Role, SiteData


def of_data(
    model: nn.Module,
    data: Iterable[Any],
    *,
    role: Role = "train",
    forward: Forward | None = None,
    mask: Mask = None,
    val_data: Iterable[Any] | None = None,
    max_samples: int | None = None,
    progress: Say = lambda _line: None,
) -> DataEvidence:
    """What ``data`` says about the norms of ``model``, which is left as it was to the bit.

    Raises:
        CalibrationError: the data raised, is empty, is ambiguous, or holds NaN or Inf; a forward failed on it.
        TraceError: a part of the model can't be observed (a ScriptModule, a compiled submodule).
    """
    sample = sample_of(model, data, forward, mask, max_samples, progress)
    deployed = None
    if val_data is not None:
        progress("the data of deployment")
        deployed = sample_of(model, val_data, forward, mask, max_samples, progress)
    return measured(model, sample, role=role, forward=forward, deployed=deployed, progress=progress)


def sample_of(
    model: nn.Module,
    data: Iterable[Any],
    forward: Forward | None = None,
    mask: Mask = None,
    max_samples: int | None = None,
    progress: Say = lambda _line: None,
) -> Sample:
    """A part of ``data``, read once; where the model takes no part of a batch, batches are kept whole.

    Raises:
        CalibrationError: as :func:`of_data`.
    """

    def takes(chunk: Chunk) -> bool:
        return accepts(model, chunk.call) is None

    with _quiet(model, forward):
        return read(data, model, forward, mask, max_samples, takes, progress)


def measured(
    model: nn.Module,
    sample: Sample,
    *,
    role: Role = "train",
    forward: Forward | None = None,
    deployed: Sample | None = None,
    progress: Say = lambda _line: None,
) -> DataEvidence:
    """The evidence from what was read.

    Raises:
        CalibrationError: a forward failed.
        TraceError: a part of the model can't be observed.
    """
    norms, others = find_norms(model), find_norms(model)  # modes count: before all is in evaluation mode
    with _quiet(model, forward) as outside:
        session = _session(model, norms, sample, progress, outside)
        gauged = gauge(session, sample.chunks, in_turn=sample.stands_for_all)
        with session.using(gauged.stats):
            sites = _sites(session, sample.chunks)
        there = None
        if deployed is not None:
            other = _session(model, others, deployed, progress, outside)
            there = gauge(other, deployed.chunks, in_turn=deployed.stands_for_all).drift
    drift = _doubted(gauged.drift, sample)
    return DataEvidence(
        sites=sites,
        batches=len(sample.chunks),
        samples=sample.samples,
        loader=sample.loader,
        drift=drift,
        role=role,
        deployed=None if there is None or deployed is None else _doubted(there, deployed),
        sizes=sample.sizes,
        kept=tuple(c.samples for c in sample.chunks),
        whole=sample.whole,
        fitted=bool(gauged.stats),
        seen=(f"measured on {sample.seen()}", *(() if deployed is None else (f"deployment: {deployed.seen()}",))),
    )


def _doubted(drift: Drift, sample: Sample) -> Drift:
    """No verdict from the first batches of sorted data: statistics of one class are not those of all."""
    if not sample.one_label or sample.stands_for_all or drift.reason:
        return drift
    reason = f"the {sample.samples:,} samples that were read are all of one class, and there are more: shuffle the data"
    return replace(drift, change=None, null=None, reason=reason)


@contextmanager
def _quiet(model: nn.Module, forward: Forward | None) -> Iterator[Outside]:
    """Inside, everything is in evaluation mode; afterwards nothing is left of it. Gives what lies outside of it."""
    with young_garbage_only(), preserved(model), no_footprints(model, forward) as owners, torch.no_grad():
        for module in model.modules():
            module.training = False
            if getattr(module, "_compiled_call_impl", None) is not None:  # what model.compile() compiled is intact
                module._compiled_call_impl = None
        yield Outside(owners, forward)


def _session(model: nn.Module, norms: Norms, sample: Sample, say: Say, outside: Outside) -> Session:
    """A session of calibration over what was read. Never with other processes: each checks by itself."""
    masks = {id(c.call): c.mask for c in sample.chunks}
    options = Options(
        method="staged",
        mask=(lambda call: masks[id(call)]) if any(m is not None for m in masks.values()) else None,
        dry_run=True,
        settled=SETTLED,
    )
    device = next((n.mean.device for n in norms.known.values()), next((p.device for p in model.parameters()), _CPU))
    calls = [c.call for c in sample.chunks]
    return Session(model, norms, calls, options, ranks_of(False), say, replicator(model), device, outside)


_CPU = torch.device("cpu")
SETTLED = 0.02
"""Norms with several call sites are iterated until they move by less: the gate tells changes of .25 and more, and a
fixed point to rounding takes up to forty passes."""
EACH = 256
"""Batches whose own moments are kept, of those that are measured: 100 MB for a ResNet-50."""


@dataclass
class _Site:
    """One call site while batches come in."""

    path: str
    all: Moments | None = None
    kept: Moments | None = None
    rows: list[tuple[int, float, float]] = field(default_factory=list)
    means: list[Tensor] = field(default_factory=list)
    variances: list[Tensor] = field(default_factory=list)
    masked: bool = True

    def take(self, number: int, chunk: Chunk, x: Tensor, repeats: int) -> None:
        found = pool([sample_sums(x, chunk.samples, None, repeats)], [x])
        self.all = found if self.all is None else self.all.merge(found)
        if len(self.rows) < EACH:
            self.rows.append((number, float(found.n), float(found.units)))
            self.means.append(found.mean.cpu())
            self.variances.append(found.variance(unbiased=False).cpu())
        if chunk.mask is None or not self.masked:
            self.masked = False
            return
        mask = _mask_near(chunk, x, self.path)
        if mask is None:
            self.masked = False
            return
        left = pool([sample_sums(x, chunk.samples, mask, repeats)], [x], [mask])
        self.kept = left if self.kept is None else self.kept.merge(left)

    def done(self, call: int) -> SiteData:
        moments = self.all
        assert moments is not None  # a site is made when a batch comes in
        n, units = float(moments.n), float(moments.units)
        each = n / max(units, 1.0)
        spread = moments.gram[3].clamp(min=0) / (each * each * max(units - 1, 1.0))
        kept = self.kept
        if not self.masked or kept is None or float(kept.n) <= 1:
            masked = None
        else:
            masked = torch.stack((kept.mean, kept.variance())).cpu().numpy()
        return SiteData(
            path=self.path,
            call=call,
            positions=round(each),
            batch_n=numpy.array([r[1] for r in self.rows]),
            batch_samples=numpy.array([r[2] for r in self.rows]),
            batch_mean=torch.stack(self.means).numpy(),
            batch_var=torch.stack(self.variances).numpy(),
            mean=moments.mean.cpu().numpy(),
            var=moments.variance().cpu().numpy(),
            sample_var=spread.cpu().numpy(),
            masked=masked,
            numbers=tuple(r[0] for r in self.rows),
        )


def _sites(session: Session, chunks: Sequence[Chunk]) -> tuple[SiteData, ...]:
    """Every call site of a norm in the order in which it was first met, as the model stands."""
    found: dict[tuple[str, int], _Site] = {}
    calls: dict[str, int] = defaultdict(int)
    at: list[tuple[int, Chunk]] = []

    def hear(path: str, x: Tensor, repeats: int = 1) -> None:
        place = (path, calls[path])
        calls[path] += 1
        number, chunk = at[0]
        if x.numel():
            found.setdefault(place, _Site(path)).take(number, chunk, x, repeats)

    def ask(seen: Seen) -> None:
        norm = seen.norm
        hear(norm.path, seen.x, session.norms.repeats.get((norm.key, calls[norm.path]), 1))

    start = time.monotonic()
    with _ears(session.model, hear):
        for number, chunk in enumerate(chunks):
            at[:] = [(number, chunk)]
            calls.clear()
            try:
                with Listener(session.norms, ask):
                    chunk.call.run(session.model)
            except Exception as error:  # the user's own forward
                raise CalibrationError(f"{chunk.where}: the forward failed: {one_line(error)}") from error
            left = (time.monotonic() - start) / (number + 1) * (len(chunks) - number - 1)
            soon = f", about {math.ceil(left)} s left" if left > 1 else ""
            session.say(f"measuring: batch {number + 1} of {len(chunks)}{soon}")
    return tuple(site.done(call) for (_, call), site in found.items())


def _mask_near(chunk: Chunk, x: Tensor, path: str) -> Tensor | None:
    """The mask as it applies to the input (N, C, *positions) of a norm; behind strides and pooling, the nearest place.

    None where its positions are none of the norm's: nothing can be said there.
    """
    try:
        return mask_at(chunk, x, path)
    except CalibrationError:
        mask, positions = chunk.mask, x.shape[2:]
    if mask is None or mask.shape[0] != x.shape[0] or mask.dim() != 1 + len(positions):
        return None
    for axis, count in enumerate(positions, 1):
        had = mask.shape[axis]
        if count > had:
            return None
        places = ((torch.arange(count, device=mask.device) + 0.5) * had / count).long()
        mask = mask.index_select(axis, places)
    return mask


@contextmanager
def _ears(model: nn.Module, hear: Callable[[str, Tensor], None]) -> Iterator[None]:
    """Hooks on norms that keep no running statistics: no listener at functions knows whose call it is."""
    owners = find_owners(model)
    silent = [
        m
        for m in owners.modules.values()
        if isinstance(m, _NormBase) and not isinstance(m, _InstanceNorm) and m.running_mean is None
    ]

    def listen(path: str) -> Callable[[nn.Module, Any], None]:
        return lambda _module, args: hear(path, args[0].detach()) if args else None

    handles = [m.register_forward_pre_hook(listen((owners.paths(m) or ("",))[0])) for m in silent]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
