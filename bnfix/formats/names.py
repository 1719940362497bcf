"""Where in a checkpoint the weights lie, and what stands before their names; for real objects and symbolic ones."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

WRAPPERS = (
    "state_dict_ema", "model_ema", "state_dict", "model", "ema", "ema_state_dict", "ema_model", "params_ema",
    "model_state_dict", "model_state", "module", "net", "network", "params", "weights",
)  # fmt: skip
"""Keys under which trainers put the weights, in the order in which they are opened: averaged before raw."""

PREFIXES = ("module.", "_orig_mod.")
"""What DataParallel and torch.compile put before every name."""


def printable(text: str, limit: int = 120) -> str:
    """``text`` from a file as a terminal may show it: no control characters, no more than ``limit`` of it."""
    clean = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text[: limit + 1])
    return clean if len(clean) <= limit else f"{clean[: limit - 1]}…"


Sort = Literal["tensor", "module", "mapping", ""]
_DEPTH = 4


@dataclass(frozen=True)
class Opened:
    """The weights found in a checkpoint: the keys that lead to them, and where else weights lie beside them."""

    value: Any
    path: tuple[str, ...] = ()
    others: tuple[str, ...] = ()
    ambiguous: bool = False


def open_wrappers(root: Any, sort: Callable[[Any], Sort], entries: Callable[[Any], Mapping[Any, Any]]) -> Opened:
    """Go from the root of a checkpoint to its weights.

    ``sort`` says what a value is, ``entries`` gives a mapping's entries. A set of weights is a mapping with tensors
    under names, or a module. ``ambiguous`` where several lie side by side under keys that say nothing.
    """
    path: tuple[str, ...] = ()
    others: tuple[str, ...] = ()
    value = root
    while sort(value) == "mapping" and len(path) < _DEPTH:
        table = entries(value)
        sizes = {k: _weight(v, sort, entries) for k, v in table.items() if isinstance(k, str)}
        sizes = {k: n for k, n in sizes.items() if n and sort(table[k]) != "tensor"}
        if not sizes or _tensors(value, sort, entries) > max(sizes.values()):
            break
        chosen = next((w for w in WRAPPERS if w in sizes), None)
        if chosen is None and len(sizes) > 1:
            return Opened(value, path, tuple(sizes), ambiguous=True)
        chosen = chosen if chosen is not None else next(iter(sizes))
        others += tuple(".".join((*path, k)) for k in sizes if k != chosen)
        path, value = (*path, chosen), table[chosen]
    return Opened(value, path, others)


def _tensors(value: Any, sort: Callable[[Any], Sort], entries: Callable[[Any], Mapping[Any, Any]]) -> int:
    return sum(1 for k, v in entries(value).items() if isinstance(k, str) and sort(v) == "tensor")


def _weight(
    value: Any, sort: Callable[[Any], Sort], entries: Callable[[Any], Mapping[Any, Any]], depth: int = 0
) -> int:
    """How many tensors a set of weights at ``value``, or within a wrapper there, has; a module counts as one."""
    kind = sort(value)
    if kind == "module":
        return 1
    if kind != "mapping" or depth >= _DEPTH:
        return 0
    table = entries(value)
    inner = (_weight(table[w], sort, entries, depth + 1) for w in WRAPPERS if w in table)
    return max((_tensors(value, sort, entries), *inner))


@dataclass(frozen=True)
class Renaming:
    """How the names of a set of weights become a model's own.

    ``prefix`` is taken off each name, ``compiled`` takes out ``_orig_mod.`` wherever it stands, and the names in
    ``dropped`` are no weights (the counter of an AveragedModel).
    """

    prefix: str = ""
    compiled: bool = False
    dropped: frozenset[str] = frozenset()

    def __call__(self, name: str) -> str:
        name = name.removeprefix(self.prefix)
        return name.replace("._orig_mod.", ".").removeprefix("_orig_mod.") if self.compiled else name

    def __bool__(self) -> bool:
        return bool(self.prefix or self.compiled)

    def __str__(self) -> str:
        return self.prefix or ("_orig_mod." if self.compiled else "")


def wrapped_by_training(names: Iterable[str]) -> Renaming:
    """What training wrappers put before ``names``: ``module.`` and ``_orig_mod.``, several times or within, too."""
    every = list(names)
    dropped = frozenset(n for n in every if n == "n_averaged")  # torch.optim.swa_utils.AveragedModel
    kept = [n for n in every if n not in dropped]
    prefix = ""
    while kept:
        found = next((p for p in PREFIXES if all(n.startswith(prefix + p) for n in kept)), None)
        if found is None:
            break
        prefix += found
    renaming = Renaming(
        prefix, any("_orig_mod." in n.removeprefix(prefix) for n in kept), dropped if prefix else frozenset()
    )
    unique = len({renaming(n) for n in kept}) == len(kept)
    return renaming if renaming and unique else Renaming()


def common_prefix(names: Iterable[str]) -> str:
    """The first component, where all ``names`` share it: ``model.`` in Lightning's checkpoints. Else empty."""
    heads = {n.partition(".")[0] if "." in n else "" for n in names}
    head = heads.pop() if len(heads) == 1 else ""
    return f"{head}." if head else ""
