"""How one operand of a GEMM is quantized: pure data. What it computes is reference.py."""

import dataclasses
import difflib
import math
from dataclasses import dataclass

from hf_nvfp4.formats import CHOOSING_RULES, CLIPPING_RULES, FORMATS, SCALE_RULES, BlockFormat, Element

ROUNDINGS = ("nearest", "stochastic", "eden")
SIGNS = ("fixed", "random")
OUTER_SCALES = ("tensor", "row", "bound")

# What makes stochastic rounding unbiased: E4M3 rounds a block scale down by at most a factor 16/17.
SR_HEADROOM = 17 / 16
# The same for powers of two under E2M1: amax is below 8 scales, and 6 is the largest (arXiv 2502.20586: x · 3/4).
MX_SR_HEADROOM = 4 / 3


def unknown(kind: str, name: object, known) -> ValueError:
    """The error for a name that nobody knows: what, what there is, and the likeliest typo."""
    close = difflib.get_close_matches(str(name), [str(k) for k in known], n=1)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    return ValueError(f"unknown {kind} {name!r}; known: {', '.join(map(str, known))}.{hint}")


def from_fields(cls, values: dict, kind: str):
    if not isinstance(values, dict):
        raise ValueError(f"a {kind} is an object with fields; got {values!r}")
    names = [field.name for field in dataclasses.fields(cls)]
    for key in values:
        if key not in names:
            raise unknown(f"{kind} field", key, names)
    return cls(**values)


