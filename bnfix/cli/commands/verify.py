"""``bnfix verify``: do two models compute the same?"""

from __future__ import annotations

import dataclasses
import json
import os
from typing import Annotated, Any

import typer

from bnfix.cli import options as o
from bnfix.cli.door import DONE, FAILED, INCONCLUSIVE, UsageError, users_code, users_words
from bnfix.cli.opening import check_installed, check_paths, check_there, open_model
from bnfix.cli.screen import Steps, report, working
from bnfix.render import About

ORDER = 30
EPILOG = """**Examples**

`bnfix verify weights.pt model.onnx --arch timm:resnet50`

`bnfix verify weights.pt folded.pt --arch net.py:Net --data net.py:batches`

**Exit codes**  0 the same up to rounding · 1 not the same · 2 wrong use or an error ·
3 inconclusive: the model's own noise is too large, or the outputs can't be judged ·
130 interrupted"""


def verify(
    model: o.ModelArgument,
    other: Annotated[
        str, typer.Argument(metavar="OTHER", help="An .onnx file, or weights, or any MODEL.", show_default=False)
    ],
    other_arch: Annotated[
        str | None, typer.Option("--other-arch", metavar="SPEC", help="The architecture of OTHER, if not --arch.")
    ] = None,
    arch: o.ArchOption = None,
    arch_kw: o.ArchKwOption = None,
    trust: o.TrustOption = False,
    input: o.InputOption = None,
    data: o.DataOption = None,
    forward: o.ForwardOption = None,
    seed: o.SeedOption = 0,
    output_format: o.FormatOption = o.OutputFormat.full,
    traceback: o.TracebackOption = False,
) -> int:
    """Compare two models on the same inputs, with the first model's own rounding noise as the yardstick.

    The truth is the first model in float64. OTHER passes where its error is at most 8 times the error that
    float32 itself makes; NaN never passes. On failure the first tensor that differs is named where it can be.
    """
    asked = o.Asked(model, arch, tuple(arch_kw or ()), trust, tuple(input or ()), data, forward, seed)
    check_paths(asked)
    check_there(other)
    _check_order(asked, other)
    if _is_onnx(other):
        check_installed(("onnx", "onnxruntime"), "comparing with an ONNX file")
    with working() as steps:
        opened = open_model(asked, steps, file=other if _is_onnx(other) else None)
        from bnfix import api

        candidate = _candidate(asked, other, other_arch, steps)
        with users_words(other):
            parity = api.verify(opened.model, candidate, opened.calls, progress=steps)
    next_steps = _next(asked, other, parity.verdict)
    report([parity], output_format, [About("bnfix verify", f"{model} · {other}", (), opened.notes, next_steps)])
    return {"failed": FAILED, "inconclusive": INCONCLUSIVE}.get(parity.verdict, DONE)


def _candidate(asked: o.Asked, other: str, other_arch: str | None, steps: Steps) -> Any:
    from bnfix import api

    if _is_onnx(other):
        return other
    steps(f"loading {other}")
    arch = other_arch or asked.arch
    kwargs = asked.arch_kwargs if arch == asked.arch else {}
    with users_code(arch or other), users_words(other):
        return api.open_model(other, arch=arch, arch_kwargs=kwargs, trust=asked.trust).value


def _is_onnx(path: str) -> bool:
    from bnfix import api

    return os.path.isfile(path) and api.info(path).kind == "onnx"


def _check_order(asked: o.Asked, other: str) -> None:
    if _is_onnx(asked.model) and not _is_onnx(other):
        swapped = asked.next("verify", other, asked.model, trust=asked.trust)
        raise UsageError(
            f"{asked.model} is an ONNX file: the PyTorch model comes first, it is what is right by definition",
            hint=f"swap them:   {swapped}",
        )


def _next(asked: o.Asked, other: str, verdict: str) -> tuple[tuple[str, str], ...]:
    onnx = other.endswith(".onnx")
    if verdict == "failed" and onnx:
        return (("make it anew", f"{asked.next('export', asked.model, trust=asked.trust)} -o {o.quoted(other)}"),)
    if verdict == "inconclusive" and not asked.data:
        real = dataclasses.replace(asked, input=(), data="data.py:batches")
        return (("on real data", real.next("verify", asked.model, other, trust=asked.trust)),)
    if verdict in ("passed", "warned") and onnx:
        line = f"import onnxruntime; session = onnxruntime.InferenceSession({json.dumps(other, ensure_ascii=False)})"
        return (("use it", line),)
    return ()
