"""Elements in plain PyTorch: rounding to a grid, codes, random bits, the random Hadamard transform.

Knows `formats.Element`; knows nothing of blocks, scales and casts. Every operation is prescribed to the bit, in FP32,
so that a kernel can repeat it. Runs on any device and compiles.
"""

import math

import torch
from torch import Tensor

from hf_nvfp4.formats import Element

# Signs of the random Hadamard transform, the same for every tensor, layer and rank (Transformer Engine's).
RHT_SIGNS = (1, 1, 1, -1, 1, -1, -1, -1, -1, -1, -1, 1, -1, 1, -1, -1)
_RHT_MINUS = sum(1 << i for i, sign in enumerate(RHT_SIGNS) if sign < 0)


# ---------------------------------------------------------------------------- rounding to an element

def _grid_step(magnitude: Tensor, element: Element) -> Tensor:
    """Distance of the two grid points around each non-negative FP32 value."""
    power_of_two = (magnitude.view(torch.int32) & 0x7F800000).view(torch.float32)
    return power_of_two.clamp_(min=element.min_normal).mul_(2.0**-element.mantissa_bits)


def round_to(v: Tensor, element: Element, dither: Tensor | None = None) -> Tensor:
    """FP32 values rounded to the element's grid, to nearest, ties to even, saturating at its maximum; NaN stays NaN.

    dither: draws in (-1/2, 1/2) of v's shape, in units of the grid's step at |v|, added before rounding: that is
        stochastic rounding, up with probability distance / step.
    A negative value that rounds to zero becomes -0.0, and -0.0 itself becomes 0.0.
    """
    # In place where the buffer is ours: on a CPU this is bound by memory.
    magnitude = v.abs().clamp_(max=element.max)
    step = _grid_step(magnitude, element)
    steps = magnitude.div_(step)
    if dither is not None:
        steps.add_(dither)
    return steps.round_().mul_(step).copysign_(v + 0.0)


def _code_offset(element: Element) -> int:
    """FP32's exponent and mantissa bits, shifted down to the element's mantissa, less this: the element's code."""
    return 127 + round(math.log2(element.min_normal)) - 1 << element.mantissa_bits


def encode(values: Tensor, element: Element) -> Tensor:
    """uint8 codes, one a byte, of FP32 values on the element's grid.

    NaN's code is 0x7F, or the largest positive value's where the element has no NaN (E2M1: 7).
    """
    if element.dtype is not None:
        codes = values.to(element.dtype).view(torch.uint8)
        negative_nan = (codes == 0xFF).view(torch.uint8)
        return codes.bitwise_xor_(negative_nan * 0x80)
    values = values.nan_to_num(element.max)
    # Exponent and mantissa are adjacent in FP32 too: shift them down and move the exponent's bias.
    magnitude = values.abs()
    normal = (magnitude.view(torch.int32) >> 23 - element.mantissa_bits).sub_(_code_offset(element))
    subnormal = (magnitude * (2.0**element.mantissa_bits / element.min_normal)).to(torch.int32)
    code = torch.where(magnitude < element.min_normal, subnormal, normal)
    sign = (values.view(torch.int32) >> 32 - element.bits).bitwise_and_(1 << element.bits - 1)
    return code.bitwise_or_(sign).to(torch.uint8)


def decode(codes: Tensor, element: Element) -> Tensor:
    """FP32 values of uint8 codes, one a byte."""
    if element.dtype is not None:
        return codes.view(element.dtype).float()
    code = codes.int() & (1 << element.bits - 1) - 1
    normal = (code + _code_offset(element) << 23 - element.mantissa_bits).view(torch.float32)
    subnormal = code * (element.min_normal * 2.0**-element.mantissa_bits)
    magnitude = torch.where(code < 1 << element.mantissa_bits, subnormal, normal)
    return torch.where(codes >> element.bits - 1 == 0, magnitude, -magnitude)


def pack_nibbles(codes: Tensor) -> Tensor:
    """Two 4-bit codes a byte, the even column in the low nibble: [M, K] -> [M, K/2]."""
    pairs = codes.contiguous().view(torch.int16)
    return (pairs >> 4).bitwise_or_(pairs).to(torch.uint8)