@dataclass(frozen=True)
class Cast:
    """How one operand of a GEMM is quantized, in blocks along its contraction dimension.

    format: a key of `formats.FORMATS`.
    square: blocks of block × block elements, so that Q(w.T) == Q(w).T; else 1 × block.
    rounding: "nearest" (ties to even), "stochastic" (up with probability distance / step), or "eden" (MS-EDEN, arXiv
        2601.22813, for nvfp4): elements to nearest, then the block's scale is multiplied by <x, x> / <x, Q(x)> and
        rounded stochastically. Over random rotations (hadamard=128, signs="random") that is unbiased, with less than
        half of the squared error of stochastic rounding. Scales chosen by rounding errors ("best") don't change that:
        what is lost along x is put back.
    hadamard: size of the random Hadamard transform along the contraction dimension; 0: none.
    signs: those of the transform: "fixed", the same everywhere, or "random", drawn anew for each GEMM.
    headroom: factor on the scales. `SR_HEADROOM` makes stochastic rounding unbiased (no element
        saturates); 1.0 is NVIDIA's choice, with a bias of about -0.3% on N(0,1). Powers of two can't take it
        up: it becomes the tensor scale, a constant (`MX_SR_HEADROOM` for mxfp4).
    outer: whether the FP32 scale above the blocks covers the "tensor" or each "row". Per-row scales do
        not let one token's codes depend on another's: inference uses them. They are not what a native
        NVFP4 GEMM takes. "bound" covers the tensor too, but follows from its largest magnitude before the
        rotation, times sqrt(hadamard), the most that a rotation makes of it: the rotated tensor need not be looked
        at first. It costs some of the smallest block scales.
    scale_rule: how a block's scale is chosen, one of the format's rules in `formats.SCALE_RULES`.
    """

    format: str = "nvfp4"
    square: bool = False
    rounding: str = "nearest"
    hadamard: int = 0
    headroom: float = 1.0
    outer: str = "tensor"
    scale_rule: str = "amax"
    signs: str = "fixed"

    def __post_init__(self):
        if self.format not in FORMATS:
            raise unknown("format", self.format, FORMATS)
        if self.rounding not in ROUNDINGS:
            raise unknown("rounding", self.rounding, ROUNDINGS)
        if self.outer not in OUTER_SCALES:
            raise unknown("outer scale", self.outer, OUTER_SCALES)
        if self.hadamard < 0 or self.hadamard & (self.hadamard - 1):
            raise ValueError(f"hadamard={self.hadamard} is not a power of two (or 0 for no transform)")
        if self.headroom < 1.0:
            raise ValueError(f"headroom={self.headroom} is below 1: every block's largest value would saturate")
        if self.square and self.block_format.block is None:
            raise ValueError(f"square blocks need a format with blocks; {self.format!r} has none")
        if self.square and (self.hadamard or self.outer == "row"):
            raise ValueError(
                "square blocks are the same along both dimensions; a Hadamard transform or per-row scales "
                "along one of them are not. Use square=False."
            )
        if self.block_format.high_precision and (self.hadamard or self.headroom != 1.0 or self.outer == "row"):
            raise ValueError(f"format {self.format!r} has no scales and no blocks; it takes rounding only")
        if self.outer != "tensor" and not self.block_format.tensor_scale:
            raise ValueError(f"format {self.format!r} has no FP32 scale above its blocks for outer={self.outer!r}")
        if self.outer == "bound" and not self.hadamard:
            raise ValueError("outer='bound' is for casts with a Hadamard transform; without one, use outer='tensor'")
        if self.signs not in SIGNS:
            raise unknown("choice of signs", self.signs, SIGNS)
        if self.signs == "random" and not self.hadamard:
            raise ValueError("signs='random' are those of a Hadamard transform; give its size, hadamard=128, say")
        self._check_scale_rule()
        if self.rounding == "eden":
            self._check_eden()

    def _check_scale_rule(self):
        if self.scale_rule not in SCALE_RULES:
            raise unknown("scale rule", self.scale_rule, SCALE_RULES)
        if self.scale_rule not in self.block_format.scale_rules:
            fitting = [name for name, fmt in FORMATS.items() if self.scale_rule in fmt.scale_rules]
            raise ValueError(
                f"format {self.format!r} has no scale rule {self.scale_rule!r}, only "
                f"{', '.join(self.block_format.scale_rules)}; {self.scale_rule!r} is for {', '.join(fitting)}"
            )
        if self.scale_rule in CHOOSING_RULES + CLIPPING_RULES and self.rounding == "stochastic":
            chooses = self.scale_rule in CHOOSING_RULES
            does = "chooses a scale by its rounding errors" if chooses else "lets values saturate"
            raise ValueError(
                f"scale_rule={self.scale_rule!r} {does}, which biases stochastic rounding. "
                "Use rounding='nearest', rounding='eden' or scale_rule='amax'."
            )

    def _check_eden(self):
        if not isinstance(self.block_format.scale, Element):
            fitting = [name for name, fmt in FORMATS.items() if isinstance(fmt.scale, Element)]
            raise ValueError(
                f"rounding='eden' corrects block scales that have significands; format {self.format!r} has none "
                f"such. It is for {', '.join(fitting)}"
            )
        if self.square:
            raise ValueError(
                "rounding='eden' draws a scale for each 1×16 block of a rotated operand; square blocks can't be "
                "rotated. Use square=False."
            )
        if self.headroom != 1.0:
            raise ValueError(
                f"headroom={self.headroom:g} keeps elements from saturating, which rounding='eden' corrects by itself. "
                "Use headroom=1.0."
            )

    @property
    def block_format(self) -> BlockFormat:
        """The format's definition."""
        return FORMATS[self.format]

    def fitted(self, features: int) -> "Cast":
        """This cast for rows of so many features: with the largest Hadamard transform that divides them."""
        size = math.gcd(self.hadamard, features)
        return dataclasses.replace(self, hadamard=size) if self.hadamard > size > 1 else self

    def of_all(self, amax):
        """The largest magnitudes that FP32 scales follow from, of those in what this process has: all, here."""
        return amax

    @property
    def draws(self) -> bool:
        """Whether random numbers go into it, so that two casts of one tensor differ."""
        return self.rounding != "nearest" or self.signs == "random"

    def __str__(self) -> str:
        parts = [self.format]
        if block := self.block_format.block:
            parts.append(f"{block if self.square else 1}×{block}")
        if self.hadamard:
            parts.append(f"RHT-{self.hadamard}" + (" redrawn" if self.signs == "random" else ""))
        if not self.block_format.high_precision:
            parts.append({"nearest": "RNE", "stochastic": "SR", "eden": "MS-EDEN"}[self.rounding])
        if self.scale_rule != "amax":
            parts.append(self.scale_rule)
        if self.headroom != 1.0:
            parts.append(f"headroom {self.headroom:g}")
        if self.outer != "tensor":
            parts.append({"row": "per-row scale", "bound": "scale by bound"}[self.outer])
        return " ".join(parts)
