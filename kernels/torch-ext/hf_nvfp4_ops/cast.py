"""Triton kernels: the amax of a tensor, the cast of a tile in both orientations, and its inverse.

What the arithmetic is, numerics.py and scales.py know; here are addresses, tiles and what is written. One read of
x [M, K] serves both orientations: `row` has its blocks along K, `col` quantizes xᵀ, with blocks along M and the
Hadamard transform before it. Threads hold 16 neighbours along the contraction dimension, so that nothing but what is
written passes through shared memory; transposes come before narrow casts.
"""

import triton
import triton.language as tl

from .conversion import e2m1_words, e4m3_words, e4m3_words_of_pairs, pack
from .eden import corrected
from .numerics import (
    INTERPRETED,
    as_float,
    as_int,
    element_codes,
    element_values,
    largest16,
    random_words,
    rotate,
    round_bf16,
    round_bf16_pairs,
    stochastic_pairs,
    swizzled_at,
    to_bf16,
    to_fp32,
)
from .scales import block_scales, scale_above

# ---------------------------------------------------------------------------- tiles from memory and back


@triton.jit
def _load(ptr, inside, EVEN: tl.constexpr):
    return tl.load(ptr) if EVEN else tl.load(ptr, mask=inside, other=0.0)


@triton.jit
def _store(ptr, v, inside, EVEN: tl.constexpr):
    if EVEN:
        tl.store(ptr, v)
    else:
        tl.store(ptr, v, mask=inside)


