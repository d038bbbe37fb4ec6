"""Triton kernels against reference.py, bit for bit: compiled on a GPU, interpreted on the CPU.

HF_NVFP4_KERNEL_CASES: how many random tensors (1,000 where compiled, 40 where interpreted). Many variants are
compiled on a GPU: pytest -n 8 does it on as many cores.
"""

import os

import pytest
import torch
from test_reference import near_ties

from hf_nvfp4 import Cast, NVFP4Linear
from hf_nvfp4.backends import bf16
from hf_nvfp4.backends.operand import transposed
from hf_nvfp4.eden import _stochastic_fp8_exact
from hf_nvfp4.formats import E4M3
from hf_nvfp4.rounding import decode, flip, random_bytes, rotate, round_to

cases = pytest.importorskip("kernel_cases", reason="the kernels need Triton")
ops, kernels = cases.ops, cases.kernels
NOTHING, VALUES, CODES, CODES_SWIZZLED, CODES_ACROSS, FP8 = range(6)
SR = Cast(rounding="stochastic")
EDEN_RULES = ["amax", "best", "fp8_exact"]

pytestmark = cases.MARKS


@pytest.fixture(autouse=True)
def _seed(request):
    """Each test draws its own numbers, the same every time."""
    torch.manual_seed(hash_of(request.node.name))


def hash_of(name):
    return int.from_bytes(name.encode(), "little") % (2**31 - 1)


# ---------------------------------------------------------------------------- every cast, every output


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8, torch.int32], ids=str)
def test_outputs_are_poisoned_before_a_kernel_writes(device, dtype):
    """Or the other tests would not notice an element that no thread writes."""
    with cases.poisoned():
        new = torch.ones(1, device=device).new_empty(1000, dtype=dtype)
    assert new.isnan().all() if dtype.is_floating_point else (new == torch.iinfo(dtype).max).all()


@pytest.mark.parametrize("cast", cases.CASTS, ids=str)
def test_every_output_of_every_cast_equals_the_reference(device, cast):
    x = cases.assorted(41, 80)
    if not cast.block_format.tensor_scale:  # there the rest of the tensor survives
        x[4::9] = torch.randn(x[4::9].shape) * 1e-38  # and the smallest scales come up, 2^-127 too
        x = cases.with_non_finite(x)
    x, on = x.to(device), torch.device("cpu")
    outputs = [(VALUES, CODES), (CODES, VALUES), (CODES_ACROSS, CODES_ACROSS)]
    if cast.block_format.scale is E4M3:
        outputs += [(CODES_SWIZZLED, CODES_SWIZZLED), (FP8, FP8)]
    for row_out, col_out in outputs:
        if cast.outer == "row":
            cases.compare(x, cast, row_out, on=on)
        else:
            cases.compare(x, cast, row_out, cast, col_out, on=on)


@pytest.mark.parametrize("size", [16, 32, 128, 1024])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_long_rotations_are_the_references(device, size, dtype):
    for m, k in ((3, 2048), (37, 1024)):
        x = (torch.randn(m, k, device=device) * torch.randn(m, 1, device=device).exp()).to(dtype)
        assert torch.equal(ops.rotate(x, size), rotate(x, size))
        assert torch.equal(ops.rotate(x[:, -size:], size), rotate(x[:, -size:], size))  # strided
    x[5, 7] = float("nan")
    assert ops.rotate(x, size).isnan().sum() == size
    with pytest.raises(ValueError, match="rotate: size 24 for K=1024"):
        ops.rotate(x, 24)


@pytest.mark.parametrize("size", [8, 16, 32, 128, 256])
def test_rotations_with_drawn_signs_and_of_the_transpose_are_the_references(device, size):
    """What is flipped, transposed, padded and rotated apart: to the bit, signs of zeros too, in any layout."""
    seed = cases.random_seed(device)
    for (m, k), layout in zip(((300, 112), (37, 256), (256, 96)), list(cases.LAYOUTS)[:3], strict=True):
        x = cases.assorted(m, k, torch.float32 if k == 112 else torch.bfloat16)
        x[5, 7] = float("nan")
        x = cases.LAYOUTS[layout](x.to(device))
        for signs in (None, seed):
            across, along = (x, x) if signs is None else (flip(x, signs, size, dim) for dim in (0, 1))
            across = transposed(across, Cast(hadamard=size)).contiguous()
            with cases.poisoned():
                cases.assert_same(ops.rotate(x, size, signs, True), rotate(across, size), f"{m}×{k} transposed")
                if k % size == 0:
                    cases.assert_same(ops.rotate(x, size, signs), rotate(along, size), f"{m}×{k}")
    assert ops.rotate(x[:0], size, seed, True).shape == (96, 0)


