"""Triton kernels: GEMMs of several groups of rows at once, each with a matrix of its own (experts), scales included.

A group's rows begin at a multiple of UNIT, so that a tile belongs to one group; which one, the host need not know. One
kernel multiplies rows by their group's matrix (fprop and dgrad), the other sums over a group's rows (wgrad). BF16 and
FP8 operands, FP32 sums, one rounding. An FP8 tensor core keeps its own sums in fewer bits: they are added in FP32 after
each step of the contraction. Operands come through tensor descriptors (TMA where there is some).
"""

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .launch import INTERPRETED as ON_INTERPRETER
from .launch import OPTIONS, on
from .library import operator
from .numerics import INTERPRETED, decode, to_bf16, to_fp32
from .ops import check_like
from .spec import GRIDS, Grid

# Rows of a group are padded to a multiple of this.
UNIT = 128
# How the matrices of `count` groups lie: [count · N, K], [N, count · K] or [count · K, N].
ROWS, SIDE_BY_SIDE, ACROSS = range(3)
# Neighbouring programs share the columns of so many tiles of rows, which stay in L2.
WALK = 8


class Tiles(NamedTuple):
    """Rows and columns of a program's tile, how much it contracts at a step; warps, stages of the pipeline."""

    m: int
    n: int
    k: int
    warps: int
    stages: int


def tiles_for(fp8: bool, layout: int | None, hopper: bool) -> Tiles:
    """Those to multiply with. layout: None: of `columns_kernel`.

    hopper: the fastest of those tried on an H200 with experts of 2048→5632; elsewhere, where nothing was measured,
    what registers have room for.
    """
    if not hopper:
        return Tiles(128, 128, 128 if fp8 else 64, 8, 3)
    if fp8:
        return Tiles(128, 128, 128, 4, 3)
    return Tiles(128, 256, 64, 8, 3) if layout == ACROSS else Tiles(128, 128, 64, 4, 3)


# ---------------------------------------------------------------------------- kernels


@triton.jit
def _values(tile, GRID: tl.constexpr):
    """A tile as tl.dot takes it; the interpreter, whose dot knows neither BF16 nor FP8, gets FP32."""
    if INTERPRETED:
        if GRID is None:
            return to_fp32(tile)
        else:
            return decode(tile.to(tl.int32), GRID)
    else:
        return tile


@triton.jit
def _dot(a, b, product, FP8: tl.constexpr, STEP: tl.constexpr):
    """product + a @ b, for FP8 with this step's sum added in FP32."""
    if INTERPRETED:
        return tl.dot(a, b, product, input_precision="ieee")
    elif FP8:
        return tl.dot(a, b, product, max_num_imprecise_acc=STEP)
    else:
        return tl.dot(a, b, product)


@triton.jit
def _store(ptr, product, inside):
    if INTERPRETED and ptr.dtype.element_ty == tl.bfloat16:  # its casts truncate
        tl.store(ptr, to_bf16(product), mask=inside)
    else:
        tl.store(ptr, product.to(ptr.dtype.element_ty), mask=inside)


