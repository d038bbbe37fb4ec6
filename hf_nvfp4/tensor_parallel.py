"""Tensor parallelism: the recipe of a rank that has a shard of a weight.

Column-parallel, w [N/n, K] and dy [T, N/n] are shards and x is whole; row-parallel, w [N, K/n] and x [T, K/n] are
shards and dy is whole. Only a shard's largest magnitude depends on other ranks: it is reduced over them, so that every
rank multiplies the very codes and scales that one process has there. Blocks and rotations lie in one shard, or it is
refused.
"""

import dataclasses
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed import _functional_collectives as collectives
from torch.distributed.tensor import DTensor

from hf_nvfp4.casts import Cast
from hf_nvfp4.language import Gemm, Recipe

# The mesh dimension that Transformers' DistributedConfig names.
TP = "tp"


@dataclass(frozen=True)
class ShardedCast(Cast):
    """A cast of a shard whose FP32 scale covers all shards. group: the name of their ranks' process group."""

    group: str = ""

    def of_all(self, amax: Tensor) -> Tensor:
        """The largest of all ranks, elementwise; NaN if there is one."""
        # As integers, FP32 magnitudes are in the same order, and NaN is above inf: a maximum of floats may lose it.
        bits = amax.contiguous().view(torch.int32) & 0x7FFFFFFF
        return collectives.wait_tensor(collectives.all_reduce(bits, "max", self.group)).view(torch.float32)


class Shards(NamedTuple):
    """How a weight [N, K] is split: over `count` ranks of the process group of that name, along dimension `dim`."""

    group: str
    count: int
    dim: int

    def local(self, in_features: int, out_features: int) -> tuple[int, int]:
        """[N, K] of what one rank has, where the ranks have equal parts."""
        n, k = (size // self.count if dim == self.dim else size for dim, size in enumerate((out_features, in_features)))
        return n, k


def shards_of(weight: Tensor) -> Shards | None:
    """How tensor parallelism has split a parameter; None if it has not. FSDP's shards don't count: it gathers them."""
    if not isinstance(weight, DTensor):
        return None
    names = weight.device_mesh.mesh_dim_names
    if names is None and weight.device_mesh.ndim == 1:  # Transformers' tp_plan="auto", without a config
        index = 0
    elif names and TP in names:
        index = names.index(TP)
    else:
        return None
    placement, count = weight.placements[index], weight.device_mesh.size(index)
    if count == 1 or placement.is_replicate():
        return None
    return Shards(weight.device_mesh.get_group(index).group_name, count, placement.dim % weight.dim())


def sharded(recipe: Recipe, shards: Shards, in_features: int, out_features: int) -> Recipe:
    """The recipe (`Recipe.fitted`) for one rank's shard of a weight [out_features, in_features].

    Raises:
        ValueError: the shards cut blocks or rotations, or the recipe looks along rows that no rank has whole.
    """
    columns = shards.dim == 0
    if reason := _why_not(recipe, shards, in_features, out_features):
        kind = "column" if columns else "row"
        raise ValueError(
            f"{in_features}→{out_features}, {kind}-parallel over {shards.count} ranks: recipe {recipe.name!r} "
            f"{reason}. Use fewer ranks, another recipe, or keep this layer in high precision by skip=[...]."
        )

    def shard(cast: Cast, along: bool) -> Cast:
        """along: whether it contracts along the dimension that is split, so that a row's scale covers other shards."""
        if not cast.block_format.tensor_scale or cast.outer == "row" and not along:
            return cast
        fields = {f.name: getattr(cast, f.name) for f in dataclasses.fields(cast)}
        return ShardedCast(**fields, group=shards.group)

    (x, w), (dy, w_back), (dy_col, x_col) = recipe.gemms.values()
    w, w_back = shard(w, not columns), shard(w_back, columns)
    if columns:
        dy, dy_col = shard(dy, True), shard(dy_col, False)
    else:
        x, x_col = shard(x, True), shard(x_col, False)
    return dataclasses.replace(recipe, fprop=Gemm(x, w), dgrad=Gemm(dy, w_back), wgrad=Gemm(dy_col, x_col))


def _why_not(recipe: Recipe, shards: Shards, in_features: int, out_features: int) -> str | None:
    """Why shards can't have the operands of the whole, "does what", or None."""
    columns = shards.dim == 0
    if recipe.split == "outliers" and not columns:
        return "splits off the largest features of each token, of which a rank has some"
    if recipe.estimator != "straight_through":
        return f"has estimator={recipe.estimator!r}, which looks at scales of the whole weight"
    features = out_features if columns else in_features
    along = recipe.dgrad if columns else recipe.fprop
    multiples = [16, *(max(c.hadamard, c.block_format.block or 0, c.block_format.group or 0) for c in along)]
    multiples += [cast.block_format.block for cast in recipe.casts if cast.square]
    if not columns:
        multiples.append(recipe.basis)
    if features % shards.count or features // shards.count % max(multiples):  # all are powers of two
        return (
            f"needs parts that are multiples of {max(multiples)} (its blocks and rotations), and {features} features "
            f"over {shards.count} ranks are not"
        )
    return None


def unknown_shard(layer, shape: tuple[int, int]) -> ValueError:
    """The error for a layer whose weight has another shape in its forward than it was told of."""
    return ValueError(
        f"{type(layer).__name__} {layer.in_features}→{layer.out_features} has a weight of {tuple(shape)} in its "
        f"forward, not {layer.matrix_shape}: a shard whose scales would be its own. Tensor parallelism is known to "
        "layers that are converted by from_pretrained(..., quantization_config=..., "
        "distributed_config=DistributedConfig(tp_size=...)); FSDP gathers weights first."
    )