def unpack_nibbles(packed: Tensor) -> Tensor:
    """Inverse of `pack_nibbles`: [M, K/2] -> [M, K]."""
    return torch.stack((packed & 0xF, packed >> 4), dim=-1).flatten(1)


# ---------------------------------------------------------------------------- random bits

def _mix(h: Tensor) -> Tensor:
    """A bijection of int32 that flips each output bit with probability near 1/2 for each input bit.

    Multiply-xorshift with the low-bias constants of https://github.com/skeeto/hash-prospector.
    """
    h = ((h >> 16).bitwise_and_(0xFFFF).bitwise_xor_(h)).mul_(0x21F0AAAD)
    h = ((h >> 15).bitwise_and_(0x1FFFF).bitwise_xor_(h)).mul_(0x735A2D97)
    return (h >> 15).bitwise_and_(0x1FFFF).bitwise_xor_(h)


def dither_like(x: Tensor, seed: Tensor, first_row: int = 0) -> Tensor:
    """Draws in (-1/2, 1/2) for each element of x [M, K], a function of (row, column, seed) alone.

    (byte + 1/2) / 256 - 1/2, 8 random bits each, four columns a hashed word (the first in its low byte). The sum of
    a draw and a whole number of grid steps is exact in FP32 and nearest to that number: a value on the grid never
    moves, and one k/256 of a step above it goes up for exactly k of the 256 bytes.
    seed: int32 [2]. first_row: the number of x's first row, where x is a part of a larger tensor.
    """
    m, k = x.shape
    rows = torch.arange(first_row, first_row + m, device=x.device, dtype=torch.int32)
    words = torch.arange((k + 3) // 4, device=x.device, dtype=torch.int32)
    bits = _mix(_mix(rows ^ seed[0])[:, None] ^ _mix(~words ^ seed[1])[None, :])
    return bits.view(torch.uint8)[:, :k].float().sub_(127.5).mul_(2.0**-8)


def draw_seed(device: torch.device, generator: torch.Generator | None = None) -> Tensor:
    """A fresh seed, int32 [2], from `generator` or torch's default one, different on every rank.

    The default generator is what Trainer saves and restores, so that a resumed run draws the same numbers;
    but Trainer seeds every rank alike, hence the rank here.
    """
    seed = torch.randint(-(2**31), 2**31 - 1, (2,), dtype=torch.int32, device=device, generator=generator)
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        seed = _mix(seed + torch.distributed.get_rank())
    return seed


# ---------------------------------------------------------------------------- Hadamard transform

def _rht_signs(size: int, device: torch.device) -> Tensor:
    """FP32 [size, 1]; the signs repeat beyond 16. Integer arithmetic on the device: no copy from the host."""
    index = torch.arange(size, device=device, dtype=torch.int32)
    return (1 - 2 * ((_RHT_MINUS >> (index % 16)) & 1)).float()[:, None]


def _round_bf16(v: Tensor) -> Tensor:
    """v.bfloat16(), which inductor leaves out where FP32 follows; integer arithmetic it keeps."""
    if not torch.compiler.is_compiling():
        return v.bfloat16()
    bits = v.view(torch.int32)
    bits = bits + 0x7FFF + (bits >> 16 & 1) & -0x10000
    return torch.where(v.isnan(), v, bits.view(torch.float32)).bfloat16()


def rotate(x: Tensor, size: int) -> Tensor:
    """Random Hadamard transform of blocks of `size` along the last dimension: FP32 accumulation, BF16 result.

    Sign first, then Sylvester's H as a butterfly: for h = 1, 2, 4, ... every pair (i, i + h) becomes (a + b, a - b);
    then times FP32(1 / sqrt(size)), then BF16. A GEMM whose two operands are both rotated is unchanged but for
    rounding.
    """
    if x.shape[-1] % size:
        raise ValueError(f"a Hadamard transform of size {size} does not divide the last dimension of {tuple(x.shape)}")
    # One block a column, so that each half of a butterfly is contiguous.
    blocks = x.reshape(-1, size).T.contiguous() * _rht_signs(size, x.device)
    h = 1
    while h < size:
        a, b = blocks.view(size // (2 * h), 2, h, -1).unbind(1)
        difference = a - b
        a.add_(b)
        b.copy_(difference)
        h *= 2
    return _round_bf16(blocks.mul_(size**-0.5)).T.reshape(x.shape)
