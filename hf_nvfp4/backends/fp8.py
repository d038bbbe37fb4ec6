"""Backend `fp8`: GEMMs on FP8 tensor cores (Ada, Hopper and later), for the recipes that they compute exactly.

- NVFP4 with the scale rule "fp8_exact": every element × block scale is an E4M3 value, so an operand is an E4M3 tensor
  times one FP32 number, and every product is the one that FP4 tensor cores compute. The codes and scales are legal
  NVFP4, the same as in every other backend.
- FP8 with a scale for the tensor, and with FP32 scales of 1×128 and 128×128 blocks: cuBLAS has these on Hopper only.

GEMMs of two high-precision operands go to backend `bf16`. Sums are in FP32 without "fast accumulation": in that, an
FP8 tensor core keeps its sums in fewer bits all along the contraction (arXiv 2412.19437, section 3.5.2).

The casts are Triton kernels on a GPU (hf_nvfp4.ops), the reference elsewhere, and give the same values, the sign of a
zero aside.
"""

from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.functional import ScalingType

from hf_nvfp4.backends import bf16
from hf_nvfp4.backends.operand import cast_where, finished, inner_and_outer, transposed
from hf_nvfp4.casts import Cast
from hf_nvfp4.formats import E2M1, E4M3, E5M2
from hf_nvfp4.language import Recipe
from hf_nvfp4.reference import QuantizedTensor, quantize_blocks
from hf_nvfp4.rounding import rescaled

CAPABILITY = (8, 9)
# Block scales: cuBLAS has their GEMMs on this architecture, from this version of CUDA on.
BLOCK_ARCHITECTURE, BLOCK_CUDA = 9, (12, 9)
BLOCK = 128
# cuBLAS wants rows of operands and results in multiples of 16 bytes.
MULTIPLE = 16
# NVFP4 that is not "fp8_exact" goes up to 6 · 448 and is rounded to E4M3 at an eighth (backend `fp8_rounded`).
ROUNDED_FACTOR = 8.0


@dataclass
class Operand:
    """A quantized [M, K] operand.

    values: float8_e4m3fn or float8_e5m2 [M, K], contiguous along K: element × block scale, or elements under `scales`.
    scales: FP32 [M, ceil(K/128)], a 128×128 block's in each of its rows; None: multiplied into the values, or none.
    scale: FP32 scalar above them, or [M, 1] with per-row scales.
    """

    values: Tensor
    scales: Tensor | None
    scale: Tensor
    cast: Cast

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """What a later `Operand(*tensors, cast)` is made of."""
        return self.values, self.scales, self.scale

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """[M, K] with all scales multiplied out, in dtype: the reference's, bit for bit."""
        values = self.values.float()
        if self.scales is not None:
            values = values * self.scales.repeat_interleave(BLOCK, 1)[:, : values.shape[1]]
        return rescaled(values, self.scale, dtype)


# ---------------------------------------------------------------------------- what runs here


def is_nvfp4(cast: Cast) -> bool:
    """Whether a cast is to E2M1 elements under E4M3 block scales."""
    return cast.block_format.element is E2M1 and cast.block_format.scale is E4M3


def one_scale(cast: Cast) -> bool:
    """Whether what a cast gives is exactly FP8 values under one FP32 scale (or one a row)."""
    fmt = cast.block_format
    if is_nvfp4(cast):
        return cast.scale_rule == "fp8_exact"
    return fmt.element in (E4M3, E5M2) and fmt.scale is None and fmt.tensor_scale


def has_blocks(cast: Cast) -> bool:
    """Whether what a cast gives is FP8 values under FP32 scales of 1×128 or 128×128 blocks."""
    fmt = cast.block_format
    return fmt.element in (E4M3, E5M2) and fmt.scale == "float32" and fmt.block == BLOCK


def lacks(device: torch.device) -> str | None:
    """Why a device has no FP8 tensor cores for us, or None."""
    wanted = f"needs compute capability {CAPABILITY[0]}.{CAPABILITY[1]}"
    if device.type != "cuda" or not torch.version.cuda:
        return f"{wanted} (an NVIDIA GPU since Ada and Hopper)"
    major, minor = torch.cuda.get_device_capability(device)
    return None if (major, minor) >= CAPABILITY else f"{wanted}; this GPU is {major}.{minor}"


def _lacks_blocks(device: torch.device) -> str | None:
    """The same of GEMMs with block scales."""
    major, minor = torch.cuda.get_device_capability(device)
    if major != BLOCK_ARCHITECTURE:
        return f"needs compute capability 9.0 for FP8 with block scales; this GPU is {major}.{minor}"
    if tuple(map(int, torch.version.cuda.split(".")[:2])) < BLOCK_CUDA:
        return f"needs CUDA 12.9 for FP8 with block scales; this torch has {torch.version.cuda}"
    return None


