"""What rules read, gathered: here the rooms of the work floor meet, once for all rules."""

from bnfix.evidence.files import of, of_file, of_onnx, of_pair, of_program, with_reference
from bnfix.evidence.gathering import of_model
from bnfix.evidence.measuring import sample_of
from bnfix.evidence.weights import of_weights

__all__ = [
    "of", "of_file", "of_model", "of_onnx", "of_pair", "of_program", "of_weights", "sample_of", "with_reference",
]  # fmt: skip
