"""One norm for each call: what stands where a norm was called several times in one forward of its model.

Which norm a call gets is told by its number in the forward. The model's own hooks begin and end a forward, and a call
that has no norm of its own is an error, never a second use of another's.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_AGAIN = "un-share the original model again, with an example of such a forward"
_SETTINGS = ("num_features", "eps", "momentum", "affine", "track_running_stats")


class NormPerCall(nn.ModuleList):
    """``norms[i]`` runs in the i-th call within one forward of the model that it was made for.

    ``site`` is the path of the norm in that model. It takes what each norm takes, and gives what that gives.
    """

    def __init__(self, norms: Iterable[nn.Module], site: str) -> None:
        super().__init__(norms)
        self.site = site
        # By thread: a server runs one model in several. Traced code, in which nobody else runs, has one key.
        self._calls: dict[int, int] = {}
        for name in _SETTINGS:  # what code asks a norm for, besides running it
            value = getattr(self[0], name, None)
            if isinstance(value, (int, float, bool)):
                setattr(self, name, value)
        self.training = self[0].training

    def begin(self) -> None:
        """A forward of the model begins; one that never came to its end (Ctrl-C) is forgotten."""
        self._calls[_thread()] = 0

    def end(self, *, failed: bool) -> None:
        """The forward is over, or has failed.

        Raises:
            RuntimeError: some of the norms have had no call, though others have.
        """
        calls = self._calls.pop(_thread(), 0)
        if calls not in (0, len(self)) and not failed:
            raise RuntimeError(
                f"{self.site} was called {_times(calls)} in this forward, and has a norm for each of {len(self)} "
                f"calls: which call is which can't be told; {_AGAIN}"
            )

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the norm of this call.

        Raises:
            RuntimeError: this call has none.
        """
        thread = _thread()
        call = self._calls.get(thread, -1)
        if call < 0:
            raise RuntimeError(
                f"{self.site} has a norm for each of its {len(self)} calls in one forward of the model, and is called "
                "outside of one: call the model itself (not model.forward or a part of it), and let activation "
                f"checkpointing run it again as a whole. To use a part alone, take the norm of one call: {self.site}[0]"
            )
        if call >= len(self):
            raise RuntimeError(
                f"{self.site} is called more than {_times(len(self))} in this forward, and has no norm for "
                f"that; {_AGAIN}"
            )
        self._calls[thread] = call + 1
        return self[call](*args, **kwargs)

    def extra_repr(self) -> str:
        """Where it is."""
        return f"one for each call of {self.site}"


class FunctionalNorm(nn.Module):
    """Statistics, and weights if they are its own, that a forward hands to ``F.batch_norm`` in one of its calls.

    Shapes (C,). Whether it normalises with the batch is for that forward to say, call by call.
    """

    running_mean: Tensor
    running_var: Tensor

    def __init__(
        self, mean: Tensor, var: Tensor, weight: nn.Parameter | None, bias: nn.Parameter | None, *, persistent: bool
    ) -> None:
        super().__init__()
        self.register_buffer("running_mean", mean, persistent=persistent)
        self.register_buffer("running_var", var, persistent=persistent)
        self.register_parameter("weight", weight)
        self.register_parameter("bias", bias)
        self.num_features = mean.numel()

    def forward(
        self,
        x: Tensor,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        training: bool = False,
        momentum: float = 0.1,
        eps: float = 1e-5,
    ) -> Tensor:
        """``F.batch_norm`` of ``x`` (N, C, *positions), with what is its own in place of what was given."""
        own = self._parameters
        weight = weight if own["weight"] is None else own["weight"]
        bias = bias if own["bias"] is None else own["bias"]
        return F.batch_norm(x, self.running_mean, self.running_var, weight, bias, training, momentum, eps)


class StatisticsOfCall:
    """Stands where a module had a running statistic that it hands to ``F.batch_norm``: each call gets its own.

    Any other use of it fails: which call's statistics are meant can't be told.
    """

    __slots__ = ("norms",)  # no second way to modules that are registered elsewhere

    def __init__(self, norms: NormPerCall) -> None:
        self.norms = norms

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run the norm of this call, where ``func`` is a batch norm."""
        given = arguments_of(func, args, kwargs)
        if given is None:
            return NotImplemented
        x, mean, var = (given.pop(name, None) for name in ("input", "running_mean", "running_var"))
        if not (isinstance(mean, cls) and isinstance(var, cls) and mean.norms is var.norms):
            return NotImplemented
        return mean.norms(x, **given)


def arguments_of(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """The arguments of a batch norm by the names of ``F.batch_norm``; None where ``func`` is none."""
    if func is F.batch_norm:
        names: tuple[str, ...] = _FUNCTIONAL
    elif func is torch.batch_norm:
        names = _NATIVE
    else:
        return None
    given = {names[i]: value for i, value in enumerate(args)}
    given.update(kwargs or {})
    given.pop("cudnn_enabled", None)
    return given


_FUNCTIONAL = ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps")
_NATIVE = ("input", "weight", "bias", "running_mean", "running_var", "training", "momentum", "eps", "cudnn_enabled")


class _Around:
    """A hook of a model that has norms for each call: at ``paths`` in it, or ``loose`` where no path is registered."""

    def __init__(self, paths: tuple[str, ...], loose: tuple[NormPerCall, ...]) -> None:
        self.paths, self.loose = paths, loose

    def norms(self, model: nn.Module) -> list[NormPerCall]:
        """Those of ``model``: of the very one that runs, which may be a replica."""
        found: list[Any] = []  # in plain loops, as all here: Dynamo of torch 2.7 reads little else
        for path in self.paths:
            module: Any = model
            for name in path.split("."):
                module = getattr(module, name)
            found.append(module)
        found.extend(self.loose)
        return found


class BeginForward(_Around):
    """Before a forward: the next call of each norm is its first."""

    def __call__(self, model: nn.Module, args: Any) -> None:
        """Begin."""
        for norm in self.norms(model):
            norm.begin()


class EndForward(_Around):
    """Behind a forward, also one that failed: each norm has had all its calls, or none."""

    def __call__(self, model: nn.Module, args: Any, output: Any) -> None:
        """End all, then complain of the first that did not come out even."""
        failed = output is None and sys.exc_info()[0] is not None  # such hooks are called while it is on its way
        complaint: RuntimeError | None = None
        for norm in self.norms(model):
            try:
                norm.end(failed=failed)
            except RuntimeError as error:
                if complaint is None:
                    complaint = error
        if complaint is not None:
            raise complaint


def _thread() -> int:
    return 0 if torch.compiler.is_compiling() else threading.get_ident()


def _times(count: int) -> str:
    return "once" if count == 1 else f"{count} times"
