"""What a replica is made of: the same tensors, all else its own; what cannot be made again is shared, and said."""

from __future__ import annotations

import collections
import copy
import dataclasses
import functools
import gc
import itertools
import logging
import queue
import random
import threading
from typing import Any

import nets
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from interleaving import alone
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune, spectral_norm, weight_norm

from bnfix.errors import TraceError
from bnfix.graph import replicator

X = torch.linspace(-1, 1, 192).reshape(1, 3, 8, 8)


def with_attribute(value: Any, name: str = "thing") -> nn.Module:
    model = nets.lived_in(nets.conv_bn())
    object.__setattr__(model[1], name, value)
    return model


def replicated(value: Any) -> tuple[Any, tuple[str, ...]]:
    """What a replica has in place of ``value``, and what is said to be shared."""
    replicate = replicator(with_attribute(value))
    return replicate()[1].thing, replicate.shared  # type: ignore[index]


def test_training_flags_are_off_in_the_replica_only() -> None:
    class TrainForbidden(nn.Sequential):
        def train(self, mode: bool = True) -> Any:
            raise AssertionError("nobody asked to train")

    model = TrainForbidden(nets.conv_bn(), nn.Dropout(0.5), nn.BatchNorm2d(4))
    model[0].training = False
    replica = replicator(model)()
    assert [m.training for m in replica.modules()] == [False] * 6
    assert [m.training for m in model.modules()] == [True, False, True, True, True, True]


def test_modules_under_several_names_stay_one_and_order_stays() -> None:
    model = nn.ModuleDict({"b": nn.Linear(2, 2), "a": nn.ReLU()})
    model["again"] = model["b"]
    model["a"].friend = [model["b"], (model["b"],)]  # type: ignore[assignment]
    model["b"].bias = model["b"].weight  # tied
    replica: Any = replicator(model)()
    assert list(replica) == ["b", "a", "again"]
    assert replica["b"] is replica["again"] is replica["a"].friend[0] is replica["a"].friend[1][0]
    assert replica["b"] is not model["b"]
    assert replica["b"].bias is replica["b"].weight is model["b"].weight
    assert list(vars(replica["b"])) == list(vars(model["b"]))


def test_non_leaf_tensors_and_tensors_of_objects_are_shared() -> None:
    leaf = torch.ones(2, requires_grad=True)
    values = {"non_leaf": leaf * 2, "inside": [leaf.exp(), {"deep": (leaf.sin(),)}]}
    found, shared = replicated(values)
    assert found["non_leaf"] is values["non_leaf"]
    assert found["inside"] is not values["inside"]
    assert found["inside"][1]["deep"][0] is values["inside"][1]["deep"][0]  # type: ignore[index]
    assert shared == ()


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize("wrap", [weight_norm, spectral_norm, lambda m: prune.l1_unstructured(m, "weight", 0.5),
                                  parametrizations.weight_norm, parametrizations.spectral_norm,
                                  parametrizations.orthogonal])  # fmt: skip
def test_weights_that_are_computed(wrap: Any) -> None:
    model = nn.Sequential(wrap(nn.Conv2d(3, 4, 3)), nn.BatchNorm2d(4))
    alone(nets.lived_in(model), X)
    expected = alone(model, X)
    was = vars(model[0]).get("weight")
    replica: Any = replicator(model)()
    with torch.no_grad():
        assert torch.equal(replica(X), expected)
    assert vars(model[0]).get("weight") is was
    assert type(replica[0]) is type(model[0])
    if parametrize.is_parametrized(model[0]):
        assert replica[0].parametrizations["weight"] is not model[0].parametrizations["weight"]
    assert [id(t) for t in replica.parameters()] == [id(t) for t in model.parameters()]


def test_state_that_copying_would_lose_or_refuse() -> None:
    class Guarded(nn.Conv2d):
        __slots__ = ("inner",)

        def __deepcopy__(self, memo: Any) -> Any:
            return self

        def __getstate__(self) -> Any:
            raise RuntimeError("no")

        def __setattr__(self, name: str, value: Any) -> None:
            if self.__dict__.get("closed"):
                raise RuntimeError("closed")
            super().__setattr__(name, value)

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * self.inner[0]

    conv = Guarded(3, 4, 3)
    Guarded.inner.__set__(conv, [2.0])  # type: ignore[attr-defined]
    model = nets.lived_in(nn.Sequential(conv, nn.BatchNorm2d(4)))
    conv.closed = True
    replica: Any = replicator(model)()
    assert replica[0] is not conv
    assert replica[0].inner == [2.0]
    assert replica[0].inner is not conv.inner
    assert torch.equal(alone(replica, X), alone(model, X))


