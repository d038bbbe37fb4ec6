"""What the Triton kernels are compared with: every cast, tensors of every kind, and the reference's answer.

Knows reference.py and the operators of hf_nvfp4.ops. On a GPU they are compiled, on the CPU interpreted.
"""

import contextlib
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from hf_nvfp4.ops import CODES_ACROSS, CODES_SWIZZLED, FP8, NOTHING, VALUES
from hf_nvfp4.ops.cast import _load_columns, _prepared, cast_kernel
from hf_nvfp4.ops.eden import round_e4m3, round_fp8_exact
from hf_nvfp4.ops.launch import OPTIONS, Launcher, tile_for
from hf_nvfp4.ops.spec import Plan, plan

from hf_nvfp4 import Cast, ops, reference
from hf_nvfp4.backends import kernels
from hf_nvfp4.casts import MX_SR_HEADROOM, SR_HEADROOM

INTERPRETED = not isinstance(cast_kernel, triton.runtime.JITFunction)
MARKS = [
    pytest.mark.skipif(
        not INTERPRETED and not torch.cuda.is_available(),
        reason="no GPU to compile the kernels for; TRITON_INTERPRET=1, as make test sets it, runs them on the CPU",
    ),
    pytest.mark.skipif(
        INTERPRETED and tuple(map(int, triton.__version__.split(".")[:2])) < (3, 9),
        reason=f"Triton {triton.__version__}'s interpreter can't take a size from an array of NumPy 2.4; 3.9's can",
    ),
    # NumPy, of the inf and NaN that the interpreter meets.
    pytest.mark.filterwarnings("ignore:(invalid value|overflow|divide by zero) encountered:RuntimeWarning"),
]

SR = {"rounding": "stochastic"}
CASTS = [
    Cast(),
    Cast(**SR),
    Cast(**SR, headroom=SR_HEADROOM),
    Cast(square=True),
    Cast(square=True, **SR),
    Cast(outer="row"),
    Cast(outer="row", **SR),
    *(Cast(hadamard=size) for size in (2, 4, 8, 16)),
    Cast(hadamard=16, **SR),
    *(Cast(scale_rule=rule, square=square) for rule in ("4over6", "4over6_mse", "best") for square in (False, True)),
    *(Cast(scale_rule="fp8_exact", square=square) for square in (False, True)),
    Cast(scale_rule="fp8_exact", **SR),
    Cast(scale_rule="fp8_exact", hadamard=16, **SR),
    Cast(scale_rule="fp8_exact", hadamard=16, outer="bound"),
    Cast(hadamard=8, outer="bound", **SR),
    Cast(scale_rule="fp8_exact", outer="row"),
    Cast(scale_rule="best", outer="row"),
    Cast(scale_rule="4over6", hadamard=16),
    *(Cast(rounding="eden", scale_rule=rule) for rule in ("amax", "4over6", "best", "fp8_exact")),
    Cast(rounding="eden", hadamard=16),
    Cast(rounding="eden", scale_rule="fp8_exact", hadamard=16, outer="bound"),
    Cast(rounding="eden", outer="row"),
    Cast("mxfp4"),
    Cast("mxfp4", square=True, scale_rule="ceil"),
    Cast("mxfp4", hadamard=16, headroom=MX_SR_HEADROOM, **SR),
    Cast("mxfp8", scale_rule="ceil"),
    Cast("mxfp8", square=True),
    Cast("mxfp8", **SR),
    Cast("fp8_e4m3_block"),
    Cast("fp8_e4m3_block", square=True),
    Cast("fp8_e4m3_block", **SR),
    Cast("fp8_e4m3"),
    Cast("fp8_e4m3", outer="row"),
    Cast("fp8_e4m3", hadamard=8, **SR),
    Cast("fp8_e5m2"),
    Cast("fp8_e5m2", **SR),
]


