"""What a reproduction of a public bug is: where it was reported, the code that names it, and both variants to run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from bnfix.types import Diagnosis

Shown = Callable[[bool], Diagnosis]
GITHUB = "https://github.com"


@dataclass(frozen=True)
class Bug:
    """``show(fixed)`` runs the user's code in one of its two variants and returns what bnfix says of it.

    ``code`` is the finding that is to come first. ``thread`` is the report: ``owner/name#number`` on GitHub.
    """

    name: str
    code: str
    thread: str
    show: Shown

    @property
    def url(self) -> str:
        """Where it can be read; issues and pull requests share their numbers, and GitHub redirects."""
        repository, _, number = self.thread.partition("#")
        return f"{GITHUB}/{repository}/issues/{number}"


BUGS: list[Bug] = []
"""All of them, filled as the modules with reproductions are imported."""


def bug(code: str, thread: str) -> Callable[[Shown], Shown]:
    """Adds a reproduction to the table, under the name of its function."""

    def add(show: Shown) -> Shown:
        BUGS.append(Bug(show.__name__, code, thread, show))
        return show

    return add
