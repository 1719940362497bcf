"""The options of ``bnfix recalibrate`` that no other command has."""

from __future__ import annotations

from enum import Enum
from typing import Annotated

import typer

from bnfix.cli.options import RUN_ON

_HOW = "How it is done"


class Method(str, Enum):
    auto = "auto"
    staged = "staged"
    population = "population"
    online = "online"


class When(str, Enum):
    always = "always"
    needed = "needed"


class Certify(str, Enum):
    replay = "replay"
    full = "full"
    none = "none"


CalibrationDataOption = Annotated[
    str | None,
    typer.Option(
        "--data",
        metavar="SPEC",
        help="Required. What a training loop iterates over: file.py:callable, pkg.mod:callable, a folder of images, "
        "or a .npy/.npz/.safetensors file.",
        rich_help_panel=RUN_ON,
    ),
]
WhenOption = Annotated[
    When, typer.Option("--when", help="needed: write nothing unless the outputs change by more than chance.")
]
BatchSizeOption = Annotated[
    int,
    typer.Option("--batch-size", min=1, help="Of images and arrays; a loader has its own.", rich_help_panel=RUN_ON),
]
MaxSamplesOption = Annotated[
    int | None,
    typer.Option("--max-samples", metavar="N", min=1, help="Stop reading there.", rich_help_panel=RUN_ON),
]
MaskOption = Annotated[
    str | None,
    typer.Option(
        "--mask",
        metavar="KEY",
        help="The key of the batch that holds a boolean mask (N, positions), true where a position counts.",
        rich_help_panel=RUN_ON,
    ),
]
DeviceOption = Annotated[
    str, typer.Option("--device", metavar="DEVICE", help="cpu, cuda or cuda:1.", rich_help_panel=RUN_ON)
]
OrderSeedOption = Annotated[
    int, typer.Option("--seed", help="Of the order of a folder's images.", rich_help_panel=RUN_ON)
]
MethodOption = Annotated[
    Method,
    typer.Option(
        "--method",
        help="staged: exact, all samples go from norm to norm together. population, online: a stream, batch by "
        "batch, near it. auto: staged where the samples fit into memory.",
        rich_help_panel=_HOW,
    ),
]
CertifyOption = Annotated[
    Certify,
    typer.Option(
        "--certify",
        help="replay: two samples of a chunk are run again alone and compared. full: the residual is measured too, "
        "which takes about two passes more. none: no replay where all samples are one batch.",
        rich_help_panel=_HOW,
    ),
]
MemoryBudgetOption = Annotated[
    str | None,
    typer.Option(
        "--memory-budget",
        metavar="SIZE",
        help="For the activations held at a time, such as 2GB; default: a quarter of what is free.",
        rich_help_panel=_HOW,
    ),
]
SpillDirOption = Annotated[
    str | None,
    typer.Option("--spill-dir", metavar="DIR", help="Hold them in files in this folder instead.", rich_help_panel=_HOW),
]
SelectOption = Annotated[
    str | None,
    typer.Option("--select", metavar="REGEX", help="Only norms whose path it is found in.", rich_help_panel=_HOW),
]
IncludeFrozenOption = Annotated[
    bool,
    typer.Option(
        "--include-frozen",
        help="Also norms in evaluation mode inside a module that was saved in training mode.",
        rich_help_panel=_HOW,
    ),
]
TolOption = Annotated[
    float | None,
    typer.Option(
        "--tol",
        metavar="SE",
        help="End a stream where every standard error is at most this, such as 0.01.",
        rich_help_panel=_HOW,
    ),
]
