"""What the kernels' operators refuse, before any launch and in words."""


import pytest
import torch

from hf_nvfp4 import Cast

cases = pytest.importorskip("kernel_cases", reason="the kernels need Triton")
ops, kernels = cases.ops, cases.kernels
NOTHING, VALUES, CODES, CODES_SWIZZLED = range(4)
SR = Cast(rounding="stochastic")

pytestmark = cases.MARKS


@pytest.fixture
def launches(monkeypatch):
    """The kernels launched, by name."""
    return cases.count_launches(monkeypatch)


def bad_casts(x):
    """What is wrong, arguments of ops.cast."""
    two, seed = torch.ones(2, device=x.device), cases.random_seed(x.device)
    rn, sr, per_row, mx = (kernels.spec(c) for c in (Cast(), SR, Cast(outer="row"), Cast("mxfp4")))
    row = (None, None, rn, VALUES, None, NOTHING)
    draw = (None, sr, VALUES, None, NOTHING)
    yield r"\[M, K\] in float32, bfloat16 or float16, not \(32, 64\) in torch.float64", (x.double(), two, *row)
    yield r"not \(32, 64\) in torch.int32", (x.int(), two, *row)
    yield r"not \(1, 32, 64\) in torch.float32", (x[None], two, *row)
    yield r"K a multiple of 16; this is \(32, 40\). Pad with zeros", (x[:, :40], two, *row)
    yield "amax is on meta, x on", (x, two.to("meta"), *row)
    yield "row_seed is on meta", (x, two, seed.to("meta"), *draw)
    yield r"amax must be contiguous torch.float32 \[2\], not torch.bfloat16", (x, two.bfloat16(), *row)
    yield r"amax must be .* \[2\], not torch.float32 \[1\]", (x, two[:1], None, None, None, NOTHING, rn, VALUES)
    yield r"amax must be .* \[32\], not .* \[2\]", (x, two, None, None, per_row, VALUES, None, NOTHING)
    yield "amax must be .* not a strided", (x, torch.ones(4, device=x.device)[::2], *row)
    yield r"seed, int32 \[2\]", (x, two, None, *draw)
    yield "seed must be contiguous torch.int32", (x, two, seed.long(), *draw)
    yield "per-row scales of xᵀ: transpose x", (x, two, None, None, None, NOTHING, per_row, VALUES)
    yield "per-row scales goes alone", (x, x[:, 0].abs().contiguous(), None, None, per_row, VALUES, rn, VALUES)
    yield "only E4M3 scales are swizzled", (x, two, None, None, mx, CODES_SWIZZLED, None, NOTHING)
    yield "row_out=7", (x, two, None, None, rn, 7, None, NOTHING)
    yield "col_out=0 .* 1 to 5 with a Spec", (x, two, None, None, rn, VALUES, rn, NOTHING)
    yield "row_out=1 for row=None: 0 goes with None", (x, two, None, None, None, VALUES, None, NOTHING)
    yield "'e4m3' is not the text of a Spec", (x, two, None, None, "e4m3", VALUES, None, NOTHING)


def bad_specs():
    """What is wrong, fields of a Spec that are."""
    yield "element 'e3m0'; the kernels know e2m1, e4m3, e5m2", {"element": "e3m0"}
    yield "scale 'e5m2'; the kernels know", {"scale": "e5m2"}
    yield "blocks of 48 .* the kernels know 16, 32, 64 and 128", {"block": 48}
    yield "blocks of 16 with scale 'none'", {"scale": "none"}
    yield "scale rule 'ceil' with scale 'e4m3'", {"scale_rule": "ceil"}
    yield "scale rule 'best' with scale 'float32'", {"scale_rule": "best", "scale": "float32"}
    yield "error of rounding to nearest", {"scale_rule": "4over6", "rounding": "stochastic"}
    yield "rounding 'up'; the kernels know nearest, stochastic, eden", {"rounding": "up"}
    yield "for blocks of 16 of e2m1 under e4m3 scales", {"scale": "e8m0", "block": 32, "rounding": "eden"}
    yield "without headroom", {"headroom": 1.0625, "rounding": "eden"}
    yield "square blocks have others", {"square": True, "rounding": "eden"}
    yield "Hadamard transform of 32", {"hadamard": 32}
    yield "headroom=0", {"headroom": 0}
    yield "not the text of a Spec: could not convert", {"headroom": "much"}
    yield "square blocks are the same along both", {"square": True, "per_row": True}
    yield "bound where a Hadamard transform", {"bound": True}
    yield "not the text of a Spec: element=… block=…", {"blocks": 16}


