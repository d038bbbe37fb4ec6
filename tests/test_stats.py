"""QuantizationStats: its numbers by hand and against the reference, and training that doesn't notice it."""

import json
import math
import random

import numpy as np
import pytest
import torch
import torch.distributed.fsdp
from torch import distributed as dist
from torch.utils.data import Dataset, IterableDataset
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

from hf_nvfp4 import RECIPES, Cast, NVFP4Linear, PrecisionSchedule, QuantizationStats, Recipe, stats
from hf_nvfp4.gemm import backend_for
from hf_nvfp4.linear import Plan, quantized_linears
from hf_nvfp4.operand_stats import cast_stats, group_of, layer_stats, noise_ratio, noisy_groups, summary
from hf_nvfp4.quantizer_study import CASTS, measure


class Tokens(Dataset):
    """Arithmetic progressions, 20 tokens each."""

    def __len__(self):
        return 64

    def __getitem__(self, i):
        tokens = (7 * i + 3 * torch.arange(20)) % 250
        return {"input_ids": tokens, "labels": tokens}


class Augmented(Tokens):
    """Sequences with numbers of three random generators in them."""

    def __getitem__(self, i):
        tokens = super().__getitem__(i)["input_ids"]
        tokens[:3] = torch.tensor([random.randrange(250), np.random.randint(250), int(torch.randint(250, ()))])
        return {"input_ids": tokens, "labels": tokens}


@pytest.fixture
def trainer(tmp_path, device):
    """trainer(model, callbacks, **arguments): 4 steps in BF16 autocast; its folder is tmp_path / "run"."""

    def make(model, callbacks=(), data=None, **arguments):
        defaults = {
            "output_dir": str(tmp_path / "run"),
            "max_steps": 4,
            "per_device_train_batch_size": 4,
            "learning_rate": 1e-2,
            "bf16": True,
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
            "use_cpu": device.type == "cpu",
            "full_determinism": device.type == "cuda",
            "dataloader_pin_memory": False,
        }
        arguments = TrainingArguments(**(defaults | arguments))
        return Trainer(model, arguments, train_dataset=data or Tokens(), callbacks=list(callbacks))

    return make


@pytest.fixture
def said(monkeypatch):
    """What the callback warned about."""
    found = []
    monkeypatch.setattr("hf_nvfp4.stats.logger.warning", found.append)
    return found


def lines(tmp_path):
    return [json.loads(line) for line in (tmp_path / "run" / stats.STATS_FILE).read_text().splitlines()]


def losses(trained):
    return [entry["loss"] for entry in trained.state.log_history if "loss" in entry]


def logged(trained):
    return [entry for entry in trained.state.log_history if any(key.startswith("quantization/") for key in entry)]


# ---- Numbers -------------------------------------------------------------------------------------------


def test_a_tensor_made_by_hand():
    x = torch.zeros(1, 64)
    # The tensor's scale is 1, the blocks' are 448, 1, 1 (6.3 / 6, rounded to E4M3) and 0 (below half of 2^-9).
    x[0, :2] = torch.tensor([2688.0, 100.0])  # 100 / 448 = 0.22 becomes 0
    x[0, 16:22] = torch.tensor([6.0, -3.0, 0.2, 0.25, 0.3, -0.1])  # three of them 0: 0.25 is a tie, and 0 is even
    x[0, 32:34] = torch.tensor([6.3, 4.0])  # 6.3 saturates
    x[0, 48:50] = torch.tensor([1e-3, -1e-3])  # underflow with their scale, and don't saturate
    underflow, saturation, snr = cast_stats(x, Cast()).tolist()
    assert underflow == pytest.approx(6 / 12) and saturation == pytest.approx(1 / 64)
    errors = [100.0, 0.2, 0.25, 0.2, 0.1, 0.3, 1e-3, 1e-3]
    assert snr == pytest.approx(10 * math.log10(x.square().sum().item() / sum(e * e for e in errors)), abs=1e-4)


