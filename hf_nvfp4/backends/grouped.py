"""Several groups of rows at once (the tokens of experts), each with a matrix and FP32 scales of its own, by Triton.

For backends `bf16` and `fp8`, whose operands these are, bit for bit those of each group by itself. Knows where operands
lie and what the kernels don't do; nothing of experts, autograd and recipes' reasons.

Where: x [S, K], a group's rows padded with zeros to a multiple of UNIT; the matrices of all groups [E · N, K]. An
operand that is contracted along its rows has FP8 values transposed, and BF16 values as they lie.
"""

from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from hf_nvfp4.backends import bf16, fp8
from hf_nvfp4.backends.operand import Operand, is_plain
from hf_nvfp4.casts import Cast
from hf_nvfp4.language import Gemm, Recipe

kernels = bf16.kernels
# Rows of a group are padded to a multiple of this, a tile of the kernels. (Without Triton nobody asks.)
UNIT = 1 if kernels is None else kernels.ops.UNIT


class Groups(NamedTuple):
    """of_rows: int32, the group of each `unit` rows, -1 for rows to leave out; count: how many groups there are."""

    of_rows: Tensor
    unit: int
    count: int


# ---------------------------------------------------------------------------- what is done here


def why_not(recipe: Recipe, backend: ModuleType, device: torch.device, out_features: int) -> str | None:
    """Why groups can't be multiplied at once, or None. out_features: rows of a group's matrix."""
    if backend not in (bf16, fp8):
        return f"backend {backend.__name__.rpartition('.')[2]!r} has no grouped GEMMs"
    if kernels is None or device.type not in bf16.KERNEL_DEVICES:
        return "grouped GEMMs are Triton kernels on a GPU"
    if recipe.conditions or recipe.from_forward:
        return "grouped GEMMs cast x and w as they are, and as they are again in backward"
    for name, gemm in recipe.gemms.items():
        if reason := _why_not(gemm, backend, name == "wgrad"):
            return f"{reason}; {name} is {gemm}"
    for how in (recipe.fprop.b, recipe.dgrad.b):
        if out_features % (how.block_format.block or 1):
            return f"blocks of {how} would belong to two groups, of {out_features} rows each"
    return None


def _why_not(gemm: Gemm, backend: ModuleType, of_tokens: bool) -> str | None:
    """The same of one GEMM. of_tokens: contracted along the rows of both operands."""
    high = [how.block_format.high_precision for how in gemm]
    if any(high):
        plain = all(high) and all(map(is_plain, gemm)) and all(how.format == "bf16" for how in gemm)
        return None if plain else "grouped GEMMs in high precision are of BF16 by BF16"
    if not all(map(kernels.knows, gemm)):
        return "the kernels know not both casts"
    if gemm.a.signs == "random" or gemm.a.hadamard > (16 if of_tokens else 0):
        return "groups are rotated along tokens only, by 16 at most, with fixed signs"
    if backend is fp8 and not all(map(fp8.one_scale, gemm)):
        return "grouped FP8 GEMMs have one scale a group"
    if of_tokens and any(how.outer == "row" for how in gemm) or gemm.b.outer == "row":
        return "scales for each row are those of x in fprop and of dy in dgrad"
    return None


# ---------------------------------------------------------------------------- casts


def amax(x: Tensor, groups: Groups, row: Cast | None, col: Cast | None) -> Tensor:
    """Largest magnitudes that casts of both orientations need: FP32 [count, 2]."""
    row, col = (None if how is None or how.outer == "row" else how for how in (row, col))
    return kernels.amax(x, row, col, groups)


def cast(
    x: Tensor,
    groups: Groups,
    backend: ModuleType,
    casts: tuple[Cast | None, Cast | None],
    keep_col: bool = False,
    largest: Tensor | None = None,
) -> list:
    """x [M, K], each group's rows quantized along K as casts[0] says and along the rows as casts[1] says; or None.

    largest: `amax` of these casts, where it is known. keep_col: the second as small as can be, to save it.
    """
    found = [None, None]
    left = list(casts)
    for i, how in enumerate(casts):
        if how is not None and how.block_format.high_precision:
            found[i], left[i] = Operand(x.to(torch.bfloat16).contiguous(), None, how), None
    row, col = left
    if row is not None and (row.outer == "row" or col is None):
        above = x.abs().amax(1).float() if row.outer == "row" else largest
        found[0], row = _quantize(x, groups, backend, (row, None), False, above)[0], None
    if col is not None and not keep_col and kernels.same_both_ways(col) and not _on_fp8(col, backend):
        # The same values along either dimension, and they lie the same way.
        found[1], col = _quantize(x, groups, backend, (col, None), False, largest)[0], None
    if row is not None or col is not None:
        both = _quantize(x, groups, backend, (row, col), keep_col, largest)
        found = [mine or its for mine, its in zip(found, both, strict=True)]
    return found


def _on_fp8(how: Cast, backend: ModuleType) -> bool:
    return backend is fp8 and fp8.one_scale(how)


def _quantize(x, groups, backend, casts, keep_col, largest) -> list:
    """Both orientations by one launch."""
    outputs = []
    for how, kept in zip(casts, (False, keep_col), strict=True):
        bf16_output = kernels.ops.CODES_ACROSS if kept else kernels.ops.VALUES
        outputs.append(fp8.written(how) if how is None or _on_fp8(how, backend) else bf16_output)
    row, col = casts
    out = kernels.quantize(x, row, outputs[0], col, outputs[1], largest, groups)
    found = []
    for how, output, (data, scales, above) in zip(casts, outputs, (out[:3], out[3:]), strict=True):
        if how is None:
            found.append(None)
        elif _on_fp8(how, backend):
            found.append(fp8.operand((data, scales, above), how))
        elif output == kernels.ops.CODES_ACROSS:
            found.append(kernels.Kept(data, scales, above, how))
        else:
            found.append(Operand(data, above, how))
    return found


# ---------------------------------------------------------------------------- products


def multiply_rows(a, b, groups: Groups, across: bool, dtype: torch.dtype, biases: tuple = (None, None)) -> Tensor:
    """a [S, K] @ (the group's matrix of b)ᵀ + bias -> [S, N] in dtype; zeros in rows of no group.

    across: b was cast along its rows (dgrad). biases: [E, N], and int32 [E]: a group's rows from there on get none.
    """
    layout = kernels.ops.ROWS
    if across:
        layout = kernels.ops.MATRICES_ACROSS if isinstance(b, Operand) else kernels.ops.SIDE_BY_SIDE
    bias, ends = biases
    bias = None if bias is None else bias.to(dtype).contiguous()
    return kernels.ops.multiply_rows(
        a.values, b.values, groups.of_rows, a.scale, b.scale, bias, ends, layout, groups.count, dtype
    )


def multiply_columns(a, b, bounds: Tensor, dtype: torch.dtype) -> Tensor:
    """Operands cast along their rows [S, N] and [S, K] -> [E, N, K] in dtype, a group's rows contracted each.

    bounds: int32 [E + 1], where a group's rows begin, and the next one's.
    """
    a, b = (Operand(kernels.values(o).T, o.tensor_scale, o.cast) if isinstance(o, kernels.Kept) else o for o in (a, b))
    across = isinstance(a, Operand)
    return kernels.ops.multiply_columns(a.values, b.values, bounds, a.scale, b.scale, across, dtype)
