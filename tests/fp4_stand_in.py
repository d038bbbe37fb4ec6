"""A stand-in for torch's NVFP4 GEMM on the CPU, and what the tests of FP4 backends share.

It follows the documents of cuBLAS and torch, not our writer: scales are found by index arithmetic, codes decoded by a
table, and torch's own checks of a CUDA call see every call.
"""

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.functional import ScalingType, SwizzleType

from hf_nvfp4 import Cast, NVFP4Linear
from hf_nvfp4.backends import fp4

E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], dtype=torch.float64)
RECIPE = [ScalingType.BlockWise1x16, ScalingType.TensorWise]
LAYOUT = [SwizzleType.SWIZZLE_32_4_4, SwizzleType.NO_SWIZZLE]


def swizzled_offset(row, block, blocks):
    """Where cuBLAS reads a scale (its manual, "1D block scaling factors layout"): 128 × 4 tiles of 512 bytes."""
    tile = row // 128 * (blocks // 4) + block // 4
    return tile * 512 + row % 32 * 16 + row // 32 % 4 * 4 + block % 4


def unswizzled(scales, rows, blocks):
    """[rows, blocks] of a swizzled buffer, in FP64."""
    row, block = torch.arange(rows)[:, None], torch.arange(blocks)[None, :]
    at = swizzled_offset(row, block, -(-blocks // 4) * 4)
    return scales.flatten().view(torch.float8_e4m3fn)[at].double()


def dequantized(codes, scales):
    """Code × block scale of packed codes [rows, K/2], in FP64."""
    codes = codes.view(torch.uint8).long()
    values = E2M1[torch.stack((codes & 15, codes >> 4), -1).flatten(1)]
    blocks = -(-values.shape[1] // 16)
    return values * unswizzled(scales, len(values), blocks).repeat_interleave(16, 1)[:, : values.shape[1]]


REAL = F.scaled_mm


def torch_accepts(tensors, *settings, **keywords):
    """Let torch check the shapes, types, strides and layouts of this call as if it were on a GPU."""
    with FakeTensorMode():
        a, b, a_scales, b_scales = (_fake(t) for t in tensors)
        REAL(a, b, a_scales, settings[0], b_scales, settings[1], **keywords)


def _fake(t):
    if isinstance(t, list):
        return [_fake(x) for x in t]
    return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="cuda")


def stand_in(mat_a, mat_b, scale_a, recipe_a, scale_b, recipe_b, swizzle_a, swizzle_b, output_dtype):
    """`torch.nn.functional.scaled_mm` of two NVFP4 operands as documented."""
    assert recipe_a == recipe_b == RECIPE and swizzle_a == swizzle_b == LAYOUT
    assert output_dtype in (torch.bfloat16, torch.float16, torch.float32)
    tensors = (mat_a, mat_b, scale_a, scale_b)
    torch_accepts(tensors, recipe_a, recipe_b, swizzle_a=swizzle_a, swizzle_b=swizzle_b, output_dtype=output_dtype)
    alpha = (scale_a[1] * scale_b[1]).double()
    return (dequantized(mat_a, scale_a[0]) @ dequantized(mat_b.T, scale_b[0]).T * alpha).to(output_dtype)


def identity_operand(k):
    """The identity [k, k]: 1 is code 2, all scales are 1 (E4M3 0x38)."""
    codes = torch.zeros(k, k // 2, dtype=torch.uint8)
    codes[range(k), torch.arange(k) // 2] = torch.tensor([0x02, 0x20], dtype=torch.uint8).repeat(k // 2)
    ones = torch.full((-(-k // 128) * 128, -(-k // 64) * 4), 0x38, dtype=torch.uint8)
    return fp4.Operand(codes, ones.view(torch.float8_e4m3fn), torch.ones(()), Cast())


def skip_unless_it_runs(kernel, device):
    """Kernels run on a GPU, and on the CPU in Triton's interpreter."""
    triton = pytest.importorskip("triton")
    if device.type == "cuda":
        return
    if isinstance(kernel, triton.runtime.JITFunction):
        pytest.skip("run with TRITON_INTERPRET=1, as make test does")
    if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 9):
        pytest.skip("older interpreters can't take a size from an array of NumPy 2.4")


def run(layer, x, dy):
    """y, dx, dw and db of one forward and backward, the random draws always the same."""
    torch.manual_seed(3)
    layer.zero_grad()
    x = x.clone().requires_grad_()
    y = layer(x)
    y.backward(dy.to(y.dtype))
    return [t for t in (y.detach(), x.grad, layer.weight.grad, None if layer.bias is None else layer.bias.grad)]


def layers(recipe, backend, sizes, **settings):
    """The same layer on a backend and on the reference."""
    pair = [NVFP4Linear(*sizes, recipe=recipe, backend=b, **settings) for b in (backend, "reference")]
    pair[1].load_state_dict(pair[0].state_dict())
    return pair


def close(got, expected):
    """Equal but for the order of summation: FP32's last bits, or now and then a rounding to 16 bits."""
    difference = (got.double() - expected.double()).norm() / expected.double().norm()
    return difference < (3e-6 if expected.dtype == torch.float32 else 3e-4)


def gradients_of_a_tiny_llama(build, config, recipe, backend):
    """Loss and all gradients of one step, the random draws always the same."""
    ids = torch.randint(0, config.vocab_size, (2, 19), generator=torch.Generator().manual_seed(5))
    model = build(recipe, backend=backend)
    torch.manual_seed(3)
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    return loss.item(), torch.cat([p.grad.flatten() for p in model.parameters()])


def assert_trains_as_the_reference(build, config, recipe, backend):
    """A rounding that falls the other way moves one element by a step: rare, and small in the whole."""
    (loss, gradient), (expected_loss, expected) = (
        gradients_of_a_tiny_llama(build, config, recipe, name) for name in (backend, "reference")
    )
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    assert (gradient - expected).norm() < 0.02 * expected.norm()
