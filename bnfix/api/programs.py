"""Verbs on exported programs: a program becomes a module, the verb does its work on that, and back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch.export import ExportedProgram

    from bnfix.types import Result


def fold_program(fold: Callable[..., Result], program: ExportedProgram, example: Any, **options: Any) -> Result:
    """``fold`` of ``program``: ``Result.model`` is a program too, with the same inputs, outputs and varying sizes.

    Without ``example`` or ``data`` it is proven on the inputs that the program was exported with.

    Raises:
        ValueError: ``inplace``: a program can't be changed.
        ExportError: the folded model can't be exported as the program was.
    """
    from bnfix.graph import drawn_example, from_exported, to_exported
    from bnfix.running import Call

    if options.get("inplace"):
        raise ValueError("an exported program can't be changed in place: take the model of the result")
    if example is None and options.get("data") is None:
        example = Call(*drawn_example(program))
    result = fold(from_exported(program), example, **options)
    return result if result.model is None else replace(result, model=to_exported(result.model))  # type: ignore[arg-type]
