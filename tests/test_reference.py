"""The numerics: bit for bit against vectors made elsewhere, then the properties that they must have."""

import math

import numpy as np
import pytest
import torch

from hf_nvfp4 import Cast, quantize
from hf_nvfp4.casts import MX_SR_HEADROOM, SR_HEADROOM
from hf_nvfp4.formats import E2M1, E4M3, FP8_EXACT_RANGE, FP8_EXACT_SIGNIFICANDS
from hf_nvfp4.rounding import rotate, round_to, unpack_nibbles

NAN = float("nan")

CHOOSING = ("4over6", "4over6_mse", "best")
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


@pytest.mark.parametrize("square", [False, True])
def test_four_over_six_equals_the_golden_vectors(golden, square):
    """The error is the mean absolute one, the tensor scale has 256, ties go to 6."""
    cast, mode = Cast(square=square, scale_rule="4over6"), "2d" if square else "1d"
    for name in ("randn_bf16", "outlier_bf16"):
        for side, operand in (("row", golden[f"in/{name}"]), ("col", golden[f"in/{name}"].T.contiguous())):
            q, prefix = quantize(operand, cast), f"{mode}_4over6_mae256/{name}"
            assert torch.equal(q.codes, golden[f"{prefix}/{side}_codes"])
            assert torch.equal(q.scales.view(torch.uint8), golden[f"{prefix}/{side}_scale"])
            assert torch.equal(q.tensor_scale[None], golden[f"{prefix}/amax_{side}"] / 1536)


# ---------------------------------------------------------------------------- statistics

@pytest.mark.parametrize(
    ("cast", "error", "bias"),
    [
        (Cast(rounding="stochastic"), 18.8e-3, 1.03e-4),
        (Cast(rounding="stochastic", headroom=SR_HEADROOM), 23.5e-3, 0),
        (Cast("mxfp4", rounding="stochastic", headroom=MX_SR_HEADROOM), 28.2e-3, 0),
        (Cast(rounding="stochastic", scale_rule="fp8_exact"), 26.3e-3, 0),
    ],
    ids=str,
)
def test_stochastic_rounding_is_unbiased_exactly_where_it_says_so(cast, error, bias):
    """The mean of B draws has B times less squared error, down to the bias where blocks saturate (1.0e-4)."""
    x = torch.randn(64, 128)
    copies = 64
    mean, errors = torch.zeros(64, 128, dtype=torch.float64), {}
    for i in range(1, 17):
        draws = quantize(x.repeat(copies, 1), cast).dequantize(torch.float64).view(copies, 64, 128)
        if i == 1:
            errors[1] = _relative_squared_error(draws[0], x)
        mean += (draws.mean(0) - mean) / i
        errors[i * copies] = _relative_squared_error(mean, x)
    # 8,192 elements: an error's own relative spread is about 2%.
    assert errors[1] == pytest.approx(error, rel=0.08)
    for n in (256, 1024):
        assert errors[n] == pytest.approx(errors[1] / n + bias, rel=0.12)


def test_what_the_rule_fp8_exact_allows_is_all_that_is_exact():
    """Every E2M1 code × scale is an E4M3 value for {1, 1.25, 1.5}·2^e from 2^-6 to 64, and for no other E4M3 scale."""

    def exact(scale):
        values = torch.tensor(E2M1.grid) * scale
        return torch.equal(values.to(E4M3.dtype).float(), values)

    smallest, largest = FP8_EXACT_RANGE
    allowed = {s * 2.0**e for s in FP8_EXACT_SIGNIFICANDS for e in range(-6, 7)} - {80.0, 96.0}
    assert len(allowed) == 37 and min(allowed) == smallest and max(allowed) == largest
    assert {scale for scale in E4M3.grid[1:] if exact(scale)} - allowed <= {s for s in E4M3.grid if s < smallest}
    assert all(map(exact, allowed)) and not exact(1.25 * 2**-7) and not exact(80.0)


