"""``bnfix unshare``: one norm for each call site."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Annotated

import typer

from bnfix.cli import options as o
from bnfix.cli import typed
from bnfix.cli.door import DONE, FAILED, users_words
from bnfix.cli.opening import Opened, check_options, check_paths, open_model
from bnfix.cli.screen import Steps
from bnfix.cli.several import Done, each, make_folder, outputs
from bnfix.render import About

if TYPE_CHECKING:
    from bnfix.types import Result

ORDER = 13
EPILOG = """**Examples**

`bnfix unshare weights.pt --arch net.py:Siamese --input 4x64,4x64,4x64 -o unshared.pt`

`bnfix recalibrate unshared.pt --arch net.py:Siamese --data train.py:loader -o fixed.pt`

`bnfix unshare weights.pt --arch net.py:Siamese --data train.py:loader --sites net.head --dry-run`

**Exit codes**  0 un-shared, also where some norms were kept (or none is shared: then nothing is written) ·
1 --dry-run would change something · 2 wrong use or an error · 130 interrupted · of several models the worst; one
that fails does not stop the others"""


def unshare(
    models: o.ModelsArgument,
    output: Annotated[
        str | None,
        typer.Option(
            "--output",
            "-o",
            metavar="FILE|FOLDER/",
            help="Where the model goes. Of several models, the folder where each goes under its own name.",
        ),
    ] = None,
    in_place: o.InPlaceOption = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the plan, write nothing.")] = False,
    sites: Annotated[
        list[str] | None,
        typer.Option("--sites", metavar="PATH", help="Only this norm, or those in this module; repeat it."),
    ] = None,
    share_affine: Annotated[
        bool,
        typer.Option("--share-affine", help="One weight and bias for all calls; only the statistics are separate."),
    ] = False,
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
    """Give each call of a shared norm a norm of its own, with the same outputs to the bit.

    For norms with several names, and for those that the model's forward calls several times: a Siamese network, a head
    over pyramid levels. Each new norm has the statistics of the shared one; bnfix recalibrate then gives each its own.
    The input file is not changed.
    """
    options = (arch, tuple(arch_kw or ()), trust, tuple(input or ()), data, forward, seed)
    asked = [o.Asked(model, *options) for model in models]
    (check_paths if len(asked) == 1 else check_options)(asked[0])
    targets = outputs(asked, output, in_place=in_place, dry_run=dry_run, done="unshared", dry="shows the plan only")

    def one(number: int, steps: Steps) -> Done:
        this, target = asked[number], targets[number]
        opened = open_model(this, steps)
        from bnfix import api

        with users_words("--sites"):
            result = api.unshare(
                opened.model,
                opened.example,
                sites=sites or None,
                share_affine=share_affine,
                dry_run=dry_run,
                progress=steps,
            )
        written = target if result.edits else None
        if written is not None and result.model is not None:
            steps(f"writing {written}")
            make_folder(written)
            source, example = opened.loaded.info, opened.example
            api.save(result.model, written, recipe=result.recipe, source=source, inplace=in_place, example=example)
        about = _about(this, opened, result, target, written)
        # of many models only the report is kept, not each model
        return Done(dataclasses.replace(result, model=None), about, FAILED if dry_run and result.edits else DONE)

    then = (("next", typed.for_real("unshared/")),) if dry_run else ()
    return each(asked, one, output_format, command="bnfix unshare", traceback=traceback, then=then)


def _about(asked: o.Asked, opened: Opened, result: Result, target: str | None, written: str | None) -> About:
    notes = [*opened.notes]
    steps: list[tuple[str, str]] = []
    if target is not None and written is None:
        left = "is as it was" if target == asked.model else "was not written"
        notes.append(f"nothing was un-shared: {target} {left}")
    if written is not None:
        arch = opened.arch(written)
        trust = opened.takes_trust(written)
        steps.append(("load it", asked.load_line(written, arch=arch, trust=trust)))
        fixed = o.quoted(o.beside(written, "recalibrated"))
        again = dataclasses.replace(
            asked, model=written, arch=arch, trust=trust, input=(), data=asked.data or "train.py:loader"
        )
        steps.append(("next", f"{again.next('recalibrate', written, trust=trust)} -o {fixed}"))
    elif result.dry_run and result.edits:
        steps.append(("next", typed.for_real(o.beside(o.named(asked.model), "unshared"))))
    return About("bnfix unshare", asked.model, (written,) if written else (), tuple(notes), tuple(steps))
