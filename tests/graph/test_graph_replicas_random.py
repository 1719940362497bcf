"""Random graphs of objects, cycles included: a replica's graph is the same graph, made of other objects."""

from __future__ import annotations

import collections
import functools
import random
import types
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from interleaving import reaches
from torch import nn

from bnfix.graph import replicator


class Plain:
    def method(self) -> Any:
        return vars(self)


class Slots:
    __slots__ = ("a", "b")


class Mapping(dict):  # type: ignore[type-arg]
    pass


class Both(list):  # type: ignore[type-arg]
    __slots__ = ("__dict__", "extra")


class Grown(nn.Module):
    pass


Named = collections.namedtuple("Named", "a b")
MUTABLE = (Plain, Slots, dict, collections.OrderedDict, list, collections.deque, Mapping, Both, Grown, set,
           types.SimpleNamespace)  # fmt: skip


def function_of(first: Any, second: Any) -> Any:
    def function(default: Any = second) -> Any:
        return first, function, default

    return function


def held_by(kind: int, one: Any, two: Any) -> Any:
    """Something that cannot be changed and holds both."""
    match kind:
        case 0:
            return (one, two)
        case 1:
            return Named(two, one)
        case 2:
            return functools.partial(print, one, end=two)
        case 3:
            return function_of(one, two)
        case 4:
            return types.MethodType(function_of(one, one), two)
        case _:
            return (one, (two, (one,)))


def grown(seed: int) -> tuple[nn.Module, list[Any]]:
    """A module that leads to many objects, and all mutable ones of them."""
    draw = random.Random(seed)
    mutable: list[Any] = [nn.Module(), *(draw.choice(MUTABLE)() for _ in range(draw.randint(2, 25)))]
    objects = [*mutable, 1, "word", torch.ones(2), len, Plain]
    for _ in range(draw.randint(0, 25)):
        one, two = draw.choices(objects, k=2)
        objects.append(held_by(draw.randrange(6), one, two))
    for holder in mutable:
        for key in "ab":
            fill(holder, key, draw.choice(objects))
    root = mutable[0]
    root.all, root.order = list(mutable), [draw.choice(objects) for _ in range(5)]
    root.weak = [weakref.ref(o) for o in mutable if isinstance(o, (Plain, Grown))]
    root.appends = [o.append for o in mutable if isinstance(o, (list, collections.deque))]
    return root, mutable


def fill(holder: Any, key: str, value: Any) -> None:
    if isinstance(holder, set):
        holder.add(value if isinstance(value, (int, str, Plain, Grown)) else key)
    elif isinstance(holder, dict):
        holder[key] = value
    elif isinstance(holder, (list, collections.deque)):
        holder.append(value)
        if isinstance(holder, Both):
            holder.extra, holder.more = value, [value]
    elif isinstance(holder, nn.Module):
        object.__setattr__(holder, key, value)
    else:
        setattr(holder, key, value)


def parts(value: Any) -> Iterator[Any]:
    """What an object holds, in an order that a twin of it has too."""
    if isinstance(value, dict):
        yield from (*value.keys(), *value.values())
    elif isinstance(value, (list, tuple, collections.deque)):
        yield from value
    elif isinstance(value, types.FunctionType):
        yield from (c.cell_contents for c in value.__closure__ or ())
        yield from (value.__defaults__ or ())
    elif isinstance(value, types.MethodType):
        yield from (value.__func__, value.__self__)
    elif isinstance(value, functools.partial):
        yield from (value.func, value.args, value.keywords)
    elif isinstance(value, weakref.ref):
        yield value()
    elif isinstance(value, types.BuiltinMethodType):
        yield value.__self__
    if not isinstance(value, (type, types.FunctionType, torch.Tensor)) and hasattr(value, "__dict__"):
        yield dict(sorted((k, v) for k, v in vars(value).items() if k != "training"))
    for slot in ("a", "b", "extra"):
        if isinstance(value, (Slots, Both)) and hasattr(value, slot):
            yield getattr(value, slot)


@pytest.mark.parametrize("seed", range(60))
def test_a_random_graph_of_objects(seed: int) -> None:
    root, mutable = grown(seed)
    replicate = replicator(root)
    replica = replicate()
    assert replicate.shared == ()
    twins: dict[int, Any] = {}
    kept, pending = [], [(root, replica)]
    while pending:
        one, two = pending.pop()
        if id(one) in twins:
            assert twins[id(one)] is two or isinstance(one, (dict, tuple))  # dicts and tuples of this walk's own making
            continue
        kept.append(one)
        twins[id(one)] = two
        assert type(one) is type(two)
        if isinstance(one, (set, torch.Tensor, type, str, int)):
            assert len(one) == len(two) if isinstance(one, set) else one is two
            continue
        ours, theirs = list(parts(one)), list(parts(two))
        kept += [ours, theirs]
        assert len(ours) == len(theirs)
        pending += zip(ours, theirs, strict=True)
    assert all(twins[id(o)] is not o for o in mutable)
    assert len({id(twins[id(o)]) for o in mutable}) == len(mutable)
    assert reaches(replica, mutable) == []
