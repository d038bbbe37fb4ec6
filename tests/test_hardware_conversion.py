"""Casts by the E2M1 conversion instructions of sm_100 and sm_120 write what they write without.

Where no GPU has them the kernels run in Triton's interpreter, and their inline PTX on a model that follows the PTX ISA
(section `cvt`), not our code.
"""

import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from fp4_stand_in import E2M1 as VALUE_OF_CODE
from fp4_stand_in import skip_unless_it_runs

from hf_nvfp4.formats import E2M1
from hf_nvfp4.rounding import encode, pack_nibbles, round_to

pytest.importorskip("triton")
SCRIPTS = Path(__file__).resolve().parents[1] / "scripts"
# Outputs of ops.cast; levels of conversion.py.
NOTHING, VALUES, CODES, CODES_SWIZZLED, CODES_ACROSS = range(5)
NONE, TO_NEAREST, STOCHASTIC = range(3)
MIDDLES = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])


# ---------------------------------------------------------------------------- a model of the instructions


def cvt_rn(v):
    """Codes of FP32 as `cvt.rn.satfinite` to E2M1 has them: nearest, ties to even, saturating, NaN +6, signs kept."""
    away = (v.double().abs().clamp(max=6)[..., None] - VALUE_OF_CODE[:8]).abs()
    nearest = away == away.amin(-1, keepdim=True)
    even = 1 - torch.arange(8) % 2
    code = (nearest * (1 + even)).argmax(-1)
    return torch.where(v.isnan(), 7, code + 8 * v.signbit())


def cvt_rs(v, byte):
    """The reference's stochastic rounding in place of the instruction's, whose choice of bits is another."""
    return encode(round_to(v, E2M1, byte.to(torch.uint8)), E2M1).long()


def execute(asm, operands):
    """What a block of inline PTX leaves in $0; operands: $1 and on, tensors."""
    registers = {f"${i}": operand for i, operand in enumerate(operands, 1)}
    for line in asm.strip("{} \n").split(";")[:-1]:
        if line.strip().startswith(".reg"):
            continue
        name, result, sources, _, bits = re.fullmatch(r"\s*(\S+) (\S+), \{?(.*?)(\}(?:, (\S+))?)?", line).groups()
        values = [registers[source] for source in sources.split(", ")]
        if name == "cvt.rn.satfinite.e2m1x2.f32":
            codes = [cvt_rn(v) for v in values]
        elif name == "cvt.rs.satfinite.e2m1x4.f32":
            codes = [cvt_rs(v, registers[bits] >> 8 * i & 0xFF) for i, v in zip((3, 1, 2, 0), values, strict=True)]
        else:
            assert name == "mov.b32", f"the model has no {name}"
            codes = values[::-1]
        # A conversion has its first source on top, a move of several registers its last.
        width = 32 // len(codes) if name == "mov.b32" else 4
        registers[result] = sum(code << width * i for i, code in enumerate(reversed(codes)))
    return registers["$0"]


def create_inline_asm(builder, asm, constraints, values, types, is_pure, pack):
    """The method that Triton's interpreter lacks."""
    assert constraints == "=r" + "".join(",f" if v.data.dtype == "float32" else ",r" for v in values) and pack == 1
    operands = [torch.from_numpy(v.data) for v in values]
    words = execute(asm, [v if v.is_floating_point() else v.long() for v in operands])
    handle = type(values[0])(words.int().numpy(), types[0].scalar)
    return SimpleNamespace(get_result=lambda index: handle)


@pytest.fixture
def ops(monkeypatch, device):
    """hf_nvfp4.ops, whose kernels can use the instructions: the GPU's, or the model's."""
    import hf_nvfp4.ops as package

    kernel = package.ops._CAST.kernel
    skip_unless_it_runs(kernel, device)
    if device.type == "cuda" and package.launch.hardware(device) == NONE:
        pytest.skip("this GPU has no instructions that convert to E2M1")
    if device.type == "cpu":
        from triton.runtime.interpreter import InterpreterBuilder

        monkeypatch.setattr(InterpreterBuilder, "create_inline_asm", create_inline_asm)
    return package


# ---------------------------------------------------------------------------- rounding


