"""Parity: whether two models compute the same function, judged by the model's own rounding noise; export to ONNX."""

from __future__ import annotations

from bnfix.parity.compare import compare, compare_sites, judge
from bnfix.parity.oracle import Recorded, Reference, record, references

__all__ = ["Recorded", "Reference", "compare", "compare_sites", "judge", "record", "references"]
