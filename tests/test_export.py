"""Exports: the very weights that training multiplied, in the published layouts, whole or not at all."""

import errno
import importlib.util
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from hf_nvfp4 import RECIPES, NVFP4TrainingConfig, Recipe, export, quantize, quantize_model, shards
from hf_nvfp4.backends import BACKENDS
from hf_nvfp4.casts import Cast
from hf_nvfp4.convert import set_high_precision
from hf_nvfp4.data import InputError
from hf_nvfp4.gemm import cast
from hf_nvfp4.layouts import COMPRESSED, LAYOUTS, MODELOPT, nearest_inverse
from hf_nvfp4.linear import quantized_linears
from hf_nvfp4.packing import train_tokenizer
from hf_nvfp4.reference import pack, quantize_rows
from hf_nvfp4.weights import quantize_weight, under_scale, why_not

EXPORTED = ("nvfp4", "nvfp4_4over6", "nvfp4_hopper", "quartet2", "nvfp4_best")
REFUSED = ("mxfp4", "mxfp8", "fp8", "fp8_tensor", "fp4_dge", "halo1", "quartet", "tetrajet2_base", "bf16", "fp4_mixed")


@pytest.fixture
def saved(build, tmp_path):
    """saved(recipe): a folder with a checkpoint of the Llama, its weights of uneven magnitudes, and a tokenizer."""

    def make(recipe="nvfp4", **settings):
        folder = tmp_path / "trained"
        model = build(recipe, **settings)
        for number, linear in enumerate(quantized_linears(model).values()):
            linear.weight.data.mul_(1 + number / 8)
        model.save_pretrained(folder)
        (folder / "tokenizer.json").write_text("{}")
        (folder / "training_args.bin").write_bytes(b"a pickle")
        return folder

    return make


