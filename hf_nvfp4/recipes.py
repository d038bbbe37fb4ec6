"""What a training recipe is: for each of the three GEMMs of a linear layer, how each operand is cast.

Pure data. To add a recipe, add one value to the list at the end of this file, or call `register_recipe`.

    fprop   y  = Q(x) Q(w)ᵀ        pair (x, w),   contracted over the input features
    dgrad   dx = Q(dy) Q(w)        pair (dy, w),  contracted over the output features
    wgrad   dw = Q(dyᵀ) Q(xᵀ)ᵀ     pair (dy, x),  contracted over the tokens
"""

import dataclasses
import difflib
import hashlib
import math
from dataclasses import dataclass, field
from typing import NamedTuple

from hf_nvfp4.formats import CHOOSING_RULES, FORMATS, SCALE_RULES, BlockFormat, Element

ROUNDINGS = ("nearest", "stochastic", "eden")
SIGNS = ("fixed", "random")
OUTER_SCALES = ("tensor", "row", "bound")
GEMM_CHOICES = ("all", "forward")

# What makes stochastic rounding unbiased: E4M3 rounds a block scale down by at most a factor 16/17.
SR_HEADROOM = 17 / 16
# The same for powers of two under E2M1: amax is below 8 scales, and 6 is the largest (arXiv 2502.20586: x · 3/4).
MX_SR_HEADROOM = 4 / 3


def unknown(kind: str, name: object, known) -> ValueError:
    """The error for a name that nobody knows: what, what there is, and the likeliest typo."""
    close = difflib.get_close_matches(str(name), [str(k) for k in known], n=1)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    return ValueError(f"unknown {kind} {name!r}; known: {', '.join(map(str, known))}.{hint}")


