"""Packed checkpoints load as the plain weights that they stand for, exactly, or are refused in words."""

import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, MixtralConfig

from hf_nvfp4 import Cast, NVFP4Linear, NVFP4TrainingConfig, export, quantize, quantize_model
from hf_nvfp4.data import InputError
from hf_nvfp4.layouts import COMPRESSED, LAYOUTS, MODELOPT, layout_of
from hf_nvfp4.linear import quantized_linears

LAYER = "model.layers.0.self_attn.q_proj"


@pytest.fixture
def packed(build, tmp_path):
    """packed(format): the folder of an export."""

    def make(format="compressed-tensors", **options):
        export(build("nvfp4"), tmp_path / "packed", format, **options)
        return tmp_path / "packed"

    return make


def load(folder, **options):
    options = {"quantization_config": NVFP4TrainingConfig(), "dtype": torch.float32} | options
    return AutoModelForCausalLM.from_pretrained(folder, **options)


def by_hand(codes, scales, tensor_scale):
    """Codes times scales, written out: the published definition."""
    grid = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
    values = grid[torch.stack((codes & 15, codes >> 4), -1).flatten(1).long()]
    return values * scales.float().repeat_interleave(16, 1) * tensor_scale


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_weights_are_dequantized_exactly_for_training(packed, tmp_path, layout):
    folder = packed(layout.name, calibration=[torch.randint(0, 256, (1, 16))])
    found = load_file(folder / "model.safetensors")
    model = load(folder)
    assert model.dtype == torch.float32 and model.config.quantization_config.recipe.name == "nvfp4"
    assert len(quantized_linears(model)) == 21
    for name, linear in quantized_linears(model).items():
        codes, scales, scale = (found[f"{name}.{part}"] for part in layout.parts[:3])
        assert torch.equal(linear.weight, by_hand(codes, scales, 1 / scale if layout is COMPRESSED else scale))
    kept = "model.layers.3.mlp.up_proj.weight"
    assert torch.equal(model.get_parameter(kept), found[kept].float())
    tokens = torch.randint(0, 256, (2, 16))
    model.train()
    model(input_ids=tokens, labels=tokens).loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    model.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert again.config.quantization_config.quant_method == "nvfp4_training"
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    assert isinstance(again.model.layers[0].mlp.up_proj, NVFP4Linear)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_experts_stay_in_bf16_and_engines_are_told(llama_config, tmp_path, layout):
    sizes = {key: getattr(llama_config, key) for key in ("vocab_size", "hidden_size", "intermediate_size")}
    config = MixtralConfig(**sizes, num_hidden_layers=2, num_attention_heads=4, num_local_experts=4)
    model = AutoModelForCausalLM.from_config(config)
    quantize_model(model, NVFP4TrainingConfig(keep_bf16_last=0))
    model.save_pretrained(tmp_path / "trained")
    export(tmp_path / "trained", tmp_path / "packed", layout.name, fused="own")
    ignored = json.loads((tmp_path / "packed" / "config.json").read_text())["quantization_config"]["ignore"]
    experts = [name for name in ignored if "experts" in name and name.endswith((".", "*"))]
    assert len(experts) == 2 and any(name.endswith("gate") for name in ignored)
    if layout is COMPRESSED:
        names = sorted(_experts(tmp_path))  # 4 experts of 3 matrices in each of 2 layers
        assert [sum(bool(re.match(one.removeprefix("re:"), name)) for name in names) for one in experts] == [12, 12]
    loaded = load(tmp_path / "packed", quantization_config=NVFP4TrainingConfig(keep_bf16_last=0))
    name = "model.layers.1.mlp.experts.down_proj"
    assert torch.equal(loaded.get_parameter(name), model.get_parameter(name).bfloat16().float())
    name = "model.layers.1.self_attn.o_proj.weight"
    exact = quantize(model.get_parameter(name).detach().bfloat16(), Cast(square=True)).dequantize()
    torch.testing.assert_close(loaded.get_parameter(name).detach(), exact, rtol=2**-22, atol=0)


def _experts(folder):
    names = load_file(folder / "packed" / "model.safetensors")
    return [name.removesuffix(".weight") for name in names if ".experts." in name]


def test_both_formats_hold_the_same_model(build, tmp_path):
    model = build("nvfp4_4over6")
    for name in LAYOUTS:
        export(model, tmp_path / name, name)
    a, b = (dict(load(tmp_path / name).named_parameters()) for name in LAYOUTS)
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=2**-22, atol=0)


