"""scripts/bench.py's models on the CPU: steps of Trainer, each model gone before the next, and what a user is told."""

import math
import os
import sys
import types
import weakref

import pytest
import test_bench
import torch
from torch import nn

from hf_nvfp4 import bench_model, bench_tables, timing
from hf_nvfp4.benchmarks import Variant
from hf_nvfp4.linear import NVFP4Linear
from hf_nvfp4.sizes import TIMED

bench, run = test_bench.bench, test_bench.run  # the fixture, and what runs it
TINY = ["--model", "tiny", "--layers", "2", "--batch", "2", "--sequence_length", "32", "--steps", "2"]


@pytest.fixture
def args(bench):
    """The options of a tiny model's run."""
    args = bench.parse([*TINY, "--device", "cpu", "--backend", "bf16", "--rounds", "1"])
    args.clock = timing.HostClock()
    return args


def test_a_model_trains_and_its_layers_are_timed(bench, tmp_path, capsys):
    status, report = run(bench, tmp_path, *TINY, "--recipes", "nvfp4", "fp8_tensor@reference", "--keep_bf16_last", "1")
    out = capsys.readouterr().out
    assert status == 0, out
    model, layers = report["results"]
    rows = model["rows"]
    assert list(rows) == ["nn.Linear", "nvfp4", "fp8_tensor@reference", "nn.Linear, again"]
    assert model["model"] == "tiny" and model["layers"] == 2 and model["compile"] == "none"
    assert rows["nvfp4"]["check"].startswith("3 layer shapes") and " 7 of 15 |" in out
    assert rows["nn.Linear"]["loss"] == rows["nn.Linear, again"]["loss"]
    assert 0 < abs(rows["nvfp4"]["loss"] - rows["nn.Linear"]["loss"]) < 0.5
    assert [row["time"]["rounds"] for row in rows.values()] == [2] * 4
    for row in rows.values():
        assert row["tokens_per_second"] == pytest.approx(64 / row["time"]["median_seconds"])
    ends = [rows[name]["time"]["median_seconds"] for name in ("nn.Linear", "nn.Linear, again")]
    assert rows["nvfp4"]["speed"] == pytest.approx(sum(ends) / 2 / rows["nvfp4"]["time"]["median_seconds"])
    assert {name.split()[0] for name in layers["rows"]} == {"192x192", "192x640", "640x192"}
    assert "| gate_proj, up_proj " in out and "\nfp8_tensor@reference: BF16 is faster for " in out


def test_a_model_of_ones_own(args, tmp_path, llama_config):
    llama_config.quantization_config = {"quant_method": "another"}  # of the checkpoint that it was
    llama_config.layer_types = ["full_attention"] * 4
    llama_config.save_pretrained(tmp_path)
    for path in (tmp_path, tmp_path / "config.json"):
        args.model = str(path)
        config = bench_model.model_config(args)
        assert (config.num_hidden_layers, len(config.layer_types), config.hidden_size) == (2, 2, 64)
        assert not hasattr(config, "quantization_config")
    args.skip = ["k_proj"]
    shapes = bench_model.layer_shapes(args)
    assert shapes == {
        (64, 64): ["q_proj", "o_proj"],
        (64, 32): ["v_proj"],
        (64, 96): ["gate_proj", "up_proj"],
        (96, 64): ["down_proj"],
    }
    args.layers = 5
    with pytest.raises(ValueError, match="--layers 5: .* has 4"):
        bench_model.model_config(args)


