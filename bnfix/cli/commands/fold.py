"""``bnfix fold``: norms into the layers around them."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Annotated

import typer

from bnfix.cli import options as o
from bnfix.cli.door import DONE, FAILED
from bnfix.cli.opening import Opened, check_output, check_paths, open_model
from bnfix.cli.screen import report, working
from bnfix.render import About

if TYPE_CHECKING:
    from bnfix.types import Result

ORDER = 10
EPILOG = """**Examples**

`bnfix fold weights.pt --arch timm:resnet50 -o folded.pt`

`bnfix fold weights.pt --arch net.py:Net --input 1x3x64x64 --dry-run`

`bnfix fold model.pt --trust -o folded.pt --require-all`

**Exit codes**  0 folded, also where some norms were kept (or all: then nothing is written) · 1 --dry-run would
change something, --require-all was not met, or the proof failed (then nothing is written) · 2 wrong use or an error"""


def fold(
    model: o.ModelArgument,
    output: Annotated[
        str | None, typer.Option("--output", "-o", metavar="FILE", help="Where the folded model goes.")
    ] = None,
    in_place: Annotated[bool, typer.Option("--in-place", help="Write over MODEL itself.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the plan, write nothing.")] = False,
    require_all: Annotated[
        bool, typer.Option("--require-all", help="If a norm has to be kept: exit 1, write nothing.")
    ] = False,
    no_verify: Annotated[bool, typer.Option("--no-verify", help="Don't compare the outputs.")] = False,
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
    """Fold every norm that can be folded into the layers around it, and prove that nothing changed.

    Each norm is folded in float64 and rounded once; the outputs are compared with the model's own rounding
    noise. A norm that can't be folded stays, with its reason. The input file is not changed.
    """
    asked = o.Asked(model, arch, tuple(arch_kw or ()), trust, tuple(input or ()), data, forward, seed)
    check_paths(asked)
    target = check_output(asked, output, in_place=in_place, dry_run=dry_run, done="folded", dry="shows the plan only")
    with working() as steps:
        opened = open_model(asked, steps)
        from bnfix import api

        result = api.fold(opened.model, opened.example, verify=not no_verify, dry_run=dry_run, progress=steps)
        unmet = (result.parity is not None and result.parity.verdict == "failed") or (
            require_all and bool(result.refusals)
        )
        written = target if result.edits and not unmet else None
        if written is not None and result.model is not None:
            steps(f"writing {written}")
            api.save(result.model, written, recipe=result.recipe, source=opened.loaded.info, inplace=in_place)
    report([result], output_format, [_about(asked, opened, result, target, written, unmet)])
    if dry_run:
        return FAILED if result.edits or unmet else DONE
    return FAILED if unmet else DONE


def _about(
    asked: o.Asked, opened: Opened, result: Result, target: str | None, written: str | None, unmet: bool
) -> About:
    notes = [*opened.notes]
    steps: list[tuple[str, str]] = []
    if unmet:
        notes.append("nothing was written")
    elif target is not None and written is None:
        notes.append(_unwritten(opened, result, target, in_place=target == asked.model))
        if not any(r.defect for r in result.refusals):
            line = asked.next("export", asked.model, trust=asked.trust)
            steps.append(("next", f"{line} -o {o.quoted(o.sibling(o.named(asked.model), '.onnx'))}"))
    if written is not None:
        arch = opened.arch(written)
        trust = opened.pickled and arch is None
        again = dataclasses.replace(asked, model=written, arch=arch, trust=trust)
        steps.append(("load it", asked.load_line(written, arch=arch, trust=trust)))
        onnx = o.quoted(o.sibling(written, ".onnx"))
        steps.append(("next", f"{again.next('export', written, trust=trust)} -o {onnx}"))
    elif result.dry_run and result.edits:
        line = asked.next("fold", asked.model, trust=asked.trust)
        steps.append(("next", f"{line} -o {o.quoted(o.beside(o.named(asked.model), 'folded'))}"))
    return About("bnfix fold", asked.model, (written,) if written else (), tuple(notes), tuple(steps))


def _unwritten(opened: Opened, result: Result, target: str, *, in_place: bool) -> str:
    left = f"{target} is as it was" if in_place else f"{target} was not written"
    if opened.loaded.info is not None and opened.loaded.info.recipe:
        return f"already folded, nothing left to do: {left}"
    return f"nothing was folded: {left}"
