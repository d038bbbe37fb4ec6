"""What a layer's recipe does to its operands in one training step, and to the gradient of its weight.

Knows layers, recipes and tensors; knows nothing of models, training and files.
"""

import dataclasses
import math
import re
import statistics

import torch
from torch import Tensor

from hf_nvfp4.captured import OPERANDS, Captured
from hf_nvfp4.casts import Cast
from hf_nvfp4.conditioning import inside
from hf_nvfp4.gemm import backend_for, multiply
from hf_nvfp4.linear import NVFP4Layer, Plan
from hf_nvfp4.quantizer_study import flipped
from hf_nvfp4.reference import prepare, quantize_rows

# Below it quantized training is said to stall: FP4 All the Way, arXiv 2505.19115.
NOISE_THRESHOLD = math.sqrt(3)
CAST_STATS = ("underflow", "saturation", "snr_db")
# The roundings of a scale, a tensor scale and their product can put the largest magnitude this much above 6 times both.
_ROUNDING = 1e-6


def cast_stats(x: Tensor, cast: Cast) -> Tensor:
    """FP64 [3], `CAST_STATS` of one draw of a cast that is not BF16, of x [M, K], blocks along K.

    All in the basis in which the cast rounds: of the rotated tensor, where it rotates.

    underflow: share of the elements that are not zero that become zero.
    saturation: share of all elements whose magnitude is above the largest that their block's scale as stored (rounding
        "eden": as corrected) can stand for. Blocks whose scale is zero underflow.
    snr_db: 10 log10 Σx² / Σ(x - Q(x))². inf without an error, NaN for a tensor of zeros.
    """
    x, cast, _ = flipped(x, cast)
    before, amax, seed = prepare(x, cast)
    blocks = quantize_rows(before, amax, seed, cast)
    before, after = before.float(), blocks.values() * blocks.tensor_scale
    ones = torch.full_like(blocks.elements, cast.block_format.element.max)
    largest = dataclasses.replace(blocks, elements=ones).values() * blocks.tensor_scale
    nonzero = before != 0
    underflow = (nonzero & (after == 0)).sum() / nonzero.sum().clamp(min=1)
    saturation = ((before.abs() > largest * (1 + _ROUNDING)) & (largest > 0)).sum() / before.numel()
    signal, noise = (torch.linalg.vector_norm(t, dtype=torch.float64) for t in (before, before - after))
    return torch.stack([underflow.double(), saturation.double(), 20 * (signal / noise).log10()])


def noise_ratio(x: Tensor, dy: Tensor, plan: Plan) -> Tensor:
    """‖dw‖ / ‖dw_q - dw‖ of a layer's weight gradient, x [T, K] and dy [T, N] in the compute dtype: an FP64 scalar.

    dw is multiplied in FP32; dw_q is one draw of what the layer's backward makes of the same x and dy.

    "FP4 All the Way" (arXiv 2505.19115) has ‖∇L‖ / (σ_q √d) for a gradient of d elements under noise of the standard
    deviation σ_q, and a threshold of √3 for it. Here:
    - it is of one layer's weight, not of all parameters;
    - σ_q √d is the length of the difference, so that the bias of what is rounded to nearest counts as noise;
    - it is noise of wgrad alone: what fprop and dgrad put into x and dy is in both gradients, and what the paper's
      quantized optimizer adds is in neither;
    - the gradient is that of a probe of a few thousand tokens. That of a full batch is shorter, where the samples'
      gradients disagree, and its quantization noise too, as both average out: the trend over training says more than
      one value.
    """
    recipe, high = plan.recipe, torch.float32
    signs = plan.draw_signs(recipe.wgrad, dy)
    _, dy_col = plan.cast(None, dy, None, recipe.wgrad.a, col_signs=signs)
    x_hat = plan.for_backward(None, x, recipe.fprop.a)
    _, x_col = plan.cast(None, x_hat, None, recipe.wgrad.b, col_signs=signs)
    dw_q, dw = multiply(dy_col, x_col, plan.backend, high), dy.to(high).T @ x.to(high)  # [N, T] @ [T, K]
    signal, noise = (torch.linalg.vector_norm(t, dtype=torch.float64) for t in (dw, dw_q - dw))
    return signal / noise


