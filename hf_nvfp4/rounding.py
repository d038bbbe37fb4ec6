"""Elements in plain PyTorch: rounding to a grid, codes, random bits, sums, the random Hadamard transform.

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


def grid_step(magnitude: Tensor, element: Element) -> Tensor:
    """Distance of the two grid points around each non-negative FP32 value."""
    power_of_two = (magnitude.view(torch.int32) & 0x7F800000).view(torch.float32)
    return power_of_two.clamp_(min=element.min_normal).mul_(2.0**-element.mantissa_bits)


def round_to(v: Tensor, element: Element, random: Tensor | None = None) -> Tensor:
    """FP32 values rounded to the element's grid, to nearest, ties to even, saturating at its maximum; NaN stays NaN.

    random: uint8 of v's shape, uniform: stochastic rounding, up with probability distance / step, see `_stochastic`.
    A negative value that rounds to zero becomes -0.0, and -0.0 itself becomes 0.0.
    """
    # In place where the buffer is ours: on a CPU this is bound by memory.
    magnitude = v.abs().clamp_(max=element.max)
    if random is None:
        step = grid_step(magnitude, element)
        rounded = magnitude.div_(step).round_().mul_(step)
    else:
        rounded = _stochastic(magnitude, element, random)
    return rounded.copysign_(v + 0.0)


def _stochastic(magnitude: Tensor, element: Element, random: Tensor) -> Tensor:
    """Stochastic rounding of FP32 magnitudes up to the element's largest by the bits of a wider format.

    Magnitudes are written in FP16 (FP32 for elements of three bits of significand), its smallest normal number standing
    for the element's, so that the grid is what is left when the lower bits are cut off, subnormals included. Before the
    cut, (byte + 1/2) / 256 of what the last bit left is worth is added. So a value on the grid never moves, and one
    k/256 of a step above it goes up for exactly k of the 256 bytes.
    """
    wide, bits = (torch.float16, torch.int16) if element.mantissa_bits < 3 else (torch.float32, torch.int32)
    info = torch.finfo(wide)
    cut = round(-math.log2(info.eps)) - element.mantissa_bits
    draw = (random.to(bits) << cut - 8) + (1 << cut - 9 if cut > 8 else 0)
    pattern = magnitude.mul_(info.tiny / element.min_normal).to(wide).view(bits)
    rounded = draw.add_(pattern).bitwise_and_(-(1 << cut)).view(wide).float().mul_(element.min_normal / info.tiny)
    return torch.where(magnitude.isnan(), magnitude, rounded)


def _code_offset(element: Element) -> int:
    """FP32's exponent and mantissa bits, shifted down to the element's mantissa, less this: the element's code."""
    return 127 + round(math.log2(element.min_normal)) - 1 << element.mantissa_bits


def rescaled(values: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """values × FP32 scale, rounded once to dtype."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return (values.to(wide) * scale.to(wide)).to(dtype)


def encode(values: Tensor, element: Element) -> Tensor:
    """uint8 codes, one a byte, of FP32 values on the element's grid.

    NaN's code is 0x7F, or the largest positive value's where the element has no NaN (E2M1: 7).
    """
    if element.dtype is not None:
        codes = values.to(element.dtype).view(torch.uint8)
        negative_nan = (codes == 0xFF).to(torch.uint8)
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


def _fold(h: Tensor) -> Tensor:
    """The halves of h · 0x9E3779B1, 64 bits, one over the other: uint32 as int64."""
    product = h * 0x9E3779B1
    return (product >> 32 ^ product).bitwise_and_(0xFFFFFFFF)


def random_bytes(x: Tensor, seed: Tensor, first_row: int = 0) -> Tensor:
    """uint8 for each element of x [M, K], a function of (row, column, seed) alone.

    Four columns share a hashed word, of which they have the bytes 0, 2, 1 and 3 from the low end on.
    seed: int32 [2]. first_row: the number of x's first row, where x is a part of a larger tensor.
    """
    m, k = x.shape
    rows = torch.arange(first_row, first_row + m, device=x.device, dtype=torch.int32)
    words = torch.arange((k + 3) // 4, device=x.device, dtype=torch.int32)
    by_row, by_word = _mix(rows ^ seed[0])[:, None], _mix(~words ^ seed[1])[None, :]
    word = _fold((by_row ^ by_word).long() & 0xFFFFFFFF)
    i = torch.arange(4, device=x.device)
    return (word[:, :, None] >> (i & 1) * 16 + (i >> 1) * 8).to(torch.uint8).flatten(1)[:, :k]


def draw_seed(device: torch.device, generator: torch.Generator | None = None, by_rank: bool = True) -> Tensor:
    """A fresh seed, int32 [2], from `generator` or torch's default one, different on every rank.

    The default generator is what Trainer saves and restores, so that a resumed run draws the same numbers;
    but Trainer seeds every rank alike, hence the rank here.
    by_rank: False for what ranks that share a tensor must agree on, the signs of a rotation: ranks that were seeded
        alike and have drawn as often get the same seed.
    """
    seed = torch.randint(-(2**31), 2**31 - 1, (2,), dtype=torch.int32, device=device, generator=generator)
    if by_rank and torch.distributed.is_available() and torch.distributed.is_initialized():
        seed = _mix(seed + torch.distributed.get_rank())
    return seed


# ---------------------------------------------------------------------------- sums


def sum16(d: Tensor) -> Tensor:
    """[..., 16] -> [..., 1], halves added to halves: the first 8 to the last 8, 4 to 4, 2 to 2, 1 to 1."""
    for half in (8, 4, 2, 1):
        d = d[..., :half] + d[..., half:]
    return d


# ---------------------------------------------------------------------------- Hadamard transform


def _rht_signs(size: int, device: torch.device) -> Tensor:
    """FP32 [size, 1]; the signs repeat beyond 16. Integer arithmetic on the device: no copy from the host."""
    index = torch.arange(size, device=device, dtype=torch.int32)
    return (1 - 2 * ((_RHT_MINUS >> (index % 16)) & 1)).float()[:, None]


def flip(x: Tensor, seed: Tensor, size: int, dim: int) -> Tensor:
    """x with `size` drawn signs along a dimension, again and again: those of a random Hadamard transform, drawn anew.

    Exact. `rotate` has signs of its own, and these times those are as random as these. seed: int32 [2]; sign i is minus
    where the top bit of byte i in row 0 of `random_bytes` is set.
    """
    signs = 1 - 2 * (random_bytes(torch.empty(1, size, device=x.device), seed)[0] >> 7).int()
    signs = signs[torch.arange(x.shape[dim], device=x.device) % size].to(x.dtype)
    return x * (signs[:, None] if dim == 0 else signs)


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
    blocks = _butterflies(x.reshape(-1, size).T.contiguous() * _rht_signs(size, x.device))
    return _round_bf16(blocks.mul_(size**-0.5)).T.reshape(x.shape)


def rotate_back(x: Tensor, size: int) -> Tensor:
    """The transpose of `rotate`, and its inverse but for rounding: H first, then the signs. FP32 result."""
    blocks = _butterflies(x.float().reshape(-1, size).T.contiguous())
    return (blocks.mul_(size**-0.5) * _rht_signs(size, x.device)).T.reshape(x.shape)


def _butterflies(blocks: Tensor) -> Tensor:
    """Sylvester's H times each column of FP32 [size, n], in place."""
    size, h = blocks.shape[0], 1
    while h < size:
        a, b = blocks.view(size // (2 * h), 2, h, -1).unbind(1)
        difference = a - b
        a.add_(b)
        b.copy_(difference)
        h *= 2
    return blocks