def _unfit(a: Cast, b: Cast) -> str | None:
    """Why there is no GEMM of these casts, exact, on FP8 tensor cores; None if there is."""
    if all(map(one_scale, (a, b))):
        both = a.block_format.element is E5M2 and b.block_format.element is E5M2
        return "has no GEMM of E5M2 by E5M2" if both else None
    if all(map(has_blocks, (a, b))):
        return "has no GEMM of 128×128 by 128×128 blocks" if a.square and b.square else None
    return "multiplies nvfp4 with scale_rule='fp8_exact', FP8 by FP8 with equal kinds of scales, and bf16 by bf16"


def supports(recipe: Recipe, device: torch.device) -> str | None:
    """Recipes whose GEMMs FP8 tensor cores compute exactly, on GPUs that have these."""
    if reason := lacks(device):
        return reason
    for name, (a, b) in recipe.gemms.items():
        if a.block_format.high_precision and b.block_format.high_precision:
            continue
        if reason := _unfit(a, b):
            return f"{reason}; {name} is {a} by {b}"
        if has_blocks(a) and (reason := _lacks_blocks(device)):
            return f"{reason}; {name} is {a} by {b}"
    return None


def exactness(recipe: Recipe) -> str:
    """Every operand is the recipe's own, and every product exact before it is added up."""
    return "exact"


# ---------------------------------------------------------------------------- casts


def _quantize(x: Tensor, cast: Cast) -> Operand:
    """x [M, K] quantized along K, in plain PyTorch."""
    blocks, scales = quantize_blocks(x.contiguous(), cast), None
    values, factor = blocks.values(), 1.0
    if is_nvfp4(cast) and not one_scale(cast):
        factor = ROUNDED_FACTOR
    elif has_blocks(cast):
        values = replace(blocks, scales=None).values()
        scales = blocks.scales[:, 0, :, 0].repeat_interleave(BLOCK if cast.square else 1, 0)[: x.shape[0]]
    return Operand((values / factor).to(_dtype(cast)).contiguous(), scales, blocks.tensor_scale * factor, cast)


def _dtype(cast: Cast) -> torch.dtype:
    """Of the values: the element's own if it is FP8."""
    return cast.block_format.element.dtype or E4M3.dtype


def cast_both(
    x: Tensor, row: Cast | None, col: Cast | None, signs: Tensor | None = None
) -> tuple[Operand | None, Operand | None]:
    """x along K and xᵀ along M, by the Triton kernels where they run and know the cast."""
    if row is None and col is None:
        return None, None
    if x.shape[1] % MULTIPLE:
        raise ValueError(f"FP8 operands are made of [M, K] with K a multiple of 16, not {tuple(x.shape)}; pad it")
    return bf16.by_kernels_or_torch(_by_kernels, _by_torch, x, (row, col), False, signs)


def _by_torch(x: Tensor, row: Cast | None, col: Cast | None, keep_col: bool) -> tuple:
    return row and _quantize(x, row), col and _quantize(transposed(x, col), col)


def _by_kernels(x: Tensor, row: Cast | None, col: Cast | None, signs: Tensor | None) -> tuple:
    rows, columns = bf16.kernels.quantize_both(x, row, written(row), col, written(col), signs)
    return row and operand(rows, row), col and operand(columns, col)


def written(cast: Cast | None) -> int:
    """What the kernels write for a cast."""
    if cast is None:
        return bf16.kernels.ops.NOTHING
    return bf16.kernels.ops.FP8 if is_nvfp4(cast) else bf16.kernels.ops.CODES


def operand(written: list[Tensor | None], cast: Cast) -> Operand:
    """What the kernels wrote: data, block scales, FP32 scale."""
    values, scales, scale = written
    return Operand(values.view(_dtype(cast)), scales, scale, cast)


def _exact(cast: Cast) -> bool:
    return one_scale(cast) or has_blocks(cast)


def cast(x: Tensor, row: Cast | None = None, col: Cast | None = None, keep_col: bool = False, signs=None):
    """x [M, K] quantized along K by `row`, xᵀ along M by `col`; None where not asked for.

    What is kept for backward is the FP8 operand itself: half of BF16's bytes, and no work before it is multiplied.
    """
    ours, other = partial(cast_both, signs=signs), partial(bf16.cast, signs=signs)
    return cast_where(_exact, ours, other, x, (row, col), keep_col)


def operand_of(q: QuantizedTensor, across: bool = False) -> Operand:
    """NVFP4 codes that were cast before as FP8 values, or their transpose."""
    values, factor = bf16.operand_of(q, across).values, 1.0 if one_scale(q.cast) else ROUNDED_FACTOR
    return Operand((values / factor).to(E4M3.dtype).contiguous(), None, q.tensor_scale * factor, q.cast)


