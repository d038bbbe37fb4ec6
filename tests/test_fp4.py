"""Backend fp4 without an FP4 GPU: layouts against golden bytes, training through a stand-in for torch's GEMM."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from fp4_stand_in import (
    E2M1,
    LAYOUT,
    RECIPE,
    assert_trains_as_the_reference,
    close,
    identity_operand,
    layers,
    run,
    skip_unless_it_runs,
    stand_in,
    unswizzled,
)

from hf_nvfp4 import RECIPES, Cast, NVFP4Linear, Recipe, quantize
from hf_nvfp4.backends import BACKENDS, bf16, fp4, fp4_triton, reference
from hf_nvfp4.gemm import backend_name

RN, RN_2D, RN_H = Cast(), Cast(square=True), Cast(hadamard=16)
SR, SR_H = Cast(rounding="stochastic"), Cast(rounding="stochastic", hadamard=16)
NEAREST = Recipe("nearest", (RN, RN_2D), (RN, RN_2D), (RN_H, RN_H))
GOLDEN_CASTS = {"1d": RN, "2d": RN_2D}


@pytest.fixture
def blackwell(monkeypatch):
    """Backend fp4 on the CPU: everything is its own code but torch's GEMM. The list of result types of its calls."""
    calls = []
    monkeypatch.setattr(F, "scaled_mm", lambda *a, **k: calls.append(k["output_dtype"]) or stand_in(*a, **k))
    monkeypatch.setattr(fp4, "supports", lambda recipe, device: fp4.unfit(recipe))
    monkeypatch.setitem(BACKENDS, "fp4", fp4)
    return calls


@pytest.mark.parametrize("mode", ["1d", "2d", "1d_4over6_mae256", "2d_4over6_mae256"])
def test_the_stand_in_reads_golden_scales_where_they_were_written(golden, mode):
    names = [n.split("/")[1] for n in golden if n.startswith(f"{mode}/") and n.endswith("row_scale_swizzled")]
    assert names
    for name in names:
        linear = golden[f"{mode}/{name}/row_scale"].view(torch.float8_e4m3fn).double()
        assert unswizzled(golden[f"{mode}/{name}/row_scale_swizzled"], *linear.shape).equal(linear), name


