"""The options of ``bnfix check`` that no other command has."""

from __future__ import annotations

from enum import Enum
from typing import Annotated

import typer

from bnfix.cli.options import RUN_ON

_RULES, _FIXES, _ENDS = "The rules", "The fixes", "How it ends"


class Role(str, Enum):
    train = "train"
    val = "val"


class FailOn(str, Enum):
    error = "error"
    warning = "warning"
    info = "info"


ModelsToCheck = Annotated[
    list[str],
    typer.Argument(
        metavar="MODEL",
        help="A file with weights (with --arch all of it is checked, without the values alone) or with a module (then "
        "--trust); an exported program or ONNX file; or the model itself: timm:resnet50, torchvision:resnet18, "
        "pkg.mod:callable, file.py:callable. Several: each by itself, one table.",
        show_default=False,
    ),
]
InputToTrace = Annotated[
    list[str] | None,
    typer.Option(
        "--input",
        metavar="SHAPE|FILE",
        help="What the model is traced on, for the rules that read its graph: a shape such as 1x3x224x224, or "
        "1x16:int64,mask=1x16:bool; or a .npz, .npy or .safetensors file. Repeat it for more signatures.",
        rich_help_panel=RUN_ON,
    ),
]
DataToRead = Annotated[
    str | None,
    typer.Option(
        "--data",
        metavar="SPEC",
        help="What a training loop iterates over, for the rules that read data: file.py:callable, pkg.mod:callable, a "
        "folder of images, or a .npy/.npz/.safetensors file. A part of it is read, once.",
        rich_help_panel=RUN_ON,
    ),
]
RoleOption = Annotated[
    Role,
    typer.Option(
        "--role",
        help="What --data is. Order and size of batches are judged where they are trained on.",
        rich_help_panel=RUN_ON,
    ),
]
ValDataOption = Annotated[
    str | None,
    typer.Option("--val-data", metavar="SPEC", help="The data of deployment, as --data.", rich_help_panel=RUN_ON),
]
AgainstOption = Annotated[
    str | None,
    typer.Option(
        "--against",
        metavar="FILE",
        help="Weights that MODEL was averaged or converted from; of an ONNX file those that it was exported from.",
        rich_help_panel=RUN_ON,
    ),
]
SelectRules = Annotated[
    list[str] | None,
    typer.Option(
        "--select", metavar="CODES", help="These rules alone: BN204, or BN2 for all that begin so; commas, or repeat "
        "it. Default: all that are not off by default.", rich_help_panel=_RULES,
    ),
]  # fmt: skip
IgnoreRules = Annotated[
    list[str] | None,
    typer.Option("--ignore", metavar="CODES", help="Not these rules, in the same form.", rich_help_panel=_RULES),
]
RequireRules = Annotated[
    list[str] | None,
    typer.Option(
        "--require", metavar="CODES", help="Exit 1 where one of these was not checked, in the same form.",
        rich_help_panel=_ENDS,
    ),
]  # fmt: skip
FailOnOption = Annotated[
    FailOn,
    typer.Option("--fail-on", help="Exit 1 where something of this severity or worse is found.", rich_help_panel=_ENDS),
]
ExitZeroOption = Annotated[bool, typer.Option("--exit-zero", help="Exit 0 whatever is found.", rich_help_panel=_ENDS)]
BaselineOption = Annotated[
    str | None,
    typer.Option(
        "--baseline", metavar="FILE", help="An earlier report (--output-format json): what it holds is told no more.",
        rich_help_panel=_ENDS,
    ),
]  # fmt: skip
FixOption = Annotated[
    bool,
    typer.Option(
        "--fix", help="Apply the fixes that are exact, and with --data those that need data; check again. Nothing that "
        "needs training is ever applied.", rich_help_panel=_FIXES,
    ),
]  # fmt: skip
FixedOutput = Annotated[
    str | None,
    typer.Option(
        "--output", "-o", metavar="FILE|FOLDER/", help="Where the fixed model goes. Of several models, the folder.",
        rich_help_panel=_FIXES,
    ),
]  # fmt: skip
FixInPlace = Annotated[bool, typer.Option("--in-place", help="Write over MODEL itself.", rich_help_panel=_FIXES)]
FixDryRun = Annotated[
    bool,
    typer.Option(
        "--dry-run", help="Show what --fix would change, norm by norm; write nothing.", rich_help_panel=_FIXES
    ),
]


def codes(given: list[str] | None) -> tuple[str, ...]:
    """``["BN1,BN204", "BN3"]`` as single codes."""
    return tuple(code.strip().upper() for entry in given or () for code in entry.split(",") if code.strip())
