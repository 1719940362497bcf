"""What ``bnfix check`` says to type for a fix."""

from __future__ import annotations

import shlex
from dataclasses import replace

import pytest

from bnfix.cli.fix_lines import line_of
from bnfix.cli.options import Asked
from bnfix.types import FileInfo, Fix, Safety


@pytest.mark.parametrize(
    ("fix", "line"),
    [
        (Fix("recalibrate", "t"), "bnfix recalibrate m.pt --trust --data d.py:f --forward 'lambda m, b: m(b)'"),
        (Fix("recalibrate", "t", options={"include_frozen": True}), "--mask k --include-frozen -o m-recalibrated.pt"),
        (Fix("set", "t", ("a",), {"momentum": 0.1}), "bnfix check m.pt --trust --input 1x3 --data d.py:f"),
        (Fix("float", "t", ("a",)), "--select BN107 --fix -o m-fixed.pt"),
        (Fix("fold", "t"), "bnfix fold m.pt --trust --input 1x3 --forward 'lambda m, b: m(b)' -o m-folded.pt"),
        (Fix("reset", "t", safety=Safety.NEEDS_DATA), "check m.pt --trust --input 1x3 --data d.py:f"),
        (Fix("code", "t"), ""),
    ],
)
def test_the_line_of_a_fix(fix: Fix, line: str) -> None:
    asked = Asked("m.pt", trust=True, input=("1x3",), data="d.py:f", forward="lambda m, b: m(b)")
    info = FileInfo("m.pt", "pickled_module", "zip", 1, "a module", True)
    said = line_of(asked, fix, "BN107", info, mask="k")
    assert line in said
    assert bool(said) is bool(line)
    if fix.verb in ("set", "float", "reset"):  # a file of weights does not hold what they change
        assert line_of(asked, fix, "BN107", replace(info, kind="state_dict")) == ""


def test_the_line_of_a_swap_names_its_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bnfix.cli.fix_lines._is_command", lambda verb: True)
    fix = Fix("swap", "t", options={"to": "group", "only": ("a.bn", "b.bn")})
    words = shlex.split(line_of(Asked("m.pt2"), fix, "BN301", None))
    assert words == [
        "bnfix",
        "swap",
        "m.pt2",
        "--data",
        "train_images/",
        "--to",
        "group",
        "--only",
        r"^(a\.bn|b\.bn)$",
        "-o",
        "m-swapped.pt2",
    ]
    words = shlex.split(line_of(Asked("m.pt2", input=("1x3",), data="d.py:f"), fix, "BN301", None))
    assert words[:5] == ["bnfix", "swap", "m.pt2", "--data", "d.py:f"]  # a shape alone fits nothing


def test_an_onnx_file_is_exported_again_from_what_it_was_compared_with() -> None:
    asked, fix = Asked("m.onnx", arch="net.py:Net", input=("4x1x8x8",)), Fix("code", "export again")
    assert line_of(asked, fix, "BN504", None) == ""
    said = line_of(asked, fix, "BN504", None, reference="weights.pt")
    assert said == "bnfix export weights.pt --arch net.py:Net --input 4x1x8x8 -o m-exported.onnx"
