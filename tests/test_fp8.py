"""Backend fp8 without such a GPU: operands bit for bit, training against the reference, what it refuses."""

import dataclasses

import pytest
import torch
from fp4_stand_in import assert_trains_as_the_reference, close, layers, run, skip_unless_it_runs, unswizzled
from fp8_stand_in import CUDA, gpu, run_on_the_cpu, watched

from hf_nvfp4 import RECIPES, Cast, NVFP4Linear, Recipe
from hf_nvfp4.backends import BACKENDS, bf16, fp4, fp8, fp8_rounded, reference
from hf_nvfp4.formats import FP8_EXACT_RANGE, FP8_EXACT_SIGNIFICANDS
from hf_nvfp4.gemm import backend_name
from hf_nvfp4.rounding import draw_seed

HOPPER = RECIPES["nvfp4_hopper"]
RN, RN_2D = HOPPER.fprop
SR, SR_H, RN_H = HOPPER.dgrad.a, *HOPPER.wgrad
E4M3, E5M2 = Cast("fp8_e4m3"), Cast("fp8_e5m2")
BLOCKS, BLOCKS_2D = Cast("fp8_e4m3_block"), Cast("fp8_e4m3_block", square=True)
EDEN = Cast(rounding="eden", hadamard=32, scale_rule="fp8_exact")
NEAREST = Recipe("nearest", (RN, RN_2D), (RN, RN_2D), (RN_H, RN_H))


@pytest.fixture
def ready(monkeypatch):
    run_on_the_cpu(monkeypatch)


@pytest.fixture
def hopper(ready, monkeypatch):
    return watched(monkeypatch)


# ---------------------------------------------------------------------------- operands

CASTS = [RN, RN_2D, SR, RN_H, SR_H, E4M3, E5M2, BLOCKS, BLOCKS_2D, Cast("fp8_e4m3", rounding="stochastic", hadamard=16)]


def reference_of(x, casts):
    torch.manual_seed(7)
    return reference.cast(x, *casts)


@pytest.mark.parametrize("cast", CASTS, ids=str)
@pytest.mark.parametrize("rows, columns", [(1, 16), (33, 80), (130, 272)])
def test_operands_are_the_references_values_exactly(cast, rows, columns):
    x = torch.randn(rows, columns) * torch.logspace(-6, 2, columns)
    row = None if cast.square and cast.block_format.block == 16 and rows % 16 else cast
    if row is not None and row.square and columns % 16:
        row = None
    torch.manual_seed(7)
    ours = fp8.cast(x, row, cast, keep_col=True)
    for operand, expected in zip(ours, reference_of(x, (row, cast)), strict=True):
        if expected is not None:
            assert operand.values.dtype == (torch.float8_e5m2 if cast == E5M2 else torch.float8_e4m3fn)
            assert operand.values.is_contiguous() and operand.values.shape == expected.shape
            for dtype in (torch.float32, torch.float64):
                assert operand.dequantize(dtype).equal(expected.dequantize(dtype))


def test_every_code_times_every_scale_is_an_e4m3_value():
    """What the backend rests on: casting to E4M3 rounds nothing."""
    low, high = FP8_EXACT_RANGE
    scales = [s * 2.0**e for e in range(-6, 7) for s in FP8_EXACT_SIGNIFICANDS if low <= s * 2.0**e <= high]
    assert len(scales) == 37
    products = torch.tensor([code * s for code in (0, 0.5, 1, 1.5, 2, 3, 4, 6) for s in scales])
    assert products.to(torch.float8_e4m3fn).float().equal(products)


@pytest.mark.parametrize("value", [0.0, -0.0, 1e-38, 1e-45, 1e37], ids=str)
def test_extreme_tensors(value):
    x = torch.full((16, 32), value)
    for cast in (RN, RN_2D, SR_H, E4M3, E5M2, BLOCKS):
        torch.manual_seed(7)
        (operand, _), (expected, _) = fp8.cast(x, cast), reference_of(x, (cast, None))
        got, wanted = operand.dequantize(torch.float32), expected.dequantize(torch.float32)
        assert got.equal(wanted) and torch.signbit(got).equal(torch.signbit(wanted))


KERNEL_CASTS = [
    (RN, RN_H),
    (SR, SR_H),
    (RN_2D, RN_2D),
    (SR, None),
    (None, RN_H),
    (Cast(), Cast(rounding="stochastic", hadamard=16)),
    (E4M3, E5M2),
    (BLOCKS, BLOCKS),
    (BLOCKS_2D, BLOCKS_2D),
    (dataclasses.replace(RN, outer="row"), dataclasses.replace(RN, outer="row")),
    (Cast(hadamard=32, scale_rule="fp8_exact"), Cast(hadamard=32, rounding="stochastic", scale_rule="fp8_exact")),
    (Cast("bf16"), SR_H),
    (SR, Cast("bf16", rounding="stochastic")),
    (SR, Cast("mxfp4", rounding="stochastic")),
]


