"""Shared fixtures: the bit-exact vectors, where the checkout has them beside it."""

import sys
from pathlib import Path

import pytest
import torch

SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(autouse=True)
def _fresh():
    """The same draws, and nothing compiled: sizes that another test had would make a graph of any size, slowly."""
    torch.manual_seed(0)
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()


@pytest.fixture(scope="session")
def golden():
    """name -> tensor of ../shared/golden/nvfp4.safetensors, made with an independent implementation of NVFP4."""
    path = SHARED / "golden" / "nvfp4.safetensors"
    if not path.exists():
        pytest.skip(f"the bit-exact vectors are not there ({path}); they are not part of the repository")
    from safetensors.torch import load_file

    return load_file(path)


@pytest.fixture(scope="session")
def device():
    """The GPU if there is one: the same tests then check it."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def llama_config():
    """A Llama of 4 blocks, 29 linears."""
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )


@pytest.fixture
def build(llama_config):
    """build(recipe, **settings): the Llama from its config, the same weights each time, converted."""
    from transformers import AutoModelForCausalLM

    from hf_nvfp4 import NVFP4TrainingConfig, quantize_model

    def make(recipe=None, **settings):
        torch.manual_seed(1)
        model = AutoModelForCausalLM.from_config(llama_config)
        if recipe is not None:
            quantize_model(model, NVFP4TrainingConfig(recipe=recipe, **settings))
        return model

    return make
