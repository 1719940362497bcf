"""What a file is, by its content."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from bnfix.types.values import Value


@dataclass(frozen=True)
class NormInfo:
    """A norm as a file shows it: no model needed."""

    path: str
    channels: int
    dtype: str
    affine: bool


@dataclass(frozen=True)
class FileInfo(Value):
    """What a file is, found out by its content alone.

    ``kind`` is a stable word (``state_dict``, ``pickled_module``, ``lightning``, ``torchscript``,
    ``exported_program``, ``safetensors``, ``onnx``, ``git_lfs``, ``html``, ``empty``, ``truncated``,
    ``unknown`` …), ``container`` how it is packed (``zip``, ``legacy``, ``pickle``, ``safetensors``,
    ``protobuf``, ``text``), ``wrapper`` the key under which the weights lie, ``prefix`` what would be
    stripped from names, ``names_code`` the importable names that loading would run (``dangerous`` those
    that no flag admits), ``advice`` the next step.
    """

    path: str
    kind: str
    container: str
    size: int
    title: str
    loadable: bool
    tensors: int = 0
    parameters: int = 0
    bytes: int = 0
    dtypes: Mapping[str, int] = field(default_factory=dict)
    norms: tuple[NormInfo, ...] = ()
    wrapper: str | None = None
    other_wrappers: tuple[str, ...] = ()
    prefix: str = ""
    names_code: tuple[str, ...] = ()
    dangerous: tuple[str, ...] = ()
    root_class: str | None = None
    recipe: Mapping[str, Any] | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)
    advice: str = ""
