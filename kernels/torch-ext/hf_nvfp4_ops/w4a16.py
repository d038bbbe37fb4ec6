"""Triton kernel: x [M, K] in BF16 times a packed NVFP4 weight [N, K], read once and decoded in registers.

For few tokens, where the weight's bytes are the time. A warp has 16 · TILES rows of the weight; each thread loads 16
bytes of codes, 32 columns, of two rows of each 16, and decodes them to pairs of BF16 that are the operand of
`mma.sync.m16n8k16` as they lie: nothing of the weight goes through shared memory. The order of the columns is free
in a sum, so x is put in the codes' order instead. The warps of a program share its rows and take turns along K; their
FP32 sums are added at the end.

Knows packed codes, E4M3 block scales and the FP32 scale above them; knows nothing of layers.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .numerics import INTERPRETED, as_float, as_int, to_bf16, to_fp32

# A pair's bits are E2M1's at the low end of BF16's exponent, 2^-126 of their value; a scale times 2^118 still fits
# BF16; what is missing is left to the end.
SCALE_FACTOR = tl.constexpr(2.0**119)  # twice: E4M3's bits at the low end of FP32's exponent are 2^-120 of their value
REST = tl.constexpr(2.0**8)
MMA = tl.constexpr(
    "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {$0,$1,$2,$3}, {$4,$5,$6,$7}, {$8,$9}, {$10,$11,$12,$13};"
)
# Of 16 bytes where $5 is not 0.
LOAD = tl.constexpr("{ .reg .pred p; setp.ne.b32 p, $5, 0; @p ld.global.v4.b32 {$0,$1,$2,$3}, [$4]; }")
ZEROED_LOAD = tl.constexpr(
    "{ .reg .pred p; setp.ne.b32 p, $5, 0; mov.b32 $0, 0; mov.b32 $1, 0; mov.b32 $2, 0; mov.b32 $3, 0; "
    "@p ld.global.v4.b32 {$0,$1,$2,$3}, [$4]; }"
)


@triton.jit
def _low_half(word):
    """The lower of two BF16, as FP32."""
    return as_float(word << 16)


@triton.jit
def _high_half(word):
    """The upper one."""
    return as_float(word & -65536)


@triton.jit
def _low_halves(a, b):
    """Of two words the lower halves, a's below, b's above."""
    if INTERPRETED:
        return a & 0xFFFF | b << 16
    else:
        return tl.inline_asm_elementwise("prmt.b32 $0, $1, $2, 0x5410;", "=r,r,r", (a, b), tl.int32, True, 1)


@triton.jit
def _high_halves(a, b):
    """Of two words the upper halves, in the same order."""
    if INTERPRETED:
        return (a >> 16) & 0xFFFF | b & -65536
    else:
        return tl.inline_asm_elementwise("prmt.b32 $0, $1, $2, 0x7632;", "=r,r,r", (a, b), tl.int32, True, 1)


@triton.jit
def _choose(a, b, MASK: tl.constexpr):
    """a's bits where MASK has ones, else b's: one instruction, of which compilers make two."""
    if INTERPRETED:
        return a & MASK | b & ~MASK
    else:
        mask = tl.full(a.shape, MASK, tl.int32)
        return tl.inline_asm_elementwise("lop3.b32 $0, $1, $2, $3, 0xCA;", "=r,r,r,r", (mask, a, b), tl.int32, True, 1)


@triton.jit
def _pairs(word):
    """E2M1 of nibbles 0 and 4, 1 and 5, 2 and 6, 3 and 7 as two BF16 a word, times 2^-126.

    In each half of a word the sign goes to bit 15 and the rest to bits 8 to 6: six further apart than in a nibble. So
    they are parted first, of two nibbles at once.
    """
    low = _choose(word << 6, word, 0x22002200)
    high = _choose(word, word >> 6, 0x88008800 - (1 << 32))
    keep: tl.constexpr = 0x81C081C0 - (1 << 32)
    return low << 6 & keep, low << 2 & keep, high << 4 & keep, high & keep


@triton.jit
def _scales(code, FP8: tl.constexpr):
    """E4M3 bytes [C, 2 or 4] -> two equal BF16 a word, for each: the scale times 2^118.

    FP8: whether the device has such a type.
    """
    if FP8:
        value = code.to(tl.float8e4nv, bitcast=True).to(tl.float16).to(tl.float32) * (SCALE_FACTOR * 0.5)
    else:
        code = code.to(tl.int32)
        bits = (code & 0x80) << 24 | (code & 0x7F) << 20
        value = as_float(bits) * SCALE_FACTOR * SCALE_FACTOR
        value = tl.where((code & 0x7F) == 0x7F, float("nan"), value)
    if code.shape[1] == 4:
        values = _four(value)
    else:
        values = tl.split(value)
    pairs = ()
    for i in tl.static_range(len(values)):
        pairs = pairs + (_high_halves(as_int(values[i]), as_int(values[i])),)
    return pairs


@triton.jit
def _scaled(pair, scale):
    """The products of two BF16 and two others, in words: exact here."""
    if INTERPRETED:
        low = _low_half(pair) * _low_half(scale)
        high = _high_half(pair) * _high_half(scale)
        return as_int(high) & -65536 | (as_int(low) >> 16) & 0xFFFF
    else:  # sm_80 has no mul.bf16x2; -0 leaves the sign of a zero
        return tl.inline_asm_elementwise(
            "{ .reg .b32 z; mov.b32 z, 0x80008000; fma.rn.bf16x2 $0, $1, $2, z; }",
            "=r,r,r", (pair, scale), tl.int32, True, 1,
        )  # fmt: skip


@triton.jit
def _dot_lanes(a, b, WARPS: tl.constexpr):
    """What one register of each operand gives to the tile of a warp: a thread's columns 2t and 2t + 1 of row q."""
    a, b = tl.reshape(a, (WARPS, 8, 1, 4)), tl.reshape(b, (WARPS, 1, 8, 4))
    tile = tl.sum(_low_half(a) * _low_half(b) + _high_half(a) * _high_half(b), 3)  # [WARPS, 8, 8]
    even, odd = tl.split(tl.reshape(tile, (WARPS, 8, 4, 2)))
    return tl.reshape(even, (32 * WARPS,)), tl.reshape(odd, (32 * WARPS,))