def tensors(folder):
    """Name -> tensor of all shards."""
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def multiplied(folder):
    """Layer -> (recipe, operand of w in the training forward), of a checkpoint that is trained in BF16 autocast."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    operands = {}
    for name, linear in quantized_linears(model).items():
        weight = linear.weight.detach().bfloat16()
        recipe = linear.train_recipe
        operands[name] = recipe, cast(weight, BACKENDS["bf16"], row=recipe.fprop.b)[0].dequantize(torch.float32)
    return operands


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("recipe", EXPORTED)
def test_exported_weights_are_what_the_training_forward_multiplied(saved, tmp_path, recipe, layout):
    folder = saved(recipe)
    export(folder, tmp_path / "out", layout.name, fused="own")
    found, operands = tensors(tmp_path / "out"), multiplied(folder)
    assert len(operands) in (21, 28)
    master = tensors(folder)
    for name, (recipe, operand) in operands.items():
        packed = layout.read({part: found[f"{name}.{part}"] for part in layout.parts if f"{name}.{part}" in found})
        ours = quantize(master[f"{name}.weight"].bfloat16(), recipe.fprop.b)
        assert torch.equal(packed.codes, ours.codes)
        assert torch.equal(packed.scales.view(torch.uint8), ours.scales.view(torch.uint8))
        if layout is MODELOPT:
            assert torch.equal(packed.dequantize(), operand)
        else:  # a scale stored as its inverse loses one unit in the last place at most
            torch.testing.assert_close(packed.dequantize(), operand, rtol=2**-22, atol=0)
            assert packed.tensor_scale.item() == pytest.approx(ours.tensor_scale.item(), rel=2**-23)


@pytest.mark.parametrize("recipe", EXPORTED)
def test_a_weight_is_quantized_in_slices_as_it_is_whole(monkeypatch, recipe):
    monkeypatch.setattr("hf_nvfp4.weights.ELEMENTS", 64 * 50)
    weight = torch.randn(208, 64).bfloat16()
    sliced, whole = quantize_weight(weight, RECIPES[recipe]), quantize(weight, RECIPES[recipe].fprop.b)
    assert torch.equal(sliced.codes, whole.codes) and torch.equal(sliced.tensor_scale, whole.tensor_scale)
    assert torch.equal(sliced.scales.view(torch.uint8), whole.scales.view(torch.uint8))


def test_inverses_of_scales_are_the_nearest_there_are():
    scales = torch.rand(10000) + 1
    back = 1.0 / nearest_inverse(scales)
    small = scales < 2**0.5
    assert torch.equal(back[small], scales[small])
    assert ((back - scales).abs() <= 2**-23).all()
    assert (back != scales).any() and (back != scales).sum() <= ((1.0 / (1.0 / scales)) != scales).sum()


def test_the_compute_dtype_of_training_decides(saved, tmp_path):
    folder = saved()
    name = "model.layers.1.mlp.down_proj"
    weight = tensors(folder)[f"{name}.weight"]
    codes = {}
    for dtype in (torch.bfloat16, torch.float32):
        summary = export(folder, tmp_path / str(dtype), "modelopt", dtype=dtype)
        codes[dtype] = tensors(tmp_path / str(dtype))[f"{name}.weight"]
        assert torch.equal(codes[dtype], quantize(weight.to(dtype), RECIPES["nvfp4"].fprop.b).codes)
        assert ("rounded to bfloat16" in summary.describe()) == (dtype == torch.bfloat16)
    assert not torch.equal(*codes.values())


def test_fused_layers_share_a_scale_and_the_summary_says_what_it_cost(saved, tmp_path):
    folder = saved("nvfp4")
    summary = export(folder, tmp_path / "out", "modelopt")
    found, operands = tensors(tmp_path / "out"), multiplied(folder)
    assert len(summary.requantized) == 6
    assert "share one tensor scale" in summary.describe()
    for group, reported in summary.requantized.items():
        parent, _, leaves = group.rpartition(".")
        members = [f"{parent}.{leaf}" for leaf in leaves.split("/")]
        scales = [found[f"{member}.weight_scale_2"] for member in members]
        assert all(torch.equal(scale, scales[0]) for scale in scales)
        parts = MODELOPT.parts[:3]
        new = [MODELOPT.read({p: found[f"{m}.{p}"] for p in parts}).dequantize() for m in members]
        old = [operands[member][1] for member in members]
        assert any(torch.equal(a, b) for a, b in zip(new, old, strict=True)), "the largest stays as it is"
        square, total = (sum(float(t.square().sum()) for t in part) for part in (map(torch.sub, new, old), old))
        assert reported == pytest.approx((square / total) ** 0.5, rel=1e-5)
        assert 0 < reported < 0.05
    alone = [name for name in operands if name.endswith(("o_proj", "down_proj"))]
    for name in alone:
        packed = MODELOPT.read({part: found[f"{name}.{part}"] for part in MODELOPT.parts[:3]})
        assert torch.equal(packed.dequantize(), operands[name][1])


def test_rescaling_moves_weights_less_than_quantizing_anew():
    weight = torch.randn(256, 256).bfloat16()
    for recipe in EXPORTED:
        trained = quantize(weight, RECIPES[recipe].fprop.b)
        for ratio in (1.07, 1.37, 1.9):
            wider = torch.cat((weight, torch.zeros(16, 256).bfloat16()))
            wider[-1, -1] = weight.abs().max().float() * ratio
            anew = quantize(wider, RECIPES[recipe].fprop.b)
            rescaled = under_scale(trained, anew.tensor_scale).dequantize()
            reference = trained.dequantize()
            moved, moved_anew = ((t - reference).norm() for t in (rescaled, anew.dequantize()[:256]))
            assert moved < 0.5 * moved_anew


def test_transformers_compressed_tensors_reads_it_as_our_weights(saved, tmp_path):
    pytest.importorskip("compressed_tensors")
    folder = saved("nvfp4")
    export(folder, tmp_path / "out", fused="own")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.bfloat16)
    ours = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    plain = AutoModelForCausalLM.from_config(ours.config, dtype=torch.bfloat16)
    plain.load_state_dict(ours.state_dict())
    for name, (_, operand) in multiplied(folder).items():
        plain.get_submodule(name).weight.data.copy_(operand)
    tokens = torch.randint(0, 256, (2, 48))
    with torch.no_grad():
        a, b = theirs(tokens).logits.float(), plain.eval()(tokens).logits.float()
    weights = dict(theirs.named_parameters())
    different = total = 0
    for name in quantized_linears(ours):
        a_w, b_w = weights[f"{name}.weight"], plain.get_submodule(name).weight
        torch.testing.assert_close(a_w.float(), b_w.float(), rtol=2**-7, atol=0)
        different, total = different + int((a_w != b_w).sum()), total + b_w.numel()
    assert different / total < 1e-4  # where two roundings to FP32 meet a tie of BF16
    assert (a - b).norm() / b.norm() < 2**-8


# Name, dtype, shape: NVIDIA's documentation of unified Hugging Face checkpoints and vLLM's readers of both formats.
PUBLISHED = {
    "compressed-tensors": {
        "weight_packed": (torch.uint8, (32, 32)),
        "weight_scale": (torch.float8_e4m3fn, (32, 4)),
        "weight_global_scale": (torch.float32, (1,)),
    },
    "modelopt": {
        "weight": (torch.uint8, (32, 32)),
        "weight_scale": (torch.float8_e4m3fn, (32, 4)),
        "weight_scale_2": (torch.float32, ()),
    },
}


@pytest.mark.parametrize("format", PUBLISHED)
def test_the_layout_is_the_published_one(saved, tmp_path, format):
    folder = saved()
    export(folder, tmp_path / "out", format)
    found = tensors(tmp_path / "out")
    prefix = "model.layers.0.self_attn.k_proj."
    have = {n.removeprefix(prefix): (t.dtype, tuple(t.shape)) for n, t in found.items() if n.startswith(prefix)}
    assert have == PUBLISHED[format]
    assert found["model.layers.3.self_attn.k_proj.weight"].dtype == torch.bfloat16
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    details = config["quantization_config"]
    kept = [f"model.layers.3.{n}" for n in ("self_attn.q_proj", "mlp.down_proj")] + ["lm_head"]
    assert set(kept) <= set(details["ignore"]) and len(details["ignore"]) == 8
    assert config["dtype"] == "bfloat16"
    if format == "modelopt":
        file = json.loads((tmp_path / "out" / "hf_quant_config.json").read_text())
        assert file["quantization"]["quant_algo"] == details["quant_algo"] == "W4A16_NVFP4"
        assert file["quantization"]["exclude_modules"] == details["ignore"]
        assert file["quantization"]["group_size"] == 16
    else:
        assert details["format"] == "nvfp4-pack-quantized"
        assert details["config_groups"]["group_0"]["input_activations"] is None
    names = {p.name for p in (tmp_path / "out").iterdir()}
    assert "tokenizer.json" in names and "generation_config.json" in names and "training_args.bin" not in names


def test_plain_is_bf16_without_a_quantization_config(saved, tmp_path):
    folder = saved("mxfp4")
    export(folder, tmp_path / "out", "plain")
    found, master = tensors(tmp_path / "out"), tensors(folder)
    assert found.keys() == master.keys()
    assert all(torch.equal(found[name], master[name].bfloat16()) for name in found)
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").dtype == torch.bfloat16
    modes = {(tmp_path / "out" / name).stat().st_mode for name in ("config.json", "model.safetensors")}
    assert len(modes) == 1  # whoever may read the one may read the other


def test_a_model_and_its_folder_export_the_same(saved, tmp_path, build):
    folder = saved("nvfp4_4over6")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    export(folder, tmp_path / "a")
    export(model, tmp_path / "b")
    a, b = tensors(tmp_path / "a"), tensors(tmp_path / "b")
    assert a.keys() == b.keys()
    assert all(torch.equal(a[n].view(torch.uint8), b[n].view(torch.uint8)) for n in a if a[n].dim())
    a, b = (json.loads((tmp_path / n / "config.json").read_text()) for n in "ab")
    assert a["quantization_config"] == b["quantization_config"]
    assert next(model.parameters()).dtype == torch.float32 and model.nvfp4_decisions


def test_one_shard_is_read_at_a_time_and_written_at_a_limit(saved, tmp_path, monkeypatch):
    folder = saved()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    shutil.rmtree(folder)
    model.save_pretrained(folder, max_shard_size="100KB")
    sources = sorted(folder.glob("*.safetensors"))
    assert len(sources) > 4
    limit, now, most, held = 20_000, [0], [0], []

    class Counted:
        def __init__(self, file):
            self.shard = open_shard(file)

        def __enter__(self):
            now[0] += 1
            most[0] = max(most[0], now[0])
            return self.shard.__enter__()

        def __exit__(self, *args):
            now[0] -= 1
            return self.shard.__exit__(*args)

    def add(folder, name, tensor):
        plain_add(folder, name, tensor)
        held.append(folder._pending_bytes)

    open_shard, plain_add = shards.open_shard, shards.Folder.add
    monkeypatch.setattr(shards, "open_shard", Counted)
    monkeypatch.setattr(shards, "SHARD_BYTES", limit)
    monkeypatch.setattr(shards.Folder, "add", add)
    export(folder, tmp_path / "out")
    assert most == [1] and max(held) < limit
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 4
    found = {}
    for file in files:
        with safe_open(file, "pt") as shard:
            assert shard.metadata()["format"] == "pt"
            found |= dict.fromkeys(shard.keys(), file.name)
    assert found == index["weight_map"]
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors(tmp_path / "out").values())
    monkeypatch.undo()
    export(folder, tmp_path / "whole")
    a, b = tensors(tmp_path / "out"), tensors(tmp_path / "whole")
    assert a.keys() == b.keys() and all(torch.equal(a[n].float(), b[n].float()) for n in a)


def test_tied_weights_are_written_once(llama_config, tmp_path):
    llama_config.tie_word_embeddings = True
    model = AutoModelForCausalLM.from_config(llama_config)
    quantize_model(model, NVFP4TrainingConfig())
    model.save_pretrained(tmp_path / "trained")
    for source, out in ((model, "a"), (tmp_path / "trained", "b")):
        export(source, tmp_path / out, "plain")
        assert "lm_head.weight" not in tensors(tmp_path / out)
        again = AutoModelForCausalLM.from_pretrained(tmp_path / out)
        assert again.lm_head.weight is again.model.embed_tokens.weight
        assert torch.equal(again.lm_head.weight, model.lm_head.weight.bfloat16())


def test_the_table_counts_what_is_on_disk(saved, tmp_path):
    summary = export(saved(), tmp_path / "out")
    packed, kept, everything = summary.rows()
    found = tensors(tmp_path / "out")
    assert everything["bytes"] == sum(t.nbytes for t in found.values())
    assert packed["parameters"] == 3 * (64 * 64 * 2 + 64 * 32 * 2 + 64 * 96 * 3)
    assert packed["share"] == pytest.approx(0.28125, abs=0.001) and kept["share"] == 1
    assert "| packed | 21 | 92,160 |" in summary.table()


@pytest.mark.parametrize("recipe", REFUSED)
def test_recipes_whose_forward_is_not_nvfp4_are_refused_in_words(saved, tmp_path, recipe):
    with pytest.raises(InputError, match="format='plain'"):
        export(saved(recipe), tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["trained"]


def test_why_not_knows_every_reason():
    def recipe(x, w, **also):
        bf16 = (Cast("bf16"), Cast("bf16"))
        return Recipe("r", (x, w), bf16, bf16, **also)

    rn, rotated, rows = Cast(), Cast(hadamard=16), Cast(outer="row")
    assert "rotated by 16" in why_not(recipe(rotated, rotated))
    assert "rotated by 32" in why_not(recipe(rn, rn, basis=32))
    assert "per-row" in why_not(recipe(rn, rows))
    assert "stochastic" in why_not(recipe(rn, Cast(rounding="stochastic"))) or "SR" in why_not(
        recipe(rn, Cast(rounding="stochastic"))
    )
    assert "scaled by x" in why_not(recipe(rn, rn, smooth=True))
    assert "high precision" in why_not(recipe(rn, rn, split="outliers"))
    assert "fp8_e4m3" in why_not(recipe(Cast("fp8_e4m3"), rn))
    weight_only = recipe(Cast("bf16"), rn)
    assert why_not(weight_only) is None and "bf16" in why_not(weight_only, activations=True)
    assert [name for name in EXPORTED if why_not(RECIPES[name], activations=True)] == []


def test_a_forward_switched_to_bf16_is_refused(build, tmp_path):
    model = build("nvfp4")
    set_high_precision(model, "forward")
    with pytest.raises(InputError, match="forward in bf16"):
        export(model, tmp_path / "out")
    model.save_pretrained(tmp_path / "trained")
    with pytest.raises(InputError, match="forward in bf16"):
        export(tmp_path / "trained", tmp_path / "out")


def test_a_plain_checkpoint_needs_a_recipe(build, tmp_path):
    model = build()
    with pytest.raises(InputError, match="recipe='nvfp4'"):
        export(model, tmp_path / "out")
    config = NVFP4TrainingConfig("nvfp4", skip=["k_proj", "up_proj"], keep_bf16_last=0)
    summary = export(model, tmp_path / "out", recipe=config)
    assert len(summary.packed) == 20 and summary.recipe == "nvfp4" and not summary.requantized
    assert "packed in part" in summary.describe()
    trained = build("nvfp4")
    export(trained, tmp_path / "other", "modelopt", recipe="quartet2", fused="own")
    found = tensors(tmp_path / "other")
    ours = quantize(trained.model.layers[0].mlp.up_proj.weight.detach().bfloat16(), RECIPES["quartet2"].fprop.b)
    assert torch.equal(found["model.layers.0.mlp.up_proj.weight"], ours.codes)


# ---- Bad input ---------------------------------------------------------------------------------------------


def refused(source, tmp_path, match, **options):
    """The export is refused in words that match, and leaves nothing."""
    before = sorted(tmp_path.iterdir())
    with pytest.raises(InputError, match=match):
        export(source, tmp_path / "out", **options)
    assert sorted(tmp_path.iterdir()) == before


def test_damaged_sources_are_refused(saved, tmp_path):
    folder = saved()
    file = folder / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-100])
    refused(folder, tmp_path, "truncated or damaged")
    file.write_bytes(whole[:4])
    refused(folder, tmp_path, "truncated or damaged")
    file.unlink()
    refused(folder, tmp_path, "Only safetensors")
    (folder / "pytorch_model.bin").write_bytes(b"a pickle")
    refused(folder, tmp_path, "it has .*pytorch_model.bin")
    file.write_bytes(whole)
    state = load_file(file)
    dropped = {n: t for n, t in state.items() if n != "model.norm.weight"}
    save_file(dropped, file, metadata={"format": "pt"})
    refused(folder, tmp_path, "lacks 1 tensors of the model, such as model.norm.weight")
    refused(folder, tmp_path, "lacks 1 tensors of the model, such as model.norm.weight", format="plain")
    dropped = {n: t for n, t in state.items() if n != "model.layers.0.mlp.up_proj.weight"}
    save_file(dropped, file, metadata={"format": "pt"})
    refused(folder, tmp_path, "up_proj.weight is not in the checkpoint")
    save_file(state | {"model.layers.0.mlp.up_proj.weight": torch.zeros(32, 64)}, file, metadata={"format": "pt"})
    refused(folder, tmp_path, "don't belong")
    state["model.layers.1.mlp.up_proj.weight"][3, 5] = torch.nan
    save_file(state, file, metadata={"format": "pt"})
    refused(folder, tmp_path, "layers.1.mlp.up_proj.weight holds NaN")
    (folder / "config.json").write_text("{")
    refused(folder, tmp_path, "not readable JSON")
    refused(tmp_path / "nowhere", tmp_path, "not a folder")


def test_a_packed_folder_is_not_exported_again(saved, tmp_path):
    export(saved(), tmp_path / "packed")
    refused(tmp_path / "packed", tmp_path, "quantized by compressed-tensors already")


def test_missing_and_misnamed_shards_are_refused(saved, tmp_path):
    folder = saved()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="100KB")
    first, second, *_ = sorted(folder.glob("*.safetensors"))
    first.rename(tmp_path / "aside")
    refused(folder, tmp_path, "lacks 1 of .* shards: model-00001")
    shutil.copy(second, first)
    refused(folder, tmp_path, "misnamed or mixed up")
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "../../etc/passwd"}}))
    refused(folder, tmp_path, "not a file of this folder")
    index.write_text(json.dumps({"weights": {}}))
    refused(folder, tmp_path, "no weight_map")


def test_a_folder_that_exists_and_a_full_disk_are_refused(saved, tmp_path, monkeypatch):
    folder = saved()
    (tmp_path / "out").mkdir()
    refused(folder, tmp_path, "exists already")
    (tmp_path / "out").rmdir()
    full = shutil.disk_usage(tmp_path)._replace(free=1000)
    with monkeypatch.context() as patch:
        patch.setattr(shards.shutil, "disk_usage", lambda path: full)
        refused(folder, tmp_path, "the disk has 0.00 GB left")

    def no_space(*args, **options):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(shards, "save_file", no_space)
    refused(folder, tmp_path, "No space left on device.*Nothing is left")


def test_wrong_arguments_are_refused(build, tmp_path):
    model = build("nvfp4")
    for options, match in (
        ({"format": "gguf"}, "compressed-tensors, modelopt, plain"),
        ({"fused": "both"}, "shared, own"),
        ({"activations": True}, "calibration="),
        ({"activations": True, "calibration": [torch.ones(1, 4).long()], "format": "plain"}, "not 'plain'"),
    ):
        with pytest.raises(ValueError, match=match):
            export(model, tmp_path / "out", **options)
    assert not list(tmp_path.iterdir())


def test_a_block_whose_scale_is_zero_has_codes_of_zero():
    weight = torch.randn(16, 64)
    weight[:, 16:32] *= 1e-8
    packed = quantize(weight, Cast())
    assert (packed.scales.float() == 0).any() and (packed.codes.view(16, 4, 8)[:, 1] != 0).any()
    stored = COMPRESSED.store(packed, None)
    assert (stored["weight_packed"].view(16, 4, 8)[:, 1] == 0).all()
    packed.tensor_scale = COMPRESSED.read(stored).tensor_scale
    assert torch.equal(COMPRESSED.read(stored).dequantize(), packed.dequantize())


# ---- Four-bit activations ------------------------------------------------------------------------------------


def watched_inputs(folder, batches):
    """Layer -> largest magnitude of its input, by hooks of this test's own."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    found = {}
    for name, linear in quantized_linears(model).items():
        linear.register_forward_hook(
            lambda _, args, __, name=name: found.update({name: max(found.get(name, 0.0), args[0].abs().max().item())})
        )
    with torch.no_grad():
        for batch in batches:
            model(batch)
    return found


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_calibration_writes_the_scales_of_inputs(saved, tmp_path, layout):
    folder = saved()
    batches = [torch.randint(1, 256, (2, 24)), torch.randint(1, 256, (1, 7))]
    summary = export(folder, tmp_path / "out", layout.name, calibration=[batches[0], {"input_ids": batches[1]}])
    assert summary.activations and "W4A4" in summary.describe()
    found = tensors(tmp_path / "out")
    for name, amax in watched_inputs(folder, batches).items():
        stored = found[f"{name}.{layout.input_scale}"]
        assert stored.dtype == torch.float32 and stored.shape == layout.scalar
        expected = 2688 / amax if layout is COMPRESSED else amax / 2688
        assert stored.item() == pytest.approx(expected, rel=1e-6)
    details = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    inputs = details["config_groups"]["group_0"]["input_activations"]
    assert inputs["num_bits"] == 4 and inputs["group_size"] == 16
    assert inputs["dynamic"] == "local" if layout is COMPRESSED else details["quant_algo"] == "NVFP4"
    weight_only = export(folder, tmp_path / "a16", layout.name, calibration=batches, activations=False)
    assert not weight_only.activations
    assert not [name for name in tensors(tmp_path / "a16") if name.endswith(layout.input_scale)]


