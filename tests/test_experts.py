"""Fused experts: each expert's numbers are those of NVFP4Linears of its own; the rest is as in Transformers."""

import copy
import io
import json

import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F
import transformers
from torch import nn
from transformers import Trainer, TrainingArguments
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.mixtral.modeling_mixtral import MixtralExperts
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHExperts
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

import hf_nvfp4
from hf_nvfp4 import RECIPES, NVFP4Linear, NVFP4TrainingConfig, quantize_model
from hf_nvfp4 import experts as experts_module
from hf_nvfp4.convert import set_high_precision
from hf_nvfp4.evaluation import precision_detail
from hf_nvfp4.experts import NVFP4Experts, experts_class
from hf_nvfp4.language import RecipeMap
from hf_nvfp4.linear import cast_weights_once, converted_modules, quantized_linears, use_recipe, why_not_once
from hf_nvfp4.packed import pack_model
from hf_nvfp4.tiny_configs import tiny_config

KINDS = {
    "mixtral": (MixtralExperts, transformers.MixtralConfig),
    "qwen3_moe": (Qwen3MoeExperts, transformers.Qwen3MoeConfig),
    "gpt_oss": (GptOssExperts, transformers.GptOssConfig),
    "nemotron_h": (NemotronHExperts, transformers.NemotronHConfig),
}
TOKENS, TOP_K = 21, 2


def plain(kind="mixtral", implementation="eager"):
    """A module of 8 or 16 experts in FP32."""
    cls, config = KINDS[kind]
    config = tiny_config(config)
    config._experts_implementation = implementation
    torch.manual_seed(1)
    module = cls(config)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.2)
    return module


def converted(kind="mixtral", recipe="nvfp4"):
    module = plain(kind)
    return experts_class(type(module)).convert(module, recipe)


def routed(experts=8, tokens=TOKENS, width=64, unused=(3,)):
    """hidden states [T, H], the ids of two different experts a token, none of them unused, and their weights."""
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(tokens, width, generator=generator)
    scores = torch.randn(tokens, experts, generator=generator)
    scores[:, list(unused)] = -torch.inf
    weights, ids = scores.softmax(-1).topk(TOP_K)
    return x, ids, weights


def step(function, parameters, x, ids, weights, seed=3, dy=None):
    """y and the gradients of x, of the routing weights and of the parameters."""
    x, weights = (t.detach().clone().requires_grad_() for t in (x, weights))
    for parameter in parameters:
        parameter.grad = None
    torch.manual_seed(seed)
    y = function(x, ids, weights)
    y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(4)).to(y.dtype) if dy is None else dy)
    return [y.detach(), x.grad, weights.grad, *(parameter.grad for parameter in parameters)]


class Loop(nn.Module):
    """The experts as NVFP4Linears, one after the other."""

    def __init__(self, module, recipe):
        super().__init__()
        self.plain, self.linears = module, nn.ModuleDict()
        for name in ("gate_up_proj" if module.has_gate else "up_proj", "down_proj"):
            weight = getattr(module, name).detach()
            weight = weight.transpose(1, 2) if module.is_transposed else weight
            bias = getattr(module, f"{name}_bias").detach() if module.has_bias else None
            linears = self.linears[name] = nn.ModuleList()
            for e, matrix in enumerate(weight):
                linear = NVFP4Linear(matrix.shape[1], matrix.shape[0], bias is not None, recipe=recipe)
                linear.weight = nn.Parameter(matrix)  # as it lies: sums are in the same order
                if bias is not None:
                    linear.bias = nn.Parameter(bias[e])
                linears.append(linear)

    def forward(self, x, ids, weights):
        up, down = self.linears.values()
        who = [(e, *torch.where(ids == e)) for e in range(len(up)) if (ids == e).any()]
        states = [up[e](x[tokens]) for e, tokens, _ in who]
        states = [self.plain._apply_gate(s) if self.plain.has_gate else self.plain.act_fn(s) for s in states]
        states = [down[e](s) for (e, _, _), s in zip(who, states, strict=True)]
        y = torch.zeros_like(x)
        for (_, tokens, places), s in zip(who, states, strict=True):
            y = y.index_add(0, tokens, s * weights[tokens, places, None])
        return y

    def gradients(self):
        """By the experts' parameter names, zeros where there is none."""
        found = {}
        for name, linears in self.linears.items():
            for part, suffix in (("weight", ""), ("bias", "_bias")):
                if getattr(linears[0], part) is None:
                    continue
                each = [getattr(linear, part) for linear in linears]
                stacked = torch.stack([torch.zeros_like(p) if p.grad is None else p.grad for p in each])
                turn = part == "weight" and self.plain.is_transposed
                found[name + suffix] = stacked.transpose(1, 2) if turn else stacked
        return found


