"""Models that draw random numbers in evaluation: nothing can be said of what depends on them."""

from __future__ import annotations

import random

import pytest
import torch
from parity_models import small
from torch import nn

from bnfix.parity import compare, compare_sites, export_onnx, record, references, verify
from bnfix.running import Call


class Noisy(nn.Module):
    def forward(self, x):
        return x + torch.randn_like(x)


class Drops(nn.Module):
    def forward(self, x):
        return nn.functional.dropout(x, 0.5)


class Python(nn.Module):
    def forward(self, x):
        return x * random.random()


class Wasted(nn.Module):
    def forward(self, x):
        torch.randn_like(x)
        return x


class Pair(nn.Module):
    """One output depends on chance, the other does not."""

    def __init__(self):
        super().__init__()
        self.body = small()
        self.noise = Noisy()

    def forward(self, x):
        y = self.body(x)
        return y, self.noise(y)


X = Call((torch.randn(3, 3, 12, 12, generator=torch.Generator().manual_seed(0)),))


@pytest.mark.parametrize(
    ("layer", "where"),
    [(Noisy(), "aten.randn_like at 1"), (Drops(), "aten.bernoulli_ at 1"), (Python(), "from random")],
)
def test_a_model_that_draws_is_inconclusive_also_against_itself(layer, where):
    # with the same seed both runs draw the same: a pass that says nothing
    model = nn.Sequential(small(), layer).eval()
    found = verify(model, model, [X])
    assert found.verdict == "inconclusive"
    assert found.outputs[0].reason == (
        f"the model draws random numbers in its forward ({where}): two runs of it differ"
    )


def test_an_exported_model_that_draws_is_inconclusive_and_not_failed(tmp_path):
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    found = export_onnx(nn.Sequential(small(), Noisy()).eval(), tmp_path / "m.onnx", X)
    assert found.parity is not None
    assert found.parity.verdict == "inconclusive"
    assert "aten.randn_like at 1" in found.parity.outputs[0].reason
    assert found.files == (str(tmp_path / "m.onnx"),)


def test_only_what_depends_on_chance_is_inconclusive():
    model, wrong = Pair().eval(), Pair().eval()
    wrong.body[4].running_var[2] *= 1.05
    found = {o.name: o.verdict for o in verify(model, model, [X]).outputs}
    assert found == {"out[0]": "passed", "out[1]": "inconclusive"}
    assert {o.name: o.verdict for o in verify(model, wrong, [X]).outputs}["out[0]"] == "failed"
    refs = references(model, [X], sites=["body", "noise"])
    sites = compare_sites(refs, [record(model, X, ["body", "noise"])])
    assert {o.name: o.verdict for o in sites} == {"body": "passed", "noise": "inconclusive"}


def test_numbers_that_are_drawn_and_thrown_away_are_no_matter():
    model = nn.Sequential(small(), Wasted()).eval()
    refs = references(model, [X])
    assert refs[0].chance == ""
    assert compare(refs, [record(model, X)]).verdict == "passed"


def test_the_generators_are_left_as_they_were():
    model = nn.Sequential(small(), Noisy(), Python()).eval()
    before = torch.get_rng_state(), random.getstate()
    references(model, [X])
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
