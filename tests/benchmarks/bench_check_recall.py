"""How much of what goes wrong ``check`` and ``watch`` find, and how often they are wrong about what is healthy.

Run: ``python tests/benchmarks/bench_check_recall.py [--nets mlp,cnn] [--faults momentum] [--doses weak,strong]
[--seeds 1] [--healthy 4] [--cache DIR] [--results FILE] [--misses] [--readme]``; about half an hour on one core.

Faults (``recall/in_*.py``; a new one is one function) are put into small nets of eight architectures
(``recall/nets.py``), three doses each. A fault is **harmful** where the metric on unseen data, in the mode and way in
which the net is used, falls by more than two points and by more than three standard deviations between healthy seeds.
It is **found** where ``check``, on the model and its training loader (and, for faults of a loop, ``watch``), reports
one of the codes of that fault as a warning or an error. What does no harm is no miss; how often it is reported all the
same stands beside. Architectures are in two halves: thresholds of rules may be tuned on A, and are reported on B.

Results are written line by line to a file and taken up again from there: after a change of rules, begin another file.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.recall import in_loops, in_training, in_use, in_values  # noqa: F401  (they put their faults on the list)
from benchmarks.recall.faults import DOSES, FAULTS, Case, natural
from benchmarks.recall.healthy import Healthy, Store
from benchmarks.recall.nets import HALVES, loader, usable
from benchmarks.tables import machine, publish, table

import bnfix
from bnfix.errors import BnfixError

LEAST, SIGMAS = 0.02, 3.0
"""A loss of the metric is harm beyond this, and beyond so many standard deviations of healthy seeds."""


@dataclass(frozen=True)
class Row:
    """One net: ``fault`` is empty for a healthy one. ``said`` are codes with the letter of their severity."""

    net: str
    fault: str
    dose: str
    seed: int
    score: float
    base: float | None
    said: list[str]
    error: str = ""
    seconds: float = 0.0
    notes: str = ""

    @property
    def key(self) -> tuple[str, str, str, int]:
        return self.net, self.fault, self.dose, self.seed

    @property
    def half(self) -> str:
        return HALVES[self.net]

    @property
    def alarms(self) -> list[str]:
        """Codes of warnings and errors."""
        return [s[:-1] for s in self.said if s[-1] in "EW"]

    @property
    def found(self) -> bool:
        return bool(set(FAULTS[self.fault].codes) & set(self.alarms))


def diagnosed(case: Case) -> tuple[list[str], str, str]:
    """What is said of a case, why it could not be checked, and the first lines of the findings."""
    try:
        data = {} if case.data is None else {"data": case.data}
        found = [bnfix.check(case.model, **data, **case.how)]
    except BnfixError as error:
        return [], f"{type(error).__name__}: {error}", ""
    found += [] if case.watched is None else [case.watched]
    findings = [f for d in found for f in d.findings]
    said = dict.fromkeys(f.code + f.severity[0].upper() for f in findings)
    return list(said), "", "; ".join(f"{f.code} {f.message}" for f in findings if f.severity != "info")[:400]


def healthy_row(net: Healthy) -> Row:
    """What is said of a net without a fault."""
    start = time.process_time()
    case = Case(net.model(), net.score, None, loader(net.arch), natural(net.arch))
    said, error, notes = diagnosed(case)
    return Row(net.arch.name, "", "", net.seed, net.score, None, said, error, time.process_time() - start, notes)


def fault_row(net: Healthy, name: str, dose: int) -> Row | None:
    """A net with a fault in it; None where that makes no sense."""
    start = time.process_time()
    case = FAULTS[name].case(net, dose)
    if case is None:
        return None
    said, error, notes = diagnosed(case)
    seconds = time.process_time() - start
    return Row(net.arch.name, name, DOSES[dose], net.seed, case.score, case.base, said, error, seconds, notes)


class Healthies:
    """What healthy nets do: mean and deviation of the metric by architecture."""

    def __init__(self, rows: Iterable[Row]) -> None:
        self.scores: dict[str, list[float]] = {}
        for row in rows:
            if not row.fault:
                self.scores.setdefault(row.net, []).append(row.score)

    def harm(self, row: Row) -> float:
        """How much the metric fell, in parts of one."""
        base = statistics.mean(self.scores[row.net]) if row.base is None else row.base
        return base - (row.score if row.score == row.score else 0.0)

    def limit(self, net: str) -> float:
        """From where on it is harm."""
        known = self.scores[net]
        return max(LEAST, SIGMAS * statistics.stdev(known) if len(known) > 1 else LEAST)

    def harmful(self, row: Row) -> bool:
        return self.harm(row) > self.limit(row.net)


def rate(found: int, of: int) -> str:
    """``19/20``, or a dash."""
    return f"{found}/{of}" if of else "–"


def share(rows: list[Row]) -> str:
    return rate(sum(r.found for r in rows), len(rows))


def report(rows: list[Row]) -> str:
    """The table by rule, half and dose, and what is said of healthy nets and of harmless faults."""
    known = Healthies(rows)
    faulty = [r for r in rows if r.fault]
    harmful = [r for r in faulty if known.harmful(r)]
    harmless = [r for r in faulty if not known.harmful(r)]
    lines = []
    codes = {f.codes[0] for f in FAULTS.values()} & {FAULTS[r.fault].codes[0] for r in faulty}
    cells = [(half, dose) for half in "AB" for dose in DOSES]

    def line(name: str, of: list[Row]) -> list[str]:
        halves = [[r for r in of if r.half == half] for half in "AB"]
        by_dose = {(h, d): share([r for r in halves["AB".index(h)] if r.dose == d]) for h, d in cells}
        return [
            name, *(by_dose["A", d] for d in DOSES), share(halves[0]), *(by_dose["B", d] for d in DOSES),
            share(halves[1]),
        ]  # fmt: skip

    for code in sorted(codes):
        lines.append(line(code, [r for r in harmful if FAULTS[r.fault].codes[0] == code]))
    lines.append(line("**all**", harmful))
    head = ["rule", *(f"A, {d}" for d in DOSES), "A", *(f"B, {d}" for d in DOSES), "B"]
    percent = ", ".join(f"{100 * part:.1f} % on half {h}" for h in "AB" if (part := _part(harmful, h)) >= 0)
    clean = [r for r in rows if not r.fault]
    errors, warnings = (sum(s.endswith(w) for r in clean for s in r.said) for w in "EW")
    nets = len({r.net for r in rows})
    return "\n".join((
        table(head, lines),
        "",
        f"Faults found of those that do harm: {percent}. {len({r.fault for r in faulty})} faults in {nets} small "
        f"architectures, three doses; harm: the metric falls by more than 2 points and 3 σ of healthy seeds "
        f"({len(harmful)} of {len(faulty)}). Of the {len(harmless)} without harm {sum(r.found for r in harmless)} are "
        f"reported too. {len(clean)} healthy nets: {errors} errors, {warnings} warnings. Thresholds were settled on "
        f"half A; half B has other architectures. {machine()}. `python tests/benchmarks/bench_check_recall.py`",
    ))  # fmt: skip


def _part(harmful: list[Row], half: str) -> float:
    mine = [r for r in harmful if r.half == half]
    return sum(r.found for r in mine) / len(mine) if mine else -1.0


def misses(rows: list[Row]) -> Iterator[str]:
    """Harmful faults that were not found, and alarms about healthy nets."""
    known = Healthies(rows)
    for row in rows:
        here = f"{row.half} {row.net:9} {row.fault or 'healthy':38} {row.dose:7}"
        if not row.fault and row.alarms:
            yield f"{here} said {' '.join(row.said)}: {row.notes}"
        if row.fault and known.harmful(row) and not row.found:
            lost = known.harm(row)
            yield f"{here} lost {100 * lost:.1f} points, said {' '.join(row.said) or 'nothing'} {row.error} {row.notes}"


def read(path: Path) -> list[Row]:
    """The results so far."""
    if not path.is_file():
        return []
    return [Row(**json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]


def run(store: Store, chosen: Any, path: Path) -> Iterator[Row]:
    """Every row that is not in the file yet."""
    done = {r.key for r in read(path)}
    skipped: Counter[str] = Counter()
    with path.open("a", encoding="utf-8") as file:

        def kept(row: Row) -> Row:
            file.write(json.dumps(row.__dict__) + "\n")
            file.flush()
            return row

        for net in chosen.nets:
            for seed in range(chosen.healthy):
                if (net, "", "", seed) not in done:
                    yield kept(healthy_row(store.get(net, seed)))
            for name in chosen.faults:
                for seed in range(chosen.seeds):
                    for dose in chosen.doses:
                        if (net, name, DOSES[dose], seed) not in done:
                            row = fault_row(store.get(net, seed), name, dose)
                            if row is None:
                                skipped[name] += 1
                            else:
                                yield kept(row)


def _asked(row: Row, options: Any) -> bool:
    return row.fault in options.faults and DOSES.index(row.dose) in options.doses


def _some(asked: str, known: Iterable[str]) -> list[str]:
    """Those whose name begins with, or holds, one of what was asked for."""
    parts = [p for p in asked.split(",") if p]
    return [k for k in known if not parts or k in parts or any(p in k for p in parts)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nets", default="", help=f"of {', '.join(HALVES)}; A or B for a half")
    parser.add_argument("--faults", default="", help="parts of their names")
    parser.add_argument("--doses", default="")
    parser.add_argument("--seeds", type=int, default=1, help="of each fault")
    parser.add_argument("--healthy", type=int, default=4, help="seeds of healthy nets")
    parser.add_argument("--cache", type=Path, help="a folder for trained nets")
    parser.add_argument("--results", type=Path, help="a JSON-lines file to go on with")
    parser.add_argument("--misses", action="store_true", help="list them")
    parser.add_argument("--readme", action="store_true", help="write the table into README.md")
    options = parser.parse_args()
    torch.set_num_threads(1)
    half = [n for n in usable() if HALVES[n] == options.nets]
    options.nets = half or _some(options.nets, usable())
    options.faults = _some(options.faults, FAULTS)
    options.doses = [DOSES.index(d) for d in _some(options.doses, DOSES)]
    with tempfile.TemporaryDirectory() as folder:
        path = options.results or Path(folder) / "results.jsonl"
        for row in run(Store(options.cache or Path(folder)), options, path):
            base = "" if row.base is None else f" of {row.base:.3f}"
            said = " ".join(row.said) or row.error or "-"
            print(f"{row.net:9} {row.fault or 'healthy':38} {row.dose:7} {row.score:.3f}{base:9} {said}", flush=True)
        rows = [r for r in read(path) if r.net in options.nets and (not r.fault or _asked(r, options))]
    for missed in misses(rows) if options.misses else ():
        print(missed)
    publish("check-recall", report(rows), options.readme)


if __name__ == "__main__":
    main()