def test_the_instruction_rounds_as_the_reference_does():
    bf16 = torch.arange(-(2**15), 2**15, dtype=torch.int32).short().view(torch.bfloat16).float()
    points = torch.cat((MIDDLES, VALUE_OF_CODE[:8].float()))
    up, down = (points.nextafter(torch.tensor(end)) for end in (torch.inf, -torch.inf))
    v = torch.cat((bf16, points, up, down, -points, -up, -down, torch.randn(10000)))
    assert cvt_rn(v + 0.0).equal(encode(round_to(v, E2M1), E2M1).long())
    assert cvt_rn(torch.tensor(-0.0)) == 8 != cvt_rn(torch.tensor(-0.0) + 0.0) == 0


def test_words_of_the_inline_code():
    from hf_nvfp4.ops.conversion import CVT_RN, CVT_RS

    v, bits = torch.randn(50, 8) * 3, torch.randint(2**32, (2, 50))
    expected = pack_nibbles(encode(round_to(v, E2M1), E2M1)).view(torch.int32)[:, 0]
    assert execute(CVT_RN.value, v.unbind(1)).int().equal(expected)
    random = torch.stack((bits, bits >> 16, bits >> 8, bits >> 24), 2).to(torch.uint8)
    expected = encode(round_to(v, E2M1, random.transpose(0, 1).flatten(1)), E2M1)
    assert execute(CVT_RS.value, [*v.unbind(1), *bits]).int().equal(pack_nibbles(expected).view(torch.int32)[:, 0])


# ---------------------------------------------------------------------------- casts


def tie_table():
    """[32, 64] with scale 1 in every block, so that these very values are rounded: ties, their neighbours, zeros."""
    points = torch.cat((MIDDLES, VALUE_OF_CODE[:8].float(), torch.tensor([1e-30, 1e-45])))
    up, down = (points.nextafter(torch.tensor(end)) for end in (torch.inf, -torch.inf))
    v = torch.cat((points, up.clamp(max=6), down))
    x = torch.cat((v, -v))[torch.randperm(2 * len(v)).repeat(40)[:2048]].view(32, 64)
    x[:, ::16] = 6.0
    x[0, 0] = 6 * 448.0
    return x


def everything():
    """[70, 96] of many magnitudes, with zeros of both signs, NaN and inf."""
    x = torch.randn(70, 96) * 10 ** (4 * torch.randn(70, 1))
    x[::3] = torch.randint(-24, 25, x[::3].shape) / 4
    x[torch.rand(70, 96) < 0.1] = -0.0
    x[5, 7], x[20, 50] = float("nan"), float("-inf")
    return x


def outputs(ops, monkeypatch, level, x, row, col):
    """What a cast writes with the instructions of a level. row, col: a Spec and an output."""
    monkeypatch.setattr(ops.ops, "hardware", lambda device: level)
    seeds = [torch.tensor(seed, dtype=torch.int32, device=x.device) for seed in ((1, -2), (3, 4))]
    specs = [None if spec is None else str(spec) for spec, _ in (row, col)]
    hadamard = -1 if col[0] is None else col[0].hadamard
    return ops.cast(x, ops.amax(x, True, hadamard), *seeds, specs[0], row[1], specs[1], col[1])


def casts(ops, **settings):
    """Row and column, each a Spec and an output, of every layout, scale rule and format that has E2M1 elements."""
    nvfp4, nothing = ops.Spec(**settings), (None, NOTHING)
    mxfp4 = nvfp4._replace(block=32, scale="e8m0")
    yield (nvfp4, CODES), (nvfp4._replace(hadamard=16), CODES_ACROSS)
    yield (nvfp4._replace(square=True), CODES_SWIZZLED), (nvfp4._replace(hadamard=16), CODES_SWIZZLED)
    yield (mxfp4, CODES), (mxfp4._replace(headroom=4 / 3), CODES_ACROSS)
    yield (nvfp4._replace(headroom=17 / 16), CODES_ACROSS), nothing
    yield nothing, (nvfp4, CODES)
    if nvfp4.rounding == "nearest":
        eden = nvfp4._replace(rounding="eden")
        yield (eden, CODES_SWIZZLED), (eden._replace(scale_rule="fp8_exact"), CODES_ACROSS)
        yield (nvfp4._replace(scale_rule="4over6"), CODES), (nvfp4._replace(scale_rule="best"), CODES)


@pytest.mark.parametrize("make", [tie_table, everything])
def test_codes_are_the_same_rounded_to_nearest(ops, monkeypatch, device, make):
    x = make().to(device)
    for row, col in casts(ops):
        want, got = (outputs(ops, monkeypatch, level, x, row, col) for level in (NONE, TO_NEAREST))
        for a, b in zip(got, want, strict=True):
            assert a.equal(b) or (a.isnan() & b.isnan()).all(), (row, col)


