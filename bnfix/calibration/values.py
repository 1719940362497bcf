"""Tensors that hold no values, or hold one for several channels: refused before any work; and a print of values."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from bnfix.calibration.norms import Norm
from bnfix.errors import CalibrationError


def check_values(model: nn.Module) -> None:
    """That the model has weights to run with.

    Raises:
        CalibrationError: one is on the meta device, or fake; or we are inside a FakeTensorMode.
    """
    if any(type(mode).__name__ == "FakeTensorMode" for mode in _get_current_dispatch_mode_stack()):
        raise CalibrationError(
            "called inside a FakeTensorMode: tensors have no values there",
            hint="leave the mode, and call bnfix on a model that was made outside of it",
        )
    for module in model.modules():
        if hasattr(module, "_hf_hook"):  # accelerate: on the meta device until the forward needs them
            continue
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            told = hollow(tensor)
            if told and not ("meta" in told and name in module._buffers):  # a meta buffer may never be read
                path = next(path for path, m in model.named_modules() if m is module)
                raise CalibrationError(
                    f"{path}.{name} {told}: it has no values".lstrip("."),
                    hint="make the model outside of the FakeTensorMode, and load its weights"
                    if "fake" in told
                    else "model.to_empty(device='cpu'), and load its weights",
                )


def hollow(tensor: Any) -> str:
    """Why a tensor has no values; empty if it has, and for anything else."""
    if not isinstance(tensor, Tensor):
        return ""
    if type(tensor).__name__ == "FakeTensor":
        return "is a fake tensor"
    return "is on the meta device" if tensor.is_meta else ""


def check_writable(norms: Iterable[Norm]) -> None:
    """That each channel of the statistics that will be written has a place of its own in memory.

    Raises:
        CalibrationError: a buffer is expanded.
    """
    for norm in norms:
        for name, tensor in (("running_mean", norm.mean), ("running_var", norm.var)):
            if not norm.why and tensor.layout == torch.strided and torch._debug_has_internal_overlap(tensor) == 1:
                own = getattr(norm.module, name, None) is tensor
                raise CalibrationError(
                    f"{norm.path or 'the model'}: its {name} is expanded, all {norm.channels} channels are one number",
                    hint=f"norm = model.get_submodule({norm.path!r});  norm.{name} = norm.{name}.clone()"
                    if own
                    else f"give each channel a number of its own:  torch.zeros({norm.channels}), nothing expanded",
                )


_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def fingerprint(tensors: Iterable[Tensor]) -> str:
    """Short, and another for other values: to see whether tensors of several processes are the same."""
    found = hashlib.sha256()
    for tensor in tensors:
        total = 0
        plain = type(tensor) in (Tensor, nn.Parameter) and tensor.layout is torch.strided
        plain = plain and not (tensor.is_nested or tensor.is_meta or is_lazy(tensor))
        if plain and not tensor.is_quantized and tensor.numel():
            values = torch.view_as_real(tensor) if tensor.is_complex() else tensor
            bits = values.detach().contiguous().view(_BITS[values.dtype.itemsize])
            total = int(bits.sum(dtype=torch.int64))
        found.update(f"{tensor.dtype} {'lazy' if is_lazy(tensor) else tuple(tensor.shape)} {total}".encode())
    return found.hexdigest()[:8]
