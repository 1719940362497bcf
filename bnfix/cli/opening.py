"""A model and its example calls, as every command that runs a model asks for them."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import secrets
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from bnfix.cli.door import UsageError, users_code, users_words
from bnfix.cli.options import Asked
from bnfix.cli.screen import Steps
from bnfix.cli.written import watch
from bnfix.errors import BnfixError, LoadError, MissingDependencyError
from bnfix.files import check_apart, check_target
from bnfix.formats import sniff
from bnfix.formats.saving import check_form, writer_for
from bnfix.formats.specs import parse_spec

if TYPE_CHECKING:
    from torch import nn

    from bnfix.formats import Loaded


INPUT_FILES = (".npy", ".npz", ".safetensors")


@dataclass(frozen=True)
class Opened:
    """A model that was loaded, what it is called with, and what the reader has to know of both."""

    loaded: Loaded
    calls: list[Any]
    notes: tuple[str, ...]

    @property
    def model(self) -> nn.Module:
        """The module itself."""
        return _module(self.loaded)

    @property
    def example(self) -> Any:
        """The calls as the verbs take them: none, one, or several."""
        return self.calls or None

    @property
    def pickled(self) -> bool:
        """Whether the file holds a pickled module."""
        return self.loaded.info is not None and self.loaded.info.kind == "pickled_module"

    def arch(self, target: str) -> str | None:
        """What ``target`` has to be loaded into; None where it will hold the module itself."""
        if target.endswith(".pt2"):
            return None
        if not self.pickled:
            return self.loaded.arch
        if not target.endswith(".safetensors"):
            return None
        module, _, name = (self.loaded.info.root_class or "").rpartition(".") if self.loaded.info else ("", "", "")
        return f"{module}:{name}" if module else None

    def takes_trust(self, target: str) -> bool:
        """Whether ``target``, written from this, takes ``--trust`` to be loaded: it holds a pickled module."""
        return self.pickled and self.arch(target) is None and not target.endswith(".pt2")


DATA_FORMS = """--data loader.py:make   a function that returns your DataLoader, or any iterable of batches
--data train_images/    a folder of images, read as the model's own evaluation reads them
--data x.npy            an array of samples; .npz and .safetensors too"""


def check_data(spec: str | None, noise: str, *, option: str = "--data", forms: str = DATA_FORMS) -> None:
    """What can be known of ``option`` before torch is imported. ``noise`` says what random data would do.

    Raises:
        UsageError: it is empty or noise, or there is no such file; with the forms that it can have.
    """
    if spec is None or os.path.exists(spec):
        return
    if not spec:
        raise UsageError(f"{option} is empty", hint=forms)
    if spec.startswith("random:"):
        raise UsageError(
            f"{option} random: gives noise, and {noise}", hint=f"data that the model was trained on:\n{forms}"
        )
    if parse_spec(spec) is None:
        raise UsageError(f"there is no file {spec}", hint=forms)


def check_paths(asked: Asked) -> None:
    """What can be known before torch is imported: the model is there, and the options fit together.

    Raises:
        UsageError: they do not.
        LoadError: there is no such file, or none of that name to be run on.
    """
    check_options(asked)
    check_there(asked.model)


def check_options(asked: Asked) -> None:
    """As :func:`check_paths`, without a look for the model itself.

    Raises:
        UsageError, LoadError: as there.
    """
    _ = asked.arch_kwargs
    if asked.data == "":
        raise UsageError("--data is empty", hint=DATA_FORMS)
    if asked.input and asked.data:
        raise UsageError("--input and --data exclude each other", hint="--data alone: shapes are those of the batches")
    for text in asked.input:
        if is_file(text) and not os.path.isfile(text):
            raise LoadError(f"--input: there is no file {text}", hint="or a shape:  --input 1x3x224x224")
    if asked.arch_kw and not asked.arch and os.path.exists(asked.model):
        raise UsageError("--arch-kw without --arch", hint=f"bnfix info {shlex.quote(asked.model)}")


def is_file(text: str) -> bool:
    """Whether ``--input`` names a file, there or not, and no shape."""
    return os.path.splitext(text)[1].lower() in INPUT_FILES or os.path.isfile(text)


def check_there(path_or_spec: str) -> None:
    """Whether a file that is asked for exists.

    Raises:
        LoadError: it does not, and its name is no spec either.
    """
    from bnfix import api
    from bnfix.formats.specs import parse_spec

    if not os.path.exists(path_or_spec) and parse_spec(path_or_spec) is None:
        api.info(path_or_spec)


def check_output(asked: Asked, output: str | None, *, in_place: bool, dry_run: bool, done: str, dry: str) -> str | None:
    """The file that a repair writes, found writable and in a known format; None for a dry run.

    ``done`` is what the model will be, ``dry`` what a dry run does.

    Raises:
        UsageError: none was named, or nothing writes such files.
        BnfixError: it can't be written.
    """
    if output and in_place:
        raise UsageError(
            "-o and --in-place exclude each other", hint="-o names another file, --in-place writes over MODEL"
        )
    if dry_run:
        return None
    target = output or (asked.model if in_place else None)
    if target is None:
        raise UsageError(
            f"where should the {done} model go?",
            hint=f"-o {done}.pt\n--in-place  writes over MODEL\n--dry-run   {dry}",
        )
    if in_place and not os.path.isfile(target):
        raise UsageError(f"--in-place writes over a file, and {target} is none", hint=f"-o {done}.pt")
    with users_words("-o"):
        writer_for(target)
    if os.path.isfile(asked.model):
        check_form(target, sniff(asked.model))
    check_target_of(asked, target, in_place=in_place)
    return target


def check_target_of(asked: Asked, target: str, *, in_place: bool = False) -> None:
    """Whether ``target`` can be written and is none of the files that are read; from here on it is watched.

    Raises:
        BnfixError: as :func:`check_writable` and :func:`bnfix.files.check_apart` do.
    """
    check_apart(target, asked.files)
    check_writable(target, source_path=asked.model, inplace=in_place)
    watch(target)


def check_writable(target: str, *, source_path: str, inplace: bool = False) -> None:
    """Whether ``target`` can be written, tried out: some directories say that they can be written to and can't.

    Raises:
        BnfixError: as :func:`bnfix.files.check_target` does, or no file can be made there.
    """
    check_target(target, source_path=source_path, inplace=inplace)
    trial = os.path.join(os.path.dirname(os.path.realpath(target)), f".bnfix-{secrets.token_hex(6)}")
    try:
        os.close(os.open(trial, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
        os.unlink(trial)
    except OSError as error:
        raise BnfixError(f"{target} can't be written: {error.strerror}", hint="name another file with -o") from error


def check_installed(packages: Sequence[str], purpose: str) -> None:
    """Whether the packages that ``purpose`` needs are there, without importing them.

    Raises:
        MissingDependencyError: one is not.
    """
    for package in packages:
        if importlib.util.find_spec(package) is None:
            raise MissingDependencyError(package, "onnx", purpose)


def open_model(asked: Asked, steps: Steps, *, file: str | None = None) -> Opened:
    """Load the model and make the calls it is traced and proven with, or compared with the ONNX ``file`` on."""
    from bnfix import api

    loaded = load_model(asked, steps)
    with users_code(asked.data or "--forward"), users_words(_option(asked)):
        calls, assumed = api.examples(
            loaded,
            input=list(asked.input) or None,
            data=asked.data,
            forward=asked.forward,
            file=file,
            seed=asked.seed,
            progress=steps,
        )
    calls = _fitted(list(calls), asked, loaded)
    loaded = api.converted(loaded, calls)
    return Opened(loaded, calls, (*loaded.notes, *assumed))


def _fitted(calls: list[Any], asked: Asked, loaded: Loaded) -> list[Any]:
    """``calls``, where some were read from files: found to be what the model takes before any long work.

    Raises:
        PassError: one is not.
    """
    if not any(is_file(text) for text in asked.input):
        return calls
    from bnfix.graph import copy_model, unwrap
    from bnfix.running.arguments import check_accepted, check_arguments

    copy = copy_model(unwrap(_module(loaded))[0])[0]
    given = []
    for text, call in zip(asked.input, calls, strict=False):  # behind them come other batch sizes
        if is_file(text):
            call = _one_batch(call) if call.forward is not None else check_arguments(call, copy, text)
            with users_code("--forward"):
                check_accepted(call, copy, text)
        given.append(call)
    return [*given, *calls[len(given) :]]


def _one_batch(call: Any) -> Any:
    """What a file holds as the one batch that ``--forward`` gets: a dict where there are names, a tuple of several."""
    if not call.kwargs:
        return call if len(call.args) == 1 else dataclasses.replace(call, args=(call.args,))
    named = {f"arr_{i}": value for i, value in enumerate(call.args)} | dict(call.kwargs)
    return dataclasses.replace(call, args=(named,), kwargs={})


def load_model(asked: Asked, steps: Steps, **how: bool) -> Loaded:
    """The model, and what a person should know of it; ``how`` is for :func:`bnfix.api.open_model`.

    Raises:
        BnfixError: it can't be loaded, or is no PyTorch module.
    """
    steps(f"loading {asked.model}")
    from bnfix import api

    with users_code(asked.arch or asked.model), users_words(asked.model):
        loaded = api.open_model(asked.model, arch=asked.arch, arch_kwargs=asked.arch_kwargs, trust=asked.trust, **how)
    _module(loaded)
    return loaded


def _module(loaded: Loaded) -> nn.Module:
    from torch import nn

    if isinstance(loaded.value, nn.Module):
        return loaded.value
    shown = f"{loaded.info.path} is {loaded.info.title}" if loaded.info else f"{loaded.value}"
    raise LoadError(
        f"{shown}: bnfix works on PyTorch modules",
        hint="from its weights, for example   bnfix fold weights.pt --arch timm:resnet50 -o folded.pt",
    )


def _option(asked: Asked) -> str:
    given = [("--input", " ".join(asked.input)), ("--data", asked.data), ("--forward", asked.forward)]
    return " ".join(f"{name} {value}" for name, value in given if value) or "the example input"
