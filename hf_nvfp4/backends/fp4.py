"""Backend `fp4`: NVFP4 GEMMs on Blackwell's FP4 tensor cores, by `torch.nn.functional.scaled_mm`.

Operands are packed E2M1 codes, E4M3 block scales in the swizzled layout of cuBLAS (128 × 4 tiles) and an FP32 tensor
scale. A scale of each row, which such a GEMM does not take, multiplies its FP32 result. GEMMs of two BF16 operands go
to backend `bf16`; a pair of one FP4 and one other operand has no hardware.

The casts are Triton kernels on a GPU (hf_nvfp4.ops), the reference elsewhere, and give the same bits, but for
stochastic rounding by hardware where the environment has HF_NVFP4_CVT_RS=1. Compiled and layout-verified, not run on
hardware.
"""

from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.functional import ScalingType, SwizzleType

from hf_nvfp4.backends import bf16
from hf_nvfp4.backends.operand import cast_where, finished, inner_and_outer, transposed
from hf_nvfp4.casts import Cast
from hf_nvfp4.formats import E2M1, E4M3
from hf_nvfp4.language import Recipe
from hf_nvfp4.reference import Packed, QuantizedTensor, pack, quantize_blocks

CAPABILITIES = ((10, 0), (12, 0))
# cuBLAS wants rows of codes in multiples of 16 bytes (K: 32), torch rows of the result in multiples of 16 (N).
CODE_BYTES = 16
COLUMNS = 16
# A bias is ours to add, in FP32: torch takes none for an FP32 result, and some GPUs' cuBLAS none for NVFP4 at all
# (https://github.com/NVIDIA/CUDALibrarySamples/issues/303).
RESULTS = (torch.bfloat16, torch.float16, torch.float32)


