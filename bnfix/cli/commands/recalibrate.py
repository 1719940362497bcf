"""``bnfix recalibrate``: the running statistics of every norm, estimated anew on data."""

from __future__ import annotations

import dataclasses
import math
import os
import re
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bnfix.cli import calibration_options as c
from bnfix.cli import options as o
from bnfix.cli import typed
from bnfix.cli.allocator import keep_freed_memory
from bnfix.cli.door import DONE, FAILED, UsageError, users_code, users_words
from bnfix.cli.opening import DATA_FORMS, Opened, check_data, check_output, check_paths, load_model
from bnfix.cli.screen import Steps, report, working
from bnfix.cli.team import Team, team
from bnfix.cli.wording import as_options, in_options
from bnfix.errors import BnfixError
from bnfix.formats import sniff
from bnfix.formats.recipes import has_folds
from bnfix.render import About

if TYPE_CHECKING:
    from bnfix.types import Recalibration

ORDER = 15
EPILOG = """**Examples**

`bnfix recalibrate weights.pt --arch timm:resnet50 --data train_images/ --max-samples 4096 -o fixed.pt`

`bnfix recalibrate weights.pt --arch net.py:Net --data loader.py:make -o fixed.pt --certify full`

`bnfix recalibrate model.pt --trust --data x.npy --dry-run --when needed`

`torchrun --nproc-per-node 4 -m bnfix recalibrate weights.pt --arch net.py:Net --data loader.py:make -o fixed.pt`

**The data**  is what the model was trained on, with the transform of evaluation (no random augmentation). Test data
would leak into the model. Some thousand images are plenty: the report states the standard error, and how many more
samples would bring it to 1 %. A function (`loader.py:make`) returns a DataLoader, a Dataset or any iterable of batches;
of `(images, labels)` the model gets what its forward takes. How each batch was used is in the report.

**Exit codes**  0 recalibrated, also where some norms were kept, or --when needed found no need (then nothing is
written) · 1 --dry-run would change something · 2 wrong use or an error · 130 interrupted; with these two nothing was
written, unless the last line says so"""


def recalibrate(
    model: o.ModelArgument,
    data: c.CalibrationDataOption = None,
    output: Annotated[
        str | None, typer.Option("--output", "-o", metavar="FILE", help="Where the recalibrated model goes.")
    ] = None,
    in_place: o.InPlaceOption = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Measure the drift, write nothing.")] = False,
    when: c.WhenOption = c.When.always,
    arch: o.ArchOption = None,
    arch_kw: o.ArchKwOption = None,
    trust: o.TrustOption = False,
    batch_size: c.BatchSizeOption = 64,
    max_samples: c.MaxSamplesOption = None,
    forward: o.ForwardOption = None,
    mask: c.MaskOption = None,
    device: c.DeviceOption = "cpu",
    seed: c.OrderSeedOption = 0,
    method: c.MethodOption = c.Method.auto,
    certify: c.CertifyOption = c.Certify.replay,
    memory_budget: c.MemoryBudgetOption = None,
    spill_dir: c.SpillDirOption = None,
    select: c.SelectOption = None,
    include_frozen: c.IncludeFrozenOption = False,
    tol: c.TolOption = None,
    output_format: o.FormatOption = o.OutputFormat.full,
    traceback: o.TracebackOption = False,
) -> int:
    """Set the running statistics of every BatchNorm to those of your data, exactly, in one pass.

    Afterwards they are mean and variance of what each norm sees when the model runs in evaluation mode on this data
    (precise BN, "update_bn", BN re-estimation). Weights stay as they are, and so does everything else in the file but
    a num_batches_tracked that says that hardly anything was averaged yet. Nothing is written unless all went well.
    """
    asked = o.Asked(model, arch, tuple(arch_kw or ()), trust, (), data, forward, seed)
    options = {
        "method": method.value,
        "when": when.value,
        "mask": mask,
        "select": select,
        "include_frozen": include_frozen,
        "tol": tol,
        "certify": None if certify is c.Certify.none else certify.value,
        "memory_budget": memory_budget,
        "spill_dir": spill_dir,
        "dry_run": dry_run,
    }
    keep_freed_memory()
    with team(device=device, traceback=traceback) as crew:
        with crew.together():
            _check_options(select, tol, spill_dir)
            target = _checked(asked, output, in_place=in_place, dry_run=dry_run, first=crew.first)
        with working(quiet=not crew.first) as steps:
            with crew.together():
                _check_memory(memory_budget)
                opened, batches, notes = _opened(asked, batch_size, crew, steps)
            from bnfix import api

            with users_code(str(data)), in_options(str(data)):
                result = api.recalibrate(
                    opened.model,
                    batches,
                    forward=api.read_forward(forward),
                    max_samples=_share(max_samples, crew),
                    progress=_telling(steps),
                    **options,  # type: ignore[arg-type]
                )
            result = _worded(result)
            written = target if result.changed else None
            with crew.together():
                if written is not None and crew.first:
                    steps(f"writing {written}")
                    _move(opened, "cpu")
                    source = opened.loaded.info
                    notes += api.update_file(opened.model, written, source=source, trust=trust, inplace=in_place)
        would_change = dry_run and _would_change(result, when)
        if crew.first:
            about = _about(asked, opened, result, target, written, notes, would_change=would_change)
            report([result], output_format, [about])
    return FAILED if would_change else DONE


def _check_options(select: str | None, tol: float | None, spill_dir: str | None) -> None:
    try:
        re.compile(select or "")
    except re.error as error:
        raise UsageError(f"--select {select} is no regular expression: {error}") from error
    if tol is not None and not 0 < tol < math.inf:
        raise UsageError(f"--tol is a positive number, not {tol:g}")
    if spill_dir is not None and not os.path.isdir(spill_dir):
        raise UsageError(f"--spill-dir: there is no folder {spill_dir}", hint=f"mkdir -p {o.quoted(spill_dir)}")


