"""The arithmetic of a cast inside a Triton kernel, on tiles [R, B, 16] whose last axis lies in one thread.

Equal to hf_nvfp4/reference.py bit for bit, in compiled kernels and in Triton's interpreter. For that: true
divisions, no fused multiply-add but where the product is exact (launch with enable_fp_fusion=False), sums in pairwise
order, a butterfly for the Hadamard transform, NaN handled explicitly, no use of the interpreter's own narrow casts.
No shared memory: 16 neighbours along the contraction dimension are a thread's own.
"""

import os

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET", "0") == "1")
# Bits of the signs of the Hadamard transform, one where the sign is -1 (Transformer Engine's).
RHT_MINUS = tl.constexpr(0xD7E8)
FLOAT32_MAX = tl.constexpr(3.4028234663852886e38)
FLOAT32_TINY = tl.constexpr(1.1754943508222875e-38)
ALL = tl.constexpr(tl.PropagateNan.ALL)


# ---------------------------------------------------------------------------- bits

@triton.jit
def as_int(v):
    return v.to(tl.int32, bitcast=True)


@triton.jit
def as_float(bits):
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def round_bf16(v):
    """FP32 rounded to BF16 (ties to even), as FP32."""
    if INTERPRETED:  # its casts truncate
        bits = as_int(v)
        rounded = as_float((bits + 0x7FFF + ((bits >> 16) & 1)) & -65536)
        return tl.where(v == v, rounded, v)
    else:
        return v.to(tl.bfloat16).to(tl.float32)


@triton.jit
def to_bf16(v):
    """FP32 to BF16, ties to even."""
    if INTERPRETED:
        return (as_int(round_bf16(v)) >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)
    else:
        return v.to(tl.bfloat16)


@triton.jit
def to_fp32(v):
    """BF16, FP16 or FP32 to FP32."""
    if INTERPRETED and v.dtype == tl.bfloat16:  # it misreads subnormals
        return as_float(v.to(tl.int16, bitcast=True).to(tl.int32) << 16)
    else:
        return v.to(tl.float32)


@triton.jit
def mix(h):
    """A bijection of uint32, the reference's `_mix`."""
    h = (h ^ (h >> 16)) * 0x21F0AAAD
    h = (h ^ (h >> 15)) * 0x735A2D97
    return h ^ (h >> 15)


@triton.jit
def random_words(rows, groups, seed_ptr):
    """uint32 [R, B, 4]: 32 random bits for each four elements of [R, B, 16]."""
    words = groups[:, None] * 4 + tl.arange(0, 4)[None, :]
    by_row = mix((rows ^ tl.load(seed_ptr)).to(tl.uint32, bitcast=True))
    by_word = mix((~words ^ tl.load(seed_ptr + 1)).to(tl.uint32, bitcast=True))
    return mix(by_row[:, None, None] ^ by_word[None, :, :])


@triton.jit
def dither(word, G: tl.constexpr):
    """For each element of [R, B, 16] a draw in (-1/2, 1/2) × the grid's step per power of two: 8 bits, 4 a word."""
    R: tl.constexpr = word.shape[0]
    B: tl.constexpr = word.shape[1]
    # Each byte within an FP32 mantissa, where it takes the fewest instructions to put: then centred. Exact.
    places = (tl.arange(0, 4) * 8).to(tl.uint32)[None, None, None, :]
    byte = ((word[:, :, :, None] >> places) & 0xFF) << 8
    bits = tl.reshape(byte | G.dither_bits, (R, B, 16))
    return bits.to(tl.float32, bitcast=True) - G.dither_centre


# ---------------------------------------------------------------------------- addresses

