"""All experts at once by the kernels, in Triton's interpreter: the numbers of one after the other."""

import dataclasses
import re

import pytest
import torch
from fp8_stand_in import run_on_the_cpu
from test_experts import KINDS, converted, step
from torch import nn

from hf_nvfp4 import RECIPES, Cast
from hf_nvfp4.backends import bf16
from hf_nvfp4.experts import experts_class
from hf_nvfp4.language import Gemm
from hf_nvfp4.tiny_configs import tiny_config

cases = pytest.importorskip("kernel_cases", reason="the kernels need Triton")
ops, kernels = cases.ops, cases.kernels
pytestmark = cases.MARKS
NOWHERE = {"none"}


def nearest(name):
    """A recipe that draws nothing."""
    recipe = RECIPES[name]
    gemms = {n: Gemm(*(dataclasses.replace(c, rounding="nearest") for c in g)) for n, g in recipe.gemms.items()}
    return dataclasses.replace(recipe, name=f"{name} to nearest", **gemms)


def small(kind, recipe, backend, count=3):
    """So many experts of 32→64 or 32→32→32."""
    cls, config = KINDS[kind]
    config = tiny_config(config)
    config.hidden_size, config.intermediate_size, config.num_local_experts = 32, 32, count
    torch.manual_seed(1)
    module = cls(config)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.2)
    return experts_class(cls).convert(module, recipe, backend)


def both(monkeypatch, device, module, *data, **more):
    """Results of a step at once, and one expert after the other in plain PyTorch."""
    parameters = [p for p in module.parameters() if p.requires_grad]
    monkeypatch.setattr(bf16, "KERNEL_DEVICES", {device.type})
    assert module.one_by_one(device) is None
    got = step(module, parameters, *data, **more)
    got = [t.clone() for t in got]
    monkeypatch.setattr(bf16, "KERNEL_DEVICES", NOWHERE)
    assert module.one_by_one(device)
    return got, step(module, parameters, *data, **more)


# Expert 1 has no token, expert 2 one, 0 some; 3 is nobody's.
IDS = torch.tensor([[0, 3], [3, 0], [0, 3], [3, 3], [2, 0], [0, 3], [3, 3]])


@pytest.mark.parametrize(
    ("kind", "recipe", "backend"),
    [("mixtral", "nvfp4", "bf16"), ("gpt_oss", "nvfp4_hopper", "fp8"), ("mixtral", "fp8_tensor", "fp8")],
)
def test_at_once_is_one_after_the_other(kind, recipe, backend, monkeypatch, device):
    if device.type == "cpu":
        run_on_the_cpu(monkeypatch)
    module = small(kind, nearest(recipe), backend).to(device)
    if kind == "gpt_oss":  # bias, transposed; and wgrad for the first matrix alone
        module.down_proj.requires_grad_(False)
    generator = torch.Generator().manual_seed(2)
    data = torch.randn(7, 32, generator=generator), IDS, torch.rand(7, 2, generator=generator)
    got, expected = both(monkeypatch, device, module, *(t.to(device) for t in data))
    for a, b in zip(got, expected, strict=True):
        # Another order of sums; one element rounded otherwise would be more.
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    assert got[3][0].any() and not got[3][1].any()


def test_one_expert_draws_as_a_linear_does(monkeypatch, device):
    module = small("mixtral", "nvfp4", "bf16", 1).to(device)
    data = torch.randn(21, 32), torch.zeros(21, 1, dtype=torch.int64), torch.rand(21, 1)
    for a, b in zip(*both(monkeypatch, device, module, *(t.to(device) for t in data)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_nobodys_tokens_give_zeros_and_eval_is_per_token(monkeypatch, device):
    module = small("mixtral", nearest("nvfp4"), "bf16").to(device)
    data = torch.randn(3, 32), torch.full((3, 2), 3), torch.rand(3, 2)
    got, _ = both(monkeypatch, device, module, *(t.to(device) for t in data))
    assert not any(t.any() for t in got)
    x = torch.randn(3, 32, device=device) * torch.tensor([[100.0], [1.0], [1.0]], device=device)
    ids, weights = IDS[:3].to(device), data[2].to(device)
    monkeypatch.setattr(bf16, "KERNEL_DEVICES", {device.type})
    with torch.no_grad():
        found = module.eval()(x, ids, weights)
        monkeypatch.setattr(bf16, "KERNEL_DEVICES", NOWHERE)
        torch.testing.assert_close(found, module(x, ids, weights), rtol=1e-5, atol=1e-6)


def test_it_is_one_graph(monkeypatch, device):
    """Also: nothing waits for the GPU, a size that follows from data would break the graph."""
    monkeypatch.setattr(bf16, "KERNEL_DEVICES", {device.type})
    module = small("mixtral", "bf16", "bf16", 2).to(device)
    data = torch.randn(5, 32, device=device), IDS[:5].to(device) % 2, torch.rand(5, 2, device=device)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    for a, b in zip(*(step(m, list(module.parameters()), *data) for m in (compiled, module)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_groups_are_cast_as_if_alone(device):
    x = torch.randn(96, 32, device=device) * torch.arange(1, 97, device=device)[:, None]
    groups = torch.tensor([1, -1, 0], dtype=torch.int32, device=device)
    row, col = (kernels.spec(cast) for cast in (Cast(), Cast(hadamard=16)))
    amax = ops.amax(x, True, 16, groups, 32, 3)
    assert not amax[2].any()  # has no rows
    out = ops.cast(x, amax, None, None, row, ops.VALUES, col, ops.CODES_ACROSS, groups, 32, 3)
    assert out[1][2] == out[4][2] == 1
    for group, part in ((1, slice(0, 32)), (0, slice(64, 96))):
        own = ops.amax(x[part], True, 16)
        assert torch.equal(amax[group], own)
        values, above, codes, scales, col_above = ops.cast(
            x[part], own, None, None, row, ops.VALUES, col, ops.CODES_ACROSS
        )
        assert torch.equal(out[0][part], values) and torch.equal(out[1][group], above)
        blocks = slice(part.start // 16, part.stop // 16)
        assert torch.equal(out[2][blocks], codes) and torch.equal(out[3][blocks], scales)
        assert torch.equal(out[4][group], col_above)


@pytest.mark.parametrize(
    ("recipe", "backend", "reason"),
    [
        ("averis", "bf16", "cast x and w as they are"),
        ("halo1", "bf16", "rotated along tokens only"),
        ("fp8", "bf16", "would belong to two groups, of 256 rows each|of 64 rows each"),
        ("nvfp4", "reference", "backend 'reference' has no grouped GEMMs"),
    ],
)
def test_what_is_done_one_by_one_says_why(recipe, backend, reason, monkeypatch, device):
    monkeypatch.setattr(bf16, "KERNEL_DEVICES", {device.type})
    module = converted(recipe=recipe).to(device)
    module.backend = backend
    assert re.search(reason, module.one_by_one(device))
    assert f"one by one ({module.one_by_one(device)})" in repr(module)


def test_an_activation_that_moves_zeros_is_done_one_by_one(monkeypatch, device):
    monkeypatch.setattr(bf16, "KERNEL_DEVICES", {device.type})
    cls, config = KINDS["nemotron_h"]
    module = cls(tiny_config(config))
    module.act_fn = nn.Sigmoid()
    assert "makes something of zeros" in experts_class(cls).convert(module, "nvfp4").one_by_one(device)
