"""Several models in one call: where each goes, and one that fails does not stop the others."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from bnfix.cli.door import WRONG, UsageError, complain, explained
from bnfix.cli.opening import check_output, check_target_of, check_there, check_writable
from bnfix.cli.options import Asked, OutputFormat, named, quoted
from bnfix.cli.screen import Steps, report, working
from bnfix.cli.written import watch
from bnfix.errors import BnfixError
from bnfix.files import check_target
from bnfix.formats.saving import known_suffixes
from bnfix.render import About
from bnfix.render.several import Failure


@dataclass(frozen=True)
class Done:
    """What came out for one model, what to say of it, and the exit code that it asks for."""

    value: Any
    about: About
    code: int


def outputs(
    asked: Sequence[Asked], output: str | None, *, in_place: bool, dry_run: bool, done: str, dry: str
) -> list[str | None]:
    """The file that each model goes to, found writable: ``output``, or one in that folder; None for a dry run.

    Raises:
        UsageError, BnfixError: as :func:`~bnfix.cli.opening.check_output`; or two would go to the same file.
    """
    single = len(asked) == 1
    if output is None and not (single or in_place or dry_run):
        raise UsageError(
            f"where should the {len(asked)} {done} models go?",
            hint=f"-o {done}/      a folder: each goes there under its own name\n--in-place  writes over each MODEL\n"
            f"--dry-run   {dry}",
        )
    if output is None or in_place or dry_run or (single and not _is_folder(output)):
        return [check_output(a, output, in_place=in_place, dry_run=dry_run, done=done, dry=dry) for a in asked]
    suffix = os.path.splitext(output)[1].lower()
    if os.path.isfile(output) or (not _is_folder(output) and suffix in known_suffixes()):
        raise UsageError(
            f"-o {output} is one file, and there are {len(asked)} models",
            hint="-o folder/   each goes there under its own name",
        )
    return _in_folder(asked, output, done)


def make_folder(target: str) -> None:
    """The folder of ``target``, where it is not there yet: it is made when the first file is ready for it.

    Raises:
        BnfixError: it can't be made.
    """
    folder = os.path.dirname(target)
    try:
        os.makedirs(folder or ".", exist_ok=True)
    except OSError as error:
        raise BnfixError(f"{folder} can't be made: {error.strerror}", hint="name another folder with -o") from error


def each(
    asked: Sequence[Asked],
    one: Callable[[int, Steps], Done],
    format: OutputFormat,
    *,
    command: str,
    traceback: bool,
    then: tuple[tuple[str, str], ...] = (),
) -> int:
    """Do ``one`` with each model by its number and report; the worst exit code.

    Of a single model an error is raised; of several it is told at once, and stands in the table. ``then`` is what to
    type next after several, where it is not what the first that was written has.
    """
    if len(asked) == 1:
        with working() as steps:
            done = one(0, steps)
        report([done.value], format, [done.about])
        return done.code
    told: list[Done] = []
    with working() as steps:
        for number, about in enumerate(asked):
            steps.on(about.model, number + 1, len(asked))
            try:
                check_there(about.model)
                told.append(one(number, steps))
            except Exception as error:  # noqa: BLE001 -- told, not swallowed; the other files are still worth the work
                complain(error, traceback, about=about.model)
                told.append(failed(about.model, error, command))
    finish(told, format, command, then)
    return max(d.code for d in told)


def failed(path: str, error: Exception, command: str) -> Done:
    """That nothing came out for ``path``."""
    message, hint = explained(error, traceback=True)
    return Done(Failure(path, type(error).__name__, message, "\n".join(hint)), About(command, path, failed=True), WRONG)


def finish(told: Sequence[Done], format: OutputFormat, command: str, then: tuple[tuple[str, str], ...] = ()) -> None:
    """One report of all; what to type next is ``then``, or that of the first file written: the others' are alike."""
    first = next((d.about.next for d in told if d.about.written), ())
    steps = then or tuple((label.replace("load it", "load the first"), line) for label, line in first)
    overall = About(command, f"{len(told)} files", (), (), steps)
    report([d.value for d in told], format, [d.about for d in told], overall)


def _is_folder(output: str) -> bool:
    return os.path.isdir(output) or output.endswith(("/", os.sep))


def _in_folder(asked: Sequence[Asked], folder: str, done: str) -> list[str | None]:
    if not os.path.isdir(folder):
        check_writable(os.path.normpath(folder), source_path="")
    targets: dict[str, str] = {}
    for this in asked:
        model = this.model
        target = os.path.join(folder, _name(model))
        if target in targets:
            raise UsageError(
                f"-o {folder}: {targets[target]} and {model} would both be written to {target}",
                hint=f"call bnfix for one of them by itself, with a name of its own:  -o {quoted(f'{done}.pt')}",
            )
        targets[target] = model
        if os.path.isdir(folder):
            check_target_of(this, target)
            for other in asked:
                check_target(target, source_path=other.model)
        else:
            watch(target)
    return list(targets)


def _name(model: str) -> str:
    """The name of the file as it is; of a model that code names, that name; with an ending that can be written."""
    name = os.path.basename(named(model))
    return name if os.path.splitext(name)[1].lower() in known_suffixes() else f"{name}.pt"
