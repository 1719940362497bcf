"""One file a kind of value; found by walking. Each defines a :class:`PageOf`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar

from bnfix.registry import plugins
from bnfix.render.legible import all_legible
from bnfix.render.page import Page


class PageOf(ABC):
    """How one kind of value is laid out for a reader."""

    kind: ClassVar[type]

    @abstractmethod
    def page(self, value: Any) -> Page:
        """The whole value, laid out."""


def page_of(value: Any) -> Page:
    """The page of ``value``, with nothing in it that a terminal would obey.

    Raises:
        TypeError: nothing here knows how to lay it out.
    """
    for layout in plugins(__name__, PageOf):  # type: ignore[type-abstract]
        if isinstance(value, layout.kind):
            return all_legible(layout.page(value))
    raise TypeError(f"bnfix.render has no page for a value of type {type(value).__name__}")
