"""Triton kernels for block-quantized operands of GEMMs: cast, dequantize, multiply. See ops.py and spec.py."""

from .blas import unfit
from .grouped import ACROSS as MATRICES_ACROSS
from .grouped import ROWS, SIDE_BY_SIDE, UNIT, multiply_columns, multiply_rows
from .ops import amax, cast, dequantize, padded, rotate, scaled_matmul, w4a16
from .rotate import LARGEST_TRANSPOSED
from .spec import CODES, CODES_ACROSS, CODES_SWIZZLED, FP8, NOTHING, VALUES, Spec, spec_text

__all__ = [
    "CODES",
    "CODES_ACROSS",
    "CODES_SWIZZLED",
    "FP8",
    "LARGEST_TRANSPOSED",
    "MATRICES_ACROSS",
    "NOTHING",
    "ROWS",
    "SIDE_BY_SIDE",
    "UNIT",
    "VALUES",
    "Spec",
    "amax",
    "cast",
    "dequantize",
    "padded",
    "multiply_columns",
    "multiply_rows",
    "rotate",
    "scaled_matmul",
    "spec_text",
    "unfit",
    "w4a16",
]