def test_locks_are_new_ones() -> None:
    lock = threading.Lock()
    with lock:
        found, shared = replicated([lock, threading.RLock(), threading.Condition(), queue.Queue()])
    assert not found[0].locked()
    with found[1], found[2]:
        found[2].notify_all()
    found[3].put("a")
    assert found[3].get() == "a"
    assert shared == ()


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ((i for i in range(3)), True), (open(__file__), True), (itertools.count(), True),  # noqa: SIM115
        (random.Random(0), True), (np.random.default_rng(0), True), (memoryview(b"ab"), True),
        (np.array([[], {}], dtype=object), True), (torch.Generator(), False), (logging.getLogger("here"), False),
        (threading.current_thread(), False), (threading.local(), False), (F.relu, False), (F.max_pool2d, False),
        (nn.ReLU, False), (np.zeros(1 << 18), False), ({str(i): i for i in range(1001)}, False), (object(), False),
        ([(i, [str(i)]) for i in range(1001)], False), (np.float32(3), False), (torch.Size([3]), False),
        (functools.partial(F.relu, inplace=True), False), (("a", 1), False),
    ],
    ids=lambda v: None if isinstance(v, bool) else type(v).__name__,
)  # fmt: skip
def test_what_cannot_be_made_again_is_shared(value: Any, said: bool) -> None:
    found, shared = replicated(value)
    assert found is value
    assert shared == ((f"1.thing ({type(value).__qualname__})",) if said else ())


def test_what_is_shared_is_named_where_it_lies() -> None:
    source = (i for i in range(3))

    def hook(module: nn.Module, args: Any) -> None:
        next(source)

    model = with_attribute([{"tok": itertools.count()}])
    handle = model.register_forward_pre_hook(hook)
    assert set(replicator(model).shared) == {
        "1.thing[0]['tok'] (count)",
        f"_forward_pre_hooks[{handle.id}].<source> (generator)",
    }


def test_a_large_table_that_leads_to_modules_is_not_shared() -> None:
    model = nets.lived_in(nets.conv_bn())
    object.__setattr__(model, "table", {**dict.fromkeys(range(1001)), "bn": [model[1]]})
    replica: Any = replicator(model)()
    assert replica.table["bn"][0] is replica[1]


@pytest.mark.parametrize("knows_the_model", [False, True])
def test_an_object_that_frees_something_at_its_end_is_shared(knows_the_model: bool) -> None:
    closed = []

    class Handle:
        def __init__(self, model: nn.Module) -> None:
            self.file = (i for i in range(3)) if knows_the_model else 7
            self.values = [model] if knows_the_model else []

        def __del__(self) -> None:
            closed.append(self.file)

    model: Any = nets.lived_in(nets.conv_bn())
    model[1].thing = handle = Handle(model)
    replicate = replicator(model)
    assert replicate()[1].thing is handle  # type: ignore[index]
    assert any(said.startswith("1.thing (") for said in replicate.shared)
    gc.collect()
    assert closed == []


class _Missing:
    pass


MISSING = _Missing()


def test_a_mark_known_by_identity_stays_itself() -> None:
    assert replicated(MISSING)[0] is MISSING
    assert replicated(_Missing())[0] is not MISSING


def test_globals_and_classes_are_not_isolated() -> None:
    """The limit of a replica; whoever uses it has to check (recalibrate replays a chunk)."""

    class Counted(nn.ReLU):
        seen: list[int] = []  # noqa: RUF012

    model = nn.Sequential(Counted())
    assert replicator(model)()[0].seen is Counted.seen  # type: ignore[index]


def test_hook_handles_remove_from_the_replica_only() -> None:
    model = nets.lived_in(nets.conv_bn())
    model[1].handle = model[0].register_forward_hook(lambda m, i, o: o * 2)
    expected = alone(model, X)
    replica: Any = replicator(model)()
    assert torch.equal(alone(replica, X), expected)
    replica[1].handle.remove()
    assert not replica[0]._forward_hooks
    assert len(model[0]._forward_hooks) == 1
    assert torch.equal(alone(model, X), expected)
    replica[0].register_forward_hook(lambda m, i, o: o)
    assert len(model[0]._forward_hooks) == 1


def test_a_replica_is_of_the_moment_when_the_replicator_was_made() -> None:
    model = with_attribute([[0], {"a": 1}, []])
    replicate = replicator(model)
    thing: Any = model[1].thing  # type: ignore[index]
    thing[0].append(1)
    thing[1]["b"] = 1
    thing[2].append(1)
    first: Any = replicate()
    first[1].thing[0].append(2)
    assert replicate()[1].thing == [[0], {"a": 1}, []]  # type: ignore[index]


def test_containers_keep_what_makes_them_what_they_are() -> None:
    made: list[str] = []

    def factory() -> str:
        made.append("x")
        return "x"

    value = [collections.deque([[1], [2]], maxlen=2), collections.defaultdict(factory, a=[1]), made]
    found, _ = replicated(value)
    found[0].append([3])
    assert list(found[0]) == [[2], [3]]
    assert found[1]["new"] == "x"
    assert found[2] == ["x"]  # the factory is the replica's own, and writes to its own list
    assert made == []


