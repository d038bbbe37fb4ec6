"""Backend `inductor`: the plain PyTorch of reference.py, each call of `cast` one graph compiled by inductor.

What there is without kernels of our own, for scripts/bench.py to compare with; not one of `BACKENDS`. Stochastic
rounding draws as all backends do. Not bit-exact: inductor contracts and divides as it likes.
"""

import dataclasses
import functools
from collections.abc import Callable

import torch
from torch import Tensor

from hf_nvfp4.backends.bf16 import exactness, supports
from hf_nvfp4.backends.operand import Operand, finished, is_plain, plain, transposed
from hf_nvfp4.casts import Cast
from hf_nvfp4.reference import QuantizedTensor, pack, prepare, quantize_rows
from hf_nvfp4.rounding import draw_seed

# Devices with a graph for each orientation: the C++ generator of torch 2.13 fails on both of some formats in one.
APART = {"cpu"}

__all__ = ["cast", "exactness", "multiply", "supports"]


def cast(x: Tensor, row: Cast | None, col: Cast | None, keep_col: bool = False) -> tuple:
    """x [M, K] and x.T as BF16 values and a scale; x.T packed if it is to be kept."""
    if row and col and x.device.type in APART:
        return cast(x, row, None)[0], cast(x, None, col, keep_col)[1]
    casts = row, col
    seeds = [draw_seed(x.device) if c and c.rounding != "nearest" else None for c in casts]
    keeps = False, bool(col) and keep_col and not col.block_format.high_precision
    tensors = _compiled(_casts, casts, keeps)(x, seeds)
    kinds = (QuantizedTensor if keep else Operand for keep in keeps)
    return tuple(c and kind(*parts, c) for kind, parts, c in zip(kinds, tensors, casts, strict=True))


def multiply(a, b, dtype: torch.dtype, bias: Tensor | None = None) -> Tensor:
    """[M, K] @ [N, K].T, accumulated in FP32; the scales and the bias in a second, compiled pass."""
    a, b = ((op.values, op.scale) if isinstance(op, Operand) else _unpack(op) for op in (a, b))
    if a[0].device.type == "cuda":
        product = torch.mm(a[0], b[0].T, out_dtype=torch.float32)
    else:
        product = a[0].float() @ b[0].float().T
    return _compiled(_epilogue, dtype)(product, a[1], b[1], bias)


@functools.cache
def _compiled(function: Callable, *constants) -> Callable:
    """A compiled function of tensors; anew for every shape, as fast as inductor makes it."""
    return torch.compile(lambda *tensors: function(*constants, *tensors), dynamic=False, fullgraph=True)


def _casts(casts: tuple, keeps: tuple, x: Tensor, seeds: list) -> list:
    operands = x, None if casts[1] is None else transposed(x, casts[1])
    return [
        None if cast is None else _cast(operand, cast, seed, keep)
        for operand, cast, seed, keep in zip(operands, casts, seeds, keeps, strict=True)
    ]


def _cast(x: Tensor, cast: Cast, seed: Tensor | None, keep: bool) -> tuple[Tensor | None, ...]:
    if is_plain(cast):
        return plain(x, cast).tensors
    x, amax, _ = prepare(x, dataclasses.replace(cast, rounding="nearest"))  # which draws no seed
    blocks = quantize_rows(x, amax, seed, cast)
    return pack(blocks, cast).tensors if keep else (blocks.values().bfloat16(), blocks.tensor_scale)


def _unpack(op: QuantizedTensor) -> tuple[Tensor, Tensor]:
    return _compiled(_values, op.cast)(*op.tensors), op.tensor_scale


def _values(cast: Cast, *tensors: Tensor | None) -> Tensor:
    return QuantizedTensor(*tensors, cast).values().bfloat16()


def _epilogue(dtype: torch.dtype, *product_scales_and_bias: Tensor | None) -> Tensor:
    return finished(*product_scales_and_bias, dtype)