def _check_memory(budget: str | None) -> None:
    from bnfix.running import parse_bytes

    with users_words("--memory-budget"):
        parse_bytes(budget or 1)


def _checked(asked: o.Asked, output: str | None, *, in_place: bool, dry_run: bool, first: bool) -> str | None:
    """What can be known before torch is imported; the file to be written."""
    check_paths(asked)
    if os.path.isfile(asked.model) and sniff(asked.model).kind == "torchscript":
        weights = dataclasses.replace(asked, arch=asked.arch or "net.py:Net", data=asked.data or "loader.py:make")
        raise UsageError(
            f"{asked.model} is a TorchScript program: a ScriptModule, whose run can't be observed",
            hint="save the state_dict of its Python class as weights.pt, and pass that class with it:\n"
            f"{weights.next('recalibrate', 'weights.pt')} -o {o.quoted(output or 'fixed.pt')}",
        )
    if asked.data is None:
        raise UsageError("on which data? Statistics come from what the model was trained on", hint=DATA_FORMS)
    check_data(asked.data, "the model would have the statistics of noise")
    return check_output(
        asked,
        output,
        in_place=in_place,
        dry_run=dry_run or not first,  # one of several processes writes
        done="recalibrated",
        dry="measures the drift, writes nothing",
    )


def _opened(asked: o.Asked, batch_size: int, crew: Team, steps: Steps) -> tuple[Opened, Iterable[Any], tuple[str, ...]]:
    """The model in the modes it was saved in, this process's share of the data, and what to know of both."""
    loaded = load_model(asked, steps, modes_as_saved=True)
    from bnfix import api
    from bnfix.formats import shard

    opened = Opened(loaded, [], loaded.notes)
    if not any(True for _ in opened.model.buffers()):
        raise BnfixError(
            f"{asked.model} keeps no running statistics: nothing to recalibrate",
            hint="looked for: modules with running_mean and running_var (BatchNorm, SyncBatchNorm and their like); "
            "LayerNorm, GroupNorm and InstanceNorm use those of their input",
        )
    _move(opened, crew.device)
    with users_words("--forward"):
        api.read_forward(asked.forward)
    steps(f"opening {asked.data}")
    with users_code(str(asked.data)), users_words(f"--data {asked.data}"):
        found, notes = api.batches(loaded, str(asked.data), batch_size=batch_size, seed=asked.seed)
    for note in notes:
        steps.keep(note)
    batches, share = shard(found, crew.rank, crew.world)
    if opened.model.training:
        notes += ("the module was saved in training mode, and is written so; norms that were frozen in it stay",)
    if loaded.info is not None and has_folds(loaded.info.recipe):
        notes += ("folded norms have no statistics any more: theirs went into the weights, and stay there",)
    return opened, batches, (*notes, *([share] if share else []))


def _move(opened: Opened, device: str) -> None:
    try:
        opened.model.to(device)
    except (RuntimeError, AssertionError) as error:  # a torch without CUDA asserts
        raise UsageError(f"--device {device}: {str(error).splitlines()[0]}") from error


def _share(max_samples: int | None, crew: Team) -> int | None:
    """This process's part of ``--max-samples``, which is of all together."""
    if max_samples is None or crew.world == 1:
        return max_samples
    return max(1, max_samples // crew.world + (crew.rank < max_samples % crew.world))


def _telling(steps: Steps) -> Callable[[str], None]:
    """Progress to ``steps``; how it is going to be done stays on the screen."""

    def tell(line: str) -> None:
        (steps.keep if line.startswith("method ") else steps)(as_options(line))

    return tell


def _worded(result: Recalibration) -> Recalibration:
    why = {site: as_options(reason) for site, reason in result.left_why.items()}
    why |= dict.fromkeys(result.frozen, "frozen when it was saved (--include-frozen takes it along)")
    return dataclasses.replace(
        result,
        why=as_options(result.why),
        used=as_options(result.used),
        notes=tuple(map(as_options, result.notes)),
        advice=tuple(map(as_options, result.advice)),
        left_why=why,
    )


def _would_change(result: Recalibration, when: c.When) -> bool:
    """Whether the run without ``--dry-run`` would write other statistics than those that are there."""
    from bnfix.calibration.judging import Change

    moved = any(s.mean_after != s.mean_before or s.var_after != s.var_before for s in result.layers)
    needed = Change(result.output_change, result.output_null).worth_it
    return moved and (needed or when is c.When.always)


def _about(
    asked: o.Asked,
    opened: Opened,
    result: Recalibration,
    target: str | None,
    written: str | None,
    notes: tuple[str, ...],
    *,
    would_change: bool,
) -> About:
    said = [*opened.notes, *notes]
    steps: list[tuple[str, str]] = []
    if target is not None and written is None:
        kept = f"{target} is as it was" if target == asked.model else f"{target} was not written"
        said.append(f"nothing was changed: {kept}")
    if written is not None:
        arch = opened.arch(written)
        trust = opened.pickled and arch is None
        again = dataclasses.replace(asked, model=written, arch=arch, trust=trust)
        steps.append(("load it", asked.load_line(written, arch=arch, trust=trust)))
        fold = f"{again.next('fold', written, trust=trust)} -o {o.quoted(o.beside(written, 'folded'))}"
        steps.append(("next", fold))
    elif would_change:
        steps.append(("next", typed.for_real(o.beside(o.named(asked.model), "recalibrated"))))
    files = (written,) if written else ()
    return About("bnfix recalibrate", asked.model, files, tuple(said), tuple(steps), worded=as_options)