@triton.jit
def rows_kernel(a, b, groups_ptr, scale_a_ptr, scale_b_ptr, bias_ptr, ends_ptr, y_ptr, M, N, K,
                LAYOUT: tl.constexpr, A_GRID: tl.constexpr, B_GRID: tl.constexpr, SCALES_OF_ROWS: tl.constexpr,
                EVEN: tl.constexpr, UNIT: tl.constexpr, WALK: tl.constexpr,
                BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):  # fmt: skip
    """A tile of y [M, N] = scale_a · scale_b · a [M, K] @ (its group's matrix)ᵀ + bias; zeros where there is no group.

    a, b: descriptors of tiles; b lies as LAYOUT says. groups_ptr: of each UNIT rows, -1 for none.
    scale_a_ptr, scale_b_ptr: FP32, one a group, or None; a's one a row where SCALES_OF_ROWS. bias_ptr: [groups, N],
    for rows before ends_ptr's of the group.
    EVEN: K is a multiple of BK.
    """
    tiles_m, tiles_n = tl.cdiv(M, BM), tl.cdiv(N, BN)
    program = tl.program_id(0)
    first = program // (WALK * tiles_n) * WALK
    height = tl.minimum(tiles_m - first, WALK)
    row = (first + program % (WALK * tiles_n) % height) * BM
    column = program % (WALK * tiles_n) // height * BN
    found = tl.load(groups_ptr + row // UNIT)
    group = tl.maximum(found, 0)
    product = tl.zeros((BM, BN), tl.float32)
    for k in range(0, tl.where(found >= 0, K, 0), BK):
        left = _values(a.load([row, k]), A_GRID)
        if LAYOUT == 0:
            right = _values(b.load([group * N + column, k]), B_GRID).T
        elif LAYOUT == 1:
            right = _values(b.load([column, group * K + k]), B_GRID).T
        else:
            right = _values(b.load([group * K + k, column]), B_GRID)
        if LAYOUT > 0 and not EVEN:  # what follows is the next group's, perhaps never written
            right = tl.where((k + tl.arange(0, BK) < K)[:, None], right, tl.zeros_like(right))
        product = _dot(left, right, product, A_GRID is not None, BK)
    rows, columns = row + tl.arange(0, BM), column + tl.arange(0, BN)
    if scale_b_ptr is not None:
        factor = tl.load(scale_b_ptr + group)
        if scale_a_ptr is not None and not SCALES_OF_ROWS:
            factor *= tl.load(scale_a_ptr + group)
        product *= factor
    if scale_a_ptr is not None and SCALES_OF_ROWS:
        product *= tl.load(scale_a_ptr + rows)[:, None]
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + group.to(tl.int64) * N + columns, mask=columns < N, other=0.0)
        product += tl.where((rows < tl.load(ends_ptr + group))[:, None], to_fp32(bias)[None, :], 0.0)
    product = tl.where(found >= 0, product, 0.0)
    at = y_ptr + rows.to(tl.int64)[:, None] * N + columns[None, :]
    _store(at, product, (rows < M)[:, None] & (columns < N)[None, :])


@triton.jit
def columns_kernel(a, b, bounds_ptr, scale_a_ptr, scale_b_ptr, y_ptr, M, N,
                   ACROSS: tl.constexpr, A_GRID: tl.constexpr, B_GRID: tl.constexpr, WALK: tl.constexpr,
                   BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):  # fmt: skip
    """A tile of y [groups, M, N] = scale_a · scale_b · (the group's part of a [M, T]) @ (that of b [N, T])ᵀ.

    ACROSS: a and b lie as [T, M] and [T, N]. bounds_ptr: where a group's part begins and ends, multiples of BK.
    """
    tiles_m, tiles_n = tl.cdiv(M, BM), tl.cdiv(N, BN)
    group = tl.program_id(0) // (tiles_m * tiles_n)
    program = tl.program_id(0) % (tiles_m * tiles_n)
    first = program // (WALK * tiles_n) * WALK
    height = tl.minimum(tiles_m - first, WALK)
    row = (first + program % (WALK * tiles_n) % height) * BM
    column = program % (WALK * tiles_n) // height * BN
    product = tl.zeros((BM, BN), tl.float32)
    for k in range(tl.load(bounds_ptr + group), tl.load(bounds_ptr + group + 1), BK):
        if ACROSS:
            left, right = _values(a.load([k, row]), A_GRID).T, _values(b.load([k, column]), B_GRID)
        else:
            left, right = _values(a.load([row, k]), A_GRID), _values(b.load([column, k]), B_GRID).T
        product = _dot(left, right, product, A_GRID is not None, BK)
    if scale_a_ptr is not None:
        product *= tl.load(scale_a_ptr + group) * tl.load(scale_b_ptr + group)
    rows, columns = row + tl.arange(0, BM), column + tl.arange(0, BN)
    at = y_ptr + (group.to(tl.int64) * M + rows)[:, None] * N + columns[None, :]
    _store(at, product, (rows < M)[:, None] & (columns < N)[None, :])