# ---------------------------------------------------------------------------- the product


def _check_pair(a, b) -> None:
    """ValueError unless FP8 tensor cores multiply these two operands."""
    if not (isinstance(a, Operand) and isinstance(b, Operand)) or (a.scales is None) != (b.scales is None):
        raise ValueError(f"FP8 tensor cores have no GEMM of {a.cast} by {b.cast}; use backend='bf16'")
    if a.values.dtype == b.values.dtype == E5M2.dtype or a.scales is not None and a.cast.square and b.cast.square:
        raise ValueError(f"cuBLAS has no GEMM of {a.cast} by {b.cast}; use backend='bf16'")
    if a.values.shape[1] != b.values.shape[1]:
        raise ValueError(f"operands of K={a.values.shape[1]} and {b.values.shape[1]} do not multiply")
    if b.values.shape[0] % MULTIPLE:
        raise ValueError(f"an FP8 GEMM gives results of a multiple of {MULTIPLE} columns, not {b.values.shape[0]}")


def multiply(a, b, dtype: torch.dtype, bias: Tensor | None = None) -> Tensor:
    """[M, K] @ [N, K].T, accumulated in FP32, scaled, the bias added, rounded once to dtype.

    Raises:
        ValueError: operands that FP8 tensor cores don't multiply, with different K, or N not a multiple of 16.
    """
    if not isinstance(a, Operand) and not isinstance(b, Operand):
        return bf16.multiply(a, b, dtype, bias)
    _check_pair(a, b)
    if a.scales is not None:
        return finished(_multiply_blocks(a, b, dtype if bias is None else torch.float32), None, None, bias, dtype)
    inner, outer = inner_and_outer(a.scale, b.scale)
    if outer == [None, None] and (bias is None or bias.dtype == dtype != torch.float32):
        return _scaled_mm(a, b, a.scale, b.scale, dtype, bias)
    return finished(_scaled_mm(a, b, *inner, torch.float32, None), *outer, bias, dtype)


def _scaled_mm(a: Operand, b: Operand, scale_a: Tensor, scale_b: Tensor, dtype: torch.dtype, bias: Tensor | None):
    """scale_a · scale_b · a @ b.T + bias in dtype. The scales must be tensors of their own: at a view's odd address
    cuBLAS fails. A bias is added in FP32 if it has the result's type, 16 bits; torch takes no other."""
    return torch._scaled_mm(a.values, b.values.T, scale_a, scale_b, bias=bias, out_dtype=dtype, use_fast_accum=False)


# ---------------------------------------------------------------------------- the product of blocks


# An operator of our own: torch's checks for tracing take no ragged blocks, and inductor of torch 2.11 no such scales.
@torch.library.custom_op("hf_nvfp4::fp8_block_scaled_mm", mutates_args=())
def _block_scaled_mm(
    a: Tensor, a_scales: Tensor, a_square: bool, b: Tensor, b_scales: Tensor, b_square: bool, dtype: torch.dtype
) -> Tensor:
    """a @ b.T with FP32 scales of 1×128 or 128×128 blocks, laid out as `_laid_out` does."""
    kinds = [ScalingType.BlockWise128x128 if square else ScalingType.BlockWise1x128 for square in (a_square, b_square)]
    return F.scaled_mm(a, b.T, a_scales, kinds[0], b_scales, kinds[1], output_dtype=dtype, use_fast_accum=False)


@_block_scaled_mm.register_fake
def _(a, a_scales, a_square, b, b_scales, b_square, dtype):
    return a.new_empty(a.shape[0], b.shape[0], dtype=dtype)


def _multiply_blocks(a: Operand, b: Operand, dtype: torch.dtype) -> Tensor:
    """a @ b.T of operands with block scales."""
    product = _block_scaled_mm(*_laid_out(a), *_laid_out(b), dtype)
    m, n = a.values.shape[0], b.values.shape[0]
    return product if product.shape == (m, n) else product[:m, :n].contiguous()


def _laid_out(x: Operand) -> tuple[Tensor, Tensor, bool]:
    """Values and block scales as cuBLAS reads them, zeros up to whole blocks (1×128: 16 rows), and whether square.

    Scales of 1×128: [M, K/128], of 128×128: [K/128 padded to 4, M/128], both contiguous along the first dimension.
    """
    m, k = x.values.shape
    square = x.cast.square
    below, right = -m % (BLOCK if square else MULTIPLE), -k % BLOCK
    values, scales = x.values, x.scales
    if below or right:
        values = F.pad(values.view(torch.uint8), (0, right, 0, below)).view(values.dtype)
    if square:
        return values, F.pad(scales[::BLOCK], (0, -scales.shape[1] % 4)).contiguous().T, True
    return values, F.pad(scales, (0, 0, 0, below)).T.contiguous().T, False
