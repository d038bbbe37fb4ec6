"""The layer: every recipe and backend against float64, any shape and dtype, and what it keeps for backward."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from hf_nvfp4 import RECIPES, Cast, NVFP4Linear, Recipe, quantize, use_recipe
from hf_nvfp4.backends import BACKENDS, BY_NAME_ONLY, bf16
from hf_nvfp4.casts import SR_HEADROOM
from hf_nvfp4.gemm import backend_name
from hf_nvfp4.linear import quantized_linears
from hf_nvfp4.reference import rotate

RN, RN_2D, RN_H = Cast(), Cast(square=True), Cast(hadamard=16)
# The recipe nvfp4 with round to nearest everywhere: deterministic, with and without the rotation in wgrad.
NEAREST = {
    "norht": Recipe("nearest", (RN, RN_2D), (RN, RN_2D), (RN, RN)),
    "rht": Recipe("nearest_rht", (RN, RN_2D), (RN, RN_2D), (RN_H, RN_H)),
}
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
EXACT = [name for name in BACKENDS if name not in BY_NAME_ONLY]
RUNNABLE = [name for name in EXACT if BACKENDS[name].supports(NEAREST["rht"], DEVICE) is None]


def run(layer, x, dy):
    """y, dx, dw and db of one forward and backward."""
    layer.zero_grad()
    x = x.clone().requires_grad_()
    y = layer(x)
    y.backward(dy.to(y.dtype))
    return y.detach(), x.grad, layer.weight.grad, None if layer.bias is None else layer.bias.grad


def relative(a, b):
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


@pytest.mark.parametrize("backend", RUNNABLE)
@pytest.mark.parametrize("rotation", list(NEAREST))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_whole_layer_equals_the_golden_one(golden, device, backend, rotation, dtype):
    x, w, dy = (golden[f"linear/in/{name}"].to(device) for name in ("x", "w", "dy"))
    layer = NVFP4Linear(128, 96, bias=False, recipe=NEAREST[rotation], backend=backend, device=device, dtype=dtype)
    layer.weight.data.copy_(w)
    y, dx, dw, _ = run(layer, x.to(dtype), dy.to(dtype))
    for name, got in (("y", y), ("dx", dx), ("dw", dw)):
        expected = golden[f"linear/{rotation}/{str(dtype).removeprefix('torch.')}/{name}"].to(device)
        if dtype == torch.float32:
            assert relative(got, expected) < 3e-7, name
        else:
            # Another order of summation may move a value across a rounding boundary, rarely.
            assert (got != expected).float().mean() < 2e-3 and relative(got, expected) < 2e-4, name


@pytest.mark.parametrize("backend", RUNNABLE)
def test_gradients_equal_float64_from_the_dequantized_operands(device, backend):
    x, w, dy = (torch.randn(*s, device=device) for s in ((48, 64), (96, 64), (48, 96)))
    layer = NVFP4Linear(64, 96, recipe=NEAREST["rht"], backend=backend, device=device)
    layer.weight.data.copy_(w)
    y, dx, dw, db = run(layer, x, dy)

    def q(t, cast):
        return quantize(t.contiguous(), cast).dequantize(torch.float64)

    assert relative(y, q(x, RN) @ q(w, RN_2D).T + layer.bias.double()) < 3e-7
    assert relative(dx, q(dy, RN) @ q(w, RN_2D)) < 3e-7
    assert relative(dw, q(dy.T, RN_H) @ q(x.T, RN_H).T) < 3e-7
    assert torch.allclose(db, dy.sum(0), atol=1e-5)
    # And dw is a gradient: close to the unquantized one, as far apart as 4 bits put it.
    assert 0.02 < relative(dw, dy.double().T @ x.double()) < 0.25


@pytest.mark.parametrize("backend", ["bf16", "reference"])
def test_backward_can_use_what_the_forward_multiplied(device, backend):
    """x̂ and ŵ, here in BF16 GEMMs; and others of the layer's own recipe, cast once more."""
    plain, coarse = Cast("bf16"), Cast("mxfp4")
    for how in (plain, coarse):
        recipe = Recipe("again", (Cast(), Cast()), (plain, how), (plain, how), from_forward=True)
        layer = NVFP4Linear(64, 96, recipe=recipe, backend=backend, device=device)
        x, dy = torch.randn(64, 64, device=device), torch.randn(64, 96, device=device)
        x_hat, w_hat = (quantize(t, Cast()).dequantize() for t in (x, layer.weight.detach()))
        if how is coarse:
            x_hat, w_hat = (quantize(t.T.contiguous(), how).dequantize().T for t in (x_hat, w_hat))
        _, dx, dw, _ = run(layer, x, dy)
        assert relative(dx, dy.bfloat16().double() @ w_hat.bfloat16().double()) < 3e-7
        assert relative(dw, dy.bfloat16().double().T @ x_hat.bfloat16().double()) < 3e-7


