"""Triton kernels for block-quantized operands of GEMMs: cast, dequantize, multiply. See ops.py and spec.py."""

from .blas import unfit
from .ops import amax, cast, dequantize, padded, rotate, scaled_matmul, w4a16
from .rotate import LARGEST_TRANSPOSED
from .spec import CODES, CODES_ACROSS, CODES_SWIZZLED, FP8, NOTHING, VALUES, Spec, spec_text

__all__ = [
    "CODES",
    "CODES_ACROSS",
    "CODES_SWIZZLED",
    "FP8",
    "LARGEST_TRANSPOSED",
    "NOTHING",
    "VALUES",
    "Spec",
    "amax",
    "cast",
    "dequantize",
    "padded",
    "rotate",
    "scaled_matmul",
    "spec_text",
    "unfit",
    "w4a16",
]
