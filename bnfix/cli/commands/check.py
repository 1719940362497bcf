"""``bnfix check``: what is wrong with the norms of a model, with evidence."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from bnfix.cli import calibration_options as calibration
from bnfix.cli import check_options as c
from bnfix.cli import options as o
from bnfix.cli import typed
from bnfix.cli.checking import Evidence, Subject, check_given, check_mendable, open_subject
from bnfix.cli.door import DONE, FAILED, UsageError, users_code, users_words
from bnfix.cli.fix_lines import line_of
from bnfix.cli.opening import check_there
from bnfix.cli.screen import Steps
from bnfix.cli.several import Done, each, make_folder, outputs
from bnfix.cli.wording import as_options, asked_for, in_options
from bnfix.errors import BnfixError
from bnfix.render import About

if TYPE_CHECKING:
    from torch import nn

    from bnfix.api.fixing import Fixed
    from bnfix.rules import Config
    from bnfix.types import Diagnosis, Finding, Fix, Skipped

ORDER = 5
EPILOG = """**Examples**

`bnfix check weights.pt`  the values in the file alone

`bnfix check weights.pt --arch timm:resnet50 --input 1x3x224x224 --data train_images/`

`bnfix check epoch-*.pt --arch net.py:Net --data loader.py:make --output-format github`

`bnfix check model.pt --trust --data loader.py:make --fix -o fixed.pt`

`bnfix check ema.pt --against weights.pt`  an average beside what it is of

`bnfix check model.onnx --against weights.pt --arch net.py:Net`

`bnfix explain BN204`  what a rule finds, and why

**What is read**  decides which rules can run: the file alone, its graph with --input, the batches with --data. The
report counts the rules that could not run, and says what each needs; --require makes that an error.

**In a project**  `[tool.bnfix]` of pyproject.toml, here or above, holds `select`, `ignore`, `per-layer-ignores`
(`"backbone.*" = ["BN104"]`) and `thresholds.BN301`; options go before it. One layer: `module.bnfix_ignore = {"BN104"}`.

**Exit codes**  0 nothing of --fail-on or worse, also where rules were not checked · 1 something was found, a rule
of --require was not checked, or --dry-run would change something · 2 wrong use or an error · 130 interrupted ·
of several the worst"""


@dataclass(frozen=True)
class Wanted:
    """What is looked for, and what ends how."""

    config: Config
    select: tuple[str, ...]
    ignore: tuple[str, ...]
    require: tuple[str, ...]
    fail_on: str
    exit_zero: bool
    baseline: str | None
    role: str
    mask: str | None
    max_samples: int | None


def check(
    models: c.ModelsToCheck,
    select: c.SelectRules = None,
    ignore: c.IgnoreRules = None,
    arch: o.ArchOption = None,
    arch_kw: o.ArchKwOption = None,
    trust: o.TrustOption = False,
    input: c.InputToTrace = None,
    data: c.DataToRead = None,
    role: c.RoleOption = c.Role.train,
    val_data: c.ValDataOption = None,
    against: c.AgainstOption = None,
    batch_size: calibration.BatchSizeOption = 64,
    max_samples: calibration.MaxSamplesOption = None,
    forward: o.ForwardOption = None,
    mask: calibration.MaskOption = None,
    device: calibration.DeviceOption = "cpu",
    seed: o.SeedOption = 0,
    fix: c.FixOption = False,
    output: c.FixedOutput = None,
    in_place: c.FixInPlace = False,
    dry_run: c.FixDryRun = False,
    fail_on: c.FailOnOption = c.FailOn.error,
    require: c.RequireRules = None,
    exit_zero: c.ExitZeroOption = False,
    baseline: c.BaselineOption = None,
    output_format: o.FormatOption = o.OutputFormat.full,
    traceback: o.TracebackOption = False,
) -> int:
    """Find what is wrong with the normalization layers of a model, with evidence, and say what heals it.

    Rules have codes, as in a linter. Each finding says where, by how much, and what to type next. Nothing is changed
    unless you say --fix, and MODEL itself never unless you say --in-place.
    """
    options = (arch, tuple(arch_kw or ()), trust, tuple(input or ()), data, forward, seed)
    beside = o.sources((("--val-data", val_data), ("--against", against), ("--baseline", baseline)))
    asked = [o.Asked(model, *options, beside=beside) for model in models]
    given = Evidence(val_data, against, batch_size, device)
    check_given(asked[0], given)
    if len(asked) == 1:
        check_there(asked[0].model)
    fix = fix or dry_run
    targets: Sequence[str | None] = [None] * len(asked)
    if fix:
        if len(asked) == 1:
            check_mendable(asked[0].model)
        targets = outputs(
            asked, output, in_place=in_place, dry_run=dry_run, done="fixed", dry="shows what would change"
        )
    elif output or in_place:
        raise UsageError("-o and --in-place are for what --fix writes", hint=typed.command(["--fix"]))
    wanted = _wanted(c.codes(select), c.codes(ignore), c.codes(require), fail_on.value, exit_zero, baseline, role.value,
                     mask, max_samples)  # fmt: skip

    def one(number: int, steps: Steps) -> Done:
        this = asked[number]
        subject = open_subject(this, given, steps, whole=fix)
        if fix:
            aim = targets[number] or output or this.model
            return _mended(this, subject, wanted, steps, targets[number], aim, in_place=in_place, dry_run=dry_run)
        found = _diagnosis(subject.value, this, subject, wanted, steps)
        about = _about(this, subject, found, wanted)
        if len(asked) == 1 and _mendable(found, subject):
            line = typed.command(["--fix", "-o", o.beside(o.named(this.model), "fixed")])
            about = dataclasses.replace(about, next=(("fix what can be", line), *about.next))
        return Done(found, about, _code(found, wanted))

    return each(asked, one, output_format, command="bnfix check", traceback=traceback, then=_then(asked, fix, dry_run))


def _wanted(
    select: tuple[str, ...], ignore: tuple[str, ...], require: tuple[str, ...], fail_on: str, exit_zero: bool,
    baseline: str | None, role: str, mask: str | None, max_samples: int | None,
) -> Wanted:  # fmt: skip
    """What was asked, joined with the project's own wishes; every code in it is one that there is."""
    from bnfix import rules

    for option, codes in (("--select", select), ("--ignore", ignore), ("--require", require)):
        rules.check_codes(codes, option)
    config = rules.read_config(os.getcwd())
    selected, ignored = config.before(select, ignore)
    if baseline is not None:
        rules.read_baseline(baseline)  # readable, before any long work
    return Wanted(config, selected, ignored, require, fail_on, exit_zero, baseline, role, mask, max_samples)


