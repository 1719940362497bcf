"""Which importable names a pickle may hold: those of every state_dict, those that run code, those no model needs.

The standard library, numpy and torch are judged by what is admitted there, everything else by what is refused: the
classes of a user's model can be called anything, but no model is made of ``posix.system``. Names are judged as
spelled, since nothing is imported; where a trusted file is then really unpickled, ``guard`` judges each object again.
"""

from __future__ import annotations

import re
import sys
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING  # what the unpickler turns Python 2's names into
from typing import Literal

from bnfix.formats.pickles.machine import words

Judgement = Literal["weights", "code", "dangerous"]
"""``weights``: torch's safe loader admits it. ``code``: loading runs it, so a person has to trust the file.
``dangerous``: no model has a reason to name it."""

PACKED = "torch.storage._load_from_bytes"
"""How ``pickle.dump`` writes a tensor, and ``torch.save`` never does: as bytes, which hold a pickle of their own."""

_REBUILD = re.compile(r"_rebuild_(tensor(_v[23])?|parameter(_with_state)?|qtensor|sparse_tensor|meta_tensor_no_storage|"
                      r"wrapper_subclass|device_tensor_from_(numpy|cpu_tensor))")  # fmt: skip
_DTYPE = re.compile(r"(u?int|float|complex|bfloat|bool|q?u?int|bits)[0-9]*(x[0-9])?(_e[0-9]m[0-9]\w*)?")
_STORAGE = re.compile(r"\w*Storage")
_IDENTIFIER = re.compile(r"[^\W\d]\w*")

_STDLIB_ADMITTED: dict[str, frozenset[str] | None] = {  # None: the whole module
    "builtins": words(
        "bool bytearray bytes complex dict float frozenset int list object range set slice str tuple type "
        "abs all any divmod enumerate len max min pow reversed round sorted sum zip Ellipsis NotImplemented"
    ),
    "_codecs": frozenset(["encode"]),
    "_collections": frozenset(["OrderedDict", "defaultdict", "deque"]),
    "_io": frozenset(["BytesIO", "StringIO"]),
    "_operator": words(
        "add and_ eq floordiv ge gt invert itemgetter le lt matmul mod mul ne neg not_ or_ pos pow sub truediv xor"
    ),
    "_struct": frozenset(["Struct"]),
    "argparse": frozenset(["Namespace"]),
    "array": frozenset(["array", "_array_reconstructor"]),
    "collections": frozenset(["ChainMap", "Counter", "OrderedDict", "UserDict", "UserList", "defaultdict", "deque"]),
    "copyreg": frozenset(["_reconstructor", "__newobj__", "__newobj_ex__"]),
    "dataclasses": frozenset(["MISSING", "_MISSING_TYPE", "_HAS_DEFAULT_FACTORY_CLASS"]),
    "datetime": None,
    "decimal": None,
    "fractions": None,
    "functools": frozenset(["partial"]),
    "itertools": None,
    "logging": frozenset(["getLogger"]),
    "math": None,
    "numbers": None,
    "pathlib": words("Path PosixPath PurePath PurePosixPath PureWindowsPath WindowsPath"),
    "pathlib._local": words("Path PosixPath PurePath PurePosixPath PureWindowsPath WindowsPath"),
    "random": frozenset(["Random"]),
    "re": frozenset(["_compile"]),
    "types": frozenset(["MappingProxyType", "SimpleNamespace"]),
    "typing": frozenset(["Any", "Optional", "Union"]),
    "uuid": frozenset(["UUID"]),
}
_STDLIB_ADMITTED["operator"] = _STDLIB_ADMITTED["_operator"]
_EXCEPTION = re.compile(r"[A-Z]\w*(Error|Exception|Warning)")

