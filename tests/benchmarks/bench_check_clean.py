"""What is said of healthy models: every architecture of torchvision and of the zoo, fresh and lived in; and oddities.

    bench_check_clean.py [--trace] [--large] [--zoo | --torchvision | --oddities] [NAME ...]

Errors, warnings and infos for each model. Without ``--trace``, structure and stored values alone; with it, the graph on
an image too. A fresh model was never trained; a lived-in one has statistics and weights as training leaves them. The
oddities are those of ``tests/oddities``: loops under watch, models and loaders that look like a fault and are meant.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import zoo
from benchmarks.tables import machine
from nets import lived_in

import bnfix
from bnfix.types import Diagnosis

LARGE = 120_000_000
"""Parameters; larger models have the same structure as smaller ones of their family."""
WITHOUT = {"weights": None, "weights_backbone": None}


def torchvision_names() -> list[str]:
    """Every architecture that torchvision lists, quantized ones apart: they have no norms of torch's left."""
    import torchvision

    return [f"tv:{n}" for n in torchvision.models.list_models() if not n.startswith("quantized")]


def build(name: str) -> nn.Module:
    """The architecture as its factory gives it, in training mode, with random weights."""
    torch.manual_seed(0)
    if not name.startswith("tv:"):
        import timm

        return timm.create_model(name, pretrained=False)  # type: ignore[no-any-return]
    import torchvision

    builder = torchvision.models.get_model_builder(name[3:])
    options: dict[str, Any] = {k: v for k, v in WITHOUT.items() if k == "weights" or _takes(builder, k)}
    if name in ("tv:googlenet", "tv:inception_v3"):
        options["init_weights"] = False
    return torchvision.models.get_model(name[3:], **options)  # type: ignore[no-any-return]


def _takes(builder: Any, option: str) -> bool:
    import inspect

    return option in inspect.signature(builder).parameters


def example(name: str, model: nn.Module) -> Any:
    """An input of two samples as this family takes it."""
    if not name.startswith("tv:"):
        return torch.randn(2, *model.default_cfg["input_size"])  # type: ignore[index]
    if any(part in name for part in ("rcnn", "retinanet", "fcos", "ssd")):
        return ([torch.rand(3, 128, 128), torch.rand(3, 128, 128)],)
    if any(part in name for part in ("r3d", "mc3", "r2plus1d", "mvit", "swin3d", "s3d")):
        return torch.randn(2, 3, 16, 112, 112) if "s3d" not in name else torch.randn(2, 3, 16, 224, 224)
    if "raft" in name:
        return (torch.rand(2, 3, 128, 128), torch.rand(2, 3, 128, 128))
    return torch.randn(2, 3, 299 if "inception" in name else 224, 299 if "inception" in name else 224)


def conditions(name: str, *, large: bool) -> Iterator[tuple[str, nn.Module]]:
    """The model fresh and lived in; nothing for one without norms, or too large to be worth it."""
    try:
        with torch.device("meta"):
            size = sum(p.numel() for p in build(name).parameters())
    except (RuntimeError, NotImplementedError, TypeError, ValueError):  # a factory that computes with its weights
        size = 0
    if size > LARGE and not large:
        return
    model = build(name)
    yield "fresh", model
    yield "lived in", lived_in(model)


def oddities() -> Iterator[tuple[str, Diagnosis]]:
    """Legitimate practice that looks like a fault, and what ``watch`` or ``check`` says of it."""
    from oddities import odd_loops, odd_models, odd_teachers  # noqa: F401
    from oddities.oddity import ODDITIES

    for odd in ODDITIES:
        torch.manual_seed(0)
        yield odd.name, odd.show()


def line(name: str, state: str, said: Diagnosis, seconds: float) -> str:
    """One model for a reader."""
    found = Counter(f"{f.code} {f.severity}" for f in said.findings)
    told = ", ".join(f"{k} x{n}" if n > 1 else k for k, n in sorted(found.items()))
    counts = " ".join(f"{len(said.of(s)):2}" for s in ("error", "warning", "info"))
    return f"{name:46} {state:9} {said.norms:4} norms  {counts}  {seconds:5.1f} s  {told}"


def told(total: Counter[str], text: str, said: Diagnosis) -> None:
    """Print it, and count it."""
    total["models"] += 1
    total.update({s: len(said.of(s)) for s in ("error", "warning", "info")})
    print(text, flush=True)
    for finding in (*said.of("error"), *said.of("warning")):
        print(f"    {finding.code} {finding.severity}: {finding.message}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trace", action="store_true", help="the graph too, on an image")
    parser.add_argument("--large", action="store_true", help=f"models of more than {LARGE:,} parameters too")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--zoo", action="store_true", help="the public zoo alone")
    which.add_argument("--torchvision", action="store_true", help="torchvision alone")
    which.add_argument("--oddities", action="store_true", help="what looks like a fault and is meant, alone")
    parser.add_argument("names", nargs="*")
    options = parser.parse_args()
    torch.set_num_threads(1)
    names = options.names or [
        *([] if options.torchvision or options.oddities else zoo.NAMES),
        *([] if options.zoo or options.oddities else torchvision_names()),
    ]
    total: Counter[str] = Counter()
    print(f"{'':46} {'':9} {'':10}   E  W  I")
    for name in dict.fromkeys(names):
        for state, model in conditions(name, large=options.large):
            start = time.process_time()
            said = bnfix.check(model, example(name, model) if options.trace else None)
            total["untraced"] += options.trace and "BN102" not in said.checked
            told(total, line(name, state, said, time.process_time() - start), said)
    if not (options.names or options.zoo or options.torchvision):
        start = time.process_time()
        for name, said in oddities():
            told(total, line(name, "as meant", said, time.process_time() - start), said)
            start = time.process_time()
    print(f"{total['models']} models ({machine()}): {total['error']} errors, {total['warning']} warnings "
          f"({total['warning'] / max(total['models'], 1):.3f} a model), {total['info']} infos"
          + (f"; {total['untraced']} without a graph" if options.trace else ""))  # fmt: skip


if __name__ == "__main__":
    main()