def test_extremes():
    zeros, exact = torch.zeros(16, 16), torch.full((16, 16), 3.0)
    assert cast_stats(zeros, Cast()).tolist()[:2] == [0, 0] and cast_stats(zeros, Cast())[2].isnan()
    assert cast_stats(exact, Cast())[2] > 120  # dB: 3 is kept, but for the rounding of the tensor's scale
    tiny = torch.randn(16, 64) * 1e-30  # squares that FP32 has not
    assert cast_stats(tiny, Cast("mxfp4"))[2] == pytest.approx(cast_stats(tiny * 2.0**90, Cast("mxfp4"))[2].item())
    # Powers of two above whose last binade nothing is: a value of 7.5 · 2^e is cut to 6 · 2^e, with "ceil" it is not.
    large = torch.full((1, 32), 7.5)
    assert cast_stats(large, Cast("mxfp4"))[1] == 1 and cast_stats(large, Cast("mxfp4", scale_rule="ceil"))[1] == 0


@pytest.mark.parametrize("name", CASTS)
def test_the_snr_is_the_error_of_the_quantizer_study(name):
    x, cast, generator = torch.randn(128, 256), CASTS[name], torch.default_generator
    torch.manual_seed(3)
    error = measure(x, cast, generator).error
    torch.manual_seed(3)
    underflow, saturation, snr = cast_stats(x, cast).tolist()
    assert snr == pytest.approx(-10 * math.log10(error), abs=1e-3)
    rules = ("4over6_mse", "best", "ceil")
    assert 0 <= underflow < 0.15 and 0 <= saturation < 0.1
    if cast.format.startswith("fp8") or cast.scale_rule in rules[2:]:
        assert saturation == 0


@pytest.mark.parametrize("recipe", ["nvfp4", "quartet2", "mxfp4", "fp8"])
def test_the_noise_is_that_of_the_layers_own_gradient(recipe):
    """The same draws: signs that are drawn in backward, and operands made of what the forward multiplied, included."""
    linear = NVFP4Linear(128, 64, bias=False, recipe=recipe)
    x, dy = torch.randn(40, 128).bfloat16(), torch.randn(40, 64).bfloat16()
    torch.manual_seed(5)
    with torch.autocast("cpu", torch.bfloat16):
        linear(x).backward(dy)
    dw = dy.float().T @ x.float()
    expected = dw.norm() / (linear.weight.grad - dw).norm()
    plan = Plan(linear.train_recipe, backend_for("auto", linear.train_recipe, x.device), torch.bfloat16, True, None)
    torch.manual_seed(5)
    assert noise_ratio(x, dy, plan).item() == pytest.approx(expected.item(), rel=1e-5)
    assert expected < 100


def test_only_operands_that_the_layer_casts_are_measured():
    linear = NVFP4Linear(64, 32, recipe="nvfp4")
    x, dy = torch.randn(33, 64, requires_grad=True), torch.randn(33, 32)
    dy[:, 8:12] = 0
    found = layer_stats(linear, x, dy)
    assert list(found["operands"]) == ["fprop x", "fprop w", "dgrad dy", "dgrad w", "wgrad dy", "wgrad x"]
    assert found["zero_dy"] == 0.125 and found["tokens"] == 33 and found["recipe"] == "nvfp4"
    assert list(layer_stats(linear, x.detach(), dy)["operands"]) == ["fprop x", "fprop w", "wgrad dy", "wgrad x"]
    linear.set_recipe("nvfp4", high_precision="forward")
    assert list(layer_stats(linear, x, dy)["operands"])[:2] == ["dgrad dy", "dgrad w"]
    linear.set_recipe("nvfp4", high_precision="all")
    found = layer_stats(linear, x, dy)
    assert not found["operands"] and found["noise_ratio"] is None
    linear.set_recipe("nvfp4")
    linear.weight.requires_grad_(False)
    found = layer_stats(linear, x, dy)
    assert list(found["operands"])[2:] == ["dgrad dy", "dgrad w"] and found["noise_ratio"] is None


