"""Checkpoints that are loaded for inference: weights stay codes, or become codes one after the other."""

import ctypes
import gc
import json
import weakref
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, MixtralConfig, Qwen2Config

from hf_nvfp4 import NVFP4TrainingConfig, PackedLinear, export, importing, pack_model, quantize_model, use_recipe
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


@pytest.mark.parametrize("fused", ["shared", "own"])
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_a_packed_checkpoint_stays_as_it_is(trained, tmp_path, layout, fused, capsys):
    folder = trained()
    export(folder, tmp_path / "out", layout.name, fused=fused, calibration=[IDS])
    found = load_file(tmp_path / "out" / "model.safetensors")
    model = load(tmp_path / "out", recipe="quartet2")
    assert "converted 21 of 29 linears (8 linears: kept, not packed in the checkpoint)" in capsys.readouterr().out
    layers = packed_layers(model)
    assert len(layers) == 21 == sum(decision.converted for decision in model.nvfp4_decisions)
    for name, layer in layers.items():
        codes, scales, scale = (found[f"{name}.{part}"] for part in layout.parts[:3])
        assert layer.codes.equal(codes) and layer.scales.view(torch.uint8).equal(scales.view(torch.uint8))
        assert layer.tensor_scale.equal((1 / scale if layout is COMPRESSED else scale).reshape(()))
        assert "W4A16" in repr(layer)
    kept = [name for name in model.state_dict() if name in found and found[name].dtype == torch.bfloat16]
    assert len(kept) == 8 + 1 + 9 and all(model.state_dict()[name].equal(found[name]) for name in kept)
    shared = [layers[f"model.layers.0.self_attn.{n}_proj"].tensor_scale for n in "qkv"]
    assert (fused == "shared") == (len({float(scale) for scale in shared}) == 1)
    if fused == "own" and layout is not COMPRESSED:  # whose FP32 scales are exactly those of training
        as_trained = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
        assert logits(load(tmp_path / "out", "w4a4")).equal(logits(as_trained))
        assert logits(model).equal(logits(pack_model(as_trained)))


def test_transformers_compressed_tensors_computes_the_same(trained, tmp_path):
    pytest.importorskip("compressed_tensors")
    export(trained(), tmp_path / "out")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.bfloat16)
    ours = load(tmp_path / "out")
    a, b = logits(theirs).float(), logits(ours).float()
    assert (a - b).norm() / b.norm() < 2**-6
    for name, layer in packed_layers(ours).items():  # theirs are rounded to BF16
        weight = layer.quantized().dequantize(torch.float32)
        torch.testing.assert_close(theirs.get_submodule(name).weight.float(), weight, rtol=2**-8, atol=0)
        theirs.get_submodule(name).weight.data = layer.quantized().dequantize(torch.bfloat16)
    assert (logits(theirs).float() - a).norm() / a.norm() < 2**-8


def test_a_plain_checkpoint_is_rounded_to_nearest(build, tmp_path):
    build().save_pretrained(tmp_path)
    expected = load(tmp_path, inference=False, skip=["down_proj"])
    assert logits(load(tmp_path, "w4a4", skip=["down_proj"])).equal(logits(expected))
    assert logits(load(tmp_path, skip=["down_proj"])).equal(logits(pack_model(expected)))


@pytest.mark.parametrize("kind", [MixtralConfig, Qwen2Config])
def test_merged_experts_biases_and_tied_heads(llama_config, tmp_path, kind):
    sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
    config = kind(**{key: getattr(llama_config, key) for key in sizes}, num_hidden_layers=2, tie_word_embeddings=True)
    model = AutoModelForCausalLM.from_config(config)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    quantize_model(model, NVFP4TrainingConfig(keep_bf16_last=0))
    model.save_pretrained(tmp_path / "trained")
    export(tmp_path / "trained", tmp_path / "packed", "modelopt", fused="own")
    expected = pack_model(AutoModelForCausalLM.from_pretrained(tmp_path / "trained", dtype=torch.bfloat16))
    for folder in ("trained", "packed"):
        loaded = load(tmp_path / folder)
        assert logits(loaded).equal(logits(expected)), folder
        assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
        biases = [layer.bias for layer in packed_layers(loaded).values() if layer.bias is not None]
        assert len(biases) == (6 if kind is Qwen2Config else 0) and not any(b.requires_grad for b in biases)


