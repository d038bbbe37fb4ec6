"""The Triton kernel that multiplies by a packed weight, against the same product in float64, and what it compiles to.

On a GPU the compiled kernel, on the CPU Triton's interpreter. Its use in layers: test_packed.py.
"""

import json
import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch
from fp4_stand_in import E2M1

from hf_nvfp4 import Cast, reference

cases = pytest.importorskip("kernel_cases", reason="the kernels need Triton")
ops = cases.ops
implementation = import_module("hf_nvfp4.ops.ops")
tiling = import_module("hf_nvfp4.ops.w4a16_tiles")
pytestmark = cases.MARKS


def packed(n, k, device, cast=None):
    """Codes, scales and outer scale of a random weight, and its values in float64."""
    q = reference.quantize(torch.randn(n, k) * 0.02, cast or Cast())
    return [t.to(device) for t in q.tensors], q.dequantize(torch.float64)


def assert_close(y, x, weight, bias=None):
    """y is x in BF16 times the weight, summed in FP32 and rounded once."""
    x = x.cpu().bfloat16().double()
    expected = x @ weight.T + (0 if bias is None else bias.cpu().double())
    unit = {torch.bfloat16: 2**-8, torch.float16: 2**-11, torch.float32: 2**-23}[y.dtype]
    slack = 2e-6 * (x.abs() @ weight.abs().T + (0 if bias is None else bias.cpu().double().abs()))
    y = y.cpu().double()
    assert y.shape == expected.shape and ((y - expected).abs() <= unit * expected.abs() + slack).all()


# M, N, K, x's dtype, bias's: one token, tiles of 8 that are full and not, several tiles; rows that are no multiple of
# 16; chunks of 32 columns that are full and not, whole steps of one and several warps.
SHAPES = [
    (1, 33, 64, torch.bfloat16, None),
    (1, 16, 1024, torch.bfloat16, torch.bfloat16),
    (2, 5, 16, torch.float32, torch.float32),
    (7, 40, 272, torch.float16, torch.float32),
    (8, 16, 128, torch.bfloat16, torch.float16),
    (16, 24, 288, torch.bfloat16, None),
    (17, 17, 512, torch.float32, torch.bfloat16),
    (33, 1, 48, torch.bfloat16, None),
]


@pytest.mark.parametrize("m, n, k, dtype, bias_dtype", SHAPES)
def test_the_product_is_that_of_the_dequantized_weight(device, m, n, k, dtype, bias_dtype):
    tensors, weight = packed(n, k, device)
    x = torch.randn(m, k, device=device, dtype=dtype)
    bias = None if bias_dtype is None else torch.randn(n, device=device, dtype=bias_dtype)
    with cases.poisoned():
        y = ops.w4a16(x, *tensors, bias)
    assert y.dtype == dtype
    assert_close(y, x, weight, bias)


# Columns: a multiple of 16, of a thread's 32 and 64, of whole turns.
@pytest.mark.parametrize(
    ("tiles", "k"),
    [
        *(((2, 2, 2, 3, 1), k) for k in (272, 512)),
        *(((2, 1, 1, 2, 2), k) for k in (288, 320)),
        *(((2, 1, 1, 2, 1, 4), k) for k in (272, 288)),
        *(((2, 1, 1, 1, 2, 4), k) for k in (320, 512)),
        ((2, 2, 2, 1, 1, 2), 272),
    ],
)
def test_another_tiling_gives_the_same(device, tiles, k):
    tiles = tiling.Tiles(*tiles)
    tensors, weight = packed(20, k, device)
    x = torch.randn(10 if tiles.spread == 1 else 3, k, device=device)
    with cases.poisoned():
        assert_close(ops.w4a16(x, *tensors, None, tiles), x, weight)


def test_tiles_fit_the_weight():
    for k in (16, 32, 48, 64, 272, 1024, 4096, 14336):
        for n in (16, 1024, 4096, 14336):
            for m in (1, 8, 9, 16, 17, 64):
                tiles = tiling.tiles_for(m, n, k)
                assert tiles.columns <= max(k, 128) and (tiles.wide == 1 or k % 64 == 0), (m, n, k, tiles)


