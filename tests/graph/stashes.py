"""Models that keep a value somewhere between two lines of their forward: each way to do so that people use."""

from __future__ import annotations

import collections
import dataclasses
import functools
import threading
import types
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import nets
import numpy as np
from interleaving import pause
from torch import Tensor, nn


class Base(nn.Module):
    """Keeps the convolution's output, and adds it to the norm's."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    def put(self, value: Tensor) -> None:
        """Keep it (hooks do it where this does nothing)."""

    def take(self) -> Tensor:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv(x)
        self.put(h)
        pause()
        out: Tensor = self.bn(h) + self.take()
        return out


STYLES: dict[str, Callable[[], nn.Module]] = {}


def style(make: Any) -> Any:
    STYLES[make.__name__] = lambda: nets.lived_in(make())
    return make


@style
class Attribute(Base):
    def put(self, value: Tensor) -> None:
        self.skip = value

    def take(self) -> Tensor:
        return self.skip


class Kept(Base):
    """``self.kept`` is a list or something like it."""

    def __init__(self, kept: Any) -> None:
        super().__init__()
        self.kept = kept

    def put(self, value: Tensor) -> None:
        self.kept.append(value)

    def take(self) -> Tensor:
        value: Tensor = self.kept[0]
        del self.kept[0]
        return value


class Named(Base):
    """``self.kept`` is an object with an attribute ``value``."""

    def __init__(self, kept: Any) -> None:
        super().__init__()
        self.kept = kept

    def put(self, value: Tensor) -> None:
        self.kept.value = value

    def take(self) -> Tensor:
        value: Tensor = self.kept.value
        return value


class Keyed(Base):
    """``self.kept`` is a mapping, the key is ``self.key``."""

    def __init__(self, kept: Any, key: Any = "skip") -> None:
        super().__init__()
        self.kept, self.key = kept, key

    def put(self, value: Tensor) -> None:
        self.kept[self.key] = value

    def take(self) -> Tensor:
        value: Tensor = self.kept[self.key]
        return value


class ListOfMine(list):  # type: ignore[type-arg]
    def __init__(self, owner: str) -> None:
        super().__init__()
        self.owner = owner


class AttributeDict(dict):  # type: ignore[type-arg]
    __getattr__ = dict.__getitem__
    __setattr__ = dict.__setitem__


class Ordered(collections.OrderedDict):  # type: ignore[type-arg]
    __slots__ = ("extra",)


@dataclasses.dataclass
class Record:
    value: Tensor | None = None


@dataclasses.dataclass(frozen=True)
class Frozen:
    inner: list[Tensor]


class Slotted:
    __slots__ = ("__weakref__", "value")

    def __deepcopy__(self, memo: Any) -> Any:
        raise RuntimeError("not this one")


class Pair(NamedTuple):
    name: str
    kept: list[Tensor]


class SetsItself:
    def __new__(cls, value: int) -> SetsItself:
        self = super().__new__(cls)
        object.__setattr__(self, "value", value)
        return self

    def __setattr__(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    def __getstate__(self) -> Any:
        return {}


for _name, _make in {
    "a_list": lambda: Kept([]),
    "a_deque": lambda: Kept(collections.deque(maxlen=5)),
    "a_list_of_a_class": lambda: Kept(ListOfMine("me")),
    "a_dict": lambda: Keyed({}),
    "an_ordered_dict": lambda: Keyed(Ordered()),
    "a_defaultdict": lambda: Keyed(collections.defaultdict(list)),
    "an_attribute_dict": lambda: Named(AttributeDict()),
    "a_dict_keyed_by_a_class": lambda: Keyed(weakref.WeakKeyDictionary(), Base),
    "a_dataclass": lambda: Named(Record()),
    "a_namespace": lambda: Named(types.SimpleNamespace()),
    "slots": lambda: Named(Slotted()),
    "an_object_with_protocols": lambda: Named(SetsItself(3)),
}.items():
    STYLES[_name] = lambda make=_make: nets.lived_in(make())


@style
def list_in_a_tuple() -> nn.Module:
    class Model(Kept):
        def __init__(self) -> None:
            super().__init__([])
            self.inside = ("name", Pair("pair", self.kept), Frozen(self.kept))

        def put(self, value: Tensor) -> None:
            self.inside[1].kept.append(value)

        def take(self) -> Tensor:
            (value,) = self.inside[2].inner
            self.inside[2].inner.clear()
            return value

    return Model()


@style
class ArrayOfNumbers(Base):
    def __init__(self) -> None:
        super().__init__()
        self.kept = np.zeros((1, 4, 6, 6), np.float32)

    def put(self, value: Tensor) -> None:
        self.kept[...] = value.numpy()

    def take(self) -> Tensor:
        return self.bn.weight.new_tensor(self.kept)


@style
class BoundAppend(Kept):
    """``self.push = self.kept.append``: a built-in method of the model's own list."""

    def __init__(self) -> None:
        super().__init__([])
        self.push = self.kept.append

    def put(self, value: Tensor) -> None:
        self.push(value)


