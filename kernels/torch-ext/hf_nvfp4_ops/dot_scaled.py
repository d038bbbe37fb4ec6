"""A GEMM of two packed NVFP4 operands: FP4 tensor cores where there are some, exact BF16 products elsewhere.

Knows packed codes, swizzled E4M3 block scales and FP32 scales above them; knows nothing of recipes or casts.
With `tl.dot_scaled` Triton emits tcgen05.mma (sm_100) or mma.sync (sm_120) of kind mxf4nvf4; elsewhere the kernel
multiplies code and scale out into BF16 itself, which is exact. Triton's interpreter gets neither (its dot_scaled takes
every scale for E8M0, its dot multiplies BF16 as integers): there the operands are FP32, and all else is the same.
Compiled, and its layout checked; not yet run on a GPU with FP4 tensor cores.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import on
from .numerics import swizzled_at
from .spec import NAMESPACE
from .variants import Variant

TILE_M, TILE_N = 128, 128
# By what is multiplied. Codes decoded in registers leave room for few columns.
TILE_K = {"fp4": 128, "bf16": 32, "fp32": 32}
# tl.dot_scaled with E4M3 scales on Hopper: an older Triton's compiler fails, or takes the process with it.
DOT_SCALED_ON_HOPPER = (3, 9)


@triton.jit
def _e2m1(nibble):
    """FP32 value of a 4-bit code in the low bits of an integer."""
    magnitude = (nibble & 7).to(tl.int32)
    normal = ((magnitude << 22) + (126 << 23)).to(tl.float32, bitcast=True)
    value = tl.where(magnitude < 2, magnitude.to(tl.float32) * 0.5, normal)
    return tl.where(nibble < 8, value, -value)


@triton.jit
def _e4m3(byte):
    """FP32 value of an E4M3 code without a sign, by integers: sm_80 has no such type."""
    code = byte.to(tl.int32)
    normal = ((code << 20) + (120 << 23)).to(tl.float32, bitcast=True)
    value = tl.where(code < 8, code.to(tl.float32) * 0.001953125, normal)
    return tl.where(code == 127, float("nan"), value)


@triton.jit
def _repeat_scales(scales, ROWS: tl.constexpr, BLOCKS: tl.constexpr):
    """[ROWS, BLOCKS] -> FP32 [ROWS, 8 * BLOCKS]: one for each byte of two codes."""
    wide = tl.broadcast_to(_e4m3(scales)[:, :, None], (ROWS, BLOCKS, 8))
    return tl.reshape(wide, (ROWS, 8 * BLOCKS))


@triton.jit
def _dot(a, b, product, PRODUCTS: tl.constexpr):
    """product + a bᵀ of FP32 values that BF16 holds exactly."""
    if PRODUCTS == "bf16":
        return tl.dot(a.to(tl.bfloat16), b.to(tl.bfloat16).T, product)
    else:
        return tl.dot(a, b.T, product, input_precision="ieee")


@triton.jit
def _fp4_matmul(
    a_ptr, a_scale_ptr, a_outer_ptr, b_ptr, b_scale_ptr, b_outer_ptr, bias_ptr, y_ptr, m, n, k_bytes, padded_blocks,
    PRODUCTS: tl.constexpr, A_OUTER_ROWS: tl.constexpr, B_OUTER_ROWS: tl.constexpr, BIAS: tl.constexpr,
    TILE_M: tl.constexpr, TILE_N: tl.constexpr, TILE_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """One TILE_M × TILE_N tile of y = a bᵀ. Programs walk down GROUP tiles of rows at a time, so that b stays in L2."""
    tiles_m, tiles_n = tl.cdiv(m, TILE_M), tl.cdiv(n, TILE_N)
    program = tl.program_id(0)
    first = program // (GROUP * tiles_n) * GROUP
    height = tl.minimum(tiles_m - first, GROUP)
    tile_m = first + program % (GROUP * tiles_n) % height
    tile_n = program % (GROUP * tiles_n) // height

    rows_a = tile_m * TILE_M + tl.arange(0, TILE_M)
    rows_b = tile_n * TILE_N + tl.arange(0, TILE_N)
    product = tl.zeros((TILE_M, TILE_N), tl.float32)
    for k in range(0, tl.cdiv(k_bytes, TILE_K // 2)):
        byte = k * (TILE_K // 2) + tl.arange(0, TILE_K // 2)
        block = k * (TILE_K // 16) + tl.arange(0, TILE_K // 16)
        in_k = (byte < k_bytes)[None, :]
        a_at = rows_a.to(tl.int64)[:, None] * k_bytes + byte[None, :]
        b_at = rows_b.to(tl.int64)[:, None] * k_bytes + byte[None, :]
        a = tl.load(a_ptr + a_at, mask=(rows_a < m)[:, None] & in_k, other=0)
        b = tl.load(b_ptr + b_at, mask=(rows_b < n)[:, None] & in_k, other=0)
        # Scales are padded to whole tiles of rows, of blocks only to a multiple of 4.
        has_scale = (block < padded_blocks)[None, :]
        a_scale = tl.load(a_scale_ptr + swizzled_at(rows_a, block, padded_blocks // 4), mask=has_scale, other=0)
        b_scale = tl.load(b_scale_ptr + swizzled_at(rows_b, block, padded_blocks // 4), mask=has_scale, other=0)
        if PRODUCTS == "fp4":
            a_scale = a_scale.to(tl.float8e4nv, bitcast=True)
            b_scale = b_scale.to(tl.float8e4nv, bitcast=True)
            product = tl.dot_scaled(a, a_scale, "e2m1", b.T, b_scale, "e2m1", product)
        else:
            # The order of a sum is free: all even columns, then all odd ones.
            a_by = _repeat_scales(a_scale, TILE_M, TILE_K // 16)
            b_by = _repeat_scales(b_scale, TILE_N, TILE_K // 16)
            product = _dot(_e2m1(a & 15) * a_by, _e2m1(b & 15) * b_by, product, PRODUCTS)
            product = _dot(_e2m1(a >> 4) * a_by, _e2m1(b >> 4) * b_by, product, PRODUCTS)

    if A_OUTER_ROWS:
        product *= tl.load(a_outer_ptr + rows_a, mask=rows_a < m, other=0.0)[:, None]
    else:
        product *= tl.load(a_outer_ptr)
    if B_OUTER_ROWS:
        product *= tl.load(b_outer_ptr + rows_b, mask=rows_b < n, other=0.0)[None, :]
    else:
        product *= tl.load(b_outer_ptr)
    if BIAS:
        product += tl.load(bias_ptr + rows_b, mask=rows_b < n, other=0.0).to(tl.float32)[None, :]
    y_at = rows_a.to(tl.int64)[:, None] * n + rows_b[None, :]
    tl.store(y_ptr + y_at, product.to(y_ptr.dtype.element_ty), mask=(rows_a < m)[:, None] & (rows_b < n)[None, :])


def _products(device: torch.device) -> str:
    """What the kernel multiplies: "fp4" by `tl.dot_scaled` where that compiles to good code, or decoded values."""
    if not isinstance(_fp4_matmul, triton.runtime.JITFunction):
        return "fp32"
    if device.type != "cuda":
        raise ValueError(f"fp4_matmul runs on CUDA devices and, with TRITON_INTERPRET=1, on the CPU; not on {device}")
    capability = torch.cuda.get_device_capability(device)
    version = tuple(int(part) for part in triton.__version__.split(".")[:2])
    return "fp4" if capability >= (10, 0) or capability >= (9, 0) and version >= DOT_SCALED_ON_HOPPER else "bf16"


def _padded_blocks(k_bytes: int) -> int:
    """Scales of one row: one for 8 bytes of codes, padded to a multiple of 4."""
    return triton.cdiv(triton.cdiv(k_bytes, 8), 4) * 4


def _check_operand(name: str, codes: Tensor, scales: Tensor, outer: Tensor) -> None:
    if codes.dtype != torch.uint8 or codes.dim() != 2 or not codes.is_contiguous():
        raise ValueError(f"{name}: codes are contiguous uint8 [rows, K/2], not {codes.dtype} {tuple(codes.shape)}")
    if codes.shape[1] % 8:
        raise ValueError(f"{name}: K={2 * codes.shape[1]} is not a multiple of 16; pad it with zeros")
    expected = triton.cdiv(codes.shape[0], 128) * 128 * _padded_blocks(codes.shape[1])
    if scales.dtype != torch.float8_e4m3fn or scales.numel() != expected or not scales.is_contiguous():
        raise ValueError(
            f"{name}: block scales are {expected} swizzled float8_e4m3fn for codes {tuple(codes.shape)}, "
            f"not {scales.numel()} of {scales.dtype}"
        )
    if outer.dtype != torch.float32 or outer.numel() not in (1, codes.shape[0]) or not outer.is_contiguous():
        raise ValueError(f"{name}: the outer scale is one FP32 number, or one a row, not {outer.dtype} {outer.shape}")


def _check(a: tuple[Tensor, Tensor, Tensor], b: tuple[Tensor, Tensor, Tensor], bias: Tensor | None) -> None:
    """ValueError unless these (codes, scales, outer scale) can be multiplied."""
    _check_operand("a", *a)
    _check_operand("b", *b)
    if a[0].shape[1] != b[0].shape[1]:
        raise ValueError(f"a has K={2 * a[0].shape[1]} and b K={2 * b[0].shape[1]}: they are contracted over K")
    devices = {t.device for t in (*a, *b, bias) if t is not None}
    if len(devices) > 1:
        raise ValueError(f"the operands are on several devices: {', '.join(sorted(map(str, devices)))}")
    if bias is not None and bias.shape != (len(b[0]),):
        raise ValueError(f"the bias of {len(b[0])} columns has shape ({len(b[0])},), not {tuple(bias.shape)}")


@torch.library.custom_op(f"{NAMESPACE}::fp4_matmul", mutates_args=())
def fp4_matmul(
    a: Tensor, a_scales: Tensor, a_outer: Tensor, b: Tensor, b_scales: Tensor, b_outer: Tensor,
    bias: Tensor | None, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """a [M, K] @ b [N, K].T * a_outer * b_outer + bias, accumulated in FP32, rounded once to dtype.

    Args:
        a, b: uint8 [M, K/2] and [N, K/2] codes, the even column in the low nibble; K a multiple of 16.
        a_scales, b_scales: float8_e4m3fn, one for 16 columns, padded to 128 × 4 tiles and swizzled, any shape.
        a_outer, b_outer: FP32 scales above them, of one element or of one a row.
        bias: [N] or None. dtype: of the result.

    Raises:
        ValueError: operands of other types or sizes, or not all on one device.
    """
    _check((a, a_scales, a_outer), (b, b_scales, b_outer), bias)
    m, n = a.shape[0], b.shape[0]
    y = torch.empty(m, n, dtype=dtype, device=a.device)
    tiles = triton.cdiv(m, TILE_M) * triton.cdiv(n, TILE_N)
    products = _products(a.device)
    if not tiles:
        return y
    with on(a.device):
        _fp4_matmul[(tiles,)](
            a, a_scales.view(torch.uint8), a_outer, b, b_scales.view(torch.uint8), b_outer, bias, y,
            m, n, a.shape[1], _padded_blocks(a.shape[1]),
            PRODUCTS=products, A_OUTER_ROWS=a_outer.numel() > 1, B_OUTER_ROWS=b_outer.numel() > 1,
            BIAS=bias is not None, TILE_M=TILE_M, TILE_N=TILE_N, TILE_K=TILE_K[products], GROUP=8,
            num_warps=8, num_stages=3,
        )  # fmt: skip
    return y


@fp4_matmul.register_fake
def _(a, a_scales, a_outer, b, b_scales, b_outer, bias, dtype):
    return a.new_empty(a.shape[0], b.shape[0], dtype=dtype)


_TYPES = {
    **{f"{x}{part}_ptr": f"*{t}" for x in "ab" for part, t in (("", "u8"), ("_scale", "u8"), ("_outer", "fp32"))},
    "y_ptr": "*bf16", "m": "i32", "n": "i32", "k_bytes": "i32", "padded_blocks": "i32",
}  # fmt: skip
_CONSTEXPRS = {
    "A_OUTER_ROWS": False, "B_OUTER_ROWS": False, "BIAS": False, "bias_ptr": None,
    "TILE_M": TILE_M, "TILE_N": TILE_N, "GROUP": 8,
}  # fmt: skip
_OPTIONS = {"num_warps": 8, "num_stages": 3}

VARIANTS = [
    Variant(
        "fp4_matmul_dot_scaled",
        _fp4_matmul,
        _TYPES,
        {**_CONSTEXPRS, "PRODUCTS": "fp4", "TILE_K": TILE_K["fp4"]},
        options=_OPTIONS,
        divisible=("n", "k_bytes"),
        min_arch=90,
        min_triton={90: DOT_SCALED_ON_HOPPER},
        expect={
            90: r"wgmma\.mma_async\.\S*bf16",
            # The PTX manual has two spellings for a scale per 16: block16 and the older scale_vec::4X.
            100: r"tcgen05\.mma\.\S*kind::mxf4nvf4\.block_scale\.(block16|scale_vec::4X)",
            120: r"mma\.sync\.\S*kind::mxf4nvf4\.block_scale\.scale_vec::4X\.f32\.e2m1\.e2m1\.f32\.ue4m3",
        },
    ),
    Variant(
        "fp4_matmul_bf16",
        _fp4_matmul,
        _TYPES,
        {**_CONSTEXPRS, "PRODUCTS": "bf16", "TILE_K": TILE_K["bf16"]},
        options=_OPTIONS,
        divisible=("n", "k_bytes"),
        expect={80: r"mma\.sync\.\S*bf16", 89: r"mma\.sync\.\S*bf16", 90: r"wgmma\.mma_async\.\S*bf16"},
    ),
]