@pytest.mark.parametrize(("name", "parameters", "width"), [("0.9b", 0.94e9, 2048), ("8b", 7.25e9, 4096)])
def test_timed_shapes(bench, name, parameters, width):
    args = bench.parse(["--model", name, "--device", "cpu"])
    assert args.what == ["model"] and (args.batch, args.sequence_length) == (TIMED[name].batch, 16384 // args.batch)
    with torch.device("meta"):
        network = bench_model.AutoModelForCausalLM.from_config(bench_model.model_config(args))
    assert sum(p.numel() for p in network.parameters()) == pytest.approx(parameters, rel=0.01)
    assert network.config.hidden_size == width


def test_each_model_is_gone_before_the_next(args):
    made = []

    def convert(network):
        made.append(weakref.ref(network))
        return {}

    bench_model.train(args, convert)
    bench_model.free(args.device)
    assert made[0]() is None


def test_trainer_compiles_as_asked_and_the_environment_stays(args, monkeypatch):
    monkeypatch.setenv("ACCELERATE_DYNAMO_USE_REGIONAL_COMPILATION", "left as it was")
    compile_, compiled = torch.compile, []

    def spy(module, **options):
        compiled.append(type(module).__name__)
        assert torch._functorch.config.activation_memory_budget == 0.7
        return compile_(module, **options | {"backend": "eager"})

    monkeypatch.setattr(torch, "compile", spy)
    before = dict(os.environ)
    args.memory_budget = 0.7
    for kind, times in (("regional", 2), ("whole", 0)):
        args.compile, compiled[:] = kind, []
        bench_model.train(args, bench_model.keep)
        assert compiled.count("LlamaDecoderLayer") == times and ("LlamaForCausalLM" in compiled) == (kind == "whole")
        assert os.environ == before and torch._functorch.config.activation_memory_budget == 1


def test_a_loss_that_is_not_a_number_is_wrong(args):
    def convert(network):
        nn.init.constant_(network.lm_head.weight, math.nan)
        return {}

    with pytest.raises(bench_model.Wrong, match="the loss is nan"):
        bench_model.train(args, convert)


def test_torchao_gets_the_same_layers(args, monkeypatch):
    class Config:
        from_recipe_name = staticmethod(lambda name: name)

    def convert_to_float8_training(module, *, module_filter_fn, config):
        seen["config"] = config
        linears = {name: m for name, m in module.named_modules() if isinstance(m, nn.Linear)}
        seen["names"] = [name for name, m in linears.items() if module_filter_fn(m, name)]
        return module

    seen, fake = {}, types.ModuleType("torchao.float8")
    fake.Float8LinearConfig, fake.convert_to_float8_training = Config, convert_to_float8_training
    monkeypatch.setitem(sys.modules, "torchao", types.ModuleType("torchao"))
    monkeypatch.setitem(sys.modules, "torchao.float8", fake)
    args.keep_bf16_last, args.skip = 0, ["v_proj"]
    networks = [bench_model.AutoModelForCausalLM.from_config(bench_model.model_config(args)) for _ in range(2)]
    row = bench_model.with_torchao(args, "rowwise")(networks[0])
    bench_model.with_recipe(args, Variant.parse("nvfp4@bf16", "auto", args.device))(networks[1])
    ours = [name for name, m in networks[1].named_modules() if isinstance(m, NVFP4Linear)]
    assert seen == {"config": "rowwise", "names": ours} and len(ours) == 12
    assert sum(d["converted"] for d in row["decisions"]) == 12


def test_random_tokens_are_the_same_and_uneven():
    first, second = (bench_model.RandomTokens(8, 512, 1000) for _ in range(2))
    assert len(first) == 8 and torch.equal(first[3]["labels"], second[3]["input_ids"])
    assert first.ids.min() == 0 and first.ids.max() == 999
    assert 0.08 < (first.ids == 0).float().mean() < 0.12  # a tenth: 1000 · u³ < 1


def test_advice():
    shapes = {(64, 64): ["q_proj", "k_proj"], (64, 96): ["up_proj"], (96, 64): ["down_proj"]}
    results = [{"nvfp4": {"speed": speed}} for speed in (0.9, 1.2, 0.99)]
    said = bench_tables.advice("nvfp4", shapes, results)
    assert said == (
        "BF16 is faster for 64 → 64, 96 → 64; skip=['q_proj', 'k_proj', 'down_proj'] keeps these layers in BF16."
    )
    results[0]["nvfp4"] = {"error": "Wrong: y"}
    results[2] = {"nvfp4": {"speed": 1.5}}
    said = bench_tables.advice("nvfp4", shapes, results)
    assert "faster for no layer" in said and "1 of 3 shapes were not timed" in said


def test_ceilings_are_of_the_products_that_a_variant_runs():
    def row(seconds, **more):
        return {"time": {"median_seconds": seconds}} | more

    rows = {"nn.Linear": row(8.0), "a": row(7.0, cast_bytes=300, products="FP8 products")}
    rows |= {"b": row(9.0, cast_bytes=100, products="nn.Linear"), "FP8 products": row(4.0), "copy": row(0.5, bytes=100)}
    bench_tables.set_ceilings(rows)
    assert rows["a"]["ceiling"] == 8 / (4 + 1.5) and rows["b"]["ceiling"] == 8 / 8.5


def test_a_wrong_model_is_a_row_and_the_exit_status(bench, tmp_path, monkeypatch):
    def broken(args, variant):
        def convert(network):
            raise RuntimeError("out of memory")

        return convert

    monkeypatch.setattr(bench_model, "with_recipe", broken)
    status, report = run(bench, tmp_path, *TINY)
    rows = report["results"][0]["rows"]
    assert (
        status == 1 and rows["nvfp4"]["error"] == "RuntimeError: out of memory" and "time" in rows["nn.Linear, again"]
    )
