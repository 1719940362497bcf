"""strict=True: the first error is raised where it happens."""

from __future__ import annotations

import traceback

import pytest
import torch
from loop_nets import conv_net, images, sgd, step, train, watch

from bnfix.errors import BnfixError, WatchError


def test_stats_not_loaded_is_raised_at_the_evaluation_that_uses_them() -> None:
    model = conv_net()
    optimizer = sgd(model)
    parameters = {k: p.detach().clone() for k, p in model.named_parameters()}
    w = watch(model, optimizer, strict=True)

    def loop() -> None:
        with w:
            train(model, optimizer, 2)
            model.load_state_dict(parameters, strict=False)
            train(model, optimizer, 1)
            model.eval()
            model(images())  # the line

    with pytest.raises(WatchError, match="BN406") as caught:
        loop()
    assert isinstance(caught.value, BnfixError)
    assert caught.value.finding.code == "BN406"
    frames = traceback.extract_tb(caught.value.__traceback__)
    assert any(f.line == "model(images())  # the line" for f in frames)
    assert not w.report().clean
    assert all(not m._forward_pre_hooks for m in model.modules())


def test_it_is_raised_at_the_end_where_nothing_was_evaluated() -> None:
    model = conv_net()
    optimizer = sgd(model)
    parameters = {k: p.detach().clone() for k, p in model.named_parameters()}

    def loop() -> None:
        with watch(model, optimizer, strict=True):
            model.load_state_dict(parameters, strict=False)
            train(model, optimizer, 2)

    with pytest.raises(WatchError, match="BN406"):
        loop()


def test_load_that_is_healed_passes() -> None:
    model = conv_net()
    optimizer = sgd(model)
    parameters = {k: p.detach().clone() for k, p in model.named_parameters()}
    with watch(model, optimizer, strict=True) as w:
        model.load_state_dict(parameters, strict=False)
        torch.optim.swa_utils.update_bn([images() for _ in range(3)], model)
        model.eval()
        model(images())
    assert w.report().clean


def test_warnings_do_not_raise() -> None:
    model = conv_net()
    optimizer = sgd(model)
    with watch(model, optimizer, strict=True) as w:
        for _ in range(3):
            train(model, optimizer, 4)
            with torch.no_grad():
                model(images())
    assert [f.severity for f in w.report().findings] == ["warning"]


def test_the_users_own_exception_goes_first() -> None:
    model = conv_net()
    parameters = {k: p.detach().clone() for k, p in model.named_parameters()}

    def loop() -> None:
        with watch(model, strict=True):
            model.load_state_dict(parameters, strict=False)
            raise ValueError("mine")

    with pytest.raises(ValueError, match="mine"):
        loop()


def test_call_sites_that_differ_are_raised_at_the_second_branch() -> None:
    """The line of the branch is what the traceback shows, as soon as ten steps were compared."""
    model = conv_net()
    optimizer = sgd(model)
    w = watch(model, optimizer, strict=True)

    def loop() -> None:
        with w:
            for _ in range(40):
                one = model(images())
                other = model(images(shift=3.0))  # the line
                step(optimizer, one, other)

    with pytest.raises(WatchError, match="BN303 call-sites-differ") as caught:
        loop()
    assert any(f.line.endswith("# the line") for f in traceback.extract_tb(caught.value.__traceback__) if f.line)
    assert 10 <= w.log.steps <= 13
