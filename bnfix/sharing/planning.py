"""Which norms are shared, and how each can be taken apart; or why not."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.utils import parametrize

from bnfix.graph import describe_norm, find_owners, norm_modules
from bnfix.graph.owners import Owners
from bnfix.graph.unsharing import AFFINE, STATE, own_slots, per_call_name
from bnfix.sharing.sites import Forward, Function
from bnfix.types import CallSite, Refusal

Step = Mapping[str, Any]

_WRAP = (
    "what is called several times is the model itself, by the code that runs it. Put these calls into the forward of "
    "one module, and un-share that: class Together(nn.Module) with `def forward(self, a, p, n): return self.net(a), "
    "self.net(p), self.net(n)`"
)


@dataclass(frozen=True)
class Planned:
    """One norm that is taken apart, and for a reader what it is and what it becomes."""

    step: Step
    site: str
    before: str
    after: str
    calls: tuple[str, ...]


@dataclass(frozen=True)
class Plan:
    """What is to be done, and shared norms that stay. ``single`` counts norms that are not shared."""

    planned: tuple[Planned, ...] = ()
    refusals: tuple[Refusal, ...] = ()
    single: int = 0


class Wanted:
    """The norms that were asked for: by their paths, or those of modules around them; all where nothing was said.

    ``share_affine``: whether those in place of one are to have the same weights.
    """

    def __init__(self, sites: str | Iterable[str] | None, *, share_affine: bool = False) -> None:
        self.share_affine = share_affine
        given = [sites] if isinstance(sites, str) else list(sites) if sites is not None else None
        if given is not None and not all(isinstance(s, str) for s in given):
            raise TypeError("sites are module paths, such as 'encoder.bn1'")
        self.sites = None if given is None else [s.partition("@")[0] for s in given]

    def has(self, paths: Iterable[str]) -> bool:
        """Whether a norm of these names was asked for."""
        if self.sites is None:
            return True
        return any(p == s or s in ("", "(root)") or p.startswith(f"{s}.") for p in paths for s in self.sites)

    def check(self, names: Iterable[Iterable[str]]) -> None:
        """Whether each site that was asked for is that of a norm.

        Raises:
            ValueError: one is not; names some that are.
        """
        known = [list(n) for n in names]
        for site in self.sites or ():
            if not any(Wanted(site).has(paths) for paths in known):
                some = ", ".join(paths[0] for paths in known[:5])
                raise ValueError(f"there is no norm at {site!r} to un-share; there is {some or 'none in this model'}")


def by_name(model: nn.Module, wanted: Wanted) -> list[Planned]:
    """Norms that one module tree holds under several names, and those with the same buffers."""
    owners = find_owners(model)
    planned: list[Planned] = []
    by_mean: dict[int, list[nn.Module]] = {}
    for norm in norm_modules(owners):
        mean = norm._buffers.get("running_mean")
        if mean is not None:
            by_mean.setdefault(id(mean), []).append(norm)
    for group in by_mean.values():
        sites = [owners.paths(n)[0] for n in group]
        if len(group) > 1 and wanted.has(p for n in group for p in owners.paths(n)):
            step = {"how": "buffers", "sites": sites, "share_affine": wanted.share_affine}
            after = f"statistics of its own for each of {', '.join(sites)}"
            planned.append(Planned(step, sites[0], describe_norm(group[0]), after, tuple(sites)))
    for norm in norm_modules(owners):
        slots = own_slots(owners, norm)
        if len(slots) < 2 or not all(s.registered for s in slots) or not wanted.has(owners.paths(norm)):
            continue
        if norm._buffers.get("running_mean") is None or parametrize.is_parametrized(norm):
            continue  # by_call says why
        sites = [s.path for s in slots]
        step = {"how": "names", "sites": sites, "share_affine": wanted.share_affine}
        planned.append(_named(Planned(step, sites[0], describe_norm(norm), "", ()), sites))
    return planned


def only_called(planned: Sequence[Planned], separate: nn.Module, seen: Sequence[Forward]) -> list[Planned]:
    """``planned`` without the names by which no norm is called, as forwards of ``separate``, with all apart, show.

    Such a name (in a list that only registers modules) goes on to lead to the norm of the first call.
    """
    owners = find_owners(separate)
    kept: list[Planned] = []
    for one in planned:
        if one.step["how"] != "names":
            kept.append(one)
            continue
        names = {s: owners.paths(owners.module_at(s))[0] for s in one.step["sites"]}
        sites = [s for s, path in names.items() if any(run.calls[path] for run in seen)]
        if len(sites) > 1:
            kept.append(_named(one, sites))
    return kept


def _named(one: Planned, sites: list[str]) -> Planned:
    after = f"a norm of its own under each name: {', '.join(sites)}"
    return Planned({**one.step, "sites": sites}, sites[0], one.before, after, tuple(sites))


def by_call(model: nn.Module, seen: Sequence[Forward], wanted: Wanted, done: Iterable[str] = ()) -> Plan:
    """Norms that are called several times in a forward, as it was ``seen`` to go; ``done`` were taken apart already."""
    owners = find_owners(model)
    planned: list[Planned] = []
    refusals: list[Refusal] = []
    done = set(done)
    single = 0
    norms = {owners.paths(n)[0]: n for n in norm_modules(owners)}
    functions = _grouped(seen)
    whole = {path: norm for path, norm in norms.items() if not _at_functions(owners, norm, path, seen)}
    for path, norm in whole.items():
        if not wanted.has(owners.paths(norm)):
            continue
        counts = {run.name: run.calls[path] for run in seen}
        reason = _counted(counts, path in _outside(seen), seen)
        if reason is None:
            single += 1
            if wanted.sites is not None and path not in done:
                refusals.append(Refusal(path, _single(owners, norm), before=describe_norm(norm)))
            continue
        reason = reason or _unfit(owners, norm, path, functions)
        calls = max(counts.values())
        if reason:
            refusals.append(Refusal(path, reason, _sites(path, calls), before=describe_norm(norm)))
            continue
        after = f"{calls} norms, one for each call: {path}.0 … {path}.{calls - 1}"
        step = {"how": "calls", "site": path, "calls": calls, "share_affine": wanted.share_affine}
        planned.append(Planned(step, path, describe_norm(norm), after, _sites(path, calls)))
    for mean, uses in functions.items():
        if uses[0].inside in whole or not wanted.has([mean, mean.rpartition(".")[0]]):
            continue
        counts = {run.name: sum(f.mean == mean for f in run.functions) for run in seen}
        reason = _counted(counts, mean in _outside(seen), seen)
        if reason is None:
            single += 1
            continue
        calls = max(counts.values())
        found = reason or _function_step(owners, uses, calls)
        if isinstance(found, str):
            refusals.append(Refusal(mean, found, _sites(mean, calls), before="F.batch_norm"))
            continue
        step = {**found, "share_affine": wanted.share_affine}
        place = f"{found['site']}.{per_call_name(found['mean'])}".lstrip(".")
        after = f"statistics for each of {calls} calls: {place}.0 … {place}.{calls - 1}"
        planned.append(Planned(step, mean, "F.batch_norm", after, _sites(mean, calls)))
    return Plan(tuple(planned), tuple(refusals), single)


def _single(owners: Owners, norm: nn.Module) -> str:
    more = len(own_slots(owners, norm)) > 1
    return f"it is called once in a forward{': its other names only refer to it' if more else ', not shared'}"


def names_of_norms(model: nn.Module, seen: Sequence[Forward]) -> list[tuple[str, ...]]:
    """Every name that a norm of ``model`` can be asked for by."""
    owners = find_owners(model)
    modules = norm_modules(owners)
    known = {p for n in modules for t in [n._buffers.get("running_mean")] if t is not None for p in owners.paths(t)}
    loose = [(mean, mean.rpartition(".")[0]) for mean in _grouped(seen) if mean not in known]
    return [*(owners.paths(n) for n in modules), *loose]


def _counted(counts: Mapping[str, int], outside: bool, seen: Sequence[Forward]) -> str | None:
    """None where a norm is called once at most; a reason why its calls can't be told apart by number; else empty."""
    if max(counts.values(), default=0) < 2:
        return None
    if any(run.roots != 1 for run in seen):
        return _WRAP
    if outside:
        return "it is called while the model itself is not: forward= runs a part of the model; un-share that part"
    numbers = {n for n in counts.values() if n}
    if len(numbers) > 1:
        said = [f"{n} on {name}" for name, n in counts.items() if n]
        return f"how often it is called changes: {', '.join(dict.fromkeys(said))}; which call is which can't be told"
    return ""