@dataclass
class Operand(Packed):
    """A quantized [M, K] operand.

    codes: uint8 [M, K/2], the even column in the low nibble, zero columns up to a multiple of 32.
    scales: float8_e4m3fn [M, K/16], zeros up to multiples of 128 and 4, swizzled.
    tensor_scale: FP32 scalar, or [M, 1] with per-row scales.
    """

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """[M, K] in dtype, the zero columns with it: the reference's, bit for bit."""
        rows, columns = self.codes.shape
        scales = unswizzle(self.scales, rows, columns // 8)
        return QuantizedTensor(self.codes, scales, self.tensor_scale, self.cast).dequantize(dtype)


# ---------------------------------------------------------------------------- what runs here

def _is_fp4(cast: Cast) -> bool:
    fmt = cast.block_format
    return fmt.element is E2M1 and fmt.scale is E4M3 and fmt.block == 16


def unfit(recipe: Recipe) -> str | None:
    """Why FP4 tensor cores have no GEMMs for a recipe, or None."""
    for name, gemm in recipe.gemms.items():
        if not all(map(_is_fp4, gemm)) and not all(c.block_format.high_precision for c in gemm):
            formats = " by ".join(c.format for c in gemm)
            return f"multiplies nvfp4 by nvfp4 and bf16 by bf16, and {name} is {formats}"
    return None


def supports(recipe: Recipe, device: torch.device) -> str | None:
    """Recipes of NVFP4 and BF16 GEMMs, on GPUs with FP4 tensor cores."""
    wanted = "needs compute capability 10.0 or 12.0"
    if device.type != "cuda" or not torch.version.cuda:
        return f"{wanted} (an NVIDIA GPU of the Blackwell generation)"
    major, minor = torch.cuda.get_device_capability(device)
    if (major, minor) not in CAPABILITIES:
        return f"{wanted}; this GPU is {major}.{minor}"
    return unfit(recipe)


def exactness(recipe: Recipe) -> str:
    """Every product is the recipe's own; no such GPU has run it yet."""
    return "exact; compiled and layout-verified, not run on hardware"


# ---------------------------------------------------------------------------- casts

def swizzle(scales: Tensor) -> Tensor:
    """Block scales [M, C] padded with zeros to multiples of 128 and 4 and laid out as cuBLAS reads them.

    Tiles of 128 × 4 follow each other row by row; in a tile, row r and column c stand at r % 32 · 16 + r // 32 · 4 + c.
    """
    rows, columns = scales.shape
    padded = F.pad(scales.view(torch.uint8), (0, -columns % 4, 0, -rows % 128))
    rows, columns = padded.shape
    tiles = padded.view(rows // 128, 4, 32, columns // 4, 4).permute(0, 3, 2, 1, 4)
    return tiles.reshape(rows, columns).view(scales.dtype)


def unswizzle(scales: Tensor, rows: int, columns: int) -> Tensor:
    """`swizzle` undone: [rows, columns]."""
    tiles = scales.view(-1, scales.shape[1] // 4, 32, 4, 4).permute(0, 3, 2, 1, 4)
    return tiles.reshape(scales.shape)[:rows, :columns]


def _quantize(x: Tensor, cast: Cast) -> Operand:
    """x [M, K] quantized along K, in plain PyTorch."""
    packed = pack(quantize_blocks(x.contiguous(), cast), cast)
    return _operand([packed.codes, swizzle(packed.scales), packed.tensor_scale], cast)


def _cast_both(
    x: Tensor, row: Cast | None, col: Cast | None, signs: Tensor | None = None
) -> tuple[Operand | None, Operand | None]:
    """x along K and xᵀ along M, by the Triton kernels where they run and know the cast."""
    if row is None and col is None:
        return None, None
    if x.shape[1] % 16:
        raise ValueError(f"FP4 operands are made of [M, K] with K a multiple of 16, not {tuple(x.shape)}; pad it")
    return bf16.by_kernels_or_torch(_by_kernels, _by_torch, x, (row, col), False, signs)


def _by_torch(x: Tensor, row: Cast | None, col: Cast | None, keep_col: bool) -> tuple:
    return row and _quantize(x, row), col and _quantize(transposed(x, col), col)


def _by_kernels(x: Tensor, row: Cast | None, col: Cast | None, signs: Tensor | None) -> tuple:
    ops = bf16.kernels.ops
    outs = [ops.CODES_SWIZZLED if c else ops.NOTHING for c in (row, col)]
    rows, columns = bf16.kernels.quantize_both(x, row, outs[0], col, outs[1], signs)
    return row and _operand(rows, row), col and _operand(columns, col)


def _operand(tensors: list[Tensor], cast: Cast) -> Operand:
    codes, scales, tensor_scale = tensors
    if missing := -codes.shape[1] % CODE_BYTES:
        codes = F.pad(codes, (0, missing))
    return Operand(codes, scales.view(E4M3.dtype), tensor_scale, cast)


def cast(x: Tensor, row: Cast | None = None, col: Cast | None = None, keep_col: bool = False, signs=None):
    """x [M, K] quantized along K by `row`, xᵀ along M by `col`; None where not asked for. Packed either way."""
    ours, other = partial(_cast_both, signs=signs), partial(bf16.cast, signs=signs)
    return cast_where(_is_fp4, ours, other, x, (row, col), keep_col)


def operand_of(q: QuantizedTensor, across: bool = False) -> Operand:
    """Codes that were cast before, or their transpose, with scales as cuBLAS reads them."""
    q = q.transposed() if across else q
    return _operand([q.codes, swizzle(q.scales), q.tensor_scale], q.cast)


# ---------------------------------------------------------------------------- the product

# An operator of our own: inductor's lowering of torch's (2.13) knows neither swizzled nor two-level scales.
@torch.library.custom_op("hf_nvfp4::nvfp4_scaled_mm", mutates_args=())
def _scaled_mm(
    a: Tensor, a_scales: Tensor, a_outer: Tensor, b: Tensor, b_scales: Tensor, b_outer: Tensor, dtype: torch.dtype
) -> Tensor:
    """a @ b.T of packed codes, times block and tensor scales, in dtype: the one place that calls torch's."""
    recipe = [ScalingType.BlockWise1x16, ScalingType.TensorWise]
    layout = [SwizzleType.SWIZZLE_32_4_4, SwizzleType.NO_SWIZZLE]
    return F.scaled_mm(
        a.view(torch.float4_e2m1fn_x2),
        b.view(torch.float4_e2m1fn_x2).T,
        [a_scales, a_outer],
        recipe,
        [b_scales, b_outer],
        recipe,
        swizzle_a=layout,
        swizzle_b=layout,
        output_dtype=dtype,
    )


@_scaled_mm.register_fake
def _(a, a_scales, a_outer, b, b_scales, b_outer, dtype):
    return a.new_empty(a.shape[0], b.shape[0], dtype=dtype)


def check_pair(a, b) -> None:
    """ValueError unless the FP4 GEMM takes these two operands."""
    if not (isinstance(a, Operand) and isinstance(b, Operand)):
        raise ValueError(f"FP4 tensor cores have no GEMM of {a.cast.format} by {b.cast.format}; use backend='bf16'")
    if a.codes.shape[1] != b.codes.shape[1]:
        raise ValueError(f"operands of K={2 * a.codes.shape[1]} and {2 * b.codes.shape[1]} (padded) do not multiply")
    if b.codes.shape[0] % COLUMNS:
        raise ValueError(f"an FP4 GEMM gives results of a multiple of {COLUMNS} columns, not {b.codes.shape[0]}")


def multiply(a, b, dtype: torch.dtype, bias: Tensor | None = None) -> Tensor:
    """[M, K] @ [N, K].T, accumulated in FP32, scaled, the bias added, rounded once to dtype.

    Raises:
        ValueError: an FP4 operand with another, different K, or N not a multiple of 16.
    """
    if not isinstance(a, Operand) and not isinstance(b, Operand):
        return bf16.multiply(a, b, dtype, bias)
    check_pair(a, b)
    inner, outer = inner_and_outer(a.tensor_scale, b.tensor_scale)
    if bias is None and outer == [None, None] and dtype in RESULTS:
        return _scaled_mm(*a.tensors, *b.tensors, dtype)
    product = _scaled_mm(a.codes, a.scales, inner[0], b.codes, b.scales, inner[1], torch.float32)
    return finished(product, *outer, bias, dtype)
