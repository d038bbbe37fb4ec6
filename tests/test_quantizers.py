"""The quantizer study: published errors, verdicts about biases, tensors and gradients of a model, files, bad input."""

import importlib.util
import json
import re
from pathlib import Path

import pytest
import torch

pytest.importorskip("matplotlib", reason="scripts/quantizers.py needs Matplotlib: pip install 'hf_nvfp4[scripts]'")

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from hf_nvfp4 import RECIPES, Cast, NVFP4TrainingConfig, Recipe, model_study, quantize, quantize_model, quantizer_tables
from hf_nvfp4.captured import OPERANDS
from hf_nvfp4.linear import quantized_linears
from hf_nvfp4.quantizer_study import (
    CASTS,
    NORMAL,
    YARDSTICKS,
    Curve,
    Settings,
    draw_counts,
    made_tensors,
    measure,
    named_casts,
    obstacle,
    quantized,
    rotated_back,
    study,
    unbiasedness,
    users,
)
from hf_nvfp4.rounding import rotate

ROOT = Path(__file__).resolve().parents[1]
CPU = torch.device("cpu")


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


# ---------------------------------------------------------------------------- published numbers


@pytest.fixture(scope="module")
def normal():
    return torch.randn(2048, 2048, generator=seeded())


@pytest.mark.parametrize("name", YARDSTICKS)
def test_published_errors_are_ours_within_one_percent(normal, name):
    yardstick, found = YARDSTICKS[name], measure(normal, CASTS[name], seeded())
    for value in filter(None, (yardstick.published, yardstick.recomputed)):
        assert found.error == pytest.approx(value, rel=0.01)


# ---------------------------------------------------------------------------- one draw


def test_what_is_measured_is_its_definition():
    x = torch.randn(32, 256)
    found, y = measure(x, Cast(), seeded()), quantize(x, Cast()).dequantize()
    assert found.error == pytest.approx(((y - x).square().sum() / x.square().sum()).item(), rel=1e-5)
    assert found.cosine == pytest.approx(torch.cosine_similarity(x.flatten(), y.flatten(), dim=0).item(), rel=1e-6)
    assert found.bias == pytest.approx(((x * y).sum() / (x * x).sum() - 1).item(), abs=1e-6)
    # Square blocks lose more along x than 1×16 ones; stochastic rounding with headroom loses nothing.
    biases = {name: measure(x.repeat(32, 1), CASTS[name], seeded()).bias for name in CASTS}
    assert biases["RNE 16×16"] < biases["RNE 1×16"] < -1e-3 and abs(biases["SR with headroom"]) < 1e-3


@pytest.mark.parametrize("size", [16, 128])
def test_rotated_back_is_where_it_came_from(size):
    x = torch.randn(8, 256, dtype=torch.float64)
    assert torch.allclose(rotated_back(rotate(x.float(), size).double(), size, None), x, atol=0.02)
    redrawn = Cast("fp8_e4m3", hadamard=size, signs="random")
    (before, after, signs), (_, other, _) = (quantized(x.float(), redrawn, seeded(seed)) for seed in (1, 2))
    assert not torch.equal(after, other) and before.dtype == torch.bfloat16
    assert torch.allclose(rotated_back(after, size, signs), x, atol=0.3)
    assert not torch.allclose(rotated_back(after, size, None), x, atol=0.3)


def test_heavy_tails_are_heavy():
    made = made_tensors(128, 1024, seeded())
    assert made[NORMAL].shape == (128, 128) and made["Student t, 3"].shape == (1024, 1024)
    student = torch.distributions.StudentT(3.0).sample((1024, 1024)).abs()
    for q in (0.5, 0.9, 0.999):
        expected = student[:512].quantile(q)
        assert made["Student t, 3"][:512].abs().quantile(q) == pytest.approx(expected.item(), rel=0.04)
    share = (made["0.1% × 30"].abs() > 6).float().mean()  # 30 · |N(0, 1)| is above 6 in 84.1%
    assert share == pytest.approx(0.841e-3, rel=0.1)


# ---------------------------------------------------------------------------- many draws


@pytest.mark.parametrize(
    ("name", "floor"),
    [("RNE 1×16", 9.03e-3), ("SR", 1.03e-4), ("SR with headroom", 0), ("MS-EDEN", 0), ("MXFP4 SR, 3/4", 0)],
)
def test_verdicts(name, floor):
    curve = unbiasedness(torch.randn(64, 1024), CASTS[name], 64, seeded())
    assert curve.counts == (1, 4, 16, 64) and curve.biased == (floor > 0)
    assert curve.verdict == ("biased" if floor else "unbiased")
    assert curve.floor == pytest.approx(floor, rel=0.12, abs=4 * curve.floor_error)
    for n, error in zip(curve.counts, curve.errors, strict=True):
        spread = 0 if name.startswith("RNE") else (curve.errors[0] - floor) / n
        assert error == pytest.approx(spread + floor, rel=0.05)


