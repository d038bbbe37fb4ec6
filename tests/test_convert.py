"""Which layers are converted, and that everybody is told."""

import pytest
import torch
from torch import nn

from hf_nvfp4 import Cast, NVFP4Linear, NVFP4TrainingConfig, Recipe, quantize_model
from hf_nvfp4.convert import set_high_precision, summary
from hf_nvfp4.language import matches


def kept(model):
    return {d.name for d in model.nvfp4_decisions if not d.converted}


@pytest.mark.parametrize(
    ("pattern", "name", "expected"),
    [
        ("layers.1", "model.layers.1.mlp.up_proj", True),
        ("layers.1", "model.layers.11.mlp.up_proj", False),
        ("mlp.gate", "model.layers.0.mlp.gate_proj", False),
        ("mlp.gate_*", "model.layers.0.mlp.gate_proj", True),
        ("mlp.*", "model.layers.0.mlp.gate_proj", True),
        ("*.o_proj", "model.layers.0.self_attn.o_proj", True),
        ("o_proj", "model.layers.0.self_attn.o_proj", True),
        ("model.layers.?.self_attn", "model.layers.3.self_attn.q_proj", True),
        ("model.layers.?.self_attn", "model.layers.13.self_attn.q_proj", False),
    ],
)
def test_patterns_match_whole_components(pattern, name, expected):
    assert matches(pattern, name) == expected


def test_the_papers_choice_is_the_default(build, capsys):
    model = build("nvfp4")
    assert capsys.readouterr().out.strip() == (
        "hf_nvfp4: converted 21 of 29 linears (7 linears: kept, last 1 of 4 blocks in BF16; "
        "lm_head: kept, output head); recipe nvfp4, backend bf16: exact"
    )
    assert all(".3." in name for name in kept(model) - {"lm_head"})
    converted = {name for name, module in model.named_modules() if isinstance(module, NVFP4Linear)}
    assert converted == {d.name for d in model.nvfp4_decisions if d.converted}


def test_inexact_backends_say_so(build, capsys):
    build("fp8")
    assert "backend bf16: fp8_e4m3_block operands rounded to BF16" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("settings", "kept_blocks"),
    [
        ({"keep_bf16_last": 0}, set()),
        ({"keep_bf16_last": 2}, {2, 3}),
        ({"keep_bf16_first": 1, "keep_bf16_last": 0.5}, {0, 2, 3}),
        ({"keep_bf16_last": 0.1}, set()),
        ({"keep_bf16_last": 0, "skip": ["layers.1"]}, {1}),
    ],
)
def test_blocks_by_count_fraction_or_name(build, settings, kept_blocks):
    names = kept(build("nvfp4", **settings)) - {"lm_head"}
    assert {int(name.split(".")[2]) for name in names} == kept_blocks and len(names) == 7 * len(kept_blocks)


def test_a_skip_list_adds_to_the_output_head(build):
    model = build("nvfp4", keep_bf16_last=0, skip=["mlp.down_proj"])
    assert kept(model) == {f"model.layers.{i}.mlp.down_proj" for i in range(4)} | {"lm_head"}
    reasons = {d.reason for d in model.nvfp4_decisions}
    assert reasons == {"recipe nvfp4", "output head", "skip pattern 'mlp.down_proj'"}


def test_tied_heads_odd_sizes_and_adapters_are_kept():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(64, 32)
            self.good, self.odd, self.head = nn.Linear(32, 32), nn.Linear(32, 10), nn.Linear(32, 64, bias=False)
            self.lora_A = nn.Linear(32, 16)
            self.head.weight = self.embed.weight

    model = Model()
    reasons = {d.name: d.reason for d in quantize_model(model, NVFP4TrainingConfig())}
    assert reasons == {
        "good": "recipe nvfp4",
        "odd": "out_features=10 is not a multiple of 16",
        "head": "output head",
        "lora_A": "LoRA adapter",
    }
    assert type(model.odd) is nn.Linear


def test_subclasses_with_their_own_forward_are_kept():
    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    class FalconLinear(nn.Linear):
        def forward(self, x):
            return x @ self.weight.T + self.bias

    model = nn.Sequential(Doubled(16, 16), FalconLinear(16, 16))
    decisions = quantize_model(model, NVFP4TrainingConfig())
    assert [d.converted for d in decisions] == [False, True]
    assert "may compute something else" in decisions[0].reason


def test_a_forward_replaced_on_the_instance_is_not_reported_as_converted():
    from accelerate.hooks import ModelHook, add_hook_to_module

    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
    add_hook_to_module(model[0], ModelHook())
    decisions = quantize_model(model, NVFP4TrainingConfig())
    assert [d.converted for d in decisions] == [False, True] and "on the instance" in decisions[0].reason


def test_wrapped_and_classification_heads_are_kept(build):
    import peft
    from transformers import AutoModelForSequenceClassification

    for lora in ({"target_modules": ["lm_head"]}, {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}):
        model = peft.get_peft_model(build(), peft.LoraConfig(r=16, task_type="CAUSAL_LM", **lora))
        quantize_model(model, NVFP4TrainingConfig())
        assert not any(d.converted for d in model.nvfp4_decisions if "lm_head" in d.name)
    config = build().config
    config.num_labels = 16
    model = AutoModelForSequenceClassification.from_config(config)
    assert {d.name: d for d in quantize_model(model, NVFP4TrainingConfig())}["score"].reason == "output head"


