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
def random_words(rows, groups, seed_ptr):
    """uint32 [R, B, 4]: 32 random bits for each four elements of [R, B, 16]."""
    words = groups[:, None] * 4 + tl.arange(0, 4)[None, :]
    by_row = mix((rows ^ tl.load(seed_ptr)).to(tl.uint32, bitcast=True))
    by_word = mix((~words ^ tl.load(seed_ptr + 1)).to(tl.uint32, bitcast=True))
    h = by_row[:, None, None] ^ by_word[None, :, :]
    return h * 0x9E3779B1 ^ tl.umulhi(h, tl.full(h.shape, 0x9E3779B1, tl.uint32))


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
def _error(value, wanted, first, P: tl.constexpr, rows: tl.constexpr):
    """How far each [R, B] block of values is from `wanted` (x times the FP32 scale).

    Absolute or squared differences, summed in the reference's order: halves of 16, or in square blocks after
    rounding to a fixed point that depends on the `first` candidate, where every order is exact.
    """
    R: tl.constexpr = value.shape[0]
    B: tl.constexpr = value.shape[1]
    difference = value - wanted
    term = tl.abs(difference) if P.absolute_error else difference * difference
    if P.square:
        power = tl.maximum(power_of_two(first), 0.001953125)
        fixed = 4096.0 * (power if P.absolute_error else power * power)[:, :, None]
        tall = tl.sum(tl.reshape(sum16((term + fixed) - fixed), (R // rows, rows, B)), 1)
        return tl.reshape(tl.broadcast_to(tall[:, None, :], (R // rows, rows, B)), (R, B))
    else:
        return sum16(term)


# Of eight pairs of FP16 that are E2M1's exponents: what they are above the nearest elements, times 2^14, squared and
# summed up.
HALF_ERROR = tl.constexpr(
    "{\n.reg .b32 r, d, lift, sum;\nmov.b32 lift, 0x74007400;\nmov.b32 sum, 0;\n"
    + "".join(
        f"add.u32 r, ${i}, 0x01000100;\nand.b32 r, r, 0xFE00FE00;\nsub.rn.f16x2 d, ${i}, r;\n"
        "mul.rn.f16x2 d, d, lift;\nmul.rn.f16x2 d, d, d;\nadd.rn.f16x2 sum, sum, d;\n"
        for i in range(1, 9)
    )
    + "mov.b32 $0, sum;\n}"
)


@triton.jit
def _half(bits):
    """The FP16 number in the lower half of a word, in FP32."""
    return bits.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def half_error(v, scale, inverse):
    """Squared errors of 1×16 blocks [R, B] under a scale, in FP16: the reference's `_half_error`."""
    R: tl.constexpr = v.shape[0]
    B: tl.constexpr = v.shape[1]
    pairs = half_pairs(v * (inverse * 0.00006103515625)[:, :, None])
    even, odd = tl.split(tl.reshape(pairs, (R, B, 2, 2, 2)))
    p04, p26 = tl.split(even)
    p15, p37 = tl.split(odd)
    p0, p4 = tl.split(p04)
    p1, p5 = tl.split(p15)
    p2, p6 = tl.split(p26)
    p3, p7 = tl.split(p37)
    eight = (p0, p1, p2, p3, p4, p5, p6, p7)
    if INTERPRETED:  # it runs no PTX
        low = tl.zeros((R, B), tl.float16)
        high = tl.zeros((R, B), tl.float16)
        for i in tl.static_range(8):
            nearest = (eight[i] + 0x01000100) & -0x01FF0200
            d = (_half(eight[i]) - _half(nearest)) * 16384.0
            low += (d * d).to(tl.float16)
            d = (_half(eight[i] >> 16) - _half(nearest >> 16)) * 16384.0
            high += (d * d).to(tl.float16)
        return (low.to(tl.float32) + high.to(tl.float32)) * (scale * scale)
    else:
        sum = tl.inline_asm_elementwise(HALF_ERROR, "=r" + ",r" * 8, eight, tl.int32, True, 1)
        return (_half(sum) + _half(sum >> 16)) * (scale * scale)


@triton.jit
def inverse_of(scale, down):
    """What elements are multiplied by: 1 / (scale · down), finite unless the scale is NaN."""
    return tl.where(scale == scale, tl.minimum(tl.div_rn(1.0, scale * down), FLOAT32_MAX), scale)


@triton.jit
def round_fp8_exact(v, UP: tl.constexpr):
    """v >= 0 rounded to {1, 1.25, 1.5}·2^e in 2^-6 ... 64 -> (value, its E4M3 code); NaN stays NaN.

    UP: to the next one above; else by the bounds 1.125, 1.40625 and 1.734375.
    """
    bits = as_int(v)
    mantissa = bits & 0x7FFFFF
    if UP:
        chosen = tl.where(mantissa > 0x400000, 0x800000, tl.where(mantissa > 0x200000, 0x400000, 0x200000))
        chosen = tl.where(mantissa > 0, chosen, 0)
    else:
        chosen = tl.where(mantissa > 0x5E0000, 0x800000, tl.where(mantissa > 0x340000, 0x400000, 0x200000))
        chosen = tl.where(mantissa > 0x100000, chosen, 0)
    bits = tl.minimum(tl.maximum((bits & 0x7F800000) + chosen, 121 << 23), 133 << 23)
    finite = v == v
    return tl.where(finite, as_float(bits), v), tl.where(finite, (bits >> 20) - 960, 0x7F)


@triton.jit
def round_scale(v, P: tl.constexpr):
    """An ideal block scale >= 0 -> (the E4M3 scale that the plan's rule stores, its code)."""
    E4M3: tl.constexpr = P.scale_grid
    if P.rule == "fp8_exact":
        return round_fp8_exact(v, P.stochastic)
    else:
        return round_positive(v, E4M3)


@triton.jit
def _try_scale(v, wanted, scale, inverse, first, SATURATE: tl.constexpr, P: tl.constexpr, rows: tl.constexpr):
    """How far blocks [R, B] are from `wanted` (x times the FP32 scale) under a block scale, and, if P.tries, what of
    them is left: element × scale."""
    G: tl.constexpr = P.grid
    if P.tries:
        value = element_values(v * inverse[:, :, None], scale, scale, scale, False, SATURATE, G) * scale[:, :, None]
        return _error(value, wanted, first, P, rows), value
    else:
        return half_error(v, scale, inverse), v


@triton.jit
def e4m3_scales(v, amax, SATURATE: tl.constexpr, P: tl.constexpr, rows: tl.constexpr):
    """E4M3 block scales under the tensor's or the rows' amax."""
    E4M3: tl.constexpr = P.scale_grid
    up = encode_scale(amax, P)
    down = tl.div_rn(1.0, up)
    share = up * P.element_share
    if P.per_row:
        up, share, down = up[:, None], share[:, None], down[:, None]
    ideal = over_block(largest16(v), P, rows) * share
    scale, code = round_scale(ideal, P)
    inverse = inverse_of(scale, down)
    value = v
    if len(P.offsets) > 0:
        wanted = v * (up if up.shape == () else up[:, :, None])
        first, first_code = scale, code
        least, value = _try_scale(v, wanted, scale, inverse, first, SATURATE, P, rows)
        for i in tl.static_range(len(P.offsets)):
            if P.rule == "best":
                other_code = tl.minimum(tl.maximum(first_code + P.offsets[i], 1), 126)
                other = decode(other_code, E4M3)
            else:
                other, other_code = round_scale(ideal * P.offsets[i], P)
            other_inverse = inverse_of(other, down)
            error, other_value = _try_scale(v, wanted, other, other_inverse, first, SATURATE, P, rows)
            better = error < least
            least = tl.where(better, error, least)
            if P.tries:
                value = tl.where(better[:, :, None], other_value, value)
            scale = tl.where(better, other, scale)
            inverse = tl.where(better, other_inverse, inverse)
            code = tl.where(better, other_code, code)
    return inverse, scale, code, value


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
def block_scales(v, amax, SATURATE: tl.constexpr, P: tl.constexpr, rows: tl.constexpr):
    """Tile [R, B, 16] -> (inverse, scale, code) [R, B]: what elements are multiplied by, the block scale, its byte.

    Last, element × scale [R, B, 16] where the plan's rule tries several scales (P.tries); else v.
    amax: FP32 scalar, or [R] if the plan is per row. rows: of a square block. SATURATE: see `element_values`.
    """
    if P.scale == "e4m3":
        return e4m3_scales(v, amax, SATURATE, P, rows)
    elif P.scale == "none":
        inverse = tl.div_rn(1.0, scale_above(amax, P))
        if P.per_row:
            inverse = inverse[:, None]
        zero = tl.zeros((v.shape[0], v.shape[1]), tl.float32)
        return zero + inverse, zero + 1.0, zero, v
    elif P.scale == "float32":
        largest = over_block(largest16(v), P, rows)
        scale = tl.where(largest == 0, 1.0, tl.div_rn(largest, P.element_room))
        scale = tl.maximum(scale, FLOAT32_TINY, propagate_nan=ALL)
        return tl.div_rn(1.0, scale), scale, scale, v
    else:
        inverse, scale, code = e8m0_scales(v, P, rows)
        return inverse, scale, code, v
