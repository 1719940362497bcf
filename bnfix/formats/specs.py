"""``timm:resnet50``, ``torchvision:resnet18``, ``pkg.mod:callable``, ``file.py:callable``: code that is named."""

from __future__ import annotations

import ast
import contextlib
import copy
import difflib
import hashlib
import importlib
import importlib.util
import inspect
import os
import re
import shlex
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bnfix.errors import BnfixError, LoadError
from bnfix.formats.advice import module_classes

if TYPE_CHECKING:
    from torch import nn

HUBS = ("timm", "torchvision")
InputHint = tuple[tuple[int, ...], str]

_NAME = r"[^\W\d]\w*(?:\.[^\W\d]\w*)*"
_OBJECT = re.compile(rf"(?P<where>.+\.py|{_NAME}):(?P<name>{_NAME})")


@dataclass(frozen=True)
class Spec:
    """A named piece of code: ``where`` is a hub, a module or a ``.py`` file, ``name`` what is meant in it."""

    where: str
    name: str

    def __str__(self) -> str:
        return f"{self.where}:{self.name}"


def parse_spec(text: str) -> Spec | None:
    """``text`` as a spec; None where it is a path: a file of that name exists, or it has no spec's form.

    A drive letter (``C:\\model.pt``) is no module.
    """
    if os.path.exists(text):
        return None
    hub, colon, name = text.partition(":")
    if colon and hub in HUBS:
        return Spec(hub, name)
    match = _OBJECT.fullmatch(text)
    return Spec(match["where"], match["name"]) if match else None


def source_of(text: str) -> str | None:
    """The file that ``text`` is, or that holds the code it names; None where there is none to be found."""
    if os.path.isfile(text):
        return text
    spec = parse_spec(text)
    if spec is None or spec.where in HUBS:
        return None
    here = spec.where if spec.where.endswith(".py") else str(Path(*spec.where.split(".")).with_suffix(".py"))
    return here if os.path.isfile(here) else None


def parse_kwargs(pairs: Iterable[str]) -> dict[str, Any]:
    """``["num_classes=10", "act=relu"]`` as keyword arguments: Python literals where they are such, else strings.

    Raises:
        ValueError: a pair without ``=``, or a key that is no name.
    """
    kwargs: dict[str, Any] = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        key = key.strip()
        if not equals or not key.isidentifier():
            raise ValueError(f"{pair!r} is no key=value, such as num_classes=10")
        if key in kwargs:
            raise ValueError(f"{key} is given twice")
        try:
            kwargs[key] = ast.literal_eval(text.strip())
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            kwargs[key] = {"true": True, "false": False, "none": None}.get(text.strip().lower(), text)
    return kwargs


def meant(arch: str) -> str:
    """What ``arch``, which is no spec, may have been meant as; the forms there are where nothing is near. Runs nothing.

    ``resnet18`` is a name in timm and in torchvision, ``net.Net`` a class with a dot for a colon, ``net.py`` a file.
    """
    source = Path(arch)
    module, _, name = arch.rpartition(".")
    if arch.endswith(".py"):
        if not source.is_file():
            return f"there is no file {arch}; the form is  --arch path/to/file.py:Class"
        found = [f"{arch}:{c}" for c in module_classes(source)]
    elif name and _OBJECT.fullmatch(f"{module}:{name}"):
        beside = Path(*module.split(".")).with_suffix(".py")
        found = [f"{beside}:{name}"] if name in module_classes(beside) else []
        found.insert(0, f"{module}:{name}")
    else:
        found = [f"{hub}:{arch}" for hub in HUBS if arch in _hub_names(hub)]
    if not found:
        return "--arch takes timm:resnet50, torchvision:resnet18, package.module:Class or file.py:Class"
    return "\n".join(f"did you mean   --arch {shlex.quote(f)}" for f in found[:4])


def callables(source: Path) -> tuple[str, ...]:
    """Names of the functions that a Python file defines and that can be called without arguments; runs nothing."""
    try:
        body = ast.parse(source.read_bytes()).body
    except (OSError, SyntaxError, ValueError, RecursionError, MemoryError):
        return ()
    functions = [node for node in body if isinstance(node, ast.FunctionDef) and not node.name.startswith("_")]
    return tuple(f.name for f in functions if len(f.args.posonlyargs + f.args.args) <= len(f.args.defaults))


