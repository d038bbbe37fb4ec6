"""What recipes do to x and w before their casts: each mechanism against its own algebra."""

import dataclasses
import json

import pytest
import torch
import torch.nn.functional as F

from hf_nvfp4 import (
    RECIPE_MAPS,
    RECIPES,
    Cast,
    NVFP4Linear,
    NVFP4TrainingConfig,
    Recipe,
    RecipeMap,
    quantize,
    quantize_model,
    register_recipe,
    use_recipe,
)
from hf_nvfp4.conditioning import _inliers, _staircase, _unsaturated, conditioned, inside
from hf_nvfp4.language import HIGH_PRECISION
from hf_nvfp4.linear import quantized_linears
from hf_nvfp4.operand_stats import cast_stats, layer_stats
from hf_nvfp4.recipes import get_recipes
from hf_nvfp4.rounding import rotate, rotate_back

T, K, N = 96, 128, 64
NEAREST = Recipe("nearest", *3 * [(Cast(), Cast())])
EXACT = Recipe("exact", *3 * [HIGH_PRECISION])
CONDITIONS = {
    "smooth": {"smooth": True},
    "basis": {"basis": 32},
    "mean": {"split": "mean"},
    "outliers": {"split": "outliers"},
    "all": {"smooth": True, "basis": 32, "split": "mean"},
}


def tensors(device="cpu", dtype=torch.float32):
    """x with a mean and features of different sizes, w, dy with a mean."""
    g = torch.Generator().manual_seed(3)
    x = torch.randn(T, K, generator=g) * torch.randn(K, generator=g).exp() + torch.randn(K, generator=g)
    w, dy = torch.randn(N, K, generator=g) / 8, torch.randn(T, N, generator=g) + torch.randn(N, generator=g)
    return [t.to(device, dtype) for t in (x, w, dy)]


def make(recipe, w):
    layer = NVFP4Linear(K, N, recipe=recipe, backend="reference")
    layer.weight.data.copy_(w)
    layer.bias.data.copy_(torch.linspace(-1, 1, N))
    return layer


def run(layer, x, dy):
    x = x.clone().requires_grad_()
    layer.zero_grad()
    y = layer(x)
    y.backward(dy)
    return [y.detach(), x.grad, layer.weight.grad, layer.bias.grad]


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


@pytest.mark.parametrize("conditions", CONDITIONS.values(), ids=CONDITIONS)
def test_in_high_precision_nothing_changes(conditions):
    x, w, dy = tensors()
    expected = run(make(EXACT, w), x, dy)
    found = run(make(dataclasses.replace(EXACT, **conditions), w), x, dy)
    assert all(relative(a, b) < 1e-2 for a, b in zip(found, expected, strict=True))
    assert torch.equal(found[3], expected[3])


def test_means_are_multiplied_in_high_precision():
    x, w, dy = tensors()
    y, dx, dw, _ = run(make(dataclasses.replace(NEAREST, split="mean"), w), x, dy)

    def q(t):
        return quantize(t.contiguous(), Cast()).dequantize()

    mean, dy_mean = x.mean(0), dy.mean(0)
    x_c, dy_c = x - mean, dy - dy_mean
    bias = torch.linspace(-1, 1, N)
    assert relative(y, q(x_c) @ q(w).T + mean @ w.T + bias) < 1e-5
    assert relative(dw, q(dy_c.T) @ q(x_c.T).T + T * torch.outer(dy_mean, mean)) < 1e-5
    passed = q(dy_c) @ q(w.T).T
    assert relative(dx, passed - passed.mean(0) + dy_mean @ w) < 1e-5
    plain = run(make(NEAREST, w), x, dy)
    exact = run(make(EXACT, w), x, dy)
    assert all(relative(a, c) < relative(b, c) for a, b, c in zip((y, dx, dw), plain, exact, strict=False))


