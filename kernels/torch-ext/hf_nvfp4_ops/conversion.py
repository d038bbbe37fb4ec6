"""FP32 to packed E2M1 codes by conversion instructions: `cvt` of the PTX ISA on sm_100 and sm_120.

To nearest, `cvt.rn` gives the reference's codes bit for bit: ties to even, saturation at 6, NaN as 7.

`cvt.rs` (sm_100 and sm_103) rounds stochastically by the same hashed words, a word for four elements, but not to the
same bits: it adds 16 of them, which two neighbours share, to what it cuts off. By the document values of the grid
stay and the mean is right to 2**-16 of a step; how far two neighbours depend on each other it does not say. Hence it
is opt-in, see launch.py.

Compiled and checked against a model of the instructions, not run on hardware.
"""

import triton
import triton.language as tl

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
# $9 are random bits for the first four, $10 for the others.
CVT_RS = tl.constexpr("""{
.reg .b16 code<2>;
cvt.rs.satfinite.e2m1x4.f32 code0, {$4, $3, $2, $1}, $9;
cvt.rs.satfinite.e2m1x4.f32 code1, {$8, $7, $6, $5}, $10;
mov.b32 $0, {code0, code1};
}""")


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
