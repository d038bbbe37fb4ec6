"""Casts an operand and multiplies two of them, on the backend that fits, or says why none does."""

from types import ModuleType

import torch
from torch import Tensor

from hf_nvfp4.backends import BACKENDS, BY_NAME_ONLY
from hf_nvfp4.casts import Cast, unknown
from hf_nvfp4.language import Gemm, Recipe, RecipeMap
from hf_nvfp4.rounding import draw_seed


def check_backend(name: str) -> None:
    """ValueError unless `name` is a backend or "auto"."""
    if name != "auto" and name not in BACKENDS:
        raise unknown("backend", name, ["auto", *BACKENDS])


def backend_name(name: str, recipe: Recipe, device: torch.device) -> str:
    """The backend that runs `recipe` on `device`: the named one, or the first that can for "auto".

    A recipe that quantizes nothing runs on "bf16" then, whatever the GPU.

    Raises:
        ValueError: unknown name, or no backend fits; says what each one lacks.
    """
    check_backend(name)
    refusals = {}
    automatic = [candidate for candidate in BACKENDS if candidate not in BY_NAME_ONLY]
    if all(operand.block_format.high_precision for gemm in recipe.gemms.values() for operand in gemm):
        automatic = automatic[automatic.index("bf16") :]
    for candidate in automatic if name == "auto" else (name,):
        reason = BACKENDS[candidate].supports(recipe, device)
        if reason is None:
            return candidate
        refusals[candidate] = reason
    reasons = "; ".join(f"backend {candidate!r} {reason}" for candidate, reason in refusals.items())
    fitting = [other for other in automatic if BACKENDS[other].supports(recipe, device) is None]
    advice = f"Use backend={fitting[0]!r}." if fitting else "Move the model to another device."
    gpu = f" ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else ""
    raise ValueError(f"recipe {recipe.name!r} does not run on {device}{gpu}: {reasons}. {advice}")


def backend_names(name: str, recipe: Recipe | RecipeMap, device: torch.device) -> str:
    """`backend_name` of a recipe, or of all in a map: "fp8 and bf16"."""
    return " and ".join(dict.fromkeys(backend_name(name, member, device) for member in recipe.members))


def backend_for(name: str, recipe: Recipe, device: torch.device) -> ModuleType:
    """The module of `backend_name`."""
    return BACKENDS[backend_name(name, recipe, device)]


def draw_signs(gemm: Gemm, device: torch.device) -> Tensor | None:
    """A fresh seed, int32 [2], of the signs with which both operands of a GEMM are rotated; None if they are fixed.

    From torch's default generator; the same on ranks that were seeded alike, so that parts of an operand on different
    ranks (tensor parallelism) are rotated alike.
    """
    return draw_seed(device, by_rank=False) if gemm.a.signs == "random" else None


def cast(
    x: Tensor,
    backend: ModuleType,
    *,
    row: Cast | None = None,
    col: Cast | None = None,
    keep_col: bool = False,
    row_signs: Tensor | None = None,
    col_signs: Tensor | None = None,
):
    """x [M, K] quantized along K by `row`, and xᵀ [K, M] along M by `col`; None where not asked for.

    M is padded with zeros to the multiple that col's blocks and rotation need.
    keep_col: return the second packed, to be saved for the backward pass.
    row_signs, col_signs: `draw_signs` of the GEMMs that they are operands of.
    """
    for how, signs in ((row, row_signs), (col, col_signs)):
        if how is not None and (how.signs == "random") != (signs is not None):
            raise ValueError(f"{how} {'needs' if signs is None else 'takes no'} drawn signs")
    if row_signs is None and col_signs is None:
        return backend.cast(x, row, col, keep_col)
    a = None if row is None else backend.cast(x, row, None, False, row_signs)[0]
    b = None if col is None else backend.cast(x, None, col, keep_col, col_signs)[1]
    return a, b


def multiply(a, b, backend: ModuleType, dtype: torch.dtype, bias: Tensor | None = None) -> Tensor:
    """Operands [M, K] and [N, K] -> a @ b.T + bias [M, N] in dtype, accumulated in FP32 or better."""
    return backend.multiply(a, b, dtype, bias)
