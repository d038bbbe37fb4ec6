"""Triton kernel: the random Hadamard transform of long blocks along the last dimension, alone."""

import triton
import triton.language as tl

from .numerics import RHT_MINUS, as_float, as_int, to_bf16

# Elements of a program's tile, and its warps.
TILE, NUM_WARPS = 4096, 4


@triton.jit
def _butterflies(v, H: tl.constexpr):
    """[R, SIZE]: every pair (i, i + H) becomes (a + b, a - b)."""
    R: tl.constexpr = v.shape[0]
    SIZE: tl.constexpr = v.shape[1]
    a, b = tl.split(tl.permute(tl.reshape(v, (R, SIZE // (2 * H), 2, H)), (0, 1, 3, 2)))
    return tl.reshape(tl.permute(tl.join(a + b, a - b), (0, 1, 3, 2)), (R, SIZE))


@triton.jit
def rotate_kernel(x_ptr, out_ptr, blocks, SIZE: tl.constexpr, STAGES: tl.constexpr, FACTOR: tl.constexpr,
                  R: tl.constexpr):  # fmt: skip
    """x: [blocks, SIZE], contiguous -> BF16 of the same shape: signs, Sylvester's H, times FACTOR, in FP32."""
    rows, columns = tl.program_id(0) * R + tl.arange(0, R), tl.arange(0, SIZE)
    at = rows[:, None].to(tl.int64) * SIZE + columns[None, :]
    inside = (rows < blocks)[:, None]
    v = tl.load(x_ptr + at, inside, 0.0).to(tl.float32)
    minus = (RHT_MINUS >> columns % 16) & 1
    v = as_float(as_int(v) ^ (minus << 31)[None, :])
    for stage in tl.static_range(STAGES):
        v = _butterflies(v, 1 << stage)
    tl.store(out_ptr + at, to_bf16(v * FACTOR), inside)


def constants(size: int) -> dict:
    """The compile-time arguments for a transform of this size."""
    return {"SIZE": size, "STAGES": size.bit_length() - 1, "FACTOR": size**-0.5, "R": max(1, TILE // size)}
