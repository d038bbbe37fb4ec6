"""Formats and recipes are data that checks itself."""

import copy
import dataclasses
import json
import pickle

import pytest
import torch

from hf_nvfp4 import RECIPES, Cast, Recipe, register_recipe
from hf_nvfp4.casts import MX_SR_HEADROOM
from hf_nvfp4.formats import E2M1, E4M3, E5M2, FORMATS, SCALE_RULES
from hf_nvfp4.language import BY_KEY, HIGH_PRECISION
from hf_nvfp4.recipes import get_recipe


def test_element_grids_are_the_published_ones():
    assert E2M1.grid == (0, 0.5, 1, 1.5, 2, 3, 4, 6)
    for element in (E4M3, E5M2):
        codes = torch.arange(len(element.grid), dtype=torch.uint8)
        assert codes.view(element.dtype).float().tolist() == list(element.grid)
        assert element.grid[-1] == element.max == torch.finfo(element.dtype).max


def test_the_default_cast_is_nvfp4_and_the_recipe_is_the_papers():
    assert Cast() == Cast("nvfp4", square=False, rounding="nearest", hadamard=0, outer="tensor")
    assert (FORMATS["nvfp4"].block, FORMATS["nvfp4"].scale) == (16, E4M3)
    x, w = RECIPES["nvfp4"].fprop
    assert (x, w) == (Cast(), Cast(square=True))
    assert RECIPES["nvfp4"].dgrad == (Cast(rounding="stochastic"), Cast(square=True))
    assert RECIPES["nvfp4"].wgrad == (Cast(rounding="stochastic", hadamard=16), Cast(hadamard=16))


@pytest.mark.parametrize("name", list(RECIPES))
def test_recipes_survive_json(name):
    recipe = RECIPES[name]
    assert Recipe.from_dict(json.loads(json.dumps(recipe.to_dict()))) == recipe
    assert recipe.source and recipe.describe().count("\n") == 2 + recipe.conditions


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"format": "nvfp5"}, "known: nvfp4.*Did you mean 'nvfp4'"),
        ({"rounding": "up"}, "known: nearest, stochastic, eden"),
        ({"outer": "column"}, "known: tensor, row, bound"),
        ({"outer": "bound"}, "for casts with a Hadamard transform"),
        ({"hadamard": 12}, "power of two"),
        ({"headroom": 0.5}, "below 1"),
        ({"format": "fp8_e4m3", "square": True}, "none"),
        ({"square": True, "hadamard": 16}, "square blocks are the same along both"),
        ({"format": "bf16", "hadamard": 16}, "no scales"),
        ({"scale_rule": "4over5"}, "unknown scale rule.*known: amax, ceil, 4over6, 4over6_mse, best.*'4over6'"),
        ({"scale_rule": "ceil"}, "'nvfp4' has no scale rule 'ceil', only amax, 4over6, .*for mxfp4, mxfp8"),
        ({"format": "mxfp4", "scale_rule": "best"}, "only amax, ceil, rms; 'best' is for nvfp4"),
        ({"scale_rule": "4over6", "rounding": "stochastic"}, "biases stochastic rounding"),
        ({"scale_rule": "best", "rounding": "stochastic"}, "Use rounding='nearest', rounding='eden' or"),
        ({"format": "mxfp4", "rounding": "eden"}, "'mxfp4' has none such. It is for nvfp4"),
        ({"format": "bf16", "rounding": "eden"}, "'bf16' has none such"),
        ({"square": True, "rounding": "eden"}, "square blocks can't be rotated"),
        ({"headroom": 1.0625, "rounding": "eden"}, "Use headroom=1.0"),
        ({"signs": "new", "hadamard": 16}, "unknown choice of signs 'new'; known: fixed, random"),
        ({"signs": "random"}, "those of a Hadamard transform; give its size"),
        ({"format": "mxfp4", "outer": "row"}, "no FP32 scale above its blocks"),
        ({"format": "mxfp4", "outer": "bound", "hadamard": 16}, "no FP32 scale above its blocks"),
    ],
)
def test_a_cast_checks_itself(arguments, message):
    with pytest.raises(ValueError, match=message):
        Cast(**arguments)


def test_a_cast_says_what_it_is():
    assert str(Cast(scale_rule="4over6")) == "nvfp4 1×16 RNE 4over6"
    assert str(Cast("mxfp4", square=True, scale_rule="ceil")) == "mxfp4 32×32 RNE ceil"
    mxfp4 = Cast("mxfp4", rounding="stochastic", headroom=MX_SR_HEADROOM, hadamard=32)
    assert str(mxfp4) == "mxfp4 1×32 RHT-32 SR headroom 1.33333"
    recipe = Recipe("mine", (Cast(scale_rule="best"), Cast("mxfp8")), (mxfp4, mxfp4), (Cast("mxfp4"), Cast("mxfp4")))
    assert Recipe.from_dict(json.loads(json.dumps(recipe.to_dict()))) == recipe
    assert recipe.token_multiple == 32 and recipe.per_token().dgrad == recipe.dgrad
    eden = Cast(rounding="eden", hadamard=128, signs="random")
    assert str(eden) == "nvfp4 1×16 RHT-128 redrawn MS-EDEN"
    recipe = Recipe("eden", (Cast(), Cast()), (eden, eden), (eden, eden))
    assert Recipe.from_dict(json.loads(json.dumps(recipe.to_dict()))) == recipe and recipe.token_multiple == 128
    values = RECIPES["nvfp4"].to_dict()
    for gemm in RECIPES["nvfp4"].gemms:  # a config.json from before there were scale rules and signs
        values[gemm] = [{k: v for k, v in cast.items() if k not in ("scale_rule", "signs")} for cast in values[gemm]]
    assert Recipe.from_dict(values) == RECIPES["nvfp4"]


