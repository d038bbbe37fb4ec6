"""The block scales of a cast inside a Triton kernel, on tiles [R, B, 16] of numerics.py, and how they are chosen.

Equal to hf_nvfp4/reference.py bit for bit, as numerics.py is and by the same means.
"""

import triton
import triton.language as tl

from .numerics import (
    ALL,
    FLOAT32_MAX,
    FLOAT32_TINY,
    INTERPRETED,
    as_float,
    as_int,
    decode,
    element_values,
    half_pairs,
    largest16,
    power_of_two,
    round_positive,
    sum16,
)

# ---------------------------------------------------------------------------- of a block, of the tensor

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


# ---------------------------------------------------------------------------- errors

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


# ---------------------------------------------------------------------------- choices

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
    elif P.eden:  # not zero: what this makes too large is corrected
        value, code = round_positive(v, E4M3)
        return tl.maximum(value, 0.001953125, propagate_nan=ALL), code
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
