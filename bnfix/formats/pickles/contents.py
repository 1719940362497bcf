"""From a pickle that was looked at to what it holds: tensors by name, their wrapper, the class of a module."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from bnfix.formats.names import Opened, Sort, open_wrappers, printable
from bnfix.formats.pickles.machine import LimitError
from bnfix.formats.pickles.values import Global, Object, Persistent, Table

MAX_TENSORS = 500_000
_DEPTH = 200

_STORAGE_DTYPES = {
    "DoubleStorage": "float64", "FloatStorage": "float32", "HalfStorage": "float16", "BFloat16Storage": "bfloat16",
    "LongStorage": "int64", "IntStorage": "int32", "ShortStorage": "int16", "CharStorage": "int8",
    "ByteStorage": "uint8", "BoolStorage": "bool", "ComplexDoubleStorage": "complex128",
    "ComplexFloatStorage": "complex64", "QInt8Storage": "qint8", "QUInt8Storage": "quint8",
    "QInt32Storage": "qint32", "QUInt4x2Storage": "quint4x2", "QUInt2x4Storage": "quint2x4",
    "UntypedStorage": "uint8",
}  # fmt: skip
_DTYPE_ALIASES = {"float": "float32", "double": "float64", "half": "float16", "long": "int64", "int": "int32",
                  "short": "int16", "cfloat": "complex64", "cdouble": "complex128"}  # fmt: skip
_SIZES = {"float64": 8, "int64": 8, "uint64": 8, "complex64": 8, "complex128": 16, "float32": 4, "int32": 4,
          "uint32": 4, "qint32": 4, "float16": 2, "bfloat16": 2, "int16": 2, "uint16": 2}  # fmt: skip


def itemsize(dtype: str) -> int:
    """Bytes of one element (1 for the packed types, which have more than one element in it)."""
    return _SIZES.get(dtype, 1)


@dataclass(frozen=True)
class TensorSpec:
    """A tensor as a file declares it. ``storage`` tells tensors that share memory from those that don't."""

    shape: tuple[int, ...]
    dtype: str
    storage: tuple[Any, ...] = ()

    @property
    def numel(self) -> int:
        count = 1
        for size in self.shape:
            count *= size
        return count

    @property
    def nbytes(self) -> int:
        return self.numel * itemsize(self.dtype)


@dataclass(frozen=True)
class Storage:
    """A storage that a pickle refers to: its key and its declared size in bytes."""

    key: str
    nbytes: int


@dataclass(frozen=True)
class Contents:
    """What the root of a pickle holds."""

    tensors: Mapping[str, TensorSpec] = field(default_factory=dict)
    strings: Mapping[str, str] = field(default_factory=dict)
    opened: Opened = field(default_factory=lambda: Opened(None))
    module: str | None = None
    training: bool | None = None
    keys: tuple[str, ...] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)
    named: str | None = None
    """The architecture by name, where trainers write one beside the weights: ``{"arch": "resnet18", …}``."""


def contents(root: Any) -> Contents:
    """Read ``root``, the symbolic value of a pickle.

    Raises:
        LimitError: more than :data:`MAX_TENSORS` names, or modules nested deeper than any model's.
    """
    keys = tuple(k for k in entries(root) if isinstance(k, str))[:64] if sort(root) == "mapping" else ()
    facts = {k: v for k in ("pytorch-lightning_version", "epoch", "global_step")
             if isinstance(v := entries(root).get(k), (str, int))}  # fmt: skip
    arch = entries(root).get("arch")
    named = arch if isinstance(arch, str) and arch else None
    opened = open_wrappers(root, sort, entries)
    value = opened.value
    if sort(value) == "module":
        tensors = _module_tensors(value)
        training = value.state.get("training") if isinstance(value.state, Table) else None
        return Contents(tensors, {}, opened, _class_of(value), training, keys, facts, named)
    table = entries(value)
    found = {k: spec for k, v in table.items() if isinstance(k, str) and (spec := as_tensor(v)) is not None}
    strings = {k: v for k, v in table.items() if isinstance(k, str) and isinstance(v, str) and k.startswith("__")}
    return Contents(found, strings, opened, None, None, keys, facts, named)


def sort(value: Any) -> Sort:
    """What a symbolic value is, in the words of :mod:`bnfix.formats.names`."""
    if isinstance(value, Object):
        if _module_state(value) is not None:
            return "module"
        return "tensor" if as_tensor(value) is not None else ""
    return "mapping" if isinstance(value, Table) else ""


def entries(value: Any) -> Mapping[Any, Any]:
    """The entries of a symbolic mapping; nothing of anything else."""
    return value.entries if isinstance(value, Table) else {}


