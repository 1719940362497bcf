"""torch.compile: nothing breaks, updates are counted, and the report says what was not seen."""

from __future__ import annotations

import pytest
import torch
import torch._dynamo
from loop_nets import conv_net, images, sgd, step, train, watch
from torch import nn
from torch._dynamo.testing import CompileCounter


@pytest.fixture(autouse=True)
def _fresh() -> None:
    torch._dynamo.reset()


@pytest.mark.parametrize("compiled", ["before", "inside"])
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_model(compiled: str, backend: str) -> None:
    """fullgraph=True: a hook that a graph could see would break it."""
    model, plain = conv_net(), conv_net()
    fast = torch.compile(model, backend=backend, fullgraph=True)
    if compiled == "before":
        fast(images())
        plain(images())
        plain.load_state_dict(model.state_dict())
    optimizer, other = sgd(model), sgd(plain)
    torch.manual_seed(1)
    with watch(fast, optimizer) as w:
        train(fast, optimizer, 6)
    torch.manual_seed(1)
    train(plain, other, 6)
    for a, b in zip(model.state_dict().values(), plain.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b)
    report = w.report()
    assert not report.findings
    assert all((n.updates, n.counted, n.unseen) == (0, 6, 6) for n in w.log.norms)
    assert any("18 updates of 3 norms were counted and not seen" in note for note in report.notes)
    assert {s.code for s in report.skipped} >= {"BN401", "BN402"}


def test_hooks_do_not_split_a_graph_or_stay_in_it() -> None:
    model = conv_net()
    counter = CompileCounter()
    fast = torch.compile(model, backend=counter)
    optimizer = sgd(model)
    with watch(model, optimizer):
        train(fast, optimizer, 3)
        assert counter.frame_count == 1
    train(fast, optimizer, 2)
    assert counter.frame_count <= 2


def test_a_model_that_is_compiled_in_part() -> None:
    model = conv_net()
    mixed = nn.Sequential(torch.compile(model[:6], backend="eager"), model[6:])
    optimizer = sgd(model)
    with watch(mixed, optimizer) as w:
        for _ in range(6):
            step(optimizer, mixed(images()))
    assert sorted((n.updates, n.unseen) for n in w.log.norms) == [(0, 6), (0, 6), (6, 0)]


def test_module_compile_in_place() -> None:
    model = conv_net()
    model.compile(backend="eager")
    optimizer = sgd(model)
    with watch(model, optimizer) as w:
        train(model, optimizer, 4)
    assert all(n.unseen == 4 for n in w.log.norms)


def test_export_within_a_watch() -> None:
    model = conv_net()
    with watch(model):
        program = torch.export.export(model.eval(), (images(2),), strict=False)
        x = images(2)
        torch.testing.assert_close(program.module()(x), model(x))