@pytest.mark.parametrize("recipe", list(RECIPES))
def test_backends_agree_where_they_say_they_are_exact(device, recipe):
    x, dy = torch.randn(33, 128, device=device), torch.randn(33, 96, device=device)
    results = {}
    for backend in [name for name in EXACT if BACKENDS[name].supports(RECIPES[recipe], DEVICE) is None]:
        torch.manual_seed(0)
        layer = NVFP4Linear(128, 96, recipe=recipe, backend=backend, device=device)
        torch.manual_seed(5)
        results[backend] = run(layer, x, dy)
    for backend, result in results.items():
        # FP8 tensor cores keep about 14 bits of the largest product until a sum goes to FP32 (arXiv 2412.19437, section
        # 3.5.2): 4.5e-4 was seen in short sums, less in long ones; BF16 results are rounded by 1.7e-3.
        exact = BACKENDS[backend].exactness(RECIPES[recipe]).startswith("exact")
        # Rounded before it is rounded stochastically again, some of a from_forward operand goes the other way.
        rough = 5e-2 if RECIPES[recipe].from_forward else 5e-3
        tolerance = 1e-3 if backend == "fp8" else 3e-7 if exact else rough
        for got, expected in zip(result, results["reference"], strict=True):
            assert relative(got, expected) < tolerance, backend
    assert (bf16.exactness(RECIPES[recipe]) == "exact") == (recipe not in ("fp8", "tetrajet2_base"))


@pytest.mark.parametrize("recipe", ["nvfp4", "quartet2"])
def test_a_compiled_layer_takes_batches_of_other_sizes(device, recipe, monkeypatch):
    """The last batch of an epoch: dimensions become variables."""
    if device.type == "cpu":
        cases = pytest.importorskip("kernel_cases", reason="tracing the casts themselves takes a minute, kernels don't")
        if any(mark.name == "skipif" and mark.args[0] for mark in cases.MARKS):
            pytest.skip("tracing the casts themselves takes a minute; TRITON_INTERPRET=1 and Triton 3.9 have kernels")
        monkeypatch.setattr(bf16, "KERNEL_DEVICES", {"cpu"})
    torch._dynamo.reset()
    layer = NVFP4Linear(128, 64, recipe=recipe, backend="bf16", device=device)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    for batch in (4, 3, 2):
        x = torch.randn(batch, 64, 128, device=device, requires_grad=True)
        compiled(x).sum().backward()
        assert x.grad.isfinite().all() and x.grad.any()