@pytest.mark.parametrize(
    ("kind", "recipe"),
    [("mixtral", "nvfp4"), ("mixtral", "quartet2"), ("gpt_oss", "nvfp4"), ("gpt_oss", "averis"), ("nemotron_h", "fp8")],
)
def test_the_numbers_are_those_of_a_linear_for_each_expert(kind, recipe):
    module, loop = converted(kind, recipe), Loop(plain(kind), recipe)
    x, ids, weights = routed(len(module.down_proj))
    assert 0 < (ids == 1).sum() < 16  # no multiple of a block
    *got, _ = step(module, [module.down_proj], x, ids, weights)
    expected = step(loop, list(loop.linears.parameters()), x, ids, weights)
    for a, b in zip(got, expected[:3], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    for name, gradient in loop.gradients().items():
        assert torch.equal(module.get_parameter(name).grad, gradient), name
        assert gradient[1].any() and not gradient[3].any()  # the unused one's is zero
    assert module.down_proj.grad.shape == module.down_proj.shape


@pytest.mark.parametrize("kind", KINDS)
def test_around_the_products_all_is_as_in_transformers(kind, monkeypatch):
    module = converted(kind, "bf16")
    data = routed(len(module.down_proj))
    names = [name for name, _ in module.named_parameters()]
    rounded = step(module, list(module.parameters()), *data)
    monkeypatch.setattr(experts_module, "quantized_linear", lambda x, w, b, plan: F.linear(x, w, b))
    got = step(module, list(module.parameters()), *data)
    for implementation in ("eager", "grouped_mm"):
        own = plain(kind, implementation)
        for name, a, b, c in zip(
            ("y", "x", "weights", *names), got, rounded, step(own, list(own.parameters()), *data), strict=True
        ):
            torch.testing.assert_close(a, c, rtol=1e-4, atol=1e-4, msg=f"{implementation}: {name}")
            assert (b - c).norm() < 0.02 * c.norm(), (implementation, name)


def test_a_norm_after_the_experts_is_applied():
    module, x, ids = converted(), routed()[0], routed()[1][:, :1]
    weights, norm = torch.ones(TOKENS, 1), nn.RMSNorm(64)
    without = module(x, ids, weights)
    module.has_post_expert_norm, module.post_expert_norm = True, norm
    torch.testing.assert_close(module(x, ids, weights), norm(without))


def test_ids_from_the_number_of_experts_on_are_nobodys():
    module = converted()
    x, ids, weights = routed()
    here = ids < 4  # as on the first of two ranks of expert parallelism: the other's ids are all 4
    for name in ("gate_up_proj", "down_proj"):
        setattr(module, name, nn.Parameter(getattr(module, name)[:4].detach()))
    local, parameters = torch.where(here, ids, 4), list(module.parameters())
    got = step(module, parameters, x, local, weights)
    assert not got[2][~here].any() and got[2][here].all()
    away = (~here).all(1)
    assert away.any() and not got[0][away].any() and not got[1][away].any()
    torch.testing.assert_close(got[0], step(module, parameters, x, local, weights.where(here, 0.0))[0])
    # None here: still gradients, of zeros, so that all ranks have one of each parameter.
    y, dx, _, *gradients = step(module, parameters, x, torch.full_like(ids, 4), weights)
    assert y.shape == x.shape and not any(t.any() for t in (y, dx, *gradients))
    none = module(x[:0], ids[:0], weights[:0])
    assert none.shape == (0, 64)


def test_draws_follow_the_generator_and_differ_between_experts():
    module = converted()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(parameter[:1].clone())  # all experts are alike
    data = torch.randn(1, 64).expand(2, 64), torch.tensor([[0], [1]]), torch.ones(2, 1)
    dy = torch.randn(1, 64).expand(2, 64)
    first, again, other = (step(module, list(module.parameters()), *data, seed, dy) for seed in (5, 5, 6))
    assert all(map(torch.equal, first, again)) and not torch.equal(first[3], other[3])
    y, _, _, up, down = first
    assert torch.equal(y[0], y[1])  # the forward rounds to nearest
    assert not torch.equal(up[0], up[1]) and not torch.equal(down[0], down[1])


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_trains_them(name):
    recipe = RECIPES[name]
    for member in recipe.members if isinstance(recipe, RecipeMap) else (recipe,):
        module = converted(recipe=member)
        x, ids, weights = routed(tokens=9)
        for part in step(module, list(module.parameters()), x.bfloat16(), ids, weights):
            assert part.isfinite().all() and part.any()


def test_in_eval_mode_a_token_does_not_depend_on_the_others():
    module = converted().eval()
    x, ids, weights = routed()
    x[0] *= 100
    together = module(x, ids, weights)
    assert torch.equal(together[3:4], module(x[3:4], ids[3:4], weights[3:4]))
    assert not torch.equal(together, module.train()(x, ids, weights))


def test_frozen_experts_pass_gradients_on():
    module = converted().requires_grad_(False)
    x, ids, weights = routed()
    x.requires_grad_()
    module(x, ids, weights).sum().backward()
    assert x.grad.any() and module.down_proj.grad is None


def test_autocast_and_the_hidden_states_dtype_are_kept():
    module = converted()
    x, ids, weights = routed()
    half = module(x.bfloat16(), ids, weights)
    with torch.autocast("cpu", torch.bfloat16):
        under = module(x, ids, weights)
    assert half.dtype == torch.bfloat16 and under.dtype == torch.float32
    torch.testing.assert_close(half.float(), under, rtol=1e-2, atol=1e-2)
    with pytest.raises(TypeError, match="NVFP4MixtralExperts takes floating-point inputs, not torch.int64"):
        module(x.long(), ids, weights)


def test_a_compiled_block_leaves_them_out_of_its_graph():
    module = converted()
    block = lambda x, ids, weights: torch.relu(module(torch.sin(x), ids, weights)) * 2  # noqa: E731
    expected = step(block, [module.down_proj], *routed())
    counter = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(block, backend=counter)
    for tokens in (TOKENS, 9, 13):  # other counts: no graph of the experts is made again
        got = step(compiled, [module.down_proj], *routed(tokens=tokens))
        if tokens == TOKENS:
            assert all(map(torch.equal, got, expected))
    assert counter.frame_count <= 6  # before and after, each for one number of tokens and for any


def test_sharded_weights_that_nobody_gathers_are_an_error():
    module = converted()
    module.gate_up_proj.full_tensor = lambda: None  # as DTensors have it
    with pytest.raises(TypeError, match="gate_up_proj is a DTensor .* Shard with FSDP2"):
        module(*routed())


# ---------------------------------------------------------------------------- models


def model(kind="mixtral", recipe=None, **settings):
    name = {"mixtral": "MixtralForCausalLM", "qwen3_moe": "Qwen3MoeForCausalLM", "gpt_oss": "GptOssForCausalLM"}[kind]
    cls = getattr(transformers, name)
    torch.manual_seed(1)
    built = cls(tiny_config(cls.config_class))
    if recipe is not None:
        quantize_model(built, NVFP4TrainingConfig(recipe, **({"keep_bf16_last": 0} | settings)))
    return built


def decisions_of(model):
    return {d.name: d for d in model.nvfp4_decisions if d.experts}


NAME = "model.layers.{}.mlp.experts"


def test_they_are_converted_with_the_rest_and_said(capsys):
    built = model(recipe="nvfp4")
    out = capsys.readouterr().out
    assert "converted 8 of 9 linears and 2 of 2 modules of experts (lm_head: kept, output head); recipe nvfp4" in out
    reason = "recipe nvfp4 (8 × gate_up_proj 64→256 and down_proj 128→64)"
    assert [(d.converted, d.reason, d.experts) for d in decisions_of(built).values()] == [(True, reason, 8)] * 2
    text = repr(built.get_submodule(NAME.format(0)))
    assert text.startswith("NVFP4MixtralExperts(")
    assert "experts=8, gate_up_proj=64→256, down_proj=128→64, recipe='nvfp4', backend='auto→bf16'" in text
    assert isinstance(built.get_submodule(NAME.format(0)), MixtralExperts)
    with pytest.raises(ValueError, match="converted already"):
        quantize_model(built, NVFP4TrainingConfig())
    rotated = decisions_of(model(recipe="quartet2"))[NAME.format(0)].reason
    assert "down_proj dgrad rotated by 64, not 128, which does not divide 64" in rotated


def test_what_keeps_a_layer_keeps_them():
    built = model(recipe="nvfp4", skip=["layers.0.mlp.experts"])
    assert [d.converted for d in decisions_of(built).values()] == [False, True]
    assert "skip pattern" in decisions_of(built)[NAME.format(0)].reason
    assert [d.converted for d in decisions_of(model(recipe="nvfp4", keep_bf16_last=1)).values()] == [True, False]
    only = model(recipe={"experts": "fp8", "k_proj": "nvfp4"})
    assert [d.reason.partition(" (")[0] for d in decisions_of(only).values()] == ["recipe fp8"] * 2
    assert len(quantized_linears(only)) == 2
    config = tiny_config(transformers.MixtralConfig)
    config.intermediate_size = 24
    small = transformers.MixtralForCausalLM(config)
    quantize_model(small, NVFP4TrainingConfig())
    kept = decisions_of(small)[NAME.format(0)]
    assert (kept.converted, kept.reason) == (False, "down_proj: in_features=24 is not a multiple of 16")
    llama4 = transformers.models.llama4.modeling_llama4.Llama4TextExperts(tiny_config(transformers.Llama4TextConfig))
    quantize_model(net := nn.ModuleDict({"experts": llama4, "proj": nn.Linear(16, 16)}), NVFP4TrainingConfig())
    assert net.nvfp4_decisions[0].reason == "experts that don't follow Transformers' experts interface"


def test_recipes_and_precision_can_be_changed():
    built, ids = model(recipe={"experts": "nvfp4"}), torch.randint(256, (2, 16))
    loss = built(ids, labels=ids).loss
    with use_recipe(built, "fp8"):
        assert built.get_submodule(NAME.format(1)).train_recipe.name == "fp8"
        assert not torch.equal(built(ids, labels=ids).loss, loss)
    assert torch.equal(built(ids, labels=ids).loss, loss)
    set_high_precision(built, "all")
    assert {m.high_precision for m in converted_modules(built).values()} == {"all"}
    torch.testing.assert_close(built(ids, labels=ids).loss, model()(ids, labels=ids).loss, rtol=1e-3, atol=1e-3)
    assert "in 0 linears and 2 modules of experts, activation scales per token" in precision_detail(
        model(recipe={"experts": "nvfp4"})
    )


def test_what_leaves_them_out_says_so():
    only = model(recipe={"experts": "nvfp4"})
    with pytest.raises(ValueError, match="no converted linear layers, only fused experts"):
        quantized_linears(only)
    assert why_not_once(only) == "only fused experts are converted, and those are cast at each micro-batch"
    with pytest.raises(ValueError, match="only fused experts are converted.* Leave cast_weights_once out"):
        with cast_weights_once(only):
            pass
    both = model(recipe="nvfp4")
    with cast_weights_once(both):
        ids = torch.randint(256, (1, 16))
        both(ids, labels=ids).loss.backward()
    assert both.get_submodule(NAME.format(0)).down_proj.grad.any()


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe", "gpt_oss"])
def test_files_are_those_of_the_plain_model(kind, tmp_path):
    built, ids = model(kind, "nvfp4"), torch.randint(256, (2, 16))
    own = model(kind)
    assert {n: p.shape for n, p in own.state_dict().items()} == {n: p.shape for n, p in built.state_dict().items()}
    built.save_pretrained(tmp_path)
    cls = type(own)
    again = cls.from_pretrained(tmp_path, dtype=torch.float32).train()
    assert again.nvfp4_decisions == built.nvfp4_decisions
    assert isinstance(next(m for n, m in again.named_modules() if n.endswith("experts")), NVFP4Experts)
    assert torch.equal(again(ids, labels=ids).loss, built(ids, labels=ids).loss)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["quantization_config"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    read, info = cls.from_pretrained(tmp_path, dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert torch.equal(read(ids).logits, own.eval()(ids).logits)


def test_copies_and_pickles_are_converted_too():
    built, ids = model(recipe="nvfp4").eval(), torch.randint(256, (1, 16))
    torch.save(built, file := io.BytesIO())
    file.seek(0)
    for again in (copy.deepcopy(built), torch.load(file, weights_only=False)):
        assert type(again.get_submodule(NAME.format(0))) is type(built.get_submodule(NAME.format(0)))
        assert torch.equal(again(ids).logits, built(ids).logits)


def test_packed_and_exported_models_have_plain_experts(tmp_path, capsys):
    built, ids = model(recipe="nvfp4"), torch.randint(256, (1, 16))
    summary = hf_nvfp4.export(built, tmp_path / "packed", fused="own")
    assert any("fused experts of 2 modules stay in bfloat16" in note for note in summary.notes)
    built.save_pretrained(tmp_path / "trained")
    assert hf_nvfp4.export(tmp_path / "trained", tmp_path / "again", fused="own").packed == summary.packed
    weight = built.get_submodule(NAME.format(0)).down_proj.detach().clone()
    pack_model(built)
    assert "packed 8 linears; 2 modules of experts run in high precision" in capsys.readouterr().out
    experts = built.get_submodule(NAME.format(0))
    assert type(experts) is MixtralExperts and torch.equal(experts.down_proj, weight)
    assert built(ids).logits.isfinite().all() and "recipe" not in vars(experts)
    with pytest.raises(ValueError, match="nothing to pack: only fused experts are converted"):
        hf_nvfp4.export(model(recipe={"experts": "nvfp4"}), tmp_path / "nothing")


def test_trainer_lowers_the_loss_and_switches_precision(tmp_path):
    built = model(recipe="nvfp4")
    before = {name: p.detach().clone() for name, p in built.named_parameters()}
    data = [{"input_ids": ids, "labels": ids} for ids in torch.randint(64, (1, 16)).expand(40, 16)]
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=20,
        per_device_train_batch_size=2,
        learning_rate=5e-3,
        bf16=True,
        logging_steps=1,
        save_strategy="no",
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    callbacks = [hf_nvfp4.PrecisionSchedule(last=0.1), hf_nvfp4.QuantizationStats(10, tokens=32)]
    trainer = Trainer(built, arguments, train_dataset=data, callbacks=callbacks)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.5 * losses[0]
    assert built.get_submodule(NAME.format(0)).train_recipe.name == "nvfp4, all in bf16"
    assert not any(torch.equal(p, before[name]) for name, p in built.named_parameters() if "experts" in name)
