"""scripts/quantizers.py: the published numbers, verdicts that can be wrong, tensors and gradients of a model."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch

from hf_nvfp4 import RECIPES, Cast, model_study, quantizer_study, quantizer_tables
from hf_nvfp4.packing import train_tokenizer
from hf_nvfp4.quantizer_study import CASTS, NORMAL, YARDSTICKS, Curve, measure, unbiasedness

CPU = torch.device("cpu")


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def quantizers():
    path = Path(__file__).parents[1] / "scripts" / "quantizers.py"
    spec = importlib.util.spec_from_file_location("quantizers_script", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def checkpoint(llama_config, build, tmp_path):
    """A tiny Llama with a tokenizer, saved."""
    tokenizer = train_tokenizer(["def f(x):\n    return x + 1\n"] * 50, 300)
    llama_config.vocab_size = 320
    build("bf16").save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize("name", list(YARDSTICKS))
def test_published_errors_on_n01(name):
    x = torch.randn(1024, 2048, generator=generator())
    yardstick, got = YARDSTICKS[name], measure(x, CASTS[name], generator(1))
    assert got.error == pytest.approx(yardstick.value, rel=0.01)
    assert yardstick.published is None or yardstick.recomputed == pytest.approx(yardstick.published, rel=0.01)
    assert got.cosine == pytest.approx((1 + got.bias) / (got.error + 1 + 2 * got.bias) ** 0.5, abs=1e-6)


@pytest.mark.parametrize(
    ("name", "verdict", "floor"),
    [
        ("SR", "biased", 1.0e-4),
        ("RNE 1×16", "biased", 9.0e-3),
        ("SR with headroom", "unbiased", 0),
        ("SR, FP8-exact", "unbiased", 0),
        ("MS-EDEN", "unbiased", 0),
        ("MS-EDEN, FP8-exact", "unbiased", 0),
        ("MXFP4 SR, 3/4", "unbiased", 0),
    ],
)
def test_verdicts(name, verdict, floor):
    curve = unbiasedness(torch.randn(128, 1024, generator=generator()), CASTS[name], 64, generator(1))
    assert curve.verdict == verdict and curve.counts == (1, 4, 16, 64)
    assert curve.floor == pytest.approx(floor, rel=0.1, abs=2e-5)
    if verdict == "unbiased":
        assert curve.errors[-1] == pytest.approx(curve.errors[0] / 64, rel=0.05)


def test_a_floor_has_to_stand_out():
    assert not Curve((1, 2), (1e-2, 5e-3), 1e-5, 1e-5).biased and Curve((1, 2), (1e-2, 5e-3), 1e-5, 1e-7).biased
    with pytest.raises(ValueError, match="take 2 or more"):
        unbiasedness(torch.randn(16, 128), CASTS["SR"], 1, generator())


def test_every_cast_of_the_recipes_is_studied():
    casts = quantizer_study.named_casts(RECIPES.values())
    used = {c for r in RECIPES.values() for c in r.casts if not c.block_format.high_precision}
    assert used <= set(casts.values()) and len(set(casts.values())) == len(casts)
    assert quantizer_study.obstacle((16, 96), Cast(hadamard=64)) and not quantizer_study.obstacle((16, 128), Cast())


def test_tensors_and_gradients_of_a_model(checkpoint):
    model = model_study.load(str(checkpoint), CPU)
    tokens = model_study.token_batch(str(checkpoint), None, 2, 32)
    assert tokens.shape == (2, 32)
    captured = model_study.capture(model, tokens, 3)
    assert len(captured) == 3
    for name, found in captured.items():
        weight = model.get_submodule(name).weight
        operands = found.operands()
        assert set(operands) == set(model_study.OPERANDS)
        assert all(t.isfinite().all() and t.any() for t in operands.values())
        assert weight.shape in [t.shape for t in operands.values()]
    recipes = [RECIPES["bf16"], RECIPES["nvfp4"]]
    cosines = model_study.gradient_cosines(model, tokens, recipes, 0, lambda: None)
    assert cosines["bf16"]["all"] == pytest.approx(1, abs=1e-9)
    assert set(cosines["bf16"]["layers"]) == set(cosines["nvfp4"]["layers"]) and len(cosines["bf16"]["layers"]) == 28
    assert all(0.5 < cosine < 0.999 for cosine in cosines["nvfp4"]["layers"].values())
    assert "nvfp4" in quantizer_tables.gradient_table(cosines)


def test_the_script_writes_all_of_it(quantizers, checkpoint, tmp_path, capsys):
    small = ["--size", "256", "--tail_size", "128", "--rows", "128", "--draws", "4"]
    small += ["--sequences", "1", "--length", "32"]
    argv = ["--recipes", "nvfp4", "--model", str(checkpoint), "--output", str(tmp_path / "out"), "--device", "cpu"]
    assert quantizers.main([*argv, *small, "--layers", "2"]) == 0
    printed = capsys.readouterr().out
    assert "| SR with headroom" in printed and "Quartet II" in printed
    record = json.loads((tmp_path / "out" / "quantizers.json").read_text())
    assert NORMAL in record["casts"]["SR"]["sources"] and record["casts"]["SR"]["users"] == ["nvfp4 dgrad dy"]
    for name in ("unbiasedness.png", "gradients.png", "quantizers.md"):
        assert (tmp_path / "out" / name).stat().st_size > 1000


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [(["--recipes", "nvfp5"], "Did you mean 'nvfp4'?"), (["--model", "/no/such/folder"], "/no/such/folder")],
)
def test_bad_input_is_a_sentence(quantizers, argv, sentence, capsys, tmp_path):
    assert quantizers.main([*argv, "--device", "cpu", "--output", str(tmp_path / "out")]) == 1
    assert sentence in capsys.readouterr().err and not (tmp_path / "out").exists()
    with pytest.raises(SystemExit):
        quantizers.main(["--draws", "1"])