def test_modelopt_loads_for_inference_without_a_config(packed):
    folder = packed("modelopt")
    plain = AutoModelForCausalLM.from_pretrained(folder)
    assert getattr(plain.config, "quantization_config", None) is None and plain.dtype == torch.bfloat16
    assert not any(isinstance(module, NVFP4Linear) for module in plain.modules())
    master = load(folder)
    assert all(torch.equal(a, b.bfloat16()) for a, b in zip(plain.parameters(), master.parameters(), strict=True))
    emulated = load(folder, quantization_config=NVFP4TrainingConfig("bf16"), dtype=torch.bfloat16)
    tokens = torch.randint(0, 256, (2, 16))
    with torch.no_grad():
        torch.testing.assert_close(plain(tokens).logits, emulated(tokens).logits)
        assert plain.generate(tokens[:1], max_new_tokens=3, do_sample=False).shape == (1, 19)


def test_an_export_of_an_import_has_the_same_weights(packed, tmp_path):
    folder = packed("modelopt", fused="own")
    export(load(folder), tmp_path / "second", "modelopt", fused="own")
    first, second = (load_file(f / "model.safetensors") for f in (folder, tmp_path / "second"))
    assert first.keys() == second.keys()
    for name in first:
        if name.endswith("proj.weight") and first[name].dtype == torch.uint8:
            layer = name.removesuffix(".weight")
            a, b = (by_hand(*(f[f"{layer}.{part}"] for part in MODELOPT.parts[:3])) for f in (first, second))
            assert (a - b).norm() / a.norm() < 0.01


def test_sharded_checkpoints_load(build, tmp_path, monkeypatch):
    monkeypatch.setattr("hf_nvfp4.shards.SHARD_BYTES", 20_000)
    model = build("nvfp4")
    export(model, tmp_path / "many")
    monkeypatch.undo()
    export(model, tmp_path / "one")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 4
    a, b = (load(tmp_path / name).state_dict() for name in ("many", "one"))
    assert all(torch.equal(a[name], b[name]) for name in a)
    lost = sorted((tmp_path / "many").glob("*.safetensors"))[1]
    whole = lost.read_bytes()
    lost.write_bytes(whole[:-10])
    with pytest.raises(InputError, match="truncated or damaged"):
        load(tmp_path / "many")
    lost.unlink()
    with pytest.raises(InputError, match=f"lacks 1 of .* shards: {lost.name}"):
        load(tmp_path / "many")
    lost.write_bytes(sorted((tmp_path / "many").glob("*.safetensors"))[0].read_bytes())
    with pytest.raises(InputError, match="misnamed or mixed up"):
        load(tmp_path / "many")


# A checkpoint's part -> what is done to it, and what the refusal says.
DAMAGES = {
    "scales of another dtype": ("weight_scale", lambda t: t.float(), "weight_scale is F32"),
    "scales of another shape": ("weight_scale", lambda t: t[:, :-1].contiguous(), r"F8_E4M3 \[64, 3\]"),
    "codes of another shape": ("codes", lambda t: t[:-1].contiguous(), r"U8 \[63, 32\]"),
    "a tensor scale of another dtype": ("tensor_scale", lambda t: t.half(), "is F16"),
    "a tensor scale of another shape": ("tensor_scale", lambda t: t.expand(3).clone(), r"F32 \[3\]"),
    "a tensor scale of zero": ("tensor_scale", torch.zeros_like, "is zero"),
    "a tensor scale that is NaN": ("tensor_scale", lambda t: t * torch.nan, "is nan"),
    "a tensor scale that is infinite": ("tensor_scale", lambda t: t * torch.inf, "is inf"),
    "a negative tensor scale": ("tensor_scale", lambda t: -t, "is -"),
    "a block scale that is NaN": ("weight_scale", lambda t: _poisoned(t, 0x7F), "weight_scale is NaN in places"),
    "a negative block scale": ("weight_scale", lambda t: _poisoned(t, 0xB0), "weight_scale is negative in places"),
    "no scales": ("weight_scale", lambda t: None, "no .*weight_scale, which"),
    "no tensor scale": ("tensor_scale", lambda t: None, "incomplete"),
    "no weight at all": ("all", lambda t: None, "lacks the weights of 1 of 29"),
}


