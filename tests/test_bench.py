"""scripts/bench.py on the CPU: what it refuses to time, what it counts, and that its numbers are consistent."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from hf_nvfp4 import Cast, NVFP4Linear, bench_inference, bench_rows, benchmarks, timing, yardstick
from hf_nvfp4.backends import BACKENDS, bf16, reference
from hf_nvfp4.packed import PackedLinear
from hf_nvfp4.recipes import get_recipe

SMALL = ["--device", "cpu", "--backend", "bf16", "--rounds", "2"]


@pytest.fixture(scope="module")
def bench():
    """scripts/bench.py as a module."""
    path = Path(__file__).resolve().parents[1] / "scripts" / "bench.py"
    spec = importlib.util.spec_from_file_location("script_bench", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def traced(monkeypatch):
    """The yardstick registered, its graphs traced whole but not handed to inductor, which would take a minute."""
    compile_ = torch.compile
    monkeypatch.setitem(BACKENDS, "inductor", yardstick)
    monkeypatch.setattr(yardstick, "APART", set())
    monkeypatch.setattr(torch, "compile", lambda function, **options: compile_(function, backend="eager", **options))
    yardstick._compiled.cache_clear()
    with torch._dynamo.config.patch(recompile_limit=1000):
        yield
    yardstick._compiled.cache_clear()


def run(bench, tmp_path, *argv):
    """Exit status and results of a run."""
    status = bench.main([*argv, *SMALL, "--json", str(tmp_path / "bench.json")])
    return status, json.loads((tmp_path / "bench.json").read_text())


# ---- From end to end -----------------------------------------------------------------------------------


def test_casts_and_a_linear_layer(bench, tmp_path, capsys, traced):
    shapes = ["--cast_shapes", "64x128", "--linear_shapes", "48x64x128", "--recipes", "nvfp4", "fp8"]
    status, report = run(bench, tmp_path, "casts", "linear", *shapes, "--casts", "all")
    out = capsys.readouterr().out
    assert status == 0, out
    first = out.splitlines()[0]
    assert first.startswith("device cpu (") and "backend bf16, recipe nvfp4, fp8" in first and "triton" in first
    casts, linear = (result["rows"] for result in report["results"])
    assert set(benchmarks.CASTS) < set(casts)
    assert casts["sr"]["check"] == casts["nvfp4 dy"]["check"] == "bit-exact"
    assert casts["sr"]["bytes_read"] == 2 * 2 * 64 * 128 and casts["sr"]["bytes_written"] == 2 * 64 * 128 + 4
    assert casts["rht_kept"]["bytes_written"] == 64 * 128 * 9 // 16 + 4
    assert casts["fp8"]["bytes_read"] == 2 * 64 * 128
    assert casts["copy"]["ratio"] == casts["copy"]["share_of_copy"] == 1
    assert list(linear) == ["nn.Linear", "nvfp4", "nvfp4, inductor", "fp8", "fp8, inductor", "copy"]
    assert linear["nn.Linear"]["saved_bytes"] == 2 * 48 * 64 and linear["nn.Linear"]["ratio"] == 1
    assert linear["nvfp4"]["saved_bytes"] == 48 * 64 * 9 // 16 + 4
    assert "casts bit-exact" in linear["nvfp4"]["check"] and 0 < linear["nvfp4"]["ceiling"] < 1
    assert linear["nvfp4"]["speed"] == pytest.approx(1 / linear["nvfp4"]["ratio"])
    assert "as launched by the host" in out and report["graphs"] is False
    assert "| nvfp4, inductor |" in out and "GB/s" in out


def test_a_packed_weight(bench, tmp_path, capsys, monkeypatch):
    """Interpreted; where no kernel runs, or it computes something else, that is its row's error."""
    cases = pytest.importorskip("kernel_cases", reason="the kernels need Triton")
    if not cases.INTERPRETED or any(mark.name == "skipif" and mark.args[0] for mark in cases.MARKS):
        pytest.skip("needs Triton's interpreter: TRITON_INTERPRET=1 and Triton 3.9")
    few = ["inference", "--device", "cpu", "--inference_shapes", "64x16", "--batches", "2", "--layers_in_a_row", "1"]
    path = tmp_path / "bench.json"
    status = bench.main([*few, "--rounds", "1", "--tiles", "2x1x1x1x1x4", "--json", str(path)])
    rows, out = json.loads(path.read_text())["results"][0]["rows"], capsys.readouterr().out
    assert status == 0, out
    assert list(rows) == [f"{name}, batch 2" for name in ("nn.Linear", "w4a16", "w4a16 2x1x1x1x1x4", "copy")]
    assert rows["nn.Linear, batch 2"]["bytes"] == 2 * (16 * 64 + 2 * 64 + 2 * 16)
    assert rows["w4a16, batch 2"]["bytes"] == 16 * 64 * 9 // 16 + 4 + 2 * (2 * 64 + 2 * 16)
    assert all(row["time"]["median_seconds"] > 0 for row in rows.values()) and "| w4a16 2x1x1x1x1x4, batch 2 |" in out

    honest = bench_inference._by_kernel
    monkeypatch.setattr(bench_inference, "_by_kernel", lambda x, tiles, q: honest(x, tiles, q) * 2)
    assert bench.main([*few, "--rounds", "1"]) == 1
    assert "ERROR Wrong: y is 1.0e+00 from" in capsys.readouterr().out