def test_backward_from_the_forwards_operands_casts_those():
    """A square cast of what the same square cast made finds it on its grid; x along the tokens is another tensor."""
    square, plain = Cast(square=True), Cast()
    linear, snr = NVFP4Linear(64, 32), {}
    x, dy = torch.randn(32, 64, requires_grad=True), torch.randn(32, 32)
    for from_forward in (False, True):
        casts = ((plain, square), (plain, square), (plain, plain))
        linear.set_recipe(Recipe(f"square {from_forward}", *casts, from_forward=from_forward))
        operands = layer_stats(linear, x, dy)["operands"]
        snr[from_forward] = [operands[name]["snr_db"] or 200 for name in ("fprop x", "fprop w", "wgrad x", "dgrad w")]
    assert snr[True][:2] == snr[False][:2] and max(snr[False]) < 25
    assert snr[True][2] != snr[False][2] and snr[True][3] > 60


def test_summary_and_groups():
    def layer(snr, ratio):
        cast = {"underflow": 0.5, "saturation": 0.0, "snr_db": snr}
        operands = {"fprop x": cast, "wgrad x": cast | {"underflow": 0.1}}
        return {"operands": operands, "zero_dy": 0.25, "noise_ratio": ratio}

    layers = {"h.0.mlp.fc1": layer(20.0, 1.5), "h.1.mlp.fc1": layer(10.0, 4.5), "head": layer(None, None)}
    found = summary(layers)
    assert found["snr_db/fprop_x"] == 15 and found["worst_snr_db"] == 10 and "snr_db/dgrad_w" not in found
    assert found["underflow/x"] == pytest.approx(0.3) and found["saturation/x"] == 0 and found["zero_dy"] == 0.25
    assert found["noise_ratio"] == 3 and found["below_sqrt3"] == 0.5 and found["worst_noise_ratio"] == 1.5
    assert noisy_groups(layers) == {"h.*.mlp.fc1": [1.5, 4.5]}
    assert group_of("model.layers.10.mlp.experts.3.w1") == "model.layers.*.mlp.experts.*.w1"
    assert summary({}) == {}


# ---- In training ---------------------------------------------------------------------------------------


class Recorder(TrainerCallback):
    """Stands where those that report stand: before the user's callbacks."""

    def __init__(self):
        self.logs = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.logs.append((state.global_step, dict(logs)))


@pytest.mark.parametrize("recipe", ["nvfp4", "quartet2"])
def test_training_is_the_same_to_the_bit_and_so_is_a_resumed_one(build, trainer, tmp_path, llama_config, recipe):
    llama_config.num_hidden_layers = 2 if recipe == "nvfp4" else 1
    arguments = {"gradient_accumulation_steps": 2, "save_strategy": "steps", "save_steps": 2}
    plain = trainer(build(recipe), **arguments)
    plain.train()
    watched = trainer(build(recipe), [QuantizationStats(1, tokens=40)], **arguments)
    watched.train()
    assert losses(watched) == losses(plain)
    whole = lines(tmp_path)
    assert sorted({line["step"] for line in whole}) == [1, 2, 3, 4]
    assert {line["tokens"] for line in whole} == {40}
    assert len(whole) == 4 * len(quantized_linears(watched.model))

    # As if killed while it wrote; the checkpoint is of step 2.
    with (tmp_path / "run" / stats.STATS_FILE).open("a") as file:
        file.write('{"step": 4, "layer"')
    resumed = trainer(build(recipe), [QuantizationStats(1, tokens=40)], **arguments)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    assert losses(resumed) == losses(plain)
    for name, parameter in plain.model.named_parameters():
        assert torch.equal(parameter, resumed.model.get_parameter(name)), name
    assert lines(tmp_path) == whole  # the same probe and the same draws
    assert [entry["step"] for entry in logged(resumed)] == [1, 2, 3, 4]