def test_weights_that_transformers_splits_are_packed_each(build):
    model = build("nvfp4")
    names = [f"model.layers.0.{n}.weight" for n in ("self_attn.q_proj", "self_attn.k_proj", "input_layernorm")]
    missing = set(names)
    expected = pack_model(build("nvfp4"))
    split = {name: [model.get_parameter(name).detach()] for name in names}
    others = importing.Pack(False, []).convert(split, model=model, missing_keys=missing)
    assert others.keys() == missing == {names[2]}
    for name in names[:2]:
        layers = [one.get_submodule(name.removesuffix(".weight")) for one in (model, expected)]
        assert layers[0].codes.equal(layers[1].codes) and layers[0].tensor_scale.equal(layers[1].tensor_scale)


# ---- Memory --------------------------------------------------------------------------------------------------

LIBC = ctypes.CDLL(None)


def anonymous():
    """Bytes of this process's memory that are no file's, after what is free has been given back."""
    LIBC.malloc_trim(0)
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("RssAnon"))


@pytest.mark.skipif(not hasattr(LIBC, "malloc_trim"), reason="measures memory with glibc and /proc")
def test_one_weight_at_a_time_is_in_high_precision(tmp_path, monkeypatch):
    """96 MiB of linears in BF16; the plain file has FP32: what needs no conversion would lie in the mapped file."""
    sizes = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 3, "num_attention_heads": 8}
    model = AutoModelForCausalLM.from_config(LlamaConfig(vocab_size=256, **sizes))
    model.save_pretrained(tmp_path / "plain", max_shard_size="100MB")
    export(model, tmp_path / "packed", recipe=NVFP4TrainingConfig(keep_bf16_last=0))
    del model
    weights, most, put, quantize = [], [0], importing._put, importing.quantize_weight

    def watched_quantize(weight, *args):
        assert all(earlier() is None for earlier in weights)
        weights.append(weakref.ref(weight))
        return quantize(weight, *args)

    def watched_put(*args):
        put(*args)
        most[0] = max(most[0], anonymous())

    monkeypatch.setattr(importing, "quantize_weight", watched_quantize)
    monkeypatch.setattr(importing, "_put", watched_put)
    gc.collect()
    mib, before = {}, anonymous()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", dtype=torch.bfloat16)
    mib["in BF16"] = (anonymous() - before) / 2**20
    for name in ("plain", "packed"):
        del loaded
        gc.collect()
        most[0] = before = anonymous()
        loaded = load(tmp_path / name, **({"keep_bf16_last": 0} if name == "plain" else {}))
        mib[name] = (most[0] - before) / 2**20
        assert len(packed_layers(loaded)) == 21
    assert len(weights) == 21 and mib["in BF16"] > 90, mib
    assert mib["plain"] < 45, mib  # 27 of codes, 8 of one weight
    assert mib["packed"] < 10, mib  # codes stay in the mapped file


# ---- What such a model does ----------------------------------------------------------------------------------


def test_it_generates_and_compiles(trained):
    folder = trained()
    model = load(folder)
    expected = pack_model(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16))
    settings = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
    tokens = expected.generate(IDS, **settings)
    assert model.generate(IDS, **settings).equal(tokens) and tokens.shape == (2, 14)
    assert model.generate(IDS, cache_implementation="static", disable_compile=True, **settings).equal(tokens)
    assert logits(torch.compile(model, fullgraph=True, backend="aot_eager")).equal(logits(model))
    moved = model.half().to("cpu")
    assert moved.dtype == torch.float16 and logits(moved).isfinite().all()
    assert all(layer.scales.dtype == torch.float8_e4m3fn for layer in packed_layers(moved).values())