def test_what_follows_reads_finished_outputs(device):
    """Kernels that start before the one in front has ended, each on that one's output."""
    if device.type != "cuda" or cases.INTERPRETED:
        pytest.skip("needs a GPU")
    tensors, _ = packed(4096, 4096, device)
    outputs = [torch.randn(1, 4096, device=device, dtype=torch.bfloat16)]
    for _ in range(20):
        outputs.append(ops.w4a16(outputs[-1], *tensors, None))
    for x, y in zip(outputs, outputs[1:], strict=False):
        torch.cuda.synchronize()
        assert y.isfinite().all() and ops.w4a16(x, *tensors, None).equal(y)


def test_every_code_and_scale_decodes(device):
    """A row for each scale, a column for each code, against an identity; subnormal, negative and NaN scales too."""
    scales = torch.tensor([*range(17), *range(19, 0x7E, 3), 0x7E, 0x7F, 0x80, 0x81, 0xC0, 0xFF], dtype=torch.uint8)
    scales = scales[:, None].to(device)
    codes = torch.tensor([0x10, 0x32, 0x54, 0x76, 0x98, 0xBA, 0xDC, 0xFE], dtype=torch.uint8, device=device)
    one, identity = torch.ones((), device=device), torch.eye(16, device=device)
    got = ops.w4a16(identity, codes.repeat(len(scales), 1), scales.view(torch.float8_e4m3fn), one, None).cpu()
    expected = E2M1.float()[:, None] * scales[:, 0].cpu().view(torch.float8_e4m3fn).float()
    assert torch.equal(got.nan_to_num(nan=-1), expected.nan_to_num(nan=-1)) and got.isnan().sum() == 32


def test_nan_and_inf_stay_where_they_belong(device):
    (codes, scales, outer), _ = packed(33, 96, device)
    x = torch.randn(3, 96, device=device)
    x[1, 40], codes[:, 20] = torch.inf, 0x11  # of columns 40 and 41: 0.5 each
    scales.view(torch.uint8)[7, 5] = 0x7F
    y = ops.w4a16(x, codes, scales, outer, None)
    assert y[:, 7].isnan().all() and y[1].isinf().sum() == 32
    others = y[[0, 2]][:, [n for n in range(33) if n != 7]]
    assert others.isfinite().all()
    assert ops.w4a16(x, codes, scales, outer * torch.nan, None).isnan().all()


def test_strided_and_misaligned_inputs(device):
    tensors, weight = packed(16, 64, device)
    flat = torch.randn(4 * 64 + 1, device=device, dtype=torch.bfloat16)
    for x in (flat[1:].view(4, 64), flat[:-1].view(64, 4).T, flat[:256].view(2, 128)[:, 64:]):
        assert_close(ops.w4a16(x, *tensors, None), x, weight)


def test_nothing_to_do(device):
    (codes, scales, outer), _ = packed(16, 64, device)
    x, bias = torch.randn(3, 64, device=device), torch.randn(16, device=device)
    assert ops.w4a16(x[:0], codes, scales, outer, bias).shape == (0, 16)
    assert ops.w4a16(x, codes[:0], scales[:0], outer, None).shape == (3, 0)
    no_columns = ops.w4a16(x[:, :0], codes[:, :0].contiguous(), scales[:, :0].contiguous(), outer, bias)
    assert no_columns.equal(bias.expand(3, 16))


def test_many_tokens_take_a_gemm_of_parts(device, monkeypatch):
    """Above LARGEST_M rows, in parts of the weight; on the CPU in place of cuBLAS a plain product."""
    tensors, weight = packed(40, 64, device)
    calls = []

    def product(a, b, scale_a, scale_b, bias, dtype):
        calls.append(len(b))
        y = a.float() @ b.float().T * (scale_a * scale_b)
        return (y if bias is None else y + bias).to(dtype)

    if device.type == "cpu":
        monkeypatch.setattr(implementation.blas, "unfit", lambda *_: None)
        monkeypatch.setattr(implementation, "scaled_matmul", product)
    monkeypatch.setattr(implementation, "LARGEST_CHUNK", 64 * 16)
    bias = torch.randn(40, device=device)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        x = torch.randn(tiling.LARGEST_M + 1, 64, device=device, dtype=dtype)
        assert_close(ops.w4a16(x, *tensors, bias.to(dtype)), x, weight, bias.to(dtype))
    assert calls == ([16, 16, 8] * 3 if device.type == "cpu" else [])


