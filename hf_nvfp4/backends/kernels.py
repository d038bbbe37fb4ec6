"""From casts to Triton kernels (hf_nvfp4.ops): what the backends do on a GPU. Needs Triton to be imported.

Knows how a `Cast` reads as a kernel's Spec, and what the kernels leave to PyTorch: casts to plain
types, scales for each row of xᵀ.
"""

import dataclasses
import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_nvfp4 import ops
from hf_nvfp4.backends.operand import Operand, is_plain, plain, transposed
from hf_nvfp4.casts import Cast
from hf_nvfp4.formats import Element
from hf_nvfp4.ops import CODES, CODES_ACROSS, FP8, NOTHING, VALUES
from hf_nvfp4.reference import Packed, QuantizedTensor, draw_seed, quantize_blocks
from hf_nvfp4.rounding import rescaled


def knows(cast: Cast) -> bool:
    """Whether a cast is for this file; the others are plain PyTorch's, on a GPU too."""
    return cast.scale_rule != "rms" and cast.format not in ("nvfp4_128", "fp4")


def spec(cast: Cast) -> str:
    """A cast as text that the kernels read."""
    # Dynamo warns of caches that it looks through.
    return _text(cast) if torch.compiler.is_compiling() else _cached_text(cast)


def _text(cast: Cast) -> str:
    fmt = cast.block_format
    return ops.spec_text(
        fmt.element.name,
        fmt.block or 0,
        fmt.scale.name if isinstance(fmt.scale, Element) else fmt.scale or "none",
        cast.square,
        cast.rounding,
        cast.hadamard,
        cast.headroom,
        cast.outer == "row",
        cast.outer == "bound",
        cast.scale_rule,
    )


_cached_text = functools.cache(_text)


@dataclass
class Kept(Packed):
    """xᵀ [K, M] saved for backward: codes uint8 [M/16, K, 2·bits], block scales [M/block, K], FP32 scale above them.

    It lies in memory as x does, so that neither writing nor reading it transposes.
    """

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """[K, M] with all scales multiplied out, in dtype."""
        return rescaled(values(self), self.tensor_scale, dtype)


def amax(x: Tensor, row: Cast | None, col: Cast | None, groups: tuple = ()) -> Tensor:
    """FP32 largest magnitudes that a cast of both orientations needs: [2] or [1], see ops.cast; [M] for rows' own.

    groups: the arguments of ops.amax of that name and after it: [count, 2], of casts without scales for rows.
    """
    of_row = row is not None and row.block_format.tensor_scale
    of_col = col is not None and col.block_format.tensor_scale
    if of_row and row.outer == "row":
        return x.abs().amax(1).float()
    if not (of_row or of_col):
        return x.new_empty((groups[2], 2) if groups else 1, dtype=torch.float32)
    if of_col and col.outer != "bound" and col.hadamard:
        return ops.amax(x, of_row, col.hadamard, *groups)
    if groups or not torch.compiler.is_compiling():
        return ops.amax(x, True, 0 if of_col and col.outer != "bound" else -1, *groups)
    # Not by an operator: inductor makes this a part of the kernel that makes x. By rows first, as such kernels run; a
    # reduction of all at once is split otherwise, and reads what x is made of once more.
    largest = x.abs().amax(1).amax().float()
    return torch.stack((largest, largest)) if of_col and col.outer != "bound" else largest.reshape(1)


def quantize(
    x: Tensor,
    row: Cast | None,
    row_out: int,
    col: Cast | None,
    col_out: int,
    largest: Tensor | None = None,
    groups: tuple = (),
):
    """Casts that the kernels know: amax (unless `largest` is it), seeds and the cast itself.

    groups: as `amax` takes them.

    Returns data, block scales (None without) and FP32 scale of each orientation, Nones for one not asked for.
    """
    if largest is None:
        largest = amax(x, row, col, groups)
        # Both orientations are of one tensor: what one's scale covers, the other's does.
        scaled = next((c for c in (row, col) if c is not None and c.block_format.tensor_scale), None)
        largest = largest if scaled is None else scaled.of_all(largest)
    seeds = [draw_seed(x.device) if c is not None and c.rounding != "nearest" else None for c in (row, col)]
    texts = [None if c is None else spec(c) for c in (row, col)]
    out = ops.cast(x, largest, *seeds, texts[0], row_out, texts[1], col_out, *groups)
    split = _written(row, row_out)
    return [*_three(out[:split], row), *_three(out[split:], col)]


def quantize_rows(
    x: Tensor, cast: Cast, how: int, across: bool = False, signs: Tensor | None = None
) -> list[Tensor | None]:
    """`quantize` of one orientation: x along its last dimension, or xᵀ if `across`, rotated on its own.

    signs: seed of the rotation's drawn signs, or None for the fixed ones.
    """
    largest = None
    if cast.outer == "bound":
        largest = cast.of_all(x.abs().amax().float().reshape(1)) * cast.hadamard**0.5
        cast = dataclasses.replace(cast, outer="tensor")
    if across and not 0 < cast.hadamard <= ops.LARGEST_TRANSPOSED:
        x, across = transposed(x, cast), False
    if cast.hadamard:
        x = ops.rotate(x, cast.hadamard, signs, across)
        cast = dataclasses.replace(cast, hadamard=0, signs="fixed")
    return quantize(x.contiguous(), cast, how, None, NOTHING, largest)[:3]