@dataclasses.dataclass(frozen=True, slots=True)
class Key:
    name: str
    module: Any = None


class Hashed:
    def __init__(self, name: str) -> None:
        self.name, self.values = name, [name]

    def __hash__(self) -> int:
        return hash(self.name)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Hashed) and other.name == self.name


def test_keys_that_are_hashed_by_what_is_in_them() -> None:
    model = nets.lived_in(nets.conv_bn())
    keys = (Key("plain"), Key("led", model[0]), Hashed("own"))
    object.__setattr__(model, "table", {key: [key] for key in keys} | {"all": set(keys)})
    replica: Any = replicator(model)()
    plain, led, own, _ = replica.table
    assert plain is keys[0]  # a value
    assert led.module is replica[0]
    assert own.values == ["own"]
    assert own.values is not keys[2].values
    assert replica.table["all"] == {plain, led, own}
    assert replica.table[Hashed("own")][0] is own
    assert replica.table[Key("led", replica[0])][0] is led


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_scripted_parts_are_refused_by_name() -> None:
    with pytest.raises(TraceError, match=r"^body\.0 is a ScriptModule: its run cannot be observed"):
        replicator(nn.ModuleDict({"body": nn.Sequential(torch.jit.script(nn.ReLU()))}))
    with pytest.raises(TraceError, match=r"^the model is a ScriptModule"):
        replicator(torch.jit.script(nn.ReLU()))
    with pytest.raises(TraceError, match=r"^1\.thing\[0\] is a ScriptModule"):
        replicator(with_attribute([torch.jit.script(nn.ReLU())]))


def test_compiled_parts_are_refused_by_name() -> None:
    with pytest.raises(TraceError, match=r"^0 is compiled by torch\.compile"):
        replicator(nn.Sequential(torch.compile(nn.ReLU())))
    model = nn.Sequential(nn.ReLU())
    model[0].compile()
    with pytest.raises(TraceError, match=r"^0 is compiled by torch\.compile"):
        replicator(model)
    model = nn.Sequential(nn.ReLU())
    model[0].forward = torch.compile(model[0].forward)
    with pytest.raises(TraceError, match=r"^0\.forward is compiled by torch\.compile"):
        replicator(model)


def test_functions_that_compile_leaves_alone() -> None:
    model = nets.lived_in(nets.conv_bn())
    model[0].forward = torch.compiler.disable(model[0].forward)
    replica: Any = replicator(model)()
    replica[0].register_parameter("weight", None)
    with pytest.raises((TypeError, AttributeError, RuntimeError)):
        alone(replica, X)  # it runs the replica's layer, whose weight is gone, not the model's
    compiled = torch.compile(lambda x: x + 1)
    assert replicated(compiled) == (compiled, ())  # leads to no layer


def test_uninitialised_parts_are_refused_by_name() -> None:
    with pytest.raises(TraceError, match=r"^0 is not initialised yet"):
        replicator(nn.Sequential(nn.LazyLinear(3)))


def test_a_module_of_a_class_made_in_c_is_refused_by_name() -> None:
    class Odd(nn.Module, dict):  # type: ignore[type-arg,misc]
        __hash__ = nn.Module.__hash__

    with pytest.raises(TraceError, match=r"^0 is of a class made outside Python"):
        replicator(nn.Sequential(Odd()))


def test_deep_chains_need_no_deep_stack() -> None:
    chain: Any = []
    for _ in range(5000):
        chain = [(chain,)]
    found, _ = replicated(chain)
    depth = 0
    while found:
        found, depth = found[0][0], depth + 1
    assert depth == 5000


def test_recurrent_layers_keep_their_weights() -> None:
    model = nn.LSTM(3, 4).eval()
    x = torch.linspace(-1, 1, 12).reshape(2, 2, 3)
    replica: Any = replicator(model)()
    with torch.no_grad():
        assert torch.equal(replica(x)[0], model(x)[0])
    assert all(a is b for a, b in zip(replica._flat_weights, model._flat_weights, strict=True))


def test_graph_modules_and_exported_programs() -> None:
    model = nets.lived_in(nets.conv_bn())
    expected = alone(model, X)
    for graph in (torch.fx.symbolic_trace(model), torch.export.export(model, (X,)).module()):
        replica = replicator(graph)()
        assert torch.equal(alone(replica, X), expected)
        assert {id(t) for t in replica.buffers()} == {id(t) for t in graph.buffers()}
        assert {id(m) for m in replica.modules()}.isdisjoint({id(m) for m in graph.modules()})


def test_a_deep_copy_of_a_replica_is_a_model_of_its_own() -> None:
    model = nets.lived_in(nets.conv_bn())
    assert torch.equal(alone(copy.deepcopy(replicator(model)()), X), alone(model, X))
