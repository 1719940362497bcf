"""Ways to train that a guard could stumble over."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from loop_nets import bad, codes, conv_net, images, loader, sgd, step, train, watch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from bnfix.loop import tally as tally_module


def test_no_optimizer_of_torch() -> None:
    """Weights that are changed by hand tell where a step ends."""
    model = conv_net()
    with watch(model) as w:
        for _ in range(20):
            out = model(images()), model(images(shift=3.0))
            torch.stack([o.square().mean() for o in out]).sum().backward()
            with torch.no_grad():
                for p in model.parameters():
                    p -= 0.05 * p.grad
                    p.grad = None
    report = w.report()
    assert bad(report) == {"BN303", "BN401"}
    assert 18 <= w.log.steps <= 20
    assert any("no step of a torch optimizer was seen" in note for note in report.notes)


def test_optimizer_not_given_is_heard_all_the_same() -> None:
    model = conv_net()
    optimizer = sgd(model)
    with watch(model) as w:
        train(model, optimizer, 5)
    assert (w.log.steps, w.log.optimizers) == (5, 1)


def test_several_optimizers_that_step_together_are_one_step() -> None:
    model = conv_net()
    optimizers = [sgd(model[:6]), sgd(model[6:])]
    with watch(model, optimizers) as w:
        for _ in range(16):
            for o in optimizers:
                o.zero_grad()
            (model(images()) - model(images(shift=3.0))).square().mean().backward()
            for o in optimizers:
                o.step()
    assert w.log.steps == 16
    assert all(n.per_step == {2: 16} and not n.foreign for n in w.log.norms)
    assert bad(w.report()) == {"BN303", "BN401"}


@pytest.mark.parametrize("checkpointed", [False, True])
def test_optimizer_steps_inside_the_backward_pass(checkpointed: bool) -> None:
    """One optimizer a parameter, stepping as soon as its gradient is there."""
    model = conv_net()
    optimizers = {p: torch.optim.SGD([p], 0.05) for p in model.parameters()}

    def go(p: Tensor) -> None:
        optimizers[p].step()  # type: ignore[index]
        optimizers[p].zero_grad()  # type: ignore[index]

    handles = [p.register_post_accumulate_grad_hook(go) for p in model.parameters()]
    with watch(model) as w:
        for _ in range(6):
            x = images().requires_grad_()
            out = model[6:](checkpoint(model[:6], x, use_reentrant=False)) if checkpointed else model(x)
            out.square().mean().backward()
    for h in handles:
        h.remove()
    assert w.log.steps == 6
    assert codes(w.report()) == ({"BN404"} if checkpointed else set())


def test_mixed_precision() -> None:
    model = conv_net()
    optimizer = sgd(model)
    scaler = torch.amp.GradScaler("cpu")
    with watch(model, optimizer) as w:
        for i in range(20):
            optimizer.zero_grad()
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = (model(images()) - model(images(shift=3.0))).square().mean()
            scaler.scale(loss * (torch.inf if i == 5 else 1)).backward()  # one step is skipped
            scaler.step(optimizer)
            scaler.update()
    assert w.log.steps == 19
    assert bad(w.report()) == {"BN303", "BN401"}


def test_lazy_layers() -> None:
    model = nn.Sequential(nn.LazyConv2d(8, 3), nn.LazyBatchNorm2d(), nn.Flatten(), nn.LazyLinear(2))
    with watch(model) as w:
        model(images())
        optimizer = sgd(model)
        train(model, optimizer, 4)
    assert not w.report().notes
    assert w.log.norms[0].updates == 5
    assert w.log.norms[0].channels == 8


def test_parametrized_weight() -> None:
    """A parametrization takes the weight out of the module's own table."""

    class Positive(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.softplus(x)

    model = conv_net()
    torch.nn.utils.parametrize.register_parametrization(model[1], "weight", Positive())
    optimizer = sgd(model)
    with watch(model, optimizer) as w:
        train(model, optimizer, 4)
    report = w.report()
    assert not report.findings
    assert not report.notes
    assert all(n.updates == 4 for n in w.log.norms)


def test_functional_call_with_other_buffers() -> None:
    """What MAML and torch.func do: parameters and buffers are handed in, those of the module stay as they are."""
    model = conv_net()
    optimizer = sgd(model)
    with watch(model, optimizer) as w:
        for _ in range(4):
            params = {k: v.detach().clone().requires_grad_() for k, v in model.named_parameters()}
            buffers = {k: v.clone() for k, v in model.named_buffers()}

            def loss(p: dict[str, Tensor], b: dict[str, Tensor], x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
                return torch.func.functional_call(model, (p, b), (x,)).square().mean(), b

            torch.func.grad(loss, has_aux=True)(params, buffers, images())
            torch.func.grad(loss, has_aux=True)(params, buffers, images())
            step(optimizer, model(images()))
    report = w.report()
    assert report.clean
    assert not report.notes


def test_affine_false_and_cumulative_momentum() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8, affine=False, momentum=None), nn.Linear(8, 2))
    optimizer = sgd(model)
    with watch(model, optimizer) as w:
        for _ in range(16):
            step(optimizer, model(torch.randn(64, 8)), model(torch.randn(64, 8) + 3))
    assert bad(w.report()) == {"BN303", "BN401"}
    assert w.log.norms[0].patterns[0].pairs[0].shift > 1


def test_statistics_that_are_switched_off_for_a_while() -> None:
    """VAT's _disable_tracking_bn_stats: nothing is learned then, nothing is counted."""
    model = conv_net()
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    optimizer = sgd(model)
    with watch(model, optimizer) as w:
        for _ in range(6):
            for m in norms:
                m.track_running_stats = False
            with torch.no_grad():
                target = model(images())
            for m in norms:
                m.track_running_stats = True
            step(optimizer, model(images()) - target)
    assert not w.report().findings
    assert all((n.updates, n.without_grad, n.unseen) == (6, 0, 0) for n in w.log.norms)


