"""Numbers and counts as a person reads them."""

from __future__ import annotations

import math
from collections.abc import Iterable

NONE = "–"


def ratio(value: float | None) -> str:
    """A dimensionless figure, to about two digits: ``0.021``, ``0.8``, ``1.3``, ``42``, ``3.1e+05``."""
    if value is None:
        return NONE
    if not math.isfinite(value):
        return "nan" if math.isnan(value) else "inf"
    if value == 0:
        return "0"
    if 0.095 <= abs(value) < 9.95:
        return f"{value:.1f}"
    if 0.01 <= abs(value) < 0.095:
        return f"{value:.2g}"
    return f"{value:.0f}" if 9.95 <= abs(value) < 10_000 else f"{value:.1e}"


def figure(value: float | None) -> str:
    """A statistic, to about two digits: ``4e-07``, ``0.0042``, ``0.31``, ``1.30``, ``42``, ``346``; NaN is unknown."""
    if value is None or math.isnan(value):
        return NONE
    if value == 0:
        return "0"
    if 0.095 <= abs(value) < 9.95:
        return f"{value:.2f}"
    if 0.00095 <= abs(value) < 0.095:
        return f"{value:#.2g}"
    return f"{value:,.0f}" if 9.95 <= abs(value) < 9999.5 else f"{value:.0e}"


def ulp(value: float | None) -> str:
    """Units in the last place; two decimals, because ½ is the line that counts."""
    if value is None:
        return NONE
    return f"{value:.2f}" if value < 100 else ratio(value)


def error(value: float | None) -> str:
    """An absolute or relative error: ``1.2e-06``."""
    if value is None:
        return NONE
    return "0" if value == 0 else f"{value:.1e}"


def percent(value: float | None) -> str:
    """A fraction as percent; never rounded up to 100 %."""
    if value is None:
        return NONE
    if value == 1:
        return "100 %"
    return f"{min(value * 100, 99.99):.2f} %"


def size(count: int) -> str:
    """Bytes in units of 1000, as ``ls -h --si`` and download pages count."""
    if count < 1000:
        return f"{count} bytes"
    for unit, scale in (("kB", 1e3), ("MB", 1e6)):
        if count < 999.5 * scale:
            return f"{count / scale:.3g} {unit}"
    return f"{count / 1e9:.3g} GB"


def count(number: int, noun: str) -> str:
    """``1 norm``, ``52 norms``, ``1,234 tensors``."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def worst(values: Iterable[float | None]) -> float | None:
    """The largest of the figures that were measured; NaN is worse than any; None where none was."""
    known = [v for v in values if v is not None]
    if any(math.isnan(v) for v in known):
        return math.nan
    return max(known, default=None)
