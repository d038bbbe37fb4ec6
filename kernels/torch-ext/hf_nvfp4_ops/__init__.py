"""Triton kernels for block-quantized operands of GEMMs: cast, dequantize, multiply. See ops.py and spec.py."""

from .blas import unfit
from .ops import amax, cast, dequantize, padded, scaled_matmul
from .spec import Spec, spec_text

__all__ = ["Spec", "amax", "cast", "dequantize", "padded", "scaled_matmul", "spec_text", "unfit"]