def _unfit(owners: Owners, norm: nn.Module, path: str, functions: Mapping[str, list[Function]]) -> str:
    """Why a norm that is called several times can't be doubled, or nothing."""
    mean = norm._buffers.get("running_mean")
    if mean is None:
        return "it keeps no running statistics: each call is normalised by itself already"
    if parametrize.is_parametrized(norm):
        return "its weight is computed by a parametrization, which its copies would share"
    if any(f.inside != path for f in functions.get(owners.paths(mean)[0], ())):
        return "its statistics are handed to F.batch_norm elsewhere as well"
    more = "" if isinstance(norm, _NormBase) else _more_than_a_norm(norm)
    return f"it is more than a norm: it holds {more}" if more else ""


def _at_functions(owners: Owners, norm: nn.Module, path: str, seen: Sequence[Forward]) -> bool:
    """Whether a module is to be taken apart at its calls of F.batch_norm, not as a whole.

    So it is where it is no norm alone, or normalises several times in one call of its own.
    """
    mean = norm._buffers.get("running_mean")
    if isinstance(norm, _NormBase) or mean is None:
        return False
    name = owners.paths(mean)[0]
    uses = [(run, [f for f in run.functions if f.mean == name]) for run in seen]
    if not any(found for _, found in uses):
        return False
    if _more_than_a_norm(norm) or any(f.inside != path for _, found in uses for f in found):
        return True
    return any(len(found) > run.calls[path] for run, found in uses)


