"""Values as the verbs return them, with the traps in them: long paths, calls, defects, NaN, markup."""

from __future__ import annotations

from render_statistics import RECALIBRATIONS

from bnfix.render import About
from bnfix.types import Edit, Export, FileInfo, NormInfo, OutputParity, Parity, Refusal, Result

LONG = "features.stage3.blocks.11.token_mixer.reparam.conv_branches.0"
SIGNATURES = ("1x3x224x224", "2x3x224x224")
VERSIONS = {"torch": "2.15.0", "onnxruntime": "1.23.0"}

PASSED = Parity(
    outputs=(OutputParity("output", 1.2e-6, 3.4e-7, 1.32, 4e-7, True, top1_agreement=1.0, nearer="candidate"),),
    passed=True,
    verdict="passed",
    signatures=SIGNATURES,
    versions=VERSIONS,
    providers=("CPUExecutionProvider",),
)
FAILED = Parity(
    outputs=(
        OutputParity("logits", 0.2, 0.1, 421.3, 0.09, False, "failed", worst_sample="batch 1, sample 3"),
        OutputParity("boxes", None, None, None, None, False, "inconclusive", "integer outputs can't be judged by RMS"),
    ),
    passed=False,
    verdict="failed",
    first_divergence="layer3.4.bn2 (Conv_112), channel 17",
    signatures=("1x3x224x224",),
    candidate="model.onnx",
)
INCONCLUSIVE = Parity(
    outputs=(
        OutputParity("output", 0.3, 0.2, 1.1, 0.1, False, "inconclusive", "the model's own noise is 3e-2", noise=3e-2),
    ),
    passed=False,
    verdict="inconclusive",
    signatures=("1x3x8x8",),
)
NAN = Parity(
    outputs=(OutputParity("output", float("nan"), float("nan"), float("nan"), None, False, "failed"),),
    passed=False,
    verdict="failed",
)


def edit(site: str, into: str, bias: bool = True, ulp: float = 0.5, noise: float = 1.1) -> Edit:
    gains = (f"{into}.bias",) if bias else ()
    before = "BatchNorm2d(64, eps=1e-05)"
    return Edit("fold", site, before, "Identity()", (site,), (into,), gains, ulp, noise)


def resnet() -> list[Edit]:
    """The 53 norms of a ResNet-50 by name."""
    edits = [edit("bn1", "conv1", noise=0.9)]
    for layer, blocks in enumerate((3, 4, 6, 3), start=1):
        for block in range(blocks):
            at = f"layer{layer}.{block}"
            edits += [edit(f"{at}.bn{n}", f"{at}.conv{n}") for n in (1, 2, 3)]
            edits += [edit(f"{at}.downsample.1", f"{at}.downsample.0", ulp=0.49)] if block == 0 else []
    return edits


MANY = Result(None, tuple(resnet()), (), PASSED, signatures=SIGNATURES)
FEW = Result(
    None,
    (
        edit("bn1", "conv1"),
        edit("layer1.0.bn1", "layer1.0.conv1", bias=False),
        Edit(
            "fold", f"{LONG}.norm", "SyncBatchNorm(128, eps=0.001)", "Identity()", (), (f"{LONG}.conv",), (), 0.5, 2.0
        ),
    ),
    (
        Refusal("layer2.bn", "conv has 2 users: layer1.add, aux"),
        Refusal("b.bn", "called twice with different feeders: b.conv, b.conv2", ("b.bn@0", "b.bn@1")),
        Refusal("head.bn", "outputs are 31 x the model's own noise from the oracle", ("head.bn@1",), defect=True),
    ),
    PASSED,
    notes=("input 1x3x224x224 was assumed from the first convolution",),
)
KEPT = Result(None, (), tuple(Refusal(f"denseblock1.layer{n}.norm1", "its input is a concatenation") for n in range(9)))
EMPTY = Result(None, (), ())
PLAN = Result(None, (edit("bn1", "conv1"),), (Refusal("bn2", "conv has 2 users"),), source="symbolic", dry_run=True)
EXPORT = Export(
    "out/model.onnx",
    18,
    (Refusal("features.norm", "its input is the sum of a convolution and a skip connection"),),
    PASSED,
    52,
    ("x: batch×3×224×224",),
    ("logits: batch×1000",),
    ("out/model.onnx", "out/model.onnx.data"),
)
WEIGHTS = FileInfo(
    "weights.pt",
    "state_dict",
    "zip",
    97_800_000,
    "a state_dict",
    True,
    320,
    25_557_032,
    102_000_000,
    {"float32": 267, "int64": 53},
    tuple(NormInfo(e.site, 64, "float32", True) for e in resnet()),
    "state_dict_ema",
    ("state_dict",),
    "module.",
    advice="bnfix fold weights.pt --arch timm:resnet50 -o folded.pt",
)
EVIL = FileInfo(
    "evil.pt",
    "pickled_module",
    "zip",
    812,
    "a pickle that runs code",
    False,
    names_code=("posix.system",),
    dangerous=("posix.system",),
    advice="do not load this file",
)
ABOUT = About(
    "bnfix fold",
    "weights.pt",
    ("folded.pt",),
    (),
    (
        ("load it", 'bnfix.load("folded.pt", arch="timm:resnet50")'),
        ("next", "bnfix export folded.pt --arch timm:resnet50 -o folded.onnx"),
    ),
)

EVERY = {
    "result-many": MANY,
    "result-few": FEW,
    "result-kept": KEPT,
    "result-empty": EMPTY,
    "result-plan": PLAN,
    "parity-passed": PASSED,
    "parity-failed": FAILED,
    "parity-inconclusive": INCONCLUSIVE,
    "parity-nan": NAN,
    "export": EXPORT,
    "file": WEIGHTS,
    "file-evil": EVIL,
    **RECALIBRATIONS,
}