def test_the_stand_in_multiplies_golden_operands(golden):
    """By an identity: what comes out is each code × scale × amax / 2688, element by element, near its input."""
    for name in ("randn_bf16", "randn_f32", "outlier_bf16", "ties_f32"):
        x = golden[f"in/{name}"].double()
        m, k = x.shape
        codes, swizzled = (golden[f"1d/{name}/row_{part}"] for part in ("codes", "scale_swizzled"))
        scale = golden[f"1d/{name}/row_scale"].view(torch.float8_e4m3fn).double()
        tensor_scale = (golden[f"1d/{name}/amax_row"].flatten() / 2688)[0]
        identity = identity_operand(k)
        got = stand_in(
            codes.view(torch.float4_e2m1fn_x2),
            identity.codes.view(torch.float4_e2m1fn_x2).T,
            [swizzled.view(torch.float8_e4m3fn), tensor_scale],
            RECIPE,
            [identity.scales, identity.tensor_scale],
            RECIPE,
            LAYOUT,
            LAYOUT,
            output_dtype=torch.float32,
        )
        for i, j in itertools.product(range(m), range(k)):
            value = E2M1[codes[i, j // 2].item() >> 4 * (j % 2) & 15] * scale[i, j // 16]
            assert got[i, j] == (value * tensor_scale.double()).float(), (name, i, j)
        assert (got - x).norm() < 0.12 * x.norm(), name


# ---------------------------------------------------------------------------- layouts

@pytest.mark.parametrize("mode", ["1d", "2d"])
def test_operands_are_golden_bytes(golden, mode):
    for key in [n for n in golden if n.startswith(f"{mode}/") and n.endswith("row_scale_swizzled")]:
        name = key.split("/")[1]
        x, cast = golden[f"in/{name}"], GOLDEN_CASTS[mode]
        row, col = fp4.cast(x, cast, cast)
        assert row.scales.view(torch.uint8).equal(golden[key]), name
        assert row.codes.equal(golden[f"{mode}/{name}/row_codes"]), name
        scale = golden[f"{mode}/{name}/col_scale"]
        assert col.codes.equal(golden[f"{mode}/{name}/col_codes"]), name
        assert unswizzled(col.scales, *scale.shape).equal(scale.view(torch.float8_e4m3fn).double()), name


@pytest.mark.parametrize("rows, blocks", [(1, 1), (127, 3), (128, 4), (129, 5), (300, 9), (1024, 64)])
def test_every_scale_stands_where_cublas_reads_it(rows, blocks):
    scales = torch.arange(rows * blocks).remainder(127).to(torch.uint8).view(rows, blocks)
    written = fp4.swizzle(scales.view(torch.float8_e4m3fn))
    assert written.shape == (-(-rows // 128) * 128, -(-blocks // 4) * 4) and written.is_contiguous()
    assert unswizzled(written, rows, blocks).equal(scales.view(torch.float8_e4m3fn).double())
    assert written.view(torch.uint8).sum() == scales.sum()  # the rest is zero


@pytest.mark.parametrize("rows, columns", [(1, 16), (7, 48), (33, 80), (130, 272), (257, 32)])
@pytest.mark.parametrize(
    "row, col",
    [
        (RN, RN_H),
        (SR, SR_H),
        (SR, None),
        (None, SR_H),
        (RN_2D, RN_2D),
        (Cast(outer="row"), Cast(outer="row")),
        (Cast(hadamard=32, rounding="stochastic"), Cast(hadamard=32, rounding="stochastic")),
        (Cast(scale_rule="4over6"), Cast(square=True, scale_rule="4over6")),
        (Cast("bf16"), SR_H),
        (SR, Cast("bf16", rounding="stochastic")),
    ],
    ids=str,
)
def test_the_kernels_write_the_same_operands(monkeypatch, device, row, col, rows, columns):
    ops = pytest.importorskip("hf_nvfp4.ops.cast")
    skip_unless_it_runs(ops.cast_kernel, device)
    if row is not None and row.hadamard:
        columns = -(-columns // row.hadamard) * row.hadamard
    x = torch.randn(rows, columns, device=device).bfloat16()
    pairs = []
    for devices in (set(), {device.type}):
        monkeypatch.setattr(bf16, "KERNEL_DEVICES", devices)
        torch.manual_seed(7)
        pairs.append(fp4.cast(x, row, col))
    for ours, theirs in zip(*pairs, strict=True):
        assert type(ours) is type(theirs)
        if isinstance(ours, fp4.Operand):
            for a, b in zip(ours.tensors, theirs.tensors, strict=True):
                assert (a.shape, a.dtype) == (b.shape, b.dtype) and bits(a).equal(bits(b)) and a.is_contiguous()
        elif ours is not None:
            assert ours.dequantize(torch.float32).equal(theirs.dequantize(torch.float32))


def bits(t):
    return t.view(-1).view(torch.uint8)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_operands_are_dequantized_to_the_same_bits_on_every_backend(dtype):
    x = torch.randn(208, 336)  # scales in two tiles each way, codes padded to 352 columns
    for cast in (RN, RN_2D, Cast(outer="row")):
        expected = quantize(x, cast).dequantize(dtype)
        for backend in (fp4, bf16, reference):
            got = backend.cast(x, cast, None)[0].dequantize(dtype)
            assert torch.equal(got[:, :336], expected) and not got[:, 336:].any()


def test_an_operand_is_small_and_rebuilt_from_its_tensors():
    x = torch.randn(256, 512).bfloat16()
    for operand in fp4.cast(x, RN, RN_H, keep_col=True):
        assert sum(t.nbytes for t in operand.tensors) <= 0.29 * x.nbytes
        again = fp4.Operand(*operand.tensors, operand.cast)
        assert all(a is b for a, b in zip(again.tensors, operand.tensors, strict=True))


# ---------------------------------------------------------------------------- what runs

def _gpu(monkeypatch, capability, name="NVIDIA"):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: name)


@pytest.mark.parametrize("capability", [(10, 0), (12, 0)])
def test_runs_nvfp4_and_bf16_gemms_on_blackwell(monkeypatch, capability):
    _gpu(monkeypatch, capability)
    nvfp4 = RECIPES["nvfp4"]
    for recipe in (nvfp4, nvfp4.per_token(), nvfp4.in_bf16("forward"), nvfp4.in_bf16("all"), RECIPES["nvfp4_unbiased"]):
        assert fp4.supports(recipe, torch.device("cuda")) is None
    assert "not run on hardware" in fp4.exactness(nvfp4)


def test_says_why_it_does_not_run(monkeypatch):
    _gpu(monkeypatch, (9, 0), "NVIDIA H100")
    monkeypatch.setitem(BACKENDS, "fp4", fp4)
    message = r"on cuda \(NVIDIA H100\): .* needs compute capability 10\.0 or 12\.0; this GPU is 9\.0"
    with pytest.raises(ValueError, match=message):
        backend_name("fp4", RECIPES["nvfp4"], torch.device("cuda"))
    with pytest.raises(ValueError, match="recipe 'nvfp4' does not run on cpu: .* Blackwell .* Use backend='bf16'"):
        backend_name("fp4", RECIPES["nvfp4"], torch.device("cpu"))
    _gpu(monkeypatch, (10, 0))
    assert "fprop is fp8_e4m3_block by fp8_e4m3_block" in fp4.supports(RECIPES["fp8"], torch.device("cuda"))
    mixed = Recipe("mixed", (RN, Cast("bf16")), (RN, RN_2D), (RN, RN))
    assert "fprop is nvfp4 by bf16" in fp4.supports(mixed, torch.device("cuda"))


def test_fp4_triton_runs_on_any_gpu_since_ampere(monkeypatch):
    pytest.importorskip("triton")
    for capability in ((8, 0), (9, 0), (10, 0)):
        _gpu(monkeypatch, capability)
        assert fp4_triton.supports(RECIPES["nvfp4"], torch.device("cuda")) is None
    _gpu(monkeypatch, (7, 5))
    assert "8.0" in fp4_triton.supports(RECIPES["nvfp4"], torch.device("cuda"))
    assert "NVIDIA GPU" in fp4_triton.supports(RECIPES["nvfp4"], torch.device("cpu"))


def test_refuses_what_the_hardware_has_not(blackwell):
    x = torch.randn(16, 32)
    (row, _), (plain, _) = fp4.cast(x, RN), fp4.cast(x, Cast("bf16"))
    with pytest.raises(ValueError, match="no GEMM of nvfp4 by bf16; use backend='bf16'"):
        fp4.multiply(row, plain, torch.float32)
    with pytest.raises(ValueError, match="K=32 and 64"):
        fp4.multiply(row, fp4.cast(torch.randn(16, 64), RN)[0], torch.float32)
    with pytest.raises(ValueError, match="multiple of 16 columns, not 7"):
        fp4.multiply(row, fp4.cast(x[:7], RN)[0], torch.float32)
    with pytest.raises(ValueError, match="K a multiple of 16, not"):
        fp4.cast(x[:, :24], RN)
    assert not blackwell


# ---------------------------------------------------------------------------- training

@pytest.mark.parametrize("tokens", [1, 7, 33, 128, 257])
@pytest.mark.parametrize("recipe", [NEAREST, "nvfp4", "nvfp4_unbiased", "quartet2", "nvfp4_best"], ids=str)
def test_trains_as_the_reference_does(blackwell, recipe, tokens):
    x, dy = torch.randn(tokens, 48), torch.randn(tokens, 80)  # 48 and 80 are no multiples of 32
    ours, theirs = layers(recipe, "fp4", (48, 80))
    for got, expected in zip(run(ours, x, dy), run(theirs, x, dy), strict=True):
        assert close(got, expected)
    assert len(blackwell) == 3  # fprop, dgrad, wgrad


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("bias", [False, True])
def test_dtypes_and_biases(blackwell, dtype, bias):
    x, dy = torch.randn(40, 64, dtype=dtype), torch.randn(40, 96, dtype=dtype)
    ours, theirs = layers("nvfp4", "fp4", (64, 96), bias=bias, dtype=dtype)
    for got, expected in zip(run(ours, x, dy), run(theirs, x, dy), strict=True):
        assert got is expected is None or got.dtype == expected.dtype and close(got, expected)
    assert blackwell == [torch.float32 if bias else dtype, dtype, dtype]


def test_a_bias_of_another_type_is_not_rounded(blackwell):
    ours, theirs = layers("nvfp4", "fp4", (64, 96))
    x = torch.randn(8, 64)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        got, expected = ours(x), theirs(x)
    assert got.dtype == torch.bfloat16 and blackwell == [torch.float32]
    assert close(got, expected)


def test_a_golden_layer(golden, blackwell):
    x, w, dy = (golden[f"linear/in/{name}"] for name in ("x", "w", "dy"))
    layer = NVFP4Linear(128, 96, bias=False, recipe=NEAREST, backend="fp4")
    layer.weight.data.copy_(w)
    for name, got in zip(("y", "dx", "dw"), run(layer, x.float(), dy.float()), strict=False):
        assert close(got, golden[f"linear/rht/float32/{name}"]), name


def test_tokens_do_not_depend_on_each_other_at_inference(blackwell):
    layer = NVFP4Linear(64, 96, recipe="nvfp4", backend="fp4").eval()
    x = torch.randn(9, 64) * torch.logspace(-3, 3, 9)[:, None]
    with torch.no_grad():
        together, alone = layer(x), torch.cat([layer(row[None]) for row in x])
    assert together.equal(alone)
    expected = NVFP4Linear.convert(layer, "nvfp4", "reference").eval()(x).detach()
    assert close(together, expected)


@pytest.mark.parametrize("gemms, native", [("forward", 2), ("all", 0)])
def test_a_switch_to_bf16_keeps_running(blackwell, gemms, native):
    ours, theirs = layers("nvfp4", "fp4", (64, 96))
    for layer in (ours, theirs):
        layer.set_recipe("nvfp4", high_precision=gemms)
    x, dy = torch.randn(24, 64), torch.randn(24, 96)
    for got, expected in zip(run(ours, x, dy), run(theirs, x, dy), strict=True):
        assert close(got, expected)
    assert len(blackwell) == native


def test_nan_and_inf_come_through(blackwell):
    for value in (float("nan"), float("inf")):
        x = torch.randn(8, 64)
        x[3, 5] = value
        layer = NVFP4Linear(64, 96, recipe="nvfp4", backend="fp4")
        assert not layer(x).isfinite().any()


def test_a_tiny_llama_trains(blackwell, build, llama_config):
    assert_trains_as_the_reference(build, llama_config, "nvfp4", "fp4")
    assert len(blackwell) >= 3 * 20


def test_compiles_into_one_graph(blackwell):
    layer = NVFP4Linear(64, 96, recipe=NEAREST, backend="fp4")
    x, dy = torch.randn(32, 64), torch.randn(32, 96)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")  # inductor would compile the stand-in
    for got, expected in zip(run(compiled, x, dy), run(layer, x, dy), strict=True):
        assert close(got, expected)
    assert len(blackwell) == 6


def test_backends_share_an_interface():
    for module in (bf16, reference, fp4, fp4_triton):
        assert all(callable(getattr(module, name)) for name in ("supports", "exactness", "cast", "multiply"))
