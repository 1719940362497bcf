"""``[tool.bnfix]`` of a project: which rules, where not, and its own thresholds."""

from __future__ import annotations

import difflib
import importlib
import math
import os
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bnfix.errors import BnfixError
from bnfix.rules.judging import near_codes, rule_of, unknown_codes
from bnfix.rules.pages import thresholds_of

KEYS = ("select", "ignore", "per-layer-ignores", "thresholds")
FILE = "pyproject.toml"


@dataclass(frozen=True)
class Config:
    """What a project wants of ``check``; ``source`` is the file that says so, empty where none does."""

    select: tuple[str, ...] = ()
    ignore: tuple[str, ...] = ()
    per_layer_ignores: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    thresholds: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    source: str = ""

    def before(self, select: Iterable[str], ignore: Iterable[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """(select, ignore) with what was asked on the spot before what the file says.

        ``select`` takes the place of the file's, and a rule that it names is not ignored by the file any more;
        ``ignore`` joins that of the file.
        """
        asked, left = tuple(select), self.ignore
        if asked:
            left = tuple(c for c in self.ignore if not any(a.startswith(c) for a in asked))
        return asked or self.select, (*left, *ignore)


def read_config(folder: str | os.PathLike[str] = ".") -> Config:
    """The table ``[tool.bnfix]`` of the nearest ``pyproject.toml``, in ``folder`` or above it, that has one.

    Raises:
        BnfixError: it holds a key, a code or a threshold that there is not; names those that there are.
    """
    start = Path(folder).resolve()
    for above in (start, *start.parents):
        file = above / FILE
        table = _table(file)
        if table is not None:
            return _read(table, str(file))
    return Config()


def check_codes(asked: Iterable[str], where: str) -> None:
    """Whether there are rules of these codes.

    Raises:
        BnfixError: not of one; names those that are near.
    """
    for code in unknown_codes(asked):
        near = near_codes(code)
        hint = f"near that: {', '.join(near)}\n" if near else ""
        raise BnfixError(f"{where}: there is no rule {code!r}", hint=f"{hint}all of them:   bnfix explain")


def check_thresholds(thresholds: Mapping[str, Mapping[str, Any]], where: str) -> dict[str, dict[str, float]]:
    """``thresholds`` by code, found to be numbers under names that the rules know.

    Raises:
        BnfixError: one is not; names those that there are.
    """
    found: dict[str, dict[str, float]] = {}
    for code, limits in thresholds.items():
        rule = rule_of(code)
        if rule is None:
            check_codes([code], where)
            raise BnfixError(f"{where}: {code!r} is no whole code", hint="thresholds are those of one rule, as BN301")
        known = thresholds_of(rule)
        if not isinstance(limits, Mapping):
            raise BnfixError(
                f"{where}: thresholds of {code} are names with numbers, not {limits!r}", hint=_named(known)
            )
        for name, value in limits.items():
            if name not in known:
                close = difflib.get_close_matches(str(name), known, n=1)
                meant = f"did you mean {close[0]}?\n" if close else ""
                raise BnfixError(f"{where}: {rule.code} has no threshold {name!r}", hint=meant + _named(known))
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
                raise BnfixError(f"{where}: {rule.code} {name} is a number, not {value!r}", hint=_named(known))
            found.setdefault(rule.code, {})[name] = float(value)
    return found


def _named(known: Mapping[str, float]) -> str:
    if not known:
        return "it has none"
    return f"its thresholds: {', '.join(f'{name} = {value:g}' for name, value in known.items())}"


def _table(file: Path) -> Mapping[str, Any] | None:
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):  # none here, or nothing that TOML could be
        return None
    if "bnfix" not in text:
        return None
    toml = importlib.import_module("tomllib" if sys.version_info >= (3, 11) else "tomli")
    try:
        table = toml.loads(text).get("tool", {}).get("bnfix")
    except ValueError as error:
        raise BnfixError(f"{file} is no TOML: {error}") from error
    except AttributeError:  # 'tool' is no table: a file of somebody else's
        return None
    if table is not None and not isinstance(table, Mapping):
        raise BnfixError(f"{file}: tool.bnfix is a table, not {table!r}", hint=f"[tool.bnfix] with {', '.join(KEYS)}")
    return table


def _read(table: Mapping[str, Any], file: str) -> Config:
    where = f"{file}, [tool.bnfix]"
    for key in table:
        if key not in KEYS:
            close = difflib.get_close_matches(key.replace("_", "-"), KEYS, n=1)
            meant = f"did you mean {close[0]}?\n" if close else ""
            raise BnfixError(f"{where}: there is no key {key!r}", hint=f"{meant}the keys: {', '.join(KEYS)}")
    layers = _table_in(table, "per-layer-ignores", where, 'a table, such as "backbone.*" = ["BN104"]')
    limits = _table_in(table, "thresholds", where, "a table of tables: [tool.bnfix.thresholds.BN301]")
    return Config(
        _codes(table.get("select", []), f"{where} select"),
        _codes(table.get("ignore", []), f"{where} ignore"),
        {pattern: _codes(codes, f"{where} per-layer-ignores {pattern!r}") for pattern, codes in layers.items()},
        check_thresholds(limits, f"{where} thresholds"),
        file,
    )


def _table_in(table: Mapping[str, Any], key: str, where: str, form: str) -> Mapping[str, Any]:
    value = table.get(key, {})
    if not isinstance(value, Mapping):
        raise BnfixError(f"{where}: {key} is {form}; not {value!r}")
    return value


def _codes(value: Any, where: str) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(code, str) for code in value):
        raise BnfixError(f"{where} is a list of codes, not {value!r}", hint='such as ["BN104", "BN3"]')
    check_codes(value, where)
    return tuple(value)