def _poisoned(scales, byte):
    bytes_ = scales.view(torch.uint8).clone()
    bytes_[3, 1] = byte
    return bytes_.view(torch.float8_e4m3fn)


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_damaged_tensors_are_refused(packed, layout, damage):
    folder = packed(layout.name)
    file = folder / "model.safetensors"
    state = load_file(file)
    which, change, match = DAMAGES[damage]
    parts = layout.parts if which == "all" else [getattr(layout, which, which)]
    for part in parts:
        if (tensor := state.pop(f"{LAYER}.{part}", None)) is not None and (new := change(tensor)) is not None:
            state[f"{LAYER}.{part}"] = new
    save_file(state, file, metadata={"format": "pt"})
    with pytest.raises(InputError, match=match) as error:
        load(folder)
    assert LAYER in str(error.value)


def test_weights_that_have_no_place_in_the_model_are_refused(packed):
    folder = packed()
    file = folder / "model.safetensors"
    state = load_file(file)
    experts = {f"model.layers.0.mlp.experts.3.w1.{p}": state[f"{LAYER}.{p}"].clone() for p in COMPRESSED.parts[:3]}
    save_file(state | experts, file, metadata={"format": "pt"})
    with pytest.raises(InputError, match="experts.3.w1, which is no linear layer"):
        load(folder)
    save_file(state | {f"{LAYER}.pre_quant_scale": torch.ones(64)}, file, metadata={"format": "pt"})
    with pytest.raises(InputError, match="pre_quant_scale: its weights are not codes and scales alone"):
        load(folder)
    save_file(state, file, metadata={"format": "pt", "hf_nvfp4_export": "2"})
    with pytest.raises(InputError, match="export version 2.*Upgrade"):
        load(folder)


def test_formats_that_we_do_not_know_are_refused(packed):
    folder = packed()
    whole = json.loads((folder / "config.json").read_text())
    details = whole["quantization_config"]
    group = details["config_groups"]["group_0"]
    integers = {"group_0": group | {"weights": group["weights"] | {"type": "int"}}}
    others = (
        (details | {"format": "pack-quantized"}, "format pack-quantized"),
        (details | {"config_groups": integers}, "weights of type int"),
        (details | {"quantization_status": "frozen"}, "quantization_status 'frozen'"),
        (details | {"transform_config": {"R1": {}}}, "transform_config"),
        (details | {"config_groups": {}}, "without config_groups"),
        ({"quant_method": "modelopt", "quant_algo": "FP8"}, "quant_algo 'FP8'"),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4", "group_size": 32}, "group_size 32"),
        ({"quant_method": "gptq", "bits": 4}, "quantized by gptq"),
        ({"quant_method": "from_the_future"}, "quantized by from_the_future"),
    )
    for config, match in others:
        (folder / "config.json").write_text(json.dumps(whole | {"quantization_config": config}))
        with pytest.raises(InputError, match=match) as error:
            load(folder)
        assert "nvfp4-pack-quantized" in str(error.value)
    del whole["quantization_config"]
    (folder / "config.json").write_text(json.dumps(whole))
    with pytest.raises(InputError, match="neither its config.json nor an hf_quant_config.json"):
        load(folder)


def test_a_modelopt_checkpoint_may_say_what_it_is_in_hf_quant_config_alone(packed):
    folder = packed("modelopt")
    whole = json.loads((folder / "config.json").read_text())
    expected = load(folder).state_dict()
    del whole["quantization_config"]
    (folder / "config.json").write_text(json.dumps(whole))
    found = load(folder).state_dict()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_layouts_are_told_by_what_public_checkpoints_say():
    llm_compressor = {
        "config_groups": {
            "group_0": {
                "input_activations": {"dynamic": "local", "num_bits": 4, "group_size": 16, "type": "float"},
                "weights": {"num_bits": 4, "group_size": 16, "type": "float", "strategy": "tensor_group"},
                "targets": ["Linear"],
            }
        },
        "format": "nvfp4-pack-quantized",
        "ignore": ["lm_head"],
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
    }
    assert layout_of(llm_compressor) is COMPRESSED
    nvidia = {"producer": {"name": "modelopt", "version": "0.23.0"}, "quantization": {"quant_algo": "NVFP4"}}
    assert layout_of(nvidia) is MODELOPT
    assert layout_of({"quant_algo": "NVFP4", "quant_method": "modelopt", "ignore": ["lm_head"]}) is MODELOPT