def _diagnosis(value: object, asked: o.Asked, subject: Subject, wanted: Wanted, steps: Steps) -> Diagnosis:
    from bnfix import api, rules

    data, val_data = (None if made is None else made() for made in (subject.data, subject.val_data))
    known = None if wanted.baseline is None else rules.read_baseline(wanted.baseline, asked.model)
    with users_code(asked.data or asked.model), users_words("bnfix check"), in_options(asked.data or asked.model):
        found = api.check(
            value,  # type: ignore[arg-type]
            subject.example,
            data=data,
            role=wanted.role,  # type: ignore[arg-type]
            val_data=val_data,
            against=subject.against,
            mask=wanted.mask,
            max_samples=wanted.max_samples,
            select=wanted.select,
            ignore=wanted.ignore,
            per_layer_ignores=wanted.config.per_layer_ignores,
            thresholds=wanted.config.thresholds,
            baseline=known,
            forward=api.read_forward(asked.forward),
            trust=asked.trust,
            progress=lambda line: steps(as_options(line)),
        )
    found = dataclasses.replace(found, notes=tuple(asked_for(note) for note in found.notes))

    def line(finding: Finding, fix: Fix) -> str:
        return line_of(asked, fix, finding.code, subject.info, mask=wanted.mask, reference=subject.reference)

    skipped = tuple(_worded(s, onnx=subject.onnx) for s in found.skipped)
    return dataclasses.replace(api.with_lines(found, line), skipped=skipped)


def _worded(skipped: Skipped, *, onnx: bool) -> Skipped:
    """What a rule needs, said as options; of an ONNX file most of them can't be had in any way."""
    from bnfix.rules import rule_of

    reason, needs = asked_for(skipped.reason), asked_for(skipped.needs)
    rule = rule_of(skipped.code)
    if onnx and rule is not None and not {"onnx", "loop"} & set(rule.needs):
        reason, needs = "needs the PyTorch model, checked by itself", "the PyTorch model, checked by itself"
    return dataclasses.replace(skipped, reason=reason, needs=needs)


def _mendable(found: Diagnosis, subject: Subject) -> bool:
    """Whether --fix would change something of the file that was given, more than one line heals."""
    from bnfix import api

    whole = subject.info is not None and subject.info.kind == "pickled_module"
    how = api.Fixing(data=subject.data, whole=whole)
    fixes = [f.fix for f in found.findings if f.fix is not None and not api.refusal_of(f.fix, how)]
    return subject.loaded is not None and len({f.line for f in fixes}) > 1