@contextlib.contextmanager
def poisoned():
    """New tensors hold NaN, or the largest integer, until something is written to them."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def count_launches(monkeypatch):
    """A list that the name of each kernel launched from now on is added to."""
    names, launch = [], Launcher.__call__

    def counted(self, *arguments):
        names.append(self.kernel.__name__)
        return launch(self, *arguments)

    monkeypatch.setattr(Launcher, "__call__", counted)
    return names


# ---------------------------------------------------------------------------- tensors


def finite(x, dtype):
    """x in dtype, the largest finite value instead of inf."""
    largest = torch.finfo(dtype).max
    return x.clamp(-largest, largest).to(dtype)


def assorted(m, k, dtype=torch.float32):
    """[m, k] with rows of many magnitudes, ties, zeros of both signs, all-zero blocks; NaN and inf nowhere."""
    x = torch.randn(m, k) * 10 ** (-8 * torch.rand(m, 1) ** 2)
    x[1::5] = torch.randint(-24, 25, x[1::5].shape) / 4
    x[2::7] *= 10 ** torch.randn(x[2::7].shape)
    x[torch.rand(m, k) < 0.05] = 0.0
    x[torch.rand(m, k) < 0.05] = -0.0
    x[3::8, : k // 2] = 0.0
    return finite(x, dtype)


# NaN with every bit of its significand set: integer arithmetic that rounds it carries it into the sign.
NAN = torch.tensor(0x7FFFFFFF, dtype=torch.int32).view(torch.float32)


def with_non_finite(x):
    """x with a NaN, an inf and a -inf in every 50 rows or fewer."""
    x = x.clone()
    m, k = x.shape
    for row, value in ((0, NAN), (m // 2, float("inf")), (m - 1, -float("inf"))):
        x[row::50, torch.randint(k, ())] = value
    return x


def random_tensor(m, k, dtype):
    """[m, k] of any magnitude and spread; sometimes with ties, zeros, outliers, NaN or inf."""
    kind = torch.randint(8, ()).item()
    x = torch.randn(m, k)
    if kind == 0:
        x = torch.randint(-24, 25, (m, k)) / 4
    elif kind == 1:
        x *= 10 ** (5 * torch.randn(m, k))
    elif kind == 2:
        x *= 10 ** (10 * torch.randn(m, 1))
    elif kind == 3:
        x[torch.rand(m, k) < 0.5] *= 0.0  # of both signs
    x *= 10 ** (78 * torch.rand((), dtype=torch.float64) - 40) if kind > 1 else 1
    if kind == 4:
        x[torch.randint(m, ()), torch.randint(k, ())] *= 1e4
    elif kind == 5:
        x = assorted(m, k)
    x = finite(x, dtype)
    return with_non_finite(x) if kind == 6 else x


def _cut(x, left=0, right=0, every=1):
    """x as a view into a larger tensor, NaN around it."""
    m, k = x.shape
    view = x.new_full((m * every, left + k + right), float("nan"))[::every, left : left + k]
    return view.copy_(x)


LAYOUTS = {
    "contiguous": lambda x: x,
    "wide rows": lambda x: _cut(x, left=16, right=32),
    "every other row": lambda x: _cut(x, every=2),
    "transposed": lambda x: x.T.contiguous().T,
    "odd address and stride": lambda x: _cut(x, left=1, right=2),
}


# ---------------------------------------------------------------------------- what the reference says


@dataclass
class Expected:
    """The reference's answer for one orientation; `operand` is x or xᵀ, rotated if the cast rotates."""

    operand: torch.Tensor
    amax: torch.Tensor
    values: torch.Tensor
    quantized: reference.QuantizedTensor


def random_seed(device):
    return torch.randint(-(2**31), 2**31 - 1, (2,), dtype=torch.int32).to(device)


def expected(x, cast, seed, transposed):
    """x [M, K] quantized by reference.py, or xᵀ [K, M padded to 16]."""
    if transposed:
        x = F.pad(x, (0, 0, 0, -x.shape[0] % 16)).T
    operand, amax, _ = reference.prepare(x.contiguous(), cast)
    blocks = reference.quantize_rows(operand, amax, None if cast.rounding == "nearest" else seed, cast)
    return Expected(operand, amax, blocks.values().bfloat16(), reference.pack(blocks, cast))


