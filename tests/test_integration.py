"""Transformers: loading, saving, reloading anywhere, training features that users combine."""

import json
import subprocess
import sys

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from hf_nvfp4 import RECIPES, Cast, NVFP4TrainingConfig, Recipe, register_recipe
from hf_nvfp4.linear import quantized_linears


@pytest.fixture
def checkpoint(build, tmp_path):
    """A plain checkpoint on disk."""
    build().save_pretrained(tmp_path / "plain")
    return tmp_path / "plain"


def logits(model):
    tokens = torch.arange(40, device=model.device).reshape(2, 20)
    with torch.no_grad():
        return model.eval()(tokens).logits


def test_from_pretrained_and_quantize_model_give_the_same_model(build, checkpoint):
    loaded = AutoModelForCausalLM.from_pretrained(checkpoint, quantization_config=NVFP4TrainingConfig())
    converted = build("nvfp4")
    assert loaded.nvfp4_decisions == converted.nvfp4_decisions
    assert torch.equal(logits(loaded), logits(converted))
    assert loaded.config.quantization_config == converted.config.quantization_config
    assert not getattr(loaded, "is_quantized", False) and not hasattr(loaded, "hf_quantizer")


def test_save_and_reload_are_bit_equal_under_the_original_names(build, tmp_path):
    model = build("nvfp4", skip=["o_proj"])
    names = set(build().state_dict())
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    from safetensors import safe_open

    files = sorted(tmp_path.glob("*.safetensors"))
    assert len(files) > 1
    assert {key for file in files for key in safe_open(file, "pt").keys()} == names
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert reloaded.nvfp4_decisions == model.nvfp4_decisions
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), reloaded.parameters(), strict=True))
    assert torch.equal(logits(model), logits(reloaded))


def test_a_registered_recipe_reloads_where_it_is_not_registered(build, tmp_path, monkeypatch):
    monkeypatch.setattr("hf_nvfp4.recipes.RECIPES", dict(RECIPES))
    mine = Recipe("mine", (Cast(), Cast()), (Cast(), Cast()), (Cast(hadamard=32), Cast(hadamard=32)))
    register_recipe(mine)
    build("mine").save_pretrained(tmp_path)
    monkeypatch.undo()
    assert "mine" not in RECIPES
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert {linear.recipe for linear in quantized_linears(reloaded).values()} == {mine}
    saved = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert saved["quant_method"] == "nvfp4_training" and saved["backend"] == "auto"


@pytest.mark.parametrize(
    ("settings", "shown"),
    [
        ({"recipe": "fp8"}, "recipe: checkpoint nvfp4, passed fp8"),
        ({"skip": ["o_proj"]}, "skip: checkpoint \\(\\), passed \\('o_proj',\\)"),
        ({"keep_bf16_last": 0}, "keep_bf16_last: checkpoint None, passed 0"),
        ({"high_precision": "all"}, "high_precision: checkpoint None, passed 'all'"),
    ],
)
def test_a_conflicting_config_at_reload_is_an_error(build, tmp_path, settings, shown):
    build("nvfp4").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=shown):
        AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=NVFP4TrainingConfig(**settings))


def test_an_equal_config_and_another_backend_are_no_conflict(build, tmp_path):
    build("nvfp4").save_pretrained(tmp_path)
    same = NVFP4TrainingConfig(keep_bf16_last=RECIPES["nvfp4"].keep_bf16_last, backend="reference")
    model = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=same)
    assert {linear.backend for linear in quantized_linears(model).values()} == {"reference"}


def test_a_config_is_replaced_on_purpose_through_the_model_config(build, tmp_path):
    build("nvfp4").save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    config.quantization_config = NVFP4TrainingConfig("fp8")
    model = AutoModelForCausalLM.from_pretrained(tmp_path, config=config)
    assert {linear.recipe.name for linear in quantized_linears(model).values()} == {"fp8"}


def test_the_active_precision_is_saved(build, tmp_path):
    from hf_nvfp4.convert import set_high_precision

    model = build("nvfp4")
    set_high_precision(model, "forward")
    model.save_pretrained(tmp_path)
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert {m.train_recipe.name for m in quantized_linears(reloaded).values()} == {"nvfp4, forward in bf16"}
    assert {m.recipe.name for m in quantized_linears(reloaded).values()} == {"nvfp4"}
    assert torch.equal(logits(model), logits(reloaded))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"recipe": "nvfp5"}, "unknown recipe 'nvfp5'; known: bf16, nvfp4.*Did you mean 'nvfp4'"),
        ({"backend": "fp5"}, "unknown backend 'fp5'; known: auto, fp4, fp8, bf16"),
        ({"recipes": "nvfp4"}, "unknown key .*'recipes'; known: recipe, backend, skip.*Did you mean 'recipe'"),
        ({"high_precision": "some"}, "known: None, all, forward"),
        ({"keep_bf16_last": 1.5}, "keep_bf16_last=1.5"),
        ({"quant_method": "nvfp4"}, "quant_method"),
        ({"recipe": {"name": "x"}}, "a recipe needs 'fprop'"),
        ({"recipe": ["nvfp4"]}, "unknown recipe"),
        ({"skip": 5}, "skip=5: give a list"),
        ({"keep_bf16_last": float("nan")}, "keep_bf16_last=nan"),
    ],
)
def test_bad_configs_are_errors_that_list_what_is_known(settings, message):
    with pytest.raises(ValueError, match=message):
        NVFP4TrainingConfig(**settings)