def test_decoding_with_a_packed_model(bench, tmp_path, capsys, monkeypatch):
    """A tiny model in plain PyTorch: BF16 and packed, the same embeddings; what computes something else is an error."""
    monkeypatch.setattr(bf16, "KERNEL_DEVICES", set())
    few = ["decode", "--device", "cpu", "--model", "tiny", "--layers", "1", "--rounds", "2", "--batches", "1", "3"]
    few += ["--keep_bf16_last", "0"]
    path = tmp_path / "bench.json"
    status = bench.main([*few, "--compile", "none", "--json", str(path)])
    rows, out = json.loads(path.read_text())["results"][0]["rows"], capsys.readouterr().out
    assert status == 0, out
    assert list(rows) == [f"{name}, batch {m}" for m in (1, 3) for name in ("nn.Linear", "w4a16 nvfp4")]
    plain, packed = rows["nn.Linear, batch 3"], rows["w4a16 nvfp4, batch 3"]
    linears = 4 * 192 * 192 + 3 * 192 * 640  # weights of a block
    assert plain["weight_bytes"] - packed["weight_bytes"] == linears * 2 - (linears * 9 // 16 + 7 * 4)
    assert packed["tokens_per_second"] == pytest.approx(3 / packed["time"]["median_seconds"])
    assert "3 shapes within" in packed["check"] and "as launched by the host, not compiled" in out

    honest = PackedLinear._by_torch
    monkeypatch.setattr(PackedLinear, "_by_torch", lambda self, x: honest(self, x) * 2)
    assert bench.main(few) == 1
    assert "ERROR Wrong: y is 1.0e+00 from" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        bench.main([*few, "--sequence_length", "128"])
    assert "decode needs at least 256" in capsys.readouterr().err


def test_recipes_on_backends_of_their_own(bench, tmp_path):
    argv = ["casts", "linear", "--cast_shapes", "32x64", "--linear_shapes", "32x64x64", "--inductor", "none"]
    status, report = run(bench, tmp_path, *argv, "--casts", "rne", "--recipes", "nvfp4@reference", "nvfp4", "bf16@bf16")
    casts, linear = (result["rows"] for result in report["results"])
    assert status == 0
    assert list(linear) == ["nn.Linear", "nvfp4@reference", "nvfp4", "bf16@bf16", "copy"]
    assert [linear[name]["backend"] for name in list(linear)[1:4]] == ["reference", "bf16", "bf16"]
    assert casts["nvfp4@reference dy"]["backend"] == "reference" and casts["nvfp4 dy"]["backend"] == "bf16"


def test_fp32_weights_run_under_autocast(bench, tmp_path, traced):
    argv = ["linear", "--linear_shapes", "32x64x64", "--weights", "float32"]
    status, report = run(bench, tmp_path, *argv)
    rows = report["results"][0]["rows"]
    assert status == 0
    assert rows["nn.Linear"]["saved_bytes"] == 2 * 32 * 64 + 2 * 64 * 64  # the weight's BF16 copy too


# ---- What fails ----------------------------------------------------------------------------------------


def test_a_variant_that_fails_is_a_row_and_the_others_go_on(bench, tmp_path, capsys, monkeypatch):
    honest = bf16.cast

    def broken(x, row, *others):
        if row == Cast(rounding="stochastic"):
            raise RuntimeError("no such | instruction\nsecond line")
        return honest(x, row, *others)

    monkeypatch.setattr(bf16, "cast", broken)
    status, report = run(bench, tmp_path, "casts", "--cast_shapes", "32x64", "--casts", "sr", "rne")
    rows, out = report["results"][0]["rows"], capsys.readouterr().out
    assert status == 1
    assert rows["sr"]["error"] == "RuntimeError: no such | instruction" and "broken" in rows["sr"]["traceback"]
    assert "time" in rows["rne"] and "time" not in rows["sr"] and rows["nvfp4 dy"]["error"]
    assert "ERROR RuntimeError: no such / instruction" in out and "2 failed" in out


def test_a_wrong_cast_is_not_timed(bench, tmp_path, monkeypatch):
    monkeypatch.setattr(bf16, "cast", _one_code_off(bf16.cast))
    argv = ["--cast_shapes", "32x64", "--linear_shapes", "32x64x64", "--casts", "rne", "--inductor", "none"]
    status, report = run(bench, tmp_path, "casts", "linear", *argv)
    casts, linear = (result["rows"] for result in report["results"])
    assert status == 1
    assert casts["rne"]["error"] == "Wrong: row operand: 1 of 2,048 values differ from backend reference"
    assert "time" not in casts["rne"] and "time" not in linear["nvfp4"] and "time" in linear["nn.Linear"]


def _one_code_off(cast):
    def off(*arguments):
        operands = cast(*arguments)
        if operands[0] is not None:
            operands[0].values[0, 0] = 2 * operands[0].values[0, 0] + 1
        return operands

    return off


def test_experts(bench, tmp_path, monkeypatch, device):
    if device.type == "cpu" and not pytest.importorskip("hf_nvfp4.ops.launch").INTERPRETED:
        pytest.skip("experts at once need a GPU, or TRITON_INTERPRET=1")
    monkeypatch.setattr(bf16, "KERNEL_DEVICES", {device.type})
    argv = ["--experts_shapes", "9x32x48x3x2", "--recipes", "bf16", "nvfp4@reference"]
    status, report = run(bench, tmp_path, "experts", *argv)
    (rows,) = (result["rows"] for result in report["results"])
    assert status == 1 and list(rows)[:3] == ["grouped_mm", "bf16", "bf16, one by one"]
    assert rows["bf16"]["check"].startswith("to nearest, from backend reference: ") and rows["bf16"]["speed"] > 0
    assert rows["bf16, one by one"]["saved_bytes"] < rows["bf16"]["saved_bytes"]  # which pads the tokens
    assert "backend 'reference' has no grouped GEMMs" in rows["nvfp4@reference"]["error"]


def linear_rows(bench, *argv):
    """Rows of a layer of 32 tokens, 64 → 64, timed as if there were CUDA graphs."""
    args = bench.parse(["linear", "--inductor", "none", *argv, *SMALL])
    bench.announce(args)
    args.eager = False
    return bench_rows.linear_rows(args, (32, 64, 64), torch.bfloat16)


def replay_of(step):
    """A stand-in for a CUDA graph of a step: the same gradients' memory, written anew by each replay."""
    step()
    kept = step.gradients

    def replay():
        step()
        for name, gradient in step.gradients.items():
            kept[name].copy_(gradient)

    return replay


def test_a_replay_is_checked_before_it_is_timed(bench, monkeypatch):
    def captured(step, device):
        replay = replay_of(step)
        if isinstance(step.layer, NVFP4Linear):
            return lambda: (replay(), torch.manual_seed(99), replay())  # other draws than the step's
        return replay

    monkeypatch.setattr(timing, "captured", captured)
    rows = linear_rows(bench, "--recipes", "nvfp4", "bf16")
    assert rows["nvfp4"]["error"].startswith("Wrong: dx is") and "time" not in rows["nvfp4"]
    assert "time" in rows["nn.Linear"] and "time" in rows["bf16"]  # which draw nothing


def test_what_cannot_be_captured_is_not_timed_otherwise(bench, monkeypatch):
    def captured(step, device):
        if isinstance(step.layer, NVFP4Linear):
            raise RuntimeError("operation not permitted when stream is capturing")
        return replay_of(step)

    monkeypatch.setattr(timing, "captured", captured)
    rows = linear_rows(bench)
    assert "not permitted" in rows["nvfp4"]["error"] and "time" not in rows["nvfp4"] and "time" in rows["nn.Linear"]


def test_no_amax_to_give_is_an_error(bench, tmp_path):
    argv = ["linear", "--linear_shapes", "32x64x64", "--inductor", "none", "--amax", "given"]
    status, report = run(bench, tmp_path, *argv, "--recipes", "nvfp4@reference", "fp8")
    rows = report["results"][0]["rows"]
    assert "fp8, amax given" not in rows  # its blocks have no scale above them
    assert status == 1 and "time" in rows["nvfp4@reference"]
    assert "asks the kernels for no amax" in rows["nvfp4@reference, amax given"]["error"]


def test_another_seed_and_nan_are_wrong(device):
    base = benchmarks.Step.of_linear((64, 64, 64), device, torch.bfloat16)
    step = base.with_recipe(get_recipe("nvfp4"), "reference")
    expected = step.results()
    assert "casts bit-exact" in benchmarks.check_step(step, expected)["check"]
    torch.manual_seed(99)
    step()
    with pytest.raises(benchmarks.Wrong, match="dw is .* more than"):
        benchmarks.check_close("dw", step.layer.weight.grad, expected["dw"], 2e-2)
    with pytest.raises(benchmarks.Wrong, match="nan"):
        benchmarks.check_close("y", expected["y"] * float("nan"), expected["y"], 2e-2)


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["sing"], "unknown benchmark 'sing'; known: casts, linear, experts, inference, decode, model"),
        (["--recipes", "nvfp4@bf61"], "Did you mean 'bf16'?"),
        (["--recipes", "nvfp4@fp8"], "backend 'fp8'"),
        (["--torchao", "rowwise"], "pip install torchao"),
        (["--steps", "0"], "at least 1"),
        (["--casts", "rnd"], "unknown cast 'rnd'"),
        (["--recipes", "nvfp5"], "Did you mean 'nvfp4'?"),
        (["--backend", "bf61"], "Did you mean 'bf16'?"),
        (["--cast_shapes", "64"], "'64' is not 2 sizes, as 4096x4096"),
        (["--linear_shapes", "64x0x64"], "'64x0x64' is not 3 sizes"),
        (["--rounds", "0"], "at least 1"),
        (["inference", "--batches", "0"], "at least 1"),
        (["inference", "--tiles", "3x1x1x1x1x1"], "a power of two"),
        (["inference", "--tiles", "4x1x1x1x1x8"], "1, 2 or 4"),
        (["inference", "--tiles", "4x1"], "'4x1' is not 6 sizes"),
        (["inference", "--inference_shapes", "40x16"], "a multiple of 16"),
        (["--model", "tiny", "--compile", "--memory_budget", "2"], "a fraction"),
        (["--model", "tiny", "--memory_budget", "0.9"], "add --compile"),
    ],
)
def test_bad_options_are_a_sentence(bench, capsys, monkeypatch, argv, sentence):
    monkeypatch.setitem(sys.modules, "torchao", None)  # as if it were not installed
    with pytest.raises(SystemExit) as stop:
        bench.main([*argv, "--device", "cpu"])
    assert stop.value.code == 2 and sentence in capsys.readouterr().err


