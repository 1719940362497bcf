"""What an exported program could do while it is read or run, found by looking: torch's loader itself looks at nothing.

``torch.export.load`` unpickles, evaluates expressions of shapes, resolves any dotted name below ``torch`` and compiles
code with the names in the file. Here each of those places is held against what torch itself writes there. What goes
beyond is named, and needs trust; a name that would break out of the code it is compiled into is never admitted.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from bnfix.errors import LoadError
from bnfix.formats.archive import Archive, DamagedError
from bnfix.formats.base import MAX_PICKLE
from bnfix.formats.names import printable
from bnfix.formats.pickles.contents import TensorSpec, contents, itemsize, storages
from bnfix.formats.pickles.danger import judge
from bnfix.formats.pickles.machine import examine, words

MAX_PROGRAM = 64 << 20
MAX_CONFIG = 32 << 20
MAX_INPUTS = 256 << 20
_WEIGHTS, _CONSTANTS = "data/weights/", "data/constants/"
_DTYPES = {1: "uint8", 2: "int8", 3: "int16", 4: "int32", 5: "int64", 6: "float16", 7: "float32", 8: "float64",
           9: "complex32", 10: "complex64", 11: "complex128", 12: "bool", 13: "bfloat16", 28: "uint16",
           29: "float8_e4m3fn", 30: "float8_e5m2", 31: "float8_e4m3fnuz", 32: "float8_e5m2fnuz", 33: "float8_e8m0fnu",
           34: "uint32", 35: "uint64"}  # fmt: skip

_NAME = re.compile(r"[\w.@/\-:<> $\[\]]*")  # nothing that ends a string or a line of code
_WORD = re.compile(r"\w*")
_BARE = re.compile(r"[^\W\d]\w*")
_NAMES = words(
    "name as_name buffer_name parameter_name tensor_constant_name custom_obj_name user_input_name fqn graph_name"
)
_OPERATOR = re.compile(
    r"torch\.ops\.(aten|prims|quantized|quantized_decomposed|torchvision)\.(?!from_file)\w+(\.\w+)?"
    r"|torch\.ops\.higher_order\.(cond|while_loop|scan|associative_scan|map(_impl)?|wrap(_with_\w+)?|invoke_subgraph"
    r"|auto_functionalized(_v2)?|checkpoint|tag_activation_checkpoint|hints_wrap(per)?|flex_attention|strict_mode"
    r"|out_dtype)"
    r"|_operator\.(getitem|add|mul|sub|truediv|ge|le|gt|lt|eq|ne|floordiv|mod|and_|or_|not_|pow|neg|abs)"
    r"|math\.(ceil|floor|trunc)|builtins\.round"
    r"|torch\.(sym_(int|float|ite|max|min|not|sqrt|sum)|_C\._set_grad_enabled|_sym_sqrt)"
    r"|torch\.(autograd\.grad_mode\.set_grad_enabled|amp\.autocast_mode\._(enter|exit)_autocast)"
)
_TREES = frozenset(
    ["builtins.tuple", "builtins.list", "builtins.dict", "collections.OrderedDict", "collections.namedtuple",
     "collections.deque", "torch.Size"]
)  # fmt: skip
_FUNCTIONS = words(
    "Max Min Mod FloorDiv ModularIndexing Where PythonMod CleanDiv CeilToInt FloorToInt CeilDiv TruncToInt RoundToInt "
    "IntTrueDiv FloatTrueDiv ToFloat TruncToFloat Eq Ne Lt Le Gt Ge And Or Not floor ceiling Abs Symbol Integer "
    "Add Mul Rational Float Equality Unequality StrictLessThan LessThan StrictGreaterThan GreaterThan "
    "IsNonOverlappingAndDenseIndicator Identity max min"
)
_DOTTED = frozenset(
    ["torch.sym_max", "torch.sym_min", "torch.sym_float", "torch._sym_sqrt", "math.floor", "math.ceil", "math.trunc"]
)
"""What torch itself writes into conditions on sizes, beside operators: arithmetic on one or two numbers."""
_METHODS = frozenset(["size", "stride", "dim", "storage_offset", "numel", "ndim", "dtype", "device", "shape"])
_POWERS = frozenset(["Pow", "PowByNatural"])
_MAX_POWER = 8
_MAX_EXPRESSION = 20_000
_SYNTAX = (ast.Expression, ast.BinOp, ast.UnaryOp, ast.Compare, ast.BoolOp, ast.Name, ast.Constant, ast.Load,
           ast.operator, ast.unaryop, ast.cmpop, ast.boolop, ast.Subscript, ast.Attribute, ast.Call,
           ast.keyword)  # fmt: skip


@dataclass
class Program:
    """What was found in the archive of a program: its weights, what needs trust, what is never loaded."""

    tensors: dict[str, TensorSpec] = field(default_factory=dict)
    code: list[str] = field(default_factory=list)
    dangerous: list[str] = field(default_factory=list)
    inputs: bool = False
    """Whether it holds the inputs that it was exported with."""

    def needs_trust(self, what: str) -> None:
        """Remember something that only a person can answer for; each once."""
        shown = printable(what, 120)
        if shown not in self.code:
            self.code.append(shown)


def look(archive: Archive) -> Program:
    """Everything in the archive that torch's loader would act on.

    Raises:
        DamagedError: it is not whole, or says something else in one place than in another.
        LoadError: more in it than bnfix reads.
    """
    found = Program()
    program = next((n for n in ("models/model.json", "serialized_exported_program.json") if archive.has(n)), None)
    if program is None:
        raise DamagedError("the program in it is missing")
    _walk(_json(archive, program, MAX_PROGRAM), found)
    for folder, kind in ((_WEIGHTS, "weights"), (_CONSTANTS, "constants")):
        config = f"{folder}model_{kind}_config.json"
        if archive.has(config):
            _payloads(archive, folder, _json(archive, config, MAX_CONFIG), found)
    for name in archive.below("data/sample_inputs", _WEIGHTS.rstrip("/"), _CONSTANTS.rstrip("/")):
        if name.endswith(".pt") and not name.startswith((f"{_WEIGHTS}weight_", f"{_CONSTANTS}tensor_")):
            _pickled(archive, name, found)
            found.inputs |= name.startswith("data/sample_inputs/")
    for name in ("serialized_state_dict", "serialized_constants", "serialized_example_inputs"):
        for ending in (".pt", ".json"):
            if archive.has(name + ending):
                _pickled(archive, name + ending, found)
    return found


def _json(archive: Archive, name: str, limit: int) -> Any:
    try:
        return json.loads(archive.read(name, limit))
    except (ValueError, RecursionError) as error:
        raise DamagedError(f"{name} in it is no JSON") from error


# ---------------------------------------------------------------------------------------- the graph


def _walk(root: Any, found: Program) -> None:
    """Every string in the program that is more than a comment, by the key under which it lies."""
    todo: list[tuple[str, Any]] = [("", root)]
    while todo:
        key, value = todo.pop()
        if key in ("metadata", "stack_trace"):
            continue
        if isinstance(value, dict):
            for inner, content in value.items():
                if not _NAME.fullmatch(inner):
                    found.dangerous.append(f"the name {printable(inner, 60)}")
                todo.append((inner, content))
        elif isinstance(value, list):
            todo.extend((key, content) for content in value)
        elif isinstance(value, str):
            _string(key, value, found)


def _string(key: str, value: str, found: Program) -> None:
    if key in ("target", "as_operator"):
        if not _OPERATOR.fullmatch(value) or "__globals__" in value:
            found.needs_trust(value)
    elif key == "expr_str":
        if not _harmless(value, guard=False):
            found.needs_trust(f"the expression {value}")
    elif key == "guards_code":
        if not _harmless(value, guard=True):
            found.needs_trust(f"the condition {value}")
    elif key in ("in_spec", "out_spec"):
        _tree(value, found)
    elif key == "forward_arg_names":
        if not _BARE.fullmatch(value):
            found.dangerous.append(f"the argument {printable(value, 60)}")
    elif key in _NAMES:
        if not _NAME.fullmatch(value):
            found.dangerous.append(f"the name {printable(value, 60)}")
    elif key == "class_fqn":
        found.needs_trust(value)


def _harmless(text: str, *, guard: bool) -> bool:
    """Whether an expression is arithmetic on sizes and nothing else, and small."""
    if len(text) > _MAX_EXPRESSION:
        return False
    try:
        tree = ast.parse(text.strip(), mode="eval")
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return all(_harmless_node(node, guard) for node in ast.walk(tree))


def _harmless_node(node: ast.AST, guard: bool) -> bool:
    if not isinstance(node, _SYNTAX) or isinstance(node, (ast.LShift, ast.RShift, ast.MatMult)):
        return False
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Pow):
        return _small_power(node.left, node.right)
    if isinstance(node, ast.Name):
        return not node.id.startswith("__")
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in _POWERS:
        return len(node.args) == 2 and not node.keywords and _small_power(*node.args)
    if isinstance(node, ast.Call):
        return all(isinstance(k.value, ast.Constant) for k in node.keywords) and (
            (isinstance(node.func, ast.Name) and node.func.id in _FUNCTIONS)
            or (guard and isinstance(node.func, ast.Attribute) and _harmless_node(node.func, guard))
        )
    if isinstance(node, ast.Attribute):
        return guard and (node.attr in _METHODS or _dotted(node) in _DOTTED)
    if isinstance(node, ast.Subscript):
        return guard
    if isinstance(node, ast.Constant):  # a string may be evaluated in its turn
        if isinstance(node.value, str):
            return bool(_WORD.fullmatch(node.value))
        return not isinstance(node.value, bytes)
    return True


def _dotted(node: ast.Attribute) -> str:
    return f"{node.value.id}.{node.attr}" if isinstance(node.value, ast.Name) else ""


def _small_power(base: ast.expr, exponent: ast.expr) -> bool:
    """Whether a power is one of a size to a small number, and not of another power: those grow without end."""
    while isinstance(exponent, (ast.Call, ast.UnaryOp)):
        if isinstance(exponent, ast.Call) and len(exponent.args) != 1:
            return False
        exponent = exponent.operand if isinstance(exponent, ast.UnaryOp) else exponent.args[0]
    powers = any(isinstance(n, ast.Pow) or (isinstance(n, ast.Name) and n.id in _POWERS) for n in ast.walk(base))
    return not powers and isinstance(exponent, ast.Constant) and exponent.value in range(_MAX_POWER + 1)


def _tree(text: str, found: Program) -> None:
    """How inputs and outputs are built; some types in it would have torch import what the file names."""
    if not text:
        return
    try:
        todo = [json.loads(text)[1]]
    except (ValueError, RecursionError, LookupError, TypeError):
        found.needs_trust("how its inputs are built")
        return
    while todo:
        spec = todo.pop()
        if not isinstance(spec, Mapping) or not isinstance(spec.get("children_spec"), list):
            found.needs_trust("how its inputs are built")
            return
        kind, context = spec.get("type"), spec.get("context")
        if kind is not None and (kind not in _TREES or "__enum__" in str(context)):
            found.needs_trust(str(kind))
        if kind == "builtins.dict" and not all(_NAME.fullmatch(k) for k in _strings(context)):
            found.dangerous.append("a key in its inputs")
        todo += spec["children_spec"]


def _strings(context: Any) -> Iterator[str]:
    try:
        keys = json.loads(context) if isinstance(context, str) else context
    except (ValueError, RecursionError):
        return
    if isinstance(keys, list):
        yield from (k for k in keys if isinstance(k, str))


# ---------------------------------------------------------------------------------------- what lies beside it


def _payloads(archive: Archive, folder: str, config: Any, found: Program) -> None:
    entries = config.get("config") if isinstance(config, dict) else None
    if not isinstance(entries, dict):
        raise DamagedError("the list of its weights is not as the format wants it")
    for name, entry in entries.items():
        path = entry.get("path_name") if isinstance(entry, dict) else None
        if not isinstance(path, str) or not re.fullmatch(r"\w[\w.\-]*", path):
            raise DamagedError("the list of its weights is not as the format wants it")
        if not _NAME.fullmatch(name):
            found.dangerous.append(f"the name {printable(name, 60)}")
        member = f"{folder}{path}"
        if entry.get("use_pickle"):
            if path.startswith(("custom_obj", "opaque_obj")):
                found.needs_trust(f"{member}, a pickled object")
                _loose_pickle(archive, member, found)
            else:
                _pickled(archive, member, found)
            continue
        spec = _declared(entry.get("tensor_meta"), member)
        stored = archive.stored_size(member)
        if stored is None:
            raise DamagedError(f"the tensor {member} in it is missing or compressed")
        needed = spec.storage[1] * itemsize(spec.dtype) if spec.numel else 0
        if needed > stored:
            raise DamagedError(f"the tensor {member} in it is too short")
        if folder == _WEIGHTS:
            found.tensors[name] = spec


def _declared(meta: Any, member: str) -> TensorSpec:
    """Shape and type, and in ``storage`` how many elements of its member the tensor reaches over."""
    try:
        sizes = tuple(int(s["as_int"]) for s in meta["sizes"])
        strides = tuple(int(s["as_int"]) for s in meta["strides"])
        offset = int(meta["storage_offset"]["as_int"])
        dtype = _DTYPES[meta["dtype"]]
    except (TypeError, KeyError, ValueError) as error:
        raise DamagedError(f"the tensor {member} in it is not as the format wants it") from error
    if len(sizes) != len(strides) or any(v < 0 for v in (*sizes, *strides, offset)):
        raise DamagedError(f"the tensor {member} in it is not as the format wants it")
    reach = offset + 1 + sum((s - 1) * stride for s, stride in zip(sizes, strides, strict=True))
    return TensorSpec(sizes, dtype, (member, reach))


def _pickled(archive: Archive, name: str, found: Program) -> None:
    """A file of torch's within the file: looked at as one by itself would be, and no deeper."""
    content = archive.read(name, MAX_INPUTS)
    if not content:
        return
    if content[:4] != b"PK\x03\x04":
        found.needs_trust(f"{name}, a pickle")
        found.dangerous += _dangerous(examine(content[:MAX_PICKLE]).names)
        return
    inner = Archive(archive.path, len(content), content)
    pickle = examine(inner.read("data.pkl", MAX_PICKLE))
    if pickle.problem:
        raise DamagedError(f"{name} in it is damaged: {pickle.problem}")
    names = {n: judge(n.module, n.name) for n in pickle.names}
    found.dangerous += _dangerous(pickle.names)
    for named, judgement in names.items():
        if judgement == "code":
            found.needs_trust(str(named))
    if pickle.protocol > 3:
        found.needs_trust(f"pickle protocol {pickle.protocol}")
    if inner.has("constants.pkl") or inner.has_below("code"):
        found.needs_trust(f"{name}, a TorchScript program")
    if name.startswith(("serialized_state_dict", _WEIGHTS)):  # of before torch 2.8
        found.tensors.update(contents(pickle.value).tensors)
    try:
        declared = storages(pickle.value)
    except ValueError as error:
        raise DamagedError(str(error)) from error
    for storage in declared.values():
        stored = inner.stored_size(f"data/{storage.key}")
        if storage.nbytes and (stored is None or stored < storage.nbytes):
            raise DamagedError(f"a tensor of {name} in it is missing or too short")


def _loose_pickle(archive: Archive, name: str, found: Program) -> None:
    content = archive.read(name, MAX_PICKLE)
    if content[:4] != b"PK\x03\x04":
        found.dangerous += _dangerous(examine(content).names)


def _dangerous(names: Any) -> list[str]:
    return [printable(str(n)) for n in names if judge(n.module, n.name) == "dangerous"]


def refuse_several(archive: Archive, path: str) -> None:
    """Whether there is one program, called ``model``, as torch's own loader wants it.

    Raises:
        LoadError: there are several, or one that has another name.
    """
    names = [n for n in archive.below("models") if n.endswith(".json")]
    if names and names != ["models/model.json"]:
        raise LoadError(
            f"{path} holds {len(names)} exported programs ({', '.join(printable(n, 40) for n in names[:3])}); "
            "bnfix reads a file with one, called model",
            hint="save it by itself:  torch.export.save(program, 'model.pt2')",
        )
