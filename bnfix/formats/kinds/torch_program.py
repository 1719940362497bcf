"""Exported programs, ``.pt2``: a graph as JSON, raw tensors beside it."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bnfix.errors import BnfixError, LoadError, UntrustedModelError, one_line
from bnfix.formats import advice
from bnfix.formats.base import MAX_TEXT, Format, Probe
from bnfix.formats.described import described
from bnfix.formats.names import wrapped_by_training
from bnfix.formats.programs import look, refuse_several
from bnfix.types import FileInfo

if TYPE_CHECKING:
    from torch import nn

_OLD = "serialized_exported_program.json"


class ExportedProgram(Format):
    """What ``torch.export.save`` writes: a zip with ``archive_format`` or, before 2.8, a serialized program."""

    order = 10
    kinds = frozenset(["exported_program"])
    containers = frozenset(["zip"])
    suffixes = (".pt2",)

    def recognise(self, file: Probe) -> FileInfo | None:
        if not file.is_zip:
            return None
        archive = file.archive
        marked = archive.has("archive_format") and archive.read("archive_format", MAX_TEXT).strip() == b"pt2"
        if not (marked or archive.has(_OLD) or _OLD in archive.names):
            return None
        if archive.has_below("data/aotinductor") or not (archive.has("models/model.json") or archive.has(_OLD)):
            refuse_several(archive, file.shown)
            return file.info(
                "compiled_package",
                "zip",
                "a compiled model (.pt2 of AOTInductor): native code, in which there is no graph to fold",
                names_code=("native code",),
                advice="fold the exported program before it is compiled:  bnfix fold program.pt2 -o folded.pt2",
            )
        refuse_several(archive, file.shown)
        found = look(archive)
        if not found.dangerous:
            archive.check_sums()
        numbers = described(found.tensors, wrapped_by_training(()))
        return file.info(
            "exported_program",
            "zip",
            "an exported program (.pt2)"
            if not found.dangerous
            else f"an exported program that names {', '.join(found.dangerous[:3])}: loading it would run that",
            loadable=not found.dangerous,
            names_code=tuple(found.code),
            dangerous=tuple(found.dangerous),
            advice=advice.command("fold", file.shown, trust=bool(found.code), output=advice.beside(file.shown)),
            **numbers,
        )

    def read(self, info: FileInfo, *, trust: bool) -> Any:
        if info.names_code and not trust:
            shown = ", ".join(info.names_code[:3])
            raise UntrustedModelError(
                f"{info.path} is an exported program that holds more than a graph and tensors ({shown}): "
                "loading it can run any code inside.",
                hint=f"{advice.TRUST}{advice.GAP}{info.advice}",
            )
        import torch

        from bnfix.graph import quiet_export

        try:
            with quiet_export(), open(info.path, "rb") as file:
                return torch.export.load(file)  # type: ignore[arg-type]
        except Exception as error:  # torch's reader of programs fails in every way there is
            raise LoadError(
                f"{info.path} can't be loaded: {one_line(error, 200)}",
                hint="was it written by a newer torch? is the file whole? copy or download it again",
            ) from error

    def write(
        self, path: Path, model: nn.Module, recipe: str | None, *, whole: bool, calls: Sequence[Any] = ()
    ) -> None:
        import torch

        from bnfix.graph import exported, quiet_export

        program = exported(model, calls)
        # Into memory first: on a disk that is full torch's writer ends the process, as it writes again when it goes.
        content = io.BytesIO()
        try:
            with quiet_export():
                torch.export.save(program, content)
                content.seek(0)
                torch.export.load(content)  # torch writes programs that it can't read
        except BnfixError:
            raise
        except Exception as error:  # its writer and its reader refuse each in its own ways
            raise LoadError(f"torch can't save this program, or can't read it again: {one_line(error, 200)}") from error
        path.write_bytes(content.getbuffer())