# ---- The yardstick -------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", ["nvfp4", "nvfp4_unbiased", "fp8", "fp8_tensor", "bf16"])
def test_the_yardstick_computes_what_the_recipe_says(device, traced, recipe):
    base = benchmarks.Step.of_linear((33, 64, 128), device, torch.bfloat16)  # tokens are padded
    recipe = get_recipe(recipe)
    expected = base.with_recipe(recipe, "reference").results()
    row = benchmarks.check_step(base.with_recipe(recipe, "inductor"), expected)
    assert row["backend"] == "inductor" and row["error_norm"] < 1e-2
    for call in benchmarks.layer_calls(recipe).values():
        assert "exact" in benchmarks.check_cast(yardstick, call, base.x.detach()) or recipe.name == "fp8"


def test_the_yardstick_adds_a_bias(device, traced):
    layer = NVFP4Linear(32, 48, recipe="nvfp4", backend="inductor", device=device)
    x = torch.randn(16, 32, device=device)
    y = layer(x)
    layer.backend = "reference"
    assert torch.allclose(y, layer(x), atol=1e-5)


# ---- What is known beforehand --------------------------------------------------------------------------


def test_a_given_amax_saves_the_kernel_and_changes_nothing(device, monkeypatch):
    cases = pytest.importorskip("kernel_cases", reason="the kernels need Triton")
    if device.type != "cuda" and not cases.INTERPRETED:
        pytest.skip("needs a GPU, or TRITON_INTERPRET=1 as make test sets it")
    monkeypatch.setattr(bf16, "KERNEL_DEVICES", {device.type})
    base = benchmarks.Step.of_linear((32, 64, 64), device, torch.bfloat16)
    step = base.with_recipe(get_recipe("nvfp4"), "bf16")
    given, expected = step.with_amax_given(), step.results()
    launched = []
    honest = cases.ops.ops._AMAX
    monkeypatch.setattr(cases.ops.ops, "_AMAX", lambda *args: launched.append(1) or honest(*args))
    found = given.results()
    assert launched == [] and len(given.around.found) == 4  # of x, w, dy, and w again
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    step()
    assert len(launched) == 4
    call = benchmarks.layer_calls(get_recipe("nvfp4"))["dy"]
    x = base.x.detach()
    assert call.traffic(x, ()) == (2 * x.nbytes, 0) and call.traffic(x, (), amax_given=True) == (x.nbytes, 0)


