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
def round_bf16_pairs(v):
    """`round_bf16` of [R, B, 16], two in one instruction; one by one they take a slow one."""
    if INTERPRETED:
        return round_bf16(v)
    else:
        R: tl.constexpr = v.shape[0]
        B: tl.constexpr = v.shape[1]
        even, odd = tl.split(tl.reshape(v, (R, B, 8, 2)))
        both = tl.inline_asm_elementwise("cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,f,f", (even, odd), tl.int32, True, 1)
        return tl.reshape(tl.join(as_float(both << 16), as_float(both & -65536)), (R, B, 16))


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
def fold(h):
    """The halves of h · 0x9E3779B1, 64 bits, one over the other: the reference's `_fold`."""
    return h * 0x9E3779B1 ^ tl.umulhi(h, tl.full(h.shape, 0x9E3779B1, tl.uint32))


@triton.jit
def random_words(rows, groups, seed_ptr):
    """uint32 [R, B, 4]: 32 random bits for each four elements of [R, B, 16]."""
    words = groups[:, None] * 4 + tl.arange(0, 4)[None, :]
    by_row = mix((rows ^ tl.load(seed_ptr)).to(tl.uint32, bitcast=True))
    by_word = mix((~words ^ tl.load(seed_ptr + 1)).to(tl.uint32, bitcast=True))
    return fold(by_row[:, None, None] ^ by_word[None, :, :])


@triton.jit
def random_bytes(rows, columns, seed_ptr):
    """int32 [R, B]: the reference's random byte of each (row, column)."""
    by_row = mix((rows ^ tl.load(seed_ptr)).to(tl.uint32, bitcast=True))
    by_word = mix((~(columns >> 2) ^ tl.load(seed_ptr + 1)).to(tl.uint32, bitcast=True))
    place = ((columns & 1) * 16 + (columns >> 1 & 1) * 8).to(tl.uint32)
    return ((fold(by_row[:, None] ^ by_word[None, :]) >> place[None, :]) & 0xFF).to(tl.int32)


@triton.jit
def draws16(word, G: tl.constexpr):
    """int32 [R, B, 8]: what to add to pairs of FP16 before the cut, from words [R, B, 4]: bytes 0, 2 and bytes 1, 3."""
    R: tl.constexpr = word.shape[0]
    B: tl.constexpr = word.shape[1]
    places: tl.constexpr = 0x00FF00FF << G.cut - 8
    both = tl.join((word << G.cut - 8) & places, (word >> 16 - G.cut) & places)
    half: tl.constexpr = 0x00010001 << G.cut - 9 if G.cut > 8 else 0
    return tl.reshape(both, (R, B, 8)).to(tl.int32, bitcast=True) + half


@triton.jit
def draws32(word, G: tl.constexpr):
    """int32 [R, B, 16]: the same for FP32, from words [R, B, 4]."""
    R: tl.constexpr = word.shape[0]
    B: tl.constexpr = word.shape[1]
    i = tl.arange(0, 4)
    places = ((i & 1) * 16 + (i >> 1) * 8).to(tl.uint32)[None, None, None, :]
    byte = ((word[:, :, :, None] >> places) & 0xFF) << G.cut - 8
    return tl.reshape(byte.to(tl.int32, bitcast=True), (R, B, 16)) + (1 << G.cut - 9)


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
def round_nearest(v, G: tl.constexpr):
    """|v| up to max -> (sum, magic): sum - magic is v rounded to the grid; if v >= 0, sum's low bits count steps."""
    magic = as_float(tl.maximum((as_int(v) & 0x7F800000) + G.magic, G.least_magic))
    return v + magic, magic


@triton.jit
def nearest_code(sum, G: tl.constexpr):
    """The code of what `round_nearest` rounded, v >= 0."""
    bits = as_int(sum)
    return (bits & G.mask) + (bits >> G.shift) - G.offset


@triton.jit
def round_positive(v, G: tl.constexpr):
    """v >= 0 rounded to nearest, saturating -> (value, code); NaN stays NaN."""
    sum, magic = round_nearest(tl.minimum(v, G.max), G)
    finite = v == v
    return tl.where(finite, sum - magic, v), tl.where(finite, nearest_code(sum, G), G.nan_code)


