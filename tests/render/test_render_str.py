"""``print(value)`` is the report; ``repr`` stays the whole value."""

from __future__ import annotations

import pytest
from render_values import EVERY, EVIL, FEW, PASSED, WEIGHTS

from bnfix.render import to_text
from bnfix.types import FileInfo


@pytest.mark.parametrize("name", EVERY)
def test_print_gives_the_report_in_100_columns(name: str) -> None:
    value = EVERY[name]
    text = str(value)
    assert text == to_text(value)
    assert "\x1b" not in text
    assert type(value).__name__ + "(" not in text
    pasted = [line for line in text.splitlines() if "bnfix " in line]
    assert all(len(line) <= 100 for line in text.splitlines() if line not in pasted)
    assert repr(value).startswith(type(value).__name__ + "(")


def test_what_the_report_says() -> None:
    assert "✓ folded 3 of 6 norms, kept 3" in str(FEW)
    assert "kept: conv has 2 users: layer1.add, aux" in str(FEW)
    assert "✓ passed · outputs within 1.3 ×" in str(PASSED)
    assert "must not be loaded" in str(EVIL)


def test_an_edit_a_refusal_and_an_output_are_one_line() -> None:
    assert str(FEW.edits[0]) == "bn1: BatchNorm2d(64, eps=1e-05) folded into conv1, gains bias (0.50 ulp, 1.1 x noise)"
    assert str(FEW.refusals[0]) == "layer2.bn: kept: conv has 2 users: layer1.add, aux"
    assert str(PASSED.outputs[0]).startswith("output: passed noise_ratio=1.3 ")
    assert "bn1" in FEW.edits[0]._repr_html_()


def _info(kind: str, container: str, size: int = 9, **more: object) -> str:
    return str(FileInfo("f", kind, container, size, f"a {kind}", True, **more))  # type: ignore[arg-type]


def test_facts_are_said_not_printed_as_python() -> None:
    text = _info("onnx", "protobuf", facts={"ops": {"Conv": 6, "Relu": 1200}, "keys": ("a", "b"), "opset": 18})
    assert "6 Conv, 1,200 Relu" in text
    assert "a, b" in text
    assert not set("{}()'\"[]") & set(text.replace("(protobuf)", ""))
    assert "for bnfix verify" in text
    assert "can be loaded" not in text


def test_training_mode_is_a_hint_and_evaluation_mode_goes_without_saying() -> None:
    assert "note: it was saved in training mode" in _info("pickled_module", "zip", facts={"training": True})
    assert "training" not in _info("pickled_module", "zip", facts={"training": False})


def test_the_container_is_named_where_it_says_something() -> None:
    assert "state_dict (zip), 9 bytes" in _info("state_dict", "zip")
    assert "empty, 0 bytes" in _info("empty", "nothing", 0)
    assert "safetensors, 9 bytes" in _info("safetensors", "safetensors")


def test_a_long_label_stands_above_what_is_to_be_pasted() -> None:
    line = "bnfix fold w.pt --arch timm:resnet50 -o w-folded.pt"
    text = _info("state_dict", "zip", advice=f"say which architecture, for example   {line}")
    assert text.splitlines()[-2:] == ["  say which architecture, for example:", f"    {line}"]
    assert "next  bnfix fold weights.pt" in str(WEIGHTS)
