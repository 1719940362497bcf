"""``bnfix export``: an ONNX file, folded and proven."""

from __future__ import annotations

from typing import Annotated

import typer

from bnfix.cli import options as o
from bnfix.cli.door import DONE, FAILED, INCONCLUSIVE, UsageError
from bnfix.cli.opening import check_installed, check_paths, check_target_of, open_model
from bnfix.cli.screen import report, working
from bnfix.render import About

ORDER = 20
OLDEST = 7  # before it, the converter that onnx brings does not know BatchNormalization without is_test
EPILOG = """**Examples**

`bnfix export weights.pt --arch timm:resnet50 -o model.onnx`

`bnfix export folded.pt --arch net.py:Net --input 1x3x64x64 -o model.onnx --opset 18`

**Exit codes**  0 exported, ONNX Runtime computes the same · 1 it does not · 2 wrong use or an error ·
3 inconclusive: the outputs can't be judged · 130 interrupted"""


def export(
    model: o.ModelArgument,
    output: Annotated[
        str | None, typer.Option("--output", "-o", metavar="FILE.onnx", help="Where the ONNX file goes.")
    ] = None,
    no_fold: Annotated[bool, typer.Option("--no-fold", help="Export the norms as they are.")] = False,
    opset: Annotated[int | None, typer.Option("--opset", metavar="N", help="The ONNX opset.")] = None,
    static_batch: Annotated[bool, typer.Option("--static-batch", help="Fix the batch size to the example's.")] = False,
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
    """Write the model as ONNX: fold first, export, and compare ONNX Runtime with the model at once.

    Every norm left in the file is named with its reason. Refused by name: norms and dropout in training mode.
    """
    asked = o.Asked(model, arch, tuple(arch_kw or ()), trust, tuple(input or ()), data, forward, seed)
    check_paths(asked)
    if output is None:
        raise UsageError("where should the ONNX file go?", hint=f"-o {o.quoted(o.sibling(o.named(model), '.onnx'))}")
    if not output.endswith(".onnx"):
        raise UsageError(f"-o {output}: an ONNX file ends in .onnx", hint=f"-o {o.quoted(o.sibling(output, '.onnx'))}")
    check_target_of(asked, output)
    check_installed(("onnx", "onnxscript", "onnxruntime"), "exporting to ONNX")
    _check_opset(opset)
    with working() as steps:
        opened = open_model(asked, steps)
        from bnfix import api

        result = api.export(
            opened.model,
            output,
            opened.example,
            fold=not no_fold,
            opset=opset,
            dynamic=not static_batch,
            progress=steps,
        )
    verdict = result.parity.verdict if result.parity is not None else "passed"
    if result.files:
        step = ("verify it again", asked.next("verify", model, result.path, trust=asked.trust))
    else:
        plain = asked.next("export", model, trust=asked.trust)
        step = ("without folding", f"{plain} --no-fold -o {o.quoted(output)}")
    about = About("bnfix export", model, result.files, opened.notes, (step,))
    report([result], output_format, [about])
    return {"failed": FAILED, "inconclusive": INCONCLUSIVE}.get(verdict, DONE)


def _check_opset(opset: int | None) -> None:
    """What no exporter writes, known before torch is imported; what this model's operators exclude is found later."""
    if opset is None:
        return
    from onnx.defs import onnx_opset_version

    newest = onnx_opset_version()
    if not OLDEST <= opset <= newest:
        raise UsageError(
            f"--opset {opset}: torch's exporter and onnx {'write no opset before' if opset < OLDEST else 'end at'} "
            f"{OLDEST if opset < OLDEST else newest}",
            hint="leave it out, and torch chooses; or the oldest that torch writes by itself:  --opset 18",
        )
