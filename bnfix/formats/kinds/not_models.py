"""What is taken for a model file and is none: each named, with the way to what was meant."""

from __future__ import annotations

import re
import shlex

from bnfix.formats.advice import module_classes
from bnfix.formats.base import MAX_TEXT, Format, Probe
from bnfix.formats.names import printable
from bnfix.types import FileInfo


class Empty(Format):
    """Nothing."""

    order = 0
    kinds = frozenset(["empty"])

    def recognise(self, file: Probe) -> FileInfo | None:
        if file.size:
            return None
        return file.info("empty", "nothing", "an empty file (0 bytes)", advice="copy or download it again")


class GitLfs(Format):
    """A pointer of git-lfs: the text that stands in for a file until it is pulled."""

    order = 1
    kinds = frozenset(["git_lfs"])

    def recognise(self, file: Probe) -> FileInfo | None:
        if not file.head.startswith(b"version https://git-lfs.github.com/spec/"):
            return None
        size = re.search(rb"^size (\d{1,20})\s*$", file.head, re.MULTILINE)
        facts = {"size": int(size[1])} if size else {}
        return file.info(
            "git_lfs", "text", "a git-lfs pointer, not the file itself", facts=facts,
            advice=f"git lfs install && git lfs pull --include {shlex.quote(file.path.name)}",
        )  # fmt: skip


class Html(Format):
    """A web page, saved in place of the download."""

    order = 2
    kinds = frozenset(["html"])

    def recognise(self, file: Probe) -> FileInfo | None:
        start = file.head.removeprefix(b"\xef\xbb\xbf").lstrip()[:512].lower()
        if not re.match(rb"<!doctype html|<html|<head|<(\?xml|!--)[^\0]*<(!doctype )?html", start):
            return None
        title = re.search(rb"<title[^>]*>([^<]{1,200})", file.head, re.IGNORECASE)
        facts = {"title": printable(title[1].decode("utf-8", "replace").strip())} if title else {}
        return file.info(
            "html", "text", "a web page (HTML), not a model", facts=facts,
            advice="the download gave a page, often a login or an error: take the direct link of the file",
        )  # fmt: skip


_FOREIGN = (  # first bytes, kind, title, advice
    (b"\x89HDF\r\n\x1a\n", "hdf5", "an HDF5 file, as Keras writes weights", "convert them to a state_dict"),
    (b"GGUF", "gguf", "a GGUF file, quantized weights of llama.cpp", "give the original weights, as safetensors"),
    (b"\x93NUMPY", "npy", "a NumPy array, which is data", "give it to --data, beside a model"),
    (b"\x1f\x8b", "gzip", "a gzip archive", "unpack it:  gunzip or tar xzf"),
    (b"BZh", "bzip2", "a bzip2 archive", "unpack it:  bunzip2 or tar xjf"),
    (b"\xfd7zXZ\x00", "xz", "an xz archive", "unpack it:  unxz or tar xJf"),
    (b"\x28\xb5\x2f\xfd", "zstd", "a zstd archive", "unpack it:  unzstd"),
    (b"7z\xbc\xaf\x27\x1c", "7z", "a 7z archive", "unpack it:  7z x"),
    (b"Rar!", "rar", "a rar archive", "unpack it:  unrar x"),
    (b"\x89PNG", "image", "a PNG image, not a model", ""),
    (b"\xff\xd8\xff", "image", "a JPEG image, not a model", ""),
    (b"%PDF", "pdf", "a PDF document, not a model", ""),
)  # fmt: skip


class Foreign(Format):
    """Formats of others, known by their first bytes."""

    order = 50
    kinds = frozenset(row[1] for row in _FOREIGN)

    def recognise(self, file: Probe) -> FileInfo | None:
        for magic, kind, title, advice in _FOREIGN:
            if file.head.startswith(magic):
                return file.info(kind, "binary", title, advice=advice)
        if file.head[4:8] == b"TFL3":
            return file.info("tflite", "binary", "a TensorFlow Lite model", advice="give the weights it was made from")
        if re.match(rb"\x08\x01\x12", file.head) and b"saved_model" in file.path.name.encode():
            return file.info(
                "tensorflow", "protobuf", "a TensorFlow SavedModel", advice="convert the weights to a state_dict"
            )
        return None


class ForeignZip(Format):
    """Zip archives that are no torch files."""

    order = 60
    kinds = frozenset(["npz", "keras", "torch_package", "zip"])

    def recognise(self, file: Probe) -> FileInfo | None:
        if not file.head.startswith((b"PK\x03\x04", b"PK\x05\x06")):
            return None
        if file.head[:4] == b"PK\x05\x06":
            return file.info("zip", "zip", "an empty zip archive", advice="copy or download it again")
        names = file.archive.names
        if names and all(n.endswith(".npy") for n in names):
            advice = "give them to --data, beside a model"
            return file.info("npz", "zip", "NumPy arrays (.npz), which are data", advice=advice)
        if "model.weights.h5" in names:
            return file.info("keras", "zip", "a Keras model", advice="convert the weights to a state_dict")
        if file.archive.has(".data/extern_modules"):
            return file.info(
                "torch_package", "zip", "a torch.package, which carries code", advice="save its model's state_dict()"
            )
        models = [n for n in names if n.endswith((".pt", ".pth", ".safetensors", ".onnx", ".bin", ".ckpt"))]
        inside = f" ({', '.join(models[:3])} in it)" if models else ""
        return file.info(
            "zip",
            "zip",
            f"a zip archive that torch did not write{inside}",
            advice="unzip it, and give the file of weights in it",
        )


class PythonSource(Format):
    """A file of code, given without saying what in it is the model."""

    order = 75
    kinds = frozenset(["python"])

    def recognise(self, file: Probe) -> FileInfo | None:
        if file.path.suffix != ".py" or b"\0" in file.head:
            return None
        classes = module_classes(file.path) or ("Net",)
        advice = f"name the class or function in it, such as  {', '.join(f'{file.shown}:{c}' for c in classes[:4])}"
        return file.info("python", "text", "Python source, not weights", advice=advice)


class Json(Format):
    """The index of a model in several files, or a configuration."""

    order = 70
    kinds = frozenset(["weights_index", "json"])

    def recognise(self, file: Probe) -> FileInfo | None:
        if not re.match(rb'\s*\{\s*"', file.head) or file.size > MAX_TEXT or b"\0" in file.head:
            return None
        if b'"weight_map"' in file.read(0, file.size):
            title = "the index of weights in several files"
            advice = (
                "load it where it is used, then: safetensors.torch.save_file(model.state_dict(), 'weights.safetensors')"
            )
            return file.info("weights_index", "text", title, advice=advice)
        return file.info(
            "json",
            "text",
            "JSON text, such as a configuration, without weights",
            advice="give the file of weights beside it",
        )
