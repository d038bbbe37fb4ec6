"""Backend `bf16`: exact emulation by BF16 products with FP32 accumulation, on the CPU and any GPU since Ampere.

An E2M1 element times its E4M3 block scale has at most 6 significant bits and BF16 holds 8, so the operands
are exact and every product is the one that FP4 tensor cores compute; only the order of summation differs.
The tensor scales multiply the FP32 result. Formats with FP32 block scales are rounded to BF16, and say so.

On a GPU the casts that the Triton kernels know (hf_nvfp4.ops) are theirs, bit for bit the same as the plain PyTorch of
the CPU and of all other casts.
"""

import importlib.util
import threading
from collections.abc import Callable
from contextlib import contextmanager

import torch
from torch import Tensor

from hf_nvfp4.backends.operand import Operand, cast_where, finished, flipped, is_plain, plain, transposed
from hf_nvfp4.casts import Cast
from hf_nvfp4.formats import BlockFormat, Element
from hf_nvfp4.language import Recipe
from hf_nvfp4.reference import QuantizedTensor, pack, prepare, quantize_rows

if importlib.util.find_spec("triton") is None:
    kernels = None
else:
    from hf_nvfp4.backends import kernels

# Devices whose casts are kernels; the tests add the CPU, where Triton's interpreter runs them.
KERNEL_DEVICES = {"cuda"}


def supports(recipe: Recipe, device: torch.device) -> str | None:
    """Any recipe, on the CPU and on GPUs that multiply BF16."""
    if device.type == "cuda" and torch.version.cuda and torch.cuda.get_device_capability(device)[0] < 8:
        major, minor = torch.cuda.get_device_capability(device)
        return f"needs compute capability 8.0 (Ampere) for BF16; this GPU is {major}.{minor}"
    return None


def _exact(fmt: BlockFormat) -> bool:
    significant = fmt.element.mantissa_bits + 1
    if isinstance(fmt.scale, Element):
        significant += fmt.scale.mantissa_bits + 1
    return fmt.scale != "float32" and significant <= 8


def exactness(recipe: Recipe) -> str:
    """Whether element × block scale fits BF16 for every cast of the recipe."""
    inexact = sorted({c.format for c in recipe.casts if not _exact(c.block_format)})
    return f"{', '.join(inexact)} operands rounded to BF16" if inexact else "exact"


def _use_kernels(x: Tensor) -> bool:
    return kernels is not None and x.device.type in KERNEL_DEVICES


# ---------------------------------------------------------------------------- cast

def cast(x: Tensor, row: Cast | None, col: Cast | None, keep_col: bool = False, signs: Tensor | None = None):
    """x [M, K] and xᵀ as BF16 values and a scale above them; xᵀ as packed codes and scales if it is to be kept."""

    def by_kernels(x: Tensor, row: Cast | None, col: Cast | None, signs: Tensor | None) -> tuple:
        return kernels.cast(x, row, col, keep_col, signs)

    return by_kernels_or_torch(by_kernels, _by_torch, x, (row, col), keep_col, signs)


def by_kernels_or_torch(
    by_kernels: Callable,
    by_torch: Callable,
    x: Tensor,
    casts: tuple[Cast | None, Cast | None],
    keep_col: bool,
    signs: Tensor | None,
) -> tuple:
    """Both orientations: by_kernels(x, row, col, signs) of what the kernels know, where they run; by_torch the rest."""

    def ours(x: Tensor, row: Cast | None, col: Cast | None) -> tuple:
        return by_kernels(x, row, col, signs)

    def other(x: Tensor, row: Cast | None, col: Cast | None, keep_col: bool) -> tuple:
        return by_torch(flipped(x, row, col, signs), row, col, keep_col)

    if _use_kernels(x):
        return cast_where(kernels.knows, ours, other, x, casts, keep_col)
    return other(x, *casts, keep_col)


def _by_torch(x: Tensor, row: Cast | None, col: Cast | None, keep_col: bool) -> tuple:
    """The same in plain PyTorch."""
    return (
        None if row is None else _cast(x, row, keep=False),
        None if col is None else _cast(transposed(x, col), col, keep_col),
    )