def test_each_value_has_its_own_random_bits(ops, monkeypatch, device):
    if device.type == "cuda":
        pytest.skip("the instruction uses the bits in another way than the reference")
    for x in (tie_table(), everything()):
        for row, col in casts(ops, rounding="stochastic"):
            want, got = (outputs(ops, monkeypatch, level, x, row, col) for level in (NONE, STOCHASTIC))
            for a, b in zip(got, want, strict=True):
                assert a.equal(b) or (a.isnan() & b.isnan()).all(), (row, col)


def test_what_is_no_code_and_what_is_not_opted_in_stays(ops, monkeypatch, device):
    def refuse(*arguments):
        raise AssertionError("a conversion instruction was used")

    if device.type == "cpu":
        from triton.runtime.interpreter import InterpreterBuilder

        monkeypatch.setattr(InterpreterBuilder, "create_inline_asm", refuse)
    x, nvfp4, fp8 = everything().to(device), ops.Spec(), ops.Spec("e4m3", 128, "float32")
    sr = nvfp4._replace(rounding="stochastic")
    for level, row, col in (
        (STOCHASTIC, (nvfp4, VALUES), (sr, VALUES)),
        (STOCHASTIC, (fp8, CODES), (fp8, CODES_ACROSS)),
        (TO_NEAREST, (sr, CODES_SWIZZLED), (sr, CODES)),
    ):
        want, got = (outputs(ops, monkeypatch, n, x, row, col) for n in (NONE, level))
        for a, b in zip(got, want, strict=True):
            assert ((a == b) | (a.isnan() & b.isnan())).all(), (row, col)


# ---------------------------------------------------------------------------- which GPUs, and what is compiled


def test_which_devices(monkeypatch):
    from hf_nvfp4.ops import launch

    gpu, ask = torch.device("cuda", 0), launch.hardware.__wrapped__
    monkeypatch.setattr(launch, "INTERPRETED", False)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.delenv("HF_NVFP4_CVT_RS", raising=False)
    levels = {8.0: 0, 8.9: 0, 9.0: 0, 10.0: 1, 10.1: 1, 10.3: 1, 11.0: 0, 12.0: 1, 12.1: 1}
    for number, level in levels.items():
        capability = tuple(map(int, str(number).split(".")))
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, c=capability: c)
        assert ask(gpu) == level
        assert ask(torch.device("cpu")) == NONE
        monkeypatch.setenv("HF_NVFP4_CVT_RS", "1")
        assert ask(gpu) == (STOCHASTIC if number in (10.0, 10.3) else level)
        monkeypatch.delenv("HF_NVFP4_CVT_RS")
    monkeypatch.setattr(torch.version, "cuda", None)  # AMD's numbers mean other things
    assert ask(gpu) == NONE
    monkeypatch.undo()
    monkeypatch.setattr(launch, "INTERPRETED", True)
    assert ask(gpu) == NONE


PTX = """
import sys, triton
from triton.backends.compiler import GPUTarget
from compile_kernels import find_variants, source_of
for name, variant in find_variants("hf_nvfp4.ops", [sys.argv[1]]).items():
    print(triton.compile(source_of(variant), GPUTarget("cuda", int(sys.argv[2]), 32), dict(variant.options)).asm["ptx"])
"""


@pytest.mark.parametrize(
    "variant, arch, conversions",
    [("nvfp4_x_cvt_rn", 100, 16), ("nvfp4_native_w_cvt_rn", 120, 32), ("nvfp4_native_dy_cvt_rs", 100, 16)],
)
def test_compiled_code_adds_zero_before_it_converts(variant, arch, conversions):
    """-0.0 + 0.0 is 0.0: a compiler that left the sum out would change codes."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"PYTHONPATH": str(SCRIPTS)}
    run = subprocess.run(
        [sys.executable, "-c", PTX, f"cast_{variant}", str(arch)], capture_output=True, text=True, env=env
    )
    assert run.returncode == 0, run.stderr
    sums = set(re.findall(r"add(?:\.rn)?\.f32\s+(%\w+), %\w+, 0f00000000;", run.stdout))
    found = re.findall(r"cvt\.r[ns]\.satfinite\.e2m1x[24]\.f32 \w+, (.*);", run.stdout)
    assert len(found) == conversions
    for sources in found:
        values = re.sub(r"\}, .*", "", sources).strip("{").split(", ")
        assert len(values) in (2, 4) and sums.issuperset(values)