# ---- Clocks and counts ---------------------------------------------------------------------------------


def test_variants_take_turns_and_one_that_raises_leaves():
    calls = []

    def variant(name, fails_at=None):
        def run():
            calls.append(name)
            if calls.count(name) == fails_at:
                raise ValueError(name)

        return run

    variants = {"a": variant("a"), "b": variant("b", fails_at=4), "c": variant("c")}
    results = timing.interleave(variants, timing.HostClock(), rounds=3, warmup=1)
    assert "".join(calls) == "abc" + "abc" + "bca" + "cab"  # each round begins with another one
    assert list(results) == ["a", "b", "c"] and isinstance(results["b"], ValueError)
    assert len(results["a"].seconds) == 3 and results["a"].launch is None


def test_launches_can_be_another_calls():
    class Clock(timing.HostClock):
        def launch_seconds(self, run):
            return run()

    variants = {"a": lambda: 1.0, "b": lambda: 2.0}
    results = timing.interleave(variants, Clock(), rounds=1, launches={"a": lambda: 3.0})
    assert (results["a"].launch, results["b"].launch) == (3.0, 2.0)


def test_ratios_are_taken_round_by_round():
    base, other = timing.Timing((1.0, 2.0, 4.0)), timing.Timing((2.0, 4.0, 4.0))
    assert base.median == 2 and other.ratio(base) == 2
    assert other.to_dict() == {
        "median_seconds": 4.0,
        "min_seconds": 2.0,
        "max_seconds": 4.0,
        "rounds": 3,
        "launch_seconds": None,
    }


