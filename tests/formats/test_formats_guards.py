"""Conditions on sizes that torch writes into an exported program: they are run, so each name in them is looked at."""

from __future__ import annotations

import importlib.util
import json
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from nets import lived_in
from torch import nn

import bnfix
from bnfix.errors import UntrustedModelError
from bnfix.formats import sniff
from bnfix.formats.programs import _harmless


def program_of_many_sizes() -> Any:
    """Batch, height and width vary: torch asserts that the maps of its convolutions are not empty."""
    torch.manual_seed(0)
    layers = (nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 32, 3, 2), nn.BatchNorm2d(32))
    model = lived_in(nn.Sequential(*layers, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 4))).eval()
    sizes = ({0: torch.export.Dim.AUTO, 2: torch.export.Dim.AUTO, 3: torch.export.Dim.AUTO},)
    return model, torch.export.export(model, (torch.randn(4, 3, 16, 16),), dynamic_shapes=sizes)


def test_a_program_of_many_sizes_needs_no_trust(tmp_path: Path) -> None:
    """Neither as it was exported nor with its norms swapped; at sizes that it was not exported with."""
    model, program = program_of_many_sizes()
    torch.export.save(program, tmp_path / "m.pt2")
    info = sniff(tmp_path / "m.pt2")
    assert (info.names_code, info.dangerous, info.loadable) == ((), (), True)
    data = [torch.randn(8, 3, 16, 16) for _ in range(4)]
    swapped = bnfix.swap(model, "group", data=data, groups=4).model
    again = torch.export.export(swapped, (data[0],), dynamic_shapes=program_sizes())
    bnfix.save(again, tmp_path / "s.pt2")
    assert sniff(tmp_path / "s.pt2").names_code == ()
    x = torch.randn(3, 3, 21, 34)
    with torch.no_grad():
        for name, expected in (("m.pt2", model(x)), ("s.pt2", swapped(x))):
            loaded = bnfix.load(tmp_path / name).module()
            # the same kernels on the same numbers; a few roundings where the program takes the norm apart
            torch.testing.assert_close(loaded(x), expected, rtol=1e-5, atol=1e-6)


def program_sizes() -> Any:
    return ({0: torch.export.Dim.AUTO, 2: torch.export.Dim.AUTO, 3: torch.export.Dim.AUTO},)


def test_what_torch_writes_into_conditions_is_arithmetic() -> None:
    size = "L['x'].size()[2]"
    for text in (
        f"torch.sym_max(1, (-2) + {size})*torch.sym_max(1, {size}) != 1",
        f"torch.sym_min({size}, 3) < math.floor({size} / 2)",
        f"math.ceil({size} / 2) >= math.trunc({size} / 2)",
        f"torch._sym_sqrt(torch.sym_float({size})) < 9",
    ):
        assert _harmless(text, guard=True), text
        assert not _harmless(text, guard=False), text  # expressions of sizes are written otherwise


@pytest.mark.parametrize(
    "text",
    [
        "torch.load('x') == 1",
        "torch.serialization.os.system('x') == 0",
        "torch.sym_max.__globals__ == 1",
        "torch.sym_max.__class__(1) == 1",
        "L['x'].torch.sym_max(1, 2) == 1",
        "L.sym_max(1, 2) == 1",
        "math.factorial(9) == 1",
        "math.__loader__ == 1",
        "torch.sym_max(1, torch.load('x')) == 1",
        "torch.sym_max(1, 2, key=print('x')) == 1",
        "torch.size.sym_max(1, 2) == 1",
        "torch.jit.load('x') == 1",
        "getattr(torch, 'sym_max')(1, 2) == 1",
        "(lambda: 1)() == 1",
    ],
)
def test_what_goes_beyond_needs_trust(text: str, tmp_path: Path) -> None:
    assert not _harmless(text, guard=True)
    if importlib.util.find_spec("torch.export.pt2_archive") is None:
        return  # torch 2.7 writes another layout
    _, program = program_of_many_sizes()
    torch.export.save(program, tmp_path / "m.pt2")
    with zipfile.ZipFile(tmp_path / "m.pt2") as file:
        members = {n: file.read(n) for n in file.namelist()}
    (name,) = (n for n in members if n.endswith("models/model.json"))
    graph = json.loads(members[name])
    graph["guards_code"] = [text]
    members[name] = json.dumps(graph).encode()
    with zipfile.ZipFile(tmp_path / "e.pt2", "w") as file:
        for member, content in members.items():
            file.writestr(member, content)
    with pytest.raises(UntrustedModelError, match="more than a graph and tensors"):
        bnfix.load(tmp_path / "e.pt2")
