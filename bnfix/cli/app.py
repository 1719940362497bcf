"""The typer application: every module of ``commands/`` is one command, found by walking."""

from __future__ import annotations

import importlib
import pkgutil
from typing import Annotated

import typer

from bnfix.cli import commands
from bnfix.cli.door import command

ABOUT = """The doctor for normalization layers in PyTorch models.

Finds what is wrong with them, with evidence; recalibrates running statistics on the data that you give; folds BatchNorm
into the layers around it; gives each call of a shared norm its own, or another kind of norm; exports the result, and
proves against a float64 oracle that nothing but rounding changed. The file that it reads is never changed, unless you
say --in-place; a file of the name given with -o is replaced, whole and only when all went well.
"""
EPILOG = """**Start here**

`bnfix demo`

`bnfix info weights.pt`

`bnfix check weights.pt --arch timm:resnet50 --data train_images/`

`bnfix recalibrate weights.pt --arch timm:resnet50 --data train_images/ -o fixed.pt`

`bnfix fold fixed.pt --arch timm:resnet50 -o folded.pt`

**Exit codes**  0 done · 1 a check failed, or a dry run would change something · 2 wrong use or an error ·
3 inconclusive · 130 interrupted"""


def build() -> typer.Typer:
    """The application with all its commands, in the order in which a newcomer needs them."""
    app = typer.Typer(
        name="bnfix",
        help=ABOUT,
        epilog=EPILOG,
        rich_markup_mode="markdown",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.callback()(_options)
    names = [m.name for m in pkgutil.iter_modules(commands.__path__)]
    modules = [importlib.import_module(f"{commands.__name__}.{name}") for name in names]
    for module in sorted(modules, key=lambda m: (m.ORDER, m.__name__)):
        name = module.__name__.rpartition(".")[2]
        app.command(name, epilog=module.EPILOG)(command(getattr(module, name)))
    return app


def _version(asked: bool) -> None:
    if asked:
        import bnfix

        typer.echo(f"bnfix {bnfix.__version__}")
        raise typer.Exit


def _options(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    return
