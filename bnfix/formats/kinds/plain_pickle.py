"""A pickle that torch did not write: scikit-learn, joblib, an attack. Never loaded, looked at all the same."""

from __future__ import annotations

import io
import tarfile

from bnfix.formats import torch_files
from bnfix.formats.base import MAX_PICKLE, Format, Probe
from bnfix.formats.pickles.danger import PACKED
from bnfix.formats.pickles.machine import Pickle, examine
from bnfix.types import FileInfo

_TEXT_OPCODES = b"(cdilIJKLMNSTUVXF]})"  # with which a pickle of protocol 0 or 1 can begin


class PlainPickle(Format):
    """One pickle from the first byte on, of any protocol."""

    order = 80
    kinds = frozenset(["pickle"])
    containers = frozenset(["pickle"])

    def recognise(self, file: Probe) -> FileInfo | None:
        if not file.head:
            return None
        new = file.head[0] == 0x80 and len(file.head) > 1 and file.head[1] <= 5
        if not new and file.head[:1] not in _TEXT_OPCODES:
            return None
        pickle = examine(file.pickled)
        code, dangerous = torch_files.judged(pickle.names)
        if pickle.problem and not (dangerous and _plausible(pickle)) and not (new and pickle.names):
            return None  # bytes that begin like a pickle
        if dangerous == (PACKED,):
            title = "tensors written by pickle.dump: each hides a pickle of its own, which loading would run unseen"
            advice = f"where you trust it, save it again:  {_again(file.shown)}"
        elif dangerous:
            title = f"a pickle that names {', '.join(dangerous[:3])}: loading it would run that"
            advice = "do not load it; get the weights from a source you trust, as safetensors"
        elif pickle.problem:
            return file.info(
                "truncated",
                "pickle",
                "a pickle, cut off or damaged",
                names_code=code,
                advice="copy or download it again",
            )
        else:
            title = "a pickle that torch.save did not write"
            advice = "load it where you trust it, and there: torch.save(model.state_dict(), 'weights.pt')"
        return file.info("pickle", "pickle", title, names_code=code, dangerous=dangerous, advice=advice)


def _again(path: str) -> str:
    return f"torch.save(pickle.load(open({path!r}, 'rb')), 'weights.pt')"


def _plausible(pickle: Pickle) -> bool:
    """Names as a pickle writes them, not what random bytes happen to spell."""
    return all(all(part.isidentifier() for part in str(name).split(".")) for name in pickle.names)


class TorchTar(Format):
    """What torch wrote before 0.1.10: a tar of pickles."""

    order = 60
    kinds = frozenset(["torch_tar"])
    containers = frozenset(["tar"])

    def recognise(self, file: Probe) -> FileInfo | None:
        if file.head[257:262] != b"ustar":
            return None
        title, dangerous = "a tar archive", ()
        names: set[str] = set()
        with tarfile.TarFile.open(fileobj=io.BytesIO(file.read(0, min(file.size, MAX_PICKLE))), mode="r:") as tar:
            try:
                for _ in range(64):
                    member = tar.next()
                    if member is None:
                        break
                    names.add(member.name)
            except (tarfile.TarError, EOFError, ValueError, OSError):
                title = "a tar archive, cut off or damaged"
        if {"pickle", "tensors", "storages"} <= names:
            title = "a torch file of before 0.1.10 (tar), which torch's safe loader does not read"
        return file.info(
            "torch_tar" if "0.1.10" in title else "tar",
            "tar",
            title,
            dangerous=dangerous,
            advice="unpack it and give the file of weights in it"
            if "0.1.10" not in title
            else "save it again with a newer torch, where you trust it",
        )