@pytest.mark.parametrize("rows, columns", [(1, 16), (33, 80), (257, 288)])
@pytest.mark.parametrize("row, col", KERNEL_CASTS, ids=str)
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
        pairs.append(fp8_rounded.cast(x, row, col) if Cast() in (row, col) else fp8.cast(x, row, col))
    for ours, theirs in zip(*pairs, strict=True):
        assert type(ours) is type(theirs)
        if isinstance(ours, fp8.Operand):
            for a, b in zip(ours.tensors, theirs.tensors, strict=True):
                assert a is b is None or a.dtype == b.dtype and a.is_contiguous()
                assert a is None or a.float().equal(b.float())
        elif ours is not None:
            assert ours.dequantize(torch.float32).equal(theirs.dequantize(torch.float32))


@pytest.mark.parametrize("kernels", [False, True])
@pytest.mark.parametrize("rows, columns", [(33, 64), (48, 160)])
def test_codes_and_scales_are_equal_across_backends(monkeypatch, device, kernels, rows, columns):
    """On Hopper, on Blackwell and in emulation a recipe gives the same quantized operands from the same seed."""
    if kernels:
        skip_unless_it_runs(pytest.importorskip("hf_nvfp4.ops.cast").cast_kernel, device)
    monkeypatch.setattr(bf16, "KERNEL_DEVICES", {device.type} if kernels else set())
    x = torch.randn(rows, columns, device=device).bfloat16()
    drawn = draw_seed(x.device)
    pairs = [(RN, RN_H), (SR, SR_H), (None, RN_2D), (SR, EDEN), (EDEN, SR_H), (EDEN, EDEN)]
    pairs = [(*pair, None) for pair in pairs + [(RN_2D, None)] * (rows % 16 == 0)]
    for row, col, signs in (*pairs, (EDEN, None, drawn), (None, EDEN, drawn)):
        found = {}
        for backend in (reference, bf16, fp4, fp8):
            torch.manual_seed(7)
            found[backend] = backend.cast(x, row, col, True, signs)
        for side, expected in enumerate(found[reference]):
            if expected is None:
                continue
            packed = found[fp4][side]
            assert packed.codes[:, : expected.codes.shape[1]].equal(expected.codes)
            assert unswizzled(packed.scales.cpu(), *expected.scales.shape).equal(expected.scales.double().cpu())
            assert packed.tensor_scale.equal(expected.tensor_scale)
            for backend in (bf16, fp8):
                assert found[backend][side].dequantize(torch.float32).equal(expected.dequantize(torch.float32))
            unpacked = bf16._unpacked(found[bf16][side])
            assert unpacked.dequantize(torch.float32).equal(expected.dequantize(torch.float32))


def test_what_is_kept_is_half_of_bf16_and_rebuilt_from_its_tensors():
    x = torch.randn(256, 512).bfloat16()
    for operand in (*fp8.cast(x, RN, RN_H, keep_col=True), *fp8.cast(x, BLOCKS, BLOCKS, keep_col=True)):
        assert sum(t.nbytes for t in operand.tensors if t is not None) <= 0.52 * x.nbytes
        again = type(operand)(*operand.tensors, operand.cast)
        assert all(a is b for a, b in zip(again.tensors, operand.tensors, strict=True))


# ---------------------------------------------------------------------------- what runs where


@pytest.mark.parametrize("capability, expected", [((8, 0), "bf16"), ((8, 9), "fp8"), ((9, 0), "fp8"), ((10, 0), "fp4")])
def test_auto_takes_the_fastest_exact_one(monkeypatch, capability, expected):
    gpu(monkeypatch, *capability)
    for recipe in (HOPPER, HOPPER.per_token(), HOPPER.in_bf16("forward")):
        assert backend_name("auto", recipe, CUDA) == expected
        assert BACKENDS[expected].exactness(recipe).startswith("exact")
    assert backend_name("auto", RECIPES["bf16"], CUDA) == "bf16"
    assert backend_name("auto", RECIPES["nvfp4"], CUDA) == ("fp4" if expected == "fp4" else "bf16")
    assert backend_name("auto", RECIPES["fp8_tensor"], CUDA) == ("bf16" if expected == "bf16" else "fp8")
    assert backend_name("auto", RECIPES["fp8"], CUDA) == ("fp8" if capability == (9, 0) else "bf16")


