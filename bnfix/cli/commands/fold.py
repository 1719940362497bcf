"""``bnfix fold``: norms into the layers around them."""

from __future__ import annotations

import dataclasses
from enum import Enum
from typing import TYPE_CHECKING, Annotated

import typer

from bnfix.cli import options as o
from bnfix.cli import typed
from bnfix.cli.door import DONE, FAILED
from bnfix.cli.opening import Opened, check_options, check_paths, open_model
from bnfix.cli.screen import Steps
from bnfix.cli.several import Done, each, make_folder, outputs
from bnfix.formats.recipes import has_folds
from bnfix.formats.specs import HUBS, parse_spec
from bnfix.render import About

if TYPE_CHECKING:
    from bnfix.types import Result

ORDER = 10
EPILOG = """**Examples**

`bnfix fold weights.pt --arch timm:resnet50 -o folded.pt`

`bnfix fold weights.pt --arch net.py:Net --input 1x3x64x64 --dry-run`

`bnfix fold model.pt --trust -o folded.pt --require-all`

`bnfix fold net.pt --arch net.py:Net --input inputs.npz -o folded.pt`

`bnfix fold epoch-*.pt --arch timm:resnet50 -o folded/`

**Exit codes**  0 folded, also where some norms were kept (or all: then nothing is written) · 1 --dry-run would
change something, --require-all was not met, or the proof failed (then nothing is written) · 2 wrong use or an error ·
130 interrupted · of several models the worst; one that fails does not stop the others"""


class Leave(str, Enum):
    norm = "norm"
    affine = "affine"


def fold(
    models: o.ModelsArgument,
    output: Annotated[
        str | None,
        typer.Option(
            "--output",
            "-o",
            metavar="FILE|FOLDER/",
            help="Where the folded model goes. Of several models, the folder where each goes under its own name.",
        ),
    ] = None,
    in_place: o.InPlaceOption = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the plan, write nothing.")] = False,
    require_all: Annotated[
        bool, typer.Option("--require-all", help="If a norm has to be kept: exit 1, write nothing.")
    ] = False,
    leave: Annotated[
        Leave,
        typer.Option(
            "--leave",
            help="What becomes of a norm that can't be folded. norm: it stays. affine: a multiply and an add per "
            "channel in its place, exact, and no norm is left of it.",
        ),
    ] = Leave.norm,
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
    options = (arch, tuple(arch_kw or ()), trust, tuple(input or ()), data, forward, seed)
    asked = [o.Asked(model, *options) for model in models]
    (check_paths if len(asked) == 1 else check_options)(asked[0])
    targets = outputs(asked, output, in_place=in_place, dry_run=dry_run, done="folded", dry="shows the plan only")

    def one(number: int, steps: Steps) -> Done:
        this, target = asked[number], targets[number]
        opened = open_model(this, steps)
        from bnfix import api

        result = api.fold(
            opened.model, opened.example, leave=leave.value, verify=not no_verify, dry_run=dry_run, progress=steps
        )
        unmet = (result.parity is not None and result.parity.verdict == "failed") or (
            require_all and bool(result.refusals)
        )
        written = target if result.edits and not unmet else None
        if written is not None and result.model is not None:
            steps(f"writing {written}")
            make_folder(written)
            source, example = opened.loaded.info, opened.example
            api.save(result.model, written, recipe=result.recipe, source=source, inplace=in_place, example=example)
        about = _about(this, opened, result, target, written, unmet)
        failed = unmet or bool(dry_run and result.edits)
        # of many models only the report is kept, not each model
        return Done(dataclasses.replace(result, model=None), about, FAILED if failed else DONE)

    then = (("next", typed.for_real("folded/")),) if dry_run else ()
    return each(asked, one, output_format, command="bnfix fold", traceback=traceback, then=then)


def _about(
    asked: o.Asked, opened: Opened, result: Result, target: str | None, written: str | None, unmet: bool
) -> About:
    notes = [*opened.notes]
    spec = parse_spec(asked.model)
    if spec is not None and spec.where in HUBS:
        notes.append("fresh norms have nothing to fold in")
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
        trust = opened.takes_trust(written)
        again = dataclasses.replace(asked, model=written, arch=arch, trust=trust)
        steps.append(("load it", asked.load_line(written, arch=arch, trust=trust)))
        onnx = o.quoted(o.sibling(written, ".onnx"))
        steps.append(("next", f"{again.next('export', written, trust=trust)} -o {onnx}"))
    elif result.dry_run and result.edits:
        steps.append(("next", typed.for_real(o.beside(o.named(asked.model), "folded"))))
    return About("bnfix fold", asked.model, (written,) if written else (), tuple(notes), tuple(steps), failed=unmet)


def _unwritten(opened: Opened, result: Result, target: str, *, in_place: bool) -> str:
    left = f"{target} is as it was" if in_place else f"{target} was not written"
    if opened.loaded.info is not None and has_folds(opened.loaded.info.recipe):
        return f"already folded, nothing left to do: {left}"
    return f"nothing was folded: {left}"
