"""What bits mean: element grids and block formats. Pure data; how to round to them is reference.py.

An `Element` is a small floating-point type, a `BlockFormat` says which elements share a scale, in which type that
scale is kept and by which rules it can be chosen. A new format is a new value in `FORMATS`.
"""

from dataclasses import dataclass

import torch

FLOAT32_MAX = torch.finfo(torch.float32).max


@dataclass(frozen=True)
class Element:
    """A binary floating-point element with subnormals and saturation at `max`.

    `dtype` is torch's type of the same bits, where it has one.
    """

    name: str
    exponent_bits: int
    mantissa_bits: int
    max: float
    dtype: torch.dtype | None = None

    @property
    def bits(self) -> int:
        """Bits of one code, sign included."""
        return 1 + self.exponent_bits + self.mantissa_bits

    @property
    def min_normal(self) -> float:
        """The smallest normal value; below it the grid is uniform."""
        return 2.0 ** (2 - 2 ** (self.exponent_bits - 1))

    @property
    def grid(self) -> tuple[float, ...]:
        """The non-negative values, ascending; the index of a value is its code without the sign bit."""
        per_binade = 2**self.mantissa_bits
        values = [self.min_normal * i / per_binade for i in range(per_binade)]
        binade = self.min_normal
        while binade <= self.max:
            values += [binade * (1 + i / per_binade) for i in range(per_binade)]
            binade *= 2
        return tuple(v for v in values if v <= self.max)


E2M1 = Element("e2m1", 2, 1, 6.0)
E4M3 = Element("e4m3", 4, 3, 448.0, torch.float8_e4m3fn)
E5M2 = Element("e5m2", 5, 2, 57344.0, torch.float8_e5m2)
FP16 = Element("fp16", 5, 10, 65504.0, torch.float16)
BF16 = Element("bf16", 8, 7, torch.finfo(torch.bfloat16).max, torch.bfloat16)


@dataclass(frozen=True)
class BlockFormat:
    """Elements, and the scales that they share.

    block: elements along the contraction dimension with a scale of their own; None: none have.
    scale: type of the block scales: an Element (then one FP32 tensor scale sits above them), "e8m0" (powers of
        two from 2^-127 to 2^127) or "float32" (nothing above either), or None (no block scales).
    tensor_scale: whether one FP32 scale, made from its largest magnitude, covers the whole tensor.
    group: elements along the contraction dimension above whose block scales, E4M3, there is one FP32 scale; "scale"
        is their product then. None: there are no such groups.
    scale_rules: the ways to choose a block's scale, keys of `SCALE_RULES`, the usual one first.
    """

    name: str
    element: Element
    block: int | None = None
    scale: Element | str | None = None
    tensor_scale: bool = False
    scale_rules: tuple[str, ...] = ("amax",)
    group: int | None = None

    @property
    def scale_dtype(self) -> torch.dtype | None:
        """The type that block scales are stored in."""
        types = {"float32": torch.float32, "e8m0": torch.float8_e8m0fnu}
        return self.scale.dtype if isinstance(self.scale, Element) else types.get(self.scale)

    @property
    def multiple(self) -> int:
        """What a row's length must be a multiple of: its blocks, where two codes share a byte; others are padded."""
        return (self.block or 2) if self.element.bits < 8 else 1

    @property
    def high_precision(self) -> bool:
        """True for a plain floating-point type, where a cast is a rounding and nothing else."""
        return self.scale is None and not self.tensor_scale

    def __str__(self) -> str:
        return self.name


# How a block's scale follows from its elements; reference.py has the formulas.
SCALE_RULES = {
    "amax": "the largest magnitude becomes the element's largest; for powers of two, of its binade (OCP: floor)",
    "ceil": "the smallest power of two under which nothing saturates (NVIDIA's MXFP8)",
    "4over6": "the largest magnitude becomes 6 or 4, whichever errs less in absolute value (Transformer Engine)",
    "4over6_mse": "the same by squared error (arXiv 2512.02010)",
    "best": "of the scale by amax and five neighbours, the one with the least squared error",
    "rms": "the power of two nearest to standard deviation · 2.9225 / 6, which errs least on a Gaussian (QuEST, arXiv "
    "2502.05003); larger values saturate",
    "fp8_exact": "of {1, 1.25, 1.5}·2^e, so that every element × scale is an E4M3 value: nearest to the scales that "
    "make the largest magnitude 6 or 4, whichever errs less by squared error; under stochastic rounding the next one "
    "above, so that nothing saturates; under MS-EDEN the nearest, then a neighbour of what corrects it",
}
# Those that look at rounding errors: they would bias stochastic rounding.
CHOOSING_RULES = ("4over6", "4over6_mse", "best")
# Those under which elements may saturate by intent, which biases it too.
CLIPPING_RULES = ("rms",)
# The largest element of E2M1 over the standard deviation, for the least squared error on N(0, 1).
RMS_CLIP = 2.92247856
# Rule "fp8_exact": significands of its scales, and the smallest and largest of these. Times E2M1's 0.5 ... 6, whose
# significands are 1 and 1.5, that needs E4M3's four bits and stays between its 2^-9 and 448.
FP8_EXACT_SIGNIFICANDS = (1.0, 1.25, 1.5)
FP8_EXACT_RANGE = (2.0**-6, 64.0)
# Up to these an ideal scale between 1 and 2 is rounded to 1, 1.25 and 1.5. Tuned for the least squared error on
# N(0, 1), 8.27e-3 of the signal's; midpoints give 8.29e-3. Below 1.75 no element reaches 7, half way from 6 to 8.
FP8_EXACT_BOUNDS = (9 / 8, 45 / 32, 111 / 64)

FORMATS = {
    f.name: f
    for f in (
        # OCP E2M1 with E4M3 scales per 16 and FP32 per tensor: arXiv 2509.25149, section 2.
        BlockFormat(
            "nvfp4",
            E2M1,
            block=16,
            scale=E4M3,
            tensor_scale=True,
            scale_rules=("amax", *CHOOSING_RULES, "fp8_exact"),
        ),
        # OCP Microscaling Formats 1.0: a power of two per 32, nothing above.
        BlockFormat("mxfp4", E2M1, block=32, scale="e8m0", scale_rules=("amax", "ceil", "rms")),
        BlockFormat("mxfp8", E4M3, block=32, scale="e8m0", scale_rules=("amax", "ceil")),
        # Nvfp4's blocks under an FP32 scale for each 1×128 (arXiv 2510.27527); the scales are stored multiplied.
        BlockFormat("nvfp4_128", E2M1, block=16, scale="float32", group=128),
        # E2M1 with one scale above all, usually of each row (arXiv 2501.17116).
        BlockFormat("fp4", E2M1, tensor_scale=True),
        # The FP8 baseline of the same paper, DeepSeek-V3 style: FP32 scales, 1×128 or 128×128.
        BlockFormat("fp8_e4m3_block", E4M3, block=128, scale="float32"),
        # Per-tensor current scaling.
        BlockFormat("fp8_e4m3", E4M3, tensor_scale=True),
        BlockFormat("fp8_e5m2", E5M2, tensor_scale=True),
        BlockFormat("bf16", BF16),
    )
}