def _more_than_a_norm(module: nn.Module) -> str:
    known = {*STATE, *AFFINE}
    own = [n for n in (*module._parameters, *module._buffers) if n not in known]
    below = [n for n, c in module.named_children() if any(True for _ in (*c.parameters(), *c.buffers()))]
    return ", ".join([*own, *below])


def _grouped(seen: Sequence[Forward]) -> dict[str, list[Function]]:
    """Functional calls by the statistics they use, each way of calling once, in the order in which they were seen."""
    found: dict[str, list[Function]] = {}
    for run in seen:
        for use in run.functions:
            found.setdefault(use.mean, []).append(use)
    return {mean: list(dict.fromkeys(uses)) for mean, uses in found.items()}


def _outside(seen: Sequence[Forward]) -> set[str]:
    return {name for run in seen for name in run.outside}


def _function_step(owners: Owners, uses: Sequence[Function], calls: int) -> Step | str:
    """How calls of F.batch_norm with the same buffers are told apart; or why they can't be."""
    first = uses[0]
    if len({(f.var, f.weight, f.bias) for f in uses}) > 1:
        return "its statistics are handed to F.batch_norm with different variances or weights"
    place = _buffer(owners, first.mean)
    other = _buffer(owners, first.var) if first.var is not None else None
    if place is None or other is None or place[:2] != other[:2]:
        return "its statistics are no registered buffers of one module"
    site, holder, mean = place
    if hasattr(holder, per_call_name(mean)):
        return f"there is a {per_call_name(mean)} beside it already"
    names = [_own_parameter(holder, site, name) for name in (first.weight, first.bias)]
    return {
        "how": "function", "site": site, "mean": mean, "var": other[2], "weight": names[0], "bias": names[1],
        "calls": calls,
    }  # fmt: skip


def _buffer(owners: Owners, name: str) -> tuple[str, nn.Module, str] | None:
    """The module that registers the buffer ``name``, and its name there; None where that is not its only place."""
    for key, slots in owners.tensor_slots.items():
        if any(s.path == name for s in slots):
            places = {(id(s.container), s.key): s for s in slots}
            (slot, *more) = places.values()
            module: Any = slot.container
            if more or not slot.registered or module._buffers.get(slot.key) is not owners.tensors[key]:
                return None
            return (owners.paths(module) or ("",))[0], module, str(slot.key)
    return None


def _own_parameter(holder: nn.Module, site: str, name: str | None) -> str | None:
    """The attribute of a weight that the module of the statistics has itself; others are handed on as they come."""
    prefix, _, attribute = (name or "").rpartition(".")
    return attribute if name and prefix == site and holder._parameters.get(attribute) is not None else None


def _sites(path: str, calls: int) -> tuple[str, ...]:
    return tuple(str(CallSite(path, i)) for i in range(calls))