def test_the_error_of_averaged_weight_gradients_falls_with_the_square_root(device):
    """Down to the bias that rounding x to nearest leaves (headroom takes away that of saturation)."""
    x, w, dy = (torch.randn(*s, device=device) for s in ((64, 64), (32, 64), (64, 32)))
    sr_h = Cast(rounding="stochastic", hadamard=16, headroom=SR_HEADROOM)
    layer = NVFP4Linear(64, 32, bias=False, device=device, recipe=Recipe("t", (RN, RN_2D), (RN, RN_2D), (sr_h, RN_H)))
    layer.weight.data.copy_(w)
    x_hat = quantize(x.T.contiguous(), RN_H).dequantize(torch.float64)
    limit = rotate(dy.T.contiguous(), 16).double() @ x_hat.T  # unquantized dy, rotated and rounded to BF16
    mean, errors = torch.zeros_like(limit), {}
    for n in range(1, 65):
        mean += (run(layer, x, dy)[2].double() - mean) / n
        errors[n] = relative(mean, limit)
    for n in (4, 16, 64):
        # 2,048 gradients: the relative spread of an error is about 2%, three times that is allowed for.
        assert errors[n] == pytest.approx(errors[1] / n**0.5, rel=0.1)
    exact = dy.double().T @ x.double()
    assert relative(mean, exact) == pytest.approx(relative(limit, exact), rel=0.1)


@pytest.mark.parametrize("recipe", ["nvfp4", "fp8", "fp8_tensor", "bf16"])
@pytest.mark.parametrize("shape", [(1,), (7,), (10,), (33,), (2, 5), (2, 3, 4), ()], ids=str)
def test_any_rank_and_token_count(device, recipe, shape):
    layer = NVFP4Linear(32, 48, recipe=recipe, device=device)
    x = torch.randn(*shape, 32, device=device, requires_grad=True)
    y = layer(x)
    y.square().sum().backward()
    assert y.shape == (*shape, 48) and x.grad.shape == x.shape
    plain = F.linear(x, layer.weight, layer.bias)
    assert relative(y.detach(), plain.detach()) < 0.25
    assert layer.weight.grad.isfinite().all() and layer.bias.grad.isfinite().all()


