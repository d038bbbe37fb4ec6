"""GPT-2's Conv1D: the numbers of an NVFP4Linear whose weight is its transpose, under the keys that it has on disk."""

import copy
import io
import json

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments
from transformers.pytorch_utils import Conv1D

import hf_nvfp4
from hf_nvfp4 import NVFP4Linear, NVFP4TrainingConfig, quantize_model
from hf_nvfp4.linear import cast_weights_once, quantized_linears, use_recipe
from hf_nvfp4.model_study import capture
from hf_nvfp4.operand_stats import layer_stats
from hf_nvfp4.oscillation import Travel
from hf_nvfp4.packed import pack_model
from hf_nvfp4.stats import STATS_FILE
from hf_nvfp4.tiny_configs import tiny_config


def gpt2(recipe=None, **settings):
    torch.manual_seed(1)
    model = GPT2LMHeadModel(tiny_config(GPT2Config))
    if recipe is not None:
        quantize_model(model, NVFP4TrainingConfig(recipe, keep_bf16_last=0, **settings))
    return model


def pair(recipe, k=48, n=32):
    conv = Conv1D(n, k)
    torch.nn.init.normal_(conv.bias)
    linear = NVFP4Linear(k, n, recipe=recipe)
    with torch.no_grad():
        linear.weight.copy_(conv.weight.T)
        linear.bias.copy_(conv.bias)
    quantize_model(torch.nn.Sequential(conv), NVFP4TrainingConfig(recipe))
    return conv, linear


def step(layer, x, dy):
    x = x.detach().requires_grad_()
    torch.manual_seed(3)
    y = layer(x)
    y.backward(dy)
    return y, x.grad, layer.weight.grad, layer.bias.grad


@pytest.mark.parametrize("recipe", ["nvfp4", "fp8", "quartet2", "averis"])
def test_the_numbers_are_those_of_a_linear(recipe):
    conv, linear = pair(recipe)
    x, dy = torch.randn(2, 9, 48, dtype=torch.bfloat16), torch.randn(2, 9, 32, dtype=torch.bfloat16)
    y, dx, dw, db = step(conv, x, dy)
    expected = step(linear, x, dy)
    assert all(map(torch.equal, (y, dx, dw.T, db), expected)) and dw.shape == (48, 32)
    assert torch.equal(conv.eval()(x), linear.eval()(x)) and not torch.equal(conv(x).float(), x.float() @ conv.weight)


def test_a_step_is_the_same_with_weights_cast_once():
    model = gpt2("nvfp4")
    ids = torch.randint(256, (2, 16))

    def gradients():
        model.zero_grad()
        for part in ids:
            torch.manual_seed(5)
            model(input_ids=part[None], labels=part[None]).loss.backward()
        return [p.grad.clone() for p in model.parameters()]

    expected = gradients()
    with cast_weights_once(model):
        assert all(map(torch.equal, gradients(), expected))
        assert all(layer.weight_casts.operands for layer in quantized_linears(model).values())


def test_it_compiles_to_one_graph_with_the_same_numbers():
    conv, _ = pair("nvfp4")
    x, dy = torch.randn(8, 48), torch.randn(8, 32)
    expected = [t.clone() for t in step(conv, x, dy)]
    conv.zero_grad()
    compiled = torch.compile(conv, fullgraph=True, backend="eager")
    for got, one in zip(step(compiled, x, dy), expected, strict=True):
        assert torch.equal(got, one)