def _mended(
    asked: o.Asked, subject: Subject, wanted: Wanted, steps: Steps, target: str | None, aim: str, *, in_place: bool,
    dry_run: bool,
) -> Done:  # fmt: skip
    """The fixes applied, and written where there is a ``target``; ``aim`` is where they would go."""
    from bnfix import api

    loaded = subject.loaded
    if loaded is None or not hasattr(loaded.value, "named_modules"):
        raise BnfixError(f"{asked.model} can't be mended: it is no module")
    pickled = loaded.info is not None and loaded.info.kind == "pickled_module"
    how = api.Fixing(
        example=subject.example if loaded.call is None else subject.example or loaded.call,
        data=subject.data,
        whole=aim.endswith(".pt2") or (pickled and not aim.endswith(".safetensors")),
        forward=api.read_forward(asked.forward),
        mask=wanted.mask,
        max_samples=wanted.max_samples,
        dry_run=dry_run,
    )

    def looked(model: nn.Module) -> Diagnosis:
        return _diagnosis(model, asked, subject, wanted, steps)

    with users_code(asked.data or asked.model), in_options(asked.data or asked.model):
        fixed = api.fix(loaded.value, looked, how, steps)  # type: ignore[arg-type]
    written = target if fixed.report.edits else None
    notes = _written(asked, subject, fixed, written, how.example, in_place=in_place) if written is not None else ()
    if target is not None and written is None:
        notes = (f"nothing was changed: {target} {'is as it was' if in_place else 'was not written'}",)
    about = _about(asked, subject, fixed.report.diagnosis, wanted, notes, written)
    if dry_run and fixed.report.edits:
        flag = () if typed.was_typed("--fix") else ("--fix",)
        line = typed.for_real(o.beside(o.named(asked.model), "fixed"), *flag)
        about = dataclasses.replace(about, next=(*about.next, ("next", line)))
    code = _code(fixed.report.diagnosis, wanted)
    return Done(fixed.report, about, FAILED if dry_run and fixed.report.edits and not wanted.exit_zero else code)


def _written(
    asked: o.Asked, subject: Subject, fixed: Fixed, target: str, example: object, *, in_place: bool
) -> tuple[str, ...]:
    from bnfix import api

    make_folder(target)
    fixed.model.cpu()
    if fixed.recipe or target.endswith(".pt2"):
        api.save(
            fixed.model, target, recipe=fixed.recipe or None, source=subject.info, inplace=in_place, example=example
        )
        return ()
    return api.update_file(fixed.model, target, source=subject.info, trust=asked.trust, inplace=in_place)


def _code(found: Diagnosis, wanted: Wanted) -> int:
    from bnfix.types import SEVERITIES

    if wanted.exit_zero:
        return DONE
    grave = SEVERITIES[: SEVERITIES.index(wanted.fail_on) + 1]  # type: ignore[arg-type]
    failed = any(f.severity in grave for f in found.findings) or _unmet(found, wanted)
    return FAILED if failed else DONE


def _unmet(found: Diagnosis, wanted: Wanted) -> tuple[str, ...]:
    """What --require asked for and was not checked, with the reason."""
    missed = [s for s in found.skipped if wanted.require and s.code.startswith(wanted.require)]
    said = [f"{s.code}: {s.reason}" for s in missed]
    ran = {*found.checked, *(s.code for s in found.skipped)}
    idle = [f"{code}: not selected" for code in wanted.require if not any(r.startswith(code) for r in ran)]
    return tuple(dict.fromkeys((*said, *idle)))


def _about(
    asked: o.Asked,
    subject: Subject,
    found: Diagnosis,
    wanted: Wanted,
    notes: tuple[str, ...] = (),
    written: str | None = None,
) -> About:
    said = [*subject.notes, *notes]
    if wanted.config.source:
        said.append(f"rules and thresholds as {os.path.relpath(wanted.config.source)} says")
    said += [f"required, and NOT checked: {what}" for what in _unmet(found, wanted)]
    steps: list[tuple[str, str]] = []
    codes = list(dict.fromkeys(f.code for f in found.findings))
    if codes:
        steps.append(("why", f"bnfix explain {' '.join(codes)}"))
    if written is not None:
        pickled = subject.info is not None and subject.info.kind == "pickled_module"
        arch = None if pickled or written.endswith(".pt2") or subject.loaded is None else subject.loaded.arch
        trust = pickled and not written.endswith((".safetensors", ".pt2"))
        steps.append(("load it", asked.load_line(written, arch=arch, trust=trust)))
    return About("bnfix check", asked.model, (written,) if written else (), tuple(said), tuple(steps))


def _then(asked: Sequence[o.Asked], fix: bool, dry_run: bool) -> tuple[tuple[str, str], ...]:
    if len(asked) == 1 or not (fix and dry_run):
        return ()
    flag = () if typed.was_typed("--fix") else ("--fix",)
    return (("next", typed.for_real("fixed/", *flag)),)
