"""The picture of a recalibration: what is drawn, where it is written, and what it leaves alone."""

from __future__ import annotations

import dataclasses
import itertools
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import matplotlib
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from render_statistics import FEW_NORMS, MANY_NORMS, NO_NORM, ONE_SAMPLE, PLANNED, layer

from bnfix.errors import BnfixError, MissingDependencyError
from bnfix.render import plot
from bnfix.render.plots import NAMED
from bnfix.types import Residual

MAGIC = {"png": b"\x89PNG", "svg": b"<?xml", "pdf": b"%PDF"}


def many(count: int) -> Any:
    layers = tuple(layer(f"features.{n}.bn", 8, 0.01 + 0.37 * n % 1) for n in range(count))
    return dataclasses.replace(MANY_NORMS, layers=layers)


def dots(axes: Any, label: str) -> list[tuple[float, float]]:
    (line,) = (line for line in axes.lines if line.get_label() == label)
    return [(x, y) for x, y in zip(line.get_xdata(), line.get_ydata(), strict=True) if not math.isnan(y)]


def band(axes: Any) -> Any:
    return next((p for p in axes.patches if p.get_label() == "standard error"), None)


@pytest.mark.parametrize("report", [PLANNED, FEW_NORMS, MANY_NORMS, many(160)], ids=["1", "5", "53", "160"])
def test_each_layer_is_a_dot_above_its_standard_error(report: Any) -> None:
    figure = report.plot()
    shifts, ratios = figure.axes
    places = range(len(report.layers))
    assert dots(shifts, "drift of the worst channel") == [(x, report.layers[x].mean_shift) for x in places]
    wanted = [(x, abs(math.log(report.layers[x].var_ratio))) for x in places]
    assert dots(ratios, "drift of the worst channel") == wanted
    assert list(band(shifts).get_data().values) == [s.se for s in report.layers]
    assert list(band(ratios).get_data().values) == [s.var_se for s in report.layers]
    for axes in figure.axes:
        assert axes.get_yscale() == "log"
        low, high = axes.get_ylim()
        assert all(low < y < high for _, y in dots(axes, "drift of the worst channel"))
        assert all(low < e < high for e in band(axes).get_data().values)


@pytest.mark.parametrize(("count", "named"), [(1, 1), (NAMED, NAMED), (NAMED + 1, 29), (160, 54)])
def test_names_stand_below_as_many_as_can_be_read(count: int, named: int) -> None:
    report = many(count)
    figure = report.plot()
    axis = figure.axes[1].xaxis
    shown = {int(x): label.get_text() for x, label in zip(axis.get_majorticklocs(), axis.get_ticklabels(), strict=True)}
    assert len(shown) == named
    assert all(text == report.layers[x].name for x, text in shown.items())
    FigureCanvasAgg(figure)
    figure.draw_without_rendering()
    boxes = [label.get_window_extent() for label in axis.get_ticklabels()]
    assert all(a.x1 <= b.x0 + 1 for a, b in itertools.pairwise(boxes))
    assert all(box.y0 >= 0 for box in boxes)


def test_the_worst_layer_is_named_in_the_picture() -> None:
    report = many(160)
    for axes, drift in zip(report.plot().axes, ("mean_shift", "var_ratio"), strict=True):
        far = max(report.layers, key=lambda s: abs(math.log(s.var_ratio)) if drift == "var_ratio" else s.mean_shift)
        assert [text.get_text().split(":")[0] for text in axes.texts] == [far.name]


def test_the_title_is_the_verdict() -> None:
    assert PLANNED.plot().get_suptitle() == "would recalibrate 1 of 1 norm on 4,096 samples (population, one pass)"


def test_no_drift_lies_on_the_axis_and_the_unknown_nowhere() -> None:
    still = dataclasses.replace(layer("still"), mean_before=layer("still").mean, var_before=layer("still").var)
    nan = (math.nan,) * 16
    unknown = dataclasses.replace(layer("unknown"), mean_after=nan, var_after=nan)
    figure = dataclasses.replace(PLANNED, layers=(still, layer("moved"), unknown)).plot()
    for axes in figure.axes:
        assert dots(axes, "no drift") == [(0, axes.get_ylim()[0])]
        assert [x for x, _ in dots(axes, "drift of the worst channel")] == [1]
    shifts, ratios = ONE_SAMPLE.plot().axes
    assert band(shifts) is None
    assert band(ratios) is None


def test_nothing_measured_is_a_picture_too() -> None:
    assert NO_NORM.plot()._repr_png_().startswith(MAGIC["png"])


def test_a_name_is_no_formula(tmp_path: Path) -> None:
    """``$`` starts a formula in matplotlib, and half of one is an error; control characters are written out."""
    report = dataclasses.replace(PLANNED, layers=(layer("a$b^{c$", drift=2.0), layer("a\x1b[2J\n$x")))
    report.plot(tmp_path / "a.svg")
    text = (tmp_path / "a.svg").read_text(encoding="utf-8")
    assert "a$b^{c$" in text
    assert "\x1b" not in text


@pytest.mark.parametrize("kind", MAGIC)
def test_a_file_of_the_kind_that_its_name_says(kind: str, tmp_path: Path) -> None:
    path = tmp_path / f"drift.{kind.upper()}"
    figure = FEW_NORMS.plot(path)
    assert path.read_bytes().startswith(MAGIC[kind])
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    assert FEW_NORMS.plot(str(tmp_path / f"b.{kind}")).axes
    assert figure._repr_png_().startswith(MAGIC["png"])


@pytest.mark.parametrize("name", ["drift.jpeg", "drift", "drift.pt", ".png"])
def test_another_suffix_is_refused_and_nothing_written(name: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="a plot is written as png, svg, pdf"):
        FEW_NORMS.plot(tmp_path / name)
    assert list(tmp_path.iterdir()) == []


def test_half_a_picture_is_never_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(b"old")

    def full(self: object, beside: Path, **_: object) -> None:
        beside.write_bytes(b"ha")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", full)
    with pytest.raises(BnfixError, match="No space left"):
        FEW_NORMS.plot(path)
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.png"]


def test_a_directory_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(BnfixError, match="there is no directory"):
        FEW_NORMS.plot(tmp_path / "no" / "a.png")


def test_a_users_style_stays_out_and_stays_as_it_is(tmp_path: Path) -> None:
    with matplotlib.rc_context({"text.usetex": True, "text.color": "white", "font.size": 3.0}):
        before = dict(matplotlib.rcParams)
        figure = FEW_NORMS.plot(tmp_path / "a.svg")
        assert dict(matplotlib.rcParams) == before
        assert figure._repr_png_().startswith(MAGIC["png"])
    assert "body.0.bn" in (tmp_path / "a.svg").read_text(encoding="utf-8")


def test_pyplot_and_its_windows_are_left_alone() -> None:
    code = (
        "import sys; sys.path.insert(0, 'tests/render'); from render_statistics import FEW_NORMS; FEW_NORMS.plot();"
        "assert not {'matplotlib.pyplot', 'torch'} & set(sys.modules)"
    )
    root = Path(__file__).resolve().parents[2]
    subprocess.run([sys.executable, "-c", code], check=True, cwd=root)


def test_without_matplotlib_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingDependencyError, match=r"needs matplotlib\n.*bnfix\[report\]"):
        FEW_NORMS.plot()


def test_other_values_have_no_picture() -> None:
    with pytest.raises(TypeError, match="no plot for a value of type Residual"):
        plot(Residual(0.0, 0.0))
