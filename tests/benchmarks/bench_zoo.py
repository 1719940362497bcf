"""How much of the zoo folds, and whether it is right: ``bench_zoo.py [--readme] [NAME ...]``."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import zoo
from benchmarks.tables import machine, publish, table
from nets import relative_error

import bnfix
from bnfix.errors import BnfixError


def _first(out: Any) -> Tensor:
    while not isinstance(out, Tensor):
        out = next(iter(out.values())) if isinstance(out, dict) else out[0]
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--readme", action="store_true", help="write the summary into README.md")
    parser.add_argument("names", nargs="*", default=zoo.NAMES)
    options = parser.parse_args()
    torch.set_num_threads(1)
    folded = norms = right = wrong = unjudged = refused = 0
    for name in options.names:
        model, x = zoo.build(name)
        start = time.process_time()
        try:
            result = bnfix.fold(model, x[:1])
        except BnfixError as error:
            refused += 1
            print(f"{name:45} {error.message[:90]}", flush=True)
            continue
        seconds = time.process_time() - start
        assert result.model is not None
        assert result.parity is not None
        with torch.no_grad():
            error_ = relative_error(*(_first(zoo.judged(name, m)(x)) for m in (result.model, model)))
        own = max(o.noise or 0.0 for o in result.parity.outputs)
        if result.parity.verdict not in ("passed", "warned"):
            unjudged += 1
        elif error_ < max(1e-3, 2 * own):
            right += 1
        else:
            wrong += 1
        folded, norms = folded + result.done, norms + result.norms
        worst = max((o.noise_ratio or 0.0 for o in result.parity.outputs), default=0.0)
        print(
            f"{name:45} {result.done:4} of {result.norms:4}  error {error_:.1e}  {worst:4.1f} × noise  "
            f"{result.parity.verdict}  {seconds:.1f} s",
            flush=True,
        )
    head = (
        "architectures",
        "folded right",
        "silently wrong",
        "inconclusive",
        "refused in one clear error",
        "norms folded",
    )
    share = f"{folded} of {norms} ({folded / max(norms, 1):.1%})"
    summary = table(head, [(len(options.names), right, wrong, unjudged, refused, share)])
    publish("zoo", f"{summary}\n\n{machine()}. `python tests/benchmarks/bench_zoo.py`", options.readme)


if __name__ == "__main__":
    main()
