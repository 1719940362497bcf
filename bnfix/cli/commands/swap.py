"""``bnfix swap``: norms of another kind in the place of batch norms."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bnfix.cli import calibration_options as c
from bnfix.cli import options as o
from bnfix.cli import typed
from bnfix.cli.door import DONE, FAILED, UsageError, users_code, users_words
from bnfix.cli.opening import DATA_FORMS, Opened, check_data, check_options, check_paths, load_model
from bnfix.cli.screen import Steps
from bnfix.cli.several import Done, each, make_folder, outputs
from bnfix.errors import BnfixError
from bnfix.render import About

if TYPE_CHECKING:
    from bnfix.types import Result

ORDER = 18
DataOption = Annotated[
    str | None,
    typer.Option(
        "--data",
        metavar="SPEC",
        help="What the new norms are fitted to (group, layer and instance need it): file.py:callable, "
        "pkg.mod:callable, a folder of images, or a .npy/.npz/.safetensors file.",
        rich_help_panel=o.RUN_ON,
    ),
]
EPILOG = """**Examples**

`bnfix swap weights.pt --arch timm:resnet50 --to group --data train_images/ -o swapped.pt`

`bnfix swap weights.pt --arch net.py:Net --to group --only fragile --data loader.py:make -o swapped.pt`

`bnfix swap weights.pt --arch net.py:Net --to group --groups 8 --only "layer[34]" --data x.npy --dry-run`

`bnfix swap weights.pt --arch net.py:Net --to frozen -o frozen.pt`

**The data**  is what the model was trained on, with the transform of evaluation. The affine of each new norm is fitted
to the outputs of the old one, layer by layer in the order of their calls: without, a trained network is near chance.
R² says how much of a layer's output could be kept. The new model is another one: fine-tune it.

**The file**  holds weights and a recipe: `bnfix.load` builds the architecture, puts the new norms into it, and loads.

