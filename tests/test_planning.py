"""What plans say, against numbers worked out by hand and peaks that were measured."""

import importlib.util
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, MixtralConfig

from hf_nvfp4 import RECIPES, Cast
from hf_nvfp4.convert import Choice
from hf_nvfp4.planning import CARRIERS, Mesh, Run, element_bytes, memory, peak, sizes_of, traffic
from hf_nvfp4.sizes import TIMED

SMALL = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
LLAMA = LlamaConfig(vocab_size=256, tie_word_embeddings=False, **SMALL)
MIXTRAL = MixtralConfig(vocab_size=256, num_local_experts=4, num_experts_per_tok=2, **SMALL)
NVFP4, BF16 = RECIPES["nvfp4"], RECIPES["bf16"]
LINEARS = 2 * (64 * (64 + 32 + 32 + 64) + 3 * 64 * 96)


def sizes(config=LLAMA, recipe=NVFP4, **choice):
    return sizes_of(config, Choice(recipe, **choice))


@pytest.mark.parametrize("config", [LLAMA, MIXTRAL, LlamaConfig(vocab_size=256, tie_word_embeddings=True, **SMALL)])
def test_all_parameters_are_counted_once(config):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert sizes(config).parameters == sum(p.numel() for p in model.parameters())


def test_parameters_by_kind():
    found = sizes()
    assert (found.converted, found.kept, found.experts, found.other) == (LINEARS, 2 * 256 * 64, 0, 5 * 64)
    assert sizes(keep_bf16_last=1).converted == LINEARS // 2
    mixture = sizes(MIXTRAL)
    assert mixture.experts == 2 * 4 * 3 * 64 * 96 and mixture.experts_per_token == 2 and mixture.converted_experts
    assert not sizes(MIXTRAL, skip=("experts",)).converted_experts


def test_bytes_of_an_element():
    assert element_bytes(Cast()) == 0.5 + 1 / 16
    assert element_bytes(Cast(square=True)) == 0.5 + 1 / 256
    assert element_bytes(BF16.fprop.a) == 2
    assert element_bytes(RECIPES["fp8"].fprop.a) == 1 + 4 / 128


def test_memory_of_one_gpu_by_hand():
    parts = memory(sizes(), Mesh(), Run(NVFP4, sequences=2, length=32))
    parameters = LINEARS + 2 * 256 * 64 + 5 * 64
    assert parts["weights"] == parts["gradients"] == 4 * parameters and parts["optimizer"] == 8 * parameters
    # A token and block: two norms' inputs, q, k, v and what attention gives, gate and up; and x four times.
    a_block = 2 * 64 * 4 + (64 + 32 + 32 + 64) * 2 + 2 * 96 * 2 + (3 * 64 + 96) * 9 / 16
    assert parts["activations"] == 2 * 32 * 2 * a_block
    assert parts["logits"] == 2 * 32 * 256 * 12 and parts["gathered"] == 0


def test_sharding_divides_what_it_shards_and_gathers_a_block():
    one, two = (memory(sizes(), Mesh(fsdp=n), Run(NVFP4)) for n in (1, 2))
    for part in ("weights", "gradients", "optimizer"):
        assert two[part] == one[part] / 2
    assert two["activations"] == one["activations"]
    assert two["gathered"] == 2 * LINEARS / 2 * 2 + LINEARS / 2 * 4
    narrow = memory(sizes(), Mesh(fsdp=2), Run(NVFP4, gather_4bit=True))
    assert narrow["gathered"] == 2 * LINEARS / 2 * 9 / 16 + LINEARS / 2 * 4
    assert memory(sizes(), Mesh(dp_replicate=2), Run(NVFP4)) == one


