"""The guide says what is so: its code runs, its tables name what there is."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from swaps.swap_nets import Head, batches, fitted

import bnfix
from bnfix.api import checking
from bnfix.render import to_text
from bnfix.swaps import all_targets
from bnfix.types import Diagnosis, Edit, Finding, Fix, Refusal, Result

GUIDE = (Path(bnfix.__file__).parent / "docs" / "swapping.md").read_text(encoding="utf-8")
DATA = batches(8, 3, 8, 8)


def test_the_code_of_the_guide_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    finding = Finding("BN301", "too-few-values", "error", "…", ("top",), Fix("swap", "…", sites=("top",)))
    monkeypatch.setattr(checking, "check", lambda *_a, **_k: Diagnosis((finding,), checked=("BN301",)))
    space: dict[str, Any] = {
        "bnfix": bnfix, "model": fitted(Head(64), DATA), "loader": DATA, "make_model": lambda: Head(64),
    }  # fmt: skip
    blocks = re.findall(r"```python\n(.*?)```", GUIDE, re.DOTALL)
    assert len(blocks) == 3
    for block in (blocks[0], blocks[2], blocks[1]):  # the file is of the first result
        exec(compile(block, "swapping.md", "exec"), space)
    assert type(space["new"].bn).__name__ == "GroupNorm"
    assert [e.site for e in space["result"].edits] == ["top"]


def test_the_guide_names_every_target() -> None:
    for name in all_targets():
        assert f'| `"{name}"` |' in GUIDE


def result(**more: Any) -> Result:
    calls = ("neck.bn", "neck.bn@1")
    edits = (
        Edit("swap", "stem.1", "BatchNorm2d(16, eps=1e-05)", "GroupNorm(2, 16, eps=1e-05)", ("stem.1",), r2=0.9987),
        Edit("swap", "neck.bn", "BatchNorm2d(8, eps=0.001)", "GroupNorm(1, 8, eps=0.001)", calls, r2=0.41),
    )
    refusal = Refusal("head.bn", "mean and variance of 8 values", ("head.bn",), before="BatchNorm1d(8, eps=1e-05)")
    return Result(None, edits, (refusal,), notes=("calibrated on 512 samples",), verb="swap", **more)


def test_how_it_is_shown() -> None:
    said = " ".join(to_text(result()).split())
    assert "swapped 2 of 3 norms for GroupNorm, kept 1 · R² 0.41 at neck.bn (2 calls), the lowest" in said
    assert "now GroupNorm(2, 16)" in said
    assert "0.999" in said
    assert "now GroupNorm(1, 8, eps=0.001)" in said
    assert "kept: mean and variance of 8 values" in said
    assert "calibrated on 512 samples" in said
    assert "? swapped" in said  # not a green light
    assert "R² is below 0.5 at 1 norm: more is lost there than kept, so train the new model further; where one" in said
    assert "fold" not in said
    plan = " ".join(to_text(result(dry_run=True)).split())
    assert "would swap 2 of 3 norms" in plan
    assert "would be GroupNorm(2, 16)" in plan
    assert "nothing changed, this is the plan" in plan


def test_many_norms_are_told_by_the_part_of_the_model() -> None:
    was, now = "BatchNorm2d(16, eps=1e-05)", "GroupNorm(2, 16, eps=1e-05)"
    edits = tuple(Edit("swap", f"layer{i // 10}.{i}.bn", was, now, r2=0.9 + i / 1000) for i in range(40))
    said = to_text(Result(None, edits, (), verb="swap"))
    assert "layer0.0.bn … layer0.9.bn (10 norms)" in said
    assert "now 10 × GroupNorm" in said
    assert "R² 0.90 at layer0.0.bn, the lowest" in said
    assert "✓ swapped" in said
    assert "is below" not in said
    assert to_text(Result(None, (), (), verb="swap")).strip().endswith("found no norm to swap")
