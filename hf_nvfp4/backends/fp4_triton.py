"""Backend `fp4_triton`: the operands of backend `fp4`, multiplied by our own Triton kernel instead of cuBLAS.

FP4 tensor cores where there are some (compiled and layout-verified, not run on hardware); on GPUs since Ampere the
kernel decodes the same operands to BF16, exactly. Slower than backend `bf16` there: it is the way to run packed
operands, and to check them, on any GPU.
"""

import importlib.util

import torch
from torch import Tensor

from hf_nvfp4.backends import bf16, fp4
from hf_nvfp4.language import Recipe

cast, operand_of = fp4.cast, fp4.operand_of


def supports(recipe: Recipe, device: torch.device) -> str | None:
    """Recipes of NVFP4 and BF16 GEMMs, on NVIDIA GPUs that multiply BF16, where Triton is installed."""
    if reason := fp4.unfit(recipe):
        return reason
    if device.type != "cuda" or not torch.version.cuda:
        return "needs an NVIDIA GPU"
    if importlib.util.find_spec("triton") is None:
        return "needs Triton, which is not installed"
    return bf16.supports(recipe, device)


def exactness(recipe: Recipe) -> str:
    """Every product is the recipe's own."""
    return "exact; on FP4 tensor cores compiled and layout-verified, not run on hardware"


def multiply(a, b, dtype: torch.dtype, bias: Tensor | None = None) -> Tensor:
    """[M, K] @ [N, K].T, accumulated in FP32, scaled, the bias added, rounded once to dtype."""
    if not isinstance(a, fp4.Operand) and not isinstance(b, fp4.Operand):
        return bf16.multiply(a, b, dtype, bias)
    fp4.check_pair(a, b)
    # Not at the top: the package imports where Triton is not installed.
    from hf_nvfp4.ops.dot_scaled import fp4_matmul

    return fp4_matmul(*a.tensors, *b.tensors, bias, dtype)
