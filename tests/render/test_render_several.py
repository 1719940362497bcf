"""Several values of one kind: a row a file, what is alike said once, a failure among them."""

from __future__ import annotations

import io
import json

import pytest
from render_values import EVIL, FAILED, FEW, KEPT, MANY, WEIGHTS
from rich.console import Console

from bnfix.render import FORMATS, About, render_all, to_text
from bnfix.render.several import Failure
from bnfix.types import Edit, Result

LOST = Failure("cut.pt", "LoadError", "cut.pt is cut off", "copy it again")
ALL = About("bnfix fold", "4 files", (), (), (("next", "bnfix export out/many.pt -o many.onnx"),))
BROKEN = Result(None, MANY.edits, (), FAILED)


def about(name: str, *notes: str, failed: bool = False) -> About:
    written = () if failed else (f"out/{name}",)
    return About("bnfix fold", name, written, ("input 1x3x224x224, by timm's default_cfg", *notes), (), failed)


VALUES = [MANY, FEW, LOST, BROKEN]
ABOUT = [
    about("many.pt"),
    about("few.pt", "took 'ema'"),
    About("bnfix fold", "cut.pt", failed=True),
    about("broken.pt", failed=True),
]


def written(format: str, values: list = VALUES, said: list = ABOUT, width: int = 110) -> str:
    file = io.StringIO()
    render_all(values, format, Console(file=file, width=width), said, ALL)  # type: ignore[arg-type]
    return file.getvalue()


@pytest.mark.parametrize("format", ["full", "markdown"])
def test_several_repairs(format: str, snapshot: object) -> None:
    assert written(format) == snapshot


@pytest.mark.parametrize("format", ["concise", "github"])
def test_every_norm_with_its_file(format: str, snapshot: object) -> None:
    assert written(format, [KEPT, FEW, LOST, Result(None, (), KEPT.refusals[:1], FAILED)]) == snapshot


def test_totals_count_every_norm() -> None:
    text = written("full")
    assert f"folded {53 + 3 + 53} of {53 + 6 + 53} norms in 3 files, kept 3" in text
    assert "1 of 4 files NOT written: broken.pt · 1 of 4 files failed: cut.pt" in text
    assert "outputs within" not in text  # one proof failed: no word of praise for all
    assert "note: input 1x3x224x224, by timm's default_cfg" in text  # of all that came out
    assert "note: few.pt: took 'ema'" in text


def test_a_norm_that_became_a_multiply_add_is_not_called_folded() -> None:
    affines = [
        Edit(
            "affine",
            f"mix{n}",
            "BatchNorm2d(8)",
            "one multiply-add per channel (not folded: why)",
            noise_ratio=float(n),
        )
        for n in range(4)
    ]
    baked = Edit("bake", "conv", "ParametrizedConv2d", "Conv2d with the weight as computed")
    value = Result(None, (*FEW.edits, *affines, baked), FEW.refusals, FEW.parity)
    text = to_text(value, width=200)
    assert "folded 3 of 10 norms, 4 became multiply-adds, kept 3" in text
    row = next(line for line in text.splitlines() if "mix0, mix1, mix2, mix3" in line)
    assert "4 × BatchNorm2d" in row
    assert row.split()[-1] == "3.0"  # the worst of the four
    assert "baked: Conv2d with the weight as computed" in text
    together = written("full", [value, value], [about("a.pt"), about("b.pt")])
    assert "folded 6 of 20 norms in 2 files, 8 became multiply-adds, kept 6" in together
    assert "mix0, mix1, mix2, mix3: affine: one multiply-add per channel (not folded: why)" in together


def test_files_in_a_table(snapshot: object) -> None:
    said = [About("bnfix info", v.path) for v in (WEIGHTS, EVIL)]
    assert written("full", [WEIGHTS, EVIL], said) == snapshot


@pytest.mark.parametrize("format", FORMATS)
def test_names_that_a_terminal_would_obey_are_written_out(format: str) -> None:
    name = "\x1b[31mred\u202e.pt"
    lost = Failure(name, "LoadError", f"{name} is \x07 odd")
    text = written(format, [FEW, lost], [about("few.pt"), About("bnfix fold", name, failed=True)])
    assert "\x1b" not in text
    assert "\u202e" not in text
    assert "\x07" not in text


def test_all_failed() -> None:
    text = written("full", [LOST, LOST], [About("x", "cut.pt", failed=True), About("x", "cut2.pt", failed=True)])
    assert "✗ 2 of 2 files failed: cut.pt, cut2.pt" in text
    document = json.loads(written("json", [LOST, LOST], [About("x", "cut.pt")] * 2))
    assert [v["type"] for v in document["values"]] == ["Failure", "Failure"]


def test_a_failure_by_itself() -> None:
    assert "error: cut.pt is cut off" in to_text(LOST)
    assert "copy it again" in to_text(LOST)
