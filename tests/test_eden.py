"""MS-EDEN and redrawn signs: to the bit, unbiased over draws, at the edges, in a layer."""

import dataclasses
import math
import shutil

import numpy as np
import pytest
import torch

from hf_nvfp4 import RECIPES, Cast, NVFP4Linear, Recipe, gemm, quantize
from hf_nvfp4 import linear as linear_module
from hf_nvfp4.backends import BACKENDS
from hf_nvfp4.eden import LIMITS, _stochastic_fp8_exact, corrected
from hf_nvfp4.formats import E2M1, E4M3, FP8_EXACT_SIGNIFICANDS
from hf_nvfp4.gemm import draw_signs, multiply
from hf_nvfp4.language import HIGH_PRECISION, Gemm
from hf_nvfp4.reference import quantize_rows
from hf_nvfp4.rounding import RHT_SIGNS, draw_seed, flip, random_bytes, rotate, round_to, unpack_nibbles

BYTES = torch.arange(256, dtype=torch.uint8)
RULES = ["amax", "best", "fp8_exact"]
FP8_EXACT_GRID = sorted({0.0, *(s * 2.0**e for s in FP8_EXACT_SIGNIFICANDS for e in range(-6, 7))} - {80.0, 96.0})
GRIDS = {"amax": E4M3.grid, "best": E4M3.grid, "fp8_exact": FP8_EXACT_GRID}


def eden(rule="fp8_exact", hadamard=128):
    return Cast(rounding="eden", hadamard=hadamard, signs="random", scale_rule=rule)


EDEN = eden()
HOPPER = RECIPES["nvfp4_hopper"]
HOPPER_EDEN = Recipe("nvfp4_hopper_eden", HOPPER.fprop, (EDEN, EDEN), (EDEN, EDEN), keep_bf16_last=0.154)
CPU = torch.device("cpu")


def relative_squared_error(y, x):
    return (((y - x) ** 2).sum() / (x.double() ** 2).sum()).item()


def hadamard_matrix(size):
    h = torch.ones(1, 1, dtype=torch.float64)
    while len(h) < size:
        h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)])
    return h / size**0.5