@triton.jit
def _mma(a0, a1, a2, a3, b0, b1, c0, c1, c2, c3, WARPS: tl.constexpr):
    """A warp's c [16, 8] + a [16, 16] @ b [16, 8], of registers one a thread: words of two BF16; FP32 for c.

    Thread 4 q + t has rows q (a0, a2) and q + 8 (a1, a3) of a, column q of b, and of c columns 2t, 2t + 1 of row q
    (c0, c1) and of row q + 8 (c2, c3).
    """
    if INTERPRETED:
        even, odd = _dot_lanes(a0, b0, WARPS)
        more_even, more_odd = _dot_lanes(a2, b1, WARPS)
        c0, c1 = c0 + (even + more_even), c1 + (odd + more_odd)
        even, odd = _dot_lanes(a1, b0, WARPS)
        more_even, more_odd = _dot_lanes(a3, b1, WARPS)
        return c0, c1, c2 + (even + more_even), c3 + (odd + more_odd)
    else:
        return tl.inline_asm_elementwise(
            MMA, "=f,=f,=f,=f,r,r,r,r,r,r,f,f,f,f", (a0, a1, a2, a3, b0, b1, c0, c1, c2, c3),
            (tl.float32, tl.float32, tl.float32, tl.float32), False, 1,
        )  # fmt: skip


@triton.jit
def _four(v):
    """[C, 4] -> its columns."""
    even, odd = tl.split(tl.reshape(v, (v.shape[0], 2, 2)))
    v0, v2 = tl.split(even)
    v1, v3 = tl.split(odd)
    return v0, v1, v2, v3


