"""What others offer for folding, each behind one signature: ``run(model, args)`` gives what is to be called instead.

torchao, AIMET and mmcv are no dependencies of bnfix, not even of its tests (``pip install torchao aimet-torch mmcv-lite
opencv-python-headless``). A tool that is not installed is said to be absent. Each ``run`` may change its argument: hand
it a copy.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import io
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

Run = Callable[[nn.Module, tuple[Any, ...]], Callable[..., Any]]


def bnfix_fold(model: nn.Module, args: tuple[Any, ...]) -> Callable[..., Any]:
    """bnfix's, with its proof."""
    import bnfix

    result = bnfix.fold(model, bnfix.Call(args, {}))
    if result.parity is not None and result.parity.verdict not in ("passed", "warned"):
        warnings.warn(f"parity {result.parity.verdict}", stacklevel=2)
    assert result.model is not None
    return result.model


def fx_fuse(model: nn.Module, args: tuple[Any, ...]) -> Callable[..., Any]:
    """torch's older one, on a symbolic trace."""
    optimization = importlib.import_module("torch.fx.experimental.optimization")
    return optimization.fuse(model)  # type: ignore[no-any-return]


def pt2e(model: nn.Module, args: tuple[Any, ...]) -> Callable[..., Any]:
    """What torchao does before it quantizes: on the exported graph, convolutions and then linear layers."""
    utils = importlib.import_module("torchao.quantization.pt2e.utils")
    graph = torch.export.export(model, args, strict=False).module()
    utils._fuse_conv_bn_(graph)
    utils._fuse_linear_bn_(graph)
    return graph


def _scripted(model: nn.Module, args: tuple[Any, ...]) -> Any:
    """Traced, or compiled where that fails."""
    try:
        return torch.jit.trace(model, args, check_trace=False)
    except Exception:  # noqa: BLE001 — whatever tracing raises, compiling is its documented alternative
        return torch.jit.script(model)


def jit_freeze(model: nn.Module, args: tuple[Any, ...]) -> Callable[..., Any]:
    """TorchScript's."""
    return torch.jit.freeze(_scripted(model, args))  # type: ignore[no-any-return]


def jit_optimize(model: nn.Module, args: tuple[Any, ...]) -> Callable[..., Any]:
    """TorchScript's, and then whatever else it knows for inference."""
    return torch.jit.optimize_for_inference(_scripted(model, args))  # type: ignore[no-any-return]


def timm_reparameterize(model: nn.Module, args: tuple[Any, ...]) -> Callable[..., Any]:
    """timm's: each of its own architectures knows how to merge its branches."""
    return importlib.import_module("timm.utils.model").reparameterize_model(model)  # type: ignore[no-any-return]


def aimet(model: nn.Module, args: tuple[Any, ...]) -> Callable[..., Any]:
    """AIMET's, before it quantizes."""
    folding = importlib.import_module("aimet_torch.batch_norm_fold")
    first = args[0] if isinstance(args[0], torch.Tensor) else args[0][0]
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        folding.fold_all_batch_norms(model, tuple(first.shape), dummy_input=args[0])
    return model


def mmcv(model: nn.Module, args: tuple[Any, ...]) -> Callable[..., Any]:
    """OpenMMLab's, by the order of registration."""
    return importlib.import_module("mmcv.cnn.utils.fuse_conv_bn").fuse_conv_bn(model)  # type: ignore[no-any-return]


TOOLS: dict[str, tuple[Run, str]] = {
    "bnfix": (bnfix_fold, "bnfix"),
    "torch.fx fuse": (fx_fuse, "torch.fx.experimental.optimization"),
    "torchao pt2e": (pt2e, "torchao.quantization.pt2e.utils"),
    "jit.freeze": (jit_freeze, "torch"),
    "jit.optimize_for_inference": (jit_optimize, "torch"),
    "timm reparameterize": (timm_reparameterize, "timm.utils.model"),
    "AIMET": (aimet, "aimet_torch.batch_norm_fold"),
    "mmcv": (mmcv, "mmcv.cnn.utils.fuse_conv_bn"),
}
"""By name: how to run it, and the module that has to be there."""


def present(names: list[str]) -> dict[str, Run]:
    """Those of ``names`` that can run here, each imported once, so that no measurement pays for an import."""
    found = {}
    for name in names:
        run, module = TOOLS[name]
        try:
            with contextlib.redirect_stderr(io.StringIO()):
                importlib.import_module(module)
        except (ImportError, OSError, AttributeError):  # absent, or built for another torch
            continue
        found[name] = run
    return found


def versions(names: list[str]) -> list[str]:
    """The versions of the packages behind ``names`` that do not come with torch."""
    packages = {"torchao pt2e": "torchao", "timm reparameterize": "timm", "AIMET": "aimet-torch", "mmcv": "mmcv-lite"}
    return [f"{p} {importlib.metadata.version(p)}" for n, p in packages.items() if n in names]
