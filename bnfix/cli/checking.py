"""What ``bnfix check`` looks at: MODEL in whatever form it has, with its inputs, its data and its reference."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from bnfix.cli.door import UsageError, users_code, users_words
from bnfix.cli.opening import check_data, check_there, load_model
from bnfix.cli.options import Asked
from bnfix.cli.screen import Steps
from bnfix.errors import LoadError
from bnfix.formats.specs import parse_spec

if TYPE_CHECKING:
    from bnfix.formats import Loaded
    from bnfix.types import FileInfo

WEIGHTS = ("state_dict", "safetensors", "lightning")


@dataclass(frozen=True)
class Evidence:
    """What was given beside MODEL: on the command line the same for all models."""

    val_data: str | None = None
    against: str | None = None
    batch_size: int = 64
    device: str = "cpu"


@dataclass(frozen=True)
class Subject:
    """A model as ``bnfix.check`` takes it: ``value`` is a module, an exported program, or the path of a file.

    ``loaded`` is None where values or an ONNX graph alone can be judged. ``data`` opens the batches anew each time.
    """

    value: Any
    loaded: Loaded | None = None
    example: Any = None
    data: Callable[[], Iterable[Any]] | None = None
    val_data: Callable[[], Iterable[Any]] | None = None
    against: Any = None
    notes: tuple[str, ...] = ()
    kind: str = ""
    reference: str = ""
    """Of an ONNX file: what it was exported from, as it was typed."""

    @property
    def onnx(self) -> bool:
        """Whether it is an ONNX file."""
        return self.kind == "onnx"

    @property
    def info(self) -> FileInfo | None:
        """The file, where it is one that was loaded."""
        return self.loaded.info if self.loaded is not None else None


def check_given(asked: Asked, given: Evidence) -> None:
    """What can be known of the options before torch is imported.

    Raises:
        UsageError, LoadError: they don't fit together, or name files that are not there.
    """
    from bnfix.cli.opening import is_file

    _ = asked.arch_kwargs
    for text in asked.input:
        if is_file(text) and not os.path.isfile(text):
            raise LoadError(f"--input: there is no file {text}", hint="or a shape:  --input 1x3x224x224")
    for option, spec in (("--data", asked.data), ("--val-data", given.val_data)):
        check_data(spec, "the model would be judged by it", option=option)
    if given.val_data and not asked.data:
        raise UsageError("--val-data is compared with --data", hint="--data loader.py:make")
    if given.against is not None:
        check_there(given.against)


def open_subject(asked: Asked, given: Evidence, steps: Steps, *, whole: bool) -> Subject:
    """MODEL, loaded as far as that is possible; with ``whole`` it has to be, so that it can be written again.

    Raises:
        BnfixError: it can't be loaded, or the data can't be opened.
    """
    from bnfix import api

    info = api.info(asked.model) if os.path.isfile(asked.model) else None
    kind = info.kind if info is not None else ""
    if kind == "onnx":
        return _onnx(asked, given, steps, whole=whole)
    runs = bool(asked.input or asked.data or asked.forward)
    if kind in WEIGHTS and asked.arch is None and not (runs or whole):
        steps(f"reading {asked.model}")
        note = "values alone were judged: with --arch more can be said of this file"
        return Subject(asked.model, against=_reference(asked, given, steps), notes=(note,))
    loaded = load_model(asked, steps, modes_as_saved=True)
    program = api.load(asked.model, trust=asked.trust) if kind == "exported_program" else None
    subject = Subject(
        loaded.value if program is None else program,
        loaded,
        against=_reference(asked, given, steps),
        notes=loaded.notes,
    )
    _move(subject, given.device)
    return _with_runs(subject, asked, given, steps)


def _with_runs(subject: Subject, asked: Asked, given: Evidence, steps: Steps) -> Subject:
    from bnfix import api

    loaded = subject.loaded
    assert loaded is not None
    notes = subject.notes
    example: Any = None
    with users_words("--forward"):
        api.read_forward(asked.forward)
    if asked.input:
        with users_code("--forward"), users_words(f"--input {' '.join(asked.input)}"):
            calls, assumed = api.examples(
                loaded, input=list(asked.input), forward=asked.forward, seed=asked.seed, vary=False, progress=steps
            )
        example = calls if len(calls) > 1 else calls[0]
        notes += assumed
    data, said = _opener(loaded, asked.data, given, asked, steps)
    val_data, _ = _opener(loaded, given.val_data, given, asked, steps)
    return dataclasses.replace(subject, example=example, data=data, val_data=val_data, notes=(*notes, *said))


def _opener(
    loaded: Loaded, spec: str | None, given: Evidence, asked: Asked, steps: Steps
) -> tuple[Callable[[], Iterable[Any]] | None, tuple[str, ...]]:
    """What opens the batches that ``spec`` names, tried once, and how they are read."""
    from bnfix import api

    if spec is None:
        return None, ()

    def opened() -> tuple[Iterable[Any], tuple[str, ...]]:
        with users_code(str(spec)), users_words(f"--data {spec}"):
            return api.batches(loaded, str(spec), batch_size=given.batch_size, seed=asked.seed)

    steps(f"opening {spec}")
    _, notes = opened()
    return lambda: opened()[0], notes


def check_mendable(path: str) -> None:
    """Whether ``--fix`` can do anything with such a file at all: said before a name for what it writes is asked for.

    Raises:
        UsageError: it is an ONNX file.
    """
    from bnfix import api

    if os.path.isfile(path) and api.info(path).kind == "onnx":
        raise _not_mended(path)


def _not_mended(path: str) -> UsageError:
    return UsageError(
        f"{path} is an ONNX file: what is wrong in it is mended in the model that it was exported from",
        hint="mend that, and export it again:   bnfix export fixed.pt --arch timm:resnet50 -o model.onnx",
    )


def _onnx(asked: Asked, given: Evidence, steps: Steps, *, whole: bool) -> Subject:
    """An ONNX file; with ``--against`` the model that it was exported from, and what both are run on."""
    from bnfix import api

    if whole:
        raise _not_mended(asked.model)
    if given.against is None:
        if asked.arch or asked.input or asked.data:
            raise UsageError(
                f"{asked.model} is an ONNX file: --arch, --input and --data are for the model to compare it with",
                hint="name that model:   --against weights.pt",
            )
        return Subject(asked.model, kind="onnx")
    reference = dataclasses.replace(asked, model=given.against)
    loaded = load_model(reference, steps)
    with users_code(asked.data or "--forward"), users_words("the inputs"):
        calls, assumed = api.examples(
            loaded,
            input=list(asked.input) or None,
            data=asked.data,
            forward=asked.forward,
            file=asked.model,
            seed=asked.seed,
            progress=steps,
        )
    loaded = api.converted(loaded, calls)
    notes = (*loaded.notes, *assumed)
    return Subject(
        asked.model, example=list(calls), against=loaded.value, notes=notes, kind="onnx", reference=given.against
    )


def _reference(asked: Asked, given: Evidence, steps: Steps) -> Any:
    """The file to compare with, or what is in it where that has to be loaded."""
    from bnfix import api

    if given.against is None:
        return None
    spec = parse_spec(given.against) is not None
    if not spec and api.info(given.against).kind in WEIGHTS:
        return given.against
    alone = dataclasses.replace(asked, model=given.against, arch=None, arch_kw=asked.arch_kw if spec else ())
    return load_model(alone, steps, modes_as_saved=True).value


def _move(subject: Subject, device: str) -> None:
    if device == "cpu" or subject.loaded is None:
        return
    if not hasattr(subject.value, "to"):
        raise UsageError(f"--device {device}: an exported program stays where it was exported")
    try:
        subject.value.to(device)
    except (RuntimeError, AssertionError) as error:  # a torch without CUDA asserts
        raise UsageError(f"--device {device}: {str(error).splitlines()[0]}") from error
