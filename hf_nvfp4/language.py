"""What a training recipe is: for each of the three GEMMs of a linear layer, how each operand is cast.

Pure data. The recipes themselves are recipes.py.

    fprop   y  = Q(x) Q(w)ᵀ        pair (x, w),   contracted over the input features
    dgrad   dx = Q(dy) Q(w)        pair (dy, w),  contracted over the output features
    wgrad   dw = Q(dyᵀ) Q(xᵀ)ᵀ     pair (dy, x),  contracted over the tokens
"""

import dataclasses
import hashlib
import math
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import NamedTuple

from hf_nvfp4.casts import Cast, from_fields, unknown

GEMM_CHOICES = ("all", "forward")
SPLITS = ("none", "mean", "outliers")
ESTIMATORS = ("straight_through", "clipped", "dge")


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
    """Three GEMMs, what is done to their operands before, and the transformer blocks that stay in BF16.

    from_forward: whether backward's x and w are made of what the forward multiplied, dequantized and rounded to the
        compute dtype, not of the tensors themselves.
    smooth: x's channels are divided by powers of two near their largest magnitudes before anything else, w's columns
        multiplied by them: a channel much larger than others costs these nothing (arXiv 2211.10438; of the SwiGLU
        product, 2409.12517). In training only: a token's output must not depend on others.
    basis: size of a Hadamard transform of x's and w's features in whose basis the whole layer is computed, backward
        included; 0: none.
    split: what of x is multiplied by w in high precision, only the rest being quantized: "none"; "mean", that of the
        tokens, and dy's as well (arXiv 2603.10444; in training only); "outliers", the 1% of each token's features that
        are largest, as far as they exceed the next one (2501.17116, whose quantile is the tensor's).
    estimator: how gradients pass the rounding of x and w: "straight_through"; "clipped", not where the forward
        saturated (arXiv 2502.05003); "dge", those of w times the slope of a smooth staircase (2501.17116).
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
    smooth: bool = False
    basis: int = 0
    split: str = "none"
    estimator: str = "straight_through"

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
        if self.split not in SPLITS:
            raise unknown("split", self.split, SPLITS)
        if self.estimator not in ESTIMATORS:
            raise unknown("estimator", self.estimator, ESTIMATORS)
        if self.basis < 0 or self.basis & (self.basis - 1):
            raise ValueError(f"recipe {self.name!r}: basis={self.basis} is not a power of two (or 0 for none)")
        if self.estimator != "straight_through" and any(cast.hadamard or cast.draws for cast in self.fprop):
            raise ValueError(
                f"recipe {self.name!r}: estimator={self.estimator!r} looks at how the forward rounded x and w, which "
                "rotations in its casts and random numbers don't allow; rotate by basis=, round to nearest"
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
    def members(self) -> "tuple[Recipe, ...]":
        """The recipe itself, as a `RecipeMap` has several."""
        return (self,)

    @property
    def gemms(self) -> dict[str, Gemm]:
        """The three GEMMs by name."""
        return {"fprop": self.fprop, "dgrad": self.dgrad, "wgrad": self.wgrad}

    @property
    def casts(self) -> tuple[Cast, ...]:
        """All six casts."""
        return (*self.fprop, *self.dgrad, *self.wgrad)

    @property
    def conditions(self) -> bool:
        """Whether anything is done to x and w before they are cast."""
        return (self.smooth, self.basis, self.split, self.estimator) != (False, 0, "none", "straight_through")

    @property
    def token_multiple(self) -> int:
        """Tokens are wgrad's contraction dimension: they are padded with zeros to a multiple of this."""
        return max(max(cast.hadamard, cast.block_format.multiple) for cast in self.wgrad)

    def per_token(self) -> "Recipe":
        """This recipe for inference: each token's activations have their own scale in fprop.

        A scale over the whole tensor would let a token's output depend on the batch, its padding and the
        tokens that come after it, and so would their mean and the largest magnitudes of features; redrawn signs of a
        rotation, on the draw: they are the fixed ones.
        """
        x, w = (dataclasses.replace(cast, signs="fixed") for cast in self.fprop)
        if x.block_format.tensor_scale:
            x = dataclasses.replace(x, outer="row")
        split = "none" if self.split == "mean" else self.split
        return dataclasses.replace(self, fprop=(x, w), split=split, smooth=False)

    def fitted(self, in_features: int, out_features: int) -> "Recipe":
        """This recipe for a layer of this shape: Hadamard transforms of the largest size that divides its features.

        Those of wgrad are along the tokens, which are padded.
        """
        fitted = self
        if self.basis > (size := math.gcd(self.basis, in_features)):  # a power of two; of 0, the features
            fitted = dataclasses.replace(fitted, basis=size)
        for name, features in (("fprop", in_features), ("dgrad", out_features)):
            gemm = getattr(self, name)
            pair = tuple(cast.fitted(features) for cast in gemm)
            if pair != tuple(gemm):
                fitted = dataclasses.replace(fitted, **{name: pair})
        return fitted

    def in_bf16(self, gemms: str) -> "Recipe":
        """This recipe with "all" GEMMs, or the "forward" one only, in BF16 (the late switch of 2509.25149)."""
        if gemms not in GEMM_CHOICES:
            raise unknown("choice of GEMMs", gemms, GEMM_CHOICES)
        names = ("fprop",) if gemms == "forward" else ("fprop", "dgrad", "wgrad")
        changed = {name: HIGH_PRECISION for name in names}
        if self.conditions:  # all of it is for the forward's casts
            changed |= {"smooth": False, "basis": 0, "split": "none", "estimator": "straight_through"}
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
            values[name] = Gemm(*(from_fields(Cast, cast, "Cast") for cast in values[name]))
        return from_fields(cls, values, "Recipe")

    def describe(self) -> str:
        """A line for each GEMM, and one for what is done before them, if anything is."""
        lines = [f"{name}: {gemm}" for name, gemm in self.gemms.items()]
        before = [
            self.smooth and "features smoothed",
            self.basis and f"features rotated by {self.basis}",
            self.split != "none" and f"{self.split} in high precision",
            self.estimator != "straight_through" and f"gradients {self.estimator}",
        ]
        lines += [f"before: {', '.join(filter(None, before))}"] if self.conditions else []
        return "\n".join(lines)


