"""FP32 to packed codes by conversion instructions: `cvt` of the PTX ISA, to E4M3 from sm_89, to E2M1 on sm_100, sm_120.

To E4M3 `cvt.rn` is IEEE's rounding, saturating; what casts give it is an E4M3 value already, or rounded as torch would.

To E2M1, to nearest, `cvt.rn` gives the reference's codes bit for bit: ties to even, saturation at 6, NaN as 7.

`cvt.rs` (sm_100 and sm_103) rounds stochastically by the same hashed words, a word for four elements, but not to the
same bits: it adds 16 of them, which two neighbours share, to what it cuts off. By the document values of the grid
stay and the mean is right to 2**-16 of a step; how far two neighbours depend on each other it does not say. Hence it
is opt-in, see launch.py.

Those of E2M1 are compiled and checked against a model of the instructions, not run on hardware.
"""

import triton
import triton.language as tl

from .numerics import INTERPRETED, as_int, element_codes

# What a launch may use. Each includes the ones before it.
NONE, TO_NEAREST, STOCHASTIC = range(3)

# Eight values, $1 to $8, make a word, the first in its low bits; `cvt` puts the first of its sources on top.
CVT_RN = tl.constexpr("""{
.reg .b8 code<4>;
cvt.rn.satfinite.e2m1x2.f32 code0, $2, $1;
cvt.rn.satfinite.e2m1x2.f32 code1, $4, $3;
cvt.rn.satfinite.e2m1x2.f32 code2, $6, $5;
cvt.rn.satfinite.e2m1x2.f32 code3, $8, $7;
mov.b32 $0, {code0, code1, code2, code3};
}""")
# Four values make a word.
CVT_E4M3 = tl.constexpr("""{
.reg .b16 pair<2>;
cvt.rn.satfinite.e4m3x2.f32 pair0, $2, $1;
cvt.rn.satfinite.e4m3x2.f32 pair1, $4, $3;
mov.b32 $0, {pair0, pair1};
}""")
# Of two pairs of FP16, $1 and $2: times 2^14, their bias, times a block scale $3.
CVT_PAIRS_E4M3 = tl.constexpr("""{
.reg .b32 bias, a<2>;
.reg .b16 pair<2>;
mov.b32 bias, 0x74007400;
mul.rn.f16x2 a0, $1, bias;
mul.rn.f16x2 a1, $2, bias;
mul.rn.f16x2 a0, a0, $3;
mul.rn.f16x2 a1, a1, $3;
cvt.rn.satfinite.e4m3x2.f16x2 pair0, a0;
cvt.rn.satfinite.e4m3x2.f16x2 pair1, a1;
mov.b32 $0, {pair0, pair1};
}""")
# $9 are random bits for the first four, $10 for the others.
CVT_RS = tl.constexpr("""{
.reg .b16 code<2>;
cvt.rs.satfinite.e2m1x4.f32 code0, {$4, $3, $2, $1}, $9;
cvt.rs.satfinite.e2m1x4.f32 code1, {$8, $7, $6, $5}, $10;
mov.b32 $0, {code0, code1};
}""")


@triton.jit
def pack(code, BITS: tl.constexpr):
    """int32 codes [R, B, 16] -> words of 32 bits [R, B, 2 or 4], the even column low."""
    R: tl.constexpr = code.shape[0]
    B: tl.constexpr = code.shape[1]
    EACH: tl.constexpr = 32 // BITS
    places = (tl.arange(0, EACH) * BITS)[None, None, None, :]
    return tl.sum(tl.reshape(code, (R, B, 16 // EACH, EACH)) << places, 3)


@triton.jit
def e4m3_words(v, E4M3: tl.constexpr):
    """FP32 [R, B, 16] -> int32 [R, B, 4], four E4M3 bytes a word; signs of zeros are kept. From sm_89 on."""
    R: tl.constexpr = v.shape[0]
    B: tl.constexpr = v.shape[1]
    if INTERPRETED:  # it runs no PTX
        code = element_codes(v, v, v, v, False, E4M3)
        return pack(tl.where(v == 0, (as_int(v) >> 24) & 0x80, code), 8)
    else:
        even, odd = tl.split(tl.reshape(v, (R, B, 4, 2, 2)))
        v0, v2 = tl.split(even)
        v1, v3 = tl.split(odd)
        return tl.inline_asm_elementwise(CVT_E4M3, "=r,f,f,f,f", (v0, v1, v2, v3), tl.int32, True, 1)


@triton.jit
def e4m3_words_of_pairs(pairs, scale):
    """E2M1 values of `stochastic_pairs` [R, B, 8], times FP32 block scales [R, B] -> E4M3 bytes, int32 [R, B, 4]."""
    R: tl.constexpr = pairs.shape[0]
    B: tl.constexpr = pairs.shape[1]
    first, second = tl.split(tl.reshape(pairs, (R, B, 4, 2)))
    twice = (scale.to(tl.float16).to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF) * 0x00010001
    arguments = (first, second, tl.broadcast_to(twice[:, :, None], (R, B, 4)))
    return tl.inline_asm_elementwise(CVT_PAIRS_E4M3, "=r,r,r,r", arguments, tl.int32, True, 1)


@triton.jit
def e2m1_words(v, random, STOCHASTIC: tl.constexpr):
    """FP32 [R, B, 16] -> int32 [R, B, 2], eight codes a word. random: uint32 [R, B, 4], a word for each four values."""
    R: tl.constexpr = v.shape[0]
    B: tl.constexpr = v.shape[1]
    # The instructions keep the sign of -0.0, whose code is 0 here: 0.0 added to it is 0.0, and nothing else changes.
    even, odd = tl.split(tl.reshape(v + 0.0, (R, B, 2, 2, 2, 2)))
    even_0, even_1 = tl.split(even)
    odd_0, odd_1 = tl.split(odd)
    v0, v4 = tl.split(even_0)
    v1, v5 = tl.split(odd_0)
    v2, v6 = tl.split(even_1)
    v3, v7 = tl.split(odd_1)
    eight = (v0, v1, v2, v3, v4, v5, v6, v7)
    if STOCHASTIC:
        low, high = tl.split(tl.reshape(random, (R, B, 2, 2)))
        return tl.inline_asm_elementwise(CVT_RS, "=r,f,f,f,f,f,f,f,f,r,r", eight + (low, high), tl.int32, True, 1)
    else:
        return tl.inline_asm_elementwise(CVT_RN, "=r,f,f,f,f,f,f,f,f", eight, tl.int32, True, 1)
