"""TorchScript: code and tensors in one archive, read by torch's own interpreter."""

from __future__ import annotations

from typing import Any

from bnfix.errors import LoadError, UntrustedModelError, one_line
from bnfix.formats import advice
from bnfix.formats.base import Format, Probe
from bnfix.types import FileInfo

_WAY_OUT = "save the state_dict of its Python class as weights.pt, then"


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
        file.archive.check_sums()
        folded = advice.beside(file.shown).rpartition(".")[0] + ".pt2"
        trusted = advice.command("fold", file.shown, trust=True, output=folded)
        safer = advice.command("fold", "weights.pt", arch="pkg.mod:Class", output="folded.pt")
        return file.info(
            "torchscript",
            "zip",
            "a TorchScript program",
            loadable=True,
            names_code=("TorchScript code",),
            advice=f"{advice.TRUST}{advice.GAP}{trusted}\nsafer: {_WAY_OUT}{advice.GAP}{safer}",
        )

    def read(self, info: FileInfo, *, trust: bool) -> Any:
        if not trust:
            raise UntrustedModelError(
                f"{info.path} is {info.title}: loading it runs code inside, which may read and write files.",
                hint=info.advice,
            )
        import warnings

        import torch

        try:
            with warnings.catch_warnings(), open(info.path, "rb") as file:
                warnings.simplefilter("ignore")  # that TorchScript is deprecated is no news to who has such a file
                script = torch.jit.load(file, map_location="cpu")  # type: ignore[no-untyped-call]
        except Exception as error:  # its interpreter and a file's own code fail in every way there is
            raise LoadError(
                f"{info.path} can't be loaded: {one_line(error, 200)}",
                hint="is the file whole? copy or download it again",
            ) from error
        if not any(True for _ in (*script.parameters(), *script.buffers())):
            raise LoadError(
                f"{info.path} is a frozen TorchScript program: its weights are constants in its code, and freezing "
                "folds norms by itself. There is nothing to fold",
                hint=f"to have a model again: {_WAY_OUT}{advice.GAP}"
                + advice.command("fold", "weights.pt", arch="pkg.mod:Class", output="folded.pt"),
            )
        return script