def test_outliers_are_multiplied_in_high_precision():
    x, w, dy = tensors()
    inliers = _inliers(x)
    assert ((inliers != x).sum(1) == 1).all()  # 1% of 128
    assert torch.equal(inliers.abs().amax(1), x.abs().sort(1).values[:, -2])
    larger = x.clone()
    larger[torch.arange(T), x.abs().argmax(1)] *= 1000
    layer = make(dataclasses.replace(NEAREST, split="outliers"), w)
    errors = [layer(t) - F.linear(t, w, layer.bias) for t in (x, larger)]
    assert relative(*errors) < 5e-3  # the error is that of the inliers, whatever the outlier
    assert relative(make(NEAREST, w)(larger), F.linear(larger, w, layer.bias)) > 0.02


def test_smoothing_undoes_a_scale_of_a_feature():
    x, w, dy = tensors()
    layer = make(dataclasses.replace(NEAREST, smooth=True), w)
    scales = 2.0 ** torch.arange(K).remainder(9)
    expected = run(layer, x, dy)
    layer.weight.data /= scales
    found = run(layer, x * scales, dy)
    factors = (1, 1 / scales, scales, 1)
    assert all(torch.equal(a, b * f) for a, b, f in zip(found, expected, factors, strict=True))


def test_the_basis_rotates_both_and_comes_back():
    x, w, dy = tensors()
    assert relative(rotate_back(rotate(x, 32), 32), x) < 4e-3
    a, b = torch.randn(5, 64), torch.randn(5, 64)
    assert ((rotate_back(a, 64) * b).sum() - (a * rotate(b, 64).float()).sum()).abs() < 0.1  # the transpose
    y, dx, dw, _ = run(make(dataclasses.replace(NEAREST, basis=32), w), x, dy)
    inside = run(make(NEAREST, rotate(w, 32)), rotate(x, 32).float(), dy)
    assert relative(y, inside[0]) < 1e-6  # the bias is added in another place
    assert torch.equal(dx, rotate_back(inside[1], 32)) and torch.equal(dw, rotate_back(inside[2], 32))


def test_a_clipped_estimator_passes_nothing_where_the_forward_saturated():
    x, w, dy = tensors()
    rms = Cast("mxfp4", scale_rule="rms")
    clipped = Recipe("clipped", (rms, rms), HIGH_PRECISION, HIGH_PRECISION, estimator="clipped")
    _, dx, dw, _ = run(make(clipped, w), x, dy)
    _, plain_dx, plain_dw, _ = run(make(dataclasses.replace(clipped, estimator="straight_through"), w), x, dy)
    for found, plain, t in ((dx, plain_dx, x), (dw, plain_dw, w)):
        inside = _unsaturated(t, rms)
        assert 0.003 < 1 - inside.float().mean() < 0.1
        assert torch.equal(found, plain * inside)
        scales = quantize(t, rms).scales.float().repeat_interleave(32, 1)
        assert torch.equal(inside, t.abs() < 6 * scales)


def test_dge_is_the_slope_of_a_smooth_staircase():
    grid = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=torch.float64)

    def staircase(v):
        low = grid[(torch.bucketize(v.detach(), grid, right=True) - 1).clamp(max=6)]
        high = grid[torch.bucketize(v.detach(), grid, right=True).clamp(max=7)]
        u = 2 * (v - low) / (high - low) - 1
        return low + (high - low) / 2 * (1 + u.sign() * u.abs() ** 0.2)

    v = torch.rand(1, 4096, dtype=torch.float64) * 6
    v[0, 0] = 6.0  # makes the scale 1
    found = _staircase(v.float(), Cast("fp4", outer="row"))
    leaf = v[0].clone().requires_grad_()
    expected = torch.autograd.grad(staircase(leaf).sum(), leaf)[0].clamp(max=3)
    assert found[0, 0] == pytest.approx(0.2)
    assert (found[0, 1:] - expected[1:]).abs().quantile(0.99) < 1e-3
    x, w, dy = tensors()
    layer = make(RECIPES["fp4_dge"], w)
    slope = _staircase(w, layer.recipe.fprop.b).bfloat16()
    inliers = _inliers(x)
    split = dy.bfloat16().T.float() @ inliers.bfloat16().float() * slope + dy.T @ (x - inliers)
    assert relative(run(layer, x, dy)[2], split) < 5e-3


