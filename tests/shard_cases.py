"""Operands of a shard beside those of the whole, for the processes of distributed_jobs.py."""

import dataclasses

import torch
from torch import distributed as dist

from hf_nvfp4 import RECIPES
from hf_nvfp4.backends import BACKENDS, bf16, reference
from hf_nvfp4.gemm import cast, draw_signs
from hf_nvfp4.language import Gemm
from hf_nvfp4.tensor_parallel import Shards, sharded

T = 16  # tokens
SIZE, SMALL = 256, 32  # features of either side; for casts by kernels in Triton's interpreter
# Which dimension of an operand, as a GEMM takes it, a split weight splits; None: neither.
AXES = {
    0: {"x_row": None, "w_row": 0, "dy_row": 1, "w_col": 1, "dy_col": 0, "x_col": None},
    1: {"x_row": 1, "w_row": 1, "dy_row": None, "w_col": 0, "dy_col": None, "x_col": 0},
}


def to_nearest(recipe):
    """Random numbers count rows and columns from a shard's own first one."""
    gemms = {
        name: Gemm(*(dataclasses.replace(c, rounding="nearest") for c in gemm)) for name, gemm in recipe.gemms.items()
    }
    return dataclasses.replace(recipe, **gemms)


def operands(recipe, backend, x, w, dy) -> dict:
    """All six of a layer, dequantized."""
    torch.manual_seed(7)
    fprop, dgrad, wgrad = (draw_signs(gemm, x.device) for gemm in recipe.gemms.values())
    x_row, x_col = cast(
        x, backend, row=recipe.fprop.a, col=recipe.wgrad.b, keep_col=True, row_signs=fprop, col_signs=wgrad
    )
    w_row, _ = cast(w, backend, row=recipe.fprop.b, row_signs=fprop)
    _, w_col = cast(w, backend, col=recipe.dgrad.b, col_signs=dgrad)
    dy_row, dy_col = cast(dy, backend, row=recipe.dgrad.a, col=recipe.wgrad.a, row_signs=dgrad, col_signs=wgrad)
    found = {"x_row": x_row, "w_row": w_row, "dy_row": dy_row, "w_col": w_col, "dy_col": dy_col, "x_col": x_col}
    return {name: operand.dequantize(torch.float32) for name, operand in found.items()}


def tensors(size: int):
    """x, w, dy, with what is largest in the last shard along either dimension."""
    generator = torch.Generator().manual_seed(1)
    found = [torch.randn(rows, size, generator=generator) for rows in (T, size, T)]
    for tensor in found:
        tensor[-1, -1] = 9.0
    return found


def mismatches(rank: int) -> dict:
    """(recipe, mode, dimension, backend) -> the operands of this rank that are not those of the whole, or an error."""
    recipes = RECIPES.values()
    cases = [(recipe, mode, dim, "reference") for recipe in recipes for mode in ("train", "eval") for dim in (0, 1)]
    found = {(recipe.name, *case): _compare(rank, recipe, *case, SIZE) for recipe, *case in cases}
    bf16.KERNEL_DEVICES.add("cpu")
    for mode, dim in (("train", 0), ("eval", 1)):
        found["nvfp4", mode, dim, "bf16"] = _compare(rank, RECIPES["nvfp4"], mode, dim, "bf16", SMALL)
    bf16.KERNEL_DEVICES.remove("cpu")
    return found


def _compare(rank: int, recipe, mode: str, dim: int, backend: str, size: int) -> list[str] | str:
    recipe = to_nearest(recipe.fitted(size, size))
    recipe, backend = recipe if mode == "train" else recipe.per_token(), BACKENDS[backend]
    try:
        local = sharded(recipe, Shards(dist.group.WORLD.group_name, 2, dim), size, size)
    except ValueError as error:
        return str(error)
    whole = tensors(size)
    # x is whole where w's rows are split, dy where its columns are.
    axes = (None, 0, 1) if dim == 0 else (1, 1, None)
    parts = [_part(tensor, axis, rank) for tensor, axis in zip(whole, axes, strict=True)]
    expected, found = operands(recipe, backend, *whole), operands(local, backend, *parts)
    return [name for name in found if not torch.equal(found[name], _part(expected[name], AXES[dim][name], rank))]


def _part(tensor, axis: int | None, rank: int):
    return tensor if axis is None else tensor.chunk(2, axis)[rank]


def nan_everywhere(rank: int) -> bool:
    """Whether a NaN in the first rank's shard makes all of this rank's."""
    w = tensors(SMALL)[1].chunk(2, 0)[rank].clone()
    if rank == 0:
        w[0, 0] = torch.nan
    recipe = sharded(to_nearest(RECIPES["nvfp4"]), Shards(dist.group.WORLD.group_name, 2, 0), SMALL, SMALL)
    return cast(w, reference, row=recipe.fprop.b)[0].dequantize(torch.float32).isnan().all().item()
