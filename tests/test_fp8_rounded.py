"""Backend fp8_rounded: what it rounds and how far, and that it has to be asked for."""

import itertools

import pytest
import torch
from fp4_stand_in import layers, run
from fp8_stand_in import CUDA, gpu, run_on_the_cpu, watched

from hf_nvfp4 import RECIPES, Cast, Recipe, quantize
from hf_nvfp4.backends import BACKENDS, BY_NAME_ONLY, fp8_rounded
from hf_nvfp4.gemm import backend_name

RN, SR_H = RECIPES["nvfp4_hopper"].fprop.a, RECIPES["nvfp4_hopper"].wgrad.a
RN_2D = RECIPES["nvfp4_hopper"].fprop.b
E4M3, E5M2, BLOCKS = Cast("fp8_e4m3"), Cast("fp8_e5m2"), Cast("fp8_e4m3_block")


@pytest.fixture
def ready(monkeypatch):
    run_on_the_cpu(monkeypatch)


@pytest.fixture
def hopper(ready, monkeypatch):
    return watched(monkeypatch)


@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=str)
@pytest.mark.parametrize("cast", [RN, RN_2D, SR_H, E4M3, E5M2, BLOCKS, Cast(), Cast("mxfp8")], ids=str)
def test_nothing_finite_is_left_under_a_scale_that_is_not(hopper, cast, value):
    x = torch.randn(32, 128)
    x[3, 5] = value
    (operand, _), (identity, _) = fp8_rounded.cast(x, cast), fp8_rounded.cast(torch.eye(128), E4M3)
    assert not fp8_rounded.multiply(operand, identity, torch.float32)[3, :16].isfinite().any()


def test_it_has_to_be_asked_for_and_says_what_it_rounds(monkeypatch):
    assert {"fp8_rounded"} == BY_NAME_ONLY
    gpu(monkeypatch, 9, 0)
    for module in set(BACKENDS.values()) - {fp8_rounded}:
        monkeypatch.setattr(module, "supports", lambda recipe, device: "is not there")
    with pytest.raises(ValueError, match="Move the model to another device"):
        backend_name("auto", RECIPES["nvfp4"], CUDA)
    assert backend_name("fp8_rounded", RECIPES["nvfp4"], CUDA) == "fp8_rounded"
    assert fp8_rounded.exactness(RECIPES["nvfp4"]) == "each nvfp4 value rounded to E4M3"
    assert fp8_rounded.exactness(RECIPES["fp8"]) == "each fp8_e4m3_block value rounded to E4M3"
    for name in ("nvfp4_hopper", "fp8_tensor", "bf16"):
        assert fp8_rounded.exactness(RECIPES[name]) == "exact"
    mixed = Recipe("mixed", (Cast("mxfp8"), Cast("bf16")), (E5M2, E5M2), (RN, RN))
    assert fp8_rounded.exactness(mixed) == "each bf16, fp8_e5m2, mxfp8 value rounded to E4M3"


def test_the_summary_line_says_it(ready, build, capsys):
    build("nvfp4", backend="fp8_rounded")
    assert "backend fp8_rounded: each nvfp4 value rounded to E4M3" in capsys.readouterr().out


@pytest.mark.parametrize("cast", [Cast(), Cast(scale_rule="4over6"), Cast("mxfp4"), Cast("mxfp8"), BLOCKS], ids=str)
def test_values_are_the_recipes_rounded_to_the_nearest_e4m3(cast):
    x = torch.randn(32, 256) * torch.logspace(-4, 4, 32)[:, None]
    (operand, _), exact = fp8_rounded.cast(x, cast), quantize(x, cast).dequantize(torch.float64)
    got = operand.dequantize(torch.float64)
    # Half a step: 2^-4 of the value, or half of the smallest step (a hair more with a rounding to BF16 before).
    limit = (exact.abs() * 2**-4).maximum(operand.scale.double() * 2**-10)
    assert ((got - exact).abs() <= limit * (1 + 2**-4 if cast == BLOCKS else 1)).all()
    assert 0 < (got - exact).norm() < 0.03 * exact.norm() or cast.format.startswith("mx")
    if cast.format != "nvfp4":  # and each row uses E4M3's range
        assert (operand.values.float().abs().amax(1) >= 208).all()


def test_mxfp_values_that_fit_are_not_rounded():
    """Blocks of one scale: E2M1 and E4M3 elements are E4M3 values, at any power of two."""
    for name, power in itertools.product(("mxfp4", "mxfp8"), (-100, -20, 0, 20, 100)):
        x = torch.randn(16, 32) * 2.0**power
        (operand, _), exact = fp8_rounded.cast(x, Cast(name)), quantize(x, Cast(name)).dequantize(torch.float64)
        flushed = exact.abs() < 2.0**-14 * exact.abs().amax(1, keepdim=True)
        assert ((operand.dequantize(torch.float64) == exact) | flushed).all()


ANY = [
    "nvfp4",
    "nvfp4_unbiased",
    "nvfp4_hopper",
    "fp8",
    "fp8_tensor",
    "bf16",
    Recipe("mx", (Cast("mxfp8"), Cast("mxfp4")), (Cast("mxfp8"), Cast("bf16")), (E5M2, E5M2)),
]


@pytest.mark.parametrize("tokens", [1, 33, 128])
@pytest.mark.parametrize("recipe", ANY, ids=str)
def test_any_recipe_runs_within_the_rounding(hopper, recipe, tokens):
    x, dy = torch.randn(tokens, 144), torch.randn(tokens, 272)
    ours, theirs = layers(recipe, "fp8_rounded", (144, 272))
    exact = fp8_rounded.exactness(ours.recipe) == "exact"
    for got, expected in zip(run(ours, x, dy)[:3], run(theirs, x, dy)[:3], strict=True):
        error = (got.double() - expected.double()).norm() / expected.double().norm()
        assert error < (3e-6 if exact else 0.07)
        assert exact or error > 0.01 or ours.recipe.name == "mx"  # most of whose values fit
    assert len(hopper) == (0 if recipe == "bf16" else 3)
