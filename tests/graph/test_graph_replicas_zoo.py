"""Public architectures: a replica computes the same bits with the same tensors, and runs nothing of the model's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from interleaving import reaches
from nets import lived_in
from torch import nn

from bnfix.graph import replicator

NAMES = (
    "resnet18", "efficientnet_b0", "mobilenetv3_small_100", "densenet121", "inception_v4", "regnetx_002",
    "convnext_atto", "swin_tiny_patch4_window7_224", "features:resnet18", "hooks:efficientnet_b0", "tv:resnet18",
    "tv:googlenet", "tv:fcn_resnet50", "tv:ssdlite320_mobilenet_v3_large",
)  # fmt: skip


def build(name: str) -> nn.Module:
    torch.manual_seed(0)
    kind, _, rest = name.rpartition(":")
    if kind == "tv":
        import torchvision

        options: dict[str, Any] = {"init_weights": False} if rest == "googlenet" else {}
        if "resnet50" in rest or "ssd" in rest:
            options["weights_backbone"] = None
        return torchvision.models.get_model(rest, weights=None, **options)
    import timm

    if kind:
        options = {"features_only": True, **({"feature_cls": "hook"} if kind == "hooks" else {})}
        return timm.create_model(rest, pretrained=False, **options)
    return timm.create_model(name, pretrained=False)


def flat(out: Any) -> list[torch.Tensor]:
    if isinstance(out, torch.Tensor):
        return [out]
    return [t for v in (out.values() if isinstance(out, dict) else out) for t in flat(v)]


@pytest.mark.parametrize("name", NAMES)
def test_a_replica_of_a_public_architecture(name: str) -> None:
    pytest.importorskip("torchvision" if name.startswith("tv:") else "timm")
    model = lived_in(build(name))
    size = 224 if "swin" in name else 128 if "inception" in name else 64
    x = torch.rand(3, size, size) if "ssd" in name else torch.rand(1, 3, size, size)
    x = [x] if "ssd" in name else x  # type: ignore[assignment]
    with torch.no_grad():
        expected = flat(model(x))
    for i, module in enumerate(model.modules()):
        module.training = i % 3 == 0
    flags = [m.training for m in model.modules()]
    state = {k: id(t) for k, t in model.state_dict(keep_vars=True).items()}

    replicate = replicator(model)
    assert replicate.shared == ()
    replica = replicate()
    assert {k: id(t) for k, t in replica.state_dict(keep_vars=True).items()} == state
    assert [n for n, _ in replica.named_modules(remove_duplicate=False)] == [
        n for n, _ in model.named_modules(remove_duplicate=False)
    ]

    def not_here(module: nn.Module, args: Any) -> None:
        raise AssertionError(f"{type(module).__name__} of the model runs")

    handles = [m.register_forward_pre_hook(not_here) for m in model.modules()]
    with torch.no_grad():
        found = flat(replica(x))
    for handle in handles:
        handle.remove()
    assert len(found) == len(expected)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert [m.training for m in model.modules()] == flags
    assert reaches(replica, model.modules()) == []
