"""The kernels as torch operators: they compile into a graph, and have no side effects.

    amax(x, row, col_hadamard)                           largest magnitudes, FP32 [2]
    cast(x, amax, seeds, row, row_out, col, col_out)     both orientations of x, quantized
    dequantize(codes, scales, spec)                      BF16 code × block scale
    rotate(x, size, seed, transposed)                    BF16 random Hadamard transform, of x or xᵀ
    scaled_matmul(a, b, scale_a, scale_b, bias, dtype)   scale_a · scale_b · a @ b.T + bias
    w4a16(x, codes, scales, outer, bias)                 x @ weight.T + bias of a packed NVFP4 weight

Specs travel as text, see spec.py. Those of groups of rows with a matrix each: grouped.py.
"""

import functools

import torch
from torch import Tensor

from . import blas
from .cast import amax_kernel, cast_kernel
from .dequantize import dequantize_kernel, factors_kernel
from .launch import INTERPRETED, Launcher, Tile, hardware, on, processors, tile_for, tile_for_values
from .library import operator
from .rotate import (
    LARGEST_TRANSPOSED,
    NUM_WARPS,
    NUM_WARPS_TRANSPOSED,
    constants,
    rotate_kernel,
    rotate_transposed_kernel,
)
from .spec import CODES_ACROSS, CODES_SWIZZLED, FP8, NOTHING, VALUES, Plan, Spec, plan
from .w4a16 import w4a16_kernel
from .w4a16_tiles import LARGEST_CHUNK, LARGEST_M, Tiles, abilities, fit, tiles_for

_AMAX, _CAST, _DEQUANTIZE, _FACTORS = map(Launcher, (amax_kernel, cast_kernel, dequantize_kernel, factors_kernel))
_ROTATE, _ROTATE_TRANSPOSED, _W4A16 = map(Launcher, (rotate_kernel, rotate_transposed_kernel, w4a16_kernel))
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def _check(x: Tensor, multiple: int = 16) -> Tensor:
    """x with contiguous rows, or an error in words."""
    if x.dim() != 2 or x.dtype not in _FLOATS:
        raise TypeError(f"the kernels take [M, K] in float32, bfloat16 or float16, not {tuple(x.shape)} in {x.dtype}")
    if x.shape[1] % multiple:
        raise ValueError(f"the kernels take [M, K] with K a multiple of 16; this is {tuple(x.shape)}. Pad with zeros.")
    if max(x.shape) > 2**31 - 2**16:
        raise ValueError(f"{tuple(x.shape)}: a row number and a column number have 31 bits in the kernels; split x")
    if x.device.type != "cuda" and not INTERPRETED:
        raise ValueError(f"x is on {x.device}; the kernels run on a GPU, or anywhere with TRITON_INTERPRET=1")
    return x if x.stride(1) == 1 and x.stride(0) >= x.shape[1] else x.contiguous()


