"""Triton kernel: packed codes and block scales back to values, the FP32 scale above them left out."""

import triton
import triton.language as tl

from .cast import _load, _store_columns, _store_rows, scales_at, words_at
from .numerics import as_float, decode


@triton.jit
def decode_scale(scale, P: tl.constexpr):
    """Stored block scales -> FP32."""
    if P.scale == "e4m3":
        E4M3: tl.constexpr = P.scale_grid
        return decode(scale.to(tl.int32), E4M3)
    elif P.scale == "e8m0":
        code = scale.to(tl.int32)
        value = as_float(tl.where(code == 0, 0x00400000, code << 23))
        return tl.where(code == 255, float("nan"), value)
    else:
        return scale


@triton.jit
def dequantize_kernel(codes_ptr, scales_ptr, out_ptr, M, K, P: tl.constexpr, ACROSS: tl.constexpr, EVEN: tl.constexpr,
                      R: tl.constexpr, B: tl.constexpr):  # fmt: skip
    """Codes and scales of an operand [M, K] -> BF16 code × scale, [M, K].

    ACROSS: codes and scales lie block after block, [K / 16, M] of them, and the result is written as [K, M].
    """
    EACH: tl.constexpr = 32 // P.grid.bits
    WORDS: tl.constexpr = 16 // EACH
    # Neighbours in memory go to neighbouring programs.
    if ACROSS:
        tall = tl.cdiv(M, R)
        first_row, first_group = tl.program_id(0) % tall * R, tl.program_id(0) // tall * B
    else:
        across = tl.cdiv(K, B * 16)
        first_row, first_group = tl.program_id(0) // across * R, tl.program_id(0) % across * B
    rows, groups = first_row + tl.arange(0, R), first_group + tl.arange(0, B)
    inside = (rows < M)[:, None] & (groups < K // 16)[None, :]
    words = _load(codes_ptr + words_at(rows, groups, M, K, WORDS, ACROSS), inside[:, :, None], EVEN)
    places = (tl.arange(0, EACH) * P.grid.bits)[None, None, None, :]
    code = tl.reshape(words[:, :, :, None] >> places, (R, B, 16)) & (1 << P.grid.bits) - 1
    G: tl.constexpr = P.grid
    value = decode(code, G)
    if P.scale != "none":
        scale = _load(scales_ptr + scales_at(rows, groups, M, K, P.block, ACROSS), inside, EVEN)
        value = value * decode_scale(scale, P)[:, :, None]
    if ACROSS:
        _store_columns(out_ptr, value, rows, groups, K, M, EVEN)
    else:
        _store_rows(out_ptr, value, rows, groups, M, K, EVEN)


@triton.jit
def factors_kernel(scale_a_ptr, scale_b_ptr, out_ptr, ADD: tl.constexpr):
    """out: FP32 [2], alpha and beta of a GEMM: the product of two scalars, and whether to add what is there."""
    tl.store(out_ptr, tl.load(scale_a_ptr) * tl.load(scale_b_ptr))
    tl.store(out_ptr + 1, 1.0 if ADD else 0.0)
