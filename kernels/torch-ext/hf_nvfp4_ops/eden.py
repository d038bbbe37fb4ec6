"""Rounding "eden" (MS-EDEN, arXiv 2601.22813) inside a Triton kernel: a block's scale corrected for what rounding lost.

Equal to hf_nvfp4/eden.py bit for bit, as numerics.py is and by the same means.
"""

import triton
import triton.language as tl

from .numerics import as_float, as_int, element_values, random_bytes, sum16


@triton.jit
def round_e4m3(scale, byte, G: tl.constexpr):
    """Scales >= 0 rounded stochastically to E4M3, saturating -> (value, code); NaN stays NaN."""
    draw = (byte << G.cut - 8) + (1 << G.cut - 9)
    bits = as_int(tl.minimum(scale, G.max) * G.lower) + draw & -(1 << G.cut)
    finite = scale == scale
    return tl.where(finite, as_float(bits) * G.lift, scale), tl.where(finite, bits >> G.cut, G.nan_code)


@triton.jit
def round_fp8_exact(scale, byte):
    """The same to {0} and {1, 1.25, 1.5}·2^e in 2^-6 ... 64, as E4M3; inf, in no finite tensor, stays inf."""
    bits = as_int(scale)
    odd = 2 * byte + 1  # of 512 parts of a step, which is a quarter of the power of two, or half of it from 1.5 on
    wide = (bits & 0x400000) != 0
    up = bits + tl.where(wide, odd << 13, odd << 12) & tl.where(wide, -0x400000, -0x200000)
    from_zero = tl.where(scale + odd.to(tl.float32) * 0.000030517578125 >= 0.015625, 121 << 23, 0)
    rounded = tl.minimum(tl.where(scale < 0.015625, from_zero, up), 133 << 23)
    finite = (bits & 0x7FFFFFFF) < 0x7F800000
    code = tl.where(finite, tl.maximum((rounded >> 20) - 960, 0), 0x7F)
    return tl.where(finite, as_float(rounded), scale), code


@triton.jit
def corrected(v, scale, rows, groups, seed_ptr, SATURATE: tl.constexpr, P: tl.constexpr):
    """Tile [R, B, 16] over its scales [R, B] -> (scale · <v, v> / <v, q>, rounded stochastically, its E4M3 code).

    q is v rounded to nearest. A byte is drawn for each (row, block). A block of which nothing is left has the scale 0.
    """
    G: tl.constexpr = P.grid
    E4M3: tl.constexpr = P.scale_grid
    left = sum16(v * element_values(v, rows, groups, seed_ptr, False, SATURATE, G))
    factor = tl.where(left == 0, 0.0, tl.div_rn(sum16(v * v), left))
    byte = random_bytes(rows, groups, seed_ptr)
    if P.rule == "fp8_exact":
        return round_fp8_exact(factor * scale, byte)
    else:
        return round_e4m3(factor * scale, byte, E4M3)
