"""What a model is fed with: ``--input`` as random tensors of a shape, ``--data`` as batches from code or arrays."""

from __future__ import annotations

import inspect
import math
import os
import re
import shlex
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bnfix.errors import BnfixError, LoadError, one_line
from bnfix.formats.arrays import ARRAYS, is_arrays, load_call, load_samples
from bnfix.formats.images import SUFFIXES, ImageTransform, load_images
from bnfix.formats.specs import callables, importable_here, parse_spec, resolve
from bnfix.running import Call

MAX_BYTES = 1 << 36
"""Of one random input: what is larger is a slip of the fingers."""

_SHAPE = re.compile(r"(?:(?P<name>[^\W\d]\w*)=)?(?P<shape>\d+(?:x\d+)*)(?::(?P<dtype>\w+))?")


def load_input(spec: str, *, seed: int = 0) -> Call:
    """``1x3x224x224`` as a call with random tensors, the same ones for the same ``seed``; ``inputs.npz`` as it is.

    Several inputs are separated by commas, ``:int64`` after a shape gives its type (floats are normal, integers 0 or 1,
    uint8 from 0 to 255), ``mask=`` before it makes it a keyword argument. A file of arrays holds one call by the
    names of the forward's parameters (:func:`~bnfix.formats.arrays.load_call`).

    Raises:
        ValueError: not such a list.
        LoadError: the file can't be read.
    """
    if is_arrays(spec) or os.path.isfile(spec):
        if not is_arrays(spec):
            raise LoadError(
                f"{spec} is no input that bnfix reads",
                hint=f"a file {', '.join(ARRAYS)}:  np.savez('inputs.npz', image=image, mask=mask)",
            )
        return load_call(Path(spec))
    generator = torch.Generator().manual_seed(seed)
    args: list[Tensor] = []
    kwargs: dict[str, Tensor] = {}
    for part in spec.split(","):
        name, shape, dtype = _parse(part.strip(), spec)
        tensor = _random(shape, dtype, generator)
        if name is None and kwargs:
            raise ValueError(f"{spec!r}: inputs with a name come last")
        if name is None:
            args.append(tensor)
        else:
            kwargs[name] = tensor
    return Call(tuple(args), kwargs)


def _parse(part: str, spec: str) -> tuple[str | None, tuple[int, ...], torch.dtype]:
    match = _SHAPE.fullmatch(part)
    if match is None:
        raise ValueError(f"{spec!r} is no input such as 1x3x224x224, 1x16:int64 or 1x3x8x8,mask=1x8:bool")
    dtype = getattr(torch, match["dtype"] or "float32", None)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"{spec!r}: torch has no type {match['dtype']}")
    shape = tuple(int(s) for s in match["shape"].split("x"))
    if 0 in shape:
        raise ValueError(f"{spec!r}: a size of 0 leaves nothing to compute with")
    if math.prod(shape) * dtype.itemsize > MAX_BYTES:
        raise ValueError(f"{spec!r} is {math.prod(shape) * dtype.itemsize / 2**30:,.0f} GiB")
    return match["name"], shape, dtype


