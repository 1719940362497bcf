"""Images in the memory order in which convolutions are fastest.

``channels_last`` holds the channels of a position side by side. oneDNN, which convolves for PyTorch on CPUs, takes .4
to 1.0 of the time with it, and the order runs on from the input through most networks. Values are the same up to
rounding, but code can tell: ``x.view(len(x), -1)`` fails behind a convolution, ``as_strided`` reads something else.
So the first look is made in this order, and made again in the loader's where that fails; and what the parked chunks
gave is proven by a replay in the loader's order. Forwards work on copies of their inputs: these are what is laid out
anew, and no memory more is needed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bnfix.running import Call

HANDED_ON = 0.5
"""Part of the values that norms see from which on the order counts as handed on."""


def faster(device: torch.device) -> bool:
    """Whether convolutions here are those that gain."""
    onednn = torch.backends.mkldnn
    return device.type == "cpu" and onednn.is_available() and bool(onednn.enabled)  # type: ignore[no-untyped-call]


def laid_out(call: Call) -> Call:
    """The call with copies of its inputs, images among them with their channels last."""
    return call.private(_laid_out)


def is_laid_out(x: Tensor) -> bool:
    """Whether a norm's input (N, C, H, W) came in this order, and not in the usual one as well."""
    return x.dim() == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)


def _laid_out(tensor: Tensor) -> Tensor:
    images = type(tensor) is Tensor and tensor.dim() == 4 and tensor.dtype == torch.float32
    usual = images and tensor.layout is torch.strided and tensor.is_contiguous()
    # Not contiguous(memory_format=…): one channel is in both orders at once, and would keep its strides.
    return tensor.detach().clone(memory_format=torch.channels_last if usual else torch.preserve_format)