def layer_stats(linear: NVFP4Layer, x: Tensor, dy: Tensor) -> dict:
    """Plain data about one training step of a layer, x [T, K] in any float dtype, dy [T, N] in the compute dtype.

    Returns {"recipe", "tokens", "operands": {name: {of `CAST_STATS`}}, "zero_dy", "noise_ratio"}. Operands are those of
    `OPERANDS` whose GEMM the layer runs (dgrad if x requires a gradient, wgrad if its weight does) and whose cast is
    not BF16: each as its cast sees it, so what `conditioning` makes of it, and in backward, under
    `recipe.from_forward`, what the forward multiplied.
    zero_dy: share of exact zeros in dy. noise_ratio: see there; None where wgrad is not quantized. What is not finite
    is None.
    """
    recipe, dtype = linear.train_recipe, dy.dtype
    plan = Plan(recipe, backend_for(linear.backend, recipe, x.device), dtype, linear.weight.requires_grad, None)
    dgrad, wgrad = x.requires_grad, plan.wgrad
    x, w = x.detach().to(dtype), _whole(linear.matrix).to(dtype)
    if recipe.conditions:
        x, w, dy = inside(x, w, dy, recipe)
    operands = Captured(x, w, dy).operands()
    if recipe.from_forward:
        x_hat, w_hat = (plan.for_backward(None, t, how) for t, how in zip((x, w), recipe.fprop, strict=True))
        backward = Captured(x_hat, w_hat, dy).operands()
        operands = {name: (operands if name.startswith("fprop") else backward)[name] for name in OPERANDS}
    runs = {"fprop": True, "dgrad": dgrad, "wgrad": wgrad}
    measured = {
        name: cast_stats(operands[name], cast)
        for name, cast in zip(OPERANDS, recipe.casts, strict=True)
        if runs[name.split()[0]] and not cast.block_format.high_precision
    }
    noisy = wgrad and (recipe.from_forward or not all(cast.block_format.high_precision for cast in recipe.wgrad))
    ratio = noise_ratio(x, dy, plan) if noisy else torch.full((), math.nan, device=x.device)
    # One wait for the device, not one a number.
    zero_dy, ratio, *numbers = map(_finite, torch.cat([_pair(dy, ratio), *measured.values()]).tolist())
    found = {
        name: dict(zip(CAST_STATS, numbers[3 * i : 3 * i + 3], strict=True)) for i, name in enumerate(measured)
    }
    return {"recipe": recipe.name, "tokens": len(x), "operands": found, "zero_dy": zero_dy, "noise_ratio": ratio}


def _pair(dy: Tensor, ratio: Tensor) -> Tensor:
    return torch.stack([(dy == 0).double().mean(), ratio.double()])


def _finite(number: float) -> float | None:
    return number if math.isfinite(number) else None


def _whole(weight: Tensor) -> Tensor:
    """A weight without its gradient, gathered from the ranks that share it."""
    weight = weight.detach()
    return weight.full_tensor() if hasattr(weight, "full_tensor") else weight


# ---- All layers ----------------------------------------------------------------------------------------


def summary(layers: dict[str, dict]) -> dict[str, float]:
    """At most 17 numbers about `layer_stats` of many layers: means over those that have the number.

    snr_db/… for each operand; underflow/… and saturation/… for each tensor, over its casts; zero_dy; noise_ratio, and
    below_sqrt3, the share of layers whose ratio is below it; worst_snr_db and worst_noise_ratio, the lowest of all.
    """
    casts = [(name, stats) for layer in layers.values() for name, stats in layer["operands"].items()]
    numbers: dict[str, list] = {f"snr_db/{name.replace(' ', '_')}": [] for name in OPERANDS}
    numbers |= {f"{kind}/{tensor}": [] for kind in ("underflow", "saturation") for tensor in ("x", "w", "dy")}
    for name, stats in casts:
        numbers[f"snr_db/{name.replace(' ', '_')}"].append(stats["snr_db"])
        for kind in ("underflow", "saturation"):
            numbers[f"{kind}/{name.split()[1]}"].append(stats[kind])
    numbers["zero_dy"] = [layer["zero_dy"] for layer in layers.values()]
    ratios = [layer["noise_ratio"] for layer in layers.values() if layer["noise_ratio"] is not None]
    numbers["noise_ratio"] = ratios
    numbers["below_sqrt3"] = [float(ratio < NOISE_THRESHOLD) for ratio in ratios]
    numbers["worst_noise_ratio"] = sorted(ratios)[:1]
    numbers["worst_snr_db"] = sorted(stats["snr_db"] for _, stats in casts if stats["snr_db"] is not None)[:1]
    known = {name: [value for value in values if value is not None] for name, values in numbers.items()}
    return {name: statistics.fmean(values) for name, values in known.items() if values}


def group_of(layer: str) -> str:
    """The name that like layers of all blocks share: model.layers.3.mlp.up_proj -> model.layers.*.mlp.up_proj."""
    return re.sub(r"(?<![^.])\d+(?![^.])", "*", layer)


def noisy_groups(layers: dict[str, dict]) -> dict[str, list[float]]:
    """Noise ratios of the groups of layers in which at least one is below `NOISE_THRESHOLD`."""
    groups: dict[str, list[float]] = {}
    for name, layer in layers.items():
        if layer["noise_ratio"] is not None:
            groups.setdefault(group_of(name), []).append(layer["noise_ratio"])
    return {group: ratios for group, ratios in groups.items() if min(ratios) < NOISE_THRESHOLD}
