"""Checkpoints that are loaded for inference: weights stay codes, or become them one at a time."""

import json
import weakref

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, Trainer, TrainingArguments

from hf_nvfp4 import NVFP4Linear, NVFP4TrainingConfig, PackedLinear, evaluation, export, pack_model, quantize_model
from hf_nvfp4 import importing, use_recipe
from hf_nvfp4.data import InputError
from hf_nvfp4.layouts import COMPRESSED, LAYOUTS
from hf_nvfp4.linear import quantized_linears

IDS = torch.randint(1, 256, (2, 9), generator=torch.Generator().manual_seed(1))


def load(folder, inference=True, recipe="nvfp4", dtype=torch.bfloat16, **settings):
    config = NVFP4TrainingConfig(recipe, inference=inference, **settings)
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, dtype=dtype)


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


def packed_layers(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, PackedLinear)}


@pytest.fixture
def trained(build, tmp_path):
    """trained(recipe, **settings): the folder of a model after a step of training, FP32 on disk."""

    def make(recipe="nvfp4", **settings):
        model = build(recipe, **settings).train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
        model.save_pretrained(tmp_path / "trained")
        return tmp_path / "trained"

    return make


@pytest.mark.parametrize("settings", [{}, {"recipe": "nvfp4_4over6", "skip": ["o_proj"], "backend": "bf16"}])
def test_a_trained_checkpoint_is_packed_as_it_was_trained(trained, settings, capsys):
    folder = trained(**settings)
    as_trained = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    expected = logits(as_trained)
    w4a4 = load(folder, "w4a4")
    assert logits(w4a4).equal(expected)
    assert "W4A4" in capsys.readouterr().out
    w4a16 = load(folder)
    assert packed_layers(w4a16).keys() == packed_layers(w4a4).keys() == quantized_linears(as_trained).keys()
    assert w4a16.nvfp4_decisions == as_trained.nvfp4_decisions
    assert logits(w4a16).equal(logits(pack_model(as_trained)))
    assert not logits(w4a16).equal(expected)
