"""Parity: whether two models compute the same function, judged by the model's own rounding noise; export to ONNX."""

from __future__ import annotations

from bnfix.parity.compare import compare, compare_sites, judge
from bnfix.parity.export import export_onnx
from bnfix.parity.from_file import file_call
from bnfix.parity.needs import check_export, check_verify
from bnfix.parity.onnx_norms import onnx_facts
from bnfix.parity.oracle import Recorded, Reference, record, references
from bnfix.parity.probes import accepted, probe_calls
from bnfix.parity.verify import verify, verify_file

__all__ = [
    "Recorded",
    "Reference",
    "accepted",
    "check_export",
    "check_verify",
    "compare",
    "compare_sites",
    "export_onnx",
    "file_call",
    "judge",
    "onnx_facts",
    "probe_calls",
    "record",
    "references",
    "verify",
    "verify_file",
]