@triton.jit
def _load_rows(ptr, rows, groups, stride, M, K, EVEN: tl.constexpr):
    """x[rows, 16 · groups + 0..15] as [R, B, 16] in FP32; zeros outside, of which there is none if EVEN."""
    R: tl.constexpr = rows.shape[0]
    B: tl.constexpr = groups.shape[0]
    # Groups first: of two dimensions that are not contiguous Triton lets neighbouring threads run along the first.
    at = groups[:, None, None] * 16 + rows[None, :, None].to(tl.int64) * stride + tl.arange(0, 8)[None, None, :]
    inside = (groups < K // 16)[:, None, None] & (rows < M)[None, :, None]
    both = tl.join(_load(ptr + at, inside, EVEN), _load(ptr + at + 8, inside, EVEN))
    return to_fp32(tl.reshape(tl.permute(both, (1, 0, 3, 2)), (R, B, 16)))


@triton.jit
def _load_columns(ptr, columns, groups, stride, M, K, EVEN: tl.constexpr):
    """xᵀ[columns, 16 · groups + 0..15] as [R, B, 16] in FP32; zeros outside, of which there is none if EVEN."""
    R: tl.constexpr = columns.shape[0]
    B: tl.constexpr = groups.shape[0]
    at = ptr + columns[:, None] + (groups * 16)[None, :].to(tl.int64) * stride
    sixteen = ()
    for i in tl.static_range(16):
        inside = (columns < K)[:, None] & (groups * 16 + i < M)[None, :]
        sixteen = sixteen + (_load(at, inside, EVEN),)
        at += stride
    eight = ()
    for i in tl.static_range(8):
        eight = eight + (tl.join(sixteen[i], sixteen[i + 8]),)
    four = ()
    for i in tl.static_range(4):
        four = four + (tl.join(eight[i], eight[i + 4]),)
    both = tl.join(tl.join(four[0], four[2]), tl.join(four[1], four[3]))
    return to_fp32(tl.reshape(both, (R, B, 16)))


@triton.jit
def _store_rows(ptr, v, rows, groups, M, K, EVEN: tl.constexpr):
    """Inverse of `_load_rows`, to a contiguous BF16 [M, K]."""
    at = groups[:, None, None] * 16 + rows[None, :, None].to(tl.int64) * K + tl.arange(0, 16)[None, None, :]
    inside = (groups < K // 16)[:, None, None] & (rows < M)[None, :, None]
    # Whole: Triton exchanges halves between threads first. Half sectors written apart cost twice the time.
    _store(ptr + at, tl.permute(to_bf16(v), (1, 0, 2)), inside, EVEN)


@triton.jit
def _store_columns(ptr, v, columns, groups, M, K, EVEN: tl.constexpr):
    """Inverse of `_load_columns`, to a contiguous BF16 [M, K], M a multiple of 16."""
    R: tl.constexpr = columns.shape[0]
    B: tl.constexpr = groups.shape[0]
    even, odd = tl.split(tl.reshape(to_bf16(v), (R, B, 2, 2, 2, 2)))
    even_low, even_high = tl.split(even)
    odd_low, odd_high = tl.split(odd)
    four = (even_low, odd_low, even_high, odd_high)
    eight = ()
    for half in tl.static_range(2):
        for i in tl.static_range(4):
            eight = eight + (tl.split(four[i])[half],)
    inside = (columns < K)[:, None] & (groups < M // 16)[None, :]
    at = ptr + columns[:, None] + (groups * 16)[None, :].to(tl.int64) * K
    for half in tl.static_range(2):
        for i in tl.static_range(8):
            _store(at, tl.split(eight[i])[half], inside, EVEN)
            at += K


@triton.jit
def words_at(rows, groups, M, K, WORDS: tl.constexpr, ACROSS: tl.constexpr):
    """Where the 32-bit words [R, B, WORDS] of packed codes of an operand [M, K] are."""
    if ACROSS:
        block = rows[:, None] + groups[None, :].to(tl.int64) * M
    else:
        block = rows[:, None].to(tl.int64) * (K // 16) + groups[None, :]
    return (block * WORDS)[:, :, None] + tl.arange(0, WORDS)[None, None, :]


@triton.jit
def scales_at(rows, groups, M, K, BLOCK: tl.constexpr, ACROSS: tl.constexpr):
    """Where the scales of 16 elements each of an operand [M, K] are, [R, B]."""
    block = groups // (BLOCK // 16)
    if ACROSS:
        return rows[:, None] + block[None, :].to(tl.int64) * M
    else:
        return rows[:, None].to(tl.int64) * tl.cdiv(K, BLOCK) + block[None, :]


@triton.jit
def _store_codes(ptr, words, rows, groups, M, K, OUT: tl.constexpr, EVEN: tl.constexpr):
    """The words of packed codes of 16 elements each, [R, B, 2 or 4]."""
    at = words_at(rows, groups, M, K, words.shape[2], OUT == 4)
    inside = (rows < M)[:, None, None] & (groups < K // 16)[None, :, None]
    if OUT == 4:
        _store(ptr + at, words, inside, EVEN)
    else:  # groups first, as in `_load_rows`
        _store(ptr + tl.permute(at, (1, 0, 2)), tl.permute(words, (1, 0, 2)), tl.permute(inside, (1, 0, 2)), EVEN)


@triton.jit
def _store_scales(ptr, code, rows, groups, M, K, BLOCK: tl.constexpr, OUT: tl.constexpr):
    """One scale for each block of [R, B]."""
    along: tl.constexpr = BLOCK // 16
    across = tl.cdiv(K, BLOCK)
    first = (groups % along == 0) & (groups // along < across)
    if OUT == 3:
        at = swizzled_at(rows, groups // along, tl.cdiv(across, 4))
    else:
        at = scales_at(rows, groups, M, K, BLOCK, OUT == 4)
    tl.store(ptr + at, code.to(ptr.dtype.element_ty), mask=(rows < M)[:, None] & first[None, :])


# ---------------------------------------------------------------------------- amax


@triton.jit
def _prepared(v, P: tl.constexpr):
    """The Hadamard transform of a tile, rounded to BF16, if the plan has one."""
    if P.hadamard:
        v = round_bf16_pairs(rotate(v, P.hadamard) * P.hadamard_factor)
    return v


@triton.jit
def _tile_largest(x_ptr, row_largest, col_largest, first_row, first_column, M, K, stride,
                  ROW: tl.constexpr, COL: tl.constexpr, EVEN: tl.constexpr,
                  R: tl.constexpr, B: tl.constexpr, RC: tl.constexpr, BC: tl.constexpr):  # fmt: skip
    """The bits of the largest magnitudes so far, [R, B] and [RC, BC], with those of one more tile."""
    if ROW.on:
        rows = first_row + tl.arange(0, R)
        groups = first_column // 16 + tl.arange(0, B)
        largest = largest16(_load_rows(x_ptr, rows, groups, stride, M, K, EVEN))
        row_largest = tl.maximum(row_largest, as_int(largest))
    if COL.on:
        columns = first_column + tl.arange(0, RC)
        groups = first_row // 16 + tl.arange(0, BC)
        v = _load_columns(x_ptr, columns, groups, stride, M, K, EVEN)
        if COL.hadamard:
            v = rotate(v, COL.hadamard)
        col_largest = tl.maximum(col_largest, as_int(largest16(v)))
    return row_largest, col_largest


@triton.jit
def _write_largest(out_ptr, row_largest, col_largest, ROW: tl.constexpr, COL: tl.constexpr):
    if ROW.on:
        tl.atomic_max(out_ptr, tl.max(row_largest), sem="relaxed")
    if COL.on:
        largest = as_float(tl.max(col_largest))
        if COL.hadamard:  # rounding keeps the order, so the largest is rounded alone
            largest = round_bf16(largest * COL.hadamard_factor)
        tl.atomic_max(out_ptr + 1, as_int(largest), sem="relaxed")


@triton.jit
def amax_kernel(x_ptr, out_ptr, groups_ptr, M, K, stride, unit,
                ROW: tl.constexpr, COL: tl.constexpr, EVEN: tl.constexpr, GROUPS: tl.constexpr,
                R: tl.constexpr, B: tl.constexpr, RC: tl.constexpr, BC: tl.constexpr):  # fmt: skip
    """out: int32 [2], zeros before: bits of the largest magnitude of x, and of the rotated xᵀ.

    GROUPS: not 0: out is [GROUPS, 2]; groups_ptr has the group of each `unit` rows, -1 for those not to be looked at.
    """
    across = tl.cdiv(K, B * 16)
    tiles = tl.cdiv(M, R) * across
    row_largest = tl.zeros((R, B), tl.int32)
    col_largest = tl.zeros((RC, BC), tl.int32)
    if GROUPS:  # neighbours, so that the group changes seldom
        each = tl.cdiv(tiles, tl.num_programs(0))
        group = -1
        for tile in range(tl.program_id(0) * each, tl.minimum(tiles, tl.program_id(0) * each + each)):
            first_row = tile // across * R
            next_group = tl.load(groups_ptr + first_row // unit)
            if next_group != group:
                if group >= 0:
                    _write_largest(out_ptr + 2 * group, row_largest, col_largest, ROW, COL)
                row_largest = tl.zeros((R, B), tl.int32)
                col_largest = tl.zeros((RC, BC), tl.int32)
            group = next_group
            if group >= 0:
                row_largest, col_largest = _tile_largest(
                    x_ptr, row_largest, col_largest, first_row, tile % across * B * 16, M, K, stride,
                    ROW, COL, EVEN, R, B, RC, BC,
                )  # fmt: skip
        if group >= 0:
            _write_largest(out_ptr + 2 * group, row_largest, col_largest, ROW, COL)
    else:
        for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
            row_largest, col_largest = _tile_largest(
                x_ptr, row_largest, col_largest, tile // across * R, tile % across * B * 16, M, K, stride,
                ROW, COL, EVEN, R, B, RC, BC,
            )  # fmt: skip
        _write_largest(out_ptr, row_largest, col_largest, ROW, COL)


# ---------------------------------------------------------------------------- cast


@triton.jit
def _cast_tile(v, rows, groups, amax, seed_ptr, codes_ptr, scales_ptr, M, K,
               P: tl.constexpr, OUT: tl.constexpr, TRANSPOSED: tl.constexpr, EVEN: tl.constexpr,
               HARDWARE: tl.constexpr):  # fmt: skip
    """Quantize a tile [R, B, 16] of an operand [M, K] and write it.

    TRANSPOSED: values go to [K, M], the layout that x has; all else has the operand's.
    """
    G: tl.constexpr = P.grid
    PACKED: tl.constexpr = OUT > 1 and OUT < 5
    # Levels of conversion.py: 1 is enough to round to nearest, stochastically it takes 2.
    BY_INSTRUCTION: tl.constexpr = G.bits == 4 and PACKED and HARDWARE > P.stochastic
    tall: tl.constexpr = P.block if P.square else 1
    # What FP8 bytes hold fits by the rule, or is saturated when converted.
    SATURATE: tl.constexpr = OUT != 5 or P.rule != "fp8_exact"
    inverse, scale, scale_code, value = block_scales(v, amax, SATURATE, P, tall)
    if P.eden:
        scale, scale_code = corrected(v * inverse[:, :, None], scale, rows, groups, seed_ptr, SATURATE, P)
    if BY_INSTRUCTION:
        random = random_words(rows, groups, seed_ptr) if P.stochastic else v
        words = e2m1_words(v * inverse[:, :, None], random, P.stochastic)
        _store_codes(codes_ptr, words, rows, groups, M, K, OUT, EVEN)
    elif PACKED:
        code = element_codes(v * inverse[:, :, None], rows, groups, seed_ptr, P.stochastic, G)
        _store_codes(codes_ptr, pack(code, G.bits), rows, groups, M, K, OUT, EVEN)
    elif OUT == 5 and P.stochastic and not SATURATE and not INTERPRETED:
        pairs = stochastic_pairs(v * inverse[:, :, None], rows, groups, seed_ptr, G)
        _store_codes(codes_ptr, e4m3_words_of_pairs(pairs, scale), rows, groups, M, K, OUT, EVEN)
    else:
        if not P.tries or P.eden:  # which corrected the scale that was chosen
            value = element_values(v * inverse[:, :, None], rows, groups, seed_ptr, P.stochastic, SATURATE, G)
            if P.scale != "none":
                value = value * scale[:, :, None]
        if OUT == 5:
            E4M3: tl.constexpr = P.scale_grid
            words = e4m3_words(value if P.value_factor == 1 else value * P.value_factor, E4M3)
            _store_codes(codes_ptr, words, rows, groups, M, K, OUT, EVEN)
        elif TRANSPOSED:
            _store_columns(codes_ptr, value, rows, groups, K, M, EVEN)
        else:
            _store_rows(codes_ptr, value, rows, groups, M, K, EVEN)
    if PACKED and P.scale != "none":
        _store_scales(scales_ptr, scale_code, rows, groups, M, K, P.block, OUT)


@triton.jit
def _above(amax, P: tl.constexpr, OUT: tl.constexpr):
    """The FP32 scale above what is written."""
    scale = scale_above(amax, P)
    return scale / P.value_factor if OUT == 5 and P.value_factor != 1 else scale


@triton.jit
def cast_kernel(x_ptr, amax_ptr, row_seed_ptr, col_seed_ptr, groups_ptr,
                row_ptr, row_scales_ptr, row_scale_ptr, col_ptr, col_scales_ptr, col_scale_ptr,
                M, K, stride, M_PADDED, unit,
                ROW: tl.constexpr, ROW_OUT: tl.constexpr, COL: tl.constexpr, COL_OUT: tl.constexpr,
                EVEN: tl.constexpr, GROUPS: tl.constexpr,
                R: tl.constexpr, B: tl.constexpr, RC: tl.constexpr, BC: tl.constexpr,
                HARDWARE: tl.constexpr = 0):  # fmt: skip
    """One tile of x [M, K] (contiguous along K): R × 16·B of it by rows, and the same part by columns (RC × 16·BC).

    amax_ptr: FP32 [2], x's and the rotated xᵀ's; [1] if the latter is not needed; [M] if rows have their own.
    row_ptr: values BF16 [M, K], or codes or bytes; col_ptr: values BF16 [M_PADDED, K], or codes or bytes of
    [K, M_PADDED].
    row_scale_ptr, col_scale_ptr: the FP32 scale above them.
    GROUPS: not 0: amax is [GROUPS, 2] and the scales above are [GROUPS]; groups_ptr has the group of each `unit` rows,
    -1 for those not to be written. There are at least as many programs as groups.
    HARDWARE: which conversion instructions to use for E2M1 codes, see conversion.py.
    """
    across = tl.cdiv(K, B * 16)
    first_row, first_column = tl.program_id(0) // across * R, tl.program_id(0) % across * (B * 16)
    # Whose scales above a program writes, where there is one for all of a tensor or group.
    writer = tl.program_id(0) < (GROUPS if GROUPS else 1)
    amax_at = amax_ptr + 2 * tl.program_id(0)
    if ROW.on and not ROW.per_row and writer:
        tl.store(row_scale_ptr + tl.program_id(0), _above(tl.load(amax_at) * ROW.bound, ROW, ROW_OUT))
    if COL.on and writer:
        tl.store(col_scale_ptr + tl.program_id(0), _above(tl.load(amax_at + COL.amax_at) * COL.bound, COL, COL_OUT))
    if GROUPS:
        group = tl.load(groups_ptr + first_row // unit, mask=first_row < M, other=-1)
        if group < 0:
            return
        if not ROW.per_row:
            amax_ptr += 2 * group
    if ROW.on:
        rows = first_row + tl.arange(0, R)
        groups = first_column // 16 + tl.arange(0, B)
        if ROW.per_row:
            amax = tl.load(amax_ptr + rows, mask=rows < M, other=0.0)
            if first_column == 0:
                tl.store(row_scale_ptr + rows, _above(amax, ROW, ROW_OUT), mask=rows < M)
        else:
            amax = tl.load(amax_ptr) * ROW.bound
        v = _prepared(_load_rows(x_ptr, rows, groups, stride, M, K, EVEN), ROW)
        _cast_tile(v, rows, groups, amax, row_seed_ptr, row_ptr, row_scales_ptr, M, K, ROW, ROW_OUT, False, EVEN,
                   HARDWARE)  # fmt: skip
    if COL.on:
        amax = tl.load(amax_ptr + COL.amax_at) * COL.bound
        columns = first_column + tl.arange(0, RC)
        groups = first_row // 16 + tl.arange(0, BC)
        v = _prepared(_load_columns(x_ptr, columns, groups, stride, M, K, EVEN), COL)
        _cast_tile(
            v, columns, groups, amax, col_seed_ptr, col_ptr, col_scales_ptr, K, M_PADDED, COL, COL_OUT, True, EVEN,
            HARDWARE,
        )