**Exit codes**  0 swapped, also where some norms were kept (or all: then nothing is written) · 1 --dry-run would change
something · 2 wrong use or an error · 130 interrupted; with these two nothing was written, unless the last line says
so · of several models the worst"""

FORMS = f"""{DATA_FORMS}
--init copy             without data: the old affine, and a model near chance"""
EXACT = ("frozen", "sync", "batch")


class To(str, Enum):
    group = "group"
    layer = "layer"
    instance = "instance"
    frozen = "frozen"
    sync = "sync"
    batch = "batch"


class Init(str, Enum):
    moment = "moment"
    ls = "ls"
    copy = "copy"
    fresh = "fresh"


def swap(
    models: o.ModelsArgument,
    to: Annotated[
        To,
        typer.Option(
            "--to",
            help="group, layer, instance: statistics of each sample by itself. frozen: the same function, never to "
            "change. sync, batch: the same norm over all processes, and back.",
        ),
    ] = To.group,
    only: Annotated[
        str | None,
        typer.Option(
            "--only",
            metavar="REGEX|fragile",
            help="Norms whose path it is found in; fragile: those that see too few values in a batch of --data.",
        ),
    ] = None,
    groups: Annotated[
        str, typer.Option("--groups", metavar="N|auto", help="Of --to group; auto: what explains most, for each norm.")
    ] = "auto",
    init: Annotated[
        Init | None,
        typer.Option(
            "--init",
            help="The new affine. moment: the mean and variance that each channel had. ls: least squares. copy: the "
            "old one. fresh: 1 and 0.",
            show_default="moment",
        ),
    ] = None,
    output: Annotated[
        str | None,
        typer.Option(
            "--output",
            "-o",
            metavar="FILE|FOLDER/",
            help="Where the swapped model goes. Of several models, the folder where each goes under its own name.",
        ),
    ] = None,
    in_place: o.InPlaceOption = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Do it all, write nothing.")] = False,
    arch: o.ArchOption = None,
    arch_kw: o.ArchKwOption = None,
    trust: o.TrustOption = False,
    data: DataOption = None,
    batch_size: c.BatchSizeOption = 64,
    max_samples: c.MaxSamplesOption = None,
    input: o.InputOption = None,
    forward: o.ForwardOption = None,
    device: c.DeviceOption = "cpu",
    seed: c.OrderSeedOption = 0,
    output_format: o.FormatOption = o.OutputFormat.full,
    traceback: o.TracebackOption = False,
) -> int:
    """Swap batch norms for norms of another kind, and keep what the model knows.

    Norms that can't be swapped stay, with the reason. The new model runs beside the old one before anything is written.
    The input file is not changed.
    """
    options = (arch, tuple(arch_kw or ()), trust, tuple(input or ()), data, forward, seed)
    asked = [o.Asked(model, *options) for model in models]
    single = len(asked) == 1
    _check(asked[0], to, only, init, single=single)
    number = _groups(groups)
    targets = outputs(asked, output, in_place=in_place, dry_run=dry_run, done="swapped", dry="writes nothing")

    def one(index: int, steps: Steps) -> Done:
        this, target = asked[index], targets[index]
        opened, batches = _opened(this, batch_size, device, steps, target)
        from bnfix import api

        with users_code(str(data or "--forward")), _in_options():
            result = api.swap(
                opened.model,
                to.value,
                only=only,
                groups=number,
                data=batches,
                example=opened.example,
                init=init.value if init is not None else None,
                dry_run=dry_run,
                forward=api.read_forward(forward),
                max_samples=max_samples or 512,
                progress=steps,
            )
        written = target if result.edits else None
        if written is not None and result.model is not None:
            steps(f"writing {written}")
            make_folder(written)
            result.model.to("cpu")
            source, example = opened.loaded.info, opened.example
            api.save(result.model, written, recipe=result.recipe, source=source, inplace=in_place, example=example)
        about = _about(this, opened, result, target, written)
        return Done(dataclasses.replace(result, model=None), about, FAILED if dry_run and result.edits else DONE)

    then = (("next", typed.for_real("swapped/")),) if dry_run else ()
    return each(asked, one, output_format, command="bnfix swap", traceback=traceback, then=then)


def _check(asked: o.Asked, to: To, only: str | None, init: Init | None, *, single: bool) -> None:
    """What can be known before torch is imported."""
    (check_paths if single else check_options)(dataclasses.replace(asked, input=()))
    try:
        re.compile(only or "")
    except re.error as error:
        raise UsageError(f"--only {only} is no regular expression: {error}") from error
    check_data(asked.data, "the norms would be fitted to noise", forms=FORMS)
    if asked.data is None and only == "fragile":
        raise UsageError("--only fragile asks how many values a norm sees in a batch: of which data?", hint=FORMS)
    if asked.data is None and to.value not in EXACT and init not in (Init.copy, Init.fresh):
        raise UsageError(f"fitted to which data? A new {to.value} norm on old weights is another function", hint=FORMS)


def _groups(text: str) -> Any:
    if text == "auto":
        return "auto"
    if not text.isdecimal() or int(text) < 1:
        raise UsageError(f"--groups is auto or a number, not {text}")
    return int(text)


def _opened(asked: o.Asked, batch_size: int, device: str, steps: Steps, target: str | None) -> tuple[Opened, Any]:
    """The model in the modes it was saved in, on its device, and the batches.

    A program is exported on calls, and TorchScript converted on one: then those of the first batch are among them.
    """
    loaded = load_model(asked, steps, modes_as_saved=True)
    from bnfix import api, formats
    from bnfix.formats.saving import PROGRAM_SUFFIX
    from bnfix.running import as_call, batch_call, variations
    from bnfix.running.call import fit_call

    opened = Opened(loaded, [], loaded.notes)
    try:
        opened.model.to(device)
    except (RuntimeError, AssertionError) as error:  # a torch without CUDA asserts
        raise UsageError(f"--device {device}: {str(error).splitlines()[0]}") from error
    with users_words("--forward"):
        way = api.read_forward(asked.forward)
    with users_words("--input"):
        given = [as_call(formats.load_input(text, seed=asked.seed + i), way) for i, text in enumerate(asked.input)]
    calls = [fit_call(call, opened.model) for call in given] or ([loaded.call] if loaded.call is not None else [])
    if not calls and asked.data is None and loaded.input_hint is not None:
        shape, source = loaded.input_hint
        calls = [fit_call(as_call(formats.load_input("x".join(map(str, (2, *shape)))), way), opened.model)]
        opened = dataclasses.replace(opened, notes=(*opened.notes, f"input {calls[0].signature}, by {source}"))
    batches = None
    if asked.data is not None:
        steps(f"opening {asked.data}")
        with users_code(asked.data), users_words(f"--data {asked.data}"):
            batches, described = api.batches(loaded, asked.data, batch_size=batch_size, seed=asked.seed)
        opened = dataclasses.replace(opened, notes=(*opened.notes, *described))
    scripted = loaded.info is not None and loaded.info.kind == "torchscript"
    if not calls and batches is not None and (scripted or (target or "").endswith(PROGRAM_SUFFIX)):
        with users_code(str(asked.data)):
            first = next(iter(batches), None)
            calls = [] if first is None else [batch_call(first, opened.model, way)]
        if calls and not scripted and way is None:
            calls += variations(opened.model, calls[0])[0]
    if scripted and calls:
        converted = api.converted(loaded, calls)
        opened = dataclasses.replace(opened, loaded=converted, notes=(*opened.notes, *converted.notes[-1:]))
    return dataclasses.replace(opened, calls=calls), batches


@contextmanager
def _in_options() -> Iterator[None]:
    """What errors say of arguments is said of options."""
    try:
        yield
    except ValueError as error:
        raise UsageError(_said(str(error))) from error
    except BnfixError as error:
        error.message, error.hint = _said(error.message), _said(error.hint) if error.hint else None
        raise


def _said(text: str) -> str:
    return re.sub(r"\b(only|groups|init|data|forward|example|to)=", lambda m: f"--{m[1]} ", text)


def _about(asked: o.Asked, opened: Opened, result: Result, target: str | None, written: str | None) -> About:
    notes, steps = [*opened.notes], []
    if target is not None and written is None:
        left = f"{target} is as it was" if target == asked.model else f"{target} was not written"
        notes.append(f"nothing was swapped: {left}")
    if written is not None:
        arch = opened.arch(written)
        trust = opened.takes_trust(written)
        steps.append(("load it", asked.load_line(written, arch=arch, trust=trust)))
    elif result.dry_run and result.edits:
        steps.append(("next", typed.for_real(o.beside(o.named(asked.model), "swapped"))))
    return About("bnfix swap", asked.model, (written,) if written else (), tuple(notes), tuple(steps))
