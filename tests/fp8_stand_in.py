"""Backends fp8 and fp8_rounded on the CPU: a stand-in for torch's blockwise FP8 GEMM, torch's checks of the other.

It follows the documents of torch, not our writer.
"""

import torch
import torch.nn.functional as F
from fp4_stand_in import _fake, torch_accepts
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.functional import ScalingType

from hf_nvfp4.backends import fp8

CUDA = torch.device("cuda")


def block_factors(scales, kind, rows, k):
    """A factor for each element [rows, k], in FP64, from scales where torch says that cuBLAS reads them."""
    if kind is ScalingType.BlockWise1x128:  # [rows, k / 128], the rows contiguous
        assert scales.shape == (rows, k // 128) and scales.stride(0) == 1
        return scales.double().repeat_interleave(128, 1)
    assert kind is ScalingType.BlockWise128x128  # [k / 128 padded to 4, rows / 128], the first dimension contiguous
    assert scales.shape == (-(-k // 512) * 4, rows // 128) and scales.stride(0) == 1
    return scales.T.double()[:, : k // 128].repeat_interleave(128, 0).repeat_interleave(128, 1)


def stand_in(a, b, scale_a, kind_a, scale_b, kind_b, output_dtype, use_fast_accum):
    """`torch.nn.functional.scaled_mm` with FP32 block scales as documented; torch's checks see every call."""
    assert not use_fast_accum
    torch_accepts((a, b, scale_a, scale_b), kind_a, kind_b, output_dtype=output_dtype)
    (m, k), n = a.shape, b.shape[1]
    left = a.double() * block_factors(scale_a, kind_a, m, k)
    return (left @ (b.T.double() * block_factors(scale_b, kind_b, n, k)).T).to(output_dtype)


def run_on_the_cpu(monkeypatch):
    """All is the backends' own code but the blockwise GEMM: torch has the other on the CPU."""
    monkeypatch.setattr(F, "scaled_mm", stand_in)
    monkeypatch.setattr(fp8, "lacks", lambda device: None)
    monkeypatch.setattr(fp8, "_lacks_blocks", lambda device: None)


def watched(monkeypatch):
    """The list of FP8 GEMMs' result types from now on; torch checks each as if it were on a GPU."""
    calls = []
    plain, blocks = fp8._scaled_mm, fp8._block_scaled_mm

    def checked(a, b, scale_a, scale_b, dtype, bias):
        calls.append(dtype)
        with FakeTensorMode():
            on_gpu = [fp8.Operand(_fake(x.values), None, None, x.cast) for x in (a, b)]
            plain(*on_gpu, _fake(scale_a), _fake(scale_b), dtype, None if bias is None else _fake(bias))
        return plain(a, b, scale_a, scale_b, dtype, bias)

    monkeypatch.setattr(fp8, "_scaled_mm", checked)
    monkeypatch.setattr(fp8, "_block_scaled_mm", lambda *a: calls.append(a[6]) or blocks(*a))
    return calls


def gpu(monkeypatch, *capability, cuda="13.0"):
    """Let torch say that there is a GPU."""
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "a GPU")