def _hub_names(hub: str) -> frozenset[str]:
    """The models of a hub that is installed; none of one that is not, or that can't be imported."""
    try:
        library = importlib.import_module("timm" if hub == "timm" else "torchvision.models")
    except (ImportError, RuntimeError, OSError):  # torchvision built for another torch raises RuntimeError
        return frozenset()
    return frozenset(library.list_models())


def build(arch: str | Any, kwargs: Mapping[str, Any] | None = None) -> tuple[nn.Module, InputHint | None]:
    """The model that ``arch`` makes, with fresh weights, in evaluation mode, and the input it is meant for.

    ``arch`` is a spec, or in Python the class, the factory or a module itself (which is copied). Nothing is
    downloaded; torch's random state is as before.

    Raises:
        LoadError: no such module, file or name; the call failed; what it made is no nn.Module.
    """
    import torch
    from torch import nn

    spec = parse_spec(arch) if isinstance(arch, str) else None
    if isinstance(arch, str) and spec is None:
        raise LoadError(f"{arch!r} names no architecture", hint=meant(arch))
    shown = str(spec) if spec is not None else getattr(arch, "__name__", type(arch).__name__)
    with torch.random.fork_rng(devices=[]), importable_here():
        hint: InputHint | None = None
        if spec is not None and spec.where == "timm":
            model = _timm(spec.name, kwargs or {})
            hint = _timm_hint(model)
        elif spec is not None and spec.where == "torchvision":
            model = _torchvision(spec.name, kwargs or {})
            hint = _torchvision_hint(spec.name)
        else:
            found = resolve(spec) if spec is not None else arch
            if isinstance(found, nn.Module):
                if kwargs:
                    raise LoadError(f"{shown} is a model already: it takes no --arch-kw")
                model = _call(shown, copy.deepcopy, found)
            else:
                model = _call(shown, found, **(kwargs or {}))
    if not isinstance(model, nn.Module):
        raise LoadError(f"{shown} gives a {type(model).__name__}, no nn.Module")
    return model.eval(), hint


def resolve(spec: Spec) -> Any:
    """The object that ``spec`` names. Imports, which runs, the module or file.

    Raises:
        LoadError: it can't be found or imported.
    """
    with importable_here():
        module = _import_file(spec.where) if spec.where.endswith(".py") else _import_module(spec.where)
    value: Any = module
    for part in spec.name.split("."):
        if not hasattr(value, part):
            public = [n for n, v in vars(module).items() if not n.startswith("_") and not inspect.ismodule(v)]
            own = [n for n in public if getattr(vars(module)[n], "__module__", None) == module.__name__]
            close = (
                difflib.get_close_matches(part, public, n=3)
                or own[:5]
                or [n for n in public if isinstance(vars(module)[n], type)][:5]
            )
            raise LoadError(f"{spec.where} has no {spec.name}", hint=f"it has {', '.join(close)}" if close else None)
        value = getattr(value, part)
    return value


@contextlib.contextmanager
def importable_here() -> Iterator[None]:
    """Modules in the working directory can be imported inside, as with ``python -m``."""
    here = os.getcwd()
    if here in sys.path or "" in sys.path:
        yield
        return
    sys.path.insert(0, here)
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):
            sys.path.remove(here)


