"""Diagnoses as rules make them, by hand: errors, warnings and infos, of one site and of fifty."""

from __future__ import annotations

from dataclasses import replace

from render_values import resnet

from bnfix.render import About
from bnfix.types import Diagnosis, Edit, Finding, Fix, Mended, Refusal, Safety, Skipped

SITES = tuple(e.site for e in reversed(resnet()))
DATA = "data= (on the command line: --data)"
INPUT = "example= (on the command line: --input)"
LOOP = "a training loop: bnfix.watch(model, optimizer)"
RECALIBRATE = "bnfix recalibrate weights.pt --arch timm:resnet50 --data train_images/ -o weights-recalibrated.pt"

STALE = Finding(
    "BN204",
    "stale-stats",
    "error",
    "recalibration would change the outputs by 0.62 of their spread, chance by 0.04 (limits 0.5, 6 × chance): the "
    "running statistics are not those of this data; furthest off: a mean by 1.9 σ, a variance by × 0.31",
    SITES,
    Fix("recalibrate", "estimate the running statistics anew", SITES, {}, Safety.NEEDS_DATA, RECALIBRATE),
    {"change": 0.62, "null": 0.04, "limit": 0.5},
)
NAN = Finding(
    "BN201",
    "non-finite-stats",
    "error",
    "running_var holds NaN in 3 of 64 channels (7, 12, 40)",
    ("layer1.0.bn1",),
    Fix("recalibrate", "clean the data, then recalibrate", ("layer1.0.bn1",), {}, Safety.NEEDS_DATA, RECALIBRATE),
    {"channels": 3},
)
MOMENTUM = Finding(
    "BN106",
    "momentum",
    "warning",
    "momentum is 0.99: in PyTorch that forgets all but the last batch (0.99 of TensorFlow is 0.01 here)",
    ("head.norm", "head.norm2"),
    Fix("set", "momentum 0.01", ("head.norm", "head.norm2"), {"momentum": 0.01}, Safety.EXACT, "bnfix check … --fix"),
    {"momentum": 0.99},
)
FEW_VALUES = Finding(
    "BN301",
    "too-few-values",
    "warning",
    "8 values a channel and batch: its statistics are off by 53 % from batch to batch (limit 25 %)",
    ("projector.bn",),
    Fix("code", "larger batches, or swap this one layer for GroupNorm", ("projector.bn",), {}, Safety.NEEDS_TRAINING),
)
ALIASES = tuple(
    Finding(
        "BN101",
        "aliased-norm",
        "info",
        f"one BatchNorm2d has 2 names: a.{n}.bn, b.{n}.bn; they share its statistics",
        (f"a.{n}.bn", f"b.{n}.bn"),
        Fix("unshare", "give each place its own norm", (f"a.{n}.bn", f"b.{n}.bn"), {}, Safety.EXACT, "bnfix unshare …"),
    )
    for n in range(5)
)
WHOLE = Finding("BN304", "sorted-batches", "warning", "batches differ by 7.1 × what shuffled ones would (limit 3)")

LOOP_RULES = tuple(Skipped(f"BN40{n}", f"needs {LOOP}", LOOP) for n in range(1, 10))
SKIPPED = (
    Skipped("BN102", f"needs {INPUT}", INPUT),
    Skipped("BN103", f"needs {INPUT}", INPUT),
    *(Skipped(c, f"needs {DATA}", DATA) for c in ("BN205", "BN302", "BN303", "BN305")),
    *LOOP_RULES,
)
CHECKED = ("BN101", "BN104", "BN105", "BN106", "BN107", "BN201", "BN202", "BN203", "BN204", "BN206", "BN301", "BN304")

ILL = Diagnosis(
    (STALE, NAN, MOMENTUM, FEW_VALUES, WHOLE, *ALIASES),
    (*SKIPPED, Skipped("BN204", "its input was never finite", "", ("layer1.0.bn1",))),
    CHECKED,
    (FEW_VALUES,),
    53,
    ("measured on 2,048 samples in 32 batches",),
    ("1 finding known from report.json, not told again",),
)
HEALTHY = Diagnosis((), SKIPPED, CHECKED, (), 53)
INFORMED = Diagnosis(ALIASES[:2], LOOP_RULES, CHECKED, (), 7)
NOTHING = Diagnosis((), SKIPPED, (), (), 0)
EDITS = (
    Edit("set", "head.norm", "momentum 0.99", "momentum 0.01"),
    *(Edit("recalibrate", s, "", "mean moved by 0.31 σ, variance × 0.52 … 1.1") for s in SITES[:3]),
)
MENDED = Mended(
    EDITS,
    Diagnosis((FEW_VALUES,), LOOP_RULES, CHECKED, (), 53),
    replace(ILL, findings=(STALE, MOMENTUM, FEW_VALUES)),
    (Refusal("BN301", "needs training: larger batches, or swap this one layer for GroupNorm"),),
)
HEALED = replace(MENDED, diagnosis=HEALTHY, refusals=())
PLANNED = replace(MENDED, dry_run=True)
UNMENDED = Mended((), INFORMED, INFORMED)
RECALIBRATED = replace(
    HEALED, edits=tuple(Edit("recalibrate", s, "", f"mean moved by 0.{n:02} σ") for n, s in enumerate(SITES))
)
ABOUT = About("bnfix check", "weights.pt", next=(("why", "bnfix explain BN204 BN201 BN106"),))

DIAGNOSES = {
    "diagnosis-ill": ILL,
    "diagnosis-healthy": HEALTHY,
    "diagnosis-informed": INFORMED,
    "diagnosis-nothing": NOTHING,
    "mended-some": MENDED,
    "mended-all": HEALED,
    "mended-plan": PLANNED,
    "mended-none": UNMENDED,
    "mended-many": RECALIBRATED,
}
