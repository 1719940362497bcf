"""A look ahead with a handful of samples: the route, the memory it takes, and whether samples can be told apart."""

from __future__ import annotations

import contextlib
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from bnfix.calibration.chunks import Chunk, first_samples, halves, mask_at, splittable
from bnfix.calibration.footing import Footing, Way
from bnfix.calibration.ledger import Place
from bnfix.calibration.listening import Listener, Seen, tells_values
from bnfix.calibration.memory_order import HANDED_ON, is_laid_out
from bnfix.calibration.norms import Norms, holds_statistics, norms_device
from bnfix.calibration.outputs import kept_outputs
from bnfix.calibration.staged import forward_of
from bnfix.errors import CalibrationError
from bnfix.running import Footprint
from bnfix.stats import SampleSums, sample_sums

SEPARABLE = {torch.float64: 1e-4, torch.float32: 1e-3}
"""By how much samples may differ alone and together, of the root of the mean square: kernels differ by some 1e-6 with
the batch size (in half precision by its own rounding), layers that mix a batch by 1e-1."""
SEEN, APART = 8, 1e-4
"""Channels that are looked at to tell rows apart, and the part of the largest value from which on they are."""


@dataclass
class Scouted:
    """What was found out with the statistics that the model came with.

    ``parked``, ``forward`` and ``largest`` are bytes a sample: alive at the worst norm, at a forward's peak, and of the
    largest input of a norm. ``tail`` is the share of the time that comes after the last norm. ``inseparable`` says
    why samples can't be put together and cut apart at will; empty if they can, ``parted`` that this was tried.
    ``laid_out`` says that the forward takes images in the faster memory order and hands it on to its norms.
    ``reads`` says that the way through the model may depend on values, ``ways`` are those on which norms were reached
    (None: a forward can't be left at each of them in a thread that others use), ``reached`` says how often each norm
    module was called; ``outputs`` are those of ``chunk``, which begins at sample ``start`` of the first batch.
    """

    chunk: Chunk
    route: tuple[Place, ...] = ()
    parked: float = 0.0
    forward: float = 0.0
    largest: float = 0.0
    tail: float = 0.0
    inseparable: str = ""
    parted: bool = False
    mixing: bool = False
    reads: bool = False
    laid_out: bool = False
    ways: frozenset[Way] | None = None
    reached: Counter[int] = field(default_factory=Counter)
    outputs: list[Tensor] = field(default_factory=list)
    start: int | None = None


@dataclass
class _Trip:
    route: tuple[Place, ...]
    sums: dict[Place, SampleSums]
    rows: dict[Place, Tensor]
    outputs: list[Tensor]
    seconds: float
    last: float
    parked: int
    peak: int
    largest: int
    mixing: bool
    reads: bool
    laid_out: bool
    heard: Mapping[int, int]
    footing: Footing


def scout(chunk: Chunk, model: nn.Module, norms: Norms) -> Scouted:
    """Run ``chunk`` through ``model``, or a replica; nothing is kept of it but figures and its outputs.

    Raises:
        CalibrationError: the forward fails; names the batch.
    """
    found = Scouted(chunk)
    trip = _trip(chunk, model, norms, found.reached, measured=True)
    if not splittable(chunk):
        found.inseparable = _whole(chunk)
    elif trip.mixing:
        found.inseparable = "a norm uses the batch's own statistics in evaluation mode"
    if trip.rows and chunk.samples > 1 and (one := _first_alone(chunk)) is not None:
        norms.repeats = _repeats(chunk, trip, one, model, norms)
    for norm in norms:
        if 0 < trip.heard.get(norm.key, 0) < found.reached[id(norm.mean)] and not norm.why:
            norm.why = "is also called where bnfix can't see it (a thread of the model's own, torch functions disabled)"
    found.route, found.mixing, found.outputs = trip.route, trip.mixing, trip.outputs
    found.reads, found.laid_out = trip.reads, chunk.laid_out and trip.laid_out
    found.ways = frozenset(trip.footing.ways) if trip.footing.sound else None
    found.parked, found.forward = trip.parked / chunk.samples, trip.peak / chunk.samples
    found.largest = trip.largest / chunk.samples
    found.tail = 1 - trip.last / trip.seconds if trip.seconds > 0 else 0.0
    return found


