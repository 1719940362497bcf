"""What a new thread lacks, and what forwards that take turns must not leave behind for one another."""

from __future__ import annotations

import contextlib
import contextvars
import random
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy
import torch
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack
from torch.utils import _device
from torch.utils._device import DeviceContext
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack


class Ambient:
    """The surroundings of the caller: entered again in each thread that works for it.

    Carried: the device context and default device, autocast, the user's function and dispatch modes, context
    variables, the current CUDA device and stream. Gradients are off. The default dtype, backend flags, random
    generators, filters of warnings and the standard streams belong to the process (see :class:`Turn`).
    """

    def __init__(self, device: torch.device) -> None:
        self._variables = contextvars.copy_context()
        self._functions: list[TorchFunctionMode] = list(_get_current_function_mode_stack())  # type: ignore[no-untyped-call]
        self._dispatch = list(_get_current_dispatch_mode_stack())
        self._autocast = [
            (kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind))
            for kind in dict.fromkeys(("cpu", device.type))
        ]
        self._cached = torch.is_autocast_cache_enabled()
        self._cuda = device if device.type == "cuda" else None
        self._stream = torch.cuda.current_stream(device) if device.type == "cuda" else None

    def run(self, work: Callable[[], None]) -> None:
        """``work()`` in a context of its own that looks like the caller's."""
        self._variables.copy().run(self._inside, work)

    def _inside(self, work: Callable[[], None]) -> None:
        with self._entered():
            work()

    @contextlib.contextmanager
    def _entered(self) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            if self._cuda is not None:
                stack.enter_context(torch.cuda.device(self._cuda))
                stack.enter_context(torch.cuda.stream(self._stream))
            for kind, enabled, dtype in self._autocast:
                if enabled:
                    stack.enter_context(torch.autocast(kind, dtype=dtype, cache_enabled=self._cached))
            for mode in self._functions:
                # A device context keeps a note of the one before it: each thread needs one of its own.
                stack.enter_context(torch.device(mode.device) if isinstance(mode, DeviceContext) else mode)
            for dispatch in self._dispatch:
                stack.enter_context(dispatch)
            stack.enter_context(torch.no_grad())
            yield


def surroundings(device: torch.device) -> tuple[Any, ...]:
    """What belongs to a thread and changes how an operation runs, to be compared; asked at each norm of each chunk."""
    c = torch._C
    cuda = device.type == "cuda"
    return (
        tuple(map(id, _get_current_function_mode_stack())),  # type: ignore[no-untyped-call]
        _device.CURRENT_DEVICE,  # a mode entered on top is off the stack where a norm is heard of
        torch._C._len_torch_dispatch_stack(),
        torch._C._is_torch_function_enabled(),
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        c._dispatch_tls_local_include_set().raw_repr(),  # type: ignore[attr-defined]
        c._dispatch_tls_local_exclude_set().raw_repr(),  # type: ignore[attr-defined]
        c._functorch.peek_interpreter_stack() is None,
        torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu"),
        cuda and torch.is_autocast_enabled("cuda") and torch.get_autocast_dtype("cuda"),
        torch.cuda.current_device() if cuda else None,
        torch.cuda.current_stream(device).cuda_stream if cuda else None,
    )


@dataclass
class Turn:
    """Flags and random generators of the process, as one thread left them: swapped in for its next turn."""

    flags: tuple[Any, ...]
    rng: torch.Tensor
    cuda: torch.Tensor | None = None
    seed: int = 0

    @classmethod
    def now(cls, device: torch.device) -> Turn:
        """As they are."""
        cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
        return cls(_flags(), torch.get_rng_state(), cuda)

    @classmethod
    def seeded(cls, like: Turn, number: int, device: torch.device) -> Turn:
        """The flags of ``like``, and random numbers of its own for chunk ``number``: the same on each run."""
        seed = (int(like.rng[:8].view(torch.int64).item()) + 0x9E3779B97F4A7C15 * (number + 1)) % 2**63
        rng = torch.Generator().manual_seed(seed).get_state()
        cuda = torch.Generator(device).manual_seed(seed).get_state() if device.type == "cuda" else None
        return cls(like.flags, rng, cuda, seed)

    def put_all(self, device: torch.device) -> None:
        """The same, and start the generators of ``random`` and NumPy, which are too slow to be swapped often."""
        self.put(device)
        random.seed(self.seed)
        numpy.random.seed(self.seed % 2**32)

    def put(self, device: torch.device, flags_now: tuple[Any, ...] | None = None) -> None:
        """Make them those of the process."""
        torch.set_rng_state(self.rng)
        if self.cuda is not None:
            torch.cuda.set_rng_state(self.cuda, device)
        now = flags_now if flags_now is not None else _flags()
        if self.flags is not now and not (self.flags == now and self.flags[0] is now[0]):
            _set_flags(self.flags, now)


# The getters and setters behind torch.backends: a tenth of the time, and they are asked at each norm of each chunk.
_SWITCHES: tuple[tuple[Callable[[], Any], Callable[[Any], None]], ...] = tuple(
    (getattr(torch._C, getter), getattr(torch._C, setter))
    for getter, setter in (
        ("_get_mkldnn_enabled", "_set_mkldnn_enabled"),
        ("_get_mkldnn_deterministic", "_set_mkldnn_deterministic"),
        ("_get_nnpack_enabled", "_set_nnpack_enabled"),
        ("_get_cudnn_enabled", "_set_cudnn_enabled"),
        ("_get_cudnn_benchmark", "_set_cudnn_benchmark"),
        ("_get_cudnn_deterministic", "_set_cudnn_deterministic"),
        ("_get_flash_sdp_enabled", "_set_sdp_use_flash"),
        ("_get_mem_efficient_sdp_enabled", "_set_sdp_use_mem_efficient"),
        ("_get_math_sdp_enabled", "_set_sdp_use_math"),
        ("_get_cudnn_sdp_enabled", "_set_sdp_use_cudnn"),
        ("_get_cudnn_allow_tf32", "_set_cudnn_allow_tf32"),
        ("_get_float32_matmul_precision", "_set_float32_matmul_precision"),  # allow_tf32 of matmul is the same switch
    )
    if hasattr(torch._C, getter) and hasattr(torch._C, setter)
)


def _flags() -> tuple[Any, ...]:
    """The filters of warnings first: they are a list, and another one though it may hold the same."""
    return (
        warnings.filters,
        torch._C._get_deterministic_algorithms(),
        torch._C._get_deterministic_algorithms_warn_only(),
        torch.get_default_dtype(),
        sys.stdout,
        sys.stderr,
        *[_known(getter) for getter, _ in _SWITCHES],
    )


def _known(getter: Callable[[], Any]) -> Any:
    try:
        return getter()
    except RuntimeError:  # set through fp32_precision, which the older interface can't express
        return None


def _set_flags(flags: tuple[Any, ...], now: tuple[Any, ...]) -> None:
    filters, deterministic, warn_only, dtype, stdout, stderr, *switches = flags
    torch._C._set_deterministic_algorithms(deterministic, warn_only=warn_only)
    torch.set_default_dtype(dtype)
    sys.stdout, sys.stderr = stdout, stderr
    if warnings.filters is not filters:
        warnings.filters = filters
        getattr(warnings, "_filters_mutated", getattr(warnings, "_filters_mutated_lock_held", int))()
    for (_, setter), value, current in zip(_SWITCHES, switches, now[-len(_SWITCHES) :], strict=True):
        if value is not None and value != current:
            setter(value)
