"""The recipes that there are. To add one, add a value to a list at the end of this file, or call `register_recipe`."""

import dataclasses

from hf_nvfp4.casts import MX_SR_HEADROOM, SR_HEADROOM, Cast, unknown
from hf_nvfp4.language import HIGH_PRECISION, Recipe, RecipeMap

RECIPES: dict[str, Recipe] = {}
RECIPE_MAPS: dict[str, RecipeMap] = {}


def register_recipe(recipe: Recipe | RecipeMap) -> Recipe | RecipeMap:
    """Make `recipe` known by its name, and return it. A name can't be given to two different recipes."""
    known = {**RECIPES, **RECIPE_MAPS}
    if known.get(recipe.name, recipe) != recipe:
        raise ValueError(f"a different recipe is registered as {recipe.name!r}; choose another name")
    (RECIPES if isinstance(recipe, Recipe) else RECIPE_MAPS)[recipe.name] = recipe
    return recipe


def get_recipe(recipe: "str | dict | Recipe") -> Recipe:
    """A recipe from its name, its `to_dict`, or itself."""
    if isinstance(recipe, Recipe):
        return recipe
    if isinstance(recipe, dict):
        return Recipe.from_dict(recipe)
    if isinstance(recipe, RecipeMap) or isinstance(recipe, str) and recipe in RECIPE_MAPS:
        raise ValueError(f"{getattr(recipe, 'name', recipe)!r} has a recipe for each kind of layer; give one recipe")
    if not isinstance(recipe, str) or recipe not in RECIPES:
        raise unknown("recipe", recipe, RECIPES)
    return RECIPES[recipe]


