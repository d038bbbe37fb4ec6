"""Backend `fp8_rounded`: any recipe at the speed of FP8 tensor cores, each dequantized value rounded to E4M3.

Not what a recipe says: element × block scale has up to 6 significant bits for NVFP4, and E4M3 has 4. On N(0, 1) that
adds 1 to 5% to the squared error of rounding to NVFP4, and moves a product by 3 to 5%. Hence it has to be asked for by
name, and says so wherever it runs.

What is exactly FP8 under one scale (backend `fp8`) stays as it is. NVFP4 is rounded at an eighth of its value, which is
below E4M3's largest, by the kernels. Everything else is rounded from backend `bf16`'s values (with FP32 block scales:
rounded to BF16 first) in plain PyTorch, each row at the power of two that brings its largest magnitude to 224 ... 448,
so that no token's values depend on another's; a BF16 operand too, if the one that it multiplies is quantized.
"""

from functools import partial

import torch
from torch import Tensor

from hf_nvfp4.backends import bf16, fp8, operand
from hf_nvfp4.casts import Cast
from hf_nvfp4.formats import E4M3, E5M2
from hf_nvfp4.language import Gemm, Recipe


def supports(recipe: Recipe, device: torch.device) -> str | None:
    """Any recipe, on GPUs with FP8 tensor cores."""
    return fp8.lacks(device)


def exactness(recipe: Recipe) -> str:
    """Which formats' values are rounded."""
    rounded = sorted({c.format for gemm in recipe.gemms.values() for c in _rounded_in(gemm)})
    return f"each {', '.join(rounded)} value rounded to E4M3" if rounded else "exact"


def _rounded_in(gemm: Gemm) -> list[Cast]:
    """The casts of a GEMM whose values are not FP8 tensor cores' own."""
    if all(c.block_format.high_precision for c in gemm):
        return []
    if all(c.block_format.element is E5M2 for c in gemm):
        return [gemm.b]
    return [c for c in gemm if not fp8.one_scale(c)]


# ---------------------------------------------------------------------------- casts


def cast(x: Tensor, row: Cast | None = None, col: Cast | None = None, keep_col: bool = False, signs=None):
    """x [M, K] quantized along K by `row`, xᵀ along M by `col`; None where not asked for."""
    ours, other = partial(fp8.cast_both, signs=signs), partial(_cast, signs=signs)
    return operand.cast_where(_by_fp8, ours, other, x, (row, col), keep_col)


operand_of = fp8.operand_of


def _by_fp8(cast: Cast) -> bool:
    """Whether backend fp8 casts it: exactly, or with the kernels' rounding."""
    return fp8.one_scale(cast) or fp8.is_nvfp4(cast)


def _cast(x: Tensor, row: Cast | None, col: Cast | None, keep_col: bool, signs: Tensor | None) -> tuple:
    """Casts to other formats. High precision stays: `multiply` knows whether it has to be rounded."""
    found = bf16.cast(x, row, col, False, signs)
    return tuple(o if o is None or o.cast.block_format.high_precision else rounded(o) for o in found)


def rounded(x: operand.Operand) -> fp8.Operand:
    """BF16 values [M, K] rounded to E4M3, each row at a power of two of its own, to nearest."""
    values = x.values.float()
    bits = values.abs().amax(1, keepdim=True).view(torch.int32)
    # The exponent byte of the power p: p · amax is in (224, 448], that is significands up to 1.75 go to 2^8.
    above = bits + (2**23 - 1 - 3 * 2**21) >> 23
    byte = (127 + 8 + 127 - above).clamp_(1, 253)
    factor, inverse = ((b << 23).view(torch.float32) for b in (byte, 254 - byte))
    scale = inverse if x.scale is None else inverse * x.scale
    return fp8.Operand((values * factor).to(E4M3.dtype).contiguous(), None, scale, x.cast)


# ---------------------------------------------------------------------------- the product


def multiply(a, b, dtype: torch.dtype, bias: Tensor | None = None) -> Tensor:
    """[M, K] @ [N, K].T, accumulated in FP32, scaled, the bias added, rounded once to dtype.

    Raises:
        ValueError: operands with different K, or N not a multiple of 16.
    """
    if not isinstance(a, fp8.Operand) and not isinstance(b, fp8.Operand):
        return bf16.multiply(a, b, dtype, bias)
    a, b = (x if isinstance(x, fp8.Operand) else rounded(x) for x in (a, b))
    if a.values.dtype == b.values.dtype == E5M2.dtype:  # no such GEMM
        b = rounded(operand.Operand(b.values.to(torch.bfloat16), b.scale, b.cast))
    return fp8.multiply(a, b, dtype, bias)
