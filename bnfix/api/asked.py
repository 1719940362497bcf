"""What the verbs share: the model that is asked about, the inputs it is run on, somebody to tell of progress."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from bnfix.errors import one_line

if TYPE_CHECKING:
    from torch import nn

    from bnfix.formats import Loaded
    from bnfix.running import Call
    from bnfix.running.call import Forward

Progress = Callable[[str], None]


def examples(
    loaded: Loaded,
    *,
    input: Sequence[str] | None = None,
    data: str | None = None,
    forward: str | None = None,
    file: str | None = None,
    seed: int = 0,
    vary: bool = True,
    progress: Progress | None = None,
) -> tuple[list[Call], tuple[str, ...]]:
    """What the command line runs a model on: the calls, and the lines that say what was assumed.

    ``input`` holds shapes, ``data`` names batches, ``forward`` is a Python expression. Without any: what the ONNX
    ``file`` to compare with takes, the shape that the architecture states, or one deduced from the layers. Where
    one input came out, a second batch size and a second spatial size join it if the model accepts them (``vary``).
    """
    import torch

    from bnfix import formats, parity
    from bnfix.graph import copy_model, unwrap
    from bnfix.running import as_call, batch_call, guess_call, variations
    from bnfix.running.call import fit_call

    scripted = isinstance(loaded.value, torch.jit.ScriptModule)
    given: nn.Module = loaded.value  # type: ignore[assignment]
    model = copy.deepcopy(given) if scripted else copy_model(unwrap(given)[0])[0]
    way = read_forward(forward)
    notes: list[str] = []
    if input:
        calls = [as_call(formats.load_input(text, seed=seed + i), way) for i, text in enumerate(input)]
    elif data:
        found, described = batches(loaded, data, seed=seed)
        batch = next(iter(found), None)
        if batch is None:
            raise ValueError(f"--data {data} holds no batch")
        calls = [batch_call(batch, model, way)]
        notes += described
    elif file is not None and (taken := parity.file_call(model, file, seed=seed)) is not None:
        calls = [taken]
        notes.append(f"input {taken.signature}, as {file} takes it; another one: --input")
    elif loaded.call is not None:
        calls = [loaded.call]
        notes.append(f"input {loaded.call.signature}, as the program was exported with; another one: --input")
    elif loaded.input_hint is not None:
        shape, source = loaded.input_hint
        calls = [as_call(formats.load_input("x".join(map(str, (1, *shape))), seed=seed), way)]
        notes.append(f"input {calls[0].signature}, by {source}; another one: --input")
    else:
        (progress or silent)("looking for an input that the model accepts")
        calls = [guess_call(model, seed=seed)]
        notes.append(f"no --input given: a random {calls[0].signature}, as the first layers take it")
    calls = [fit_call(call, model) for call in calls]
    if vary and len(calls) == 1 and way is None:
        more, refused = variations(model, calls[0])
        calls += more
        notes += refused
    return calls, tuple(notes)


def batches(loaded: Loaded, data: str, *, batch_size: int = 8, seed: int = 0) -> tuple[Iterable[Any], tuple[str, ...]]:
    """What ``--data`` names, and a line that says how it is read where bnfix chose that: a folder of images.

    Images are read with the transform that the loaded model is evaluated with, as far as anybody states it.

    Raises:
        LoadError: no such thing, or nothing that has batches.
        ValueError: a shape or a batch size that is none.
    """
    from bnfix import formats
    from bnfix.graph import unwrap

    if not os.path.isdir(data):
        return formats.load_data(data, batch_size=batch_size, seed=seed), ()
    model = unwrap(loaded.value)[0]  # type: ignore[arg-type]
    transform = formats.image_transform(model, arch=loaded.arch, hint=loaded.input_hint)
    found = formats.load_data(data, batch_size=batch_size, seed=seed, transform=transform)
    return found, (found.describe(),)  # type: ignore[attr-defined]


def read_forward(text: str | None) -> Forward | None:
    """The user's own ``lambda m, b: …``, evaluated with torch at hand: it is their command line."""
    if text is None:
        return None
    import torch

    try:
        value = eval(text, {"torch": torch})  # the user's own command line, nothing from a file
    except SyntaxError as error:
        raise ValueError(f"--forward {text!r} is no Python expression: {error.msg}") from error
    except Exception as error:  # whatever an expression of the user's raises
        raise ValueError(f"--forward {text!r} raises {one_line(error)}; write 'lambda m, b: m(b)'") from error
    if not callable(value):
        raise ValueError(f"--forward {text!r} is no function; write 'lambda m, b: m(b)'")
    found: Forward = value
    return found


def check_model(model: Any) -> None:
    """Whether ``model`` is a module.

    Raises:
        TypeError: it is something else; says how to get one.
    """
    from torch import nn

    if not isinstance(model, nn.Module):
        given = type(model).__name__
        way = (
            "load it first: bnfix.load(path, arch=...)"
            if isinstance(model, (str, os.PathLike, dict))
            else "pass the module"
        )
        raise TypeError(f"model is an nn.Module, not {given}; {way}")


def check_k(k: float) -> None:
    """Whether ``k`` is a limit in multiples of rounding noise.

    Raises:
        ValueError: it is not a positive number.
    """
    if not 0 < k < float("inf"):
        raise ValueError(f"k is a positive number, not {k}")


def read_calls(
    model: nn.Module, example: Any, data: Iterable[Any] | None, forward: Forward | None
) -> tuple[list[Call], tuple[str, ...]]:
    """The examples as calls, and what was assumed where none was given."""
    from bnfix.graph import copy_model
    from bnfix.running import as_call, batch_call, guess_call

    if isinstance(example, list):
        if not example:
            raise ValueError("the list of examples is empty")
        return [as_call(e, forward) for e in example], ()
    if example is not None:
        return [as_call(example, forward)], ()
    if data is not None:
        batch = next(iter(data), None)
        if batch is None:
            raise ValueError("data holds no batch")
        return [batch_call(batch, model, forward)], ()
    call = guess_call(copy_model(model)[0])
    return [call], (f"no example was given: traced on a random {call.signature}, as its first layers take it",)


def other_calls(model: nn.Module, calls: Sequence[Call]) -> list[Call]:
    """What joins a single call where facts hold for the way that was taken: variations, as ``model`` accepts them.

    Other values, of another size, one sample or image more.
    """
    from bnfix.graph import copy_model
    from bnfix.running import variations
    from bnfix.running.guess import accepts

    if len(calls) > 1:
        return []
    private, _ = copy_model(model)
    other = calls[0].map(lambda t: t.flip(-1) if t.dim() and t.is_floating_point() else t)
    longer = replace(
        other, args=tuple(_longer(a) for a in other.args), kwargs={k: _longer(v) for k, v in other.kwargs.items()}
    )
    base = next((c for c in (longer, other) if accepts(private, c) is None), None)
    return [] if base is None else variations(private, base)[0] or [base]


def _longer(value: Any) -> Any:
    """A list, of images say, with its last element twice."""
    return [*value, value[-1]] if isinstance(value, list) and value else value


def silent(_: str) -> None:
    """Progress that nobody asked for."""
