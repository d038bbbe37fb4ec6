"""The numerics: bit for bit against vectors made elsewhere, then the properties that they must have."""

import pytest
import torch

from hf_nvfp4 import Cast, quantize
from hf_nvfp4.recipes import SR_HEADROOM
from hf_nvfp4.rounding import unpack_nibbles

MODES = {"1d": Cast(), "2d": Cast(square=True), "rht1d": Cast(hadamard=16)}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


# ---------------------------------------------------------------------------- golden vectors

@pytest.mark.parametrize("mode", MODES)
def test_codes_and_scales_equal_the_golden_vectors(golden, mode):
    names = sorted({key.split("/")[1] for key in golden if key.startswith(f"{mode}/")})
    assert len(names) >= 4
    plain = Cast(square=mode == "2d")
    for name in names:
        x = golden[f"in/{name}"]
        for side, operand, cast in (("row", x, plain), ("col", x.T.contiguous(), MODES[mode])):
            q = quantize(operand, cast)
            assert torch.equal(q.codes, golden[f"{mode}/{name}/{side}_codes"]), (mode, name, side)
            assert torch.equal(q.scales.view(torch.uint8), golden[f"{mode}/{name}/{side}_scale"]), (mode, name, side)
            amax = golden[f"{mode}/{name}/amax_{side}"]
            expected = amax / 2688 if amax > 0 else torch.ones(1)
            assert torch.equal(q.tensor_scale[None], expected)


# ---------------------------------------------------------------------------- statistics

@pytest.mark.parametrize(("headroom", "unbiased"), [(1.0, False), (SR_HEADROOM, True)])
def test_stochastic_rounding_is_unbiased_exactly_where_it_says_so(headroom, unbiased):
    """The mean of B draws has B times less squared error, down to the bias where blocks saturate (1.0e-4)."""
    x = torch.randn(64, 128)
    cast, copies = Cast(rounding="stochastic", headroom=headroom), 64
    mean, errors = torch.zeros(64, 128, dtype=torch.float64), {}
    for i in range(1, 17):
        draws = quantize(x.repeat(copies, 1), cast).dequantize(torch.float64).view(copies, 64, 128)
        if i == 1:
            errors[1] = _relative_squared_error(draws[0], x)
        mean += (draws.mean(0) - mean) / i
        errors[i * copies] = _relative_squared_error(mean, x)
    # 8,192 elements: an error's own relative spread is about 2%.
    assert errors[1] == pytest.approx(23.5e-3 if unbiased else 18.8e-3, rel=0.08)
    floor = 0 if unbiased else 1.03e-4
    for n in (256, 1024):
        assert errors[n] == pytest.approx(errors[1] / n + floor, rel=0.12)


def _relative_squared_error(y, x):
    return (((y - x) ** 2).sum() / (x.double() ** 2).sum()).item()


@pytest.mark.parametrize(
    ("cast", "expected"),
    [
        (Cast(), 9.03e-3),
        (Cast(square=True), 12.39e-3),
        (Cast(rounding="stochastic", headroom=SR_HEADROOM), 23.56e-3),
        (Cast(rounding="stochastic"), 18.85e-3),
        (Cast("fp8_e4m3"), 0.70e-3),
        (Cast("fp8_e4m3_block"), 0.66e-3),
    ],
    ids=str,
)
def test_mean_squared_errors_are_the_published_ones(cast, expected):
    """Quartet II (arXiv 2601.22813), table 1, on N(0, 1); the last three recomputed independently."""
    x = torch.randn(2048, 2048)
    assert ((quantize(x, cast).dequantize() - x) ** 2).mean().item() == pytest.approx(expected, rel=0.01)


# ---------------------------------------------------------------------------- blocks and rotations

def test_square_blocks_commute_with_transposition():
    w = torch.randn(64, 96)
    for cast in (Cast(square=True), Cast("fp8_e4m3_block", square=True)):
        there = quantize(w.T.contiguous(), cast).dequantize()
        assert torch.equal(there, quantize(w, cast).dequantize().T)
    ones = quantize(w.T.contiguous(), Cast()).dequantize()
    assert not torch.equal(ones, quantize(w, Cast()).dequantize().T)


