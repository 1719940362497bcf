"""What a fold buys: the time of one forward before and after it, in eager mode, compiled, and in ONNX Runtime.

Run: ``python tests/benchmarks/bench_fold_latency.py [--readme] [--compile NAME ...]``. Before and after take turns
in one process, on one thread; the least process CPU time of several rounds counts. ``torch.compile`` needs a C++
compiler and up to a minute a graph: by default for one of the models only.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import logging
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import zoo
from benchmarks.tables import machine, publish, table

import bnfix

MODELS = ("tv:resnet18", "mobilenetv2_100", "efficientnet_b0", "densenet121")
BATCHES = (1, 8)
COMPILED = ("tv:resnet18",)
ENOUGH = 0.4
"""Seconds of work in one round of one variant."""


def in_turn(works: Sequence[Callable[[], object]], rounds: int) -> list[float]:
    """The least process CPU seconds of one call of each work: rounds in turn, so that none gets the quiet hours."""
    repeats = []
    for work in works:
        work()
        start = time.process_time()
        work()
        repeats.append(max(1, round(ENOUGH / max(time.process_time() - start, 1e-5) / 4)))
    best = [float("inf")] * len(works)
    for _ in range(rounds):
        for i, work in enumerate(works):
            for _ in range(repeats[i]):
                start = time.process_time()
                work()
                best[i] = min(best[i], time.process_time() - start)
    return best


def eager(model: nn.Module, x: Tensor) -> Callable[[], object]:
    def call() -> object:
        with torch.inference_mode():
            return model(x)

    return call


def compiled(model: nn.Module, x: Tensor) -> Callable[[], object]:
    """Compiled for this one shape. Raises what the compiler raises."""
    torch._dynamo.reset()
    fast = torch.compile(model, dynamic=False)
    with torch.inference_mode():
        fast(x)

    def call() -> object:
        with torch.inference_mode():
            return fast(x)

    return call


def in_onnx_runtime(model: nn.Module, x: Tensor, folder: Path, fold: bool) -> Callable[[], object]:
    import onnxruntime

    path = folder / f"{fold}.onnx"
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        bnfix.export(model, path, x, fold=fold, verify=False)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    feed = {session.get_inputs()[0].name: x.numpy()}
    return lambda: session.run(None, feed)


def measure(name: str, pixels: int, compile_too: bool, rounds: int) -> list[tuple[str, ...]]:
    """The rows of one model: one a batch size."""
    model, x = zoo.build(name)
    result = bnfix.fold(model, x[:1, :, :pixels, :pixels])
    assert result.model is not None
    rows = []
    for batch in BATCHES:
        torch.manual_seed(batch)
        x = torch.randn(batch, 3, pixels, pixels)
        cells = [_cell(in_turn([eager(model, x), eager(result.model, x)], rounds))]
        cells.append("–")
        if compile_too:
            try:
                cells[-1] = _cell(in_turn([compiled(model, x), compiled(result.model, x)], rounds))
            except Exception as error:  # noqa: BLE001 — no compiler, or none that works: the table says so
                cells[-1] = f"fails ({type(error).__name__})"
        with tempfile.TemporaryDirectory() as folder:
            both = [in_onnx_runtime(model, x, Path(folder), fold) for fold in (False, True)]
            cells.append(_cell(in_turn(both, rounds)))
        rows.append((name, f"{len(result.edits)} of {result.norms}", str(batch), *cells))
        print(" | ".join(rows[-1]), flush=True)
    return rows


def _cell(seconds: list[float]) -> str:
    before, after = seconds
    return f"{before * 1e3:.1f} → {after * 1e3:.1f} ms ({after / before:.2f} ×)"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--readme", action="store_true", help="write the table into README.md")
    parser.add_argument("--models", nargs="*", default=MODELS)
    parser.add_argument("--compile", nargs="*", default=COMPILED, help="the models to compile as well")
    parser.add_argument("--pixels", type=int, default=96)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    rows = [
        row for name in options.models for row in measure(name, options.pixels, name in options.compile, options.rounds)
    ]
    import onnxruntime

    head = ("model", "norms folded", "batch", "eager", "torch.compile", "ONNX Runtime")
    how = f"{options.pixels} px; before → after the fold, process CPU time of one forward, least of many, in turn"
    note = (
        f"{how}. {machine()}, ONNX Runtime {onnxruntime.__version__}. `python tests/benchmarks/bench_fold_latency.py`"
    )
    publish("fold-latency", f"{table(head, rows)}\n\n{note}", options.readme)


if __name__ == "__main__":
    main()