@triton.jit
def swizzled_at(rows, blocks, tiles_across):
    """Where tensor cores read the scale of (row, block): [R, B] offsets in bytes.

    Tiles of 128 rows × 4 blocks, 512 bytes each: 32 rows of 4 quarters of 4 blocks.
    """
    tile = (rows // 128)[:, None].to(tl.int64) * tiles_across + (blocks // 4)[None, :]
    return tile * 512 + (rows % 32 * 16 + rows % 128 // 32 * 4)[:, None] + (blocks % 4)[None, :]


# ---------------------------------------------------------------------------- 16 neighbours

@triton.jit
def halves(v, H: tl.constexpr):
    """[R, B, 2H] -> its two halves along the last axis, [R, B, H] each."""
    R: tl.constexpr = v.shape[0]
    B: tl.constexpr = v.shape[1]
    return tl.split(tl.permute(tl.reshape(v, (R, B, 2, H)), (0, 1, 3, 2)))


@triton.jit
def largest16(v):
    """[R, B, 16] -> the largest magnitude [R, B]; NaN if there is one."""
    a, b = halves(tl.abs(v), 8)
    a, b = halves(tl.maximum(a, b, propagate_nan=ALL), 4)
    a, b = halves(tl.maximum(a, b, propagate_nan=ALL), 2)
    a, b = tl.split(tl.maximum(a, b, propagate_nan=ALL))
    return tl.maximum(a, b, propagate_nan=ALL)


@triton.jit
def sum16(v):
    """[R, B, 16] -> the sum [R, B], halves added to halves."""
    a, b = halves(v, 8)
    a, b = halves(a + b, 4)
    a, b = halves(a + b, 2)
    a, b = tl.split(a + b)
    return a + b


@triton.jit
def _butterfly(v, H: tl.constexpr):
    R: tl.constexpr = v.shape[0]
    B: tl.constexpr = v.shape[1]
    a, b = tl.split(tl.permute(tl.reshape(v, (R, B, 8 // H, 2, H)), (0, 1, 2, 4, 3)))
    return tl.reshape(tl.permute(tl.join(a + b, a - b), (0, 1, 2, 4, 3)), (R, B, 16))


@triton.jit
def rotate(v, SIZE: tl.constexpr):
    """Hadamard transform of blocks of SIZE along the last axis, signs first, without its factor: FP32."""
    minus = (RHT_MINUS >> (tl.arange(0, 16) % SIZE)) & 1
    v = as_float(as_int(v) ^ (minus << 31)[None, None, :])
    v = _butterfly(v, 1)
    if SIZE >= 4:
        v = _butterfly(v, 2)
    if SIZE >= 8:
        v = _butterfly(v, 4)
    if SIZE >= 16:
        v = _butterfly(v, 8)
    return v


# ---------------------------------------------------------------------------- elements

@triton.jit
def power_of_two(v):
    """The power of two at or below each normal |v|; 0 for subnormals, inf for NaN."""
    return as_float(as_int(v) & 0x7F800000)


@triton.jit
def round_magnitude(m, draws, STOCHASTIC: tl.constexpr, G: tl.constexpr):
    """m in [0, max] -> (sum, magic): sum - magic is m rounded to the grid, the low bits of sum are its step count."""
    power = tl.maximum(power_of_two(m), G.min_normal)
    if STOCHASTIC:
        m = tl.fma(draws, power, m)  # the product is exact
    magic = power * G.magic
    return m + magic, magic


@triton.jit
def magnitude_code(sum, G: tl.constexpr):
    """The code without sign of what `round_magnitude` rounded."""
    bits = as_int(sum)
    return (bits & G.mask) + (bits >> G.shift) - G.offset


@triton.jit
def round_positive(v, G: tl.constexpr):
    """v >= 0 rounded to nearest, saturating -> (value, code); NaN stays NaN."""
    sum, magic = round_magnitude(tl.minimum(v, G.max), v, False, G)
    finite = v == v
    return tl.where(finite, sum - magic, v), tl.where(finite, magnitude_code(sum, G), G.nan_code)


@triton.jit
def with_sign(value, v):
    """|value| with v's sign bit."""
    return as_float(as_int(value) | (as_int(v) & -2147483648))


@triton.jit
def signed_code(sum, v, G: tl.constexpr):
    """Codes with their sign bit, which is set where v < 0."""
    code = magnitude_code(sum, G)
    code = tl.where(v < 0, code + (1 << G.bits - 1), code)
    if G.bits == 8:
        code = tl.where(v == v, code, G.nan_code)
    return code


@triton.jit
def decode(code, G: tl.constexpr):
    """int32 codes of a grid -> FP32."""
    # A code's exponent and mantissa are FP32's but for the bias, which the factor moves; subnormals included.
    value = as_float((code & (1 << G.bits - 1) - 1) << G.shift) * G.decode_factor
    if G.bits == 8:
        value = tl.where((code & 0x7F) == G.nan_code, float("nan"), value)
    return as_float(as_int(value) | (code >> G.bits - 1) << 31)


# ---------------------------------------------------------------------------- block scales

@triton.jit
def over_block(a, P: tl.constexpr, rows: tl.constexpr):
    """[R, B] of 16 elements each -> the largest of the block that each belongs to, [R, B] again. Not negative."""
    R: tl.constexpr = a.shape[0]
    B: tl.constexpr = a.shape[1]
    along: tl.constexpr = P.block // 16
    bits = as_int(a)  # in integers NaN is above inf, and the order is the same
    if along > 1:
        wide = tl.max(tl.reshape(bits, (R, B // along, along)), 2)
        bits = tl.reshape(tl.broadcast_to(wide[:, :, None], (R, B // along, along)), (R, B))
    if P.square:
        tall = tl.max(tl.reshape(bits, (R // rows, rows, B)), 1)
        bits = tl.reshape(tl.broadcast_to(tall[:, None, :], (R // rows, rows, B)), (R, B))
    return as_float(bits)


@triton.jit
def encode_scale(amax, P: tl.constexpr):
    """The FP32 scale above E4M3 block scales that x is multiplied by; 1 where there is none to have."""
    scale = tl.minimum(tl.div_rn(P.largest, amax), FLOAT32_MAX)
    usable = (amax > 0) & (scale > 0)
    return tl.where(usable, scale, 1.0)


@triton.jit
def scale_above(amax, P: tl.constexpr):
    """The FP32 scale that a value is multiplied by in the end: amax / largest; 1 where all is zero."""
    if P.scale == "e4m3":
        return tl.where(amax == 0, 1.0, tl.div_rn(amax, P.largest))
    elif P.scale == "none":
        scale = tl.where(amax == 0, 1.0, tl.div_rn(amax, P.largest))
        return tl.maximum(scale, FLOAT32_TINY, propagate_nan=ALL)
    elif P.scale == "e8m0":
        return tl.where(amax == amax, P.headroom, P.headroom)
    else:
        return tl.where(amax == amax, 1.0, 1.0)


@triton.jit
def _error(v, wanted, inverse, scale, first, P: tl.constexpr, rows: tl.constexpr):
    """How far [R, B] blocks are from `wanted` (v times the FP32 scale) if their scale is `scale`.

    Absolute or squared differences, summed in the reference's order: halves of 16, or in square blocks after
    rounding to a fixed point that depends on the `first` candidate, where every order is exact.
    """
    G: tl.constexpr = P.grid
    R: tl.constexpr = v.shape[0]
    B: tl.constexpr = v.shape[1]
    v = v * inverse[:, :, None]
    sum, magic = round_magnitude(tl.minimum(tl.abs(v), G.max), v, False, G)
    difference = with_sign((sum - magic) * scale[:, :, None], v) - wanted
    term = tl.abs(difference) if P.absolute_error else difference * difference
    if P.square:
        power = tl.maximum(power_of_two(first), 0.001953125)
        fixed = 4096.0 * (power if P.absolute_error else power * power)[:, :, None]
        tall = tl.sum(tl.reshape(sum16((term + fixed) - fixed), (R // rows, rows, B)), 1)
        return tl.reshape(tl.broadcast_to(tall[:, None, :], (R // rows, rows, B)), (R, B))
    else:
        return sum16(term)


@triton.jit
def inverse_of(scale, down):
    """What elements are multiplied by: 1 / (scale · down), finite unless the scale is NaN."""
    return tl.where(scale == scale, tl.minimum(tl.div_rn(1.0, scale * down), FLOAT32_MAX), scale)


@triton.jit
def e4m3_scales(v, amax, P: tl.constexpr, rows: tl.constexpr):
    """E4M3 block scales under the tensor's or the rows' amax."""
    E4M3: tl.constexpr = P.scale_grid
    up = encode_scale(amax, P)
    down = tl.div_rn(1.0, up)
    share = up * P.element_share
    if P.per_row:
        up, share, down = up[:, None], share[:, None], down[:, None]
    ideal = over_block(largest16(v), P, rows) * share
    scale, code = round_positive(ideal, E4M3)
    inverse = inverse_of(scale, down)
    if P.rule != "amax":
        wanted = v * (up if up.shape == () else up[:, :, None])
        first, first_code = scale, code
        least = _error(v, wanted, inverse, scale, first, P, rows)
        for i in tl.static_range(len(P.offsets)):
            if P.rule == "best":
                other_code = tl.minimum(tl.maximum(first_code + P.offsets[i], 1), 126)
                other = decode(other_code, E4M3)
            else:
                other, other_code = round_positive(ideal * P.offsets[i], E4M3)
            other_inverse = inverse_of(other, down)
            error = _error(v, wanted, other_inverse, other, first, P, rows)
            better = error < least
            least = tl.where(better, error, least)
            scale = tl.where(better, other, scale)
            inverse = tl.where(better, other_inverse, inverse)
            code = tl.where(better, other_code, code)
    return inverse, scale, code


@triton.jit
def e8m0_scales(v, P: tl.constexpr, rows: tl.constexpr):
    """Powers of two for block scales, as bytes of exponent."""
    bits = as_int(over_block(largest16(v), P, rows))
    finite = bits < 0x7F800000
    byte = tl.maximum((bits + P.carry >> 23) - P.largest_exponent, 0)
    nan = tl.full(bits.shape, float("nan"), tl.float32)
    scale = tl.where(finite, as_float(tl.where(byte == 0, 0x00400000, byte << 23)), nan)
    inverse = tl.where(finite, as_float(254 - byte << 23) * P.shrink, nan)
    return inverse, scale, tl.where(finite, byte, 255)


@triton.jit
def block_scales(v, amax, P: tl.constexpr, rows: tl.constexpr):
    """Tile [R, B, 16] -> (inverse, scale, code) [R, B]: what elements are multiplied by, the block scale, its byte.

    amax: FP32 scalar, or [R] if the plan is per row. rows: of a square block.
    """
    if P.scale == "none":
        inverse = tl.div_rn(1.0, scale_above(amax, P))
        if P.per_row:
            inverse = inverse[:, None]
        zero = tl.zeros((v.shape[0], v.shape[1]), tl.float32)
        return zero + inverse, zero + 1.0, zero
    elif P.scale == "float32":
        largest = over_block(largest16(v), P, rows)
        scale = tl.where(largest == 0, 1.0, tl.div_rn(largest, P.element_room))
        scale = tl.maximum(scale, FLOAT32_TINY, propagate_nan=ALL)
        return tl.div_rn(1.0, scale), scale, scale
    elif P.scale == "e8m0":
        return e8m0_scales(v, P, rows)
    else:
        return e4m3_scales(v, amax, P, rows)
