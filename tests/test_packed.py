"""Packed layers: the weights that training multiplied, in 4.5 bits; whole models that generate with them."""

import dataclasses
import weakref

import pytest
import torch
from torch import nn

from hf_nvfp4 import RECIPES, Cast, NVFP4Linear, PackedLinear, Recipe, pack_model, packed
from hf_nvfp4.backends import bf16
from hf_nvfp4.weights import why_not

RN = Cast()


def layer(recipe="nvfp4", sizes=(96, 48), dtype=torch.bfloat16, bias=True, device=None):
    return NVFP4Linear(*sizes, bias=bias, dtype=dtype, recipe=recipe, backend="bf16", device=device)


def multiplied(linear, dtype):
    """The weight that the training forward multiplies by, in float64."""
    return bf16.cast(linear.weight.detach().to(dtype), linear.train_recipe.fprop.b, None)[0].dequantize(torch.float64)


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipes_weights_are_packed_as_they_were_multiplied_or_refused(name, device):
    linear = layer(name, dtype=torch.float32, device=device)
    reason = why_not(linear.train_recipe)
    if reason is not None:
        with pytest.raises(ValueError, match="96→48: no packed weight: recipe"):
            PackedLinear.from_linear(linear)
        assert linear.train_recipe.fprop.b != RN
        return
    for dtype in (torch.float32, torch.bfloat16):
        q = PackedLinear.from_linear(linear, dtype=dtype).quantized()
        assert q.codes.shape == (48, 48) and q.scales.shape == (48, 6) and q.scales.dtype == torch.float8_e4m3fn
        assert q.dequantize(torch.float64).equal(multiplied(linear, dtype))
    if linear.train_recipe.fprop.a.block_format.high_precision:
        with pytest.raises(ValueError, match="multiplies activations in bf16, not NVFP4"):
            PackedLinear.from_linear(linear, activations=True)
        return
    x = torch.randn(3, 96, device=device)
    with torch.no_grad():
        assert PackedLinear.from_linear(linear, activations=True)(x).equal(linear.eval()(x))


def test_what_is_refused():
    def recipe(b, **changes):
        a = dataclasses.replace(b, square=False, rounding="nearest", outer="tensor")
        return Recipe("mine", (a, b), (RN, RN), (RN, RN), **changes)

    bad = {
        "weights in mxfp4, not NVFP4": recipe(Cast("mxfp4")),
        "weights rotated by 16": recipe(Cast(hadamard=16)),
        "rotated by 32": recipe(RN, basis=32),
        "scaled by x": recipe(RN, smooth=True),
        "in high precision with parts of x": recipe(RN, split="outliers"),
        "casts weights as nvfp4 1×16 SR": recipe(Cast(rounding="stochastic")),
        "per-row scale; the formats": recipe(Cast(outer="row")),
    }
    for match, wrong in bad.items():
        with pytest.raises(ValueError, match=match):
            PackedLinear.from_linear(layer(wrong))
    assert why_not(recipe(RN, split="mean")) is None
    with pytest.raises(ValueError, match="fprop|weights in bf16"):
        high = layer()
        high.set_recipe("nvfp4", high_precision="forward")
        PackedLinear.from_linear(high)
    with pytest.raises(ValueError, match="not loaded"):
        PackedLinear.from_linear(layer(device="meta"))
    with pytest.raises(ValueError, match="in_features=40 is not a multiple of 16"):
        PackedLinear(40, 16)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_w4a4_is_the_trained_layer_in_eval_mode(device, dtype):
    linear = layer(dtype=dtype, device=device).eval()
    ours = PackedLinear.from_linear(linear, activations=True)
    for shape in ((1, 1, 96), (2, 5, 96), (0, 96)):
        x = torch.randn(shape, device=device, dtype=dtype)
        with torch.no_grad():
            assert ours(x).equal(linear(x)) and ours(x).dtype == dtype
    x = torch.randn(3, 96, device=device, dtype=torch.float32)
    linear = layer(dtype=torch.float32, device=device).eval()
    ours = PackedLinear.from_linear(linear, activations=True, dtype=torch.bfloat16)
    with torch.no_grad(), torch.autocast(device.type, torch.bfloat16):
        assert ours(x).equal(linear(x))


@pytest.fixture
def kernel(monkeypatch, device):
    """The W4A16 kernel, on the CPU too."""
    cases = pytest.importorskip("kernel_cases", reason="the kernels need Triton")
    for mark in cases.MARKS:
        if mark.name == "skipif" and mark.args[0]:
            pytest.skip(mark.kwargs["reason"])
    monkeypatch.setattr(bf16, "KERNEL_DEVICES", {device.type})
    return cases.count_launches(monkeypatch)


@pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered:RuntimeWarning")
def test_w4a16_by_the_kernel_and_by_torch(kernel, device, monkeypatch):
    ours = PackedLinear.from_linear(layer(device=device))
    x = torch.randn(2, 3, 96, device=device, dtype=torch.bfloat16)
    weight = ours.quantized().dequantize(torch.float64)
    expected = x.double() @ weight.T + ours.bias.double()
    by_kernel = ours(x)
    assert kernel == ["w4a16_kernel"] and "W4A16, Triton kernel, 4.51 bits" in repr(ours)
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")(x)
    assert compiled.equal(by_kernel) and kernel == 2 * ["w4a16_kernel"]
    monkeypatch.setattr(bf16, "KERNEL_DEVICES", set())
    monkeypatch.setattr(packed, "CHUNK", 20 * 96)
    by_torch = ours(x)
    assert kernel == 2 * ["w4a16_kernel"] and "W4A16, plain PyTorch" in repr(ours)
    for y in (by_kernel, by_torch):
        assert y.dtype == torch.bfloat16 and y.shape == (2, 3, 48)
        torch.testing.assert_close(y.double(), expected, rtol=2**-8, atol=1e-5)


def test_it_gives_no_gradients(device):
    ours = PackedLinear.from_linear(layer(device=device))
    x = torch.randn(2, 96, device=device, dtype=torch.bfloat16)
    assert not ours.training and not any(p.requires_grad for p in ours.parameters())
    for run in (lambda: ours(x.clone().requires_grad_()), lambda: ours.train()(x)):
        with pytest.raises(RuntimeError, match="gives no gradients: its weight is 4-bit codes"):
            run()
    with torch.no_grad():
        assert ours(x).isfinite().all()
    with pytest.raises(TypeError, match="floating-point inputs, not torch.int64"):
        ours.eval()(torch.ones(2, 96, dtype=torch.int64, device=device))


def test_other_types_and_devices_leave_the_codes_alone():
    ours = PackedLinear.from_linear(layer())
    before = {name: tensor.clone() for name, tensor in ours.named_buffers()}
    ours.half().double().to(torch.float16)
    assert ours.bias.dtype == torch.float16
    for name, tensor in ours.named_buffers():
        assert tensor.dtype == before[name].dtype and tensor.float().equal(before[name].float())
    empty = PackedLinear(96, 48, device="meta", dtype=torch.bfloat16, recipe="nvfp4").to_empty(device="cpu")
    assert empty.load_state_dict(ours.state_dict()).missing_keys == []
    assert empty.quantized().dequantize().equal(ours.quantized().dequantize())


# ---------------------------------------------------------------------------- models


def test_a_packed_model(build, capsys):
    """Its linears' bytes, its logits against the trained model's, its table; and refusals that change nothing."""
    model = build("nvfp4").eval()
    ids = torch.randint(256, (2, 9))
    linears = {name: m for name, m in model.named_modules() if isinstance(m, NVFP4Linear)}
    before = sum(m.weight.numel() * 2 for m in linears.values())
    with torch.no_grad():
        trained = model(ids).logits
    weights, linears = [weakref.ref(m.weight) for m in linears.values()], len(linears)
    capsys.readouterr()
    assert pack_model(model, activations=True) is model
    out = capsys.readouterr().out
    layers = [m for m in model.modules() if isinstance(m, PackedLinear)]
    assert len(layers) == linears == 21 and not any(isinstance(m, NVFP4Linear) for m in model.modules())
    held = sum(t.nbytes for m in layers for t in (*m.parameters(), *m.buffers()))
    assert held <= 0.29 * before and all(weight() is None for weight in weights)
    assert model(ids).logits.equal(trained)
    assert "packed 21 linears; in_features=64, out_features=64, bias=False, W4A4, activations nvfp4 1×16 RNE" in out
    assert "| 64→96 " in out and "| all " in out and " 4.51 |" in out
    with pytest.raises(ValueError, match="no converted linear layers"):
        pack_model(model)
    with pytest.raises(RuntimeError, match="gives no gradients"):
        model.train()(ids)

    mixed = build({"mlp.*": "fp8", "self_attn.*": "nvfp4"})
    with pytest.raises(ValueError, match=r"layers\.0\.mlp\S* can't be packed: .*fp8_e4m3_block, not NVFP4"):
        pack_model(mixed)
    assert sum(isinstance(m, NVFP4Linear) for m in mixed.modules()) >= 21


def test_a_packed_model_generates_as_its_dequantized_weights_do(build):
    """Greedy, with a dynamic and a static cache, eagerly and in one graph."""
    model = pack_model(build("nvfp4").bfloat16().eval())
    plain = build().bfloat16().eval()
    for name, module in model.named_modules():
        if isinstance(module, PackedLinear):
            linear = plain.get_submodule(name)
            linear.weight = nn.Parameter(module.quantized().dequantize(torch.float32))
            linear.forward = lambda x, w=linear.weight: (x.float() @ w.T).to(x.dtype)
    ids = torch.randint(1, 256, (2, 5))
    settings = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    expected = plain.generate(ids, **settings)
    assert model.generate(ids, **settings).equal(expected) and expected.shape == (2, 11)
    assert model.generate(ids, cache_implementation="static", disable_compile=True, **settings).equal(expected)
    with torch.no_grad():
        logits = model(ids).logits
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")(ids).logits
    assert compiled.equal(logits)
