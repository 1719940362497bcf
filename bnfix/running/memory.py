"""How much memory there is, and how much of it a forward holds."""

from __future__ import annotations

import ctypes
import os
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

UNKNOWN = 1 << 30
"""What is taken to be free where nothing can be asked: one GiB."""

_UNITS = {"": 1, **{f"{p}B": 1000**i for i, p in enumerate(("", "K", "M", "G", "T"))}}
_UNITS |= {p: 1000**i for i, p in enumerate(("K", "M", "G", "T"), 1)}
_UNITS |= {f"{p}IB": 1024**i for i, p in enumerate(("K", "M", "G", "T"), 1)}


def parse_bytes(text: int | str) -> int:
    """``2GB`` (powers of 1000), ``512MiB`` (of 1024), ``1.5G`` or a number of bytes, as a number of bytes.

    Raises:
        ValueError: not such an amount, or nothing at all.
    """
    if isinstance(text, int) and not isinstance(text, bool):
        amount = text
    else:
        match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)\s*([a-z]*)", text.strip() if isinstance(text, str) else "", re.I)
        if match is None or match[2].upper() not in _UNITS:
            raise ValueError(f"{text!r} is no amount of memory such as 2GB, 512MiB or a number of bytes")
        unit = _UNITS[match[2].upper()]
        amount = int(float(match[1]) * unit) if "." in match[1] else int(match[1]) * unit
    if amount < 1:
        raise ValueError(f"{text!r} leaves no memory at all")
    return amount


def free_bytes(device: torch.device) -> int:
    """How much can be allocated on ``device`` now, in bytes.

    CUDA: what the driver has free, and what PyTorch's allocator keeps unused. CPU: what the system calls available (on
    macOS, which does not tell without further tools, half of what is installed), or what the control groups of this
    process (containers, batch systems) or its own limits (``ulimit -v``, ``ulimit -d``; Linux) leave if that is less.
    Others: :data:`UNKNOWN`.
    """
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + cached
    if device.type == "mps":
        return max(0, torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory())
    if device.type != "cpu":
        return UNKNOWN
    if sys.platform == "win32":
        return _available_on_windows()
    return available_on_cpu(Path("/"))


def available_on_cpu(root: Path) -> int:
    """What Linux has available below the file system ``root``, within the limits of this process and its groups."""
    known = [*_left_by_cgroups(root), *_left_by_limits(root)]
    match = re.search(r"^MemAvailable:\s*(\d+) kB", _read(root / "proc/meminfo"), re.MULTILINE)
    if match is not None:
        known.append(int(match[1]) * 1024)
    elif not known:
        known.append(_half_of_installed())
    return max(0, min(known))


def _left_by_cgroups(root: Path) -> Iterator[int]:
    """Limit − usage of each control group with a limit that this process is in, from its own up to the root.

    File pages that were not used lately count as usage and are given up under pressure: they are added back.
    """
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, controllers, path = (*line.split(":", 2), "", "")[:3]
        if controllers == "":
            base, files = root / "sys/fs/cgroup", ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            base = root / "sys/fs/cgroup/memory"
            files = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        parts = [p for p in path.split("/") if p not in ("", "..")]
        for depth in range(len(parts), -1, -1):  # inside a container the path may be the host's: its root is ours
            folder = base.joinpath(*parts[:depth])
            limit, usage = _read(folder / files[0]).strip(), _read(folder / files[1]).strip()
            if limit.isdigit() and usage.isdigit():
                stat = re.search(rf"^{files[2]} (\d+)", _read(folder / "memory.stat"), re.MULTILINE)
                yield int(limit) - int(usage) + (int(stat[1]) if stat else 0)


def _left_by_limits(root: Path) -> Iterator[int]:
    """Soft limit − use of address space (RLIMIT_AS) and of private writable memory (RLIMIT_DATA), where there are any.

    What the allocator keeps for later counts as used: it may well be of use to nobody who needs a large block.
    """
    limits, status = _read(root / "proc/self/limits"), _read(root / "proc/self/status")
    for name, used in (("address space", "VmSize"), ("data size", "VmData")):
        limit = re.search(rf"^Max {name}\s+(\d+)\s", limits, re.MULTILINE)
        now = re.search(rf"^{used}:\s*(\d+) kB", status, re.MULTILINE)
        if limit is not None and now is not None:
            yield int(limit[1]) - int(now[1]) * 1024


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""


def _half_of_installed() -> int:
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    except (AttributeError, ValueError, OSError):
        return UNKNOWN


