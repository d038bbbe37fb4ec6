"""What backends share: an operand in high precision or as BF16 values, xᵀ as an operand, casts by two backends."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_nvfp4.casts import Cast
from hf_nvfp4.rounding import flip, rescaled


@dataclass
class Operand:
    """values: BF16 [M, K], element × block scale; scale: FP32 scalar or [M, 1] above them, or None for 1."""

    values: Tensor
    scale: Tensor | None
    cast: Cast

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """What a later `Operand(*tensors, cast)` is made of."""
        return self.values, self.scale

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """[M, K] with the scale multiplied out, in dtype: the reference's, bit for bit, where the values are exact."""
        return self.values.to(dtype) if self.scale is None else rescaled(self.values, self.scale, dtype)


def is_plain(cast: Cast) -> bool:
    """Whether a cast is a rounding to a torch dtype and nothing else."""
    return cast.block_format.high_precision and cast.rounding == "nearest"


def plain(x: Tensor, cast: Cast) -> Operand:
    """x as an operand of a cast that `is_plain`."""
    return Operand(x.to(cast.block_format.element.dtype), None, cast)


def transposed(x: Tensor, cast: Cast) -> Tensor:
    """x [M, K] -> xᵀ [K, M'], a view: M is a contraction dimension now, padded with zeros for blocks and rotations.

    The same padding for both operands of a GEMM, whatever their formats: their rotations are equal.
    """
    missing = -x.shape[0] % max(16, cast.hadamard)
    return (F.pad(x, (0, 0, 0, missing)) if missing else x).T


def flipped(x: Tensor, row: Cast | None, col: Cast | None, signs: Tensor | None) -> Tensor:
    """x times the drawn signs of the one cast's rotation, along K for `row`, along M for `col`; x itself without."""
    if signs is None or row is col is None:
        return x
    return flip(x, signs, row.hadamard, 1) if row is not None else flip(x, signs, col.hadamard, 0)


def cast_where(
    fits: Callable, ours: Callable, other: Callable, x: Tensor, casts: tuple[Cast | None, Cast | None], keep_col: bool
) -> tuple:
    """A backend's cast of both orientations: by ours(x, row, col) what `fits` says, by another backend's `other` the
    rest."""
    row, col = casts
    # Stochastic rounding draws row's seed first: a row of the other backend goes first, a column last.
    other_row = None if row is None or fits(row) else other(x, row, None, False)[0]
    our_row, our_col = ours(x, *(c if c is not None and fits(c) else None for c in casts))
    other_col = None if col is None or fits(col) else other(x, None, col, keep_col)[1]
    return other_row if our_row is None else our_row, our_col if other_col is None else other_col


def inner_and_outer(*scales: Tensor) -> tuple[list[Tensor], list[Tensor | None]]:
    """Operands' FP32 scales as a GEMM that takes scalars does, 1 for those of rows; and those of rows, or None."""
    inner = [torch.ones((), device=s.device) if s.dim() else s for s in scales]
    return inner, [s if s.dim() else None for s in scales]


def finished(product: Tensor, scale_a: Tensor | None, scale_b: Tensor | None, bias: Tensor | None, dtype: torch.dtype):
    """An FP32 product [M, N] times its operands' scales + bias, in dtype. Scales: scalar, one a row, or None for 1."""
    if scale_a is not None:
        product = product * scale_a
    if scale_b is not None:
        product = product * (scale_b.T if scale_b.dim() else scale_b)
    return rounded(product if bias is None else product + bias.float(), dtype)


def rounded(product: Tensor, dtype: torch.dtype) -> Tensor:
    """A result in dtype, the very tensor if it has it.

    torch 2.11's Dynamo loses the gradients of an autograd.Function that returns `t.to(t.dtype)`: they are zeros.
    """
    return product if product.dtype == dtype else product.to(dtype)