@pytest.mark.parametrize("outer", ["tensor", "row"])
@pytest.mark.parametrize(
    ("rule", "rounding"),
    [(rule, "nearest") for rule in ("amax", "4over6", "4over6_mse", "best", "fp8_exact")]
    + [(rule, "eden") for rule in EDEN_RULES],
)
def test_block_scales_of_every_size(device, rule, rounding, outer):
    """A block for each magnitude between its tensor's largest and zero, so that every E4M3 scale comes up."""
    x = torch.randn(32, 16, 16).sign() * torch.rand(32, 16, 16)
    x[:, :, 0] = 2.0 ** torch.linspace(8, -22, 512).view(32, 16)
    x = x.clamp(-x[:, :, :1], x[:, :, :1]).view(32, 256)
    x[:, 0] = 256.0
    x = x.to(device)
    cast = Cast(scale_rule=rule, rounding=rounding, outer=outer)
    cases.compare(x, cast, CODES)
    scales = cases.expected(x, cast, cases.random_seed(device), False).quantized.scales.view(torch.uint8)
    assert len(scales.unique()) > (36 if rule == "fp8_exact" else 110)  # of which corrections skip some


@pytest.mark.parametrize("rule", EDEN_RULES)
def test_corrected_scales_are_rounded_as_the_reference_does(device, rule):
    """By every byte: those of the grid, their neighbours in FP32, some between, the small ones, what is not finite."""
    grid = decode(torch.arange(127, dtype=torch.uint8), E4M3)
    around = [grid.view(torch.int32).add(i).clamp(min=0).view(torch.float32) for i in (-1, 0, 1)]
    between = 2.0 ** (torch.rand(256) * 20 - 11)
    scales = torch.cat([*around, between, torch.tensor([500.0, float("inf"), float("nan"), -cases.NAN, 1e-30])])
    scales, byte = (t.contiguous() for t in torch.broadcast_tensors(scales[:, None], torch.arange(256)))
    want = _stochastic_fp8_exact(scales, byte) if rule == "fp8_exact" else round_to(scales, E4M3, byte.byte())
    value, code = cases.rounded_scales(scales.to(device), byte.to(device), rule)
    cases.assert_same(value.cpu(), want, "values")
    known = want.abs() != float("inf")  # E4M3 has no inf: versions of torch make it NaN or 448
    cases.assert_same(code.cpu().byte()[known], cases.stored(want.to(E4M3.dtype))[known], "codes")


@pytest.mark.parametrize("rule", EDEN_RULES)
def test_the_largest_corrections(device, rule):
    """Most elements just below 5, which become 4; the largest up to 7, which saturates, or is what amax is."""
    x = torch.full((96, 64), 4.9999)
    x[:, ::16] = torch.linspace(5.2, 7, 96)[:, None]
    x[::2] *= 2.0 ** -torch.arange(48)[:, None]
    cases.compare(x.to(device), Cast(rounding="eden", scale_rule=rule, outer="row"), CODES)
    cases.compare(x.to(device), Cast(rounding="eden", scale_rule=rule), CODES)


@pytest.mark.parametrize("square", [False, True])
@pytest.mark.parametrize("rule", ["4over6", "4over6_mse", "best", "fp8_exact"])
def test_scales_that_err_alike(device, rule, square):
    """Where only the order of a sum, or the fixed point of a square block, says which candidate errs less."""
    x = near_ties(144, 64)
    if square:  # one element 1 + a becomes 1 - d/2: a block errs by d more on 6, a few units of the fixed point
        row = x[::16].reshape(-1, 16)
        row[torch.arange(len(row)), (row < 1.2).int().argmax(1)] = 1 - torch.rand(len(row)) * 2.0**-10
        x[::16] = row.view(-1, 64)
    x *= 2.0 ** -torch.arange(9).repeat_interleave(16)[:, None]
    x[0, 0] = 1536.0  # a tensor scale of 1: block scales 1 ... 2^-8, E4M3's subnormal numbers included
    cast = Cast(scale_rule=rule, square=square)
    cases.compare(x.to(device), cast, CODES)
    cases.compare(x.T.contiguous().to(device), None, NOTHING, cast, CODES)