@pytest.mark.parametrize(
    "cast",
    [
        Cast(scale_rule="fp8_exact"),
        Cast(scale_rule="fp8_exact", square=True),
        Cast(scale_rule="fp8_exact", rounding="stochastic"),
        Cast(scale_rule="fp8_exact", rounding="stochastic", hadamard=16, outer="bound"),
        Cast(scale_rule="fp8_exact", outer="row"),
    ],
    ids=str,
)
def test_fp8_exact_values_are_e4m3_values(cast):
    """On tensors of ten decades too; the largest block gets the largest scale, unless the amax is a bound."""
    x = torch.randn(64, 256) * 10 ** (10 * torch.rand(64, 256) - 5)
    q = quantize(x, cast)
    assert torch.equal(q.values().to(E4M3.dtype).float(), q.values())
    significands = {2 * m for m in torch.frexp(q.scales.float())[0].flatten().tolist()}
    assert significands <= set(FP8_EXACT_SIGNIFICANDS)
    assert q.scales.float().min() >= FP8_EXACT_RANGE[0] and q.scales.float().max() <= FP8_EXACT_RANGE[1]
    assert cast.outer == "bound" or q.scales.float().max() == FP8_EXACT_RANGE[1]
    if cast.rounding == "stochastic":  # no element was cut: the scale is at least amax / 6
        amax = (rotate(x, cast.hadamard) if cast.hadamard else x).view(64, 16, 16).abs().amax(2)
        assert (q.scales.float() * 6 * q.tensor_scale >= amax * (1 - 1e-6)).all()


def test_a_bound_is_the_amax_before_the_rotation_times_its_root():
    x = torch.randn(32, 64).bfloat16()
    bound = quantize(x, Cast(hadamard=16, outer="bound", scale_rule="fp8_exact"))
    assert bound.tensor_scale == x.abs().amax().float() * 4 / 384
    # Powers of two apart, so that most codes are the same.
    exact = quantize(x, Cast(hadamard=16, scale_rule="fp8_exact"))
    assert _relative_squared_error(bound.dequantize(), exact.dequantize()) < 2e-2
    assert rotate(x, 16).abs().max() <= x.abs().max() * 4


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
        (Cast(scale_rule="4over6_mse"), 7.57e-3),
        (Cast(scale_rule="4over6"), 7.80e-3),
        (Cast(scale_rule="4over6_mse", square=True), 12.38e-3),
        (Cast(scale_rule="4over6", square=True), 12.38e-3),
        (Cast(scale_rule="best"), 6.65e-3),
        (Cast(scale_rule="fp8_exact"), 8.27e-3),
        (Cast(scale_rule="fp8_exact", square=True), 12.39e-3),
        (Cast(scale_rule="fp8_exact", rounding="stochastic"), 26.26e-3),
        (Cast(rounding="eden"), 9.32e-3),
        (Cast(rounding="eden", scale_rule="best"), 7.43e-3),
        (Cast(rounding="eden", scale_rule="fp8_exact"), 14.77e-3),
        (Cast("mxfp4"), 13.22e-3),
        (Cast("mxfp4", scale_rule="ceil"), 13.31e-3),
        (Cast("mxfp4", rounding="stochastic", headroom=MX_SR_HEADROOM), 28.22e-3),
        (Cast("mxfp4", scale_rule="rms"), 12.69e-3),
        (Cast("nvfp4_128"), 9.01e-3),
        (Cast("fp4", outer="row"), 13.68e-3),
    ],
    ids=str,
)
def test_mean_squared_errors_are_the_published_ones(cast, expected):
    """Quartet II (arXiv 2601.22813), table 1, on N(0, 1); what it has not was recomputed independently.

    But for 4/6 by absolute error, "best" and "eden" with "fp8_exact": these are our own numbers (7.15 is known for six
    neighbours, 15.3 for another bound of the elements).
    """
    x = torch.randn(2048, 2048)
    assert ((quantize(x, cast).dequantize() - x) ** 2).mean().item() == pytest.approx(expected, rel=0.01)


# ---------------------------------------------------------------------------- scale rules