def check_like(name: str, t: Tensor, x: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """What a kernel reads besides x: on its device, of this dtype and shape, contiguous."""
    if t.device != x.device:
        raise ValueError(f"{name} is on {t.device}, x on {x.device}; move one of them")
    if t.dtype != dtype or tuple(t.shape) != shape or not t.is_contiguous():
        kind = "" if t.is_contiguous() else "a strided "
        raise ValueError(f"{name} must be contiguous {dtype} {list(shape)}, not {kind}{t.dtype} {list(t.shape)}")


def padded(m: int) -> int:
    """Rows of x as a contraction dimension: up to a multiple of 16, with zeros."""
    return -(-m // 16) * 16


# ---------------------------------------------------------------------------- amax


@functools.cache
def _amax_plan(row: bool, col_hadamard: int, unit: int) -> tuple[Plan, Plan, Tile]:
    separate = col_hadamard > 0
    row_plan, col_plan = Plan(row or col_hadamard == 0), Plan(separate)
    if separate:
        col_plan = col_plan._replace(hadamard=col_hadamard, hadamard_factor=col_hadamard**-0.5)
    return row_plan, col_plan, tile_for(row_plan, col_plan, unit)


def _amax_like(x, row, col_hadamard, groups=None, unit=0, count=0) -> Tensor:
    return x.new_empty((2,) if groups is None else (count, 2), dtype=torch.float32)


@operator(
    "amax(Tensor x, bool row, int col_hadamard, Tensor? groups=None, int unit=0, int count=0) -> Tensor",
    fake=_amax_like,
)
def amax(
    x: Tensor, row: bool, col_hadamard: int, groups: Tensor | None = None, unit: int = 0, count: int = 0
) -> Tensor:
    """Largest magnitudes of x [M, K] and of xᵀ rotated by `col_hadamard` along M: FP32 [2].

    row: whether the first is asked for. col_hadamard: 0: the second is a copy of the first; -1: not asked for.
    What is not asked for is 0. NaN and inf come through.
    groups: int32 [M / unit], of `count` groups the one that each `unit` rows belong to, or -1: not looked at. Then
    FP32 [count, 2], 0 for a group without rows. unit: a multiple of 16 and of the transform that divides M.
    """
    x = _check(x)
    if col_hadamard not in (-1, 0, 2, 4, 8, 16):
        raise ValueError(f"col_hadamard={col_hadamard}; the kernels know -1, 0, 2, 4, 8 and 16")
    _check_groups(groups, unit, count, x)
    bits = torch.zeros((2,) if groups is None else (count, 2), dtype=torch.int32, device=x.device)
    if x.numel():
        row_plan, col_plan, tile = _amax_plan(row, col_hadamard, unit)
        m, k = x.shape
        grid = min(tile.count(m, k), 8 * processors(x.device))
        with on(x.device):
            constants = (row_plan, col_plan, tile.fits(m, k), count, *tile.shape)
            _AMAX(grid, (x, bits, groups), (m, k, x.stride(0), unit), constants, tile.num_warps)
    if col_hadamard == 0:
        bits[..., 1] = bits[..., 0]
    return bits.view(torch.float32)


def _check_groups(groups: Tensor | None, unit: int, count: int, x: Tensor) -> None:
    """ValueError unless `groups` are those of x's rows, or None with no unit and no count."""
    if groups is None and unit == count == 0:
        return
    if groups is None or unit < 16 or unit % 16 or x.shape[0] % unit or count < 1:
        raise ValueError(
            f"groups of unit={unit} rows of {x.shape[0]}, count={count}: without `groups` both are 0; with them unit "
            "is a multiple of 16 that divides the rows, and there is at least one group"
        )
    check_like("groups", groups, x, torch.int32, (x.shape[0] // unit,))


# ---------------------------------------------------------------------------- rotate


def _rotated_like(x: Tensor, size: int, seed: Tensor | None = None, transposed: bool = False) -> Tensor:
    m, k = x.shape
    length = max(16, size)
    return x.new_empty((k, -(-m // length) * length) if transposed else (m, k), dtype=torch.bfloat16)


@operator("rotate(Tensor x, int size, Tensor? seed=None, bool transposed=False) -> Tensor", fake=_rotated_like)
def rotate(x: Tensor, size: int, seed: Tensor | None = None, transposed: bool = False) -> Tensor:
    """Random Hadamard transform of blocks of `size` along the last dimension of x [M, K]: BF16 [M, K].

    size: a power of two from 2 to 8192 that divides K. For transforms of up to 16, `cast` has its own.
    seed: int32 [2], of more signs that x is multiplied by: those of hf_nvfp4's `flip`.
    transposed: of xᵀ, M padded with zeros to a multiple of size and of 16: BF16 [K, M']; size up to 256.
    """
    x = _check(x, 1 if transposed else 16)
    m, k = x.shape
    sizes = [2**i for i in range(1, (LARGEST_TRANSPOSED if transposed else 8192).bit_length())]
    if size not in sizes or not transposed and k % size:
        divide = f" transposed; it takes powers of two up to {sizes[-1]}" if transposed else (
            f" for K={k}; it takes powers of two up to {sizes[-1]} that divide K")  # fmt: skip
        raise ValueError(f"rotate: size {size}{divide}")
    if seed is not None:
        check_like("seed", seed, x, torch.int32, (2,))
    out = _rotated_like(x, size, seed, transposed)
    arguments = _rotate_constants(size, seed is not None, transposed)
    rows = arguments[3]
    if not out.numel():
        return out
    with on(x.device):
        if transposed:
            programs = out.shape[1] // size * -(-k // rows)
            integers = (m, k, x.stride(0), out.shape[1])
            _ROTATE_TRANSPOSED(programs, (x, seed, out), integers, arguments, NUM_WARPS_TRANSPOSED)
        else:
            blocks = x.numel() // size
            _ROTATE(-(-blocks // rows), (x.contiguous(), seed, out), (blocks,), arguments, NUM_WARPS)
    return out


@functools.cache
def _rotate_constants(size: int, drawn: bool, transposed: bool) -> tuple:
    return tuple(constants(size, drawn, transposed).values())


# ---------------------------------------------------------------------------- cast


@functools.cache
def _cast_plan(
    row: str | None, row_out: int, col: str | None, col_out: int, unit: int = 0
) -> tuple[Plan, Plan, Tile]:
    for name, spec, out in (("row", row, row_out), ("col", col, col_out)):
        if out not in range(6) or (spec is None) != (out == NOTHING):
            raise ValueError(f"{name}_out={out} for {name}={spec!r}: 0 goes with None, 1 to 5 with a Spec")
        if out in (CODES_SWIZZLED, FP8) and plan(spec).scale != "e4m3":
            what = "swizzled" if out == CODES_SWIZZLED else "multiplied into E4M3 bytes"
            raise ValueError(f"{name}: only E4M3 scales are {what}")
    if row and col and plan(row).per_row:
        raise ValueError("a row cast with per-row scales goes alone: xᵀ has an amax of its own")
    if col and plan(col).per_row:
        raise ValueError("per-row scales of xᵀ: transpose x and cast it by rows")
    row_plan, col_plan = plan(row), plan(col)
    blocks = max(col_plan.block, row_plan.block if row_plan.square else 0)
    if unit and blocks and unit % blocks:
        raise ValueError(f"groups of {unit} rows: blocks of {blocks} of them would belong to two")
    return row_plan, col_plan, tile_for(row_plan, col_plan, unit)


def _outputs(x: Tensor, m: int, k: int, p: Plan, out: int, transposed: bool, count: int = 0) -> list[Tensor]:
    """What an operand [m, k] is written to: its data, its block scales if it has some, the FP32 scale above them."""
    if out == NOTHING:
        return []
    above = x.new_empty((m, 1) if p.per_row else (count,) if count else (), dtype=torch.float32)
    if out == VALUES:
        return [x.new_empty((k, m) if transposed else (m, k), dtype=torch.bfloat16), above]
    if out == FP8:
        return [x.new_empty((m, k), dtype=torch.uint8), above]
    width = 16 * p.grid.bits // 8
    codes = x.new_empty((k // 16, m, width) if out == CODES_ACROSS else (m, k // 16 * width), dtype=torch.uint8)
    if p.scale == "none":
        return [codes, above]
    across = -(-k // p.block)
    dtype = torch.float32 if p.scale == "float32" else torch.uint8
    if out == CODES_SWIZZLED:  # zeros: the padding is read too
        return [codes, x.new_zeros((-(-m // 128) * 128, -(-across // 4) * 4), dtype=dtype), above]
    return [codes, x.new_empty((across, m) if out == CODES_ACROSS else (m, across), dtype=dtype), above]


def _arguments(outputs: list[Tensor], out: int, spare: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The kernel's three pointers for `_outputs`; `spare` for what is not written."""
    if out == NOTHING:
        return spare, spare, spare
    data = outputs[0] if out == VALUES else outputs[0].view(torch.int32)
    return data, outputs[1] if len(outputs) == 3 else spare, outputs[-1]


def _all_outputs(
    x, amax, row_seed, col_seed, row, row_out, col, col_out, groups=None, unit=0, count=0
) -> list[Tensor]:
    row_plan, col_plan, _ = _cast_plan(row, row_out, col, col_out)
    m, k = x.shape
    return [
        *_outputs(x, m, k, row_plan, row_out, False, count),
        *_outputs(x, k, padded(m), col_plan, col_out, True, count),
    ]


@operator(
    "cast(Tensor x, Tensor amax, Tensor? row_seed, Tensor? col_seed, "
    "str? row, int row_out, str? col, int col_out, Tensor? groups=None, int unit=0, int count=0) -> Tensor[]",
    fake=_all_outputs,
)
def cast(
    x: Tensor, amax: Tensor, row_seed: Tensor | None, col_seed: Tensor | None,
    row: str | None, row_out: int, col: str | None, col_out: int,
    groups: Tensor | None = None, unit: int = 0, count: int = 0,
) -> list[Tensor]:  # fmt: skip
    """x [M, K] quantized along K as `row` says, and xᵀ along M as `col` says, from one read.

    Args:
        x: FP32, BF16 or FP16, K a multiple of 16.
        amax: FP32 [2], as the operator `amax` gives them, or the first alone if col has a `bound` or no need of one;
            FP32 [M] if `row` has per-row scales.
        row_seed, col_seed: int32 [2] for roundings that draw.
        row, col: text of a Spec, or None.
        row_out, col_out: 0 nothing, 1 BF16 values (code × block scale), 2 packed codes and scales, 3 the same with
            the scales padded and swizzled for tensor cores, 4 the same block after block, 5 E4M3 bytes of code ×
            block scale (an eighth of it, but for the scale rule "fp8_exact") as FP8 tensor cores want them: from
            compute capability 8.9 on.
        groups, unit, count: as `amax` takes them, whose [count, 2] is `amax` then (FP32 [M] with per-row scales): each
            group is cast as if it were alone, but for its random numbers. Rows of no group are not written.

    Returns:
        What row writes, then what col writes, each: values or bytes [M, K] or codes [M, K·bits/8]; with codes, scales
        [M, ceil(K/block)] (uint8, or FP32) if there are some; the FP32 scale above them, scalar, [count] or [M, 1].
        Col is an operand [K, M'], M' being M padded to 16, but its BF16 values have x's layout, [M', K].
        Output 4: codes [K/16, M, 2·bits], scales [ceil(K/block), M], for col [M'/16, K, 2·bits] and so on.

    Raises:
        TypeError, ValueError: sizes, dtypes, devices or casts that the kernels don't take.
    """
    x = _check(x)
    _check_groups(groups, unit, count, x)
    row_plan, col_plan, tile = _cast_plan(row, row_out, col, col_out, unit)
    m, k = x.shape
    one = amax.shape == (1,) and col_plan.amax_at == 0
    largest = (m,) if row_plan.per_row else (count, 2) if count else (1,) if one else (2,)
    check_like("amax", amax, x, torch.float32, largest)
    for name, p, seed in (("row_seed", row_plan, row_seed), ("col_seed", col_plan, col_seed)):
        if (p.stochastic or p.eden) and seed is None:
            raise ValueError(f"{name}: rounding that draws needs a seed, int32 [2]")
        if seed is not None:
            check_like(name, seed, x, torch.int32, (2,))
    row_outputs = _outputs(x, m, k, row_plan, row_out, False, count)
    col_outputs = _outputs(x, k, padded(m), col_plan, col_out, True, count)
    if x.numel():
        with on(x.device):
            tensors = (x, amax, row_seed, col_seed, groups)
            tensors += (*_arguments(row_outputs, row_out, x), *_arguments(col_outputs, col_out, x))
            constants = (row_plan, row_out, col_plan, col_out, tile.fits(m, k), count, *tile.shape)
            constants += (hardware(x.device),)
            programs, integers = max(tile.count(m, k), count), (m, k, x.stride(0), padded(m), unit)
            _CAST(programs, tensors, integers, constants, tile.num_warps)
    else:
        for p, written in ((row_plan, row_outputs), (col_plan, col_outputs)):
            for above in written[-1:]:
                above.fill_(p.headroom if p.scale == "e8m0" else 1.0)
    return row_outputs + col_outputs


# ---------------------------------------------------------------------------- dequantize, multiply


def _values_like(codes: Tensor, scales: Tensor | None, spec: str, across: bool) -> Tensor:
    if across:
        groups, m, _ = codes.shape
        return codes.new_empty((groups * 16, m), dtype=torch.bfloat16)
    return codes.new_empty((codes.shape[0], codes.shape[1] * 8 // plan(spec).grid.bits), dtype=torch.bfloat16)


def _check_codes(codes: Tensor, scales: Tensor | None, p: Plan, across: bool) -> None:
    width = 2 * p.grid.bits  # bytes of 16 codes
    if codes.dtype != torch.uint8 or codes.dim() != 2 + across or codes.shape[-1] % width:
        shape = f"[K / 16, M, {width}]" if across else f"[M, K / 16 · {width}]"
        raise ValueError(f"codes must be uint8 {shape}, not {codes.dtype} {list(codes.shape)}")
    if (scales is None) != (p.scale == "none"):
        raise ValueError(f"scales of type {p.scale!r}: {'none are expected' if scales is not None else 'give them'}")
    if scales is not None:
        groups, m = codes.shape[:2] if across else (codes.shape[1] // width, codes.shape[0])
        blocks = -(-groups * 16 // p.block)
        dtype = torch.float32 if p.scale == "float32" else torch.uint8
        check_like("scales", scales, codes, dtype, (blocks, m) if across else (m, blocks))


@operator("dequantize(Tensor codes, Tensor? scales, str spec, bool across) -> Tensor", fake=_values_like)
def dequantize(codes: Tensor, scales: Tensor | None, spec: str, across: bool) -> Tensor:
    """Codes and block scales of an operand [M, K], as `cast` writes them -> BF16 code × scale [M, K].

    across: they lie block after block (output 4 of `cast`); then the result is [K, M].
    """
    _check_codes(codes, scales, plan(spec), across)
    out = _values_like(codes, scales, spec, across)
    if out.numel():
        p, (R, B, num_warps) = plan(spec), tile_for_values(across)
        k, m = out.shape if across else out.shape[::-1]
        with on(codes.device):
            constants = (p, across, m % R == 0 and k % (16 * B) == 0, R, B)
            tensors = (codes.contiguous().view(torch.int32), scales, out)
            _DEQUANTIZE(-(-m // R) * -(-k // (16 * B)), tensors, (m, k), constants, num_warps)
    return out


def _product_like(a, b, scale_a, scale_b, bias, dtype) -> Tensor:
    return a.new_empty((a.shape[0], b.shape[0]), dtype=dtype)


@operator(
    "scaled_matmul(Tensor a, Tensor b, Tensor scale_a, Tensor scale_b, Tensor? bias, ScalarType dtype) -> Tensor",
    fake=_product_like,
)
def scaled_matmul(
    a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """scale_a · scale_b · a [M, K] @ b [N, K].T + bias -> [M, N] in dtype, accumulated in FP32 and rounded once.

    a, b: BF16, contiguous along either dimension; scale_a, scale_b: FP32 scalars on the GPU, never read by the host;
    bias: [N], rounded to dtype first, or None. Ask `unfit` first whether there is a GEMM for the operands.
    """
    if reason := blas.unfit(a, b, dtype):
        raise ValueError(f"scaled_matmul: {reason}")
    check_like("scale_a", scale_a, a, torch.float32, ())
    check_like("scale_b", scale_b, a, torch.float32, ())
    if bias is not None:
        check_like("bias", bias, a, bias.dtype, (b.shape[0],))
    out = _product_like(a, b, scale_a, scale_b, bias, dtype)
    if bias is not None:
        out.copy_(bias)
    factors = a.new_empty(2, dtype=torch.float32)
    with on(a.device):
        _FACTORS(1, (scale_a, scale_b, factors), (), (bias is not None,), 1)
        blas.matmul(a, b, factors, out)
    return out


# ---------------------------------------------------------------------------- packed weights


def _linear_like(x, codes, scales, outer, bias, tiles=None) -> Tensor:
    return x.new_empty((x.shape[0], codes.shape[0]))


@operator(
    "w4a16(Tensor x, Tensor codes, Tensor scales, Tensor outer, Tensor? bias, int[]? tiles=None) -> Tensor",
    fake=_linear_like,
)
def w4a16(
    x: Tensor, codes: Tensor, scales: Tensor, outer: Tensor, bias: Tensor | None, tiles: list[int] | None = None
) -> Tensor:
    """x [M, K] @ (codes · scales · outer) [N, K].T + bias: [M, N] in x's dtype, summed in FP32 and rounded once.

    Args:
        x: FP32, BF16 or FP16, rounded to BF16. K a multiple of 16.
        codes: uint8 [N, K / 2], E2M1, the even column in the low nibble; scales: [N, K / 16], E4M3 (or its bytes);
            outer: an FP32 scalar on the device. All contiguous.
        bias: [N] or None.
        tiles: those of the kernel, see `Tiles`; for benchmarks. None: `tiles_for`'s.

    Up to `LARGEST_M` rows, and with `tiles` any number, the weight is decoded in registers, and nothing is allocated
    but the result (and x in BF16). More are multiplied by cuBLAS with the weight dequantized before, `LARGEST_CHUNK`
    elements of it at a time.

    Raises:
        TypeError, ValueError: sizes, dtypes or devices that the kernel does not take.
    """
    x = _check(x).contiguous()
    (m, k), n = x.shape, codes.shape[0]
    scales = scales.view(torch.uint8) if scales.dtype == torch.float8_e4m3fn else scales
    check_like("codes", codes, x, torch.uint8, (n, k // 2))
    check_like("scales", scales, x, torch.uint8, (n, k // 16))
    check_like("outer", outer, x, torch.float32, ())
    if bias is not None:
        check_like("bias", bias, x, bias.dtype, (n,))
    values = x.bfloat16()
    if tiles is None and m > LARGEST_M and not blas.unfit(values, values, torch.bfloat16):
        return _dequantized_matmul(values, codes, scales, outer, bias, x.dtype)
    out = _linear_like(x, codes, scales, outer, bias)
    if not k:
        return out.zero_() if bias is None else out.copy_(bias)
    if out.numel():
        values = values.clone() if values.storage_offset() % 2 or values.data_ptr() % 16 else values
        tiles = tiles_for(m, n, k) if tiles is None else Tiles(*tiles)
        with on(x.device):
            tensors = (values.view(torch.int32), codes.view(torch.int32), scales, outer, bias, out)
            fp8, pdl = abilities(x.device)
            constants = (*tiles, fit(k, tiles), fp8, pdl)
            _W4A16(tiles.programs(m, n), tensors, (m, n, k), constants, tiles.warps, pdl)
    return out


def _dequantized_matmul(
    x: Tensor, codes: Tensor, scales: Tensor, outer: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """`w4a16` of x in BF16 by a GEMM of cuBLAS's for each LARGEST_CHUNK elements of the weight, BF16 for the while."""
    wide, one = dtype if dtype == torch.bfloat16 else torch.float32, torch.ones((), device=x.device)
    rows, parts = max(1, LARGEST_CHUNK // x.shape[1]), []
    for first in range(0, len(codes), rows):
        part = slice(first, first + rows)
        weight = dequantize(codes[part], scales[part], str(Spec()), False)
        parts.append(scaled_matmul(x, weight, one, outer, None if bias is None else bias[part], wide))
    return (parts[0] if len(parts) == 1 else torch.cat(parts, 1)).to(dtype)