class _MemoryStatus(ctypes.Structure):
    """MEMORYSTATUSEX of the Windows API."""

    _fields_ = [
        ("length", ctypes.c_ulong),
        ("load", ctypes.c_ulong),
        *(
            (name, ctypes.c_ulonglong)
            for name in ("total", "available", "page", "page_free", "virtual", "virtual_free")
        ),
        ("extended", ctypes.c_ulonglong),
    ]


def _available_on_windows() -> int:
    status = _MemoryStatus(length=ctypes.sizeof(_MemoryStatus))
    library = getattr(ctypes, "windll").kernel32  # noqa: B009
    return int(status.available) if library.GlobalMemoryStatusEx(ctypes.byref(status)) else UNKNOWN


def give_back() -> None:
    """Hand free memory of the allocator back to the system (glibc; nothing happens elsewhere).

    Each thread has a pool of its own, and keeps there what its tensors no longer need: with dozens of threads that is
    as much as what they hold.
    """
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)


class Footprint(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """The bytes of all storages that operations allocated inside and that are still alive, on any device.

    ::

        with Footprint() as held, torch.no_grad():
            model(x)      # held.now() from a hook: what is alive there
        held.peak

    A storage counts once, however many views it has, and no longer once it is freed; one that came from outside (the
    inputs, parameters, ``excluded``) never does, nor do views of it and what is written into it. Not seen: workspace
    inside one operation, and sparse and opaque tensors. Arrays that ``torch.from_numpy`` takes in count. Seen only in
    the thread that entered it. Meant for one small forward. ``ran`` are the operators that ran; ``aside`` is entered
    around whatever it does itself.
    """

    supports_higher_order_operators = True  # torch.cond and the like: their bodies come by as well

    def __init__(self, excluded: Iterable[Tensor] = ()) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.aside: AbstractContextManager[None] = nullcontext()
        self.ran: set[Any] = set()
        self.peak = 0
        self._most = 0
        self._foreign: dict[int, StorageWeakRef] = {}
        self._sizes: dict[int, tuple[StorageWeakRef, int]] = {}
        self._hide(_tensors(*excluded))

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # torch would import the whole compiler, over a second, to tell it to keep out

    def now(self) -> int:
        """The bytes alive at this moment."""
        # A weak reference keeps the address of a storage taken: as long as it is here, no other gets the same key.
        self._sizes = {key: held for key, held in self._sizes.items() if not held[0].expired()}  # type: ignore[no-untyped-call]
        self._most = sum(size for _, size in self._sizes.values())
        return self._most

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run ``func`` and take note of the storages of its outputs."""
        kwargs = kwargs or {}
        if torch.compiler.is_dynamo_compiling():  # the body of a torch.cond is traced here, and nothing is allocated
            return func(*args, **kwargs)
        if func is not torch.ops.aten.lift_fresh.default:  # the one that hands on a tensor made a moment ago
            with self.aside:
                self._hide(_tensors(*args, kwargs))
        out = func(*args, **kwargs)
        self.ran.add(func)
        with self.aside:
            self._count(_tensors(out))
        return out

    def _count(self, tensors: Iterable[Tensor]) -> None:
        """Storages that have just been allocated."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            key = storage._cdata
            if key not in self._foreign:
                known = self._sizes.get(key)
                self._sizes[key] = (_weak(storage), storage.nbytes())
                self._most += storage.nbytes() - (known[1] if known else 0)
        if self._most > self.peak:  # as if nothing had been freed: only then is it worth a look at what was
            self.peak = max(self.peak, self.now())

    def _hide(self, tensors: Iterable[Tensor]) -> None:
        """Storages that were not allocated inside are not to be counted."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            key = storage._cdata
            if key not in self._sizes and key not in self._foreign:
                self._foreign[key] = _weak(storage)


_PLAIN = frozenset({int, float, bool, str, type(None), torch.dtype, torch.device, torch.layout})


def _tensors(*values: Any) -> list[Tensor]:
    """The tensors with a storage in what operators take and give: tuples, lists and dicts hold all of them.

    One loop: asked at each operation, while calls may be counted (``tree_leaves`` takes ten times as long).
    """
    found, pending = [], [*values]
    for value in pending:
        if type(value) in _PLAIN:
            continue
        if isinstance(value, Tensor):
            if torch._C._has_storage(value):
                found.append(value)
        elif isinstance(value, (tuple, list)):
            pending += value
        elif isinstance(value, dict):
            pending += value.values()
    return found


def _weak(storage: torch.UntypedStorage) -> StorageWeakRef:
    return StorageWeakRef(storage)  # type: ignore[no-untyped-call]