def get_recipes(recipe: "str | dict | Recipe | RecipeMap") -> Recipe | RecipeMap:
    """What a whole model trains by: as `get_recipe`; or a map, its name, its `to_dict`, or a dict {pattern: recipe}."""
    if isinstance(recipe, RecipeMap):
        return recipe
    if isinstance(recipe, dict) and "recipes" in recipe:
        return RecipeMap.from_dict(recipe)
    if isinstance(recipe, dict) and not {"name", "fprop"} & set(recipe):
        pairs = tuple((pattern, get_recipe(value)) for pattern, value in recipe.items())
        return RecipeMap(", ".join(f"{pattern}: {value.name}" for pattern, value in pairs), pairs)
    if isinstance(recipe, str) and recipe in RECIPE_MAPS:
        return RECIPE_MAPS[recipe]
    if isinstance(recipe, str) and recipe not in RECIPES:
        raise unknown("recipe", recipe, [*RECIPES, *RECIPE_MAPS])
    return get_recipe(recipe)


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
BEST = Cast(scale_rule="best")
EDEN = Cast(rounding="eden", hadamard=128, signs="random")
EDEN_FP8 = Cast(rounding="eden", hadamard=128, signs="random", scale_rule="fp8_exact")
MXFP8 = Cast("mxfp8")
MXFP4_RMS = Cast("mxfp4", scale_rule="rms")
MXFP4_SR_H32 = Cast("mxfp4", rounding="stochastic", hadamard=32, headroom=MX_SR_HEADROOM, signs="random")
RN_128 = Cast("nvfp4_128")
SR_128_H = Cast("nvfp4_128", rounding="stochastic", hadamard=16, headroom=SR_HEADROOM)
FP4_ROW = Cast("fp4", outer="row")
# The largest that divides a layer's width (`Recipe.fitted`).
E4M3_H, E5M2_H = Cast("fp8_e4m3", hadamard=4096), Cast("fp8_e5m2", hadamard=4096)
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
        source="nvfp4_hopper with quartet2's quantizer in backward; at 30M parameters it loses to stochastic "
        "rounding (LOG.md)",
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
        "nvfp4_best",
        fprop=(BEST, BEST),
        dgrad=(EDEN, EDEN),
        wgrad=(EDEN, EDEN),
        keep_bf16_last=0.154,
        from_forward=True,
        split="mean",
        source="this project's own, found by measuring (LOG.md): quartet2's backward; in the forward the best of six "
        "scales for each 1×16 block of x and w, and the tokens' mean of x (and of dy) multiplied in high precision",
    ),
    Recipe(
        "nvfp4_qat",
        fprop=(RN, RN),
        dgrad=HIGH_PRECISION,
        wgrad=HIGH_PRECISION,
        from_forward=True,
        source="quantization-aware training for NVFP4 inference, as in arXiv 2601.20088: the forward that engines "
        "compute (1×16 for x and w), a straight-through backward in BF16; no layer stays in BF16 but the head",
    ),
    Recipe(
        "nvfp4_qat_w4a16",
        fprop=(HIGH_PRECISION[0], RN),
        dgrad=HIGH_PRECISION,
        wgrad=HIGH_PRECISION,
        from_forward=True,
        source="nvfp4_qat for weight-only inference: x in BF16",
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
        "tetrajet2_base",
        fprop=(RN_128, RN_128),
        dgrad=(SR_128_H, SR_128_H),
        wgrad=(SR_128_H, SR_128_H),
        from_forward=True,
        source="TetraJet-v2, arXiv 2510.27527: FP32 scales of 1×128 above the blocks; backward from what the forward "
        "multiplied, rotated by 16 and rounded stochastically, all four operands; without OutControl, and OsciReset "
        "is a callback (`OsciReset`)",
    ),
    Recipe(
        "averis",
        fprop=(RN, RN_2D),
        dgrad=(SR, RN_2D),
        wgrad=(SR, RN),
        split="mean",
        source="Averis, arXiv 2603.10444: the tokens' mean of x and of dy is multiplied in high precision, what is "
        "left in NVFP4, nothing rotated; w's blocks, and that no layer stays in BF16, are ours",
    ),
    Recipe(
        "quartet",
        fprop=(MXFP4_RMS, MXFP4_RMS),
        dgrad=(MXFP4_SR_H32, MXFP4_SR_H32),
        wgrad=(MXFP4_SR_H32, MXFP4_SR_H32),
        from_forward=True,
        basis=32,
        estimator="clipped",
        source="Quartet, arXiv 2505.14669: features rotated by 32; MXFP4 scaled by the standard deviation; backward "
        "from what the forward multiplied, rotated by 32 with new signs, times 3/4, rounded stochastically; no "
        "gradient where the forward saturated",
    ),
    Recipe(
        "fp4_dge",
        fprop=(FP4_ROW, FP4_ROW),
        dgrad=HIGH_PRECISION,
        wgrad=HIGH_PRECISION,
        split="outliers",
        estimator="dge",
        source="FP4 quantization for LLM training, arXiv 2501.17116: E2M1 with a scale for each token and each output "
        "channel in the forward, the largest 1% in high precision, w's gradient by the slope of a smooth staircase; "
        "backward in BF16 (the paper: FP8), quantiles of each token (the tensor), a dense product of the outliers",
    ),
    Recipe(
        "halo1",
        fprop=(E4M3_H, E4M3_H),
        dgrad=(E5M2_T, E4M3_T),
        wgrad=(E5M2_T, E4M3_T),
        source="HALO, arXiv 2501.02625, level 1, in FP8 per tensor: x and w rotated in the forward; without its 8-bit "
        "all-gather",
    ),
    Recipe(
        "halo2",
        fprop=(E4M3_H, E4M3_H),
        dgrad=(E5M2_H, E4M3_H),
        wgrad=(E5M2_T, E4M3_T),
        source="HALO, arXiv 2501.02625, level 2: dy and w rotated in dgrad too; without its 8-bit all-gather",
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

FP8_BACKWARD = {"dgrad": (FP8, FP8_2D), "wgrad": (FP8, FP8)}
for _map in (
    RecipeMap(
        "fp4_mixed",
        {
            "mlp.*": Recipe("fp4_mixed mlp", fprop=(RN, RN), **FP8_BACKWARD),
            "*": Recipe("fp4_mixed attention", fprop=(FP8, FP8_2D), **FP8_BACKWARD),
        },
        source="Exploring FP4 Precision, arXiv 2502.11458: the forward of the MLP in FP4, attention's linears and all "
        "of backward in FP8; FP4 is NVFP4 here, and the paper's last stage, in the target precision, PrecisionSchedule",
    ),
    RecipeMap(
        "fp8_smooth_swiglu",
        {
            "down_proj": dataclasses.replace(RECIPES["fp8_tensor"], name="fp8_tensor, smooth", smooth=True),
            "*": RECIPES["fp8_tensor"],
        },
        source="Smooth-SwiGLU, arXiv 2409.12517: each channel of the SwiGLU product scaled before its cast, by powers "
        "of two here, w's columns by their inverse; the rest fp8_tensor",
    ),
):
    register_recipe(_map)