def test_per_row_scales_do_not_see_other_rows():
    x = torch.randn(4, 64)
    loud = torch.cat([x, 1000 * torch.randn(1, 64)])
    for cast in (Cast(outer="row"), Cast("fp8_e4m3", outer="row")):
        assert torch.equal(quantize(loud, cast).dequantize()[:4], quantize(x, cast).dequantize())
    assert not torch.equal(quantize(loud, Cast()).dequantize()[:4], quantize(x, Cast()).dequantize())


# ---------------------------------------------------------------------------- edges

CASTS = (Cast(), Cast(square=True), Cast(rounding="stochastic"), Cast("fp8_e4m3_block"), Cast("fp8_e5m2"))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("cast", CASTS, ids=str)
def test_zeros_tiny_and_huge_values_stay_finite_and_bounded(cast, dtype):
    info = torch.finfo(dtype)
    pattern = torch.randn(32, 128).clamp(-1, 1)
    pattern[:, ::7] = 0
    for size in (0.0, info.smallest_normal * info.eps, info.tiny, 1.0, info.max):
        x = (pattern * size).to(dtype)
        y = quantize(x, cast).dequantize()
        assert y.isfinite().all()
        assert y.abs().max() <= x.float().abs().max() * 1.001
        if size >= 1.0:
            assert (y.double() - x).norm() < 0.2 * x.double().norm()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("cast", CASTS, ids=str)
def test_non_finite_values_are_never_hidden(cast, bad):
    x = torch.randn(32, 128)
    x[3, 5] = bad
    y = quantize(x, cast).dequantize()
    assert not y[3, 5].isfinite()
    if cast.block_format.tensor_scale:
        assert not y.isfinite().any()


def test_all_zero_and_underflowing_blocks_have_scale_zero():
    x = torch.zeros(1, 48)
    x[0, 0], x[0, 16:32] = 1000.0, 1e-5
    q = quantize(x, Cast())
    assert q.scales.float()[0].tolist() == [448, 0, 0]
    assert set(unpack_nibbles(q.codes)[0, 16:32].tolist()) == {7}
    assert q.dequantize()[0, 1:].abs().max() == 0


@pytest.mark.parametrize(
    ("shape", "dtype", "cast", "error", "message"),
    [
        ((2, 17), torch.float32, Cast(), ValueError, "K of 16; this tensor is 2×17"),
        ((8, 32), torch.float32, Cast(square=True), ValueError, "M a multiple of 16"),
        ((2, 16), torch.float32, Cast(hadamard=32), ValueError, "K of 32"),
        ((32,), torch.float32, Cast(), ValueError, "2-D tensor"),
        ((0, 16), torch.float32, Cast(), ValueError, "non-empty"),
        ((2, 16), torch.int8, Cast(), TypeError, "float32, bfloat16 or float16"),
        ((2, 16), torch.float32, Cast("bf16"), ValueError, "x.to"),
    ],
)
def test_bad_input_is_refused_with_a_sentence(shape, dtype, cast, error, message):
    with pytest.raises(error, match=message):
        quantize(torch.ones(shape, dtype=dtype), cast)


def test_a_generator_makes_draws_repeatable():
    x, cast = torch.randn(32, 64), Cast(rounding="stochastic")
    draws = [quantize(x, cast, generator=torch.Generator().manual_seed(s)).codes for s in (7, 7, 8)]
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])


def test_shapes_dtypes_and_repr():
    q = quantize(torch.randn(32, 64, dtype=torch.bfloat16), Cast())
    assert (q.codes.shape, q.codes.dtype) == ((32, 32), torch.uint8)
    assert (q.scales.shape, q.scales.dtype) == ((32, 4), torch.float8_e4m3fn)
    assert (q.tensor_scale.shape, q.tensor_scale.dtype) == ((), torch.float32)
    assert q.shape == (32, 64) and "nvfp4 1×16 RNE" in repr(q)
    f = quantize(torch.randn(32, 200), Cast("fp8_e4m3_block"))
    assert f.codes.shape == (32, 200) and f.scales.shape == (32, 2) and f.scales.dtype == torch.float32
    assert f.dequantize(torch.bfloat16).shape == (32, 200)
