"""One file a kind of value; found by walking. Each defines a :class:`PageOf`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

from bnfix.registry import plugins
from bnfix.render.legible import all_legible
from bnfix.render.page import Column, Page


class PageOf(ABC):
    """How one kind of value is laid out for a reader.

    ``columns`` are those of a table in which a value is one row among several, beside the file that it is about.
    """

    kind: ClassVar[type]
    columns: ClassVar[tuple[Column, ...]] = (Column("result"),)

    def suits(self, value: Any) -> bool:
        """Whether this is how ``value`` is laid out; a kind that several verbs return has a page for each of them."""
        return isinstance(value, self.kind)

    @abstractmethod
    def page(self, value: Any) -> Page:
        """The whole value, laid out."""

    def cells(self, value: Any) -> tuple[str, ...]:
        """The value in one row, under ``columns``."""
        return (" · ".join(self.page(value).verdict),)

    def remarks(self, value: Any) -> tuple[str, ...]:
        """What does not fit into the row and has to be said all the same."""
        return ()

    def total(self, values: Sequence[Any]) -> tuple[str, ...]:
        """What several come to, the result first."""
        return (f"{len(values)} files",)


def page_of(value: Any) -> Page:
    """The page of ``value``, with nothing in it that a terminal would obey.

    Raises:
        TypeError: nothing here knows how to lay it out.
    """
    return all_legible(layout_of(value).page(value))


def layout_of(value: Any) -> PageOf:
    """What knows how to lay ``value`` out.

    Raises:
        TypeError: nothing here does.
    """
    for layout in plugins(__name__, PageOf):  # type: ignore[type-abstract]
        if layout.suits(value):
            return layout
    raise TypeError(f"bnfix.render has no page for a value of type {type(value).__name__}")