def test_transformers_compressed_tensors_computes_our_w4a4(saved, tmp_path):
    """In FP32, so that what differs is not the two libraries' rounding of BF16 intermediates."""
    pytest.importorskip("compressed_tensors")
    folder = saved()
    tokens = torch.randint(1, 256, (2, 32))
    export(folder, tmp_path / "out", calibration=[tokens])
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        theirs(tokens)  # decompresses
    torch.nn.Module.float(theirs)
    ours = AutoModelForCausalLM.from_config(theirs.config).float().eval()
    ours.load_state_dict({n: t for n, t in theirs.state_dict().items() if n in ours.state_dict()})
    found = tensors(tmp_path / "out")

    def quantized(amax):
        def hook(_, args):
            x = args[0].flatten(0, 1)
            return pack(quantize_rows(x, amax, None, Cast()), Cast()).dequantize().view_as(args[0])

        return hook

    for name in [n.removesuffix(".input_global_scale") for n in found if n.endswith(".input_global_scale")]:
        amax = 2688 / found[f"{name}.input_global_scale"][0]
        ours.get_submodule(name).register_forward_pre_hook(quantized(amax))
        packed = COMPRESSED.read({part: found[f"{name}.{part}"] for part in COMPRESSED.parts})
        weight = ours.get_submodule(name).weight
        torch.testing.assert_close(weight.detach(), packed.dequantize(), rtol=2**-8, atol=0)
    with torch.no_grad():
        a, b = theirs(tokens).logits, ours(tokens).logits
    assert (a - b).norm() / b.norm() < 1e-3