def test_experts_fold_over_the_gpus_of_attention():
    """Eight experts' owners among 4 · 2 GPUs: each expert whole on one of them, nothing of experts to gather."""
    run, folded = Run(NVFP4), Mesh(tp=2, fsdp=4, ep=4, etp=2)
    assert folded.gpus == 8 and folded.efsdp == 1
    moved = traffic(sizes(MIXTRAL), folded, run)
    assert moved["fsdp: experts"] == 0 and moved["ep: tokens"] > 0
    apart = Mesh(tp=2, fsdp=4)
    assert apart.efsdp == 8 and traffic(sizes(MIXTRAL), apart, run)["ep: tokens"] == 0
    assert memory(sizes(MIXTRAL), folded, run)["weights"] == memory(sizes(MIXTRAL), apart, run)["weights"]


def test_traffic_by_hand():
    run, rest = Run(NVFP4, length=32), 2 * 256 * 64 + 5 * 64
    fsdp = traffic(sizes(), Mesh(fsdp=2), run)
    assert fsdp["fsdp: weights"] == 2 * (LINEARS + rest) * 2 / 2 and fsdp["fsdp: gradients"] == (LINEARS + rest) * 4 / 2
    narrow = traffic(sizes(), Mesh(fsdp=2), replace(run, gather_4bit=True))
    assert narrow["fsdp: weights"] == 2 * (LINEARS * 9 / 16 + rest * 2) / 2
    ddp = traffic(sizes(), Mesh(dp_replicate=2), run)
    assert ddp["dp_replicate: gradients"] == (LINEARS + rest) * 4 and sum(ddp.values()) == (LINEARS + rest) * 4
    # Behind attention and MLP, forward and backward: a sum over two ranks of 32 rows in BF16.
    assert traffic(sizes(), Mesh(tp=2), run)["tp: activations"] == 2 * 4 * 32 * 64 * 2
    assert traffic(sizes(), Mesh(cp=2), run)["cp: keys and values"] == 2 * 3 * 16 * 2 * 32 * 2
    assert sum(traffic(sizes(), Mesh(), run).values()) == 0


# MiB that one GPU held at most in LOG.md's table of models: torch_compile, FP32 weights, BF16 autocast, fused AdamW.
@pytest.mark.parametrize(
    "name, layers, recipe, measured",
    [
        ("0.9b", 12, "bf16", 34_897),
        ("0.9b", 12, "nvfp4_hopper", 31_443),
        ("8b", 5, "bf16", 35_952),
        ("8b", 5, "nvfp4_hopper", 32_429),
    ],
)
def test_peaks_are_near_those_that_were_measured(name, layers, recipe, measured):
    shape = TIMED[name]
    config = replace(shape, layers=layers).config(shape.vocabulary, shape.sequence_length, {})
    run = Run(RECIPES[recipe], shape.batch, shape.sequence_length, fp8_operands=recipe == "nvfp4_hopper")
    planned = peak(memory(sizes(config, RECIPES[recipe]), Mesh(), run), run) / 2**20
    assert planned == pytest.approx(measured, rel=0.07)


def test_what_cannot_be_planned_is_refused():
    with pytest.raises(ValueError, match=r"ep · etp = 4 does not divide fsdp · cp · tp = 6"):
        Mesh(fsdp=3, tp=2, ep=4)
    with pytest.raises(ValueError, match="tp=0: sizes of a mesh are whole numbers"):
        Mesh(tp=0)
    assert sizes(GPT2Config(n_layer=1, n_embd=64, n_head=2)).layers == 1  # other names for the same


def test_the_script_prints_memory_and_traffic(capsys):
    path = Path(__file__).resolve().parents[1] / "scripts" / "plan.py"
    spec = importlib.util.spec_from_file_location("plan_script", path)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    assert script.main(["--model", "1b", "--fsdp", "2", "--tp", "2", "--recipes", "bf16", "nvfp4"]) == 0
    out = capsys.readouterr().out
    assert "4 GPUs" in out and CARRIERS["tp"] in out and CARRIERS["cp"] not in out
    assert "| **peak**" in out and "| tp: activations" in out and "| cp:" not in out
    assert script.main(["--model", "1b", "--ep", "3"]) == 1 and "does not divide" in capsys.readouterr().err
