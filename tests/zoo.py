"""The zoo: public architectures with random weights, and statistics that were calibrated and then disturbed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

_LINES = (Path(__file__).parent / "zoo.txt").read_text().splitlines()
NAMES = [line.strip() for line in _LINES if line[:1] not in ("#", "")]

UNTRACEABLE = {"tv:fasterrcnn_mobilenet_v3_large_320_fpn", "tv:retinanet_resnet50_fpn"}
"""Their forward depends on what they detect: torch.export refuses, and bnfix records runs."""

IN_CI = (
    "starnet_s050", "mobilenetv3_small_050", "tv:shufflenet_v2_x0_5", "efficientvit_m0", "ghostnet_050", "tv:googlenet",
    "fasternet_t0", "inception_next_atto", "tv:regnet_y_400mf", "resnet10t", "resnetv2_18", "mobilevitv2_050",
    "tf_mixnet_s", "tv:resnet18", "tv:fasterrcnn_mobilenet_v3_large_320_fpn",
)  # fmt: skip
"""Small ones that between them show every kind of norm and every reason to leave one."""


def judged(name: str, model: nn.Module) -> nn.Module:
    """The part of ``model`` whose numbers are compared: of a detector what comes before boxes are chosen.

    Rounding swaps two boxes that score alike, in any two computations of the same.
    """
    part = model.backbone if name in UNTRACEABLE else model
    assert isinstance(part, nn.Module)
    return part


def build(name: str) -> tuple[nn.Module, Tensor]:
    """The architecture ``name`` (``tv:`` marks torchvision's, the others are timm's) and an input of two samples."""
    torch.manual_seed(0)
    if name.startswith("tv:"):
        import torchvision

        options: dict[str, Any] = {"weights": None}
        if any(part in name for part in ("rcnn", "retinanet", "fcn_")):
            options["weights_backbone"] = None
        if "googlenet" in name:
            options["init_weights"] = False
        model = torchvision.models.get_model(name[3:], **options)
        size = (3, 8, 112, 112) if "r2plus1d" in name else (3, 224, 224)
    else:
        import timm

        model = timm.create_model(name, pretrained=False)
        size = tuple(model.default_cfg["input_size"])
    x = torch.randn(2, *size)
    model.eval()
    if name in UNTRACEABLE:
        model.transform.min_size, model.transform.max_size = (224,), 320
        for module in model.modules():  # scores of random weights may all be under the threshold: nothing to compare
            if hasattr(module, "score_thresh"):
                module.score_thresh = 0.0
    disturb(model, x)
    return model, x


def disturb(model: nn.Module, x: Tensor) -> None:
    """Calibrate each norm on ``x``, then move its statistics and affine weights by some 10 %: none stays at 0 or 1."""
    norms = [m for m in model.modules() if isinstance(getattr(m, "running_var", None), Tensor)]
    with torch.no_grad():
        for norm in norms:
            norm.momentum = 1.0
            norm.train()
        model(x)
        model.eval()
        generator = torch.Generator().manual_seed(1)

        def draw(like: Tensor) -> Tensor:
            return torch.randn(like.shape, generator=generator) * 0.1

        for norm in norms:
            deviation = norm.running_var.sqrt()
            norm.running_mean += deviation * draw(deviation)
            norm.running_var *= torch.exp(draw(deviation))
            if norm.weight is not None:  # a zero-initialised branch is opened a little: it would hide every error
                norm.weight.mul_(torch.exp(draw(deviation))).add_(0.02 * (norm.weight.abs() < 1e-3))
                norm.bias.add_(draw(deviation))
