"""What a recipe does to x and w before they are cast, and to gradients on the way back: in plain autograd.

Knows a recipe's smooth, basis, split and estimator, in this order; the quantized product itself is given.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_nvfp4.casts import Cast
from hf_nvfp4.language import Recipe
from hf_nvfp4.reference import unscaled
from hf_nvfp4.rounding import grid_step, rotate, rotate_back

# The share of each token's features that split "outliers" takes off (arXiv 2501.17116: quantile 0.99).
OUTLIERS = 0.01
# The slope of estimator "dge" is that of sign(u) · |u|^(1/5) in each step, at most 3 (arXiv 2501.17116, k = 5).
DGE_POWER, DGE_LARGEST = 5.0, 3.0


def conditioned(product: Callable, x: Tensor, weight: Tensor, recipe: Recipe) -> Tensor:
    """product(x, w) [T, N] as `recipe` prepares x [T, K] in the compute dtype and w [N, K], and what it splits off."""
    if recipe.smooth:
        scales = _channel_scales(x)
        x, weight = x / scales, weight * scales
    if recipe.basis:
        x, weight = (_Rotated.apply(t, recipe.basis, x.dtype) for t in (x, weight))
    rest = None
    if recipe.split == "mean":
        mean = x.mean(0, keepdim=True)
        x, rest = x - mean, F.linear(mean, weight.to(x.dtype))
    elif recipe.split == "outliers":
        inliers = _inliers(x)
        x, rest = inliers, F.linear(x - inliers, weight.to(x.dtype))
    if recipe.estimator == "clipped":
        x, weight = (
            _Slope.apply(t, _unsaturated, cast, x.dtype) for t, cast in zip((x, weight), recipe.fprop, strict=True)
        )
    elif recipe.estimator == "dge":
        weight = _Slope.apply(weight, _staircase, recipe.fprop.b, x.dtype)
    y = product(x, weight)
    if rest is None:
        return y
    return (_Centered.apply(y) if recipe.split == "mean" else y) + rest


def inside(x: Tensor, weight: Tensor, dy: Tensor, recipe: Recipe) -> tuple[Tensor, Tensor, Tensor]:
    """x, w and dy as the product in `conditioned` has them, of tensors of one dtype."""
    found = []

    def product(x: Tensor, weight: Tensor) -> Tensor:
        found[:] = x.detach(), weight.detach(), (x @ weight.T).detach().requires_grad_()
        return found[2]

    with torch.enable_grad():
        y = conditioned(product, x, weight, recipe)
        (dy,) = torch.autograd.grad(y, found[2], dy)
    return found[0], found[1], dy


@torch.no_grad()
def _channel_scales(x: Tensor) -> Tensor:
    """[K]: the power of two at or below each feature's largest magnitude; 1 where all is zero or not finite."""
    largest = x.abs().amax(0).float()
    power = (largest.view(torch.int32) & 0x7F800000).view(torch.float32)
    return torch.where((power > 0) & power.isfinite(), power, 1.0).to(x.dtype)


def _inliers(x: Tensor) -> Tensor:
    """x with each token's largest features clamped to the magnitude of the next one."""
    count = max(1, round(OUTLIERS * x.shape[1]))
    bound = x.detach().abs().topk(count + 1, dim=1).values[:, -1:]
    return torch.maximum(torch.minimum(x, bound), -bound)


def _unsaturated(x: Tensor, cast: Cast) -> Tensor:
    """1 where a cast does not cut x off at its largest element, 0 where it does."""
    return unscaled(x, cast).abs() < cast.block_format.element.max


def _staircase(w: Tensor, cast: Cast) -> Tensor:
    """The slope of estimator "dge" at w's places between the grid points around them."""
    element = cast.block_format.element
    magnitude = unscaled(w, cast).abs().clamp_(max=element.max)
    place = (magnitude / grid_step(magnitude, element)).frac_()
    slope = (2 * place - 1).abs_().pow_(1 / DGE_POWER - 1).div_(DGE_POWER)
    return slope.clamp_(max=DGE_LARGEST)


class _Slope(torch.autograd.Function):
    """Identity whose gradient is multiplied by slope(x in dtype, cast)."""

    @staticmethod
    def forward(ctx, x: Tensor, slope: Callable, cast: Cast, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(slope(x.to(dtype), cast).to(torch.bfloat16))
        return x.view_as(x)

    @staticmethod
    def backward(ctx, dy: Tensor):
        return (dy * ctx.saved_tensors[0]).to(dy.dtype), None, None, None


class _Rotated(torch.autograd.Function):
    """`rounding.rotate` of the features of x in dtype, and of gradients the transpose."""

    @staticmethod
    def forward(ctx, x: Tensor, size: int, dtype: torch.dtype) -> Tensor:
        ctx.size = size
        return rotate(x.to(dtype), size).to(x.dtype)

    @staticmethod
    def backward(ctx, dy: Tensor):
        return rotate_back(dy, ctx.size).to(dy.dtype), None, None


class _Centered(torch.autograd.Function):
    """Identity whose gradient loses its mean over the tokens."""

    @staticmethod
    def forward(ctx, y: Tensor) -> Tensor:
        return y.view_as(y)

    @staticmethod
    def backward(ctx, dy: Tensor):
        return dy - dy.mean(0, keepdim=True)