def test_saved_bytes_count_each_storage_once_and_no_parameters(device):
    layer = nn.Linear(32, 32, bias=False, device=device)
    x = torch.randn(16, 32, device=device, requires_grad=True)
    assert timing.saved_bytes(lambda: layer(x), [layer.weight]) == x.nbytes
    assert timing.saved_bytes(lambda: layer(x)) == x.nbytes + layer.weight.nbytes
    assert timing.saved_bytes(lambda: x[:8] * x[8:]) == x.nbytes  # views of one storage
    assert layer(x).sum().backward() is None and layer.weight.grad is not None


def test_layer_calls_are_those_of_the_layer(device, monkeypatch):
    recipe, seen = get_recipe("nvfp4"), []
    honest = reference.cast

    def spy(x, row, col, keep_col, *signs):
        seen.append((tuple(x.shape), benchmarks.Call(row, col, keep_col)))
        return honest(x, row, col, keep_col, *signs)

    monkeypatch.setattr(reference, "cast", spy)
    benchmarks.Step.of_linear((16, 32, 48), device, torch.bfloat16).with_recipe(recipe, "reference")()
    shapes = {"x": (16, 32), "w": (48, 32), "dy": (16, 48), "w in backward": (48, 32)}
    expected = [(shapes[tensor], call) for tensor, call in benchmarks.layer_calls(recipe).items()]
    assert sorted(seen, key=str) == sorted(expected, key=str)
    assert benchmarks.layer_calls(get_recipe("bf16")) == {}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="measures GPU time and memory")
def test_gpu_clock_memory_and_kernels():
    device = torch.device("cuda")
    clock, x = timing.clock_for(device), torch.randn(4096, 4096, device=device)
    timings = timing.interleave({"one": x.clone, "two": lambda: (x.clone(), x.clone())}, clock, rounds=5)
    assert 1.2 < timings["two"].ratio(timings["one"]) < 3 and timings["one"].launch > 0
    assert timing.peak_bytes(x.clone, device) == x.nbytes
    assert sum(timing.kernel_seconds(x.clone, device).values()) < timings["one"].median * 1.5


@pytest.mark.skipif(not torch.cuda.is_available(), reason="captures CUDA graphs")
@pytest.mark.parametrize("recipe", ["nvfp4", "bf16"])
def test_a_graph_of_a_step_draws_what_the_step_draws(recipe):
    base = benchmarks.Step.of_linear((64, 128, 256), torch.device("cuda"), torch.bfloat16)
    step = base.with_recipe(get_recipe(recipe), "bf16")
    replay = timing.captured(step, base.x.device)
    gradient = step.x.grad
    benchmarks.check_replay(step, replay)
    draws = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        replay()
        draws.append(gradient.clone())
    assert torch.equal(*draws) == (recipe == "bf16")
