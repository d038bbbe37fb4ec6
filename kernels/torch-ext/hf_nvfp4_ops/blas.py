"""A BF16 GEMM whose factor on the product is a number in GPU memory, by cuBLAS.

torch.mm takes no such factor: a tensor scale would cost another pass over the output, or a wait for the GPU. cuBLAS
reads its alpha from the device if told to. torch has loaded the library; this calls it on torch's handle and stream.
"""

import ctypes

import torch
from torch import Tensor

_TYPES = {torch.bfloat16: 14, torch.float32: 0}  # cudaDataType_t
_COMPUTE_32F = 68
_DEFAULT_ALGORITHM = -1
_HOST, _DEVICE = 0, 1
_NO_BF16_PARTIAL_SUMS = 16  # CUBLAS_MATH_DISALLOW_REDUCED_PRECISION_REDUCTION


def _library() -> ctypes.CDLL | None:
    """cuBLAS as torch loaded it, or None."""
    if not torch.version.cuda:
        return None
    major = torch.version.cuda.split(".")[0]
    for name in (f"libcublas.so.{major}", f"cublas64_{major}.dll"):
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    return None


_BLAS = _library()


def unfit(a: Tensor, b: Tensor, dtype: torch.dtype) -> str | None:
    """Why `matmul` can't multiply these, or None."""
    if not (a.is_cuda and a.device == b.device):
        return "operands are not on one GPU"
    if a.dtype != torch.bfloat16 or b.dtype != torch.bfloat16 or dtype not in _TYPES:
        return f"{a.dtype} · {b.dtype} -> {dtype}"
    if _BLAS is None:
        return "cuBLAS was not found"
    if max(*a.shape, *b.shape) >= 2**31 or not min(*a.shape, *b.shape):
        return "sizes beyond 32 bits, or empty"
    if _layout(a) is None or _layout(b) is None:
        return "operands are not contiguous along either dimension"
    return None


def _layout(x: Tensor) -> tuple[bool, int] | None:
    """(whether the last dimension is contiguous, the other's stride), or None."""
    for last, (inner, outer) in ((True, (1, 0)), (False, (0, 1))):
        if (x.stride(inner) == 1 or x.shape[inner] == 1) and x.stride(outer) >= x.shape[inner]:
            return last, x.stride(outer)
    return None


def matmul(a: Tensor, b: Tensor, factors: Tensor, out: Tensor) -> None:
    """out [M, N] = factors[0] · a [M, K] @ b [N, K].T + factors[1] · out; factors FP32 [2] on the GPU.

    a, b: BF16, contiguous along either dimension; out: contiguous BF16 or FP32. FP32 accumulation.

    Raises:
        RuntimeError: cuBLAS refuses, with its status.
    """
    (a_last, a_stride), (b_last, b_stride) = _layout(a), _layout(b)
    handle = ctypes.c_void_p(torch.cuda.current_blas_handle())
    pointers = [ctypes.c_void_p(t.data_ptr()) for t in (a, b, out)]
    alpha, beta = (ctypes.c_void_p(factors.data_ptr() + 4 * i) for i in range(2))
    _BLAS.cublasSetPointerMode_v2(handle, _DEVICE)
    _BLAS.cublasSetMathMode(handle, _NO_BF16_PARTIAL_SUMS)
    try:
        # Column-major: outᵀ [N, M] = b · aᵀ.
        status = _BLAS.cublasGemmEx(
            handle, int(b_last), int(not a_last), b.shape[0], a.shape[0], a.shape[1], alpha,
            pointers[1], _TYPES[b.dtype], b_stride, pointers[0], _TYPES[a.dtype], a_stride,
            beta, pointers[2], _TYPES[out.dtype], out.shape[1], _COMPUTE_32F, _DEFAULT_ALGORITHM,
        )  # fmt: skip
    finally:
        _BLAS.cublasSetPointerMode_v2(handle, _HOST)
        _BLAS.cublasSetMathMode(handle, 0)
    if status:
        raise RuntimeError(
            f"cublasGemmEx failed with status {status} for [{a.shape[0]}, {a.shape[1]}] @ "
            f"[{b.shape[0]}, {b.shape[1]}].T -> {out.dtype}"
        )