_GONE_OR_NEAR_STDLIB = words(  # not in sys.stdlib_module_names everywhere, and nothing a model is made of
    "__builtin__ __builtins__ asynchat asyncore commands copy_reg cPickle distutils imp nt pipes popen2 posix smtpd "
    "cffi cloudpickle code dill fabric IPython invoke joblib jsonpickle paramiko pexpect pip pkg_resources plumbum "
    "psutil ptyprocess py _pyrepl pytest _pytest requests setuptools sh test urllib2 urllib3 httpx aiohttp win32api "
    "win32com pythoncom wmi yaml pdbpp ipdb numba cppyy jinja2 mako"
)
_SYSTEM = _GONE_OR_NEAR_STDLIB | words(  # modules that others re-export: torch.serialization has an `os`
    "__main__ _os _sys ast asyncio atexit bdb builtins cProfile codecs concurrent contextlib ctypes _ctypes "
    "faulthandler fileinput ftplib functools gc glob http imaplib importlib inspect io linecache marshal mmap "
    "multiprocessing os pathlib pdb pickle _pickle pkgutil platform poplib posixpath ntpath pprint profile pty "
    "pydoc resource runpy shelve shutil signal site smtplib socket socketserver sqlite3 ssl subprocess "
    "_posixsubprocess sys sysconfig tarfile telnetlib tempfile threading timeit trace traceback tracemalloc "
    "types typing unittest urllib venv webbrowser weakref xmlrpc zipfile zipimport _winapi winreg"
)
_REFUSED_FUNCTIONS = re.compile(
    r"eval|exec|execfile|system|popen\d?|Popen|run|call|check_(call|output)|getoutput|getstatusoutput|spawn\w*|exec[lv]\w*"
    r"|_?posix_spawnp?|fork\w*|startfile|open|compile|breakpoint|input|vars|globals|locals|dir"
    r"|\w*import\w*|run(string|_module|_path|_code|ctx|call|eval|cprofile)|_?exec_\w+|\w*_exec|execWrapper"
    r"|(un)?pickle\w*|read_pickle|c?loads?|\w*_loads?|load[a-z_]\w*"
    r"|get_?attr\w*|set_?attr\w*|del_?attr\w*|attrgetter|methodcaller|reduce|apply|lambdify|sympify"
    r"|rmtree|remove|unlink|rename|chmod|kill|urlopen|urlretrieve|download\w*|lambda|literal_eval|reduce_graph_module"
    r"|reduce_package_graph_module|reduce_deploy_graph_module|_?make_function|_?builtin_type|subimport|__\w+__"
)
_TORCH_NAMESPACES = (  # where the classes and functions that modules are made of live
    "torch.nn", "torch.ao", "torch.quantization", "torch.optim", "torch.distributions", "torch.functional",
    "torch.special", "torch.fft", "torch.linalg", "torch._VF", "torch._C._nn", "torch._C._special", "torch._C._fft",
    "torch._C._linalg", "torch.torch_version", "torch._tensor", "torch.amp", "torch.cuda.amp", "torch.masked",
    "torch.distributed.algorithms", "torch.utils.data.dataset", "torch.return_types",
)  # fmt: skip
_TORCH_REFUSED = re.compile(r"load\w*|save\w*|hub|jit|compile\w*|classes|ops|package|import_\w+|from_file|fork")
_NUMPY_NAMES = re.compile(
    r"ndarray|dtype|scalar|_reconstruct|_frombuffer|bool_?|(u?int|float|complex)\w*|generic|number|str_|bytes_|void"
    r"|datetime64|timedelta64|longlong|double|single|half|\w+DType"
)
_NUMPY_MODULES = re.compile(r"numpy(\._?core(\.(multiarray|numeric|numerictypes))?|\.dtypes)?")


def judge(module: str, name: str) -> Judgement:
    """What naming ``module.name`` in a pickle amounts to, as spelled and as Python 2's names are mapped."""
    judgements = {_judge(*spelling) for spelling in _spellings(module, name)}
    for worst in ("dangerous", "code"):
        if worst in judgements:
            return worst  # type: ignore[return-value]
    return "weights"