# ---------------------------------------------------------------------------- launches


def grid_of(x: Tensor) -> Grid | None:
    """The grid of an FP8 tensor, None for BF16."""
    names = {torch.float8_e4m3fn: "e4m3", torch.float8_e5m2: "e5m2", torch.bfloat16: None}
    if x.dtype not in names:
        raise TypeError(f"grouped GEMMs multiply BF16, E4M3 and E5M2, not {x.dtype}")
    return GRIDS.get(names[x.dtype])


@functools.cache
def _is_hopper(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9


def _described(x: Tensor, block: list[int]) -> TensorDescriptor:
    """The interpreter has no FP8: it gets the bytes."""
    x = x.view(torch.uint8) if ON_INTERPRETER and x.dtype.itemsize == 1 else x
    return TensorDescriptor.from_tensor(x, block)


def _rows_like(a, b, groups, scale_a, scale_b, bias, ends, layout, count, dtype, tiles=None) -> Tensor:
    return a.new_empty((a.shape[0], b.shape[0] // count if layout == ROWS else b.shape[layout - 1]), dtype=dtype)


@operator(
    "multiply_rows(Tensor a, Tensor b, Tensor groups, Tensor? scale_a, Tensor? scale_b, Tensor? bias, "
    "Tensor? ends, int layout, int count, ScalarType dtype, int[]? tiles=None) -> Tensor",
    fake=_rows_like,
)
def multiply_rows(
    a: Tensor, b: Tensor, groups: Tensor, scale_a: Tensor | None, scale_b: Tensor | None, bias: Tensor | None,
    ends: Tensor | None, layout: int, count: int, dtype: torch.dtype, tiles: list[int] | None = None,
) -> Tensor:  # fmt: skip
    """scale_a · scale_b · a @ (the matrix of each row's group)ᵀ + bias: [M, N] in dtype, summed in FP32, rounded once.

    Args:
        a: [M, K], M a multiple of UNIT; b: `count` matrices [N, K] as `layout` says: ROWS, SIDE_BY_SIDE or ACROSS.
            BF16 both, or E4M3 and E5M2; rows of a multiple of 16 bytes.
        groups: int32 [M / UNIT], the group of as many rows each, or -1: zeros.
        scale_a, scale_b: FP32 [count], a's also [M, 1]; both or neither.
        bias: [count, N] or None; ends: with it, int32 [count]: a group's rows from there on are padding and get none.
        dtype: of the result.
        tiles: see `Tiles`; for benchmarks. None: `tiles_for`'s.

    Raises:
        TypeError, ValueError: sizes or dtypes that the kernel does not take.
    """
    (m, k), out = a.shape, _rows_like(a, b, groups, scale_a, scale_b, bias, ends, layout, count, dtype)
    wanted = {ROWS: (count * out.shape[1], k), SIDE_BY_SIDE: (out.shape[1], count * k)}
    _check_pair(a, b)
    if m % UNIT or tuple(b.shape) != wanted.get(layout, (count * k, out.shape[1])):
        raise ValueError(f"a {list(a.shape)} by {count} matrices in b {list(b.shape)}, layout {layout}: no product")
    check_like("groups", groups, a, torch.int32, (m // UNIT,))
    of_rows = scale_a is not None and scale_a.dim() == 2
    if scale_a is not None:
        check_like("scale_a", scale_a, a, torch.float32, (m, 1) if of_rows else (count,))
        check_like("scale_b", scale_b, a, torch.float32, (count,))
    if bias is not None:
        check_like("bias", bias, a, bias.dtype, (count, out.shape[1]))
        check_like("ends", ends, a, torch.int32, (count,))
    tiles = tiles_for(grid_of(a) is not None, layout, _is_hopper(a.device)) if tiles is None else Tiles(*tiles)
    of_b = [tiles.k, tiles.n] if layout == ACROSS else [tiles.n, tiles.k]
    programs = triton.cdiv(m, tiles.m) * triton.cdiv(out.shape[1], tiles.n)
    if not programs:
        return out
    with on(a.device):
        rows_kernel[(programs,)](
            _described(a, [tiles.m, tiles.k]), _described(b, of_b), groups, scale_a, scale_b, bias, ends, out,
            m, out.shape[1], k, layout, grid_of(a), grid_of(b), of_rows, k % tiles.k == 0, UNIT, WALK, *tiles[:3],
            num_warps=tiles.warps, num_stages=tiles.stages, **OPTIONS,
        )  # fmt: skip
    return out


def _check_pair(a: Tensor, b: Tensor) -> None:
    kinds = [grid_of(x) for x in (a, b)]
    if (kinds[0] is None) != (kinds[1] is None) or not (a.is_contiguous() and b.is_contiguous()):
        raise ValueError(f"grouped GEMMs multiply contiguous BF16 by BF16 or FP8 by FP8, not {a.dtype} by {b.dtype}")


def _columns_like(a, b, bounds, scale_a, scale_b, across, dtype, tiles=None) -> Tensor:
    return a.new_empty((bounds.shape[0] - 1, a.shape[across], b.shape[across]), dtype=dtype)


@operator(
    "multiply_columns(Tensor a, Tensor b, Tensor bounds, Tensor? scale_a, Tensor? scale_b, bool across, "
    "ScalarType dtype, int[]? tiles=None) -> Tensor",
    fake=_columns_like,
)
def multiply_columns(
    a: Tensor, b: Tensor, bounds: Tensor, scale_a: Tensor | None, scale_b: Tensor | None, across: bool,
    dtype: torch.dtype, tiles: list[int] | None = None,
) -> Tensor:  # fmt: skip
    """scale_a · scale_b · (a group's columns of a) @ (those of b)ᵀ: [groups, M, N] in dtype, zeros for an empty group.

    Args:
        a, b: [M, T] and [N, T]; [T, M] and [T, N] if `across`. Types as in `multiply_rows`.
        bounds: int32 [groups + 1], multiples of UNIT: where a group's columns begin, and the next one's.
        scale_a, scale_b: FP32 [groups], both or neither. dtype, tiles: as in `multiply_rows`.

    Raises:
        TypeError, ValueError: sizes or dtypes that the kernel does not take.
    """
    _check_pair(a, b)
    if a.shape[1 - across] != b.shape[1 - across]:
        raise ValueError(f"a {list(a.shape)} and b {list(b.shape)} have not as many tokens")
    out = _columns_like(a, b, bounds, scale_a, scale_b, across, dtype)
    check_like("bounds", bounds, a, torch.int32, (len(out) + 1,))
    for name, scale in (("scale_a", scale_a), ("scale_b", scale_b)):
        if scale is not None:
            check_like(name, scale, a, torch.float32, (len(out),))
    tiles = tiles_for(grid_of(a) is not None, None, _is_hopper(a.device)) if tiles is None else Tiles(*tiles)
    of_a, of_b = ([tiles.k, size] if across else [size, tiles.k] for size in (tiles.m, tiles.n))
    programs = len(out) * triton.cdiv(out.shape[1], tiles.m) * triton.cdiv(out.shape[2], tiles.n)
    if not a.numel() or not b.numel():
        return out.zero_()
    with on(a.device):
        columns_kernel[(programs,)](
            _described(a, of_a), _described(b, of_b), bounds, scale_a, scale_b, out, out.shape[1], out.shape[2],
            across, grid_of(a), grid_of(b), WALK, *tiles[:3],
            num_warps=tiles.warps, num_stages=tiles.stages, **OPTIONS,
        )  # fmt: skip
    return out