def _import_module(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is not None and (name == error.name or name.startswith(f"{error.name}.")):
            raise LoadError(
                f"there is no module {name} to import",
                hint="run bnfix in the folder that holds it, or name the file:  path/to/file.py:Class",
            ) from error
        raise LoadError(f"{name} can't be imported: {error}", hint=_import_hint(error, Path(name))) from error
    except BnfixError:
        raise
    except Exception as error:  # the user's own code, which can fail in every way
        raise LoadError(f"{name} can't be imported: {type(error).__name__}: {error}") from error


def _import_file(where: str) -> Any:
    path = Path(where).resolve()
    if not path.is_file():
        raise LoadError(f"there is no file {where}")
    name = f"_bnfix_{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
    found = importlib.util.spec_from_file_location(name, path)
    if found is None or found.loader is None:
        raise LoadError(f"{where} can't be imported")
    module = importlib.util.module_from_spec(found)
    sys.modules[name] = module  # dataclasses and pickle look classes up there
    sys.path.insert(0, str(path.parent))
    try:
        found.loader.exec_module(module)
    except BaseException as error:
        sys.modules.pop(name, None)
        if not isinstance(error, Exception) or isinstance(error, BnfixError):
            raise
        raise LoadError(
            f"{where} can't be imported: {type(error).__name__}: {error}", hint=_import_hint(error, path)
        ) from error
    finally:
        with contextlib.suppress(ValueError):
            sys.path.remove(str(path.parent))
    return module


def _import_hint(error: BaseException, source: Path) -> str | None:
    """The way to a module that is missing: a package to install, or a folder that Python does not search.

    One that lies in a folder above ``source`` is the user's own.
    """
    if not isinstance(error, ModuleNotFoundError) or not error.name:
        return None
    top = error.name.partition(".")[0]
    for folder in source.resolve().parents:
        if (folder / f"{top}.py").is_file() or (folder / top).is_dir():
            return f"{top} lies in {folder}:  export PYTHONPATH={shlex.quote(str(folder))}"
    return f"if it is a package:  pip install {top}\nif it is yours:  export PYTHONPATH=the-folder-that-holds-{top}"


def _arguments(make: Any) -> str:
    """How to give arguments to ``make``, and their names where Python can tell."""
    try:
        taken = list(inspect.signature(make).parameters.values())
    except (TypeError, ValueError):
        taken = []
    names = [p.name for p in taken if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    known = f"it takes {', '.join(names[:20])}" if names else "arguments for it"
    return f"{known}:  --arch-kw name=value"


def _call(shown: str, make: Any, *args: Any, **kwargs: Any) -> Any:
    if not callable(make):
        raise LoadError(f"{shown} is a {type(make).__name__}: neither a model nor something that makes one")
    try:
        return make(*args, **kwargs)
    except BnfixError:
        raise
    except Exception as error:  # a factory of the user's, or of a library: any failure is its answer
        given = ", ".join(f"{k}={v!r}" for k, v in kwargs.items())
        reason = str(error).strip().splitlines()
        raise LoadError(
            f"{shown}({given}) failed: {type(error).__name__}: {reason[0] if reason else ''}",
            hint=_arguments(make) if isinstance(error, TypeError) else None,
        ) from error


# ---------------------------------------------------------------------------------------- hubs


def _timm(name: str, kwargs: Mapping[str, Any]) -> Any:
    timm = _hub("timm")
    if "/" in name or ":" in name:
        raise LoadError(
            f"timm:{name} would be downloaded; bnfix downloads nothing", hint="timm:resnet50, and your file of weights"
        )
    if not timm.is_model(name):
        _unknown("timm", name, timm.list_models())
    return _call(f"timm:{name}", timm.create_model, name, **{"pretrained": False, **kwargs})


def _timm_hint(model: Any) -> InputHint | None:
    config = getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", None)
    size = config.get("input_size") if isinstance(config, Mapping) else None
    if not isinstance(size, (tuple, list)) or not all(isinstance(s, int) for s in size):
        return None
    return tuple(size), "timm's default_cfg"


def _torchvision(name: str, kwargs: Mapping[str, Any]) -> Any:
    _hub("torchvision")
    models = importlib.import_module("torchvision.models")
    if name not in models.list_models():
        _unknown("torchvision", name, models.list_models())
    given: dict[str, Any] = {"weights": None, **kwargs}
    if _has_backbone_weights(models, name):
        given.setdefault("weights_backbone", None)
    return _call(f"torchvision:{name}", models.get_model, name, **given)


def _has_backbone_weights(models: Any, name: str) -> bool:
    return "weights_backbone" in inspect.signature(models.get_model_builder(name)).parameters


def _torchvision_hint(name: str) -> InputHint | None:
    models = importlib.import_module("torchvision.models")
    transforms = getattr(models.get_model_weights(name), "DEFAULT", None)
    crop = getattr(getattr(transforms, "transforms", None), "keywords", {}).get("crop_size")
    return ((3, crop, crop), "torchvision's transforms of its weights") if isinstance(crop, int) else None


def _hub(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise LoadError(f"{name}:… needs {name} ({error})", hint=f"pip install {name}") from error


def _unknown(hub: str, name: str, known: Iterable[str]) -> None:
    close = difflib.get_close_matches(name, list(known), n=3)
    near = f"near that name: {', '.join(f'{hub}:{c}' for c in close)}"
    library = "timm" if hub == "timm" else "torchvision.models"
    every = f"all names:  python -c 'import {library} as m; print(*m.list_models())'"
    raise LoadError(f"{hub} has no model {name!r}" if name else f"{hub}: names no model", hint=near if close else every)