def _random(shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    if dtype.is_floating_point or dtype.is_complex:
        wide = dtype if dtype in (torch.float64, torch.complex64, torch.complex128) else torch.float32
        return torch.randn(shape, generator=generator, dtype=wide).to(dtype)
    return torch.randint(0, 256 if dtype is torch.uint8 else 2, shape, generator=generator).to(dtype)


# ---------------------------------------------------------------------------------------- batches


@dataclass(frozen=True)
class Batches:
    """Batches that can be gone through again and again, each time from the start."""

    start: Callable[[], Iterable[Any]]

    def __iter__(self) -> Iterator[Any]:
        with importable_here():
            yield from self.start()


def load_data(
    spec: str | os.PathLike[str],
    *,
    batch_size: int = 8,
    seed: int = 0,
    batches: int = 4,
    transform: ImageTransform | None = None,
) -> Iterable[Any]:
    """The batches that ``--data`` names.

    ``pkg.mod:callable`` and ``file.py:callable`` give an iterable of batches or a DataLoader, taken as it is, or a
    Dataset or tensor, which is cut into batches of ``batch_size``; a function is called for it. ``.npy``, ``.npz`` and
    ``.safetensors`` hold samples along the first axis: one array gives tensors, several give dicts.
    A folder gives the images in it and below it, in an order drawn with ``seed`` and read by ``transform``
    (:func:`~bnfix.formats.images.image_transform`; ImageNet's at 224 px if None), and the result says in ``describe()``
    what it is. ``random:3x224x224`` gives ``batches`` batches of random samples of that shape: for fold, export and
    verify only.

    What is returned has a ``len``, the number of batches, unless it came from code that has none.

    Raises:
        LoadError: no such thing, or nothing that has batches.
        MissingDependencyError: a folder of images without Pillow.
        ValueError: a shape or batch size that is none.
    """
    if batch_size < 1:
        raise ValueError(f"a batch size of {batch_size}")
    text = os.fspath(spec)
    if text.startswith("random:") and not os.path.exists(text):
        return _random_batches(text.removeprefix("random:"), batch_size, seed, batches)
    named = parse_spec(text)
    if named is not None:
        return _from_object(text, resolve(named), batch_size)
    path = Path(text)
    if path.is_dir():
        return load_images(path, batch_size=batch_size, seed=seed, transform=transform)
    if path.suffix.lower() in SUFFIXES and path.is_file():
        raise LoadError(
            f"{text} is one image", hint=f"the folder that holds it:  --data {shlex.quote(str(path.parent))}"
        )
    if path.suffix == ".py" and path.is_file():
        names = [f"--data {shlex.quote(f'{text}:{name}')}" for name in callables(path)]
        own = f"write a function in it that returns your DataLoader:  --data {shlex.quote(f'{text}:make')}"
        raise LoadError(f"{text} is Python code: say what in it gives the batches", hint="\n".join(names[:4] or [own]))
    if path.suffix.lower() not in ARRAYS or not path.is_file():
        missing = f"there is no file {text}" if not path.exists() else f"{text} is no data that bnfix reads"
        raise LoadError(
            missing,
            hint=f"a function (loader.py:make_loader), a folder of images, or a file {', '.join(ARRAYS)}\n"
            "for fold, export and verify also  random:3x224x224",
        )
    return _batched(load_samples(path), batch_size)


def _random_batches(text: str, batch_size: int, seed: int, count: int) -> list[Any]:
    parts = [_parse(p.strip(), text) for p in text.split(",")]
    generator = torch.Generator().manual_seed(seed)
    found: list[Any] = []
    for _ in range(count):
        tensors = [_random((batch_size, *shape), dtype, generator) for _, shape, dtype in parts]
        names = [name for name, _, _ in parts]
        if all(names):
            found.append(dict(zip(names, tensors, strict=True)))
        else:
            found.append(tensors[0] if len(tensors) == 1 else tuple(tensors))
    return found


def _from_object(text: str, found: Any, batch_size: int) -> Iterable[Any]:
    from torch.utils.data import DataLoader, Dataset

    is_data = isinstance(found, (DataLoader, Dataset, Tensor, list, tuple)) or hasattr(found, "__next__")
    if not callable(found) or (is_data and not isinstance(found, type)):
        return _iterable(text, found, batch_size)

    def start() -> Iterable[Any]:
        try:
            made = found()
        except BnfixError:
            raise
        except Exception as error:  # the user's own function
            hint = "it is code of yours; where in it:  add --traceback"
            if _takes_more(found):
                hint = "it is called without arguments; one that gives them:\ndef make(): return …"
                hint = hint.replace("…", f"{text.rpartition(':')[2]}(…)")
            raise LoadError(f"{text}() failed: {one_line(error)}", hint=hint) from error
        return _iterable(text, made, batch_size)

    first = start()  # what is wrong with it shows now, not in the middle of the work
    return Batches(start) if hasattr(first, "__next__") else first


def _takes_more(function: Callable[..., Any]) -> bool:
    try:
        inspect.signature(function).bind()
    except TypeError:
        return True
    except ValueError:  # a builtin without a signature
        return False
    return False


def _iterable(text: str, found: Any, batch_size: int) -> Iterable[Any]:
    from torch.utils.data import DataLoader, Dataset

    if isinstance(found, Tensor):
        return _batched(found, batch_size)
    if isinstance(found, Dataset):
        return DataLoader(found, batch_size=batch_size, shuffle=False)
    if isinstance(found, (str, bytes, Mapping)) or not hasattr(found, "__iter__"):
        if hasattr(found, "__getitem__") and hasattr(found, "__len__") and not isinstance(found, (str, bytes, Mapping)):
            return DataLoader(found, batch_size=batch_size, shuffle=False)
        name = type(found).__name__
        given = "nothing" if found is None else f"{'an' if name[0] in 'aeiou' else 'a'} {name}"
        raise LoadError(
            f"{text} gives {given}, which has no batches",
            hint="return an iterable of batches, a Dataset or a DataLoader",
        )
    iterable: Iterable[Any] = found
    return iterable


def _batched(samples: Tensor | Mapping[str, Tensor], batch_size: int) -> Iterable[Any]:
    if isinstance(samples, Tensor):
        return [samples[i : i + batch_size] for i in range(0, len(samples), batch_size)]
    count = len(next(iter(samples.values())))
    return [{k: v[i : i + batch_size] for k, v in samples.items()} for i in range(0, count, batch_size)]