CHILD = """
import sys
{before}
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
print(type(model.model.layers[0].mlp.up_proj).__name__)
"""


@pytest.mark.parametrize(
    "before",
    [
        "import torch",
        "import transformers.quantizers",  # before torch, which it imports when half imported itself
        "import torch, transformers.modeling_utils",
        "import torch, importlib.util; importlib.util.find_spec('transformers.quantizers')",
        "import hf_nvfp4",
    ],
    ids=["plain", "quantizers first", "late", "probed", "ours"],
)
def test_a_process_that_never_imported_us_loads_nvfp4(build, tmp_path, before):
    build("nvfp4").save_pretrained(tmp_path)
    child = subprocess.run(
        [sys.executable, "-c", CHILD.format(before=before), tmp_path], capture_output=True, text=True, cwd=tmp_path
    )
    assert child.returncode == 0, child.stderr
    assert child.stdout.split()[-1] == "NVFP4Linear"


def test_a_broken_package_does_not_break_import_torch(tmp_path):
    code = """
import sys
sys.modules["hf_nvfp4.integration"] = None  # importing it now raises
import warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import torch, transformers.quantizers
print(any("hf_nvfp4 could not register" in str(w.message) for w in caught))
"""
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert (child.returncode, child.stdout.strip()) == (0, "True"), child.stderr


def loss_and_gradients(model, forward=None, autocast=torch.bfloat16):
    model.zero_grad()
    tokens = torch.arange(66, device=model.device).reshape(2, 33) % 251
    torch.manual_seed(3)
    with torch.autocast(model.device.type, autocast, enabled=autocast is not None):
        loss = (model if forward is None else forward)(input_ids=tokens, labels=tokens).loss
    loss.backward()
    return loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_changes_nothing(build, device, reentrant):
    model = build("nvfp4").to(device).train()
    loss, gradients = loss_and_gradients(model)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    again, recomputed = loss_and_gradients(model)
    assert torch.equal(loss, again)
    assert all(torch.equal(gradients[name], recomputed[name]) for name in gradients)


def test_lora_on_top_trains_only_the_adapters(build, device):
    peft = pytest.importorskip("peft")
    model = build("nvfp4").to(device)
    lora = peft.LoraConfig(r=16, target_modules=["q_proj", "up_proj"], task_type="CAUSAL_LM")
    adapted = peft.get_peft_model(model, lora)
    assert len(quantized_linears(adapted)) == 21
    _, gradients = loss_and_gradients(adapted)
    assert gradients and all("lora_" in name for name in gradients)
    assert any(g.abs().max() > 0 for g in gradients.values())


def test_generate_is_greedy_repeatable_and_independent_of_the_batch(build, device):
    model = build("nvfp4").to(device).eval()
    torch.manual_seed(2)
    prompts = torch.randint(1, 256, (3, 12), device=device)
    together = model.generate(prompts, max_new_tokens=8, do_sample=False)
    alone = [model.generate(p[None], max_new_tokens=8, do_sample=False)[0] for p in prompts]
    width = min(together.shape[1], *(len(a) for a in alone))
    assert all(torch.equal(t[:width], a[:width]) for t, a in zip(together, alone, strict=True))


def test_padding_does_not_change_a_score(build, device):
    model = build("nvfp4").to(device).eval()
    tokens = torch.randint(1, 256, (1, 16), device=device)
    padded = torch.cat([torch.zeros(1, 9, dtype=torch.long, device=device), tokens], dim=1)
    mask = (torch.arange(25, device=device) >= 9)[None].long()
    with torch.no_grad():
        short, long = model(tokens).logits, model(padded, attention_mask=mask).logits[:, 9:]
    assert torch.allclose(short, long, atol=1e-2 * short.abs().max().item())
    assert (short - long).norm() < 5e-3 * short.norm()


def test_a_model_compiles_to_one_graph(llama_config, device):
    llama_config.num_hidden_layers = 1
    torch.manual_seed(1)
    from hf_nvfp4 import quantize_model

    model = AutoModelForCausalLM.from_config(llama_config).to(device)
    quantize_model(model, NVFP4TrainingConfig(keep_bf16_last=0))
    # In FP32: under autocast torch 2.11 rounds attention elsewhere if compiled, which moves codes.
    loss, gradients = loss_and_gradients(model, autocast=None)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    compiled_loss, compiled = loss_and_gradients(model, compiled, autocast=None)
    assert torch.allclose(loss, compiled_loss, rtol=1e-3)
    for name in gradients:  # the same draws of stochastic rounding; others would be 0.2 to 0.35 off
        assert (gradients[name] - compiled[name]).norm() < 0.1 * gradients[name].norm(), name


def test_fp16_autocast_trains_with_a_loss_scaler(build, device):
    model = build("nvfp4").to(device)
    loss, gradients = loss_and_gradients(model, autocast=torch.float16)
    assert loss.isfinite() and all(g.isfinite().all() for g in gradients.values())


def test_a_bf16_checkpoint_can_train_with_fp32_masters(build, tmp_path):
    build().bfloat16().save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.float32, quantization_config=NVFP4TrainingConfig()
    )
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert {p.dtype for p in model.float().to(torch.bfloat16).parameters()} == {torch.bfloat16}
    assert len(quantized_linears(model)) == 21
