"""Every error that bnfix raises on purpose.

::

    BnfixError                      something a person can act on; the command line exits 2
    ├── LoadError                   a file can't be read as what was asked for
    │   ├── UntrustedModelError     loading it could run code, and nobody said --trust (or it never may)
    │   └── UnknownFormatError      the content is no model file that bnfix knows
    ├── TraceError                  the model's graph can't be had, or can't be had safely
    ├── PassError                   the user's own forward failed on the given input
    ├── CalibrationError            statistics can't be re-estimated; the model is as it was
    ├── ExportError                 the model can't be exported as asked; nothing was written
    ├── WatchError                  a training loop under watch(strict=True) did what it must not
    └── MissingDependencyError      an optional package is absent; names the extra that brings it

Wrong arguments raise ``ValueError`` or ``TypeError``, as everywhere in Python. A message says where,
what, and what to do next.
"""

from __future__ import annotations


def one_line(error: BaseException, limit: int = 400) -> str:
    """An exception of somebody else's as part of a message: its type and the first line of what it says.

    Of one that a DataLoader hands on from a worker, that is what the worker raised.
    """
    caught = str(error).rpartition("Traceback (most recent call last):\n")
    if str(error).startswith("Caught ") and caught[1]:
        raised = next((line for line in caught[2].splitlines() if line and not line[0].isspace()), "")
        return f"{raised[:limit]} (in a worker)"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:limit]}" if lines else type(error).__name__


class BnfixError(Exception):
    """Base of all errors raised on purpose.

    ``hint`` holds the next steps, one a line, ready to paste; the command line prints them indented.
    """

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        if not self.hint:
            return self.message
        return self.message + "".join(f"\n  {line}" for line in self.hint.splitlines())


class LoadError(BnfixError):
    """A file can't be read as what was asked for."""


class UntrustedModelError(LoadError):
    """Loading the file could run code that came with it."""


class UnknownFormatError(LoadError):
    """The content is no model file that bnfix knows."""


class TraceError(BnfixError):
    """The model's graph can't be had, or can't be had without touching the model."""


class PassError(BnfixError):
    """The model's own forward failed on the given input."""


class CalibrationError(BnfixError):
    """Statistics can't be re-estimated; the model is as it was."""


class ExportError(BnfixError):
    """The model can't be exported as asked; nothing was written."""


class WatchError(BnfixError):
    """A training loop went wrong in a way that ``bnfix.watch(strict=True)`` does not let pass.

    ``finding`` is the :class:`bnfix.Finding`; the traceback leads to the line of the loop that does it.
    """

    def __init__(self, message: str, *, finding: object = None) -> None:
        super().__init__(message)
        self.finding = finding


class MissingDependencyError(BnfixError):
    """An optional package is absent."""

    def __init__(self, package: str, extra: str, purpose: str) -> None:
        super().__init__(f"{purpose} needs {package}", hint=f"pip install 'bnfix[{extra}]'")
        self.package = package
        self.extra = extra