def test_what_is_logged_reaches_those_that_report(build, trainer, tmp_path):
    pytest.importorskip("tensorboard", reason="needs tensorboard: pip install tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    recorder = Recorder()
    run = trainer(build("nvfp4"), [QuantizationStats(2)], report_to="tensorboard", logging_steps=2)
    run.callback_handler.callbacks.insert(0, recorder)
    run.train()
    mine = [(step, logs) for step, logs in recorder.logs if "quantization/snr_db/fprop_x" in logs]
    assert [step for step, _ in mine] == [2, 4]
    logs = mine[-1][1]
    assert len(logs) <= 20 and 15 < logs["quantization/snr_db/fprop_x"] < 25
    assert logged(run)[-1] == logs | {"step": 4}
    assert len(losses(run)) == 2  # Trainer's own logs of the same steps are still there
    events = EventAccumulator(str(next((tmp_path / "run").rglob("events.*")).parent)).Reload()
    written = events.Scalars("train/quantization/snr_db/fprop_x")
    assert [event.step for event in written] == [2, 4]
    assert written[-1].value == pytest.approx(logs["quantization/snr_db/fprop_x"], rel=1e-6)
    mean = np.mean([line["operands"]["fprop x"]["snr_db"] for line in lines(tmp_path) if line["step"] == 4])
    assert logs["quantization/snr_db/fprop_x"] == pytest.approx(mean)


@pytest.mark.parametrize("how", ["Trainer", "model"])
def test_a_compiled_model_is_measured_in_eager_mode(llama_config, build, trainer, how):
    from torch._dynamo.utils import counters

    llama_config.num_hidden_layers = 1
    found = {}
    for interval in (100, 1):
        torch._dynamo.reset()
        counters.clear()
        model = build("fp8_tensor", skip=["self_attn", "up_proj", "gate_proj"])
        if how == "model":
            model.compile(backend="eager")
        compiled = {"torch_compile": True, "torch_compile_backend": "eager"} if how == "Trainer" else {}
        run = trainer(model, [QuantizationStats(interval)], max_steps=2, **compiled)
        run.train()
        found[interval] = losses(run), dict(counters["stats"]), len(logged(run))
    assert found[1][:2] == found[100][:2] and (found[1][2], found[100][2]) == (2, 0)
    assert found[1][1]["unique_graphs"] >= 1


def test_nothing_is_left_behind(build, device):
    model = build("nvfp4").to(device).train()
    tokens = torch.randint(250, (2, 20))
    batch = {"input_ids": tokens, "labels": tokens}
    weight = model.get_input_embeddings().weight
    weight.grad = torch.ones_like(weight)
    before = torch.get_rng_state()
    found = stats.measure(model, batch, device, torch.bfloat16)
    assert torch.equal(torch.get_rng_state(), before) and model.training
    assert [name for name, p in model.named_parameters() if p.grad is not None] == ["model.embed_tokens.weight"]
    assert (weight.grad == 1).all() and not any(linear._forward_hooks for linear in quantized_linears(model).values())
    assert list(found) == list(quantized_linears(model))
    # What is frozen has no wgrad; recomputing a block in backward changes nothing.
    model.gradient_checkpointing_enable({"use_reentrant": False})
    assert stats.measure(model, batch, device, torch.bfloat16) == found
    model.model.layers[0].requires_grad_(False)
    frozen = stats.measure(model, batch, device, None)["model.layers.0.mlp.up_proj"]
    assert list(frozen["operands"]) == ["fprop x", "fprop w", "dgrad dy", "dgrad w"]


def test_sharded_weights_are_gathered(build, tmp_path):
    tokens = torch.randint(250, (2, 20))
    batch, cpu = {"input_ids": tokens, "labels": tokens}, torch.device("cpu")
    whole = stats.measure(build("nvfp4").train(), batch, cpu, torch.bfloat16)
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    try:
        model, mesh = build("nvfp4").train(), dist.device_mesh.init_device_mesh("cpu", (1,))
        for module in (*model.model.layers, model):
            dist.fsdp.fully_shard(module, mesh=mesh)
        sharded = stats.measure(model, batch, cpu, torch.bfloat16)
        assert list(sharded) == list(whole)
        for name, layer in sharded.items():  # ranks draw other numbers; what is rounded to nearest is the same
            assert layer["operands"]["fprop w"] == whole[name]["operands"]["fprop w"]
            assert layer["noise_ratio"] > 1
        model(**batch).loss.backward()
        assert all(parameter.grad is not None for parameter in model.parameters())
    finally:
        dist.destroy_process_group()


def test_the_probe_is_cut_and_leaves_random_data_and_streams_alone(build, trainer, tmp_path):
    batch = {"input_ids": torch.zeros(6, 10), "mask": torch.zeros(6, 10), "kind": torch.zeros(6), "n": torch.ones(())}
    assert [tuple(t.shape) for t in stats.cut(batch, 39).values()] == [(3, 10), (3, 10), (3,), ()]
    assert [tuple(t.shape) for t in stats.cut(batch, 7).values()] == [(1, 7), (1, 7), (1,), ()]

    class Stream(IterableDataset):
        def __iter__(self):
            return (Tokens()[i] for i in range(64))

    for data in (Augmented(), Stream()):
        plain = trainer(build("fp8_tensor"), data=data)
        plain.train()
        watched = trainer(build("fp8_tensor"), [QuantizationStats(2)], data=data)
        watched.train()
        assert losses(watched) == losses(plain)
    assert {line["tokens"] for line in lines(tmp_path)} == {80}


def test_the_precision_of_the_moment_is_measured(build, trainer, tmp_path):
    trainer(build("nvfp4"), [PrecisionSchedule(0.5), QuantizationStats(2)]).train()
    by_step = {line["step"]: line for line in lines(tmp_path)}
    assert by_step[2]["operands"] and by_step[2]["recipe"] == "nvfp4"
    assert not by_step[4]["operands"] and by_step[4]["recipe"] == "nvfp4, all in bf16"


def test_gradients_lost_in_noise_are_warned_about_once(build, trainer, said):
    # With that much headroom all elements are below 0.13, and are rounded to 0 or 0.5: unbiased, and little but noise.
    coarse = Cast("mxfp4", rounding="stochastic", headroom=64.0)
    model = build(Recipe("noisy", RECIPES["bf16"].fprop, RECIPES["bf16"].dgrad, (coarse, coarse)))
    run = trainer(model, [QuantizationStats(1)])
    run.train()
    assert logged(run)[0]["quantization/below_sqrt3"] == 1
    (warning,) = said
    assert warning.startswith("step 1: weight gradients are below √3") and "PrecisionSchedule" in warning
    assert "model.layers.*.mlp.down_proj: " in warning and "layers.0" not in warning


# ---- Refusals ------------------------------------------------------------------------------------------


def test_what_cannot_be_measured_is_said(build, trainer, said, llama_config, tmp_path):
    for wrong in ({"interval": 0}, {"tokens": 2.5}, {"interval": True}):
        with pytest.raises(ValueError, match="give a whole number, 1 or more"):
            QuantizationStats(**wrong)
    with pytest.raises(ValueError, match="has no converted linear layers"):
        trainer(AutoModelForCausalLM.from_config(llama_config), [QuantizationStats(1)]).train()
    reentrant = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}
    trainer(build("fp8_tensor"), [QuantizationStats(1)], max_steps=1, **reentrant).train()
    no_labels = {"input_ids": torch.zeros(2, 8, dtype=torch.long)}
    trainer(build("fp8_tensor"), [QuantizationStats(1, batch=no_labels)], max_steps=1).train()
    assert [sentence.split(":")[0] for sentence in said] == ["QuantizationStats does nothing"] * 2
    assert "use_reentrant=False" in said[0] and "no labels" in said[1]
    assert not (tmp_path / "run" / stats.STATS_FILE).exists()