def test_integers_and_second_derivatives_are_refused(device):
    layer = NVFP4Linear(32, 48, device=device)
    with pytest.raises(TypeError, match="floating-point inputs, not torch.int64"):
        layer(torch.ones(4, 32, dtype=torch.int64, device=device))
    x = torch.randn(4, 32, device=device, requires_grad=True)
    (gradient,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_no_tokens_at_all(device):
    layer = NVFP4Linear(32, 48, device=device)
    y = layer(torch.empty(0, 32, device=device, requires_grad=True))
    y.sum().backward()
    assert y.shape == (0, 48) and layer.weight.grad.abs().max() == 0


@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("w_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("autocast", [None, torch.bfloat16, torch.float16], ids=str)
def test_dtypes_follow_linears_rules(device, x_dtype, w_dtype, autocast):
    layer = NVFP4Linear(64, 32, dtype=w_dtype, device=device)
    x = torch.randn(20, 64, dtype=x_dtype, device=device, requires_grad=True)
    with torch.autocast(device.type, autocast, enabled=autocast is not None):
        y = layer(x)
    y.float().square().sum().backward()
    assert y.dtype == (autocast or x_dtype)
    assert (x.grad.dtype, layer.weight.grad.dtype, layer.bias.grad.dtype) == (x_dtype, w_dtype, w_dtype)


def test_autocast_rounds_the_operands_as_fsdp_or_bf16_weights_would(device):
    """FP32 master weights under autocast and the same weights stored in BF16 give the same result."""
    master = NVFP4Linear(64, 32, bias=False, device=device)
    stored = NVFP4Linear(64, 32, bias=False, device=device, dtype=torch.bfloat16)
    stored.weight.data.copy_(master.weight.data)
    x = torch.randn(16, 64, device=device)
    with torch.autocast(device.type, torch.bfloat16):
        assert torch.equal(master(x), stored(x.bfloat16()))


def test_what_is_kept_for_backward_is_packed(device):
    layer = NVFP4Linear(256, 64, bias=False, device=device)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        layer(torch.randn(512, 256, device=device))
    activations = sum(t.numel() * t.element_size() for t in kept if t is not layer.weight and t.shape != (64, 256))
    assert activations <= 512 * 256 * 4.5 / 8 + 4


def test_a_frozen_weight_keeps_nothing_and_skips_wgrad(device, monkeypatch):
    layer = NVFP4Linear(64, 32, device=device).requires_grad_(False)
    multiplied = []
    monkeypatch.setattr("hf_nvfp4.linear.multiply", lambda *a: multiplied.append(1) or bf16.multiply(*a[:2], *a[3:]))
    x = torch.randn(16, 64, device=device, requires_grad=True)
    layer(x).sum().backward()
    assert len(multiplied) == 2 and layer.weight.grad is None and x.grad is not None


def test_in_eval_mode_a_token_does_not_depend_on_the_others(device):
    layer = NVFP4Linear(64, 32, device=device).eval()
    x = torch.randn(4, 64, device=device)
    loud = torch.cat([x, 1000 * torch.randn(1, 64, device=device)])
    assert torch.allclose(layer(loud)[:4], layer(x), rtol=0, atol=1e-6)
    layer.train()
    assert not torch.allclose(layer(loud)[:4], layer(x), rtol=0, atol=1e-3)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_gradients_reach_the_loss_scaler(device, bad):
    layer = NVFP4Linear(64, 32, device=device)
    dy = torch.randn(16, 32, device=device)
    dy[3, 3] = bad
    _, dx, dw, _ = run(layer, torch.randn(16, 64, device=device), dy)
    assert not dx.isfinite().all() and not dw.isfinite().all()


def test_conversion_keeps_the_parameters(device):
    linear = nn.Linear(32, 48, device=device)
    weight, keys = linear.weight, list(linear.state_dict())
    converted = NVFP4Linear.convert(linear, "nvfp4")
    assert converted is linear and converted.weight is weight and list(converted.state_dict()) == keys
    assert "recipe='nvfp4', backend='auto→bf16'" in repr(converted)


def test_use_recipe_is_temporary(device):
    model = nn.Sequential(NVFP4Linear(32, 32, device=device), nn.ReLU(), NVFP4Linear(32, 32, device=device))
    x = torch.randn(8, 32, device=device)
    before = model(x)
    with use_recipe(model, "bf16"):
        inside = model(x)
        assert {linear.recipe.name for linear in quantized_linears(model).values()} == {"bf16"}
    assert torch.equal(model(x), before) and not torch.equal(inside, before)
    with pytest.raises(ValueError, match="no converted linear layers"), use_recipe(nn.Linear(2, 2), "bf16"):
        pass


def test_wrong_sizes_and_names_are_errors():
    with pytest.raises(ValueError, match="17→16: in_features=17 is not a multiple of 16; use nn.Linear"):
        NVFP4Linear(17, 16)
    with pytest.raises(ValueError, match="unknown backend 'cuda'; known: auto, fp4, fp8, bf16, fp4_triton, reference"):
        NVFP4Linear(16, 16, backend="cuda")


def test_a_backend_that_does_not_fit_says_why(monkeypatch):
    monkeypatch.setattr(bf16, "supports", lambda recipe, device: "needs compute capability 8.0; this GPU is 7.5")
    with pytest.raises(ValueError, match="needs compute capability 8.0; this GPU is 7.5.*Use backend='reference'"):
        backend_name("bf16", RECIPES["nvfp4"], torch.device("cpu"))
    assert backend_name("auto", RECIPES["nvfp4"], torch.device("cpu")) == "reference"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bias", [False, True])
def test_a_compiled_layer_has_the_gradients_of_an_eager_one(device, dtype, bias):
    """In every compute dtype: torch 2.11 lost those of FP32 when the product was converted to what it was."""
    layer = NVFP4Linear(64, 96, bias, recipe=NEAREST["rht"], device=device, dtype=dtype)
    x, dy = torch.randn(33, 64, device=device, dtype=dtype), torch.randn(33, 96, device=device, dtype=dtype)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for got, expected in zip(run(compiled, x, dy)[:3], run(layer, x, dy)[:3], strict=True):
        assert expected.any() and relative(got, expected) < 1e-6
