"""Weights that are cast before they are gathered: by themselves, without processes (test_distributed.py has these)."""

import pytest
import torch

from hf_nvfp4 import Cast
from hf_nvfp4.backends import BACKENDS, bf16
from hf_nvfp4.precast import CastWeight, Codes

SQUARE, HOPPER, ROWS = Cast(square=True), Cast(square=True, scale_rule="fp8_exact"), Cast()


def same(a, b) -> bool:
    """Two operands, zeros of either sign being equal."""
    tensors = [[t.contiguous() for t in operand.tensors if t is not None] for operand in (a, b)]
    assert type(a) is type(b) and [t.dtype for t in tensors[0]] == [t.dtype for t in tensors[1]]
    return a.cast == b.cast and all(x.float().equal(y.float()) for x, y in zip(*tensors, strict=True))


def same_values(a, b) -> bool:
    return a.dequantize(torch.float64).equal(b.dequantize(torch.float64))


# Backend fp8 refuses recipes whose weights are not exactly FP8 values.
@pytest.mark.parametrize(
    ("name", "how"),
    [(name, how) for name in BACKENDS for how in (SQUARE, HOPPER, ROWS) if name != "fp8" or how is HOPPER],
    ids=str,
)
def test_a_backends_operands_of_shards_are_those_of_the_weight(name, how, device, monkeypatch):
    """Cast by the kernels, by rows of two processes, put together, in both directions."""
    monkeypatch.setattr(bf16, "KERNEL_DEVICES", {device.type})
    backend, w = BACKENDS[name], torch.randn(64, 48, device=device)
    shards = [Codes.of(bf16.packed(rows, how, w.abs().amax()), w.dtype) for rows in w.chunk(2)]
    shards[0].bytes, shards[0].shape = torch.cat([shard.bytes for shard in shards]), w.shape
    weight = CastWeight(shards[0], torch.float32)
    assert weight.shape == w.shape and weight.detach().parts is weight.parts
    col = how if how.square else None
    found, expected = weight.operands(backend, torch.float32, how, col), backend.cast(w, how, col)
    pairs = zip(found, expected, strict=True)
    assert all(a is b is None or same_values(a, b) and (name == "bf16" or same(a, b)) for a, b in pairs)