def test_every_format_knows_its_scales():
    for fmt in FORMATS.values():
        assert set(fmt.scale_rules) <= set(SCALE_RULES) and fmt.scale_rules[0] == "amax"
        assert (fmt.scale_dtype is None) == (fmt.block is None)
    assert FORMATS["nvfp4"].scale_dtype == torch.float8_e4m3fn and FORMATS["mxfp4"].block == 32


def test_a_recipe_checks_itself():
    plain, rotated = Cast(), Cast(hadamard=16)
    with pytest.raises(ValueError, match="wgrad rotates its operands by Hadamard 16 and 0"):
        Recipe("half", (plain, plain), (plain, plain), (rotated, plain))
    with pytest.raises(ValueError, match="dgrad rotates its operands with random and fixed signs"):
        Recipe("apart", (plain, plain), (Cast(hadamard=16, signs="random"), rotated), (plain, plain))
    for bad in (True, -1, 1.0, "2"):
        with pytest.raises(ValueError, match="keep_bf16_last"):
            Recipe("bad", HIGH_PRECISION, HIGH_PRECISION, HIGH_PRECISION, keep_bf16_last=bad)
    with pytest.raises(ValueError, match="unknown Recipe field 'gprop'.*Did you mean 'fprop'"):
        Recipe.from_dict(RECIPES["nvfp4"].to_dict() | {"gprop": []})
    with pytest.raises(ValueError, match="known: bf16, nvfp4"):
        get_recipe("nvfp44")


def test_registering_adds_a_name_once(monkeypatch):
    monkeypatch.setattr("hf_nvfp4.recipes.RECIPES", dict(RECIPES))
    mine = Recipe("mine", HIGH_PRECISION, HIGH_PRECISION, HIGH_PRECISION)
    assert register_recipe(mine) is register_recipe(mine) is get_recipe("mine")
    with pytest.raises(ValueError, match="a different recipe is registered as 'nvfp4'"):
        register_recipe(Recipe("nvfp4", HIGH_PRECISION, HIGH_PRECISION, HIGH_PRECISION))


def test_switching_to_high_precision():
    recipe = RECIPES["nvfp4"]
    assert recipe.in_bf16("forward").fprop == HIGH_PRECISION
    assert recipe.in_bf16("forward").wgrad == recipe.wgrad
    assert set(recipe.in_bf16("all").gemms.values()) == {HIGH_PRECISION}
    with pytest.raises(ValueError, match="known: all, forward"):
        recipe.in_bf16("backward")


def test_per_token_recipes_change_the_activations_only():
    recipe = RECIPES["nvfp4"].per_token()
    assert recipe.fprop.a == Cast(outer="row") and recipe.fprop.b == Cast(square=True)
    assert RECIPES["fp8"].per_token() == RECIPES["fp8"]


def test_every_recipe_is_found_by_its_key(monkeypatch):
    recipes = [*RECIPES.values(), *(recipe.per_token() for recipe in RECIPES.values())]
    assert all(BY_KEY[recipe.key] == recipe for recipe in recipes)
    assert len({recipe.key for recipe in recipes}) == len(set(recipes))
    pickled, copied = pickle.dumps(recipes[0]), copy.deepcopy(recipes[1])
    monkeypatch.delitem(BY_KEY, recipes[0].key)  # as in another process
    assert pickle.loads(pickled) == recipes[0] == BY_KEY[recipes[0].key] and BY_KEY[copied.key] == copied


def test_per_token_recipes_do_not_redraw_signs():
    for name in ("nvfp4", "mxfp4"):
        redrawn, fixed = (Cast(name, hadamard=32, signs=signs) for signs in ("random", "fixed"))
        recipe = Recipe("redrawn", (redrawn, redrawn), (redrawn, redrawn), (redrawn, redrawn)).per_token()
        assert recipe.fprop == (dataclasses.replace(fixed, outer="row" if name == "nvfp4" else "tensor"), fixed)
        assert recipe.dgrad == (redrawn, redrawn)


def test_a_cast_knows_whether_it_draws():
    assert not Cast(hadamard=16).draws
    assert Cast(rounding="stochastic").draws and Cast(rounding="eden").draws and Cast(hadamard=16, signs="random").draws


def test_a_recipe_is_fitted_to_a_layer():
    recipe = RECIPES["quartet2"]
    assert recipe.fitted(256, 1024) is recipe and RECIPES["nvfp4"].fitted(48, 80) is RECIPES["nvfp4"]
    fitted = recipe.fitted(192, 80)
    assert {cast.hadamard for cast in fitted.dgrad} == {16} and fitted.wgrad == recipe.wgrad
    rotated = dataclasses.replace(recipe, from_forward=False, fprop=(Cast(hadamard=64), Cast(hadamard=64)))
    assert {cast.hadamard for cast in rotated.fitted(96, 128).fprop} == {32}


@pytest.mark.parametrize("x", [Cast(hadamard=16), Cast(rounding="stochastic")])
def test_backward_can_use_the_forwards_operands_only_if_it_can_make_them_again(x):
    with pytest.raises(ValueError, match="keep them out of fprop"):
        Recipe("again", (x, x), (Cast(), Cast()), (Cast(), Cast()), from_forward=True)