def test_says_why_it_does_not_run(monkeypatch):
    assert "an NVIDIA GPU since Ada and Hopper" in fp8.supports(HOPPER, torch.device("cpu"))
    gpu(monkeypatch, 8, 6)
    with pytest.raises(ValueError, match=r"needs compute capability 8\.9; this GPU is 8\.6. Use backend='bf16'"):
        backend_name("fp8", HOPPER, CUDA)
    gpu(monkeypatch, 9, 0)
    message = r"scale_rule='fp8_exact'.*; fprop is nvfp4 1×16 RNE by nvfp4 16×16 RNE. Use backend='bf16'"
    with pytest.raises(ValueError, match=message):
        backend_name("fp8", RECIPES["nvfp4"], CUDA)
    gpu(monkeypatch, 8, 9)
    assert "needs compute capability 9.0 for FP8 with block scales; this GPU is 8.9" in fp8.supports(
        RECIPES["fp8"], CUDA
    )
    gpu(monkeypatch, 9, 0, cuda="12.8")
    assert "needs CUDA 12.9" in fp8.supports(RECIPES["fp8"], CUDA)


@pytest.mark.parametrize(
    "pair, reason",
    [
        ((RN, E4M3), None),
        ((E5M2, RN_2D), None),
        ((E5M2, E5M2), "no GEMM of E5M2 by E5M2; dgrad is fp8_e5m2 RNE by fp8_e5m2 RNE"),
        ((BLOCKS_2D, BLOCKS_2D), "no GEMM of 128×128 by 128×128"),
        ((BLOCKS, E4M3), "equal kinds of scales"),
        ((RN, Cast("bf16")), "bf16 by bf16; dgrad is"),
        ((Cast("mxfp8"), Cast("mxfp8")), "equal kinds of scales"),
        ((RN, Cast()), "fp8_exact"),
    ],
    ids=str,
)
def test_pairs(monkeypatch, pair, reason):
    gpu(monkeypatch, 9, 0)
    recipe = Recipe("pair", (RN, RN_2D), pair, (RN_H, SR_H))
    found = fp8.supports(recipe, CUDA)
    assert found is None if reason is None else reason in found
    assert fp8_rounded.supports(recipe, CUDA) is None


def test_refuses_what_the_hardware_has_not(hopper):
    x = torch.randn(32, 128)
    operands = {c: fp8.cast(x, c)[0] for c in (RN, E5M2, BLOCKS, BLOCKS_2D, Cast("bf16"))}
    for a, b in ((RN, Cast("bf16")), (Cast("bf16"), RN), (RN, BLOCKS), (E5M2, E5M2), (BLOCKS_2D, BLOCKS_2D)):
        with pytest.raises(ValueError, match="no GEMM of .*; use backend='bf16'"):
            fp8.multiply(operands[a], operands[b], torch.float32)
    with pytest.raises(ValueError, match="K=128 and 64"):
        fp8.multiply(operands[RN], fp8.cast(x[:, :64], RN)[0], torch.float32)
    with pytest.raises(ValueError, match="multiple of 16 columns, not 7"):
        fp8.multiply(operands[RN], fp8.cast(x[:7], RN)[0], torch.float32)
    with pytest.raises(ValueError, match="K a multiple of 16, not"):
        fp8.cast(x[:, :24], RN)
    assert not hopper


# ---------------------------------------------------------------------------- training

TENSORWISE = Recipe("mixed", (RN, E4M3), (E5M2, RN_2D), (E5M2, RN))


@pytest.mark.parametrize("tokens", [1, 7, 33, 128, 257])
@pytest.mark.parametrize("recipe", [NEAREST, "nvfp4_hopper", "fp8_tensor", "fp8", TENSORWISE], ids=str)
def test_trains_as_the_reference_does(hopper, recipe, tokens):
    x, dy = torch.randn(tokens, 144), torch.randn(tokens, 272)  # neither is a multiple of 128
    ours, theirs = layers(recipe, "fp8", (144, 272))
    for got, expected in zip(run(ours, x, dy), run(theirs, x, dy), strict=True):
        assert close(got, expected)
    assert len(hopper) == 3  # fprop, dgrad, wgrad


