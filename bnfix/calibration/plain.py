"""The model as it is, one chunk after the other, with an ear at its norms: the measure of everything else."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from bnfix.calibration.chunks import Chunk, mask_at
from bnfix.calibration.ledger import Place, residual, stored
from bnfix.calibration.listening import Listener, Seen, Stats
from bnfix.calibration.norms import Norms
from bnfix.calibration.outputs import kept_outputs
from bnfix.calibration.ranks import Ranks
from bnfix.calibration.staged import forward_of
from bnfix.errors import CalibrationError
from bnfix.stats import Gathering, Moments, SampleSums
from bnfix.types import Residual


def listen(model: nn.Module, chunk: Chunk, norms: Norms) -> tuple[dict[Place, SampleSums], list[Tensor]]:
    """One plain forward: the sums of the input of each call site, and copies of the floating outputs.

    Raises:
        CalibrationError: the forward fails; names the batch.
    """
    found: dict[Place, SampleSums] = {}

    def hear(place: Place, x: Tensor, mask: Tensor | None) -> None:
        found[place] = norms.sums(place, x, chunk.samples, mask)

    return found, kept_outputs(_forward(model, chunk, norms, hear))


def _forward(model: nn.Module, chunk: Chunk, norms: Norms, hear: Callable[[Place, Tensor, Tensor | None], None]) -> Any:
    calls: dict[int, int] = defaultdict(int)

    def ask(seen: Seen) -> None:
        place = (seen.norm.key, calls[seen.norm.key])
        calls[seen.norm.key] += 1
        hear(place, seen.x, mask_at(chunk, seen.x, seen.norm.path))

    with forward_of(chunk), torch.no_grad(), Listener(norms, ask):
        return chunk.run(model)


def measure(model: nn.Module, chunks: Iterable[Chunk], norms: Norms, samples: int) -> dict[Place, Moments]:
    """The moments of every call site over all chunks, which hold so many samples, as the model stands."""
    found: Gathering[Place] = Gathering(samples)
    for chunk in chunks:

        def hear(place: Place, x: Tensor, mask: Tensor | None, chunk: Chunk = chunk) -> None:
            found.add(place, norms.sums(place, x, chunk.samples, mask), x, mask)

        _forward(model, chunk, norms, hear)
    return found.moments()


def merged(found: dict[Place, Moments], norms: Norms, ranks: Ranks) -> dict[Place, Moments]:
    """The same over all ranks; call sites that only some of them met are there on each."""
    if ranks.world == 1:
        return found
    met = {place: norms.by_key(place[0]).var_key for place in found}
    places = {place: key for said in ranks.all_of(met) for place, key in said.items()}
    out: dict[Place, Moments] = {}
    for place in sorted(places):
        norms.meet(place[0], places[place])
        norm = norms.by_key(place[0])
        mine = found.get(place)
        out[place] = ranks.merged(Moments.empty(norm.channels, norm.mean.device) if mine is None else mine)
    return out


def by_norm(found: dict[Place, Moments]) -> dict[int, Moments]:
    """Call sites of one norm together."""
    out: dict[int, Moments] = {}
    for (key, _), moments in sorted(found.items(), key=lambda item: item[0]):
        out[key] = out[key].merge(moments) if key in out else moments
    return out


def residual_of(found: dict[Place, Moments], stats: dict[int, Stats], norms: Norms, unbiased: bool) -> Residual:
    """How far these statistics are from what was measured with them in use; infinite where that is not finite."""
    pooled = [(key, moments) for key, moments in by_norm(found).items() if key in stats]
    try:
        return residual((stats[key], stored(norms.by_key(key), moments, unbiased)) for key, moments in pooled)
    except CalibrationError:  # statistics that make a model overflow are what somebody may want to get rid of
        return Residual(math.inf, math.inf)