def as_tensor(value: Any, depth: int = 0) -> TensorSpec | None:
    """The tensor that torch's rebuilding functions would make of ``value``; None where it is none."""
    if not isinstance(value, Object) or depth > 4:
        return None
    made_by, args = value.made_by, value.args
    if not isinstance(made_by, Global) or made_by.module.split(".")[0] != "torch":
        return None
    name = made_by.name
    try:
        if name in ("_rebuild_parameter", "_rebuild_parameter_with_state", "_rebuild_device_tensor_from_cpu_tensor"):
            return as_tensor(args[0], depth + 1)
        if name == "_rebuild_from_type_v2":
            return as_tensor(Object(args[0], args[2]), depth + 1)
        if name == "_rebuild_sparse_tensor":
            values = as_tensor(args[1][1], depth + 1)
            return TensorSpec(_shape(args[1][2]), values.dtype) if values else None
        if name == "_rebuild_meta_tensor_no_storage":
            return TensorSpec(_shape(args[1]), _dtype(args[0]))
        if name == "_rebuild_wrapper_subclass":
            return TensorSpec(_shape(args[2]), _dtype(args[1]))
        if name in ("_rebuild_tensor", "_rebuild_tensor_v2", "_rebuild_tensor_v3", "_rebuild_qtensor"):
            storage_type, key = args[0].id[1:3]
            dtype = _dtype(args[6]) if name == "_rebuild_tensor_v3" else _STORAGE_DTYPES[storage_type.name]
            return TensorSpec(_shape(args[2]), dtype, (key, args[1], _shape(args[2]), _shape(args[3])))
    except (IndexError, KeyError, TypeError, AttributeError, ValueError):
        return None  # not as torch writes it: no tensor, and torch will say so too
    return None


def storages(value: Any) -> dict[str, Storage]:
    """Every storage that ``value`` refers to, by key, wherever in it.

    Raises:
        ValueError: a reference that is not as torch writes them.
    """
    found: dict[str, Storage] = {}
    seen: set[int] = set()
    todo: list[Any] = [value]
    while todo:
        item = todo.pop()
        if id(item) in seen or not isinstance(item, (Table, Object, Persistent, list, tuple)):
            continue
        seen.add(id(item))
        if isinstance(item, Persistent):
            storage = _storage(item.id)
            if storage is not None:
                known = found.get(storage.key)
                found[storage.key] = storage if known is None or known.nbytes < storage.nbytes else known
        elif isinstance(item, Table):
            todo.extend(item.entries.values())
            todo.extend(item.odd)
        elif isinstance(item, Object):
            todo.extend([*item.args, item.state, item.table, item.items])
        else:
            todo.extend(item)
    return found


def _storage(saved: Any) -> Storage | None:
    if not isinstance(saved, tuple) or not saved or saved[0] not in ("storage", b"storage"):
        return None
    if len(saved) not in (5, 6) or not isinstance(saved[1], Global) or type(saved[4]) is not int or saved[4] < 0:
        raise ValueError("a reference to a storage is damaged")
    dtype = _STORAGE_DTYPES.get(saved[1].name)
    if dtype is None or not isinstance(saved[2], (str, int)):
        raise ValueError("a reference to a storage is damaged")
    packed = {"quint4x2": 2, "quint2x4": 4}.get(dtype, 1)
    return Storage(str(saved[2]), -(-saved[4] * itemsize(dtype) // packed))


def _shape(value: Any) -> tuple[int, ...]:
    if isinstance(value, Object):  # torch.Size((…))
        value = value.args[0]
    if not isinstance(value, (tuple, list)) or not all(type(v) is int and v >= 0 for v in value):
        raise ValueError("not a shape")
    return tuple(value)


def _dtype(value: Any) -> str:
    if not isinstance(value, Global) or value.module != "torch":
        raise ValueError("not a dtype")
    return _DTYPE_ALIASES.get(value.name, value.name)


# ---------------------------------------------------------------------------------------- modules


def _module_state(value: Object) -> Table | None:
    """The ``__dict__`` of what looks like an nn.Module: its three tables tell it from anything else."""
    state = value.state[0] if isinstance(value.state, tuple) and value.state else value.state
    tables = ("_modules", "_parameters", "_buffers")
    return state if isinstance(state, Table) and all(isinstance(state.get(t), Table) for t in tables) else None


def _class_of(value: Object) -> str:
    made_by = value.made_by
    if isinstance(made_by, Global) and made_by.name in ("_reconstructor", "__newobj__") and value.args:
        made_by = value.args[0]
    if isinstance(made_by, Persistent) and isinstance(made_by.id, tuple) and len(made_by.id) > 1:
        made_by = made_by.id[1]  # torch's old format wraps a module's class: ('module', class, file, source)
    return printable(str(made_by)) if isinstance(made_by, Global) else "unknown class"


def _module_tensors(root: Object) -> dict[str, TensorSpec]:
    """The names that ``root.state_dict()`` would have, as far as tensors."""
    found: dict[str, TensorSpec] = {}
    todo: list[tuple[str, Any, int]] = [("", root, 0)]
    visited = 0
    while todo:
        prefix, module, depth = todo.pop()
        visited += 1
        state = _module_state(module) if isinstance(module, Object) else None
        if state is None:
            continue
        if depth > _DEPTH or visited > MAX_TENSORS or len(found) > MAX_TENSORS or len(prefix) > 10_000:
            raise LimitError("modules nested deeper, or more of them, than a model has")
        hidden = _items_of(state.get("_non_persistent_buffers_set"))
        for table, skipped in (("_parameters", ()), ("_buffers", hidden)):
            for name, value in entries(state.get(table)).items():
                spec = as_tensor(value)
                if spec is not None and isinstance(name, str) and name not in skipped:
                    found[prefix + name] = spec
        children = entries(state.get("_modules")).items()
        todo.extend((f"{prefix}{k}.", v, depth + 1) for k, v in reversed(list(children)) if isinstance(k, str))
    return found


def _items_of(value: Any) -> tuple[Any, ...]:
    if isinstance(value, Object) and value.args:  # set([…]) in protocol 2
        value = value.args[0]
    return tuple(value) if isinstance(value, (list, tuple)) else ()
