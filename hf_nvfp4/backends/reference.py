"""Backend `reference`: dequantize, multiply in float64. Slow, on any device, the yardstick for the others."""

import torch
from torch import Tensor

from hf_nvfp4.backends.operand import Operand, flipped, is_plain, plain, rounded, transposed
from hf_nvfp4.casts import Cast
from hf_nvfp4.language import Recipe
from hf_nvfp4.reference import QuantizedTensor, pack, quantize_blocks


def supports(recipe: Recipe, device: torch.device) -> str | None:
    """Everything, everywhere (but float64 is missing on Apple's GPUs)."""
    return "needs float64, which MPS has not" if device.type == "mps" else None


def exactness(recipe: Recipe) -> str:
    """The definition of correct."""
    return "exact"


def cast(x: Tensor, row: Cast | None, col: Cast | None, keep_col: bool = False, signs: Tensor | None = None):
    """Both orientations as packed codes and scales."""
    x = flipped(x, row, col, signs)
    return (
        None if row is None else _cast(x, row),
        None if col is None else _cast(transposed(x, col), col),
    )


def _cast(x: Tensor, cast: Cast) -> QuantizedTensor | Operand:
    if is_plain(cast):
        return plain(x, cast)
    blocks = quantize_blocks(x.contiguous(), cast)
    if cast.block_format.high_precision:
        return Operand(blocks.values().to(cast.block_format.element.dtype), None, cast)
    return pack(blocks, cast)


def operand_of(q: QuantizedTensor, across: bool = False) -> QuantizedTensor:
    """Codes that were cast before: themselves, or transposed."""
    return q.transposed() if across else q


def multiply(a, b, dtype: torch.dtype, bias: Tensor | None = None) -> Tensor:
    """[M, K] @ [N, K].T in float64, rounded once to dtype."""
    product = a.dequantize(torch.float64) @ b.dequantize(torch.float64).T
    return rounded(product if bias is None else product + bias.double(), dtype)