def _spellings(module: str, name: str) -> set[tuple[str, str]]:
    mapped = NAME_MAPPING.get((module, name), (IMPORT_MAPPING.get(module, module), name))
    spellings = {(str(mapped[0]), str(mapped[1]))}
    if module not in IMPORT_MAPPING and (module, name) not in NAME_MAPPING:
        spellings.add((module, name))
    return spellings


def _judge(module: str, name: str) -> Judgement:
    if not all(_IDENTIFIER.fullmatch(part) for part in (*module.split("."), *name.split("."))):
        return "dangerous"  # made up, computed while unpickling, or a trick with spaces
    top, *owners = module.split(".")[0], *name.split(".")[:-1]
    if _is_system_path(module, name):
        return "dangerous"
    if any(not _is_class_name(owner) for owner in owners):
        return "dangerous"  # a path through a module or an instance, not a class within a class
    if top == "torch":
        return _judge_torch(module, name)
    if top == "numpy":
        return _judge_numpy(module, name)
    if top in sys.stdlib_module_names:
        return _judge_stdlib(module, name)
    return "dangerous" if _REFUSED_FUNCTIONS.fullmatch(name.rpartition(".")[2]) else "code"


def _is_system_path(module: str, name: str) -> bool:
    """Something of the operating system or the interpreter on the way, under its own name or re-exported by another."""
    top, *within = module.split(".")
    if top in _GONE_OR_NEAR_STDLIB:
        return True
    path = [*within, *name.split(".")]
    dunder = [p for p in path if p.startswith("__") and p.endswith("__")]
    if dunder and (module, name) not in (("copyreg", "__newobj__"), ("copyreg", "__newobj_ex__")):
        return True
    return any(part in _SYSTEM for part in name.split(".")) or any(
        part in _SYSTEM and part not in _HARMLESS_SUBMODULES for part in within
    )


_HARMLESS_SUBMODULES = words(
    "functools io types typing code platform resource signal profile trace unittest site _pickle test http ast "
    "contextlib inspect pathlib py sh invoke ops"
)
"""Names that a user's package may well give to a module of its own: ``shop.types``, ``shop.io``."""


def _is_class_name(name: str) -> bool:
    return name.lstrip("_")[:1].isupper()


def _judge_stdlib(module: str, name: str) -> Judgement:
    if (module, name) in (("collections", "OrderedDict"), ("collections", "Counter"), ("_codecs", "encode")):
        return "weights"
    if module == "builtins" and name in ("set", "bytearray", "complex"):
        return "weights"
    admitted = _STDLIB_ADMITTED.get(module, frozenset())
    if admitted is None or name in admitted or (module == "builtins" and _EXCEPTION.fullmatch(name)):
        return "code"
    return "dangerous"


def _judge_numpy(module: str, name: str) -> Judgement:
    if _NUMPY_MODULES.fullmatch(module) and _NUMPY_NAMES.fullmatch(name):
        return "code"
    pickled_generator = module.startswith("numpy.random.") and (
        module == "numpy.random._pickle" or _is_class_name(name)
    )
    return "code" if pickled_generator else "dangerous"


def _judge_torch(module: str, name: str) -> Judgement:
    last = name.rpartition(".")[2]
    if module in ("torch", "torch.cuda", "torch.storage") and _STORAGE.fullmatch(name):
        return "weights"
    if module == "torch._utils" and _REBUILD.fullmatch(name):
        return "weights"
    if (module, name) in (("torch._tensor", "_rebuild_from_type_v2"), ("torch.nn.parameter", "Parameter")):
        return "weights"
    if module == "torch" and (name in ("Size", "Tensor", "device", "strided", "sparse_coo") or _DTYPE.fullmatch(name)):
        return "weights"
    if (module, name) == ("torch.serialization", "_get_layout"):
        return "weights"
    if _TORCH_REFUSED.fullmatch(last) or _REFUSED_FUNCTIONS.fullmatch(last):
        return "dangerous"
    if module in ("torch", "torch._utils"):
        return "code"
    return "code" if any(module == n or module.startswith(n + ".") for n in _TORCH_NAMESPACES) else "dangerous"