def test_a_rotation_that_rounds_to_bf16_is_no_bias_and_a_small_bias_is():
    fixed = Cast(rounding="stochastic", headroom=17 / 16, hadamard=16)
    assert not unbiasedness(torch.randn(64, 256), fixed, 256, seeded()).biased
    assert Curve((1, 4), (1e-3, 3e-4), floor=1e-5, floor_error=1e-6).biased
    assert not Curve((1, 4), (1e-3, 3e-4), floor=1e-5, floor_error=2e-6).biased


def test_counts_of_draws():
    assert draw_counts(256) == (1, 4, 16, 64, 256) and draw_counts(100) == (1, 4, 16, 64, 100)
    assert draw_counts(2) == (1, 2) and draw_counts(4) == (1, 4)
    with pytest.raises(ValueError, match="1 draws have no spread"):
        draw_counts(1)


# ---------------------------------------------------------------------------- which casts, which tensors


def test_casts_of_recipes_are_studied_once():
    names = named_casts([RECIPES["nvfp4"], RECIPES["bf16"]])
    assert list(names)[: len(CASTS)] == list(CASTS)
    assert list(names)[len(CASTS) :] == ["nvfp4 1×16 RHT-16 SR", "nvfp4 1×16 RHT-16 RNE"]
    assert len(set(names.values())) == len(names)
    assert users([RECIPES["nvfp4"]])[Cast(square=True)] == ["nvfp4 fprop w", "nvfp4 dgrad w"]
    assert named_casts(RECIPES.values()).keys() >= names.keys()
    assert not any(cast.block_format.high_precision for cast in named_casts(RECIPES.values()).values())


@pytest.mark.parametrize("shape", [(16, 4096), (8, 4096), (128, 48), (128, 40)])
def test_an_obstacle_is_what_quantize_refuses(shape):
    refused = 0
    for cast in named_casts(RECIPES.values()).values():
        reason = obstacle(shape, cast)
        refused += reason is not None
        if reason is None:
            quantized(torch.randn(shape), cast, seeded())
        else:
            with pytest.raises(ValueError):
                quantized(torch.randn(shape), cast, seeded())
    assert refused < len(named_casts(RECIPES.values())) and (refused > 0) == (shape != (16, 4096))


def test_numbers_do_not_depend_on_which_other_casts_are_studied():
    x = torch.randn(32, 256)
    groups, settings = {"a": [x, 2 * x], "small": [x[:, :16]]}, Settings(draws=4)
    both = study({name: CASTS[name] for name in ("SR", "MS-EDEN", "MXFP4 SR, 3/4")}, groups, x, settings, lambda: None)
    alone = study({"MS-EDEN": CASTS["MS-EDEN"]}, groups, x, settings, lambda: None)
    assert both["MS-EDEN"] == alone["MS-EDEN"]
    small = {name: entry["sources"]["small"] for name, entry in both.items()}
    assert small["MXFP4 SR, 3/4"] is None and small["SR"]["tensors"] == small["MS-EDEN"]["tensors"] == 1
    assert both["SR"]["sources"]["a"]["tensors"] == 2 and both["SR"]["yardstick"]["recomputed"] == 18.85e-3


# ---------------------------------------------------------------------------- models