@triton.jit
def with_sign(value, v):
    """|value| with v's sign bit."""
    return as_float(as_int(value) | (as_int(v) & -2147483648))


@triton.jit
def half_pairs(v):
    """FP32 [R, B, 16] rounded to FP16 (ties to even), the bits of two neighbours a word: int32 [R, B, 8]."""
    R: tl.constexpr = v.shape[0]
    B: tl.constexpr = v.shape[1]
    even, odd = tl.split(tl.reshape(v, (R, B, 8, 2)))
    if INTERPRETED:  # it runs no PTX
        low = even.to(tl.float16).to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
        return low | odd.to(tl.float16).to(tl.int16, bitcast=True).to(tl.int32) << 16
    else:
        return tl.inline_asm_elementwise("cvt.rn.f16x2.f32 $0, $2, $1;", "=r,f,f", (even, odd), tl.int32, True, 1)


@triton.jit
def stochastic_pairs(v, rows, groups, seed_ptr, G: tl.constexpr):
    """[R, B, 16], |v| up to max, rounded stochastically: FP16 bits, times `lower`, two a word: int32 [R, B, 8]."""
    keep: tl.constexpr = (0xFFFF >> G.cut << G.cut) * 0x00010001 - (1 << 32)
    return half_pairs(v * G.lower) + draws16(random_words(rows, groups, seed_ptr), G) & keep


@triton.jit
def stochastic_bits(v, rows, groups, seed_ptr, G: tl.constexpr):
    """[R, B, 16], |v| up to max, rounded stochastically: bits of the wide format, times `lower`, one a word."""
    R: tl.constexpr = v.shape[0]
    B: tl.constexpr = v.shape[1]
    if G.wide == 16:
        pairs = stochastic_pairs(v, rows, groups, seed_ptr, G)
        return tl.reshape(tl.join(pairs & 0xFFFF, (pairs >> 16) & 0xFFFF), (R, B, 16))
    else:
        return as_int(v * G.lower) + draws32(random_words(rows, groups, seed_ptr), G) & -(1 << G.cut)


@triton.jit
def element_values(v, rows, groups, seed_ptr, STOCHASTIC: tl.constexpr, SATURATE: tl.constexpr, G: tl.constexpr):
    """[R, B, 16] rounded to the grid, in FP32. rows, groups: where, for the random bits of stochastic rounding.

    SATURATE: else |v| must round to max at most, or it becomes something above; and the sign of a zero is lost.
    """
    m = tl.minimum(tl.abs(v), G.max) if SATURATE else v
    if STOCHASTIC:
        bits = stochastic_bits(m, rows, groups, seed_ptr, G)
        if G.wide == 16:
            value = bits.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32) * (1 / G.lower)
        else:
            value = as_float(bits) * G.lift
    else:
        sum, magic = round_nearest(m, G)
        value = sum - magic
    if SATURATE:
        if G.bits == 8:
            value = tl.where(v == v, value, v)
        value = with_sign(value, v)
    return value


@triton.jit
def element_codes(v, rows, groups, seed_ptr, STOCHASTIC: tl.constexpr, G: tl.constexpr):
    """[R, B, 16] rounded to the grid and saturated, as codes with a sign bit, which is set where v < 0."""
    m = tl.minimum(tl.abs(v), G.max)
    if STOCHASTIC:
        code = stochastic_bits(m, rows, groups, seed_ptr, G) >> G.cut
    else:
        sum, _ = round_nearest(m, G)
        code = nearest_code(sum, G)
    code = tl.where(v < 0, code + (1 << G.bits - 1), code)
    if G.bits == 8:
        code = tl.where(v == v, code, G.nan_code)
    return code


@triton.jit
def decode(code, G: tl.constexpr):
    """int32 codes of a grid -> FP32."""
    value = as_float((code & (1 << G.bits - 1) - 1) << G.shift) * G.lift
    if G.bits == 8:
        value = tl.where((code & 0x7F) == G.nan_code, float("nan"), value)
    return as_float(as_int(value) | (code >> G.bits - 1) << 31)