def test_it_is_not_trained_saved_or_exported(trained, tmp_path):
    from transformers import Trainer, TrainingArguments

    folder = trained()
    for model in (load(folder), pack_model(AutoModelForCausalLM.from_pretrained(folder))):
        assert not model.training and not any(p.requires_grad for p in model.parameters())
        with pytest.raises(ValueError, match="not saved.*hf_nvfp4.export the checkpoint that was trained"):
            model.save_pretrained(tmp_path / "out")
        assert model.push_to_hub is model.save_pretrained  # which would make a repository before it saves
        with pytest.raises(InputError, match="packed for inference.*Export the checkpoint that was trained"):
            export(model, tmp_path / "out")
        with pytest.raises(ValueError, match="no converted linear layers"), use_recipe(model, "bf16"):
            pass
        with pytest.raises(RuntimeError, match="gives no gradients.*load the checkpoint unpacked"):
            model.train()(input_ids=IDS, labels=IDS)
        data = [{"input_ids": row, "labels": row} for row in IDS]
        args = TrainingArguments(tmp_path / "runs", report_to="none", use_cpu=True, max_steps=1, disable_tqdm=True)
        trainer = Trainer(model, args, train_dataset=data, eval_dataset=data)
        assert trainer.evaluate()["eval_loss"] > 0
        with pytest.raises(RuntimeError, match="gives no gradients.*load the checkpoint unpacked"):
            trainer.train()
    assert not (tmp_path / "out").exists()


def test_inference_is_in_no_config_json(build, tmp_path):
    build("nvfp4").save_pretrained(tmp_path / "a")
    config = load(tmp_path / "a", "w4a4").config
    assert config.quantization_config.inference == "w4a4"
    config.save_pretrained(tmp_path / "b")
    saved = json.loads((tmp_path / "b" / "config.json").read_text())["quantization_config"]
    assert saved == NVFP4TrainingConfig().to_dict() and "inference" not in saved
    assert NVFP4TrainingConfig() != NVFP4TrainingConfig(inference=True) == NVFP4TrainingConfig(inference="w4a16")


# ---- What is refused -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"inference": "w4a8"}, "unknown choice of inference 'w4a8'; known: False, True, w4a16, w4a4"),
        ({"inference": 1.0}, "unknown choice of inference"),
        ({"inference": True, "backend": "bf16"}, "backend='bf16': packed layers choose theirs"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        NVFP4TrainingConfig(**settings)


def test_what_can_not_be_packed(trained, build, tmp_path):
    with pytest.raises(ValueError, match=r"layers\.0\S* can't be packed: recipe 'fp8': .*weights in fp8\S*, not NVFP4"):
        load(trained("fp8"))
    with pytest.raises(ValueError, match="recipe: checkpoint fp8, passed mxfp4.*nothing but inference"):
        load(tmp_path / "trained", recipe="mxfp4")
    with pytest.raises(ValueError, match="call hf_nvfp4.pack_model"):
        quantize_model(build(), NVFP4TrainingConfig(inference=True))
    export(build("nvfp4"), tmp_path / "packed")
    for settings, message in (
        ({"skip": ["o_proj"], "keep_bf16_last": 1}, "says itself which layers are packed: leave out skip and keep"),
        ({"recipe": {"self_attn.*": "nvfp4"}}, r"layers\.0\.mlp\.\S* is packed in the checkpoint, and no pattern"),
        ({"recipe": "mxfp4"}, "can't be packed: recipe 'mxfp4'"),
    ):
        with pytest.raises(ValueError, match=message):
            load(tmp_path / "packed", **settings)
    config = NVFP4TrainingConfig(inference=True)
    with pytest.raises(ValueError, match="offloaded to disk"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "packed", quantization_config=config, device_map={"": "disk"})


@pytest.mark.parametrize("wrong", ["nan", "shape", "lost"])
def test_damaged_plain_weights(trained, wrong):
    file = trained() / "model.safetensors"
    state, name = load_file(file), "model.layers.1.mlp.up_proj.weight"
    changes = {
        "nan": (lambda t: t.fill_(torch.nan), "up_proj.weight holds NaN or inf"),
        "shape": (lambda t: t[:80].contiguous(), r"up_proj.weight is \[80, 64\], and \[96, 64\] in the model"),
        "lost": (lambda t: None, "lacks the weights of 1 linear layers, such as model.layers.1.mlp.up_proj"),
    }
    change, message = changes[wrong]
    if (new := change(state.pop(name))) is not None:
        state[name] = new
    save_file(state, file, metadata={"format": "pt"})
    with pytest.raises(InputError, match=message):
        load(file.parent)