def _from_dict(cls, values: dict, kind: str):
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
        2601.22813, for nvfp4 with scale rules "amax" and "fp8_exact"): elements to nearest, then the block's scale is
        multiplied by <x, x> / <x, Q(x)> and rounded stochastically. Over random rotations (hadamard=128,
        signs="random") that is unbiased, with less than half of the squared error of stochastic rounding.
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
        if self.scale_rule in CHOOSING_RULES and self.rounding != "nearest":
            biased = {"stochastic": "stochastic rounding", "eden": "MS-EDEN"}[self.rounding]
            raise ValueError(
                f"scale_rule={self.scale_rule!r} chooses a scale by its rounding errors, which biases {biased}. "
                "Use rounding='nearest' or scale_rule='amax'."
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


class Gemm(NamedTuple):
    """The casts of the two operands of one GEMM, in the order of the table at the top of this file."""

    a: Cast
    b: Cast

    def __str__(self) -> str:
        return f"{self.a} · {self.b}"


HIGH_PRECISION = Gemm(Cast("bf16"), Cast("bf16"))


# Every recipe that there is, by `Recipe.key`: where torch.compile finds them. It makes variables of numbers that differ
# between recipes which it found in one place, a layer's attribute say; here each has a place of its own.
BY_KEY: dict[str, "Recipe"] = {}


@dataclass(frozen=True)
class Recipe:
    """Three GEMMs, and the transformer blocks that stay in BF16 unless the user says otherwise.

    from_forward: whether backward's x and w are made of what the forward multiplied, dequantized and rounded to the
        compute dtype, not of the tensors themselves.
    keep_bf16_first, keep_bf16_last: blocks at either end; an int counts them, a float is a fraction of
        all of them, rounded to the nearest count.
    source: where the recipe was published.
    key: short text that no other recipe has.
    """

    name: str
    fprop: Gemm
    dgrad: Gemm
    wgrad: Gemm
    keep_bf16_first: int | float = 0
    keep_bf16_last: int | float = 0
    source: str = field(default="", compare=False)
    from_forward: bool = False

    def __post_init__(self):
        for gemm in ("fprop", "dgrad", "wgrad"):
            pair = Gemm(*getattr(self, gemm))
            object.__setattr__(self, gemm, pair)
            if pair.a.hadamard != pair.b.hadamard:
                raise ValueError(
                    f"recipe {self.name!r}: {gemm} rotates its operands by Hadamard {pair.a.hadamard} and "
                    f"{pair.b.hadamard}; a rotation cancels in the product only if both have the same"
                )
            if pair.a.signs != pair.b.signs:
                raise ValueError(
                    f"recipe {self.name!r}: {gemm} rotates its operands with {pair.a.signs} and {pair.b.signs} signs; "
                    "a rotation cancels in the product only if both have the same"
                )
        if self.from_forward and any(cast.hadamard or cast.draws for cast in self.fprop):
            raise ValueError(
                f"recipe {self.name!r}: from_forward casts x and w again in backward as the forward did, which "
                "rotations and random numbers don't allow; keep them out of fprop"
            )
        check_block_count("keep_bf16_first", self.keep_bf16_first)
        check_block_count("keep_bf16_last", self.keep_bf16_last)
        key = f"{self.name} {hashlib.sha256(repr(self).encode()).hexdigest()[:16]}"
        self.__setstate__(vars(self) | {"key": key})

    def __setstate__(self, state: dict):
        vars(self).update(state)
        BY_KEY.setdefault(self.key, self)

    @property
    def gemms(self) -> dict[str, Gemm]:
        """The three GEMMs by name."""
        return {"fprop": self.fprop, "dgrad": self.dgrad, "wgrad": self.wgrad}

    @property
    def casts(self) -> tuple[Cast, ...]:
        """All six casts."""
        return (*self.fprop, *self.dgrad, *self.wgrad)

    @property
    def token_multiple(self) -> int:
        """Tokens are wgrad's contraction dimension: they are padded with zeros to a multiple of this."""
        casts = [(c.hadamard, c.block_format) for c in self.wgrad]
        return max(max(size, fmt.block if fmt.element.bits < 8 else 1) for size, fmt in casts)

    def per_token(self) -> "Recipe":
        """This recipe for inference: each token's activations have their own scale in fprop.

        A scale over the whole tensor would let a token's output depend on the batch, its padding and the
        tokens that come after it; redrawn signs of a rotation, on the draw: they are the fixed ones.
        """
        x, w = (dataclasses.replace(cast, signs="fixed") for cast in self.fprop)
        if x.block_format.tensor_scale:
            x = dataclasses.replace(x, outer="row")
        return dataclasses.replace(self, fprop=(x, w))

    def fitted(self, in_features: int, out_features: int) -> "Recipe":
        """This recipe for a layer of this shape: Hadamard transforms of the largest size that divides its features.

        Those of wgrad are along the tokens, which are padded.
        """
        fitted = self
        for name, features in (("fprop", in_features), ("dgrad", out_features)):
            gemm = getattr(self, name)
            size = math.gcd(gemm.a.hadamard, features)  # a power of two; of 0, the features
            if gemm.a.hadamard > size:
                pair = (dataclasses.replace(cast, hadamard=size) for cast in gemm)
                fitted = dataclasses.replace(fitted, **{name: tuple(pair)})
        return fitted

    def in_bf16(self, gemms: str) -> "Recipe":
        """This recipe with "all" GEMMs, or the "forward" one only, in BF16 (the late switch of 2509.25149)."""
        if gemms not in GEMM_CHOICES:
            raise unknown("choice of GEMMs", gemms, GEMM_CHOICES)
        names = ("fprop",) if gemms == "forward" else ("fprop", "dgrad", "wgrad")
        changed = {name: HIGH_PRECISION for name in names}
        return dataclasses.replace(self, name=f"{self.name}, {gemms} in bf16", **changed)

    def active(self, high_precision: str | None) -> "Recipe":
        """What runs: this recipe, or with some GEMMs `in_bf16`."""
        return self if high_precision is None else self.in_bf16(high_precision)

    def to_dict(self) -> dict:
        """Plain data for config.json; `from_dict` gives an equal recipe back."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        for name, gemm in self.gemms.items():
            values[name] = [dataclasses.asdict(cast) for cast in gemm]
        return values

    @classmethod
    def from_dict(cls, values: dict) -> "Recipe":
        """Inverse of `to_dict`. Unknown fields are an error."""
        values = dict(values)
        for name in ("fprop", "dgrad", "wgrad"):
            if len(values.get(name, ())) != 2:
                raise ValueError(f"a recipe needs {name!r}: a pair of casts; got {values.get(name)!r}")
            values[name] = Gemm(*(_from_dict(Cast, cast, "Cast") for cast in values[name]))
        return _from_dict(cls, values, "Recipe")

    def describe(self) -> str:
        """A line for each GEMM."""
        return "\n".join(f"{name}: {gemm}" for name, gemm in self.gemms.items())


def check_block_count(name: str, value: int | float) -> None:
    """ValueError unless `value` is a count >= 0 or a fraction in [0, 1)."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not value >= 0:
        raise ValueError(f"{name}={value!r}: give a number of blocks (int) or a fraction of them (float in [0, 1))")
    if isinstance(value, float) and value >= 1:
        raise ValueError(f"{name}={value!r} is a fraction of the blocks and must be below 1; for a count, pass an int")


RECIPES: dict[str, Recipe] = {}


def register_recipe(recipe: Recipe) -> Recipe:
    """Make `recipe` known by its name, and return it. A name can't be given to two different recipes."""
    if RECIPES.get(recipe.name, recipe) != recipe:
        raise ValueError(f"a different recipe is registered as {recipe.name!r}; choose another name")
    RECIPES[recipe.name] = recipe
    return recipe


def get_recipe(recipe: "str | dict | Recipe") -> Recipe:
    """A recipe from its name, its `to_dict`, or itself."""
    if isinstance(recipe, Recipe):
        return recipe
    if isinstance(recipe, dict):
        return Recipe.from_dict(recipe)
    if not isinstance(recipe, str) or recipe not in RECIPES:
        raise unknown("recipe", recipe, RECIPES)
    return RECIPES[recipe]


RN, RN_2D, SR = Cast(), Cast(square=True), Cast(rounding="stochastic")
RN_H, SR_H = Cast(hadamard=16), Cast(rounding="stochastic", hadamard=16)
SR_HEAD = Cast(rounding="stochastic", headroom=SR_HEADROOM)
SR_H_HEAD = Cast(rounding="stochastic", headroom=SR_HEADROOM, hadamard=16)
RN_FP8, RN_FP8_2D = Cast(scale_rule="fp8_exact"), Cast(square=True, scale_rule="fp8_exact")
SR_FP8 = Cast(rounding="stochastic", scale_rule="fp8_exact")
RN_FP8_H = Cast(hadamard=16, outer="bound", scale_rule="fp8_exact")
SR_FP8_H = Cast(rounding="stochastic", hadamard=16, outer="bound", scale_rule="fp8_exact")
FP8, FP8_2D = Cast("fp8_e4m3_block"), Cast("fp8_e4m3_block", square=True)
E4M3_T, E5M2_T = Cast("fp8_e4m3"), Cast("fp8_e5m2")
RN_46, RN_46_2D = Cast(scale_rule="4over6_mse"), Cast(square=True, scale_rule="4over6_mse")
EDEN = Cast(rounding="eden", hadamard=128, signs="random")
EDEN_FP8 = Cast(rounding="eden", hadamard=128, signs="random", scale_rule="fp8_exact")
MXFP8 = Cast("mxfp8")
MXFP4_SR_H = Cast("mxfp4", rounding="stochastic", hadamard=64, headroom=MX_SR_HEADROOM, signs="random")

_PAPER = "Pretraining LLMs with NVFP4, arXiv 2509.25149"

for _recipe in (
    # The control: the same code path, every operand rounded to BF16.
    Recipe("bf16", HIGH_PRECISION, HIGH_PRECISION, HIGH_PRECISION, source="control"),
    # The paper keeps the last 8 of 52 blocks (8B), 8 + 2 of 62 (12B), 4 of 20 (1.2B): about 15%.
    Recipe(
        "nvfp4",
        fprop=(RN, RN_2D),
        dgrad=(SR, RN_2D),
        wgrad=(SR_H, RN_H),
        keep_bf16_last=0.154,
        source=f"{_PAPER}, sections 3 and 4; stochastic rounding without headroom, as NVIDIA does it",
    ),
    Recipe(
        "nvfp4_unbiased",
        fprop=(RN, RN_2D),
        dgrad=(SR_HEAD, RN_2D),
        wgrad=(SR_H_HEAD, RN_H),
        keep_bf16_last=0.154,
        source=f"{_PAPER}, with 17/16 headroom for the gradients' scales, so that none saturates",
    ),
    Recipe(
        "nvfp4_hopper",
        fprop=(RN_FP8, RN_FP8_2D),
        dgrad=(SR_FP8, RN_FP8_2D),
        wgrad=(SR_FP8_H, RN_FP8_H),
        keep_bf16_last=0.154,
        source="this project's own: recipe nvfp4 with its block scales restricted to {1, 1.25, 1.5}·2^e, so that FP8 "
        "tensor cores compute NVFP4 exactly; gradients' scales are rounded up, which makes them unbiased",
    ),
    Recipe(
        "nvfp4_hopper_eden",
        fprop=(RN_FP8, RN_FP8_2D),
        dgrad=(EDEN_FP8, EDEN_FP8),
        wgrad=(EDEN_FP8, EDEN_FP8),
        keep_bf16_last=0.154,
        source="nvfp4_hopper with quartet2's quantizer in backward; dy's and w's casts are plain PyTorch, slow",
    ),
    Recipe(
        "nvfp4_4over6",
        fprop=(RN_46, RN_46_2D),
        dgrad=(SR, RN_46_2D),
        wgrad=(SR_H, RN_H),
        keep_bf16_last=0.154,
        source="Four Over Six, arXiv 2512.02010: recipe nvfp4, each block of x and w in fprop scaled to 6 or to 4, "
        "whichever has the smaller squared error; gradients as in nvfp4, since a choice by error biases them",
    ),
    Recipe(
        "quartet2",
        fprop=(RN_46, RN_46),
        dgrad=(EDEN, EDEN),
        wgrad=(EDEN, EDEN),
        from_forward=True,
        source="Quartet II, arXiv 2601.22813: 4/6 forward; backward from what the forward multiplied, all four "
        "operands rotated by 128 with new signs and rounded by MS-EDEN",
    ),
    Recipe(
        "fp4_all_the_way",
        fprop=(RN, RN),
        dgrad=(SR, RN),
        wgrad=(SR, SR),
        source="FP4 All the Way, arXiv 2505.19115: stochastic rounding of gradients, and of x in wgrad; without the "
        "paper's last stage, a high-precision backward",
    ),
    Recipe(
        "mxfp4",
        fprop=HIGH_PRECISION,
        dgrad=(MXFP4_SR_H, MXFP4_SR_H),
        wgrad=(MXFP4_SR_H, MXFP4_SR_H),
        source="Training LLMs with MXFP4, arXiv 2502.20586: forward in BF16, backward in MXFP4, operands rotated by 64 "
        "with random signs, times 3/4, rounded stochastically",
    ),
    Recipe("mxfp8", (MXFP8, MXFP8), (MXFP8, MXFP8), (MXFP8, MXFP8), source="OCP Microscaling: E4M3, 1×32, E8M0 scales"),
    # The first block and the last two of the paper's 52 stay in BF16: none in a model of fewer than 14 blocks.
    Recipe(
        "fp8",
        fprop=(FP8, FP8_2D),
        dgrad=(FP8, FP8_2D),
        wgrad=(FP8, FP8),
        keep_bf16_first=1 / 52,
        keep_bf16_last=2 / 52,
        source=f"the FP8 baseline of {_PAPER}; DeepSeek-V3, arXiv 2412.19437, section 3.3",
    ),
    Recipe(
        "fp8_tensor",
        fprop=(E4M3_T, E4M3_T),
        dgrad=(E5M2_T, E4M3_T),
        wgrad=(E5M2_T, E4M3_T),
        source="per-tensor current scaling, as torchao's tensorwise and Transformer Engine have it",
    ),
):
    register_recipe(_recipe)
