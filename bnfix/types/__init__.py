"""Every value that crosses from one room to another: frozen, plain data, free of torch."""

from bnfix.types.calibration import LayerStats, Recalibration, Residual
from bnfix.types.diagnosis import SEVERITIES, Diagnosis, Finding, Fix, Mended, Safety, Severity, Skipped
from bnfix.types.evidence import (
    DataEvidence,
    Drift,
    Evidence,
    LoaderFacts,
    NormState,
    OnnxFacts,
    OnnxNorm,
    SiteData,
)
from bnfix.types.facts import CallSite, Facts, NormFact, Op, Route, TensorFact
from bnfix.types.file_info import FileInfo, NormInfo
from bnfix.types.results import Edit, Export, OutputParity, Parity, Refusal, Result, Verdict
from bnfix.types.values import NOT_IN_JSON, SCHEMA_VERSION, Value, plain

__all__ = [
    "NOT_IN_JSON",
    "SCHEMA_VERSION",
    "SEVERITIES",
    "CallSite",
    "DataEvidence",
    "Diagnosis",
    "Drift",
    "Edit",
    "Evidence",
    "Export",
    "Facts",
    "FileInfo",
    "Finding",
    "Fix",
    "LayerStats",
    "LoaderFacts",
    "Mended",
    "NormFact",
    "NormInfo",
    "NormState",
    "OnnxFacts",
    "OnnxNorm",
    "Op",
    "OutputParity",
    "Parity",
    "Recalibration",
    "Refusal",
    "Residual",
    "Result",
    "Route",
    "Safety",
    "Severity",
    "SiteData",
    "Skipped",
    "TensorFact",
    "Value",
    "Verdict",
    "plain",
]