@pytest.mark.parametrize("shape", [(0, 64), (5, 0), (0, 0)], ids=str)
@pytest.mark.parametrize("cast", [Cast(), SR, Cast("mxfp4"), Cast("fp8_e4m3")], ids=str)
def test_empty_tensors(device, cast, shape):
    x = torch.empty(shape, device=device)
    text, seed = kernels.spec(cast), cases.random_seed(device)
    (m, k), padded = shape, -(-shape[0] // 16) * 16
    with cases.poisoned():
        amax = ops.amax(x, True, 0)
        assert amax.tolist() == [0, 0]
        for out in (VALUES, CODES, CODES_ACROSS):
            row = ops.cast(x, amax, seed, None, text, out, None, NOTHING)
            col = ops.cast(x, amax, None, seed, None, NOTHING, text, out)
            assert len(row) == len(col) == 2 + (out != VALUES and cast.block_format.scale is not None)
            assert row[-1].item() == col[-1].item() == 1
            if out == VALUES:
                assert row[0].shape == (m, k) and col[0].shape == (padded, k)
                continue
            for written, rows, columns in ((row, m, k), (col, k, padded)):
                scales = written[1] if len(written) == 3 else None
                values = ops.dequantize(written[0], scales, text, out == CODES_ACROSS)
                assert values.shape == ((columns, rows) if out == CODES_ACROSS else (rows, columns))


# ---------------------------------------------------------------------------- golden vectors

GOLDEN = {
    "1d": (Cast(), Cast()),
    "2d": (Cast(square=True), Cast(square=True)),
    "rht1d": (Cast(), Cast(hadamard=16)),
    "1d_4over6_mae256": (Cast(scale_rule="4over6"), Cast(scale_rule="4over6")),
    "2d_4over6_mae256": (Cast(scale_rule="4over6", square=True), Cast(scale_rule="4over6", square=True)),
}


@pytest.mark.parametrize("mode", GOLDEN)
def test_kernels_equal_the_golden_vectors(golden, device, mode):
    names = sorted({key.split("/")[1] for key in golden if key.startswith(f"{mode}/")})
    assert len(names) >= 2
    row, col = map(kernels.spec, GOLDEN[mode])
    for name in names:
        x = golden[f"in/{name}"].float().to(device)

        def same(got, key, name=name):
            cases.assert_same(got.cpu(), golden[f"{mode}/{name}/{key}"], f"{name}/{key}")

        with cases.poisoned():
            amax = ops.amax(x, True, GOLDEN[mode][1].hadamard)
            row_codes, row_scales, _, col_codes, col_scales, _ = ops.cast(x, amax, None, None, row, CODES, col, CODES)
            native_codes, native_scales, _ = ops.cast(x, amax, None, None, row, CODES_SWIZZLED, None, NOTHING)
        same(amax[:1], "amax_row")
        same(amax[1:], "amax_col")
        same(row_codes, "row_codes")
        same(native_codes, "row_codes")
        same(row_scales, "row_scale")
        same(native_scales, "row_scale_swizzled")
        same(col_codes, "col_codes")
        same(col_scales, "col_scale")


def test_the_kernels_rotation_equals_the_golden_one(golden, device):
    for name in ("randn_bf16", "outlier_bf16", "one_zero_block_bf16"):
        got = cases.rotated(golden[f"in/{name}"].to(device), 16).cpu()
        cases.assert_same(got, golden[f"rht1d/{name}/rht_xT"].float(), name)


@pytest.mark.parametrize("size", [2, 4, 8, 16])
def test_the_kernels_rotation_equals_the_references(device, size):
    x = cases.with_non_finite(cases.assorted(48, 64)).to(device)
    x[:16] *= 1e38
    cases.assert_same(cases.rotated(x, size), rotate(x.T.contiguous(), size).float(), f"size {size}")


# ---------------------------------------------------------------------------- any shape, any scale

# row and its output, col and its output, dtype. Few: each is compiled for whole tiles and for ragged ones.
RANDOM = [
    (Cast(), VALUES, Cast(hadamard=16), CODES_ACROSS, torch.bfloat16),
    (SR, VALUES, Cast(hadamard=16, rounding="stochastic"), VALUES, torch.bfloat16),
    (Cast(square=True), VALUES, Cast(square=True), CODES, torch.float32),
    (Cast(outer="row"), CODES, None, NOTHING, torch.float32),
    (SR, CODES_SWIZZLED, Cast(hadamard=16), CODES_SWIZZLED, torch.bfloat16),
    (Cast(scale_rule="best"), CODES, Cast(scale_rule="4over6", square=True), VALUES, torch.float32),
    (Cast("fp8_e4m3_block"), VALUES, Cast("fp8_e4m3_block"), CODES_ACROSS, torch.bfloat16),
    (Cast("fp8_e4m3_block", square=True), VALUES, None, NOTHING, torch.float32),
    (Cast("fp8_e5m2", rounding="stochastic"), CODES, Cast("fp8_e4m3"), CODES_ACROSS, torch.float16),
    (Cast("mxfp4"), CODES, Cast("mxfp4", rounding="stochastic", headroom=4 / 3), VALUES, torch.float16),
    (Cast("mxfp8", scale_rule="ceil"), CODES_ACROSS, None, NOTHING, torch.bfloat16),
    (None, NOTHING, Cast(scale_rule="4over6_mse", hadamard=4), CODES, torch.float32),
    (Cast(rounding="eden"), CODES, Cast(rounding="eden", hadamard=16), CODES_ACROSS, torch.bfloat16),
    (Cast(rounding="eden", scale_rule="fp8_exact"), VALUES, None, NOTHING, torch.bfloat16),
]
COUNT = int(os.environ.get("HF_NVFP4_KERNEL_CASES", 40 if cases.INTERPRETED else 1000))


def random_shape(case, tile):
    """[M, K], K a multiple of 16; a third are made of whole tiles. One row is rare: it is compiled for itself."""
    most = 2 if cases.INTERPRETED else 12
    if case // len(RANDOM) % 3 == 2:
        return [size * torch.randint(1, most + 1, ()).item() for size in (tile.R, tile.B * 16)]
    fixed = [7, 10, 33] + [1] * (case % len(RANDOM) in (0, 3))
    which = case // len(RANDOM) % (2 * len(fixed))
    m = fixed[which] if which < len(fixed) else torch.randint(2, 36 * most, ()).item()
    return m + (m % 16 == 0), 16 * torch.randint(1, 6 * most, ()).item()


@pytest.mark.parametrize("pair", range(len(RANDOM)))
def test_random_shapes_and_scales(device, pair):
    """Ragged, strided and transposed tensors, from 1e-40 to 1e38, with NaN, inf, and zeros of both signs."""
    row, row_out, col, col_out, dtype = RANDOM[pair]
    layouts = list(cases.LAYOUTS)[: None if pair in (0, 2) else -1]
    for case in range(pair, COUNT, len(RANDOM)):
        torch.manual_seed(case)
        m, k = random_shape(case, cases.tile(row, col))
        layout = layouts[torch.randint(len(layouts), ())]
        x = cases.random_tensor(m, k, dtype).to(device)
        try:
            cases.compare(cases.LAYOUTS[layout](x), row, row_out, col, col_out)
        except AssertionError as error:
            raise AssertionError(f"case {case}: [{m}, {k}] in {dtype}, {layout}") from error


def test_more_elements_than_32_bits_count(device):
    """The last rows and columns of 2^31 + elements against the reference, with the largest among them."""
    if device.type != "cuda" or cases.INTERPRETED or torch.cuda.mem_get_info()[0] < 24 * 2**30:
        pytest.skip("needs a GPU with 24 GiB of free memory")
    m, k, last = 2**17 + 48, 2**14, 64
    x = torch.randn(m, k, device=device, dtype=torch.bfloat16)
    x[-1, -1] = 100.0
    row, col = SR, Cast(hadamard=16, rounding="stochastic")
    seeds = cases.random_seed(device), cases.random_seed(device)
    texts = kernels.spec(row), kernels.spec(col)
    rotated = rotate(x[:, -last:].T.contiguous(), 16)
    amax = ops.amax(x, True, 16)
    assert amax.tolist() == [100.0, rotated.abs().max().item()]

    bottom = cases.reference.quantize_rows(x[-last:], amax[0], seeds[0], row, m - last)
    right = cases.reference.quantize_rows(rotated, amax[1], seeds[1], col, k - last)
    values, _, codes, scales, _ = ops.cast(x, amax, *seeds, texts[0], VALUES, texts[1], CODES_ACROSS)
    cases.assert_same(values[-last:], bottom.values().bfloat16(), "values", x[-last:])
    back = ops.dequantize(codes, scales, texts[1], True)  # [M, K]
    cases.assert_same(back[:, -last:].T, right.values().bfloat16(), "across", rotated)
    del values, codes, scales, back
    codes, scales, _, values, _ = ops.cast(x, amax, *seeds, texts[0], CODES, texts[1], VALUES)
    cases.assert_same(values[:, -last:].T, right.values().bfloat16(), "values of the transpose", rotated)
    assert codes[-last:].equal(cases.reference.pack(bottom, row).codes)
    back = ops.dequantize(codes, scales, texts[0], False)
    cases.assert_same(back[-last:], bottom.values().bfloat16(), "dequantized", x[-last:])


# ---------------------------------------------------------------------------- stochastic rounding


def rounded_up(x, seed, transposed=False):
    """Which elements of x, all between 2 and 3 but for the first of each block, the kernel rounds to 3 at scale 1."""
    amax = torch.full((2,), 2688.0, device=x.device)  # 6 · 448: elements as they are, in blocks whose largest is 6
    text = kernels.spec(SR)
    if transposed:
        values = ops.cast(x.T.contiguous(), amax, None, seed, None, NOTHING, text, VALUES)[0].T
    else:
        values = ops.cast(x, amax, seed, None, text, VALUES, None, NOTHING)[0]
    values = values.view(x.shape[0], -1, 16)[:, :, 1:]
    assert ((values == 2) | (values == 3)).all()
    return (values == 3).flatten(1)


def between(v):
    """v [M, K] in [2, 3) with 6 as the first of each block of 16."""
    v = v.clone()
    v[:, ::16] = 6
    return v


def test_rounding_frequencies_pass_chi_square(device):
    """Each k/256 above a grid point goes up k times in 256 draws: 255 values, 240 draws each."""
    k = torch.arange(1, 256, device=device)
    x = between((2 + k[:, None] / 256).expand(-1, 256))
    up, p = rounded_up(x, cases.random_seed(device)).sum(1), k / 256
    chi2 = ((up - 240 * p) ** 2 / (240 * p * (1 - p))).sum()
    assert abs(chi2 - 255) < 5 * 510**0.5


def test_draws_are_independent_and_repeatable(device):
    """Of neighbours in both directions, of calls, and of the orientations; the reference's draws all the same."""
    x = between(torch.full((128, 256), 2.5, device=device))
    seeds = [cases.random_seed(device) for _ in range(2)]
    a, b = (rounded_up(x, seed) for seed in seeds)
    assert rounded_up(x, seeds[0]).equal(a)
    reference = (random_bytes(x, seeds[0]) > 127).view(128, -1, 16)[:, :, 1:].flatten(1)
    assert a.equal(reference)
    across = rounded_up(x[:, :128], seeds[1], transposed=True)
    assert across.equal(b[:, :120])  # keyed on the operand's row and column, whatever way it was read
    square = a[:120, :120]
    pairs = [(a, b), (square, square.T), (square, across[:120])]
    pairs += [(a[:, lag:], a[:, :-lag]) for lag in (1, 2, 3, 15)] + [(a[lag:], a[:-lag]) for lag in (1, 16, 32)]
    for one, other in pairs:
        r = torch.corrcoef(torch.stack([one.flatten(), other.flatten()]).float())[0, 1]
        assert abs(r) < 5 / one.numel() ** 0.5


def test_a_layers_gradients_are_rounded_stochastically_by_the_kernels(device, monkeypatch):
    """Through backward: the same seed gives the same bits, and averaging takes the error down as 1 / sqrt(n)."""
    monkeypatch.setattr(bf16, "KERNEL_DEVICES", {device.type})
    x, dy = torch.randn(32, 64, device=device), torch.randn(32, 48, device=device)
    layer = NVFP4Linear(64, 48, bias=False, recipe="nvfp4_unbiased", backend="bf16", device=device)

    def gradients(seed):
        torch.manual_seed(seed)
        layer.zero_grad()
        leaf = x.clone().requires_grad_()
        layer(leaf).backward(dy)
        return torch.cat([leaf.grad, layer.weight.grad])

    assert gradients(1).equal(gradients(1))
    assert (gradients(1) != gradients(2)).float().mean() > 0.9
    draws = torch.stack([gradients(seed).double() for seed in range(4)])
    difference = (draws[:2].mean(0) - draws[2:].mean(0)).square().mean().item()
    assert difference == pytest.approx(draws.var(0).mean().item(), rel=0.15)
    if device.type == "cpu":  # the same products then: the same bits as without kernels
        with_kernels = gradients(1)
        monkeypatch.setattr(bf16, "KERNEL_DEVICES", set())
        assert gradients(1).equal(with_kernels)
