"""Rounding "eden": block scales corrected so that a quantized vector loses nothing along itself (MS-EDEN, 2601.22813).

Knows blocks that were rounded, and their scales; knows nothing of tensors, rotations and packing. Every operation is
prescribed to the bit, in FP32, so that a kernel can repeat it. Runs on any device and compiles.
"""

import torch
from torch import Tensor

from hf_nvfp4.casts import Cast
from hf_nvfp4.formats import CHOOSING_RULES, FP8_EXACT_RANGE, FP8_EXACT_SIGNIFICANDS
from hf_nvfp4.rounding import round_to, sum16

# Of each scale rule, what a block's largest magnitude becomes, and the largest scale before it is corrected. The bound
# of "amax" is the paper's (arXiv 2601.22813): 6 · 16/17, for what rounding a scale takes, over 0.93, tuned for the
# least squared error. That of "fp8_exact" is tuned on N(0, 1), 14.8e-3 of the signal's; the paper's gives 14.9e-3. A
# correction is at most 1.24 for scales that large (one element of 6.94 cut to 6, all others just below 5 rounded to 4):
# 256 · 1.24 is below 448 and 48 · 1.24 below 64, so no corrected scale saturates. Rules that choose may take up to 320
# where the scale by amax is 192.
LIMITS = {"amax": (6 * 16 / (17 * 0.93), 256.0), "fp8_exact": (6.0, 48.0)}
LIMITS |= {rule: (6.0, 192.0) for rule in CHOOSING_RULES}


def corrected(v: Tensor, elements: Tensor, scales: Tensor, random: Tensor, cast: Cast) -> Tensor:
    """Block scales of rounding "eden" (MS-EDEN, arXiv 2601.22813): scale · <v, v> / <v, q>, rounded stochastically.

    v: blocks over their scale, 1×16; q, `elements`: the same, rounded. random: uint8, one a block. In FP32: the sums of
    FP32(v · v) and FP32(v · q) halves added to halves as `sum16` does, their quotient, then its product with the
    scale. That makes <x, Q(x)> equal <x, x>, so that over all rotations of x nothing but x is left of the mean.
    A block of which nothing is left (all of it zero, or below a quarter of the smallest scale) has no such factor: 0.
    NaN or inf in a block makes its scale NaN, as inf / inf is.
    """
    left = sum16(v * elements)
    factor = torch.where(left == 0, torch.zeros_like(left), sum16(v * v) / left)
    scales = factor * scales
    if cast.scale_rule == "fp8_exact":
        return _stochastic_fp8_exact(scales, random)
    return round_to(scales, cast.block_format.scale, random)


def _stochastic_fp8_exact(scale: Tensor, random: Tensor) -> Tensor:
    """FP32 scales to a neighbour in {0} and {1, 1.25, 1.5}·2^e in 2^-6 ... 64, up with probability distance / step.

    (byte + 1/2) / 256 of the step is added, as in `round_to`: exact in FP32 from 2^-6 on. Zero is among them, so that
    the mean of small ones is right too; a scale of 0 is E4M3's, and so are its products.
    """
    smallest, largest = FP8_EXACT_RANGE
    power = (scale.view(torch.int32) & 0x7F800000).view(torch.float32)
    low, step = power, power * 0.25
    for significand, above in zip(FP8_EXACT_SIGNIFICANDS[1:], (*FP8_EXACT_SIGNIFICANDS[2:], 2.0), strict=True):
        beyond = scale >= power * significand
        low = torch.where(beyond, power * significand, low)
        step = torch.where(beyond, power * (above - significand), step)
    low = torch.where(scale < smallest, 0.0, low)
    step = torch.where(scale < smallest, smallest, step)
    up = (scale - low) + step * (random.float() + 0.5).mul_(2.0**-8) >= step
    rounded = torch.where(up, low + step, low).clamp_(max=largest)
    return torch.where(scale.isfinite(), rounded, scale)
