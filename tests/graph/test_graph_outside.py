"""What code can rebind outside of its model: found, told, put back, and what a lone forward changes left to it."""

from __future__ import annotations

import os
import sys
import types
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bnfix.graph import Outside, find_owners

COUNT = 0
NOTES: list[int] = []
TABLE: dict[str, int] = {"a": 1}
OTHERS = 5
module = types.ModuleType("bnfix_test_module")
module.value = 1  # type: ignore[attr-defined]
module.unrelated = 1  # type: ignore[attr-defined]
sys.modules[module.__name__] = module


class Net(nn.Module):
    """Mentions all of these."""

    shared = 0

    def forward(self, x: Tensor) -> Any:
        global COUNT, LATER
        COUNT += 1
        LATER = 1
        NOTES.append(TABLE["a"] + module.value)
        return F.relu(x)


def outside_of(*functions: Any) -> tuple[Net, Outside]:
    net = Net()
    return net, Outside(find_owners(net), *functions)


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    yield
    globals().update(COUNT=0, OTHERS=5)
    globals().pop("LATER", None)
    NOTES.clear()
    TABLE.update(a=1)


def change_all() -> None:
    globals().update(COUNT=7, LATER=1)
    NOTES.append(1)
    TABLE["a"] = 2
    module.value = 2  # type: ignore[attr-defined]
    Net.shared = 1
    Net.added = 1  # type: ignore[attr-defined]
    F.relu = F.gelu  # type: ignore[assignment]
    torch.bnfix_test = 1  # type: ignore[attr-defined]
    os.environ["BNFIX_TEST"] = "1"
    np.seterr(all="raise")
    torch.set_num_threads(torch.get_num_threads() + 1)


def state() -> list[Any]:
    own = [COUNT, globals().get("LATER"), list(NOTES), dict(TABLE), module.value, Net.shared, hasattr(Net, "added")]
    return [*own, F.relu, hasattr(torch, "bnfix_test"), dict(os.environ), np.geterr(), torch.get_num_threads()]


def test_everything_is_found_and_put_back() -> None:
    _, outside = outside_of()
    before = state()
    assert outside.changed() == []
    change_all()
    told = {name.rpartition(".")[2] for name in outside.changed()}
    expected = {"COUNT", "LATER", "NOTES", "TABLE", "value", "shared", "added", "relu", "bnfix_test", "environ"}
    assert told == expected | {"geterr()", "get_num_threads()"}
    assert "torch.nn.functional.relu" in outside.put_back()
    assert state() == before
    assert outside.changed() == []


def test_what_a_lone_forward_changes_is_left_to_it_until_counts_are_rewound() -> None:
    net, outside = outside_of()
    assert not outside.settle()
    net(torch.ones(1))
    assert outside.settle()
    net(torch.ones(1))
    module.value = 2  # type: ignore[attr-defined]
    assert outside.put_back() == ["bnfix_test_module.value"]
    assert (COUNT, NOTES, globals().get("LATER")) == (2, [2, 2], 1)
    outside.rewind()
    assert (COUNT, NOTES, globals().get("LATER")) == (0, [], 1)  # what is set up once is not set up again


def test_closures_of_functions() -> None:
    n = 0

    def forward(model: nn.Module, batch: Tensor) -> Any:
        nonlocal n
        n += 1
        return model(batch)

    _, outside = outside_of(forward)
    n = 3
    assert outside.put_back() == ["n"]
    assert n == 0


def test_names_that_no_code_mentions_are_nobodys_business() -> None:
    _, outside = outside_of()
    globals()["OTHERS"] = 6
    module.unrelated = 2  # type: ignore[attr-defined]
    assert outside.put_back() == []
    assert (OTHERS, module.unrelated) == (6, 2)


def test_a_module_that_was_imported_meanwhile_stays() -> None:
    _, outside = outside_of()
    torch.bnfix_test = types.ModuleType("torch.bnfix_test")  # type: ignore[attr-defined]
    try:
        assert outside.put_back() == []
        assert hasattr(torch, "bnfix_test")
    finally:
        del torch.bnfix_test  # type: ignore[attr-defined]


class Proxy:
    """Would build what it stands for when asked for anything."""

    __slots__ = ("__dict__",)

    def __getattribute__(self, name: str) -> Any:
        raise RuntimeError(f"asked for {name}")


class Config:
    """Settings with others in them."""

    def __init__(self, *inner: Any) -> None:
        self.inner, self.value = inner, 1


class MetaOfItsOwn(type):
    """Answers to every name."""

    def __getattr__(cls, name: str) -> Any:
        raise RuntimeError(f"asked for {name}")


PROXY, MANY, CONFIG = Proxy(), dict.fromkeys(range(5000)), Config([Config()], Config())
ODD = MetaOfItsOwn("ODD", (), {"value": 1})


class Odd(nn.Module):
    """Mentions objects that mind being looked at."""

    def forward(self, x: Tensor) -> Any:
        return x if PROXY is None else x + len(MANY) + CONFIG.value + ODD.value


def test_nothing_is_asked_of_objects_that_are_looked_at() -> None:
    outside = Outside(find_owners(Odd()))
    assert outside.changed() == []
    MANY[0] = 1  # type: ignore[assignment]  # too large to be a patch
    CONFIG.value, CONFIG.inner[1].value = 5, 5
    ODD.value = 5
    assert sorted(outside.put_back()) == ["CONFIG.value", "ODD.value", "inner.value"]
    assert (CONFIG.value, CONFIG.inner[1].value, ODD.value) == (1, 1, 1)