def rotated_back(y, seed, size=128):
    """y rotated by the inverse of `rotate`, with signs drawn of the seed: FP64."""
    blocks = y.double().view(-1, size) @ hadamard_matrix(size) * torch.tensor(RHT_SIGNS * (size // 16))
    return flip(blocks.view(y.shape), seed, size, 1)


def draw(x, cast):
    """x quantized with signs of its own, rotated back: FP64."""
    seed = draw_seed(x.device)
    q = quantize(flip(x, seed, 128, 1), dataclasses.replace(cast, signs="fixed"))
    return rotated_back(q.dequantize(torch.float64), seed)


# ---------------------------------------------------------------------------- unbiased


@pytest.mark.parametrize(("rule", "error"), [("amax", 9.32e-3), ("best", 7.43e-3), ("fp8_exact", 15.0e-3)])
def test_the_mean_of_draws_converges_to_the_tensor(rule, error):
    """B draws, each with its own signs, have 1/B of the error: 9.3e-3, 2.3e-3, 5.8e-4, 1.5e-4, 3.7e-5."""
    x = torch.randn(64, 1024)
    mean = torch.zeros(64, 1024, dtype=torch.float64)
    for n in range(1, 257):
        mean += (draw(x, eden(rule)) - mean) / n
        if n in (1, 4, 16, 64, 256):
            assert relative_squared_error(mean, x) == pytest.approx(error / n, rel=0.03)
    assert (mean * x).sum() / (x * x).sum() == pytest.approx(1, abs=2e-4)


@pytest.mark.parametrize("size", [4.0, 1.0, 0.5, 0.25])
@pytest.mark.parametrize("rule", RULES)
def test_small_blocks_are_unbiased_too(rule, size):
    """Of a louder tensor, down to the smallest scale and below it, as long as something of a block is left."""
    x = torch.randn(64, 1024)
    x *= GRIDS[rule][1] * LIMITS[rule][0] * size / x.abs().max()
    amax, along = torch.tensor(math.prod(LIMITS[rule])), []
    for _ in range(16):
        signs = draw_seed(CPU)
        rotated = rotate(flip(x, signs, 128, 1), 128)
        y = quantize_rows(rotated, amax, draw_seed(CPU), eden(rule)).values()
        along.append((rotated_back(y, signs) * x).sum() / (x.double() ** 2).sum())
    assert torch.stack(along).mean() == pytest.approx(1, abs=0.005)


@pytest.mark.parametrize("rule", RULES)
def test_eight_random_bits_of_a_scale_are_enough(rule):
    """The mean over all bytes is off by at most 1/512 of a step, at random: nothing beside a draw's own error."""
    v = torch.randn(4096, 16) * 2
    q, scales = round_to(v, E2M1), torch.tensor(GRIDS[rule])[-torch.randint(20, 30, (4096, 1))]
    drawn = torch.cat([corrected(v, q, scales, b.expand(4096, 1), eden(rule)) for b in BYTES], 1)
    expected = (v * v).sum(1).double() / (v * q).sum(1) * scales[:, 0]
    off = drawn.double().mean(1) / expected - 1
    assert off.abs().max() < 1.01 * (0.34 if rule == "fp8_exact" else 0.125) / 512
    assert off.mean().abs() < 1e-5 and off.square().mean() < (2.5e-7 if rule == "fp8_exact" else 4e-8)


# ---------------------------------------------------------------------------- to the bit


def test_scales_between_two_of_the_grid_go_up_as_often_as_they_should():
    low, high = (torch.tensor(g)[:, None, None] for g in (FP8_EXACT_GRID[:-1], FP8_EXACT_GRID[1:]))
    k = torch.arange(256)[:, None]
    scale = (low + (high - low) * (k / 256)).expand(-1, -1, 256)
    got = _stochastic_fp8_exact(scale, BYTES.expand(scale.shape))
    assert ((got == low) | (got == high)).all()
    assert torch.equal((got == high).sum(2), k[:, 0].expand(len(low), -1))
    edges = torch.tensor([64.0, 70.0, float("nan")])
    got = _stochastic_fp8_exact(edges.expand(256, 3), BYTES[:, None].expand(256, 3))
    assert (got[:, :2] == 64).all() and got[:, 2].isnan().all()


@pytest.mark.parametrize("rule", ["amax", "fp8_exact"])
def test_it_is_this_arithmetic(rule):
    """In NumPy's FP32, term by term in the prescribed order."""
    f32 = np.float32
    x = torch.randn(64, 256) * 10 ** (-3 * torch.rand(64, 1))
    q = quantize(x, Cast(rounding="eden", scale_rule=rule), generator=torch.Generator().manual_seed(3))
    random = random_bytes(torch.empty(64, 16), draw_seed(CPU, torch.Generator().manual_seed(3)))
    bound, cap = LIMITS[rule]
    blocks = x.numpy().reshape(-1, 16)
    encode = f32(bound * cap) / np.abs(blocks).max()
    ideal = np.abs(blocks).max(1) * (encode * f32(1 / bound))
    if rule == "amax":
        base = torch.from_numpy(ideal).to(E4M3.dtype).float().numpy()
        base = np.maximum(base, f32(2.0**-9))
    else:
        grid = np.array(FP8_EXACT_GRID[1:], f32)
        power = f32(2) ** np.floor(np.log2(ideal))
        bounds = [((ideal > b * power) * power * s) for b, s in ((9 / 8, 1.25), (45 / 32, 1.5), (111 / 64, 2.0))]
        base = np.clip(np.max([power, *bounds], 0), grid[0], grid[-1]).astype(f32)
    v = blocks * (f32(1) / (base * (f32(1) / encode)))[:, None]
    elements = round_to(torch.from_numpy(v), E2M1).numpy()

    def total(d):
        for half in (8, 4, 2, 1):
            d = d[:, :half] + d[:, half:]
        return d[:, 0]

    left = total(v * elements)
    safe = np.where(left == 0, f32(1), left)
    scale = np.where(left == 0, f32(0), total(v * v) / safe) * base
    full = np.array(GRIDS[rule], f32)
    below = full[np.searchsorted(full, scale, side="right") - 1]
    above = full[np.searchsorted(full, scale, side="right")]
    draws = (random.numpy().reshape(-1).astype(f32) + f32(0.5)) / f32(256)
    expected = np.where((scale - below) + (above - below) * draws >= above - below, above, below)
    assert np.array_equal(q.scales.float().numpy().reshape(-1), expected)
    codes = unpack_nibbles(q.codes).numpy().reshape(-1, 16)
    assert np.array_equal(np.array([*E2M1.grid, *E2M1.grid])[codes], np.abs(elements))


# ---------------------------------------------------------------------------- edges


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("outer", ["tensor", "row", "bound"])
def test_zeros_tiny_and_huge_values_stay_finite(rule, dtype, outer):
    info = torch.finfo(dtype)
    cast = Cast(rounding="eden", scale_rule=rule, outer=outer, hadamard=16 if outer == "bound" else 0)
    pattern = torch.randn(32, 128).clamp(-1, 1)
    for size in (0.0, info.smallest_normal * info.eps, info.tiny, 1.0, info.max / 16):
        x = (pattern * size).to(dtype)
        q = quantize(x, cast)
        y = q.dequantize(torch.float64)
        assert y.isfinite().all() and q.scales.float().isfinite().all()
        if size >= 1.0:
            assert relative_squared_error(y, rotate(x, 16) if outer == "bound" else x) < 0.03


@pytest.mark.parametrize("rule", RULES)
def test_blocks_of_which_nothing_is_left_are_zero(rule):
    """An empty one, and one below a quarter of the smallest scale; their codes are 0, and so are their scales."""
    x = torch.zeros(1, 64)
    x[0, 0], x[0, 16:32] = 1000.0, 1e-6
    x[0, 48:] = torch.linspace(-1, 1, 16)
    q = quantize(x, Cast(rounding="eden", scale_rule=rule))
    assert q.scales.float()[0, 1:3].tolist() == [0, 0] and (q.scales.float()[0, [0, 3]] > 0).all()
    assert unpack_nibbles(q.codes)[0, 16:48].count_nonzero() == 0
    assert quantize(torch.zeros(2, 32), Cast(rounding="eden", scale_rule=rule)).dequantize().count_nonzero() == 0


@pytest.mark.parametrize("rule", RULES)
def test_no_scale_saturates(rule):
    """The largest correction there is: most elements just below 5, which become 4; in every block the largest."""
    cap = 320.0 if rule == "best" else LIMITS[rule][1]  # six codes above 192
    top = torch.linspace(5.2, 7, 1024)
    v = torch.full((1024, 16), 4.9999)
    v[:, 0] = top
    scales = torch.full((1024, 1), cap)
    for byte in (0, 255):
        got = corrected(v, round_to(v, E2M1), scales, torch.full((1024, 1), byte, dtype=torch.uint8), eden(rule))
        assert got.max() < GRIDS[rule][-1] or byte == 255 and rule == "fp8_exact"
    assert ((v * v).sum(1) / (v * round_to(v, E2M1)).sum(1)).max() < 1.24 < GRIDS[rule][-1] / cap


def test_codes_are_those_of_rounding_to_nearest_under_the_scale_that_it_chooses():
    """Where both have one FP32 scale: nearest's amax makes 256, here it makes 192."""
    x = torch.randn(32, 256)
    amax = x.abs().max() * 4
    cast, eden = Cast(scale_rule="best"), Cast(rounding="eden", scale_rule="best")
    nearest = quantize_rows(x, amax * (256 / 192), None, cast)
    corrected = quantize_rows(x, amax, draw_seed(CPU), eden)
    assert torch.equal(nearest.elements, corrected.elements) and not torch.equal(nearest.scales, corrected.scales)
    assert (corrected.scales / nearest.scales - 1).abs().max() < 0.25


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("outer", ["tensor", "row"])
@pytest.mark.parametrize("rule", RULES)
def test_non_finite_values_are_never_hidden(rule, outer, bad):
    x = torch.randn(32, 128)
    x[3, 5] = bad
    q = quantize(x, Cast(rounding="eden", scale_rule=rule, outer=outer))
    y = q.dequantize()
    assert not y[3].isfinite().any() and q.scales[3, 0].isnan()
    assert y[4:].isfinite().all() if outer == "row" else not y.isfinite().any()


def test_redrawn_signs_are_for_gemms():
    x, cast, fixed = torch.randn(32, 128), Cast(hadamard=16, signs="random"), Cast(hadamard=16)
    with pytest.raises(ValueError, match="Quantize hf_nvfp4.rounding.flip"):
        quantize(x, cast)
    backend, signs = BACKENDS["reference"], draw_signs(Gemm(cast, cast), CPU)
    with pytest.raises(ValueError, match="RHT-16 redrawn RNE needs drawn signs"):
        gemm.cast(x, backend, row=cast)
    with pytest.raises(ValueError, match="RHT-16 RNE takes no drawn signs"):
        gemm.cast(x, backend, col=fixed, col_signs=signs)
    row, col = gemm.cast(x, backend, row=cast, col=cast, row_signs=signs, col_signs=signs)
    assert torch.equal(row.codes, quantize(flip(x, signs, 16, 1), fixed).codes)
    assert torch.equal(col.codes, quantize(flip(x.T, signs, 16, 1).contiguous(), fixed).codes)


# ---------------------------------------------------------------------------- layers


def run(layer, x, dy):
    """dx and dw of one forward and backward."""
    layer.zero_grad()
    x = x.clone().requires_grad_()
    layer(x).backward(dy)
    return x.grad, layer.weight.grad


def layer_and_data(recipe=HOPPER_EDEN, backend="auto", tokens=96):
    x, dy = torch.randn(tokens, 128), torch.randn(tokens, 256)
    return NVFP4Linear(128, 256, bias=False, recipe=recipe, backend=backend), x, dy


def exact(layer, x, dy):
    return dy.double() @ layer.weight.detach().double(), dy.double().T @ x.double()


def test_gradients_converge_to_the_exact_product():
    """Both operands are unbiased and drawn apart, so the mean of a product is the product of means."""
    layer, x, dy = layer_and_data(tokens=128)
    limits = exact(layer, x, dy)
    means, errors = [torch.zeros_like(limit) for limit in limits], {}
    for n in range(1, 129):
        for mean, got in zip(means, run(layer, x, dy), strict=True):
            mean += (got.double() - mean) / n
        errors[n] = [relative_squared_error(*pair) for pair in zip(means, limits, strict=True)]
    for n in (8, 32, 128):
        assert errors[n] == pytest.approx([e / n for e in errors[1]], rel=0.1)
    assert errors[1] == pytest.approx([0.030, 0.030], rel=0.1)


@pytest.mark.parametrize("backend", ["bf16", "reference"])
def test_both_operands_of_a_gemm_have_the_same_signs(monkeypatch, backend):
    """In every GEMM, and others in the next; a rotation with two choices of signs would leave nothing of a product."""
    redrawn = Cast(hadamard=16, signs="random")
    recipe = Recipe("redrawn", (redrawn, redrawn), (redrawn, redrawn), (redrawn, redrawn))
    layer, x, dy = layer_and_data(recipe, backend, tokens=33)
    operands = []
    monkeypatch.setattr(linear_module, "multiply", lambda a, b, *rest: operands.append((a, b)) or multiply(a, b, *rest))
    gradients = run(layer, x, dy)
    for got, expected in zip(gradients, exact(layer, x, dy), strict=True):
        assert relative_squared_error(got, expected) < 0.03
    assert len(operands) == 3
    for got, expected in zip(run(layer, x, dy), gradients, strict=True):
        assert 1e-3 < relative_squared_error(got, expected) < 0.06


def test_a_rotation_with_redrawn_signs_leaves_the_product_of_a_layer():
    """In high precision: BF16 operands of 8 bits rotated in FP8's wide steps differ by those steps only."""
    wide = Cast("fp8_e5m2", hadamard=128, signs="random")
    layer, x, dy = layer_and_data(Recipe("wide", (wide, wide), (wide, wide), (wide, wide)))
    plain = Cast("fp8_e5m2")
    for got, expected in zip(run(layer, x, dy), exact(layer, x, dy), strict=True):
        assert relative_squared_error(got, expected) < 6e-3
    other = NVFP4Linear.convert(layer, Recipe("plain", (plain, plain), (plain, plain), (plain, plain)))
    for got, expected in zip(run(other, x, dy), exact(layer, x, dy), strict=True):
        assert relative_squared_error(got, expected) < 6e-3


def test_a_resumed_run_draws_the_same():
    layer, x, dy = layer_and_data()
    run(layer, x, dy)
    state = torch.get_rng_state()
    first = run(layer, x, dy)
    second = run(layer, x, dy)
    torch.set_rng_state(state)
    for again, before, after in zip(run(layer, x, dy), first, second, strict=True):
        assert torch.equal(again, before) and not torch.equal(again, after)


def test_no_signs_are_drawn_where_they_are_fixed_or_not_needed(monkeypatch):
    drawn = []
    monkeypatch.setattr("hf_nvfp4.gemm.draw_seed", lambda *a, **k: drawn.append(k) or draw_seed(*a, **k))
    layer, x, dy = layer_and_data()
    run(layer, x, dy)
    assert drawn == [{"by_rank": False}] * 2  # dgrad, wgrad
    layer.requires_grad_(False)
    run_frozen = x.clone().requires_grad_()
    layer(run_frozen).backward(dy)
    assert len(drawn) == 3
    layer.eval()
    with torch.no_grad():
        assert torch.equal(layer(x), layer(x)) and len(drawn) == 3


def test_a_chosen_scale_is_the_one_that_rounding_to_nearest_would_choose():
    x = torch.randn(32, 256)
    x[0, 0] = 256.0 / 192 * x.abs().max()  # under nearest the largest scale by amax is 256, here 192
    nearest = quantize(x * (192 / 256), Cast(scale_rule="best"))
    x[0, 0] = x[0, 1:].abs().max()
    eden = quantize(x, Cast(rounding="eden", scale_rule="best"))
    assert nearest.codes.shape == eden.codes.shape


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_gradients_reach_the_loss_scaler(bad):
    layer, x, dy = layer_and_data()
    dy[3, 3] = bad
    assert not any(gradient.isfinite().any() for gradient in run(layer, x, dy))


def test_a_switch_to_bf16_and_other_gemms_mix():
    """A redrawn GEMM beside one in BF16, and beside other roundings."""
    for recipe in (HOPPER_EDEN.in_bf16("forward"), Recipe("mixed", (Cast(), Cast()), HIGH_PRECISION, (EDEN, EDEN))):
        layer, x, dy = layer_and_data(recipe)
        for got, expected in zip(run(layer, x, dy), exact(layer, x, dy), strict=True):
            assert relative_squared_error(got, expected) < 0.04


NEEDS_A_COMPILER = pytest.mark.skipif(not shutil.which("c++"), reason="inductor needs a C++ compiler")
REDRAWN_FP8 = Cast("fp8_e4m3", hadamard=16, signs="random")


@pytest.mark.parametrize(
    ("dgrad", "wgrad", "backend"),
    [
        ((eden(hadamard=16),) * 2, (eden(hadamard=16),) * 2, "aot_eager"),
        pytest.param(HIGH_PRECISION, (REDRAWN_FP8, REDRAWN_FP8), "inductor", marks=NEEDS_A_COMPILER),
    ],
    ids=["aot_eager", "inductor"],
)
def test_compiles_into_one_graph(dgrad, wgrad, backend):
    """And both operands have the same signs, also those that a compiler might draw twice.

    Draws come in another order than in eager mode.
    """
    torch._dynamo.reset()
    layer, x, dy = layer_and_data(Recipe("small", HIGH_PRECISION, dgrad, wgrad))
    compiled = torch.compile(layer, fullgraph=True, backend=backend)
    first, second = run(compiled, x, dy), run(compiled, x, dy)
    for got, expected in zip(first, exact(layer, x, dy), strict=True):
        assert relative_squared_error(got, expected) < 0.04
    assert not torch.equal(first[1], second[1])


@NEEDS_A_COMPILER
def test_inductor_computes_the_same_cast():
    """All but a few: it may fuse a product and a sum, which rounds once."""
    torch._dynamo.reset()
    x, cast, seed = torch.randn(32, 64), eden(hadamard=16), draw_seed(CPU)

    def values(x, seed):
        rotated = rotate(x, 16)
        return quantize_rows(rotated, rotated.abs().amax().float(), seed, cast).values()

    expected = values(x, seed)
    got = torch.compile(values, fullgraph=True)(x, seed)
    assert (got != expected).float().mean() < 0.02