@style
class ParentByWeakReference(Base):
    def __init__(self) -> None:
        super().__init__()

        class Child(nn.Module):
            def __init__(self, parent: nn.Module) -> None:
                super().__init__()
                self.reference, self.method = weakref.ref(parent), weakref.WeakMethod(parent.keep)
                self.proxies = [weakref.proxy(parent)]

            def forward(self, value: Tensor) -> None:
                self.method()(value)
                self.proxies[0].double = 2 * self.reference().skip

        self.child = Child(self)

    def keep(self, value: Tensor) -> None:
        self.skip = value

    def put(self, value: Tensor) -> None:
        self.child(value)

    def take(self) -> Tensor:
        return self.skip + self.double  # type: ignore[no-any-return]


@style
class ParentInACycle(Base):
    def __init__(self) -> None:
        super().__init__()
        object.__setattr__(self.bn, "parent", self)
        self.others = [self, {"me": self, "bn": self.bn}]

    def put(self, value: Tensor) -> None:
        self.bn.parent.skip = value

    def take(self) -> Tensor:
        return self.others[1]["me"].skip  # type: ignore[index,no-any-return]


@style
class ModulesByValue(Base):
    """Layers found through a view, by ``id``, and in a weak dictionary."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = self._modules.values()
        self.names = {id(m): n for n, m in self.named_children()}
        self.by_name = weakref.WeakValueDictionary({"conv": self.conv})
        self.weak = weakref.WeakKeyDictionary({self.bn: []})
        self.all = weakref.WeakSet([self.conv, self.bn])

    def put(self, value: Tensor) -> None:
        assert self.names[id(self.conv)] == "conv"
        assert set(self.all) == {self.conv, self.bn}
        list(self.layers)[1].first = value
        self.by_name["conv"].second = value
        self.weak[self.bn].append(value)

    def take(self) -> Tensor:
        return self.bn.first + self.conv.second * self.weak[self.bn].pop(0)  # type: ignore[no-any-return,operator]


@style
class CachedMethod(Base):
    def __init__(self) -> None:
        super().__init__()
        self.cached = functools.lru_cache(maxsize=4)(self.scaled)

    def scaled(self, factor: int) -> Tensor:
        return self.skip * factor

    def put(self, value: Tensor) -> None:
        self.skip = value
        self.cached.cache_clear()

    def take(self) -> Tensor:
        return self.cached(2)


@style
class HeldLock(Base):
    """A lock held while the norm runs: two calls that share it wait for each other for ever."""

    def __init__(self) -> None:
        super().__init__()
        self.lock, self.condition = threading.Lock(), threading.Condition()

    def forward(self, x: Tensor) -> Tensor:
        with self.lock, self.condition:
            out = super().forward(x)
            self.condition.notify_all()
            return out

    def take(self) -> Tensor:
        return self.conv.weight.sum()
