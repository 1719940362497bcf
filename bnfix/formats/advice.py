"""The next command for a file: one line that can be pasted as it is, with the words for it set apart.

A line of advice is ``label   command``: three spaces keep the words from what a shell is meant to read.
"""

from __future__ import annotations

import ast
import os
import shlex
from collections.abc import Iterable
from pathlib import Path

GAP = "   "
TRUST = "if you trust it"
WHICH = "say which architecture, for example"
FOLDED_WHICH = "with the architecture that it was made from, for example"
PLACEHOLDER = "timm:resnet50"
_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt", ".safetensors", ".pt2")
_MAX_SOURCE = 1 << 20
_MAX_FILES = 200


def fold_line(path: str, *, named: str | None = None, trust: bool = False) -> str:
    """How to fold the weights in ``path``; ``named`` is the architecture that the file itself names."""
    arch = example_arch(path, named)
    return f"{WHICH}{GAP}{command('fold', path, arch=arch, data=_data(arch), trust=trust, output=beside(path))}"


def export_line(path: str, *, named: str | None = None, folded: bool = False, trust: bool = False) -> str:
    """How to export the weights in ``path``, of which none is left to fold."""
    arch = example_arch(path, named)
    line = command("export", path, arch=arch, data=_data(arch), trust=trust, output=os.path.splitext(path)[0] + ".onnx")
    return f"{FOLDED_WHICH if folded else WHICH}{GAP}{line}"


def module_lines(path: str, cls: str | None, *, norms: bool) -> str:
    """The two ways on from a pickled module: to fold it, or to export it where no norm is in it."""
    module, _, name = (cls or "pkg.mod.Net").rpartition(".")
    arch = f"{'file.py' if module == '__main__' else module or 'pkg.mod'}:{name}"
    if norms:
        trusted = command("fold", path, trust=True, output=beside(path))
        safer = command("fold", "weights.pt", arch=arch, output="folded.pt")
    else:
        trusted = command("export", path, trust=True, output=os.path.splitext(path)[0] + ".onnx")
        safer = command("export", "weights.pt", arch=arch, output="model.onnx")
    return f"{TRUST}{GAP}{trusted}\nsafer: save model.state_dict() as weights.pt, then{GAP}{safer}"


def command(
    verb: str, path: str, *, output: str, arch: str | None = None, data: str | None = None, trust: bool = False
) -> str:
    """A command line, quoted for the shell."""
    options = [
        *(["--arch", arch] if arch else []),
        *(["--data", data] if data else []),
        *(["--trust"] if trust else []),
    ]
    return shlex.join(["bnfix", verb, path, *options, "-o", output])


def beside(path: str, done: str = "folded") -> str:
    """A name for the model after a repair: ``net-folded.pt`` for ``net.pt``."""
    stem, suffix = os.path.splitext(path)
    return f"{stem}-{done}{suffix if suffix.lower() in _SUFFIXES else '.pt'}"


# ---------------------------------------------------------------------------------------- which architecture


def example_arch(path: str, named: str | None = None) -> str:
    """The likeliest architecture of the weights in ``path``: what the file names, a class beside it, a well-known one.

    It is an example for a person to judge, never used unasked. Nothing is imported.
    """
    if named and named.replace(":", "", 1).replace(".", "").replace("_", "").isalnum():
        return named if ":" in named else f"timm:{named}"
    return _class_beside(Path(path)) or PLACEHOLDER


def module_classes(source: Path) -> tuple[str, ...]:
    """Names of the nn.Module classes that a Python file defines, read without running it; none if it is no Python.

    Those that the file itself makes no use of come first: blocks are used by the network that is made of them.
    """
    modules: list[ast.ClassDef] = []
    for node in _parsed(source):
        known = {m.name for m in modules}
        if isinstance(node, ast.ClassDef) and any(_is_module(base, known) for base in node.bases):
            modules.append(node)
    used = {n.id for m in modules for n in ast.walk(m) if isinstance(n, ast.Name)}
    return tuple(m.name for m in sorted(modules, key=lambda m: m.name in used))


def _data(arch: str) -> str | None:
    """The function ``batches`` in the file of the architecture, the name under which bnfix documents them."""
    source = arch.rpartition(":")[0]
    if not source.endswith(".py"):
        return None
    defined = any(isinstance(node, ast.FunctionDef) and node.name == "batches" for node in _parsed(Path(source)))
    return f"{source}:batches" if defined else None


def _parsed(source: Path) -> list[ast.stmt]:
    try:
        if source.stat().st_size > _MAX_SOURCE:
            return []
        return ast.parse(source.read_bytes()).body
    except (OSError, SyntaxError, ValueError, RecursionError, MemoryError):
        return []


def _is_module(base: ast.expr, known: Iterable[str]) -> bool:
    name = ast.unparse(base)
    return name in known or name.rpartition(".")[2] in ("Module", "Sequential", "LightningModule")


def _class_beside(path: Path) -> str | None:
    found = []
    for source in _sources(path.parent):
        classes = module_classes(source)
        if classes:
            found.append((source, classes))
    alike = [f for f in found if f[0].stem == path.stem] or [f for f in found if f[0].stem.startswith(path.stem)]
    chosen = (alike or found)[:1] if alike or len(found) == 1 else []
    return next((f"{source}:{classes[0]}" for source, classes in chosen), None)


def _sources(folder: Path) -> list[Path]:
    try:
        with os.scandir(folder) as entries:
            names = sorted(e.name for _, e in zip(range(_MAX_FILES), entries, strict=False) if e.name.endswith(".py"))
    except OSError:
        return []
    return [folder / name for name in names[:20]]
