"""How the benchmarks print, and how their tables get into the README: by the script that measured them."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Sequence
from pathlib import Path

README = Path(__file__).resolve().parents[2] / "README.md"


def cpu_seconds(work: Callable[[], object], repeats: int) -> float:
    """The least process CPU time (user and system) of ``repeats`` runs, after one that doesn't count."""
    work()
    best = float("inf")
    for _ in range(repeats):
        start = time.process_time()
        work()
        best = min(best, time.process_time() - start)
    return best


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table.

    Raises:
        SystemExit: nothing was measured; a table in the README is not to be replaced by an empty one.
    """
    if not rows:
        raise SystemExit("nothing was measured: no table")
    lines = ["| " + " | ".join(head) + " |", "| " + " | ".join("---" for _ in head) + " |"]
    lines += ["| " + " | ".join(str(cell) for cell in row) + " |" for row in rows]
    return "\n".join(lines)


def machine() -> str:
    """What it was measured with, without naming the machine."""
    import torch

    return f"torch {torch.__version__}, Python {platform.python_version()}, {platform.machine()}, one thread"


def publish(name: str, text: str, write: bool) -> None:
    """Print ``text``; with ``write`` also put it between the README's ``<!-- name -->`` marks."""
    print(text)
    if not write:
        return
    opening, closing = f"<!-- {name} -->", f"<!-- /{name} -->"
    before, _, rest = README.read_text(encoding="utf-8").partition(opening)
    _, found, after = rest.partition(closing)
    if not found:
        raise SystemExit(f"README.md has no {opening} … {closing}")
    README.write_text(f"{before}{opening}\n{text}\n{closing}{after}", encoding="utf-8")