def save_model(folder, recipe=None):
    """A Llama of 2 blocks with a tokenizer of bytes."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({"<end>": 0} | {byte: i + 1 for i, byte in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<end>"])
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<end>", eos_token="<end>").save_pretrained(folder)
    shape = {"hidden_size": 128, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=272, max_position_embeddings=72, attention_dropout=0.5, **shape)
    model = AutoModelForCausalLM.from_config(config)
    if recipe:
        quantize_model(model, NVFP4TrainingConfig(recipe, keep_bf16_last=1))
    model.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("plain"))


@pytest.fixture
def model(folder):
    return model_study.load(folder, CPU)


def test_captured_tensors_are_those_of_the_gemms(folder, model):
    tokens = model_study.token_batch(folder, None, 2, model_study.longest(model, 512))
    assert tokens.shape == (2, 72)
    found = model_study.capture(model, tokens, 3)
    assert list(found) == [
        "model.layers.0.self_attn.q_proj", "model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj"
    ]  # fmt: skip
    assert not quantized_linears(model)["model.layers.0.self_attn.q_proj"]._forward_hooks
    _, base = model_study._gradients(model, tokens, "bf16", 0)
    for name, t in found.items():
        (n, k), weight = t.w.shape, model.get_submodule(name).weight
        assert (n, k) == ((128, 96) if "down" in name else (128, 128)) and torch.equal(t.w, weight)
        assert t.x.shape == (144, k) and t.dy.shape == (144, n)
        expected = t.dy.bfloat16().float().T @ t.x.bfloat16().float()
        assert torch.allclose(base[name], expected, rtol=1e-3, atol=1e-5 * expected.abs().max())
        operands = t.operands()
        assert [tuple(operands[o].shape) for o in OPERANDS] == [
            (256, k), (n, k), (256, n), (k, n), (n, 256), (k, 256)
        ]  # fmt: skip
        assert torch.equal(operands["wgrad dy"][:, :144], t.dy.T) and not operands["wgrad dy"][:, 144:].any()


def test_gradients_of_bf16_are_its_own_and_of_others_are_not(folder, model):
    tokens = model_study.token_batch(folder, None, 2, 64)
    rotated = Cast(hadamard=64)
    wide = Recipe("rht64", (rotated, rotated), (rotated, rotated), (rotated, rotated))
    ticks = []
    recipes = [RECIPES[name] for name in ("bf16", "fp8", "nvfp4")] + [wide]
    found = model_study.gradient_cosines(model, tokens, recipes, 0, lambda: ticks.append(1))
    assert len(ticks) == 4 and list(found) == ["bf16", "fp8", "nvfp4", "rht64"]
    assert all(cosine == pytest.approx(1, abs=1e-12) for cosine in found["bf16"]["layers"].values())
    assert len(found["nvfp4"]["layers"]) == 14
    assert 0.5 < found["nvfp4"]["all"] < 0.99 < found["fp8"]["all"] < 1 - 1e-6
    assert 0.5 < found["rht64"]["all"] < 0.99  # rotated by 32 where 64 does not divide the width
    table = quantizer_tables.gradient_table(found | {"odd": {"error": "no backend runs it"}})
    assert "odd: not measured, no backend runs it" in table and "| rht64" in table
    again = model_study.gradient_cosines(model, tokens, [RECIPES["nvfp4"]], 0, lambda: None)
    assert again["nvfp4"] == found["nvfp4"]


def test_a_checkpoint_of_ours_keeps_its_choice_of_layers(tmp_path):
    name = save_model(tmp_path, "nvfp4")
    model = model_study.load(name, CPU)
    assert len(quantized_linears(model)) == 7 and not model.training
    found = model_study.capture(model, model_study.token_batch(name, None, 1, 32), 100)
    assert list(found) == list(quantized_linears(model))
    assert {linear.recipe.name for linear in quantized_linears(model).values()} == {"nvfp4"}


# ---------------------------------------------------------------------------- the script


def script():
    spec = importlib.util.spec_from_file_location("script_quantizers", ROOT / "scripts" / "quantizers.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


SMALL = ["--device", "cpu", "--size", "256", "--tail_size", "128", "--rows", "128", "--draws", "2"]


def test_the_script_writes_and_prints_all(folder, tmp_path, capsys):
    text = tmp_path / "book.txt"
    text.write_text("It was a dark and stormy night. " * 20)
    argv = ["--model", folder, "--text", str(text), "--length", "64", "--layers", "2", "--recipes", "nvfp4", "fp8"]
    assert script().main([*SMALL, *argv, "--output", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    assert "device cpu" in printed and "nvfp4 on bf16, fp8 on bf16" in printed
    record = json.loads((tmp_path / "out" / "quantizers.json").read_text())
    for name, entry in record["casts"].items():
        assert f"| {name} " in printed and set(entry["sources"]) >= {NORMAL, *OPERANDS}
    # Rotations of 128 become 32 for the 96 columns of a down projection.
    assert all(record["casts"]["MS-EDEN"]["sources"][operand]["tensors"] == 2 for operand in OPERANDS)
    assert len(record["model"]["gradients"]["nvfp4"]["layers"]) == 14
    report = (tmp_path / "out" / "quantizers.md").read_text()
    assert all(f"## {part}" in report for part in ("Unbiasedness", "Other tensors", "Gradients by layer", "Casts"))
    for plot in ("unbiasedness.png", "gradients.png"):
        assert (tmp_path / "out" / plot).read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--recipes", "nvpf4"], "unknown recipe 'nvpf4'; known: .*Did you mean 'nvfp4'"),
        (["--model", "no/such/model"], "no/such/model: no such folder"),
        (["--model", "{tmp}"], "is not a model folder: it has no config.json"),
        (["--model", "{model}", "--text", "missing.txt"], "no such file: missing.txt"),
        (["--model", "{model}", "--text", "{tmp}/a.txt"], "has 6 tokens; 2 sequences of 72 need 144"),
    ],
)
def test_bad_input_is_one_sentence(folder, tmp_path, capfd, argv, message):
    (tmp_path / "a.txt").write_text("short")
    argv = [word.format(tmp=tmp_path, model=folder) for word in argv]
    assert script().main([*SMALL, *argv, "--output", str(tmp_path / "out")]) == 1
    error = [line for line in capfd.readouterr().err.splitlines() if line.startswith("quantizers: ")]
    assert len(error) == 1
    assert re.search(message, error[0]) and not (tmp_path / "out").exists()


@pytest.mark.parametrize("argv", [["--size", "100"], ["--draws", "1"], ["--layers", "0"], ["--device", "gpu"]])
def test_settings_out_of_range_are_errors_of_the_command_line(argv, capsys):
    with pytest.raises(SystemExit):
        script().parse(argv)
    assert argv[0] in capsys.readouterr().err.splitlines()[-1]
