"""TorchScript and exported programs: recognised, so that the message is clear."""

from __future__ import annotations

from bnfix.formats.base import MAX_TEXT, Format, Probe
from bnfix.types import FileInfo


class TorchScript(Format):
    """What ``torch.jit.save`` writes: a zip with ``code/`` and ``constants.pkl``."""

    order = 12
    kinds = frozenset(["torchscript"])
    containers = frozenset(["zip"])

    def recognise(self, file: Probe) -> FileInfo | None:
        if not file.is_zip or not file.archive.has("data.pkl"):
            return None
        if not (file.archive.has("constants.pkl") or file.archive.has_below("code")):
            return None
        return file.info(
            "torchscript",
            "zip",
            "a TorchScript program, which bnfix does not read yet",
            advice="save the state_dict of its model, then: bnfix fold weights.pt --arch pkg.mod:Class -o folded.pt",
        )


class ExportedProgram(Format):
    """What ``torch.export.save`` writes: a zip with ``archive_format`` or, before 2.7, a serialized program."""

    order = 10
    kinds = frozenset(["exported_program"])
    containers = frozenset(["zip"])

    def recognise(self, file: Probe) -> FileInfo | None:
        if not file.is_zip:
            return None
        archive = file.archive
        marked = archive.has("archive_format") and archive.read("archive_format", MAX_TEXT).strip() == b"pt2"
        program = "serialized_exported_program.json"
        if not (marked or archive.has(program) or program in archive.names):
            return None
        return file.info(
            "exported_program",
            "zip",
            "an exported program (.pt2), which bnfix does not read yet",
            advice="save the state_dict of its model, then: bnfix fold weights.pt --arch pkg.mod:Class -o folded.pt",
        )
