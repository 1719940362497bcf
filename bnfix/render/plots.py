"""Pictures of values, drawn by matplotlib without pyplot: no global state, no window, no screen needed."""

from __future__ import annotations

import io
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullFormatter, NullLocator

from bnfix.files import atomic_path, check_target
from bnfix.render.legible import legible
from bnfix.render.pages import page_of
from bnfix.types import Recalibration

FORMATS = ("png", "svg", "pdf")
NAMED = 56
"""Layers that all have their name below the axis; of more, every second, third, ..."""
LONGEST = 40
BLUE, ORANGE, GREY = "#2563a8", "#c2560c", "#8d99a6"
# A user's own style may make TeX of the names of layers, or paint light on light.
STYLE: list[Any] = ["default", {"font.size": 9, "svg.fonttype": "none", "savefig.dpi": 150}]


class Drawing(Figure):
    """A figure that a notebook shows by itself, though pyplot does not know it."""

    def _repr_png_(self) -> bytes:
        file = io.BytesIO()
        with style.context(STYLE):
            self.savefig(file, format="png")
        return file.getvalue()


def figure_of(value: Any) -> Drawing:
    """``value`` as a figure.

    Raises:
        TypeError: there is no picture of such a value.
    """
    if not isinstance(value, Recalibration):
        raise TypeError(f"bnfix.render has no plot for a value of type {type(value).__name__}")
    with style.context(STYLE):
        return _recalibration(value)


def write(figure: Figure, path: str | os.PathLike[str]) -> None:
    """``figure`` into the file ``path``: the old file or the new one, never half of either.

    Raises:
        ValueError: the suffix is none of :data:`FORMATS`.
        BnfixError: ``path`` can't be written.
    """
    kind = Path(path).suffix[1:].lower()
    if kind not in FORMATS:
        raise ValueError(f"{os.fspath(path)}: a plot is written as {', '.join(FORMATS)}; name the file accordingly")
    check_target(path)
    with atomic_path(path) as beside, style.context(STYLE):
        figure.savefig(beside, format=kind)


def _recalibration(value: Recalibration) -> Drawing:
    layers = value.layers
    width = min(max(6.4, 1.2 + 0.17 * len(layers)), 13.0)
    names = [_short(legible(s.name)) for s in layers]
    figure = Drawing(figsize=(width, 4.8 + 0.05 * max(map(len, names), default=0)), layout="constrained")
    FigureCanvasAgg(figure)
    title = figure.suptitle(page_of(value).verdict[0], fontsize=10, x=0.01, ha="left")
    title.set_parse_math(False)
    if not layers:
        return figure
    top, bottom = figure.subplots(2, 1, sharex=True)
    _panel(top, names, "shift of the mean, σ", BLUE, [s.mean_shift for s in layers], [s.se for s in layers])
    ratios = [abs(math.log(s.var_ratio)) if s.var_ratio != 0 else math.inf for s in layers]  # 0: it was inf
    _panel(bottom, names, "|ln variance ratio|", ORANGE, ratios, [s.var_se for s in layers])
    _name(bottom, names)
    return figure


def _panel(
    axes: Axes, names: Sequence[str], what: str, colour: str, drifts: Sequence[float], errors: Sequence[float]
) -> None:
    """The drift of each layer as a dot, its standard error as a grey floor; what is 0 lies on the axis, hollow."""
    known = [v for v in (*drifts, *errors) if v > 0 and math.isfinite(v)]
    high = 3 * max(known, default=1.0)
    low = min([high / 100, *(v / 2 for v in known)])
    axes.set_yscale("log")
    axes.set_ylim(low, high)
    axes.set_xlim(-0.6, len(names) - 0.4)
    if any(e > 0 for e in errors):
        edges = [place - 0.5 for place in range(len(names) + 1)]
        floor = [e if e > 0 else math.nan for e in errors]
        axes.stairs(floor, edges, baseline=low, fill=True, color=GREY, alpha=0.35, lw=0, label="standard error")
    size = 5.0 if len(names) <= NAMED else 3.5
    axes.plot([max(d, low) for d in drifts], "-", color=colour, lw=0.8, alpha=0.45)
    axes.plot(
        [d if d > 0 else math.nan for d in drifts], "o", color=colour, ms=size, label="drift of the worst channel"
    )
    still = [place for place, d in enumerate(drifts) if d == 0]
    if still:
        axes.plot(still, [low] * len(still), "o", mec=colour, mfc="white", ms=size, clip_on=False, label="no drift")
    _point_out(axes, names, drifts)
    axes.set_ylabel(what)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.grid(axis="y", which="major", lw=0.5, alpha=0.5)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="lower right", bbox_to_anchor=(1.0, 1.0), ncols=3, frameon=False, borderaxespad=0.1, fontsize=8)


def _point_out(axes: Axes, names: Sequence[str], drifts: Sequence[float]) -> None:
    place, most = max(enumerate(drifts), key=lambda item: item[1] if item[1] == item[1] else -1.0)
    if len(names) > 1 and most > 0:
        side = "left" if place < len(names) / 2 else "right"
        said = axes.annotate(
            f"{names[place]}: {most:.2g}", (place, most), (0, 6), textcoords="offset points", fontsize=8, ha=side
        )
        said.set_parse_math(False)


def _name(axes: Axes, names: Sequence[str]) -> None:
    step = -(-len(names) // NAMED)
    places = list(range(0, len(names), step))
    axes.xaxis.set_major_locator(FixedLocator(places))
    axes.xaxis.set_minor_locator(FixedLocator(range(len(names))) if step > 1 else NullLocator())
    for label in axes.set_xticklabels([names[p] for p in places], rotation=90, fontsize=7):
        label.set_parse_math(False)
    if step > 1:
        axes.set_xlabel(f"norms in the order of the model, one of {step} named", fontsize=8)


def _short(name: str) -> str:
    """The end of a long name: it tells neighbours apart."""
    return name if len(name) <= LONGEST else f"…{name[1 - LONGEST :]}"
