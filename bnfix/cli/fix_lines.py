"""What to type for a fix, as a whole command line that can be pasted."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import re
import shlex
from typing import TYPE_CHECKING

from bnfix.cli import options as o
from bnfix.types import Safety

if TYPE_CHECKING:
    from bnfix.types import FileInfo, Fix

DATA = "train_images/"
MENDS = ("set", "float", "reset")
_DONE = {
    "check": "fixed", "fold": "folded", "recalibrate": "recalibrated", "swap": "swapped", "unshare": "unshared",
}  # fmt: skip


def line_of(
    asked: o.Asked, fix: Fix, code: str, info: FileInfo | None, *, mask: str | None = None, reference: str = ""
) -> str:
    """The command that does ``fix`` on the model that was asked about; empty where none does.

    An ONNX file is exported again from its ``reference``, where that was named.
    """
    if asked.model.endswith(".onnx"):
        again = asked.next("export", reference, trust=asked.trust)
        return f"{again} -o {o.quoted(os.path.splitext(asked.model)[0] + '-exported.onnx')}" if reference else ""
    asked = _with_arch(asked)
    pickled = info is not None and info.kind == "pickled_module"
    if fix.verb == "recalibrate":
        fed = dataclasses.replace(asked, input=(), data=asked.data or DATA)
        if info is not None and info.kind == "torchscript":  # what runs in there can't be observed: its class can
            fed = dataclasses.replace(fed, model="weights.pt", arch=asked.arch or "net.py:Net", trust=False)
        more = ["--mask", mask] if mask else []
        more += ["--include-frozen"] if fix.options.get("include_frozen") else []
        return _line(fed, "recalibrate", more)
    if fix.verb == "fold" or (fix.verb in ("unshare", "swap") and _is_command(fix.verb)):
        fed = dataclasses.replace(asked, data=None) if asked.input else asked
        if fix.verb == "swap":  # the new norms are fitted to data, and which are fragile is asked of it
            fed = dataclasses.replace(asked, input=(), data=asked.data or DATA)
        return _line(fed, fix.verb, _options(fix))
    if fix.verb == "unshare" or (fix.verb in MENDS and pickled):
        needs_data = fix.safety is Safety.NEEDS_DATA and asked.data is None
        fed = dataclasses.replace(asked, data=DATA) if needs_data else asked
        return _line(fed, "check", ["--select", code, "--fix"])
    return ""


def _line(asked: o.Asked, verb: str, more: list[str]) -> str:
    words = [*more, "-o", o.beside(o.named(asked.model), _DONE[verb])]
    return f"{asked.next(verb, asked.model, trust=asked.trust)} {shlex.join(words)}"


def _options(fix: Fix) -> list[str]:
    """Arguments as options: several layers are one regular expression."""
    words: list[str] = []
    for name, value in fix.options.items():
        if isinstance(value, (tuple, list)):
            value = f"^({'|'.join(re.escape(str(v)) for v in value)})$"
        words += [f"--{name.replace('_', '-')}", str(value)]
    return words


def _with_arch(asked: o.Asked) -> o.Asked:
    """With the likeliest architecture where weights were looked at without one: an example, as ``bnfix info`` gives."""
    from bnfix import api
    from bnfix.cli.checking import WEIGHTS
    from bnfix.formats import advice

    if asked.arch is not None or not os.path.isfile(asked.model):
        return asked
    info = api.info(asked.model)
    if info.kind not in WEIGHTS:
        return asked
    return dataclasses.replace(asked, arch=advice.example_arch(asked.model, info.facts.get("arch")))


def _is_command(verb: str) -> bool:
    return importlib.util.find_spec(f"bnfix.cli.commands.{verb}") is not None
