"""The guide does what it says: its blocks of Python run one after the other."""

from __future__ import annotations

import copy
import re
from importlib.resources import files
from typing import Any

import pytest
import torch
from nets import lived_in
from shared_nets import IMAGES, Encoder
from torch import nn

import bnfix

TEXT = (files("bnfix") / "docs" / "sharing.md").read_text(encoding="utf-8")


def test_its_code_runs(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    a, p, n = IMAGES
    loader = [tuple(x + i for x in IMAGES) for i in range(3)]
    space: dict[str, Any] = {"bnfix": bnfix, "nn": nn, "copy": copy, "a": a, "p": p, "n": n, "loader": loader,
                             "Encoder": lambda: lived_in(Encoder())}  # fmt: skip
    space["make_triplet"] = lambda: space["Triplet"](Encoder())
    blocks = re.findall(r"```python\n(.*?)```", TEXT, re.S)
    assert len(blocks) == 5
    for block in blocks:
        exec(block, space)
    result, branch = space["result"], space["branch"]
    assert len(space["report"].layers) == 6
    assert torch.equal(branch(a), result.model(a, p, n)[0])
    assert all(torch.equal(x, y) for x, y in zip(space["model"](a, p, n), result.model(a, p, n), strict=True))
    assert type(space["merged"]).__name__ == "Triplet"


@pytest.mark.parametrize(
    "reason",
    ["what is called several times is the model itself", "how often it is called changes",
     "the model needs it as it is", "keeps no running statistics"],
)  # fmt: skip
def test_its_reasons_are_those_that_are_given(reason: str) -> None:
    import inspect

    from bnfix.sharing import planning, unshare

    source = inspect.getsource(planning) + inspect.getsource(inspect.getmodule(unshare))  # type: ignore[arg-type]
    assert reason in TEXT
    assert reason in source
