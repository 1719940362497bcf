"""On a GPU: the rules on data and the watch say what they say on the CPU, and leave the model as it was."""

from __future__ import annotations

import copy

import pytest
import torch
from nets import lived_in
from rules.data_common import DATA_RULES, alarms, checked, codes, untouched
from torch import nn

import bnfix
from bnfix.rules.judging import rule_of
from bnfix.rules.rule import Case

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def said(case: Case) -> list[tuple[str, str, tuple[str, ...]]]:
    return [(f.code, f.severity, f.sites) for f in alarms(checked(case))]


@pytest.mark.gpu
@pytest.mark.parametrize("code", DATA_RULES)
def test_a_rule_on_data_says_the_same_as_on_the_cpu(code: str) -> None:
    """The data stays on the CPU: it is brought to the model's device, as for ``recalibrate``."""
    rule = rule_of(code)
    assert rule is not None
    for case in (rule.bad(), rule.good()):
        here = said(case)
        case.model = copy.deepcopy(case.model).cuda()
        with untouched(case.model):
            assert said(case) == here


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("forgotten", [True, False])
def test_watch_follows_a_loop(device: str, forgotten: bool) -> None:
    """Validation in training mode is found where the parameters live, and a loop that is right stays silent."""
    torch.manual_seed(0)
    model = lived_in(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8, 4)))
    model = model.train().to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with bnfix.watch(model, optimizer) as w:
        for _ in range(3):  # epochs: what comes behind the last step might be meant, as update_bn is
            for _ in range(6):
                optimizer.zero_grad()
                images, labels = torch.randn(16, 3, 3, 3, device=device), torch.randint(4, (16,), device=device)
                nn.functional.cross_entropy(model(images), labels).backward()
                optimizer.step()
            model.train(forgotten)
            for _ in range(4):
                with torch.no_grad():
                    model(torch.randn(16, 3, 3, 3, device=device) + 3)
            model.train()
    assert codes(w.report()) == ({"BN402"} if forgotten else set())