def swizzled(scales):
    """uint8 [M, n] padded to 128 × 4 and in the order of cuBLAS (NVIDIA's documentation of its block scales)."""
    scales = F.pad(scales, (0, -scales.shape[1] % 4, 0, -scales.shape[0] % 128))
    rows, columns = scales.shape
    tiles = scales.view(rows // 128, 4, 32, columns // 4, 4).permute(0, 3, 2, 1, 4)
    return tiles.reshape(rows, columns)


def stored(scales):
    """Block scales as the operators return them, bytes or FP32; E4M3's NaN without the sign that an inf - inf left."""
    if scales is None or scales.dtype == torch.float32:
        return scales
    code = scales.view(torch.uint8)
    return code & 0x7F if scales.dtype == torch.float8_e4m3fn else code


# ---------------------------------------------------------------------------- comparison


def assert_same(got, want, what, source=None):
    """Equal to the bit; any NaN equals any other.

    source: what `want` was rounded from. The kernels' values keep the sign of a -0.0, the reference's don't.
    """
    assert (got.shape, got.dtype) == (want.shape, want.dtype), what
    if not got.is_floating_point():
        wrong = got != want
    else:
        signs = got.signbit() != want.signbit()
        if source is not None:
            signs &= ~((want == 0) & ~want.signbit() & source.signbit())
        wrong = ((got != want) | signs) & ~(got.isnan() & want.isnan())
    if wrong.any():
        first = tuple(wrong.nonzero()[0].tolist())
        raise AssertionError(f"{what}: {wrong.sum()} of {wrong.numel()} differ, first at {first}: "
                             f"{got[first].item()}, not {want[first].item()}")  # fmt: skip


def tile(row, col):
    """What a launch for two casts works on at a time."""
    return tile_for(*(plan(None if cast is None else kernels.spec(cast)) for cast in (row, col)))


def assert_writes(outputs, want, cast, out, transposed):
    """What ops.cast returned for one orientation, taken off the front of `outputs`, is what the reference says."""
    what = f"{cast}, {'column' if transposed else 'row'}, output {out}"
    q, text = want.quantized, kernels.spec(cast)
    m, k = want.operand.shape
    data = outputs.pop(0)
    scales = outputs.pop(0) if out not in (VALUES, FP8) and q.scales is not None else None
    if out == FP8:
        return assert_writes_fp8(data, outputs.pop(0), want, what)
    assert_same(outputs.pop(0), q.tensor_scale, f"{what}, scale above")
    if out == VALUES:
        assert data.is_contiguous()
        assert_same(data.T if transposed else data, want.values, f"{what}, values", want.operand)
        return
    codes, wanted = q.codes, stored(q.scales)
    if out == CODES_ACROSS:
        codes, wanted = codes.view(m, k // 16, -1).transpose(0, 1), wanted if wanted is None else wanted.T
    elif out == CODES_SWIZZLED:
        wanted = swizzled(wanted)
    assert_same(data, codes, f"{what}, codes")
    if wanted is not None:
        assert_same(scales, wanted, f"{what}, block scales")
    if out != CODES_SWIZZLED:
        with poisoned():
            values = ops.dequantize(data, scales, text, out == CODES_ACROSS)
        assert_same(values.T if out == CODES_ACROSS else values, q.values().bfloat16(), f"{what}, dequantized")


def assert_writes_fp8(data, above, want, what):
    """E4M3 bytes and the FP32 scale above: the very values under rule "fp8_exact", else an eighth of them, rounded."""
    q = want.quantized
    eighth = q.cast.scale_rule != "fp8_exact"
    assert_same(above, q.tensor_scale * 8 if eighth else q.tensor_scale, f"{what}, scale above")
    values = want.values.float()
    if not eighth:
        assert values.to(torch.float8_e4m3fn).float().equal(values) or not above.isfinite().all()
    expected = (values / 8 if eighth else values).clamp(-448, 448).to(torch.float8_e4m3fn).float()
    got = data.view(torch.float8_e4m3fn).float()
    assert got.shape == expected.shape
    # Bytes under a scale that is not finite may be any; the sign of a zero is not kept.
    wrong = (got != expected) & above.isfinite() & ~expected.isnan()
    assert not wrong.any(), f"{what}: {wrong.sum()} of {wrong.numel()} differ"


def compare(x, row=None, row_out=NOTHING, col=None, col_out=NOTHING, on=None):
    """One launch of ops.amax and one of ops.cast against reference.py, computed on the device `on` (x's own)."""
    casts, on = (row, col), on or x.device
    seeds = [random_seed(x.device) if c is not None and c.rounding != "nearest" else None for c in casts]
    wants = [
        None if c is None else expected(x.to(on), c, None if seed is None else seed.to(on), transposed)
        for c, seed, transposed in zip(casts, seeds, (False, True), strict=True)
    ]
    for want in (w for w in wants if w is not None and on != x.device):
        want.operand, want.amax, want.values = (t.to(x.device) for t in (want.operand, want.amax, want.values))
        tensors = (None if t is None else t.to(x.device) for t in want.quantized.tensors)
        want.quantized = type(want.quantized)(*tensors, want.quantized.cast)
    with poisoned():
        amax = _amax(x, casts, wants)
        texts = [None if c is None else kernels.spec(c) for c in casts]
        outputs = ops.cast(x, amax, *seeds, texts[0], row_out, texts[1], col_out)
    for cast, want, out, transposed in zip(casts, wants, (row_out, col_out), (False, True), strict=True):
        if cast is not None:
            assert_writes(outputs, want, cast, out, transposed)
    assert not outputs


def _amax(x, casts, wants):
    """The operator's, which must be the reference's, where the operator is for it."""
    row, col = casts
    if row is not None and row.outer == "row":
        return x.abs().amax(1).float()
    if any(cast is not None and cast.outer == "bound" for cast in casts):
        return ops.amax(x, True, -1)[:1].clone()
    got = ops.amax(x, row is not None, -1 if col is None else col.hadamard)
    for i, (cast, want) in enumerate(zip(casts, wants, strict=True)):
        if cast is None:
            continue
        if i == 0 and cast.hadamard:  # of x's rotated rows: nobody needs it yet
            got[0] = want.amax
        elif cast.block_format.tensor_scale:
            assert_same(got[i], want.amax, f"amax {i} of {cast}")
    if row is None and (col is None or col.hadamard):
        assert got[0] == 0
    if col is None:
        assert got[1] == 0
    return got


# ---------------------------------------------------------------------------- scales alone


@triton.jit
def _rounded_scales_kernel(scale_ptr, byte_ptr, value_ptr, code_ptr, P: tl.constexpr):
    E4M3: tl.constexpr = P.scale_grid
    at = tl.program_id(0) * 256 + tl.arange(0, 256)
    scale, byte = tl.load(scale_ptr + at), tl.load(byte_ptr + at)
    if P.rule == "fp8_exact":
        value, code = round_fp8_exact(scale, byte)
    else:
        value, code = round_e4m3(scale, byte, E4M3)
    tl.store(value_ptr + at, value)
    tl.store(code_ptr + at, code)


def rounded_scales(scales, byte, rule):
    """FP32 scales [n, 256] as rounding "eden" rounds them by these bytes: values and codes."""
    with poisoned():
        value, code = torch.empty_like(scales), torch.empty_like(scales, dtype=torch.int32)
    p = plan(kernels.spec(Cast(rounding="eden", scale_rule=rule)))
    _rounded_scales_kernel[(len(scales),)](scales, byte.int(), value, code, p, **OPTIONS)
    return value, code


# ---------------------------------------------------------------------------- rotation


@triton.jit
def _rotated_kernel(x_ptr, out_ptr, M, K, P: tl.constexpr):
    """The rotated xᵀ of the cast kernels, which never write it: FP32 [K, M]."""
    columns, groups = tl.program_id(0) * 32 + tl.arange(0, 32), tl.program_id(1) * 2 + tl.arange(0, 2)
    v = _prepared(_load_columns(x_ptr, columns, groups, K, M, K, False), P)
    at = columns[:, None, None] * M + groups[None, :, None] * 16 + tl.arange(0, 16)[None, None, :]
    tl.store(out_ptr + at, v, mask=(columns < K)[:, None, None] & (groups < M // 16)[None, :, None])


def rotated(x, size):
    """xᵀ [K, M] rotated by the kernels' arithmetic and rounded to BF16, in FP32; M a multiple of 16."""
    m, k = x.shape
    with poisoned():
        out = x.new_empty((k, m), dtype=torch.float32)
    p = Plan(True, hadamard=size, hadamard_factor=size**-0.5)
    _rotated_kernel[(triton.cdiv(k, 32), triton.cdiv(m, 32))](x.contiguous(), out, m, k, p, **OPTIONS)
    return out
