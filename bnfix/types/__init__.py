"""Every value that crosses from one room to another: frozen, plain data, free of torch."""

from bnfix.types.calibration import LayerStats, Recalibration, Residual
from bnfix.types.facts import CallSite, Facts, NormFact, Op, Route, TensorFact
from bnfix.types.file_info import FileInfo, NormInfo
from bnfix.types.results import Edit, Export, OutputParity, Parity, Refusal, Result, Verdict
from bnfix.types.values import NOT_IN_JSON, SCHEMA_VERSION, Value, plain

__all__ = [
    "NOT_IN_JSON",
    "SCHEMA_VERSION",
    "CallSite",
    "Edit",
    "Export",
    "Facts",
    "FileInfo",
    "LayerStats",
    "NormFact",
    "NormInfo",
    "Op",
    "OutputParity",
    "Parity",
    "Recalibration",
    "Refusal",
    "Residual",
    "Result",
    "Route",
    "TensorFact",
    "Value",
    "Verdict",
    "plain",
]