def quantize_both(
    x: Tensor, row: Cast | None, row_out: int, col: Cast | None, col_out: int, signs: Tensor | None = None
) -> tuple:
    """`quantize` from one read if the kernels know both casts; else what they don't know is left to PyTorch.

    Returns the three tensors of each orientation, None for one not asked for.
    """
    if row is not None and (row.hadamard or row.outer == "row"):
        rows = quantize_rows(x, row, row_out, False, signs)
        return rows, quantize_both(x, None, NOTHING, col, col_out)[1]
    if col is not None and (col.hadamard > 16 or col.outer == "row" or signs is not None):
        rows = quantize_both(x, row, row_out, None, NOTHING)[0]
        return rows, quantize_rows(x, col, col_out, True, signs)
    if row is None and col is None:
        return None, None
    out = quantize(x, row, row_out, col, col_out)
    return row and out[:3], col and out[3:]


def _written(cast: Cast | None, how: int) -> int:
    """How many tensors the kernels write for a cast."""
    if cast is None:
        return 0
    return 2 if how in (VALUES, FP8) or cast.block_format.scale is None else 3


def _three(written: list[Tensor], cast: Cast | None) -> list[Tensor | None]:
    """Data, block scales, FP32 scale."""
    if cast is None:
        return [None, None, None]
    return list(written) if len(written) == 3 else [written[0], None, written[1]]


def cast(x: Tensor, row: Cast | None, col: Cast | None, keep_col: bool, signs: Tensor | None = None):
    """Backend `bf16`'s cast: values, or packed for xᵀ if it is to be kept."""
    if row is not None and (row.block_format.high_precision or row.hadamard or row.outer == "row"):
        return _alone(x, row, signs=signs), cast(x, None, col, keep_col)[1]
    if col is not None and (signs is not None or not _kernel_column(col, keep_col)):
        return cast(x, row, None, False)[0], _alone_transposed(x, col, keep_col, signs)
    if row is None and col is None:
        return None, None
    out = quantize(x, row, VALUES if row else NOTHING, col, (CODES_ACROSS if keep_col else VALUES) if col else NOTHING)
    a = Operand(out[0], out[2], row) if row else None
    b = None
    if col is not None:
        b = Kept(*out[3:], col) if keep_col else Operand(out[3].T, out[5], col)
    return a, b


def _kernel_column(col: Cast, keep: bool) -> bool:
    """Whether the kernels quantize xᵀ from x. Square blocks are the same both ways: values are transposed instead."""
    fits = col.hadamard <= 16 and col.outer != "row" and not col.block_format.high_precision
    return fits and (keep or not same_both_ways(col))


def same_both_ways(cast: Cast) -> bool:
    """Whether a tensor's values are those of its transpose."""
    return cast.square and cast.rounding == "nearest"


def _alone(
    x: Tensor, cast: Cast, keep: bool = False, across: bool = False, signs: Tensor | None = None
) -> Operand | QuantizedTensor:
    """x along its last dimension, or xᵀ if `across`, with what the kernels leave to PyTorch done first."""
    if cast.block_format.high_precision:
        x = transposed(x, cast) if across else x
        if is_plain(cast):
            return plain(x, cast)
        blocks = quantize_blocks(x, cast)
        return Operand(blocks.values().to(cast.block_format.element.dtype), blocks.tensor_scale, cast)
    out = quantize_rows(x, cast, CODES if keep else VALUES, across, signs)
    return packed(*out, cast) if keep else Operand(out[0], out[2], cast)


def _alone_transposed(x: Tensor, cast: Cast, keep: bool, signs: Tensor | None) -> Operand | QuantizedTensor:
    if same_both_ways(cast) and not keep:
        square = _alone(transposed(x, cast).T, cast)
        return Operand(square.values.T, square.scale, cast)
    return _alone(x, cast, keep, True, signs)


def packed(codes: Tensor, scales: Tensor, tensor_scale: Tensor, cast: Cast) -> QuantizedTensor:
    """The kernels' bytes as a QuantizedTensor."""
    if scales is not None:
        scales = scales.view(cast.block_format.scale_dtype)
    return QuantizedTensor(codes, scales, tensor_scale, cast)


def values(q: QuantizedTensor | Kept) -> Tensor:
    """code × block scale in BF16 [M, K], still rotated if the cast rotates."""
    stored = spec(dataclasses.replace(q.cast, rounding="nearest", hadamard=0, signs="fixed", outer="tensor"))
    if isinstance(q, Kept):
        return ops.dequantize(q.codes, q.scales, stored, True).T
    scales = q.scales
    if scales is not None and scales.dtype != torch.float32:
        scales = scales.view(torch.uint8)
    return ops.dequantize(q.codes, scales, stored, False)


def multiply(a: Operand, b: Operand, dtype: torch.dtype, bias: Tensor | None) -> Tensor | None:
    """The product with its scales in one GEMM; None if there is no such GEMM for these operands."""
    scales = [s for s in (a.scale, b.scale) if s is not None]
    if any(s.dim() for s in scales) or ops.unfit(a.values, b.values, dtype):
        return None
    one = torch.ones((), device=a.values.device) if len(scales) < 2 else None
    scale_a, scale_b = (one if o.scale is None else o.scale for o in (a, b))
    return ops.scaled_matmul(a.values, b.values, scale_a, scale_b, bias, dtype)
