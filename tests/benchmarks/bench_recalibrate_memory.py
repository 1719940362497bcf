"""Peak memory of ``recalibrate`` against ``memory_budget``.

Run: ``python tests/benchmarks/bench_recalibrate_memory.py [--readme] [--images N] [--pixels N]``. Each figure comes
from a process of its own; what it held before (torch, model, data, one call on two samples) is taken off. ``peak`` is
the resident set's (``ru_maxrss``); pages of spilled files count in it for as long as they are mapped, though the system
may drop them at any time, so ``anonymous`` is beside it: the largest that a thread saw that looked every 2 ms (Linux).
glibc keeps freed memory for each thread; ``gives back`` is the peak where it is told not to, by MALLOC_MMAP_THRESHOLD_.
Aim: peak ≤ 1.2 × budget + one chunk's forward.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

TESTS = Path(__file__).resolve().parents[1]
MIB = 2**20
UNIT = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss


def now(which: str) -> int:
    """Bytes of this process: ``VmRSS``, or ``RssAnon``, which no file stands behind; 0 where the system doesn't say."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(which)), 0)


class Watched:
    """Peak memory over what was there on entry: resident and anonymous, in bytes."""

    def __enter__(self) -> Watched:
        self.start, self.start_anonymous = now("VmRSS") or _peak(), now("RssAnon")
        self.highest, self.done = self.start_anonymous, threading.Event()
        self.thread = threading.Thread(target=self._look, daemon=True)
        self.thread.start()
        return self

    def _look(self) -> None:
        while not self.done.wait(0.002):
            self.highest = max(self.highest, now("RssAnon"))

    def __exit__(self, *_: object) -> None:
        self.done.set()
        self.thread.join()
        self.resident = _peak() - self.start
        self.anonymous = self.highest - self.start_anonymous


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * UNIT


def child(options: argparse.Namespace) -> None:
    """One measurement: a plain pass over one batch, or a recalibration; prints it as JSON."""
    import timm
    import torch

    import bnfix

    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = timm.create_model(options.model, pretrained=False).eval()
    data = torch.randn(options.images, 3, options.pixels, options.pixels)
    small = data[:2, :, :32, :32].clone()
    with torch.no_grad():
        model(small)  # libraries set themselves up on the first call
    bnfix.recalibrate(model, [small], when="always", dry_run=True)
    found: dict[str, Any] = {}
    with Watched() as watched:
        if options.child == "forward":
            with torch.no_grad():
                model(data[: options.chunk])
        else:
            asked: dict[str, Any] = {"memory_budget": options.budget, "method": options.method}
            if options.spill:
                asked["spill_dir"] = options.spill
            report = bnfix.recalibrate(model, list(data.split(options.batch)), **asked)
            found = {"n": report.n, "method": report.method, "engine": report.engine, "why": report.why}
    print(json.dumps({**found, "peak": watched.resident, "anonymous": watched.anonymous}))


def measure(options: argparse.Namespace, what: str, *arguments: str, **environment: str) -> dict[str, Any]:
    """Run ``child`` in a fresh process. This one stays small: a child begins with its parent's ``ru_maxrss``."""
    command = [sys.executable, __file__, "--child", what, "--model", options.model, "--batch", str(options.batch)]
    command += ["--images", str(options.images), "--pixels", str(options.pixels), "--chunk", str(options.chunk)]
    done = subprocess.run(
        [*command, *arguments], capture_output=True, text=True, check=False, env={**os.environ, **environment}
    )
    if done.returncode:
        raise SystemExit(done.stderr)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--readme", action="store_true", help="write the table into README.md")
    parser.add_argument("--model", default="resnet18")
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument("--pixels", type=int, default=96)
    parser.add_argument("--batch", type=int, default=64, help="the loader's")
    parser.add_argument("--chunk", type=int, default=64, help="images in the forward that the aim allows on top")
    parser.add_argument("--budgets", nargs="+", type=int, default=[64, 256, 512], metavar="MiB")
    parser.add_argument("--child", choices=("forward", "recalibrate"), help=argparse.SUPPRESS)
    parser.add_argument("--budget", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--method", default="auto", help=argparse.SUPPRESS)
    parser.add_argument("--spill", default="", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(options)
        return
    forward = measure(options, "forward")["peak"]
    rows = []
    for budget in options.budgets:
        for method, spilled in (("auto", False), ("staged", False), ("auto", True)):
            asked = ["--budget", str(budget * MIB), "--method", method]
            with tempfile.TemporaryDirectory() as folder:
                asked += ["--spill", folder] if spilled else []
                found = measure(options, "recalibrate", *asked)
                told = measure(options, "recalibrate", *asked, MALLOC_MMAP_THRESHOLD_="131072")
            allowed = 1.2 * budget * MIB + forward
            rows.append(
                (
                    f"{budget} MiB",
                    method + (", `spill_dir`" if spilled else ""),
                    f"{found['method']}, {found['engine']}",
                    f"{found['n']} of {options.images}",
                    f"{found['peak'] / MIB:.0f} MiB",
                    f"{found['anonymous'] / MIB:.0f} MiB",
                    f"{told['peak'] / MIB:.0f} MiB",
                    f"{allowed / MIB:.0f} MiB",
                    "yes" if found["peak"] <= allowed else "only if told" if told["peak"] <= allowed else "no",
                )
            )
            print(*rows[-1], found["why"], sep="\t", file=sys.stderr, flush=True)

    sys.path.insert(0, str(TESTS))
    from benchmarks.tables import machine, publish, table

    head = ("budget", "asked for", "method and engine", "images", "peak", "anonymous", "gives back", "aim", "met")
    note = (
        f"{options.model}, {options.images} images of {options.pixels} px in batches of {options.batch}; one forward "
        f"of {options.chunk}: {forward / MIB:.0f} MiB. Aim: peak ≤ 1.2 × budget + one forward. {machine()}. "
        "`python tests/benchmarks/bench_recalibrate_memory.py`"
    )
    publish("recalibrate-memory", f"{table(head, rows)}\n\n{note}", options.readme)


if __name__ == "__main__":
    main()