def check_block_count(name: str, value: int | float) -> None:
    """ValueError unless `value` is a count >= 0 or a fraction in [0, 1)."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not value >= 0:
        raise ValueError(f"{name}={value!r}: give a number of blocks (int) or a fraction of them (float in [0, 1))")
    if isinstance(value, float) and value >= 1:
        raise ValueError(f"{name}={value!r} is a fraction of the blocks and must be below 1; for a count, pass an int")


@dataclass(frozen=True)
class RecipeMap:
    """A recipe for each kind of layer: of the patterns that match a layer's name, the first one's.

    recipes: pairs (pattern, recipe), or a dict of them; patterns as in `NVFP4TrainingConfig.skip` ("mlp.*",
        "self_attn.*", "*"). A layer that no pattern matches stays in high precision.
    keep_bf16_first, keep_bf16_last, source: as in `Recipe`; None: the first recipe's.
    """

    name: str
    recipes: tuple[tuple[str, Recipe], ...]
    keep_bf16_first: int | float | None = None
    keep_bf16_last: int | float | None = None
    source: str = field(default="", compare=False)

    def __post_init__(self):
        pairs = tuple(self.recipes.items() if isinstance(self.recipes, dict) else map(tuple, self.recipes))
        if not pairs:
            raise ValueError(f"recipe map {self.name!r} is empty; give patterns of layers' names and their recipes")
        for pattern, recipe in pairs:
            if not isinstance(pattern, str) or not isinstance(recipe, Recipe):
                raise ValueError(f"recipe map {self.name!r}: {pattern!r}: {recipe!r} is no pattern and its recipe")
        object.__setattr__(self, "recipes", pairs)
        for name in ("keep_bf16_first", "keep_bf16_last"):
            if getattr(self, name) is None:
                object.__setattr__(self, name, getattr(pairs[0][1], name))
            check_block_count(name, getattr(self, name))

    @property
    def members(self) -> tuple[Recipe, ...]:
        """The recipes, each once."""
        return tuple(dict.fromkeys(recipe for _, recipe in self.recipes))

    def active(self, high_precision: str | None) -> "RecipeMap":
        """What runs: as `Recipe.active`."""
        recipes = tuple((pattern, recipe.active(high_precision)) for pattern, recipe in self.recipes)
        return dataclasses.replace(self, recipes=recipes)

    def to_dict(self) -> dict:
        """Plain data for config.json; `from_dict` gives an equal map back."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return values | {"recipes": [[pattern, recipe.to_dict()] for pattern, recipe in self.recipes]}

    @classmethod
    def from_dict(cls, values: dict) -> "RecipeMap":
        """Inverse of `to_dict`. Unknown fields are an error."""
        pairs = values.get("recipes")
        if not isinstance(pairs, (list, tuple)) or not all(isinstance(p, (list, tuple)) and len(p) == 2 for p in pairs):
            raise ValueError(f"a recipe map needs 'recipes': pairs of a pattern and a recipe; got {pairs!r}")
        recipes = tuple((pattern, Recipe.from_dict(recipe)) for pattern, recipe in pairs)
        return from_fields(cls, values | {"recipes": recipes}, "RecipeMap")

    def describe(self) -> str:
        """A line for each pattern."""
        return "\n".join(f"{pattern}: {recipe.name}" for pattern, recipe in self.recipes)


def matches(pattern: str, name: str) -> bool:
    """Whether the pattern's components match a run of the name's: "mlp.*" fits "layers.0.mlp.up_proj"."""
    wanted, parts = pattern.split("."), name.split(".")
    runs = (parts[i : i + len(wanted)] for i in range(len(parts) - len(wanted) + 1))
    return any(all(fnmatchcase(p, w) for p, w in zip(run, wanted, strict=True)) for run in runs)


def recipe_for(recipe: Recipe | RecipeMap, name: str) -> Recipe | None:
    """The recipe of the layer of that name; None if a map has none for it."""
    if isinstance(recipe, Recipe):
        return recipe
    return next((found for pattern, found in recipe.recipes if matches(pattern, name)), None)
