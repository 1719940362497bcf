"""Two models compared, output by output and call by call; the rule itself is in :mod:`bnfix.parity.rule`."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from bnfix.parity.chance import differing
from bnfix.parity.oracle import Recorded, Reference
from bnfix.parity.rule import K_FAILS, Case, Judged, judge_case, pooled_noise, roundoff
from bnfix.types import OutputParity, Parity, Verdict

NEARER = 1.1
"""Sides whose errors differ by less are equally near to the oracle."""

SEVERITY: tuple[Verdict, ...] = ("passed", "warned", "inconclusive", "failed")


def judge(
    name: str,
    oracle: Sequence[Tensor],
    reference: Sequence[Tensor],
    candidate: Sequence[Tensor | None],
    noise_draws: Sequence[Sequence[Tensor]] = (),
    dtype: torch.dtype = torch.float32,
    k: float = K_FAILS,
) -> OutputParity:
    """Judge one output (or the tensor at one site) over several calls.

    Args:
        oracle, reference, candidate: its value per call in float64, in the model's own run, in the candidate.
        noise_draws: per call, further runs of the reference (may be shorter than ``reference``).
        dtype: the type that the model computes in.
        k: how many times the noise is too much.
    """
    extra = [*noise_draws, *[()] * (len(reference) - len(noise_draws))]
    cases = [
        Case(i, o, (r, *more), c)
        for i, (o, r, more, c) in enumerate(zip(oracle, reference, extra, candidate, strict=True))
    ]
    return _judge(name, cases, dtype, k, "the candidate")


def compare(
    references: Sequence[Reference],
    candidates: Sequence[Recorded | Mapping[str, Tensor]],
    *,
    k: float = K_FAILS,
    candidate: str = "",
    notes: Iterable[str] = (),
    versions: Mapping[str, str] | None = None,
    providers: Sequence[str] = (),
) -> Parity:
    """Judge every output of ``candidates`` (one run for each reference, same order) by the noise rule."""
    outputs = [c.outputs if isinstance(c, Recorded) else c for c in candidates]
    judged = _judge_all(
        references, [r.oracle.outputs for r in references], [[d.outputs for d in r.draws] for r in references],
        outputs, k, candidate or "the candidate",
    )  # fmt: skip
    chance = {r.chance: differing(r.draws[0].outputs, r.again.outputs) for r in references if r.again}
    judged = tuple(_left_to_chance(o, chance) for o in judged)
    return Parity(
        outputs=judged,
        passed=(verdict := overall(judged)) in ("passed", "warned"),
        verdict=verdict,
        k=k,
        signatures=tuple(dict.fromkeys(r.call.signature for r in references)),
        candidate=candidate,
        notes=tuple(dict.fromkeys([*notes, *(n for r in references for n in r.notes)])),
        versions=dict(versions or {"torch": torch.__version__}),
        providers=tuple(providers),
    )


def compare_sites(
    references: Sequence[Reference],
    candidates: Sequence[Recorded],
    pairs: Mapping[str, str] | None = None,
    *,
    k: float = K_FAILS,
) -> tuple[OutputParity, ...]:
    """Judge what was recorded at sites, in the order they ran.

    ``pairs`` leads from a site of the reference to that of the candidate; None: the same.
    """
    sites = list(references[0].oracle.sites) if references else []
    named = {site: (pairs or {}).get(site, site) for site in sites if pairs is None or site in pairs}
    own = {site: site for site in named}
    judged = _judge_all(
        references, [r.oracle.by_site(own) for r in references],
        [[d.by_site(own) for d in r.draws] for r in references],
        [c.by_site(named) for c in candidates], k, "the candidate",
    )  # fmt: skip
    chance = {r.chance: differing(r.draws[0].by_site(own), r.again.by_site(own)) for r in references if r.again}
    judged = tuple(_left_to_chance(o, chance) for o in judged)
    ran = {name: i for i, name in enumerate(references[0].draws[0].order if references else ())}
    ordered = sorted(judged, key=lambda o: ran.get(o.name, len(ran)))
    return tuple(replace(o, worst_sample="") for o in ordered)  # subsampled: there are no samples to point at


def overall(outputs: Sequence[OutputParity]) -> Verdict:
    """The worst verdict of ``outputs``; inconclusive where there is nothing that could be compared."""
    return max((o.verdict for o in outputs), key=SEVERITY.index, default="inconclusive")


def worse(a: Parity, b: Parity, labels: tuple[str, str]) -> Parity:
    """Two parities with the same references as one: of each output the worse, marked with where it was found."""

    def rank(o: OutputParity) -> tuple[int, float]:
        return SEVERITY.index(o.verdict), o.noise_ratio or 0.0

    chosen: list[OutputParity] = []
    others = {o.name: o for o in b.outputs}
    for one in a.outputs:
        two = others.pop(one.name, one)
        at, pick = (labels[1], two) if rank(two) > rank(one) else (labels[0], one)
        same = rank(one)[0] == rank(two)[0]
        chosen.append(replace(pick, reason=f"{pick.reason} ({at})") if pick.reason and not same else pick)
    chosen += others.values()
    verdict = overall(chosen)
    return replace(
        a, outputs=tuple(chosen), verdict=verdict, passed=verdict in ("passed", "warned"),
        notes=tuple(dict.fromkeys([*a.notes, *b.notes])),
    )  # fmt: skip


def _judge_all(
    references: Sequence[Reference],
    oracles: Sequence[Mapping[str, Tensor]],
    draws: Sequence[Sequence[Mapping[str, Tensor]]],
    candidates: Sequence[Mapping[str, Tensor]],
    k: float,
    label: str,
) -> tuple[OutputParity, ...]:
    cases: dict[str, list[Case]] = {}
    dtypes: dict[str, torch.dtype] = {}
    for i, (reference, oracle, runs, run) in enumerate(zip(references, oracles, draws, candidates, strict=True)):
        for name, plain in runs[0].items():
            if name not in oracle:
                cases.setdefault(name, []).append(Case(i, plain[:0].reshape(-1), (plain,), run.get(name)))
                continue
            own = tuple(d[name] for d in runs if name in d)
            moved = reference.moved if len(own) == len(runs) else ()
            cases.setdefault(name, []).append(Case(i, oracle[name], own, run.get(name), moved, reference.exact))
            dtypes[name] = max(dtypes.get(name, reference.dtype), reference.dtype, key=roundoff)
    judged = [_judge(name, each, dtypes.get(name, torch.float32), k, label) for name, each in cases.items()]
    unknown = dict.fromkeys(n for run in candidates for n in run if n not in cases)
    judged += [_none(n, "failed", f"{label} has it, the model doesn't") for n in unknown]
    return tuple(judged)


def _left_to_chance(output: OutputParity, chance: Mapping[str, set[str]]) -> OutputParity:
    """``output``, or that nothing can be said of it: ``chance`` leads from a reason to the names it holds for."""
    reason = next((why for why, names in chance.items() if output.name in names), "")
    return _none(output.name, "inconclusive", reason) if reason else output


def _none(name: str, verdict: Verdict, reason: str) -> OutputParity:
    return OutputParity(name, None, None, None, None, verdict in ("passed", "warned"), verdict, reason)


def _judge(name: str, cases: Sequence[Case], dtype: torch.dtype, k: float, label: str) -> OutputParity:
    pool = pooled_noise(cases)
    judged = [judge_case(case, pool, dtype, k) for case in cases]
    if not judged:
        return _none(name, "inconclusive", "nothing was run")
    worst = max(judged, key=lambda j: (SEVERITY.index(j.verdict), j.ratio or 0.0))
    loudest = max(judged, key=lambda j: j.noise if j.noise is not None else -1.0)

    def top(field: str) -> float | None:
        values = [v for j in judged if (v := getattr(j, field)) is not None]
        return (math.nan if any(math.isnan(v) for v in values) else max(values)) if values else None

    def least(field: str) -> float | None:
        return min((v for j in judged if (v := getattr(j, field)) is not None), default=None)

    return OutputParity(
        name=name,
        max_abs_err=top("max_abs"),
        max_rel_err=top("max_rel"),
        noise_ratio=top("ratio"),
        required_tolerance=top("required"),
        passed=worst.verdict in ("passed", "warned"),
        verdict=worst.verdict,
        reason=worst.reason,
        rms_err=top("rms_err"),
        noise=loudest.noise,
        cosine=least("cosine"),
        top1_agreement=least("top1"),
        worst_sample=worst.worst_sample,
        nearer=_nearer(judged, label),
    )


def _nearer(judged: Sequence[Judged], label: str) -> str:
    pairs = [(j.own_err, j.rms_err) for j in judged if j.own_err is not None and j.rms_err is not None]
    own, other = (math.hypot(*(p[side] for p in pairs)) if pairs else 0.0 for side in (0, 1))
    if own == other == 0.0 or max(own, other) <= NEARER * min(own, other):
        return "both alike" if pairs else ""
    return label if other < own else "the model"
