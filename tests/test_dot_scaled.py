"""The Triton GEMM of packed operands: addresses, decoding, scales, refusals; and backend fp4_triton, which uses it.

On a GPU the compiled kernel, on the CPU Triton's interpreter.
"""

import pytest
import torch
from fp4_stand_in import E2M1, close, dequantized, identity_operand, layers, run, skip_unless_it_runs

from hf_nvfp4 import Cast
from hf_nvfp4.backends import BACKENDS, fp4, fp4_triton

RN, RN_ROW = Cast(), Cast(outer="row")


@pytest.fixture
def kernel(monkeypatch, device):
    """The module of the kernel, and backend fp4_triton wherever the kernel runs."""
    module = pytest.importorskip("hf_nvfp4.ops.dot_scaled")
    skip_unless_it_runs(module._fp4_matmul, device)
    monkeypatch.setattr(fp4_triton, "supports", lambda recipe, device: fp4.unfit(recipe))
    monkeypatch.setitem(BACKENDS, "fp4_triton", fp4_triton)
    return module


def operand(x, cast=RN):
    return fp4.cast(x, cast)[0]


def product(a, b):
    """What the kernel should give, in FP32, on the CPU."""
    a, b = (type(x)(*(t.cpu() for t in x.tensors), x.cast) for x in (a, b))
    outer = a.tensor_scale.double() * b.tensor_scale.double().view(1, -1)
    return (dequantized(a.codes, a.scales) @ dequantized(b.codes, b.scales).T * outer).float()


@pytest.mark.parametrize("m, n, k", [(1, 16, 16), (5, 48, 32), (33, 80, 208), (130, 272, 144), (1153, 16, 16)])
def test_the_kernel_multiplies_what_the_bytes_say(kernel, device, m, n, k):
    a, b = operand(torch.randn(m, k, device=device)), operand(torch.randn(n, k, device=device) * 1e-4)
    bias = torch.randn(n, device=device) * 1e-4
    expected = product(a, b)
    assert close(fp4_triton.multiply(a, b, torch.float32).cpu(), expected)
    assert close(fp4_triton.multiply(a, b, torch.float32, bias).cpu(), expected + bias.cpu())


def test_every_code_and_scale_decodes(kernel, device):
    """A row for each E4M3 scale, a column for each code, against an identity."""
    scales = torch.arange(127, dtype=torch.uint8)
    codes = torch.tensor([0x10, 0x32, 0x54, 0x76, 0x98, 0xBA, 0xDC, 0xFE], dtype=torch.uint8).repeat(127, 1)
    a = codes, fp4.swizzle(scales[:, None].view(torch.float8_e4m3fn)), torch.ones(())
    a, b = (fp4.Operand(*(t.to(device) for t in ts), RN) for ts in (a, identity_operand(16).tensors))
    got = fp4_triton.multiply(a, b, torch.float32)
    assert got.cpu().equal(scales.view(torch.float8_e4m3fn).float()[:, None] * E2M1.float())


def test_outer_scales_of_rows_and_nan_scales(kernel, device):
    a, b = (operand(torch.randn(m, 64, device=device), RN_ROW) for m in (40, 48))
    assert close(fp4_triton.multiply(a, b, torch.float32).cpu(), product(a, b))
    a.scales.view(torch.uint8)[0, 0] = 0x7F
    got = fp4_triton.multiply(a, b, torch.float32)
    assert got[0].isnan().all() and got[1:].isfinite().all()


def test_other_operands_are_refused(kernel, device):
    a, b = (operand(torch.randn(m, 64, device=device)) for m in (16, 32))
    bad = {
        "contiguous uint8": (a.codes.float(), a.scales, a.tensor_scale),
        "swizzled float8_e4m3fn": (a.codes, a.scales[:, :2], a.tensor_scale),
        "one FP32 number": (a.codes, a.scales, torch.ones(3, device=device)),
        "not a multiple of 16": (a.codes[:, :4].contiguous(), a.scales, a.tensor_scale),
        "contracted over K": operand(torch.randn(16, 32, device=device)).tensors,
        "several devices": (a.codes.to("meta"), a.scales, a.tensor_scale),
    }
    for match, tensors in bad.items():
        with pytest.raises(ValueError, match=match):
            kernel._check(tensors, b.tensors, None)
    with pytest.raises(ValueError, match="bias of 32 columns"):
        kernel.fp4_matmul(*a.tensors, *b.tensors, torch.ones(3, device=device), torch.float32)
    nothing = kernel.fp4_matmul(a.codes[:0], a.scales[:0], a.tensor_scale, *b.tensors, None, torch.float32)
    assert nothing.shape == (0, 32)


@pytest.mark.parametrize("tokens", [7, 33])
def test_fp4_triton_trains_as_the_reference_does(kernel, device, tokens):
    x, dy = torch.randn(tokens, 48, device=device), torch.randn(tokens, 80, device=device)
    ours, theirs = layers("nvfp4", "fp4_triton", (48, 80), device=device)
    for got, expected in zip(run(ours, x, dy), run(theirs, x, dy), strict=True):
        assert close(got, expected)
    with torch.no_grad():
        assert close(ours.eval()(x), theirs.eval()(x))