@pytest.mark.parametrize("name", [name for name, recipe in RECIPES.items() if recipe.conditions])
def test_in_eval_mode_a_token_depends_on_no_other(name):
    x, w, _ = tensors()
    layer = make(RECIPES[name], w).eval()
    assert torch.equal(layer(x)[:7], layer(x[:7]))


@pytest.mark.parametrize("name", ["outliers", "all"])
def test_it_compiles(name):
    conditions = CONDITIONS[name]
    x, w, dy = tensors()
    layer = make(dataclasses.replace(NEAREST, name=f"compiled {conditions}", **conditions), w)
    expected = run(layer, x, dy)
    layer.compile(backend="aot_eager", fullgraph=True)
    assert all(relative(a, b) < 1e-2 for a, b in zip(run(layer, x, dy), expected, strict=True))


def test_nan_is_not_hidden():
    x, w, _ = tensors()
    x[5, 7] = float("nan")
    for conditions in CONDITIONS.values():
        assert make(dataclasses.replace(NEAREST, **conditions), w)(x)[5].isnan().all()


def test_a_group_of_128_is_a_tensor_of_its_own():
    x = torch.randn(3, 288) * torch.tensor([1.0, 1e-4, 1e4]).repeat_interleave(96)
    found = quantize(x, Cast("nvfp4_128")).dequantize()
    for first in range(0, 288, 128):
        part = x[:, first : first + 128].contiguous()
        expected = quantize(part, Cast(outer="row")).dequantize()
        assert relative(found[:, first : first + 128], expected) < 1e-6
    assert quantize(x, Cast("nvfp4_128")).scales.shape == (3, 18)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"split": "median"}, "unknown split 'median'; known: none, mean, outliers"),
        ({"estimator": "clip"}, "unknown estimator 'clip'.*Did you mean 'clipped'"),
        ({"basis": 24}, "basis=24 is not a power of two"),
        ({"estimator": "dge", "fprop": 2 * [Cast(hadamard=16)]}, "looks at how the forward rounded x and w"),
    ],
)
def test_bad_conditions_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(NEAREST, **fields)


# ---------------------------------------------------------------------------- recipe maps


def blocks(count=3):
    """Some blocks with attention and MLP, no head."""
    model = torch.nn.Module()
    model.layers = torch.nn.ModuleList()
    for _ in range(count):
        block = torch.nn.Module()
        block.self_attn, block.mlp = torch.nn.Module(), torch.nn.Module()
        block.self_attn.o_proj = torch.nn.Linear(K, K)
        block.mlp.up_proj, block.mlp.down_proj = torch.nn.Linear(K, N), torch.nn.Linear(N, K)
        model.layers.append(block)
    return model


def names(model):
    return [linear.train_recipe.name for linear in quantized_linears(model).values()]


def test_each_kind_of_layer_has_its_recipe(capsys):
    model = blocks()
    config = NVFP4TrainingConfig({"down_proj": "bf16", "mlp.*": "nvfp4"}, keep_bf16_last=1)
    decisions = quantize_model(model, config)
    assert names(model) == 2 * ["nvfp4", "bf16"]
    reasons = {d.name: d.reason for d in decisions}
    assert reasons["layers.0.self_attn.o_proj"] == "no pattern of the recipe map matches"
    assert reasons["layers.2.mlp.up_proj"] == "last 1 of 3 blocks in BF16"
    assert reasons["layers.1.mlp.down_proj"] == "recipe bf16"
    assert "recipe nvfp4, backend" in capsys.readouterr().out
    with use_recipe(model, "fp4_mixed"):
        assert names(model) == 4 * ["fp4_mixed mlp"]
    with use_recipe(model, {"up_proj": "fp8"}):
        assert names(model) == 2 * ["fp8", "bf16"]
    assert names(model) == 2 * ["nvfp4", "bf16"]