@pytest.mark.parametrize("recipe", ["nvfp4_hopper", "fp8"])
@pytest.mark.parametrize("w_dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("bias", [False, True])
def test_dtypes_and_biases(hopper, recipe, dtype, w_dtype, bias):
    x, dy = torch.randn(40, 128, dtype=dtype), torch.randn(40, 256, dtype=dtype)
    ours, theirs = layers(recipe, "fp8", (128, 256), bias=bias, dtype=w_dtype)
    for got, expected in zip(run(ours, x, dy), run(theirs, x, dy), strict=True):
        assert got is expected is None or got.dtype == expected.dtype and close(got, expected)
    in_epilogue = recipe == "nvfp4_hopper" and dtype == w_dtype
    assert hopper == [dtype if not bias or in_epilogue else torch.float32, dtype, w_dtype]


def test_a_bias_of_another_type_is_not_rounded(hopper):
    ours, theirs = layers("nvfp4_hopper", "fp8", (64, 96))
    x = torch.randn(8, 64)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        got, expected = ours(x), theirs(x)
    assert got.dtype == torch.bfloat16 and hopper == [torch.float32]
    assert close(got, expected)


@pytest.mark.parametrize(
    "recipe, backend", [("nvfp4_hopper", "fp8"), ("fp8_tensor", "fp8"), ("fp8", "fp8"), ("fp8", "fp8_rounded")]
)
def test_tokens_do_not_depend_on_each_other_at_inference(hopper, recipe, backend):
    layer = NVFP4Linear(128, 96, recipe=recipe, backend=backend).eval()
    x = torch.randn(9, 128) * torch.logspace(-3, 3, 9)[:, None]
    with torch.no_grad():
        together, alone = layer(x), torch.cat([layer(row[None]) for row in x])
    assert ((together - alone).norm(dim=1) < 1e-6 * alone.norm(dim=1)).all()  # but for the order of summation
    if backend == "fp8":
        assert close(together, NVFP4Linear.convert(layer, recipe, "reference").eval()(x).detach())


@pytest.mark.parametrize("gemms, native", [("forward", 2), ("all", 0)])
def test_a_switch_to_bf16_keeps_running(hopper, gemms, native):
    ours, theirs = layers("nvfp4_hopper", "fp8", (64, 96))
    for layer in (ours, theirs):
        layer.set_recipe("nvfp4_hopper", high_precision=gemms)
    x, dy = torch.randn(24, 64), torch.randn(24, 96)
    for got, expected in zip(run(ours, x, dy), run(theirs, x, dy), strict=True):
        assert close(got, expected)
    assert len(hopper) == native


def test_non_finite_gradients_come_through(hopper):
    for value, recipe in [(v, r) for v in (float("nan"), float("inf")) for r in ("nvfp4_hopper", "fp8")]:
        layer, dy = NVFP4Linear(64, 96, recipe=recipe, backend="fp8"), torch.randn(32, 96)
        dy[3, 5] = value
        _, dx, dw, _ = run(layer, torch.randn(32, 64), dy)
        assert not dx.isfinite().all() and not dw.isfinite().all()


def test_both_gradient_gemms_of_ms_eden_run_on_fp8(hopper):
    eden = dataclasses.replace(EDEN, hadamard=16)
    recipe = Recipe("eden", (RN, RN_2D), (eden, eden), (eden, eden))
    x, dy = torch.randn(33, 144), torch.randn(33, 272)
    ours, theirs = layers(recipe, "fp8", (144, 272))
    for got, expected in zip(run(ours, x, dy), run(theirs, x, dy), strict=True):
        assert close(got, expected)
    assert len(hopper) == 3


def test_a_tiny_llama_trains(hopper, build, llama_config):
    assert_trains_as_the_reference(build, llama_config, "nvfp4_hopper", "fp8")
    assert len(hopper) >= 3 * 20


# Inductor takes a minute for the plain-PyTorch casts to NVFP4 that stand in for kernels here.
@pytest.mark.parametrize(
    ("recipe", "dtype", "backend"),
    [
        *((recipe, torch.float32, "aot_eager") for recipe in (NEAREST, "fp8_tensor", "fp8")),
        *((recipe, torch.bfloat16, "aot_eager") for recipe in (NEAREST, "fp8_tensor", "fp8")),
        *((recipe, torch.bfloat16, "inductor") for recipe in ("fp8_tensor", "fp8")),
    ],
    ids=lambda value: getattr(value, "name", str(value)),
)
def test_compiles_into_one_graph(ready, recipe, dtype, backend):
    layer = NVFP4Linear(64, 96, recipe=recipe, backend="fp8", dtype=dtype)
    x, dy = torch.randn(33, 64, dtype=dtype), torch.randn(33, 96, dtype=dtype)
    compiled = torch.compile(layer, fullgraph=True, backend=backend)
    for got, expected in zip(run(compiled, x, dy), run(layer, x, dy), strict=True):
        assert expected.any() and close(got, expected)