def test_norms_that_are_exchanged_inside() -> None:
    model = conv_net()
    with watch(model, sgd(model)) as w:
        model[1] = nn.BatchNorm2d(8)
        train(model, sgd(model), 3)
    assert any("1 norms were put into the model" in note for note in w.report().notes)


def test_an_error_of_the_guard_does_not_end_the_training(monkeypatch: pytest.MonkeyPatch) -> None:
    model = conv_net()
    optimizer = sgd(model)
    calls: list[int] = []

    def fails(*args: Any) -> None:
        calls.append(1)
        if len(calls) > 8:
            raise ZeroDivisionError("a bug of bnfix")

    monkeypatch.setattr(tally_module, "sample", fails)
    with watch(model, optimizer) as w:
        train(model, optimizer, 6)
        assert all(not m._forward_pre_hooks for m in model.modules())
    report = w.report()
    assert any("the watch gave up in step 2: ZeroDivisionError: a bug of bnfix" in note for note in report.notes)
    assert report.skipped


def test_model_in_double_precision_and_channels_last() -> None:
    model = conv_net().double().to(memory_format=torch.channels_last)
    optimizer = sgd(model)
    with watch(model, optimizer) as w:
        for _ in range(16):
            one, other = (images(16, s).double().to(memory_format=torch.channels_last) for s in (0.0, 3.0))
            step(optimizer, model(one), model(other))
    assert bad(w.report()) == {"BN303", "BN401"}


def test_weight_tied_norm_under_two_names_is_one() -> None:
    norm = nn.BatchNorm1d(8)
    model = nn.Sequential(nn.Linear(8, 8), norm, nn.Linear(8, 8), norm)
    optimizer = sgd(model)
    with watch(model, optimizer) as w:
        for _ in range(16):
            step(optimizer, model(torch.randn(64, 8)))
    (seen,) = w.log.norms
    assert seen.paths == ("1", "3")
    assert seen.per_step == {2: 16}
    assert [s.name for s in seen.patterns[0].sites] == ["1", "1@1"]


def test_norms_in_a_plain_list() -> None:
    class Hidden(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = [conv_net()]

        def forward(self, x: Tensor) -> Tensor:
            return self.layers[0](x)

    model = Hidden()
    optimizer = sgd(model.layers[0])
    with watch(model, optimizer) as w:
        train(model, optimizer, 3)
    assert all(n.updates == 3 for n in w.log.norms)
    assert len(w.log.norms) == 3


def test_many_forwards_in_one_step_stay_cheap() -> None:
    """A recurrence over 200 steps: 16 of them are looked at, all are counted."""
    model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8))
    optimizer = sgd(model)
    with watch(model, optimizer) as w:
        for _ in range(4):
            x = torch.randn(64, 8)
            for _ in range(200):
                x = model(x)
            step(optimizer, x)
    assert w.log.norms[0].updates == 800
    assert all(len(p.sites) <= 16 for p in w.log.norms[0].patterns)
    assert list(loader(0)) == []


def test_a_scripted_model() -> None:
    model = torch.jit.script(nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 1)))
    optimizer = sgd(model)
    with watch(model, optimizer) as w:
        for _ in range(4):
            step(optimizer, model(torch.randn(64, 8)))
    report = w.report()
    assert not report.findings
    assert report.notes


def test_tracing_within_a_watch_records_nothing_of_it() -> None:
    """TensorBoard's add_graph traces; FLOPs are counted, graphs are made: with the same result as without a watch."""

    def results(model: nn.Module) -> tuple[list[str], list[str], dict[str, int]]:
        x = torch.ones(2, 3, 8, 8)
        traced = [n.kind() for n in torch.jit.trace(model, x, check_trace=False).inlined_graph.nodes()]
        made = [str(n.target) for n in make_fx(model)(x).graph.nodes]
        with FlopCounterMode(display=False) as counter:
            model(x)
        return traced, made, {str(k): v for k, v in counter.get_flop_counts()["Global"].items()}

    model = conv_net()
    plain = results(model)
    optimizer = sgd(model)
    with watch(model, optimizer) as w:
        for _ in range(3):
            step(optimizer, model(images()), model(images()))
        assert results(model) == plain
        step(optimizer, model(images()), model(images()))
    assert not w.report().notes


def test_an_optimizer_that_is_gone_at_the_end() -> None:
    """Who held what is known all the same: a frozen norm beside trained layers is no teacher."""
    model = conv_net()
    for m in model.modules():
        if isinstance(m, nn.modules.batchnorm._BatchNorm):
            m.requires_grad_(False)
    with watch(model) as w:
        train(model, sgd(model), 6)
    assert w.log.optimizers == 1
    assert bad(w.report()) == {"BN403"}


@pytest.mark.parametrize("calls", [
    lambda net, xs: tuple(net(x) for x in xs),
    lambda net, xs: list(map(net, xs)),
    lambda net, xs: [net(x) for x in xs],
    lambda net, xs: (net(xs[0]), net(xs[1])),
])  # fmt: skip
def test_an_expression_is_one_place_however_often_it_ran(calls: Any) -> None:
    """CPython replaces instructions by faster ones once they are warm: the same call then has another address."""
    model = conv_net()
    optimizer = sgd(model)
    with watch(model, optimizer) as w:
        for _ in range(16):
            step(optimizer, *calls(model, (images(), images(shift=3.0))))
    (pattern,) = w.log.norms[0].patterns
    assert pattern.steps == 15  # the first step tells that there are several
    assert bad(w.report()) == {"BN303", "BN401"}