@pytest.mark.parametrize("name", RECIPE_MAPS)
def test_maps_survive_json(name):
    config = NVFP4TrainingConfig(name)
    again = NVFP4TrainingConfig(**json.loads(json.dumps(config.to_dict())))
    assert again == config and again.recipe == RECIPE_MAPS[name] and again.recipe.source
    assert len(again.recipe.describe().splitlines()) == 2
    assert [r.name for r in config.recipe.active("all").members][0].endswith("all in bf16")


def test_a_map_trains_and_its_patterns_must_match():
    model = blocks(1)
    quantize_model(model, NVFP4TrainingConfig("fp8_smooth_swiglu"))
    block = model.layers[0]
    block.mlp.down_proj(block.mlp.up_proj(block.self_attn.o_proj(torch.randn(8, K)))).sum().backward()
    assert all(linear.weight.grad.isfinite().all() for linear in quantized_linears(model).values())
    assert [linear.recipe.smooth for linear in quantized_linears(model).values()] == [False, False, True]
    with pytest.raises(ValueError, match="recipe pattern 'experts' matches none of the 3 linear layers"):
        quantize_model(blocks(1), NVFP4TrainingConfig({"experts": "nvfp4", "*": "fp8"}))


def test_bad_maps_are_refused(monkeypatch):
    monkeypatch.setattr("hf_nvfp4.recipes.RECIPE_MAPS", dict(RECIPE_MAPS))
    with pytest.raises(ValueError, match="unknown recipe 'nvfp5'; known: bf16, nvfp4.*Did you mean 'nvfp4'"):
        NVFP4TrainingConfig({"mlp.*": "nvfp5"})
    with pytest.raises(ValueError, match="is empty"):
        NVFP4TrainingConfig({})
    with pytest.raises(ValueError, match="'fp4_mixed' has a recipe for each kind of layer; give one recipe"):
        NVFP4Linear(K, N, recipe="fp4_mixed")
    with pytest.raises(ValueError, match="pairs of a pattern and a recipe"):
        get_recipes({"name": "x", "recipes": "nvfp4"})
    mine = RecipeMap("mine", {"*": RECIPES["fp8"]})
    assert register_recipe(mine) is get_recipes("mine") and mine.keep_bf16_last == RECIPES["fp8"].keep_bf16_last
    with pytest.raises(ValueError, match="a different recipe is registered as 'nvfp4'"):
        register_recipe(RecipeMap("nvfp4", {"*": RECIPES["fp8"]}))


@pytest.mark.parametrize("name", ["averis", "quartet", "fp4_dge"])
def test_statistics_are_of_what_the_product_gets(name):
    x, w, dy = tensors()
    layer = make(RECIPES[name], w)
    calls = []
    conditioned(lambda a, b: calls.append((a, b)) or a @ b.T, x, w, layer.train_recipe)
    found = inside(x, w, dy, layer.train_recipe)
    assert torch.equal(found[0], calls[0][0]) and torch.equal(found[1], calls[0][1])
    assert torch.equal(found[2], dy - dy.mean(0) if name == "averis" else dy)
    measured = layer_stats(layer, x.requires_grad_(), dy)["operands"]["fprop x"]["snr_db"]
    assert measured == pytest.approx(cast_stats(found[0], layer.recipe.fprop.a)[2].item())


def test_conditioned_calls_the_product_once():
    x, w, _ = tensors()
    calls = []
    conditioned(lambda a, b: calls.append((a, b)) or a @ b.T, x, w, dataclasses.replace(NEAREST, **CONDITIONS["all"]))
    assert len(calls) == 1 and calls[0][0].mean(0).abs().max() < 1e-5