def mixed(chunk: Chunk, replicate: Callable[[], nn.Module], norms: Norms) -> str:
    """Why the samples of ``chunk`` can't be put together and cut apart at will; empty if they can.

    They are run together and in two parts: each norm has to see the same.
    """
    if not splittable(chunk) or chunk.samples < 2:
        return _whole(chunk) if not splittable(chunk) else "a single sample is all there is"
    try:
        parts = [_trip(part, replicate(), norms, Counter()) for part in halves(chunk, 1)]
    except CalibrationError:
        return "the model does not take one sample alone"
    return _difference(_trip(chunk, replicate(), norms, Counter()), parts, norms)


def _first_alone(chunk: Chunk) -> Chunk | None:
    """The first sample of a chunk, to be looked at; None where it can't be told.

    With ``forward=`` a batch goes in as it is, but where all of its tensors have one row a sample, so has the first.
    """
    if splittable(chunk):
        return first_samples(chunk, 1)
    tensors = chunk.call.tensors()
    if chunk.call.forward is None or not all(_has_rows(t, chunk.samples) for t in tensors):
        return None
    mask = None if chunk.mask is None else chunk.mask[:1]
    return Chunk(chunk.call.map(lambda t: t[:1]), 1, chunk.origin[:1], mask)


def _has_rows(tensor: Tensor, count: int) -> bool:
    return not tensor.is_nested and tensor.layout is torch.strided and tensor.shape[:1] == (count,)