def _cast(x: Tensor, cast: Cast, keep: bool) -> Operand | QuantizedTensor:
    """One orientation."""
    if is_plain(cast):
        return plain(x, cast)
    rotation = {"rotate": kernels.ops.rotate} if _use_kernels(x) else {}
    x, amax, seed = prepare(x.contiguous(), cast, **rotation)
    keep = keep and not cast.block_format.high_precision

    def part(x: Tensor, amax: Tensor, first: int = 0) -> Operand | QuantizedTensor:
        blocks = quantize_rows(x, amax, seed, cast, first)
        if keep:
            return pack(blocks, cast)
        return Operand(blocks.values().to(torch.bfloat16), blocks.tensor_scale, cast)

    if x.device.type != "cpu" or torch.compiler.is_compiling():
        return part(x, amax)
    # As many rows as stay in a CPU's cache through all passes.
    rows = max(128, 2**19 // x.shape[1] // 128 * 128)
    starts = range(0, x.shape[0], rows)
    amaxes = amax.split(rows) if cast.outer == "row" else [amax] * len(starts)
    return _concatenate([part(*slices) for slices in zip(x.split(rows), amaxes, starts, strict=True)])


def _concatenate(parts: list):
    """One operand of the parts' rows; a scale that is not per row is the same in all."""
    if len(parts) == 1:
        return parts[0]
    columns = zip(*(part.tensors for part in parts), strict=True)
    joined = [c[0] if c[0] is None or c[0].dim() == 0 else torch.cat(c) for c in columns]
    return type(parts[0])(*joined, parts[0].cast)


def packed(x: Tensor, cast: Cast, amax: Tensor) -> QuantizedTensor:
    """x [M, K] as codes and scales, cast to nearest without a rotation, under the scale of a known amax (FP32 scalar).

    For rows of a larger tensor, whose amax it is: the very codes of the whole.
    """
    if _use_kernels(x) and kernels.knows(cast):
        outputs = kernels.ops.CODES, None, kernels.ops.NOTHING
        return kernels.packed(*kernels.quantize(x.contiguous(), cast, *outputs, amax.reshape(1))[:3], cast)
    return pack(quantize_rows(x, amax, None, cast), cast)


def operand_of(q: QuantizedTensor, across: bool = False) -> Operand:
    """The values of codes that were cast before, or their transpose."""
    operand = _unpacked(q)
    return Operand(operand.values.T, operand.scale, q.cast) if across else operand


# ---------------------------------------------------------------------------- multiply

def multiply(a, b, dtype: torch.dtype, bias: Tensor | None = None) -> Tensor:
    """[M, K] @ [N, K].T, accumulated in FP32, scaled, the bias added, rounded once to dtype."""
    a, b = _unpacked(a), _unpacked(b)
    if a.scale is None and b.scale is None and dtype == torch.bfloat16:
        return a.values @ b.values.T if bias is None else torch.addmm(bias.to(dtype), a.values, b.values.T)
    if _use_kernels(a.values) and (product := kernels.multiply(a, b, dtype, bias)) is not None:
        return product
    return finished(_matmul_fp32(a.values, b.values), a.scale, b.scale, bias, dtype)


def _unpacked(operand: Operand | QuantizedTensor) -> Operand:
    if isinstance(operand, Operand):
        return operand
    values = kernels.values(operand) if _use_kernels(operand.codes) else operand.values().to(torch.bfloat16)
    return Operand(values, operand.tensor_scale, operand.cast)


def _matmul_fp32(a: Tensor, b: Tensor) -> Tensor:
    """BF16 [M, K] @ [N, K].T -> FP32 [M, N]."""
    if a.device.type == "cuda":
        return torch.mm(a, b.T, out_dtype=torch.float32)
    if torch.compiler.is_compiling():
        return a.float() @ b.float().T
    with _bf16_products():
        return a.float() @ b.float().T


_PRECISION_FLAG = threading.Lock()


@contextmanager
def _bf16_products():
    """Let oneDNN multiply FP32 operands as BF16 where the CPU can: ours are BF16 values, so nothing is lost.

    The flag is the process's, so one thread of ours holds it at a time.
    """
    matmul = torch.backends.mkldnn.matmul
    with _PRECISION_FLAG:
        before = matmul.fp32_precision
        matmul.fp32_precision = "bf16"
        try:
            yield
        finally:
            matmul.fp32_precision = before
