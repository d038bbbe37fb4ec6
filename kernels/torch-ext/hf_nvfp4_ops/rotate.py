"""Triton kernels: the random Hadamard transform of long blocks, of x along its rows or of xᵀ along its own."""

import triton
import triton.language as tl

from .numerics import RHT_MINUS, as_float, as_int, random_bytes, to_bf16, to_fp32

# Elements of a program's tile, and its warps.
TILE, NUM_WARPS = 4096, 4
# The same of xᵀ: tiles of so many columns of x, 128 bytes of BF16, as long as they fit; fewer are read by halves.
COLUMNS, NUM_WARPS_TRANSPOSED = 64, 8
LARGEST_TRANSPOSED = 256


@triton.jit
def _butterflies(v, H: tl.constexpr):
    """[R, SIZE]: every pair (i, i + H) becomes (a + b, a - b)."""
    R: tl.constexpr = v.shape[0]
    SIZE: tl.constexpr = v.shape[1]
    a, b = tl.split(tl.permute(tl.reshape(v, (R, SIZE // (2 * H), 2, H)), (0, 1, 3, 2)))
    return tl.reshape(tl.permute(tl.join(a + b, a - b), (0, 1, 3, 2)), (R, SIZE))


@triton.jit
def _signs(seed_ptr, SIZE: tl.constexpr, DRAWN: tl.constexpr):
    """int32 [SIZE]: 1 where the reference's `flip` turns the sign, if DRAWN."""
    columns = tl.arange(0, SIZE)
    if DRAWN:
        return tl.reshape(random_bytes(tl.zeros((1,), tl.int32), columns, seed_ptr), (SIZE,)) >> 7
    else:
        return tl.zeros((SIZE,), tl.int32)


@triton.jit
def _rotated(v, flips, STAGES: tl.constexpr, FACTOR: tl.constexpr):
    """[R, SIZE] in FP32: the fixed signs and `flips` [SIZE], Sylvester's H, times FACTOR."""
    SIZE: tl.constexpr = v.shape[1]
    minus = (RHT_MINUS >> tl.arange(0, SIZE) % 16) & 1 ^ flips
    v = as_float(as_int(v) ^ (minus << 31)[None, :])
    for stage in tl.static_range(STAGES):
        v = _butterflies(v, 1 << stage)
    return v * FACTOR


@triton.jit
def rotate_kernel(x_ptr, seed_ptr, out_ptr, blocks, SIZE: tl.constexpr, STAGES: tl.constexpr, FACTOR: tl.constexpr,
                  R: tl.constexpr, DRAWN: tl.constexpr):  # fmt: skip
    """x: [blocks, SIZE], contiguous -> BF16 of the same shape: each block transformed."""
    rows, columns = tl.program_id(0) * R + tl.arange(0, R), tl.arange(0, SIZE)
    at = rows[:, None].to(tl.int64) * SIZE + columns[None, :]
    inside = (rows < blocks)[:, None]
    v = _rotated(to_fp32(tl.load(x_ptr + at, inside, 0.0)), _signs(seed_ptr, SIZE, DRAWN), STAGES, FACTOR)
    tl.store(out_ptr + at, to_bf16(v), inside)


@triton.jit
def rotate_transposed_kernel(x_ptr, seed_ptr, out_ptr, M, K, stride, M_PADDED,
                             SIZE: tl.constexpr, STAGES: tl.constexpr, FACTOR: tl.constexpr, R: tl.constexpr,
                             DRAWN: tl.constexpr):  # fmt: skip
    """x: [M, K], contiguous along K -> BF16 [K, M_PADDED]: blocks of xᵀ transformed, its rows padded with zeros."""
    across = tl.cdiv(K, R)
    rows = tl.program_id(0) // across * SIZE + tl.arange(0, SIZE)
    columns = tl.program_id(0) % across * R + tl.arange(0, R)
    inside = (columns < K)[:, None]
    at = rows[None, :].to(tl.int64) * stride + columns[:, None]
    v = to_fp32(tl.load(x_ptr + at, inside & (rows < M)[None, :], 0.0))
    v = _rotated(v, tl.where(rows < M, _signs(seed_ptr, SIZE, DRAWN), 0), STAGES, FACTOR)
    tl.store(out_ptr + columns[:, None].to(tl.int64) * M_PADDED + rows[None, :], to_bf16(v), inside)


def constants(size: int, drawn: bool = False, transposed: bool = False) -> dict:
    """The compile-time arguments for a transform of this size."""
    rows = COLUMNS if transposed else max(1, TILE // size)
    return {"SIZE": size, "STAGES": size.bit_length() - 1, "FACTOR": size**-0.5, "R": rows, "DRAWN": drawn}
