"""Healthy models stay clean: a dozen public architectures in CI, all of them in benchmarks/bench_check_clean.py."""

from __future__ import annotations

import pytest
import torch
from benchmarks.bench_check_clean import build, example
from nets import lived_in
from torch import nn

import bnfix
from bnfix.types import Diagnosis

STRUCTURE = (
    "tv:resnet18", "tv:densenet121", "tv:efficientnet_b0", "tv:mobilenet_v3_small", "tv:mnasnet0_5",
    "tv:regnet_y_400mf", "tv:inception_v3", "tv:vgg11_bn", "tv:retinanet_resnet50_fpn", "tv:fcos_resnet50_fpn",
    "tv:maskrcnn_resnet50_fpn", "tv:ssdlite320_mobilenet_v3_large", "tv:deeplabv3_resnet50", "tv:r3d_18",
    "levit_128s", "repvgg_a0", "tf_efficientnet_lite0", "resnetv2_18", "fastvit_t8",
)  # fmt: skip
TRACED = ("tv:googlenet", "mobilenetv3_small_050", "resnet10t", "tv:deeplabv3_mobilenet_v3_large")
GRAPH = {"BN102", "BN103", "BN104", "BN109"}


def worst(said: Diagnosis) -> list[str]:
    return [f"{f.code} {f.severity}: {f.message}" for f in said.findings if f.severity != "info"]


@pytest.mark.parametrize("name", STRUCTURE)
def test_structure_and_values_of_public_architectures(name: str) -> None:
    model = build(name)
    fresh = bnfix.check(model)
    assert fresh.norms >= 8
    assert worst(fresh) == []
    assert {f.code for f in fresh.findings} <= {"BN202"}  # untrained: that is information
    used = bnfix.check(lived_in(model))
    assert used.findings == ()
    assert {"BN101", "BN104", "BN105", "BN106", "BN107", "BN201", "BN202", "BN203", "BN206"} <= set(used.checked)


@pytest.mark.parametrize("name", TRACED)
def test_the_graph_of_public_architectures(name: str) -> None:
    model = build(name)
    used = bnfix.check(lived_in(model), example(name, model))
    assert used.findings == ()
    assert set(used.checked) >= GRAPH
    assert not [s for s in used.skipped if s.code in GRAPH]


def test_a_batch_of_one_is_enough_also_where_training_needs_two() -> None:
    """DeepLab pools to 1 by 1 in front of a norm: one image has one value a channel there, and training refuses it."""
    model = lived_in(build("tv:deeplabv3_mobilenet_v3_large"))
    with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
        model.train()(torch.randn(1, 3, 64, 64))
    said = bnfix.check(lived_in(model), torch.randn(1, 3, 64, 64))
    assert said.findings == ()
    assert not [s for s in said.skipped if s.code in GRAPH]


def test_a_detector_says_what_was_not_looked_at() -> None:
    model = build("tv:fasterrcnn_mobilenet_v3_large_320_fpn")
    assert isinstance(model, nn.Module)
    said = bnfix.check(lived_in(model), ([torch.rand(3, 64, 64)],))
    assert worst(said) == []
    skipped = {s.code: s.reason for s in said.skipped}
    assert "targets should not be none" in skipped["BN109"]
    assert set(said.checked) >= GRAPH
