"""Tensor parallelism: two and four processes (distributed_jobs.py) against one, and what is refused."""

import pytest
import torch
from distributed_jobs import float64, llama, scores, step
from test_distributed import assert_same, folder, results  # noqa: F401  (fixtures)
from transformers import AutoModelForCausalLM

from hf_nvfp4 import RECIPES
from hf_nvfp4.linear import NVFP4Linear
from hf_nvfp4.tensor_parallel import Shards, sharded

REFUSED = {"fp4_dge", "quartet", "halo1", "halo2"}


def test_tensor_parallel_ranks_multiply_the_operands_of_one_process(results):  # noqa: F811
    """All recipes, training and eval, column- and row-parallel: equal, bit for bit, or refused."""
    for result in results("tensor_parallel"):
        found = result["operands"]
        wrong = {case: names for case, names in found.items() if names and not isinstance(names, str)}
        assert not wrong
        assert {name for (name, *_), names in found.items() if isinstance(names, str)} == REFUSED
        assert {name for name, *_ in found} == set(RECIPES)
        assert result["nan"]


@pytest.mark.parametrize("job, size", [("tensor_parallel", 2), ("tensor_parallel_fsdp2", 4)])
def test_a_tensor_parallel_step_is_that_of_one_process(results, job, size):  # noqa: F811
    """With sums in FP64 the bits of FP32; in FP32 sums of other order, which now and then are rounded to another code
    further on: losses are close, and gradients."""
    numbers = [0] if size == 2 else [0, 1]
    expected, fp32 = step(float64(), numbers), step(llama(), numbers)
    for rank, result in enumerate(results(job)):
        number = rank * len(numbers) // size
        assert result[""]["losses"] == [expected["losses"][number]]
        assert_same(result[""]["gradients"], expected["gradients"])
        assert result["fp32"]["losses"] == pytest.approx([fp32["losses"][number]], rel=1e-5)
        assert_same(result["fp32"]["gradients"], fp32["gradients"], 0.15)
        torch.testing.assert_close(result["scores"], scores(llama()), rtol=1e-5, atol=1e-6)


def test_a_tensor_parallel_model_is_saved_whole(results, folder):  # noqa: F811
    results("tensor_parallel")
    model = AutoModelForCausalLM.from_pretrained(folder / "split2" / "saved")
    assert model.nvfp4_decisions
    assert_same(dict(model.named_parameters()), dict(llama().named_parameters()))


@pytest.mark.parametrize(
    "recipe, shards, sizes, words",
    [
        ("nvfp4", Shards("", 4, 1), (96, 64), "multiples of 16"),
        ("nvfp4", Shards("", 3, 0), (96, 64), "64 features over 3 ranks are not"),
        ("quartet2", Shards("", 2, 0), (256, 384), "multiples of 128"),  # RHT-128 along 192
        ("fp8", Shards("", 2, 1), (384, 128), "multiples of 128"),
        ("fp4_dge", Shards("", 2, 1), (64, 64), "largest features of each token"),
        ("quartet", Shards("", 2, 0), (64, 64), "estimator='clipped'"),
    ],
)
def test_shards_that_cannot_have_the_operands_of_the_whole_are_refused(recipe, shards, sizes, words):
    with pytest.raises(ValueError, match=words):
        sharded(RECIPES[recipe].fitted(*sizes), shards, *sizes)


def test_a_shard_that_a_layer_was_not_told_of_is_an_error():
    layer = NVFP4Linear(64, 32)
    layer.weight = torch.nn.Parameter(layer.weight[:16].detach())
    with pytest.raises(ValueError, match="not \\(32, 64\\): a shard whose scales would be its own"):
        layer(torch.randn(4, 64))