@triton.jit
def _read(ptr, rows, pitch, chunk, EACH: tl.constexpr, FIT: tl.constexpr):
    """[C, EACH]: the chunk'th EACH elements of rows [C] that are `pitch` apart; zeros behind a row's last."""
    columns = chunk[:, None] * EACH + tl.arange(0, EACH)[None, :]
    at = ptr + (rows.to(tl.int64) * pitch)[:, None] + columns
    if FIT == 0:
        return tl.load(at, columns < pitch, 0)
    else:
        return tl.load(at)


@triton.jit
def _pitch(K, EACH: tl.constexpr, WIDE: tl.constexpr, FIT: tl.constexpr):
    """Elements in a row of which 32 · WIDE columns are EACH; by whole chunks, so that it is known to be aligned."""
    return K // (32 * WIDE) * EACH if FIT else K // 16 * EACH // (2 * WIDE)


@triton.jit
def _weight(codes_ptr, scales_ptr, first_row, lane, chunk, N, K, TILES: tl.constexpr, WIDE: tl.constexpr,
            FIT: tl.constexpr):  # fmt: skip
    """What threads read of their rows at their chunks of 32 · WIDE columns: WIDE times words [C, 4], and scales
    [C, 2 · WIDE], of each row. Behind the last row and the last chunk, those once more.
    """
    words, scales = (), ()
    chunk = tl.minimum(chunk, tl.cdiv(K, 32 * WIDE) - 1)
    for i in tl.static_range(2 * TILES):
        row = tl.minimum(first_row + 8 * i + lane // 4, N - 1)
        for j in tl.static_range(WIDE):
            words = words + (_read(codes_ptr, row, _pitch(K, 4 * WIDE, WIDE, FIT), chunk * WIDE + j, 4, FIT),)
        scales = scales + (_read(scales_ptr, row, _pitch(K, 2 * WIDE, WIDE, FIT), chunk, 2 * WIDE, FIT),)
    return words, scales


@triton.jit
def _four_words(ptr, there, ZEROS: tl.constexpr):
    """The four words [C] from ptr [C] on, at 16 bytes; where they are not there, zeros if ZEROS, else anything."""
    if INTERPRETED:
        at = ptr[:, None] + tl.arange(0, 4)[None, :]
        return _four(tl.load(at, tl.broadcast_to(there[:, None], at.shape), 0))
    else:
        return tl.inline_asm_elementwise(
            ZEROED_LOAD if ZEROS else LOAD, "=&r,=&r,=&r,=&r,l,r" if ZEROS else "=r,=r,=r,=r,l,r",
            (ptr.to(tl.int64), there.to(tl.int32)), (tl.int32, tl.int32, tl.int32, tl.int32), False, 1,
        )  # fmt: skip


@triton.jit
def _tokens(x_ptr, first_token, lane, chunk, part, M, K, TOKENS: tl.constexpr, SPREAD: tl.constexpr,
            WIDE: tl.constexpr, FIT: tl.constexpr):  # fmt: skip
    """Of each tile of x, eight columns of a token for each thread, as they lie: four words [C].

    The thread's chunk is cut into parts of eight columns. Of the 8 columns of the tile that `_mma` knows, each token
    has SPREAD, one for each of the parts from `part` · SPREAD on. Zeros behind the last column of x: what the weight
    has there does not count. Anything for tokens that there are not.
    """
    tokens, each = (), 8 // SPREAD
    column = chunk * (32 * WIDE) + 8 * (part * SPREAD + lane // 4 // each)
    for i in tl.static_range(TOKENS):
        token = first_token + each * i + lane // 4 % each
        at = x_ptr + token.to(tl.int64) * (K // 2) + column // 2
        tokens = tokens + (_four_words(at, (token < M) & (column < K), FIT < 2),)
    return tokens


@triton.jit
def _in_order(tokens):
    """`_tokens` in the order of `_pairs`."""
    ordered = ()
    for i in tl.static_range(len(tokens)):
        x01, x23, x45, x67 = tokens[i]
        pairs = (_low_halves(x01, x45), _high_halves(x01, x45), _low_halves(x23, x67), _high_halves(x23, x67))
        ordered = ordered + (pairs,)
    return ordered


@triton.jit
def _x_of_step(x_ptr, first_token, lane, chunk, M, K, TOKENS: tl.constexpr, SPREAD: tl.constexpr, WIDE: tl.constexpr,
               FIT: tl.constexpr):  # fmt: skip
    """`_tokens` of all parts of a step."""
    parts = ()
    for part in tl.static_range(4 * WIDE // SPREAD):
        parts = parts + (_tokens(x_ptr, first_token, lane, chunk, part, M, K, TOKENS, SPREAD, WIDE, FIT),)
    return parts


@triton.jit
def _add_word(sums, low, high, low_scale, high_scale, x, AT: tl.constexpr, SPREAD: tl.constexpr, WARPS: tl.constexpr):
    """The sums, with the products of one word of codes of two rows and x's words added to each SPREAD'th from AT on."""
    low, high, new = _pairs(low), _pairs(high), sums
    for k in tl.static_range(0, 4, 2):
        a0, a1 = _scaled(low[k], low_scale), _scaled(high[k], high_scale)
        a2, a3 = _scaled(low[k + 1], low_scale), _scaled(high[k + 1], high_scale)
        old, new = new, ()
        for i in tl.static_range(len(old)):
            if i >= AT and i < AT + len(x) * SPREAD and (i - AT) % SPREAD == 0:
                c0, c1, c2, c3 = old[i]
                b = x[(i - AT) // SPREAD]
                new = new + (_mma(a0, a1, a2, a3, b[k], b[k + 1], c0, c1, c2, c3, WARPS),)
            else:
                new = new + (old[i],)
    return new


@triton.jit
def _stay():
    """Loads above are issued above: compilers move those for later steps down to where they are used."""
    if not INTERPRETED:
        tl.inline_asm_elementwise("bar.warp.sync 0xffffffff; // $0", "=r", [], tl.int32, False, 1)


@triton.jit
def _add_four(a0, a1, a2, a3, b0, b1, b2, b3):
    return a0 + b0, a1 + b1, a2 + b2, a3 + b3


@triton.jit
def _own(sums, AT: tl.constexpr, lane, SPREAD: tl.constexpr):
    """Of the SPREAD sums from AT on, those whose part of x was in the thread's columns of the tile."""
    c0, c1, c2, c3 = sums[AT]
    for i in tl.static_range(1, SPREAD):
        own = lane % 4 * SPREAD // 4 == i
        d0, d1, d2, d3 = sums[AT + i]
        c0, c1, c2, c3 = tl.where(own, d0, c0), tl.where(own, d1, c1), tl.where(own, d2, c2), tl.where(own, d3, c3)
    return c0, c1, c2, c3


@triton.jit
def w4a16_kernel(x_ptr, codes_ptr, scales_ptr, outer_ptr, bias_ptr, y_ptr, M, N, K, WARPS: tl.constexpr,
                 TILES: tl.constexpr, TOKENS: tl.constexpr, DEPTH: tl.constexpr, WIDE: tl.constexpr,
                 SPREAD: tl.constexpr, FIT: tl.constexpr, FP8: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """y [M, N] = x @ weight.T · outer + bias, for 16 · TILES rows of the weight and 8 / SPREAD · TOKENS of x.

    x: BF16 [M, K], two a word, 16-byte aligned; codes: [N, K / 8] words; scales: E4M3 bytes [N, K / 16]; outer: FP32;
    bias: [N] or None. WARPS to SPREAD: see `Tiles`. FIT: see `fit`. FP8: as `_scales`. PDL: launched while the kernel
    in front still runs; what does not change, the weight, is read without waiting for its end.
    """
    if PDL:
        gdc_launch_dependents()
    each: tl.constexpr = 8 * TOKENS // SPREAD
    ahead: tl.constexpr = 4 * WIDE * TOKENS <= 2 * SPREAD  # x is read ahead too, where that takes few registers
    blocks = tl.cdiv(M, each)
    first_row, first_token = tl.program_id(0) // blocks * (16 * TILES), tl.program_id(0) % blocks * each
    # A tensor has one element for each thread, in their order: `_mma` needs them so.
    thread = tl.arange(0, 32 * WARPS)
    lane = thread % 32
    chunk = thread // 32 * 4 + lane % 4
    zeros = tl.zeros((32 * WARPS,), tl.float32)
    sums = ()
    for _ in tl.static_range(TILES * TOKENS * SPREAD):
        sums = sums + ((zeros, zeros, zeros, zeros),)
    held, held_x = (), ()
    for i in tl.static_range(DEPTH):
        later = chunk + i * 4 * WARPS
        held = held + (_weight(codes_ptr, scales_ptr, first_row, lane, later, N, K, TILES, WIDE, FIT),)
    if PDL:
        gdc_wait()
    if ahead:
        for i in tl.static_range(DEPTH):
            later = chunk + i * 4 * WARPS
            held_x = held_x + (_x_of_step(x_ptr, first_token, lane, later, M, K, TOKENS, SPREAD, WIDE, FIT),)
    for _ in range(tl.cdiv(K, 128 * WIDE * WARPS * DEPTH)):
        # DEPTH steps, each of which leaves its place to what the DEPTH'th from it needs.
        for _ in tl.static_range(DEPTH):
            words, scales = held[0]
            for part in tl.static_range(4 * WIDE):
                if part % SPREAD == 0 and ahead:
                    x = _in_order(held_x[0][part // SPREAD])
                elif part % SPREAD == 0:
                    read = _tokens(x_ptr, first_token, lane, chunk, part // SPREAD, M, K, TOKENS, SPREAD, WIDE, FIT)
                    x = _in_order(read)
                for i in tl.static_range(TILES):
                    low = _four(words[2 * i * WIDE + part // 4])[part % 4]
                    high = _four(words[(2 * i + 1) * WIDE + part // 4])[part % 4]
                    low_scale = _scales(scales[2 * i], FP8)[part // 2]
                    high_scale = _scales(scales[2 * i + 1], FP8)[part // 2]
                    sums = _add_word(sums, low, high, low_scale, high_scale, x, i * TOKENS * SPREAD + part % SPREAD,
                                     SPREAD, WARPS)  # fmt: skip
            later = chunk + DEPTH * 4 * WARPS
            held = held[1:] + (_weight(codes_ptr, scales_ptr, first_row, lane, later, N, K, TILES, WIDE, FIT),)
            if ahead:
                x_later = _x_of_step(x_ptr, first_token, lane, later, M, K, TOKENS, SPREAD, WIDE, FIT)
                held_x = held_x[1:] + (x_later,)
            _stay()
            chunk += 4 * WARPS

    factor = tl.load(outer_ptr)
    for i in tl.static_range(TILES * TOKENS):
        c0, c1, c2, c3 = _own(sums, i * SPREAD, lane, SPREAD)
        c0, c1 = tl.reshape(c0, (WARPS, 32)), tl.reshape(c1, (WARPS, 32))
        c2, c3 = tl.reshape(c2, (WARPS, 32)), tl.reshape(c3, (WARPS, 32))
        totals = tl.reduce((c0, c1, c2, c3), 0, _add_four)  # of a lane: two rows, of two tokens each
        for j in tl.static_range(4):
            y = tl.sum(tl.reshape(totals[j], (8, SPREAD, 4 // SPREAD)), 1) * REST * factor
            row = first_row + i // TOKENS * 16 + j // 2 * 8 + tl.arange(0, 8)[:, None]
            token = first_token + i % TOKENS * (8 // SPREAD) + j % 2 + 2 * tl.arange(0, 4 // SPREAD)[None, :]
            if bias_ptr is not None:
                y += to_fp32(tl.load(bias_ptr + row, row < N, 0.0))
            y = to_bf16(y) if y_ptr.dtype.element_ty == tl.bfloat16 else y
            tl.store(y_ptr + token.to(tl.int64) * N + row, y, (row < N) & (token < M))
