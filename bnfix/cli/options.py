"""The options that commands share, and what was asked with them."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum
from typing import Annotated, Any

import typer

from bnfix.cli.door import UsageError


class OutputFormat(str, Enum):
    """The formats of ``bnfix.render``."""

    full = "full"
    concise = "concise"
    json = "json"
    github = "github"
    markdown = "markdown"
    html = "html"


_MODEL, RUN_ON, _REPORT = "The model", "What it is run on", "The report"

ModelArgument = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="A file with weights (then --arch) or with a module (then --trust), or the model itself: "
        "timm:resnet50, torchvision:resnet18, pkg.mod:callable, file.py:callable.",
        show_default=False,
    ),
]
ModelsArgument = Annotated[
    list[str],
    typer.Argument(
        metavar="MODEL",
        help="A file with weights (then --arch) or with a module (then --trust), or the model itself: "
        "timm:resnet50, torchvision:resnet18, pkg.mod:callable, file.py:callable. Several: each by itself, one table.",
        show_default=False,
    ),
]
ArchOption = Annotated[
    str | None,
    typer.Option(
        metavar="SPEC",
        help="What the weights belong to: timm:resnet50, torchvision:resnet18, pkg.mod:callable or file.py:callable.",
        rich_help_panel=_MODEL,
    ),
]
ArchKwOption = Annotated[
    list[str] | None,
    typer.Option("--arch-kw", metavar="K=V", help="Argument for the architecture; repeat it.", rich_help_panel=_MODEL),
]
TrustOption = Annotated[
    bool,
    typer.Option("--trust", help="Load a pickled module: this can run any code inside it.", rich_help_panel=_MODEL),
]
InputOption = Annotated[
    list[str] | None,
    typer.Option(
        "--input",
        metavar="SHAPE|FILE",
        help="A shape such as 1x3x224x224, or 1x16:int64,mask=1x16:bool; or a .npz, .npy or .safetensors file whose "
        "names are the forward's arguments (arr_0, arr_1: positional). Repeat it for more signatures.",
        rich_help_panel=RUN_ON,
    ),
]
DataOption = Annotated[
    str | None,
    typer.Option(
        "--data",
        metavar="SPEC",
        help="Real batches: pkg.mod:callable, file.py:callable, a .npy/.npz/.safetensors file, or random:3x224x224.",
        rich_help_panel=RUN_ON,
    ),
]
ForwardOption = Annotated[
    str | None,
    typer.Option(
        "--forward",
        metavar="LAMBDA",
        help="How a batch is fed to the model: 'lambda m, b: m(b[0])'. Runs as Python.",
        rich_help_panel=RUN_ON,
    ),
]
SeedOption = Annotated[int, typer.Option("--seed", help="Of the random inputs.", rich_help_panel=RUN_ON)]
InPlaceOption = Annotated[bool, typer.Option("--in-place", help="Write over MODEL itself.")]
FormatOption = Annotated[
    OutputFormat,
    typer.Option("--output-format", help="How the report is written to standard output.", rich_help_panel=_REPORT),
]
TracebackOption = Annotated[
    bool, typer.Option("--traceback", help="Show where an error came from.", rich_help_panel=_REPORT)
]


@dataclass(frozen=True)
class Asked:
    """What every command that opens a model was asked; it can be typed again for the next command."""

    model: str
    arch: str | None = None
    arch_kw: tuple[str, ...] = ()
    trust: bool = False
    input: tuple[str, ...] = ()
    data: str | None = None
    forward: str | None = None
    seed: int = 0
    beside: tuple[tuple[str, str], ...] = ()
    """Further files that are read, as ``files`` has them: those of options that one command alone takes."""

    @property
    def arch_kwargs(self) -> dict[str, Any]:
        """``--arch-kw`` as keyword arguments; values are Python literals, ``true``/``false``, or else strings.

        Raises:
            UsageError: an entry is not of the form ``key=value``.
        """
        from bnfix.formats import parse_kwargs

        try:
            return parse_kwargs(self.arch_kw)
        except ValueError as error:
            raise UsageError(f"--arch-kw: {error}", hint="--arch-kw num_classes=10") from error

    @property
    def files(self) -> tuple[tuple[str, str], ...]:
        """The files that are read beside MODEL's own, each with what names it; code is read from files too."""
        code = () if os.path.exists(self.model) else (("MODEL", self.model),)
        given = (*code, ("--arch", self.arch), ("--data", self.data), *(("--input", word) for word in self.input))
        return (*sources(given), *self.beside)

    def next(self, verb: str, *paths: str, trust: bool = False, arch: bool = True) -> str:
        """A command line to paste: ``verb`` on ``paths`` with the same model options, quoted for the shell."""
        words = ["bnfix", verb, *paths]
        words += ["--arch", self.arch] if arch and self.arch else []
        words += [word for entry in self.arch_kw for word in ("--arch-kw", entry)] if arch else []
        words += ["--trust"] if trust else []
        words += [word for shape in self.input for word in ("--input", shape)]
        words += ["--data", self.data] if self.data else []
        words += ["--forward", self.forward] if self.forward else []
        return shlex.join(words)

    def load_line(self, path: str, *, arch: str | None, trust: bool) -> str:
        """The line of Python that loads ``path`` again."""
        parts = [json.dumps(path, ensure_ascii=False)]
        parts += [f"arch={json.dumps(arch, ensure_ascii=False)}"] if arch else []
        parts += [f"arch_kwargs={self.arch_kwargs!r}"] if arch and self.arch_kw else []
        parts += ["trust=True"] if trust else []
        return f"import bnfix; model = bnfix.load({', '.join(parts)})"


def sources(given: Iterable[tuple[str, str | None]]) -> tuple[tuple[str, str], ...]:
    """Of options with their values, those that name a file, or code in one: in words, and the file."""
    from bnfix.formats.specs import source_of

    found = ((f"{option} {value}", source_of(value)) for option, value in given if value)
    return tuple((words, path) for words, path in found if path is not None)


def sibling(path: str, suffix: str) -> str:
    """``path`` with another suffix, to be proposed."""
    return os.path.splitext(path)[0] + suffix


def quoted(word: str) -> str:
    """``word`` as a shell takes it for one."""
    return shlex.quote(word)


def beside(path: str, done: str) -> str:
    """A name for the model after a repair, to be proposed: ``net-folded.pt`` for ``net.pt``."""
    from bnfix.formats import advice

    return advice.beside(path, done)


def named(model: str) -> str:
    """The file, or for a spec the name of the architecture in it."""
    return model if os.path.exists(model) else model.rpartition(":")[2] or "model"
