"""``bnfix.fold`` beside what others offer: the whole zoo, and small models that are easy to get wrong.

Run: ``python tests/benchmarks/bench_fold_peers.py [--readme] [--models NAME ...] [--tools NAME ...] [--keep FILE]``.
Each tool gets its own deep copy of each model, in turn, in one process, and one sample to trace; it is judged by the
outputs on another sample. Norms are counted by running: calls of batch_norm on running statistics in one forward.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import logging
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import zoo
from benchmarks import fold_patterns
from benchmarks.fold_peers import TOOLS, Run, present, versions
from benchmarks.tables import machine, publish, table
from nets import relative_error

LIMIT = 1e-3
"""Relative error of an output from which on it is wrong; or twice the model's own rounding error, if that is more."""


@dataclass(frozen=True)
class Outcome:
    """What one tool made of one model. ``verdict``: right, wrong (in silence), told (wrong, and it warned) or error."""

    model: str
    tool: str
    verdict: str
    norms: int
    left: int
    error: float
    seconds: float
    note: str = ""


class CountNorms(TorchDispatchMode):
    """Counts the norms that run on running statistics, whoever calls them: a module, a function or a graph."""

    def __init__(self) -> None:
        super().__init__()
        self.found = 0

    def __torch_dispatch__(
        self, function: Any, types: Sequence[Any], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        schema = function._schema
        if "batch_norm" in schema.name and "backward" not in schema.name:
            names = [a.name for a in schema.arguments]
            given = {**dict(zip(names, args, strict=False)), **(kwargs or {})}
            self.found += not given.get("training", given.get("train", False))
        return function(*args, **(kwargs or {}))


def tensors(value: Any) -> list[Tensor]:
    """All floating outputs; of a detector's the scores, in order: boxes change places for the least of reasons."""
    if isinstance(value, Tensor):
        return [value] if value.is_floating_point() else []
    if isinstance(value, dict):
        if "scores" in value:
            return [value["scores"].sort().values]
        value = list(value.values())
    return [t for v in value for t in tensors(v)] if isinstance(value, (list, tuple)) else []


def run(model: Callable[..., Any], args: tuple[Any, ...]) -> tuple[list[Tensor], int]:
    """The outputs, and how many norms ran."""
    torch.manual_seed(0)
    with torch.no_grad():
        if isinstance(model, torch.jit.ScriptModule):  # its interpreter does not get along with a dispatch mode
            return tensors(model(*args)), str(model.inlined_graph).count("aten::batch_norm(")
        with CountNorms() as count:
            return tensors(model(*args)), count.found


def distance(found: list[Tensor], expected: list[Tensor]) -> float:
    """The worst relative error over the outputs; infinite where they are others in number or shape."""
    if [t.shape for t in found] != [t.shape for t in expected]:
        return float("inf")
    worst = max((relative_error(a, b) for a, b in zip(found, expected, strict=True)), default=float("inf"))
    return worst if worst == worst else float("inf")


def own_noise(model: nn.Module, args: tuple[Any, ...], expected: list[Tensor]) -> float:
    """How far the model is from itself in float64; 0 where that can't be run."""
    wide = tuple(a.double() if isinstance(a, Tensor) else [t.double() for t in a] for a in args)
    try:
        return distance(expected, run(copy.deepcopy(model).double(), wide)[0])
    except (RuntimeError, TypeError):
        return 0.0


@dataclass(frozen=True)
class Case:
    """A model, what it is traced with, what it is judged by, what it gives then, and how many norms run in it."""

    name: str
    model: nn.Module
    traced: tuple[Any, ...]
    seen: tuple[Any, ...]
    expected: list[Tensor]
    norms: int


def case(name: str, model: nn.Module, traced: tuple[Any, ...], seen: tuple[Any, ...]) -> Case:
    """The original is run here, once for all tools."""
    return Case(name, model, traced, seen, *run(model, seen))


def judge(of: Case, tool: str, use: Run, limit: float = LIMIT) -> Outcome:
    """Give ``tool`` a copy of the model and compare what comes back with the original."""
    name, model, seen, norms, expected = of.name, of.model, of.seen, of.norms, of.expected
    own = copy.deepcopy(model)
    start = time.process_time()
    with warnings.catch_warnings(record=True) as caught, _logged() as logged:
        warnings.simplefilter("always")
        try:
            folded = use(own, copy.deepcopy(of.traced))
        except Exception as error:  # noqa: BLE001 — whatever a tool raises is its outcome, and is shown
            return _failed(name, tool, norms, time.process_time() - start, error)
    seconds = time.process_time() - start
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            found, left = run(folded, seen)
        except Exception as error:  # noqa: BLE001 — as above: what it made can't be run
            return _failed(name, tool, norms, seconds, error)
    said = [str(w.message) for w in caught if not issubclass(w.category, (DeprecationWarning, FutureWarning))]
    note = " | ".join(dict.fromkeys([*said, *logged]))[:200]
    error_ = distance(found, expected)
    if error_ < limit or error_ < 2 * own_noise(model, seen, expected):
        return Outcome(name, tool, "right", norms, left, error_, seconds, note)
    return Outcome(name, tool, "told" if note else "wrong", norms, left, error_, seconds, note)


@contextlib.contextmanager
def _logged() -> Iterator[list[str]]:
    """Collects what goes to the log as a warning or worse."""
    found: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: found.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger().addHandler(handler)
    try:
        yield found
    finally:
        logging.getLogger().removeHandler(handler)


def _failed(name: str, tool: str, norms: int, seconds: float, error: Exception) -> Outcome:
    text = " ".join(f"{type(error).__name__}: {error}".split())[:160]
    return Outcome(name, tool, "error", norms, norms, 0.0, seconds, text)


def whole_zoo(names: list[str], tools: dict[str, Run], keep: Path | None) -> list[Outcome]:
    """Every tool on every model; what ``keep`` already has is not run again."""
    kept = keep.read_text().splitlines() if keep and keep.exists() else []
    known = {(o.model, o.tool): o for o in (Outcome(**json.loads(line)) for line in kept)}
    outcomes = []
    for name in names:
        built: Case | None = None
        for tool, use in tools.items():
            outcome = known.get((name, tool))
            if outcome is None:
                if built is None:
                    model, x = zoo.build(name)
                    samples: list[tuple[Any, ...]] = [(x[:1],), (x[1:],)]
                    if name in zoo.UNTRACEABLE:  # detectors are documented to take lists, and TorchScript insists
                        samples = [(list(x[:1]),), (list(x[1:]),)]
                    built = case(name, model, *samples)
                outcome = judge(built, tool, use)
                if keep:
                    with keep.open("a") as file:
                        file.write(json.dumps(asdict(outcome)) + "\n")
            o = outcome
            what = o.note if o.verdict == "error" else f"{o.norms - o.left:4} of {o.norms:4}, error {o.error:.0e}"
            what += f" ({o.note})" if o.verdict == "told" else ""
            print(f"{name:40} {tool:26} {o.verdict:6} {what}  {o.seconds:.1f} s", flush=True)
            outcomes.append(outcome)
    return outcomes


def summary(outcomes: list[Outcome], tools: list[str]) -> str:
    """One line a tool; norms count where the result is right."""
    rows: list[tuple[object, ...]] = []
    for tool in tools:
        own = [o for o in outcomes if o.tool == tool]
        if not own:
            rows.append((tool, "not installed", *["–"] * 6))
            continue
        by = {v: [o for o in own if o.verdict == v] for v in ("right", "wrong", "told", "error")}
        norms, folded = sum(o.norms for o in own), sum(o.norms - o.left for o in by["right"])
        none = sum(o.left >= o.norms for o in by["right"])
        rows.append((
            tool, f"{len(by['right'])} of {len(own)}", f"{folded} of {norms} ({folded / max(norms, 1):.1%})", none,
            len(by["wrong"]), len(by["told"]), len(by["error"]), f"{sum(o.seconds for o in own):.0f} s",
        ))  # fmt: skip
    head = ("tool", "models right", "norms folded", "none folded", "wrong in silence", "wrong, warned", "error")
    return table((*head, "CPU time"), rows)


def small_ones(tools: dict[str, Run]) -> str:
    """The patterns, a line each: right (folded), left (as it was), WRONG, or error (refused, or crashed)."""
    rows = []
    tools = {name: use for name, use in tools.items() if not name.startswith("timm")}  # knows its own models only
    for name in fold_patterns.PATTERNS:
        words = []
        for tool, use in tools.items():
            model, traced, seen = fold_patterns.build(name)
            half = any(p.dtype == torch.float16 for p in model.parameters())
            o = judge(case(name, model, traced, seen), tool, use, limit=5e-3 if half else 1e-4)
            word = {"wrong": "**WRONG**", "told": "**WRONG**, warned", "error": "error"}.get(o.verdict)
            words.append(word or ("right" if o.left < o.norms else "left") + ", in doubt" * o.note.startswith("parity"))
            if o.verdict != "right":
                print(f"{name:40} {tool:26} {o.verdict} {o.error:.1e} {o.note}", flush=True)
        rows.append((name, *words))
    return table(("pattern", *tools), rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--readme", action="store_true", help="write the tables into README.md")
    parser.add_argument("--models", nargs="*", default=zoo.NAMES)
    parser.add_argument("--tools", nargs="*", default=list(TOOLS))
    parser.add_argument("--keep", type=Path, help="results go to this file as they come, and are taken from it")
    options = parser.parse_args()
    torch.set_num_threads(1)
    tools = present(options.tools)
    how = f"{', '.join([machine(), *versions(list(tools))])}. `python tests/benchmarks/bench_fold_peers.py`"
    publish("fold-patterns", f"{small_ones(tools)}\n\n{how}", options.readme)
    shown = [
        t for t in options.tools if t != "jit.optimize_for_inference"
    ]  # folds what jit.freeze folds, for more time
    outcomes = whole_zoo(options.models, {t: tools[t] for t in shown if t in tools}, options.keep)
    publish("fold-peers", f"{summary(outcomes, shown)}\n\n{how}", options.readme)


if __name__ == "__main__":
    main()