def test_bad_input_is_refused_in_words_before_any_launch(device, launches):
    x = torch.randn(32, 64, device=device)
    for message, arguments in bad_casts(x):
        with pytest.raises((TypeError, ValueError), match=message):
            ops.cast.__wrapped__(*arguments)  # past the dispatcher, which sends meta tensors elsewhere
    text, two = kernels.spec(Cast()), torch.ones(2, device=device)
    for message, fields in bad_specs():
        defaults = (part.split("=") for part in str(ops.Spec()).split())
        values = {**dict(defaults), **{k: int(v) if isinstance(v, bool) else v for k, v in fields.items()}}
        changed = " ".join(f"{name}={value}" for name, value in values.items())
        with pytest.raises(ValueError, match=message):
            ops.cast(x, two, None, None, changed, VALUES, None, NOTHING)
    for size in (-2, 1, 3, 32):
        with pytest.raises(ValueError, match=f"col_hadamard={size}"):
            ops.amax(x, True, size)
    for message, arguments in (
        ("rotate: size 64 for K=32; it takes powers of two up to 8192", (x[:, :32], 64)),
        ("rotate: size 512 transposed; it takes powers of two up to 256", (x, 512, None, True)),
        ("seed must be contiguous torch.int32", (x, 32, cases.random_seed(device).long())),
        ("seed is on meta", (x, 32, cases.random_seed(device).to("meta"), True)),
        ("K a multiple of 16", (x[:, :40], 8)),
    ):
        with pytest.raises(ValueError, match=message):
            ops.rotate.__wrapped__(*arguments)
    codes, scales = (torch.zeros(4, n, dtype=torch.uint8, device=device) for n in (32, 4))
    for message, arguments in (
        (r"codes must be uint8 \[M, K / 16 · 8\], not .* \[4, 4\]", (codes[:, :4], scales, text, False)),
        ("codes must be uint8", (codes.int(), scales, text, False)),
        (r"codes must be uint8 \[K / 16, M, 8\]", (codes, scales, text, True)),
        (r"scales must be .* \[4, 4\], not .* \[4, 3\]", (codes, scales[:, :3].contiguous(), text, False)),
        ("scales must be .* a strided", (codes, scales.T, text, False)),
        ("scales must be contiguous torch.uint8", (codes, scales.float(), text, False)),
        ("give them", (codes, None, text, False)),
        ("none are expected", (codes, scales, kernels.spec(Cast("fp8_e4m3")), False)),
        ("scales is on meta", (codes, scales.to("meta"), text, False)),
    ):
        with pytest.raises(ValueError, match=message):
            ops.dequantize.__wrapped__(*arguments)
    assert not launches


def test_a_gemm_that_there_is_not_is_refused(device, launches):
    a, one = torch.ones(16, 32, device=device).bfloat16(), torch.ones((), device=device)
    with pytest.raises(ValueError, match="scaled_matmul: "):
        ops.scaled_matmul(a.float(), a, one, one, None, torch.float32)
    assert "one GPU" in ops.unfit(a.cpu(), a.cpu(), torch.float32)
    if device.type == "cuda":
        assert "torch.float16" in ops.unfit(a, a, torch.float16)
        assert "empty" in ops.unfit(a[:0], a, torch.float32)
        assert "not contiguous" in ops.unfit(a[:, ::2], a[:, ::2], torch.float32)
        with pytest.raises(ValueError, match="scale_b is on cpu"):
            ops.scaled_matmul(a, a, one, one.cpu(), None, torch.float32)
    assert not launches
