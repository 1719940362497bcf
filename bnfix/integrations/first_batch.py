"""What the first norm of a model sees of a batch: as bnfix feeds it to forward, and in a step of the training.

A loop may do something to its batches before the network gets them: scale, standardise, cut. bnfix, which is given the
batches and calls forward, would set the statistics of what the network was never trained on.
"""

from __future__ import annotations

import contextlib
import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook

from bnfix.graph import no_footprints
from bnfix.running import Call, bind, preserved

Stats = tuple[Tensor, Tensor]
"""Mean and variance per channel."""

MEAN, VAR, FEW = 0.8, 1.0, 2.0
"""Two looks at one batch are apart where hypot(d / MEAN, l / VAR) > 1 + FEW / samples.

d is the distance of the means in standard deviations, l that of the logarithms of the variances, of the median channel.
Random augmentation in the step is no mismatch: of photographs behind random convolutions, in batches of 16 and more,
crops, jitter, RandAugment and the views of SimCLR gave d up to .27 with l up to .32, mixup 0 and .63, the wildest
(solarizing or inverting every second image) .61 and .67. What is to be found is above: x - mean d 1.0, 2x - 1 d .7 with
l 1.3, the usual normalisation of images l 2.9, x / 255 l 11. With few samples augmentation makes more of a difference.
"""


class Look:
    """What the norm that forward comes to first sees of ``batch`` as bnfix feeds it; then, what it sees in a step.

    That depends on weights and input alone, not on statistics. bnfix looks twice: in evaluation mode, and in the modes
    and with the random numbers of the training, so that dropout in front of the norm makes no difference. Each time the
    forward ends where the norm begins, before anything could wait for other ranks, and leaves nothing behind.

    Attributes:
        path: the norm.
        used: what of the batch went into forward.

    Raises:
        ValueError: forward calls no norm.
        Exception: the batch can't be bound, or not be run; whatever forward raises.
    """

    def __init__(self, model: nn.Module, batch: Any) -> None:
        bound = bind(batch, model)
        self.used = bound.used
        found: list[_Seen] = []
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):  # hooks are heard, and nothing is compiled
            for training in (False, True):
                with preserved(model), no_footprints(model):
                    for module in () if training else model.modules():
                        module.training = False
                    found += _first_norm(model, bound.call)
        if not found:
            raise ValueError("forward calls no norm")
        norm, _, shape = found[0]
        self._norm: Any = norm
        self.path = next((path for path, module in model.named_modules() if module is norm), type(norm).__name__)
        self._fed = [stats for other, stats, _ in found if other is norm]
        self._samples, self._values = shape[0], math.prod(shape) // shape[1]
        self._heard: list[Stats] = []
        self._before = self._running()
        self._handle: Any = None

    def listen(self) -> None:
        """Listen to the calls of the norm until :meth:`close`.

        By a hook on all modules: it does not get into copies of the norm that are made meanwhile. Not in compiled code,
        which would be compiled once more without it: there the running statistics have to tell.
        """
        self._handle = register_module_forward_pre_hook(self._hear)

    def close(self) -> None:
        """Listen no more; a second time does nothing."""
        if self._handle is not None:
            self._handle.remove()
        self._handle = None

    def apart(self) -> tuple[float, float] | None:
        """How far what the norm saw in the step is from what it is fed with: d, and the ratio of the variances.

        Of several calls in the step, one has to be like what bnfix feeds. None where one is, or nothing was seen.
        """
        heard = self._heard or self._averaged()
        eps = float(getattr(self._norm, "eps", 0))
        pairs = [_compared(fed, seen, eps) for fed in self._fed for seen in heard]
        known = [(math.hypot(d / MEAN, log / VAR), d, log) for d, log in pairs if not math.isnan(d + log)]
        distance, d, log = min(known, default=(0.0, 0.0, 0.0))
        return (d, math.exp(log)) if distance > 1 + FEW / self._samples else None

    def _hear(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        if module is self._norm and not torch.compiler.is_compiling():
            with contextlib.suppress(Exception):  # what can't be measured is not heard; the training goes on
                self._heard.append(_stats(args[0]))

    def _running(self) -> tuple[Tensor, Tensor, int] | None:
        """The statistics and their count, where the norm averages batches of this process into them."""
        norm = self._norm
        own = isinstance(norm, nn.modules.batchnorm._BatchNorm) and not isinstance(norm, nn.SyncBatchNorm)
        if not own or not norm.training or norm.running_mean is None or norm.num_batches_tracked is None:
            return None
        return norm.running_mean.clone(), norm.running_var.clone(), int(norm.num_batches_tracked)

    def _averaged(self) -> list[Stats]:
        """What a single call in the step added to the running statistics."""
        before, after = self._before, self._running()
        if before is None or after is None or after[2] != before[2] + 1:
            return []
        share = 1 / after[2] if self._norm.momentum is None else self._norm.momentum
        mean, var = (old + (new - old) / share for old, new in zip(before[:2], after[:2], strict=True))
        return [(mean, var * (1 - 1 / self._values))]  # the variance that is stored is the unbiased one


def compiled(model: nn.Module) -> bool:
    """Whether a module of ``model`` runs as what torch.compile made of it."""
    return any(
        type(m).__name__ == "OptimizedModule" or getattr(m, "_compiled_call_impl", None) is not None
        for m in model.modules()
    )


_Seen = tuple[nn.Module, Stats, tuple[int, ...]]


class _Enough(BaseException):
    """The forward has come to its first norm. No ``except Exception`` of the model's code is meant by it."""


def _first_norm(model: nn.Module, call: Call) -> list[_Seen]:
    """The norm that ``call`` comes to first, mean and variance per channel of its input, and the shape of that."""
    found: list[_Seen] = []

    def stop(module: nn.Module, args: tuple[Any, ...]) -> None:
        if _is_norm(module):
            if args and not found:
                found.append((module, _stats(args[0]), tuple(args[0].shape)))
            raise _Enough

    handle = register_module_forward_pre_hook(stop)
    try:
        call.run(model)
    except _Enough:
        pass
    finally:
        handle.remove()
    return found


def _is_norm(module: nn.Module) -> bool:
    """Whether it keeps running statistics, or may wait for other ranks."""
    if isinstance(module, nn.modules.instancenorm._InstanceNorm):
        return False
    kept = (getattr(module, "running_mean", None), getattr(module, "running_var", None))
    return isinstance(module, nn.SyncBatchNorm) or all(isinstance(value, Tensor) for value in kept)


def _stats(x: Tensor) -> Stats:
    """Mean and biased variance per channel, left on the device: nobody waits for them yet."""
    var, mean = torch.var_mean(x.detach(), (0, *range(2, x.dim())), correction=0)
    return mean.float(), var.float()


def _compared(fed: Stats, seen: Stats, eps: float) -> tuple[float, float]:
    """d and l of the median channel, l with the sign of growth. ``eps`` counts as in the norm: dead channels agree."""
    (mean0, var0), (mean1, var1) = fed, seen
    var0, var1 = var0 + eps, var1 + eps
    d = (mean1 - mean0).abs() / ((var0 + var1) / 2).sqrt()
    log = (var1 / var0).log()
    return d.median().item(), math.copysign(log.abs().median().item(), log.median().item())