def test_a_hadamard_size_that_does_not_divide_the_layer_is_cut_to_one_that_does():
    rotated = Cast(hadamard=32)
    recipe = Recipe("rotated", (rotated, rotated), (Cast(), Cast()), (Cast(), Cast()))
    decisions = quantize_model(nn.Sequential(nn.Linear(48, 64), nn.Linear(64, 48)), NVFP4TrainingConfig(recipe))
    assert decisions[0].reason == "recipe rotated, fprop rotated by 16, not 32, which does not divide 48"
    assert decisions[0].converted and decisions[1].reason == "recipe rotated"


def test_each_model_has_its_own_copy_of_the_config(build):
    config = NVFP4TrainingConfig()
    model = build()
    quantize_model(model, config)
    set_high_precision(model, "all")
    assert config.high_precision is None and model.config.quantization_config.high_precision == "all"


def test_the_summary_says_which_precision_is_active(build, capsys):
    build("nvfp4", high_precision="all")
    assert "recipe nvfp4, all in bf16, backend" in capsys.readouterr().out


def test_fused_experts_are_listed_not_passed_over():
    class TinyExperts(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate_up_proj = nn.Parameter(torch.zeros(2, 32, 16))

    model = nn.ModuleDict({"experts": TinyExperts(), "proj": nn.Linear(16, 16)})
    decisions = quantize_model(model, NVFP4TrainingConfig())
    assert [(d.name, d.converted) for d in decisions] == [("experts", False), ("proj", True)]


class Router(nn.Module):
    def __init__(self):
        super().__init__()
        self.down, self.up = nn.Linear(16, 16), nn.Linear(16, 16)


class Reader(nn.Module):
    """A mixer that calls one layer, multiplies by another's weight, does either with a third, and passes one on."""

    def __init__(self):
        super().__init__()
        self.called, self.read, self.both, self.passed_on = (nn.Linear(16, 16) for _ in range(4))

    def forward(self, x, fused=False):
        x = self.called(x).to(self.called.weight.dtype) @ self.read.weight.T + self.read.bias
        if isinstance(self.passed_on.weight, nn.Parameter):
            self.passed_on.weight = self.passed_on.weight.data
        x = torch.utils.checkpoint.checkpoint(self.passed_on, x)
        return x @ self.both.weight.T if fused else self.both(x)


def test_routers_of_experts_are_kept():
    moe = nn.ModuleDict({"gate": nn.Linear(16, 16), "experts": nn.ModuleList([nn.Linear(16, 16)])})
    model = nn.ModuleDict({"moe": moe, "choose": Router(), "mlp": nn.ModuleDict({"gate": nn.Linear(16, 16)})})
    decisions = quantize_model(model, NVFP4TrainingConfig())
    assert [d.name for d in decisions if d.converted] == ["moe.experts.0", "mlp.gate"]
    assert {d.reason for d in decisions if not d.converted} == {"router of experts"}


def test_a_layer_whose_weight_is_read_rather_than_called_is_not_reported_as_converted():
    reasons = {d.name: d.reason for d in quantize_model(Reader(), NVFP4TrainingConfig())}
    assert reasons == {
        "called": "recipe nvfp4",
        "read": "Reader multiplies by its weight without calling it",
        "both": "recipe nvfp4, except where Reader multiplies by its weight directly (fused kernels)",
        "passed_on": "recipe nvfp4",
    }


def test_of_a_multimodal_model_the_text_model_is_converted():
    import transformers

    from hf_nvfp4.tiny_configs import tiny_config

    model = transformers.Gemma3ForConditionalGeneration(tiny_config(transformers.Gemma3Config))
    decisions = quantize_model(model, NVFP4TrainingConfig(keep_bf16_last=0))
    for decision in decisions:
        assert decision.converted == ("language_model" in decision.name)
        assert decision.converted or decision.reason in ("not in the text model", "output head")
    assert {d.reason for d in decisions if "vision_tower" in d.name} == {"not in the text model"}


def test_from_config_and_from_pretrained_tell_the_model_alike(build):
    """Some models call their layers only where the config says that they are quantized."""
    assert build("nvfp4").config._is_quantized and "_is_quantized" not in build("nvfp4").config.to_dict()


@pytest.mark.parametrize(
    ("model", "settings", "message"),
    [
        (nn.ReLU(), {}, "has no linear layers"),
        (nn.Linear(10, 10), {}, "nothing to convert: converted 0 of 1 linears.*not a multiple of 16"),
        (nn.Sequential(nn.Linear(16, 16)), {"skip": ["lm_head"]}, "skip pattern 'lm_head' matches none of the 1"),
    ],
    ids=["no linears", "nothing converted", "pattern"],
)
def test_a_conversion_that_does_nothing_is_an_error(model, settings, message):
    with pytest.raises(ValueError, match=message):
        quantize_model(model, NVFP4TrainingConfig(**settings))


def test_converting_twice_is_an_error(build):
    with pytest.raises(ValueError, match=r"converted already \(recipe 'fp8'\)"):
        quantize_model(build("fp8"), NVFP4TrainingConfig())


def test_a_failed_conversion_changes_nothing(build):
    model = build()
    with pytest.raises(ValueError):
        quantize_model(model, NVFP4TrainingConfig(skip=["nothing"]))
    assert not any(isinstance(m, NVFP4Linear) for m in model.modules())
    assert getattr(model.config, "quantization_config", None) is None


def test_the_summary_names_few_and_counts_many(build):
    decisions = build("nvfp4", keep_bf16_last=0).nvfp4_decisions
    assert summary(decisions) == "converted 28 of 29 linears (lm_head: kept, output head)"