def _repeats(chunk: Chunk, trip: _Trip, one: Chunk, model: nn.Module, norms: Norms) -> dict[Place, int]:
    """Where all samples come several times one after the other, and how often: its first sample, ``one``, shows alone
    which rows are its own.

    Rows of one sample are mostly neighbours, ``(N, T, C)`` as ``(N·T, C)``. ``torch.cat((a, b))`` inside a forward puts
    N others between them.
    """
    try:
        alone = _trip(one, model, norms, Counter()).rows
    except CalibrationError:  # it takes no single sample
        return {}
    found = {}
    for place, rows in trip.rows.items():
        own = alone.get(place)
        if own is None or len(own) * chunk.samples != len(rows):
            continue
        away = {
            n: (rows.reshape(n, chunk.samples, len(own) // n, -1)[:, 0].flatten(0, 1) - own).abs().max().item()
            for n in range(1, len(own) + 1)
            if len(own) % n == 0
        }
        best = min(away, key=away.__getitem__)
        if away[1] > APART * rows.abs().max().item() and away[best] < away[1] / 10:
            found[place] = best
    return found


def _whole(chunk: Chunk) -> str:
    if chunk.call.forward is not None:
        return "forward= takes a batch as it is"
    return "the inputs have no common axis of samples"


def _trip(chunk: Chunk, replica: nn.Module, norms: Norms, reached: Counter[int], *, measured: bool = False) -> _Trip:
    """One forward: with what it takes, where ``measured``; else with the sums of each norm's input."""
    route: list[Place] = []
    sums: dict[Place, SampleSums] = {}
    rows: dict[Place, Tensor] = {}
    calls: dict[int, int] = defaultdict(int)
    parked, largest, last = 0, 0, 0.0
    values, in_order = 0, 0
    watching: list[Footing] = []
    held = Footprint(t for t in (*replica.parameters(), *replica.buffers())) if measured else None

    def ask(seen: Seen) -> None:
        if measured:
            footing.step(seen)
        with footing.aside:
            take(seen)

    def take(seen: Seen) -> None:
        nonlocal parked, largest, last, values, in_order
        place = (seen.norm.key, calls[seen.norm.key])
        calls[seen.norm.key] += 1
        if held is not None:
            parked = max(parked, held.now())
        largest = max(largest, seen.x.numel() * seen.x.element_size())
        values += seen.x.numel()
        in_order += seen.x.numel() if is_laid_out(seen.x) else 0
        route.append(place)
        mask = mask_at(chunk, seen.x, seen.norm.path)
        if len(seen.x) > chunk.samples and len(seen.x) % chunk.samples == 0:
            rows[place] = sample_sums(seen.x[:, :SEEN], None, mask).s.cpu()
        if not measured:  # figures are wanted then, not what the norm sees
            sums[place] = norms.sums(place, seen.x, chunk.samples, mask)
        last = time.perf_counter()

    def note(module: nn.Module, _args: Any) -> None:
        if not torch.compiler.is_dynamo_compiling():
            reached[id(_origin(module))] += 1

    handles = [m.register_forward_pre_hook(note) for m in _norm_modules(replica)]
    start = last = time.perf_counter()
    try:
        with (
            forward_of(chunk, lambda: norms.by_key(route[-1][0]).path if route else ""),
            torch.no_grad(),
            Listener(norms, ask) as listener,
            held or contextlib.nullcontext(),
        ):
            footing = Footing(norms_device(norms), listener)
            watching.append(footing)
            if held is not None:
                held.aside = footing.aside
            with footing if measured else contextlib.nullcontext():
                outputs = chunk.run(replica)
    finally:
        if measured and watching:
            watching[0].end()  # Ctrl-C may come as it is left
        for handle in handles:
            handle.remove()
    given = chunk.call.nbytes
    end = time.perf_counter()
    reads = listener.reads or (held is not None and any(map(tells_values, held.ran)))
    peak = (held.peak if held else 0) + given
    return _Trip(
        tuple(route),
        sums,
        rows,
        kept_outputs(outputs),
        end - start,
        last - start,
        parked + given,
        peak,
        largest,
        listener.mixing,
        reads,
        in_order > HANDED_ON * values,
        calls,
        footing,
    )


def _norm_modules(replica: nn.Module) -> list[nn.Module]:
    # Those that hold one: a wrapper that hands on what it is asked for is called as well, and would count twice.
    return [m for m in replica.modules() if holds_statistics(m) and isinstance(m.running_mean, Tensor)]


def _origin(module: nn.Module) -> Any:
    return module.running_mean  # shared by identity with the model: what a replica's norm is known by


def _difference(whole: _Trip, parts: Sequence[_Trip], norms: Norms) -> str:
    """Where the samples behave differently together and alone; empty where they nowhere do."""
    if any(p.route != whole.route for p in parts):
        return "samples go other ways together than alone"
    coarse = norms.half or norms_device(norms).type != "cpu"  # TF32, and a choice of kernels by the batch size
    for place, together in whole.sums.items():
        apart = [p.sums[place] for p in parts]
        n = [_count(s) for s in (together, *apart)]
        path = norms.by_key(place[0]).path
        if n[0] != sum(n[1:]):
            return f"{path} sees other positions where samples come together"
        s, q = together.s.double().sum(0), together.q.double().sum(0)
        ds = s - sum(a.s.double().sum(0) for a in apart)
        dq = q - sum(a.q.double().sum(0) for a in apart)
        scale = (q / max(n[0], 1)).clamp(min=1e-30)
        if not bool(torch.isfinite(scale).all()):
            continue  # the run itself names the batch
        worst = torch.maximum(ds.abs() / n[0] / scale.sqrt(), dq.abs() / n[0] / scale).max().item() if n[0] else 0.0
        if worst > SEPARABLE.get(together.s.dtype, 1e-3) * (30 if coarse else 1):
            return f"samples are mixed within a batch before {path}"
    return ""


def _count(sums: SampleSums) -> float:
    return sums.n * sums.s.shape[0] if isinstance(sums.n, int) else float(sums.n.sum())