def test_calibration_that_shows_nothing_is_refused(saved, tmp_path):
    folder = saved()
    refused(folder, tmp_path, "never reached model.layers.0.self_attn.q_proj and 20 others", calibration=[])
    state = load_file(folder / "model.safetensors")
    state["model.embed_tokens.weight"].zero_()
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    refused(folder, tmp_path, "all zero or not finite", calibration=[torch.ones(1, 8).long()])


def test_a_note_says_how_engines_cast_activations_otherwise(build, tmp_path):
    batch = [torch.ones(1, 8).long()]
    assert "becoming 6" in export(build("quartet2"), tmp_path / "a", calibration=batch).describe()
    assert "becoming 6" not in export(build("quartet2"), tmp_path / "b").describe()
    assert "becoming 6" not in export(build("nvfp4"), tmp_path / "c", calibration=batch).describe()


# ---- The script ------------------------------------------------------------------------------------------------


def script():
    """scripts/export.py as a module."""
    path = Path(__file__).resolve().parents[1] / "scripts" / "export.py"
    spec = importlib.util.spec_from_file_location("script_export", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_script_exports_and_says_so(llama_config, tmp_path, capsys):
    documents = [f"def f{n}(x):\n    return x + {n} * x\n" * 8 for n in range(60)]
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": d}) + "\n" for d in documents))
    tokenizer = train_tokenizer(documents, 300)
    llama_config.vocab_size = len(tokenizer)
    model = AutoModelForCausalLM.from_config(llama_config)
    quantize_model(model, NVFP4TrainingConfig())
    folder = tmp_path / "trained"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    text = ["--train_file", str(tmp_path / "text.jsonl"), "--calibrate", "3", "--sequence_length", "32"]
    assert script().main([str(folder), str(tmp_path / "out"), "--format", "modelopt", *text]) == 0
    shown = capsys.readouterr().out
    assert "device: " in shown and "W4A4" in shown and "| packed | 21 |" in shown
    found = tensors(tmp_path / "out")
    assert len([name for name in found if name.endswith("input_scale")]) == 21
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()
    assert script().main([str(folder), str(tmp_path / "out")]) == 1
    assert "exists already" in capsys.readouterr().err