def near_ties(rows, columns):
    """A tensor whose blocks err as much with their largest, 6, on 6 as on 4: only the order of a sum decides.

    In units of the first scale: 1 + a errs by a and 1/4 + a, 4.5 + c by 1/2 + c and c.
    """
    kind = torch.arange(rows * columns).view(rows, columns) % 16
    x = torch.where(kind < 10, 1 + torch.rand(rows, columns) / 8, 4.5 + torch.rand(rows, columns) / 2)
    x[kind == 15] = 6
    order = torch.rand(rows, columns // 16, 16).argsort(2)
    return x.view(rows, -1, 16).gather(2, order).view(rows, columns)


@pytest.mark.parametrize("rule", CHOOSING)
def test_a_choosing_rule_takes_the_first_scale_of_least_error(rule):
    """In NumPy's FP32, term by term in the prescribed order, over blocks whose scales reach from 0 to the top."""
    f32 = np.float32
    x = torch.cat([torch.randn(512, 64) * 10 ** (-5 * torch.rand(512, 1)), near_ties(512, 64)]).clamp(-6, 6)
    q = quantize(x, Cast(scale_rule=rule))
    blocks = x.numpy().reshape(-1, 16)
    encode_scale = f32(1536) / blocks.max()
    decode_scale = f32(1) / encode_scale
    ideal = np.abs(blocks).max(1) * (encode_scale * f32(1 / 6))
    byte = torch.from_numpy(ideal).to(torch.float8_e4m3fn).view(torch.uint8).int()
    if rule == "best":
        bytes_ = [byte, *((byte + offset).clamp(1, 126) for offset in (-1, 1, 4, 5, 6))]
    else:
        bytes_ = [byte, torch.from_numpy(ideal * f32(1.5)).to(torch.float8_e4m3fn).view(torch.uint8).int()]
    errors = []
    with np.errstate(divide="ignore"):
        for candidate in bytes_:
            scale = candidate.to(torch.uint8).view(torch.float8_e4m3fn).float().numpy()
            inverse = np.minimum(f32(1) / (scale * decode_scale), np.finfo(f32).max)[:, None]
            codes = round_to(torch.from_numpy(blocks * inverse), E2M1).numpy()
            d = codes * scale[:, None] - blocks * encode_scale
            terms = np.abs(d) if rule == "4over6" else d * d
            errors.append(_halves(list(terms.T)))
    # argmin takes the first of equal ones, too.
    expected = torch.stack(bytes_)[torch.from_numpy(np.argmin(errors, 0)), torch.arange(len(byte))]
    assert torch.equal(q.scales.view(torch.uint8).flatten().int(), expected)
    assert len(set(np.argmin(errors, 0))) == len(bytes_) and (byte == 0).any()


def _halves(terms):
    half = len(terms) // 2
    return terms[0] if not half else _halves([a + b for a, b in zip(terms[:half], terms[half:], strict=True)])


def test_choosing_rules_leave_room_above_the_scale_by_amax():
    for rule in CHOOSING:
        q = quantize(torch.randn(256, 256), Cast(scale_rule=rule))
        assert 256 <= q.scales.float().max() <= 448
        row = quantize(torch.randn(256, 256), Cast(scale_rule=rule, outer="row"))
        assert row.tensor_scale.shape == (256, 1) and row.scales.float().max() <= 448


@pytest.mark.parametrize("format", ["mxfp4", "mxfp8"])
@pytest.mark.parametrize("rule", ["amax", "ceil"])
def test_power_of_two_scales_are_those_of_the_definition(format, rule):
    cast = Cast(format, scale_rule=rule)
    largest = cast.block_format.element.max
    x = torch.randn(2048, 32) * 2.0 ** torch.randint(-118, 120, (2048, 1))
    x[:8, 0] = x[:8].abs().max() * 2  # not only significands at random: 1, the element's largest, just above
    x[:8] /= x[:8, :1]
    x[:8] *= torch.tensor([1, largest, largest * (1 + 2**-23), 2 - 2**-23, 1.5, 1.75, 448, 6])[:, None]
    q = quantize(x, cast)
    assert q.scales.dtype == torch.float8_e8m0fnu and q.scales.shape == (2048, 1)
    amax, scale = x.abs().amax(1, keepdim=True).double(), q.scales.double()
    if rule == "ceil":
        assert ((amax / scale <= largest) & (amax / scale > largest / 2)).all()
    else:
        floor = 2.0 ** torch.floor(torch.log2(amax))
        assert torch.equal(scale, floor / 2 ** math.floor(math.log2(largest)))
    elements = round_to((x.double() / scale).float(), cast.block_format.element)
    assert torch.equal(q.dequantize(torch.float64), elements.double() * scale)
    assert torch.equal(q.tensor_scale, torch.tensor(1.0))


def test_headroom_of_power_of_two_scales_is_a_constant_above_them():
    """The scale is that of x itself; elements are those of 3/4 x, so that none saturates."""
    x = torch.randn(64, 64)
    q, plain = (quantize(x, Cast("mxfp4", headroom=h)) for h in (MX_SR_HEADROOM, 1.0))
    assert torch.equal(q.scales.view(torch.uint8), plain.scales.view(torch.uint8))
    assert torch.equal(q.tensor_scale, torch.tensor(4 / 3))
    scales = q.scales.float().repeat_interleave(32, 1)
    assert torch.equal(q.values(), round_to(x * 0.75 / scales, E2M1) * scales)
    assert (x.abs() * 0.75 / scales).max() < 6 < (x.abs() / scales).max()


def test_zero_and_tiny_blocks_have_the_smallest_power_of_two():
    x = torch.zeros(1, 128)
    x[0, 32], x[0, 64], x[0, 96] = 1e-45, 2.0**-126, NAN
    for rule in ("amax", "ceil"):
        q = quantize(x, Cast("mxfp4", scale_rule=rule))
        assert q.scales.view(torch.uint8).tolist() == [[0, 0, 0, 255]]
        assert unpack_nibbles(q.codes)[0, :96].count_nonzero() == 1
        assert q.dequantize()[0, 64] == 2.0**-126 and q.dequantize()[0, 96:].isnan().all()


# ---------------------------------------------------------------------------- blocks and rotations

def test_square_blocks_commute_with_transposition():
    w = torch.randn(64, 96)
    for cast in (Cast(square=True), Cast("fp8_e4m3_block", square=True)):
        there = quantize(w.T.contiguous(), cast).dequantize()
        assert torch.equal(there, quantize(w, cast).dequantize().T)
    for rule in CHOOSING:
        cast = Cast(square=True, scale_rule=rule)
        for v in (w[:, :64], torch.randn(1024, 1024), near_ties(512, 512)):
            assert torch.equal(quantize(v.T.contiguous(), cast).dequantize(), quantize(v, cast).dequantize().T)
    ones = quantize(w.T.contiguous(), Cast()).dequantize()
    assert not torch.equal(ones, quantize(w, Cast()).dequantize().T)


def test_per_row_scales_do_not_see_other_rows():
    x = torch.randn(4, 64)
    loud = torch.cat([x, 1000 * torch.randn(1, 64)])
    for cast in (Cast(outer="row"), Cast("fp8_e4m3", outer="row")):
        assert torch.equal(quantize(loud, cast).dequantize()[:4], quantize(x, cast).dequantize())
    assert not torch.equal(quantize(loud, Cast()).dequantize()[:4], quantize(x, Cast()).dequantize())


# ---------------------------------------------------------------------------- edges

CASTS = (
    Cast(),
    Cast(square=True),
    Cast(rounding="stochastic"),
    *(Cast(scale_rule=rule) for rule in CHOOSING),
    Cast("fp8_e4m3_block"),
    Cast("fp8_e5m2"),
    Cast("mxfp4"),
    Cast("mxfp4", rounding="stochastic", headroom=MX_SR_HEADROOM),
    Cast("mxfp8", scale_rule="ceil"),
)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("cast", CASTS, ids=str)
def test_zeros_tiny_and_huge_values_stay_finite_and_bounded(cast, dtype):
    info = torch.finfo(dtype)
    pattern = torch.randn(32, 128).clamp(-1, 1)
    pattern[:, ::7] = 0
    huge = info.max / 2 if cast.scale_rule == "ceil" else info.max  # 1.99 · 2^127 is rounded to what FP32 has not
    for size in (0.0, info.smallest_normal * info.eps, info.tiny, 1.0, huge):
        x = (pattern * size).to(dtype)
        q = quantize(x, cast)
        y = q.dequantize(torch.float64)
        assert y.isfinite().all()
        if cast.scale_rule == "amax" and not cast.format.startswith("mx"):
            assert q.dequantize().isfinite().all()
            assert y.abs().max() <= x.double().abs().max() * 1.001
        else:  # the largest magnitude need not become a grid point: 5.1 is rounded to 6, beyond FP32's largest too
            assert y.abs().max() <= x.double().abs().max() * 1.2 + 2.0**-127
        if size >= 1.0:
            saturating = cast.format == "mxfp4"  # 7.9 becomes 6
            assert (y - x).norm() < (0.25 if saturating else 0.2) * x.double().norm()


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
        ((2, 48), torch.float32, Cast("mxfp4"), ValueError, "K of 32"),
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
    m = quantize(torch.randn(32, 200), Cast("mxfp8"))
    assert m.codes.shape == (32, 200) and m.scales.shape == (32, 7) and m.scales.dtype == torch.float8_e8m0fnu
