"""What torch's two containers, the zip and the old one, have in common: the pickle that says what is in them."""

from __future__ import annotations

import errno
import importlib.util
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bnfix.errors import BnfixError, LoadError, UntrustedModelError
from bnfix.formats import advice, recipes
from bnfix.formats.base import Probe, Weights
from bnfix.formats.described import described
from bnfix.formats.fitting import put
from bnfix.formats.names import Sort, open_wrappers, printable, wrapped_by_training
from bnfix.formats.pickles.contents import Contents, contents
from bnfix.formats.pickles.danger import judge
from bnfix.formats.pickles.machine import Pickle
from bnfix.formats.pickles.values import Global
from bnfix.types import FileInfo

if TYPE_CHECKING:
    from torch import nn

KINDS = frozenset(["state_dict", "lightning", "pickled_module", "pickled_object", "checkpoint", "torch_data"])
_WHOLE = ("pickled_module", "pickled_object")
_SAFE_PROTOCOL = 3  # the newest that torch's safe loader reads
_DANGEROUS = "do not load it; get the weights from a source you trust, as safetensors"
_PACKING = {"zip": "", "legacy": " in torch's old format"}


def judged(names: Iterable[Global], hidden: str = "") -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Of the names in a pickle, those that loading would run and those that no flag admits."""
    code: list[str] = []
    dangerous: list[str] = []
    for name in names:
        judgement = judge(name.module, name.name)
        if judgement != "weights":
            (dangerous if judgement == "dangerous" else code).append(printable(str(name)))
    return tuple(code), (*dangerous, *([hidden] if hidden else []))


def classify(file: Probe, main: Pickle, names: Iterable[Global], container: str, *, hidden: str = "") -> FileInfo:
    """The :class:`FileInfo` of a torch file, from its looked-at pickle and all ``names`` in it."""
    code, dangerous = judged(names, hidden)
    found = contents(main.value)
    renaming = wrapped_by_training(found.tensors)
    recipe_text = found.strings.get(recipes.KEY)
    recipe = recipes.from_text(recipe_text, file.shown) if recipe_text else None
    kind = _kind(main.value, found, code)
    numbers = described(found.tensors, renaming)
    facts: dict[str, Any] = {k: printable(v) if isinstance(v, str) else v for k, v in found.facts.items()}
    if found.keys and not (kind == "state_dict" and not found.opened.path):
        facts["keys"] = tuple(printable(k) for k in found.keys)
    if found.named:
        facts["arch"] = printable(found.named)
    if found.training is not None:
        facts["training"] = found.training
    if main.protocol > _SAFE_PROTOCOL:
        facts["pickle_protocol"] = main.protocol
    return file.info(
        kind,
        container,
        _title(kind, container, found, dangerous),
        loadable=not dangerous and kind not in ("checkpoint", "torch_data"),
        wrapper=printable(".".join(found.opened.path)) or None,
        other_wrappers=tuple(printable(o) for o in found.opened.others),
        names_code=code,
        dangerous=dangerous,
        root_class=found.module or (str(getattr(main.value, "made_by", "")) if kind == "pickled_object" else None),
        recipe=recipe,
        facts=facts,
        advice=_DANGEROUS if dangerous else _advice(file, kind, found, code, bool(numbers["norms"]), recipe),
        **numbers,
    )


def _kind(root: Any, found: Contents, code: tuple[str, ...]) -> str:
    if found.module is not None:
        return "pickled_module"
    if "pytorch-lightning_version" in found.facts:
        return "lightning"
    if found.opened.ambiguous:
        return "checkpoint"
    if found.tensors:
        return "state_dict"
    return "pickled_object" if code and hasattr(root, "made_by") else "torch_data"


def _title(kind: str, container: str, found: Contents, dangerous: tuple[str, ...]) -> str:
    if dangerous:
        return f"a pickle that names {_some(dangerous)}: loading it would run that"
    how = _PACKING.get(container, "")
    others = _some(tuple(printable(o) for o in found.opened.others))
    return {
        "state_dict": f"a state_dict{how}",
        "lightning": f"a Lightning checkpoint{how}",
        "pickled_module": f"a pickled nn.Module ({found.module}){how}",
        "pickled_object": f"a pickled object{how}",
        "checkpoint": f"a checkpoint with several sets of weights ({others}){how}",
    }.get(kind, f"data saved by torch{how}, but no weights by name")


def _advice(
    file: Probe, kind: str, found: Contents, code: tuple[str, ...], norms: bool, recipe: Mapping[str, Any] | None
) -> str:
    path, named = file.shown, found.named
    if kind in ("pickled_module", "pickled_object"):
        return advice.module_lines(path, found.module, norms=norms or kind == "pickled_object")
    if kind == "checkpoint":
        return "save the one you mean by itself:  torch.save(torch.load(file)[key], 'weights.pt')"
    if kind == "torch_data":
        return "save model.state_dict(), and give that file"
    folded = recipes.has_folds(recipe)
    if folded or not norms:
        return advice.export_line(path, named=named, folded=folded, trust=bool(code))
    return advice.fold_line(path, named=named, trust=bool(code))


def _some(names: tuple[str, ...], limit: int = 3) -> str:
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")


# ---------------------------------------------------------------------------------------- reading


def read(info: FileInfo, *, trust: bool) -> Weights | nn.Module:
    """The weights, or the module, in a torch file that was recognised as ``info``.

    State dicts are read by torch's safe loader alone; what holds objects beside them needs ``trust``.
    """
    opened = open_wrappers(_root(info, trust=trust), _sort, _entries)
    if _sort(opened.value) == "module":
        module: nn.Module = opened.value
        return module
    if info.kind in _WHOLE or opened.ambiguous:
        raise LoadError(f"{info.path} holds a {type(opened.value).__name__}, no nn.Module and no weights by name")
    tensors = {k: v for k, v in _entries(opened.value).items() if isinstance(k, str)}
    text = tensors.pop(recipes.KEY, None)
    recipe = recipes.from_text(text, info.path) if isinstance(text, str) else None
    versions = getattr(opened.value, "_metadata", None)
    return Weights(tensors, recipe, versions=versions if isinstance(versions, Mapping) else {})


def _root(info: FileInfo, *, trust: bool) -> Any:
    """All that the file holds."""
    if info.kind in ("checkpoint", "torch_data"):
        raise LoadError(f"{info.path} is {info.title}", hint=info.advice)
    whole = info.kind in _WHOLE
    if not trust and whole:
        what = info.title.partition(" in torch's")[0]
        raise UntrustedModelError(f"{info.path} is {what}: loading it can run any code inside.", hint=info.advice)
    if not trust and info.names_code:
        raise UntrustedModelError(
            f"{info.path} holds objects beside the weights ({_some(info.names_code)}): loading can run code inside.",
            hint=f"{_trusted(info)}\n"
            "safer             where it came from: torch.save(checkpoint['state_dict'], 'weights.pt')",
        )
    protocol = info.facts.get("pickle_protocol")
    if not trust and protocol:
        raise UntrustedModelError(
            f"{info.path} was saved with pickle_protocol={protocol}, which torch's safe loader does not read.",
            hint=f"{_trusted(info)}\nsafer             save it again without pickle_protocol, or as safetensors",
        )
    return _load(info, guarded=whole or bool(info.names_code or protocol))


def _trusted(info: FileInfo) -> str:
    arch = advice.example_arch(info.path, info.facts.get("arch"))
    line = advice.command("fold", info.path, arch=arch, trust=True, output=advice.beside(info.path))
    return f"{advice.TRUST}{advice.GAP}{line}"


def _load(info: FileInfo, *, guarded: bool) -> Any:
    import warnings

    import torch

    from bnfix.formats.pickles import guard
    from bnfix.formats.specs import importable_here

    try:
        with (
            warnings.catch_warnings(),
            open(info.path, "rb") as file,
        ):  # an open file: torch goes by content, not by name
            warnings.simplefilter("ignore")
            if not guarded:
                return torch.load(file, map_location="cpu", weights_only=True)
            with importable_here():
                return torch.load(file, map_location="cpu", weights_only=False, pickle_module=guard)
    except BnfixError as error:
        raise type(error)(f"{info.path}: {error.message}", hint=error.hint) from error
    except ImportError as error:
        raise _not_importable(info, error) from error
    except AttributeError as error:
        if guarded and "Can't get attribute" in str(error):
            raise _not_importable(info, error) from error
        raise _unreadable(info, error) from error
    except Exception as error:  # torch's readers and a trusted file's own classes fail in every way there is
        raise _unreadable(info, error) from error


def _unreadable(info: FileInfo, error: Exception) -> LoadError:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    reason = printable(next((line for line in lines if "nsupported" in line), lines[0] if lines else ""), 200)
    return LoadError(
        f"{info.path} can't be loaded: {type(error).__name__}: {reason}",
        hint="is the file whole? copy or download it again",
    )


def _not_importable(info: FileInfo, error: Exception) -> LoadError:
    module = getattr(error, "name", None) or (info.root_class or "").rpartition(".")[0]
    top = (module or "").partition(".")[0]
    if top == "__main__" or "'__main__'" in str(error):
        return LoadError(
            f"{info.path} was pickled from a script whose class is not here ({printable(str(error))})",
            hint="save model.state_dict() there, then: bnfix fold weights.pt --arch file.py:Class -o folded.pt",
        )
    if top and importlib.util.find_spec(top) is None:
        return LoadError(
            f"{info.path} needs the module {module}, which can't be imported",
            hint=f"run bnfix in the folder that holds {top}, or name that folder first:  export PYTHONPATH=that-folder",
        )
    return LoadError(
        f"{info.path} does not fit the code it was pickled from: {printable(str(error))}",
        hint="install the version of that package with which it was saved",
    )


def _sort(value: Any) -> Sort:
    import torch

    if isinstance(value, torch.Tensor):
        return "tensor"
    if isinstance(value, torch.nn.Module):
        return "module"
    return "mapping" if isinstance(value, Mapping) else ""


def _entries(value: Any) -> Mapping[Any, Any]:
    return value if isinstance(value, Mapping) else {}


# ---------------------------------------------------------------------------------------- writing


def write(path: Path, model: nn.Module, recipe: str | None, *, whole: bool) -> None:
    """Write ``model`` with ``torch.save``: its state_dict and the recipe, or with ``whole`` the pickled module."""
    content: Any = model
    if not whole:
        content = model.state_dict()
        if recipe is not None:
            content[recipes.KEY] = recipe
    _dump(path, content, "module" if whole else "state_dict")


def update(info: FileInfo, path: Path, model: nn.Module, *, trust: bool) -> bool:
    """As :meth:`bnfix.formats.base.Format.update`: what ``torch.save`` wrote, with the values of ``model``."""
    root = _root(info, trust=trust)
    opened = open_wrappers(root, _sort, _entries)
    if _sort(opened.value) != "module":
        if not put(model, opened.value):
            return False
    elif not opened.path:
        root = model
    else:
        parent = root
        for key in opened.path[:-1]:
            parent = parent[key]
        parent[opened.path[-1]] = model
    _dump(path, root, "module" if root is model else "checkpoint")
    return True


def _dump(path: Path, content: Any, what: str) -> None:
    import torch

    around = sys.exc_info()[1]
    try:
        with open(path, "wb") as file:  # a file, not a name: torch writes the name into the archive
            torch.save(content, file)
    except OSError:
        raise
    except Exception as error:  # what a user's module holds may refuse to be pickled in any way
        # Whatever ends a write, torch's writer still tries to end its archive, and says only that bytes are missing.
        missing = "unexpected pos" in str(error)
        for cause in _causes(error, around):
            if not isinstance(cause, Exception) or (missing and isinstance(cause, OSError)):
                raise cause from None  # an interrupt, or what the file said
        if missing:
            raise OSError(errno.ENOSPC, "the disk is full, or files must not be that large") from error
        raise _unsaved(what, error) from error


def _causes(error: BaseException, around: BaseException | None) -> Iterator[BaseException]:
    """What was being dealt with when ``error`` was raised, before it ``around``, which the caller had on its hands."""
    cause = error.__context__
    while cause is not None and cause is not around:
        yield cause
        cause = cause.__context__


def _unsaved(what: str, error: Exception) -> LoadError:
    return LoadError(
        f"the {what} can't be saved: {type(error).__name__}: {error}",
        hint="save its weights:  -o weights.safetensors" if what == "module" else None,
    )