def test_other_operands_are_refused(device):
    (codes, scales, outer), _ = packed(32, 64, device)
    x = torch.randn(2, 64, device=device)
    bad = {
        r"codes must be contiguous torch.uint8 \[32, 32\]": (x, codes.float(), scales, outer, None),
        r"codes must be contiguous .* \[32, 24\]": (x[:, :48], codes, scales, outer, None),
        r"scales must be contiguous torch.uint8 \[32, 4\]": (x, codes, scales.float(), outer, None),
        "outer must be contiguous torch.float32": (x, codes, scales, outer.expand(32), None),
        r"bias must be contiguous .* \[32\]": (x, codes, scales, outer, torch.ones(3, device=device)),
        "K a multiple of 16": (x[:, :40], codes, scales, outer, None),
    }
    for match, arguments in bad.items():
        with pytest.raises(ValueError, match=match):
            ops.w4a16(*arguments)


def test_as_an_operator(device):
    (codes, scales, outer), weight = packed(16, 32, device)
    x = torch.randn(3, 32, device=device)
    arguments = x, codes, scales.view(torch.uint8), outer, torch.randn(16, device=device)
    torch.library.opcheck(torch.ops.hf_nvfp4_ops.w4a16.default, arguments)

    def run(x):
        return ops.w4a16(x, codes, scales, outer, None) * 2

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    assert_close(compiled(x) / 2, x, weight)


def test_a_captured_graph_gives_the_same(device):
    if device.type != "cuda" or cases.INTERPRETED:
        pytest.skip("needs a GPU")
    tensors, _ = packed(4096, 1024, device)
    x = torch.randn(1, 1024, device=device, dtype=torch.bfloat16)
    expected = ops.w4a16(x, *tensors, None)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = ops.w4a16(x, *tensors, None)
    y.fill_(torch.nan)
    graph.replay()
    assert y.equal(expected)


# ---------------------------------------------------------------------------- what it compiles to

# Of some variants: spilled bytes; in Triton's own code the layouts of the operands of `mma` and, within the loop,
# changes of layout, which go through shared memory; loads of 16 bytes.
LOOK = """
import json, re, sys
sys.path.insert(0, sys.argv[1])
import compile_kernels, triton
from triton.backends.compiler import GPUTarget
for name, variant in compile_kernels.find_variants("hf_nvfp4.ops", sys.argv[2:]).items():
    spilled = compile_kernels.compile_variant(variant, 90)["spilled"]
    compiled = triton.compile(compile_kernels.source_of(variant), GPUTarget("cuda", 90, 32), dict(variant.options))
    code = compiled.asm["ttgir"]
    layouts = dict(re.findall(r"^(#\\w+) = (.*)$", code, re.M))
    lines = [line for line in code.split("\\n") if "mma.sync" in line]
    operands = {found for line in lines for found in re.findall(r"tensor<\\w+, (#\\w+)>", line)}
    changes = code[code.index("scf.for"):code.index("scf.yield")].count("convert_layout")
    loads = len(re.findall(r"ld\\.global\\S*\\.v4\\.", compiled.asm["ptx"]))
    print(json.dumps({"name": name, "spilled": spilled, "layouts": [layouts[o] for o in operands],
                      "changes": changes, "loads": loads}))
"""


def test_a_thread_holds_what_its_matrix_instruction_needs(tmp_path):
    """Element i of each operand in thread i, as `_mma` counts on; nothing of the weight goes through shared memory."""
    scripts = Path(__file__).resolve().parents[1] / "scripts"
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": str(tmp_path)}
    names = ["w4a16_1_token_wide", "w4a16_ragged"]
    command = [sys.executable, "-c", LOOK, str(scripts), *names]
    run = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr
    found = {row["name"]: row for row in map(json.loads, run.stdout.splitlines())}
    assert list(found) == names
    for row in found.values():
        (layout,) = row["layouts"]
        assert "sizePerThread = [1], threadsPerWarp = [32]" in layout, row
        assert row["spilled"] == 0, row
    assert found[names[0]]["changes"] == 0 and found[names[0]]["loads"] >= 8, found[names[0]]
