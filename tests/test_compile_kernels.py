"""scripts/compile_kernels.py: native FP4 instructions without a GPU, and a report of whatever goes wrong."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

triton = pytest.importorskip("triton")
SCRIPT = Path(__file__).resolve().parents[1] / "scripts" / "compile_kernels.py"
VERSION = tuple(map(int, triton.__version__.split(".")[:2]))
# A package of kernels: in order, one that compiles, and every way not to.
PACKAGE = '''
import os
import triton
import triton.language as tl
from hf_nvfp4.ops.variants import Variant

@triton.jit
def copy(x_ptr, y_ptr, n, BLOCK: tl.constexpr, TWICE: tl.constexpr = False):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at, mask=at < n)
    tl.store(y_ptr + at, x + x if TWICE else x, mask=at < n)

@triton.jit
def wrong(x_ptr, BLOCK: tl.constexpr):
    tl.store(x_ptr + tl.arange(0, BLOCK), undefined)

class Deadly:
    @property
    def params(self):
        os.abort()

TYPES = {"x_ptr": "*bf16", "y_ptr": "*bf16", "n": "i32"}
SIZE = {"BLOCK": 128}
VARIANTS = [
    Variant("good", copy, TYPES, SIZE, divisible=("n",)),
    Variant("too_new", copy, TYPES, SIZE, min_arch=120),
    Variant("too_old", copy, TYPES, SIZE, max_arch=80),
    Variant("needs_triton", copy, TYPES, SIZE, min_triton={90: (99, 1)}),
    Variant("wrong", wrong, {"x_ptr": "*fp32"}, SIZE),
    Variant("deadly", Deadly(), {}, {}),
    Variant("forgotten", copy, {"x_ptr": "*bf16", "y_ptr": "*bf16"}, SIZE),
    Variant("misspelt", copy, {**TYPES, "m": "i32"}, SIZE),
    Variant("lacking", copy, TYPES, SIZE, expect={90: "wgmma"}),
    Variant("good_again", copy, TYPES, SIZE, options={"num_warps": 8}),
]
'''


def compile_kernels(*arguments, **environment):
    """Exit status and output of the script, TRITON_INTERPRET unset unless given."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | environment
    run = subprocess.run([sys.executable, SCRIPT, *map(str, arguments)], capture_output=True, text=True, env=env)
    assert "Traceback" not in run.stdout + run.stderr, run.stderr
    return run.returncode, run.stdout


def test_the_fp4_gemm_compiles_to_native_instructions():
    status, output = compile_kernels("--arch", 90, 100, 120, "--kernel", "fp4_matmul_dot_scaled")
    assert status == 0, output
    assert output.startswith(f"device none (compiled ahead of time), backend Triton {triton.__version__}")
    lines = {arch: line for arch, line in re.findall(r"^fp4_matmul_dot_scaled sm_(\d+): (.*)$", output, re.M)}
    assert re.search(r"tcgen05\.mma\S*kind::mxf4nvf4\.block_scale\.(block16|scale_vec::4X) ×", lines["100"])
    assert re.search(r"mma\.sync\S*kind::mxf4nvf4\.block_scale\.scale_vec::4X\S*ue4m3 ×", lines["120"])
    assert all(re.match(r"\d+ registers, 0 bytes spilled, \d+ bytes shared", lines[a]) for a in ("100", "120"))
    if VERSION >= (3, 9):
        assert "wgmma.mma_async" in lines["90"]
    else:
        assert lines["90"].startswith("skipped: needs Triton 3.9 on sm_90")


def test_it_decodes_where_there_is_no_fp4():
    status, output = compile_kernels("--arch", 80, 89, "--kernel", "fp4_matmul*")
    assert status == 0
    for arch in (80, 89):
        assert re.search(rf"^fp4_matmul_bf16 sm_{arch}: .* mma\.sync\S*bf16", output, re.M)
        assert f"fp4_matmul_dot_scaled sm_{arch}: skipped: written for sm_90 and later" in output


def test_casts_to_codes_compile_to_conversion_instructions():
    status, output = compile_kernels("--arch", 90, 100, 120, "--kernel", "cast_*_cvt_r?")
    assert status == 0, output
    for name, arch, result in re.findall(r"^(cast_\w+) sm_(\d+): (.*)$", output, re.M):
        if arch == "90" or (arch == "120" and name.endswith("rs")):
            assert result.startswith("skipped: written for sm_100")
        else:
            kind = "rn.satfinite.e2m1x2" if name.endswith("rn") else "rs.satfinite.e2m1x4"
            assert re.search(rf"cvt\.{re.escape(kind)}\.f32 ×\d+", result)
    assert len(re.findall("^cast_", output, re.M)) == 21


def test_a_crash_takes_one_kernel_and_the_rest_is_reported(tmp_path):
    (tmp_path / "some_kernels").mkdir()
    (tmp_path / "some_kernels" / "__init__.py").touch()
    (tmp_path / "some_kernels" / "many.py").write_text(PACKAGE)
    status, output = compile_kernels("--arch", 90, "--package", "some_kernels", PYTHONPATH=str(tmp_path))
    assert status == 1
    lines = dict(re.findall(r"^(\w+) sm_90: (.*)$", output, re.M))
    for good in ("good", "good_again"):
        assert re.fullmatch(r"\d+ registers, 0 bytes spilled, 0 bytes shared", lines.pop(good))
    expected = {
        "too_new": "skipped: written for sm_120 and later",
        "too_old": "skipped: written for sm_80 and earlier",
        "needs_triton": f"skipped: needs Triton 99.1 on sm_90; this is {'.'.join(map(str, VERSION))}",
        "wrong": "failed: .*undefined",
        "deadly": r"crashed: the compiler died \(signal 6\)",
        "forgotten": "failed: .*argument 'n' is in neither types nor constexprs",
        "misspelt": "failed: .*no argument 'm'; it has x_ptr, y_ptr, n",
        "lacking": "failed: .*no instruction that matches 'wgmma'",
    }
    assert lines.keys() == expected.keys()
    for name, pattern in expected.items():
        assert re.match(pattern, lines[name]), lines[name]
    bad = "wrong sm_90, deadly sm_90, forgotten sm_90, misspelt sm_90, lacking sm_90"
    assert output.endswith(f"5 did not compile: {bad}\n")


def test_bad_input():
    status, output = compile_kernels(TRITON_INTERPRET="1")
    assert status == 1 and "TRITON_INTERPRET is set: interpreted kernels cannot be compiled" in output
    status, output = compile_kernels("--kernel", "matmul")
    assert status == 1 and "is named matmul; known: " in output
    names = output.split("known: ")[1].strip().split(", ")
    assert {"fp4_matmul_bf16", "fp4_matmul_dot_scaled"} <= set(names) and len(names) == len(set(names))