def test_trainer_resumes_to_the_same_bits_and_measures_each_layer(tmp_path):
    data = [{"input_ids": ids, "labels": ids} for ids in torch.randint(256, (16, 16))]

    def train(resume=None):
        arguments = TrainingArguments(
            output_dir=str(tmp_path),
            max_steps=4,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            save_steps=2,
            bf16=True,
            use_cpu=True,
            report_to="none",
            disable_tqdm=True,
            dataloader_pin_memory=False,
        )
        model, stats = gpt2("nvfp4"), hf_nvfp4.QuantizationStats(2, tokens=32)
        Trainer(model, arguments, train_dataset=data, callbacks=[stats]).train(resume_from_checkpoint=resume)
        return model.state_dict()

    whole = train()
    lines = (tmp_path / STATS_FILE).read_text().splitlines()
    assert {json.loads(line)["layer"] for line in lines} == set(quantized_linears(gpt2("nvfp4")))
    resumed = train(str(tmp_path / "checkpoint-2"))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert not torch.equal(whole["transformer.h.0.mlp.c_fc.weight"], gpt2().transformer.h[0].mlp.c_fc.weight)


def test_captured_tensors_have_the_shapes_of_a_linears():
    model = gpt2("nvfp4")
    found = capture(model, torch.randint(256, (2, 16)), 8)
    assert found.keys() == quantized_linears(model).keys()
    for name, captured in found.items():
        n, k = captured.w.shape
        assert model.get_parameter(f"{name}.weight").shape == (k, n)
        assert captured.x.shape == (32, k) and captured.dy.shape == (32, n)


def test_it_stays_a_conv1d_with_its_keys():
    plain, model = gpt2(), gpt2("nvfp4")
    assert {k: v.shape for k, v in plain.state_dict().items()} == {k: v.shape for k, v in model.state_dict().items()}
    layer = model.transformer.h[0].attn.c_attn
    assert isinstance(layer, Conv1D) and not isinstance(layer, torch.nn.Linear)
    assert "in_features=64, out_features=192, bias=True, recipe='nvfp4', backend='auto→bf16'" in repr(layer)
    ids = torch.randint(256, (1, 16))
    model.eval()
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for again in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        assert torch.equal(again(ids).logits, model(ids).logits)
    with use_recipe(model, "bf16"):
        high = model(ids).logits
    assert torch.allclose(high, plain.eval()(ids).logits, atol=0.02) and not torch.equal(high, model(ids).logits)


def test_weights_that_oscillate_and_operands_that_are_measured_are_the_transposes():
    conv, linear = pair("tetrajet2_base")
    travels = [Travel(conv), Travel(linear)]
    with torch.no_grad():
        for layer in (conv, linear):
            layer.weight.mul_(1.2)
    for travel in travels:
        travel.observe()
    assert torch.equal(travels[0].of_quantized, travels[1].of_quantized)
    with torch.no_grad():
        assert travels[0].reset(0.9) == travels[1].reset(0.9) > 0
    assert torch.equal(conv.weight.T, linear.weight)
    conv, linear = pair("nvfp4")
    x, dy = torch.randn(64, 48, requires_grad=True), torch.randn(64, 32)
    stats = []
    for layer in (conv, linear):
        torch.manual_seed(3)
        stats.append(layer_stats(layer, x, dy))
    assert stats[0] == stats[1]


def test_what_has_no_format_for_it_says_so(tmp_path):
    model = gpt2("nvfp4")
    with pytest.raises(ValueError, match="c_attn can't be packed: NVFP4Conv1D holds its weight transposed"):
        pack_model(model)
    with pytest.raises(ValueError, match="c_attn is of class NVFP4Conv1D, whose weight is transposed"):
        hf_nvfp4.export(model, tmp_path / "packed")
    gpt2().save_pretrained(tmp_path / "plain")
    with pytest.raises(ValueError, match="c_attn is of class Conv1D, whose weight is transposed"):
        hf_nvfp4.export(str(tmp_path / "plain"), tmp_path / "packed", recipe="nvfp4")
    gpt2("nvfp4").save_pretrained(tmp_path / "trained")
    config = NVFP4TrainingConfig(inference=True)
    with pytest.raises(ValueError, match="c_attn can't be packed: NVFP4Conv1D holds its weight transposed"):
        GPT2LMHeadModel.from_pretrained(tmp_path / "trained", quantization_config=config)
