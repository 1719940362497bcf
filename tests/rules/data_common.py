"""What tests of the rules on data share: checks of small models, and the proof that nothing was changed."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy
import torch
from nets import bits, same_bits
from torch import nn

import bnfix
from bnfix.rules.rule import Case
from bnfix.types import Diagnosis, Finding

DATA_RULES = ("BN204", "BN205", "BN301", "BN302", "BN303", "BN304", "BN305", "BN306")


def checked(case: Case, **more: Any) -> Diagnosis:
    """What ``check`` says of a case."""
    return bnfix.check(case.model, case.example, data=case.data, role=case.role, **{**(case.options or {}), **more})


def alarms(found: Diagnosis) -> list[Finding]:
    """Errors and warnings."""
    return [f for f in found.findings if f.severity != "info"]


def codes(found: Diagnosis) -> set[str]:
    """The codes of errors and warnings."""
    return {f.code for f in alarms(found)}


def reason(found: Diagnosis, code: str) -> str:
    """Why a rule was skipped; empty where it was not."""
    return next((s.reason for s in found.skipped if s.code == code), "")


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Fails where anything of ``model`` or a random generator is another afterwards, errors inside included."""
    before = bits(model)
    modes = [m.training for m in model.modules()]
    attributes = [{k: id(v) for k, v in m.__dict__.items()} for m in model.modules()]
    grads = [id(p.grad) if p.grad is not None else None for p in model.parameters()]
    states = torch.get_rng_state(), random.getstate(), copy.deepcopy(numpy.random.get_state())
    try:
        yield
    finally:
        assert same_bits(model, before)
        assert modes == [m.training for m in model.modules()]
        assert attributes == [{k: id(v) for k, v in m.__dict__.items()} for m in model.modules()]
        assert grads == [id(p.grad) if p.grad is not None else None for p in model.parameters()]
        assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())
        assert torch.equal(states[0], torch.get_rng_state())
        assert states[1] == random.getstate()
        assert all(numpy.array_equal(a, b) for a, b in zip(states[2], numpy.random.get_state(), strict=True))


class Counting:
    """Data that counts how often it is gone through, and how many batches are taken."""

    def __init__(self, batches: Iterable[Any]) -> None:
        self.batches = list(batches)
        self.passes = self.taken = 0

    def __iter__(self) -> Iterator[Any]:
        self.passes += 1
        for batch in self.batches:
            self.taken += 1
            yield batch
