"""Trainer: exact resume, the late switch of precision, and the stop at NaN."""

import json
import math

import pytest
import torch
from torch.utils.data import Dataset
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from hf_nvfp4 import PrecisionSchedule, StopOnNonFinite
from hf_nvfp4.backends import bf16
from hf_nvfp4.linear import quantized_linears
from hf_nvfp4.schedule import find_non_finite


class Tokens(Dataset):
    """Arithmetic progressions from random starts: something to learn."""

    def __init__(self, count=64, length=20):
        start = torch.randint(0, 200, (count, 1), generator=torch.Generator().manual_seed(0))
        self.tokens = 1 + (start + 3 * torch.arange(length)) % 250

    def __len__(self):
        return len(self.tokens)

    def __getitem__(self, i):
        return {"input_ids": self.tokens[i], "labels": self.tokens[i]}


@pytest.fixture
def trainer(tmp_path, device):
    """trainer(model, callbacks, **arguments): 8 steps with master weights in FP32 and BF16 autocast."""

    def make(model, callbacks=(), **arguments):
        defaults = {
            "output_dir": str(tmp_path / "run"),
            "max_steps": 8,
            "per_device_train_batch_size": 2,
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
        return Trainer(
            model, TrainingArguments(**(defaults | arguments)), train_dataset=Tokens(), callbacks=list(callbacks)
        )

    return make


def weights(model):
    return {name: p.detach().cpu().clone() for name, p in model.named_parameters()}


def equal(a, b):
    return all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("schedule", [None, "all", "forward"])
def test_resume_is_bit_exact(build, trainer, tmp_path, schedule):
    """Stochastic rounding, gradient accumulation and the precision switch included."""
    callbacks = [PrecisionSchedule(0.5, schedule)] if schedule else []
    arguments = {"gradient_accumulation_steps": 2, "save_strategy": "steps", "save_steps": 2}
    whole = build("nvfp4")
    trainer(whole, callbacks, **arguments).train()
    for step in (2, 4, 6):
        resumed = build("nvfp4")
        trainer(resumed, callbacks, **arguments).train(resume_from_checkpoint=str(tmp_path / f"run/checkpoint-{step}"))
        assert equal(weights(whole), weights(resumed)), step
    other = build("nvfp4")
    trainer(other, callbacks, **(arguments | {"seed": 7})).train()
    assert not equal(weights(whole), weights(other))


def test_the_loss_falls_and_every_recipe_trains(build, trainer):
    for recipe in ("bf16", "fp8", "fp8_tensor", "nvfp4"):
        run = trainer(build(recipe), max_steps=40, per_device_train_batch_size=16, learning_rate=3e-3)
        run.train()
        losses = [entry["loss"] for entry in run.state.log_history if "loss" in entry]
        assert sum(losses[-5:]) < 0.8 * sum(losses[:5]), recipe


def test_gradient_checkpointing_trains_to_the_same_weights(build, trainer):
    plain, checkpointed = build("nvfp4"), build("nvfp4")
    trainer(plain).train()
    trainer(checkpointed, gradient_checkpointing=True).train()
    assert equal(weights(plain), weights(checkpointed))


def test_trainer_compiles_through_the_switch(build, trainer, llama_config, monkeypatch):
    """Two graphs: before and after. aot_eager traces as inductor does, without its minutes of code generation."""
    monkeypatch.setattr(bf16, "KERNEL_DEVICES", set())  # interpreted kernels take time, and so do layers
    llama_config.num_hidden_layers = 1
    losses = []
    for arguments in ({}, {"torch_compile": True, "torch_compile_backend": "aot_eager"}):
        model = build("fp8_tensor")
        run = trainer(model, [PrecisionSchedule(0.5)], learning_rate=1e-3, **arguments)
        run.train()
        assert precision_of(model) == {"fp8_tensor, all in bf16"}
        losses.append([entry["loss"] for entry in run.state.log_history if "loss" in entry])
    assert losses[1] == pytest.approx(losses[0], rel=5e-3)


def precision_of(model):
    return {linear.train_recipe.name for linear in quantized_linears(model).values()}


@pytest.mark.parametrize(("gemms", "name"), [("all", "nvfp4, all in bf16"), ("forward", "nvfp4, forward in bf16")])
def test_the_switch_comes_at_its_step_and_is_in_the_log_and_the_checkpoints(build, trainer, tmp_path, gemms, name):
    model = build("nvfp4")
    run = trainer(model, [PrecisionSchedule(0.25, gemms)], save_strategy="steps", save_steps=2)
    run.train()
    assert precision_of(model) == {name}
    switches = [entry for entry in run.state.log_history if "precision" in entry]
    assert switches == [{"step": 6, "precision": name}]
    for step, expected in ((4, "nvfp4"), (6, "nvfp4"), (8, name)):
        folder = tmp_path / f"run/checkpoint-{step}"
        assert precision_of(AutoModelForCausalLM.from_pretrained(folder)) == {expected}
    saved = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert saved["high_precision"] == gemms and saved["recipe"]["name"] == "nvfp4"


def test_the_switch_goes_with_a_warmup_stable_decay_schedule(build, trainer):
    model = build("nvfp4")
    schedule = PrecisionSchedule(0.25)
    run = trainer(
        model,
        [schedule],
        lr_scheduler_type="warmup_stable_decay",
        lr_scheduler_kwargs={"num_decay_steps": 2},
        warmup_steps=2,
    )
    run.train()
    rates = {e["step"]: e["learning_rate"] for e in run.state.log_history if "learning_rate" in e}
    switch = schedule.switch_step(8)
    peak = max(rates.values())
    assert rates[switch] == peak and rates[switch + 1] == peak and rates[switch + 2] < peak


@pytest.mark.parametrize(
    ("last", "max_steps", "step"), [(0.18, 1000, 820), (0.25, 8, 6), (1.0, 8, 0), (0.01, 8, 7)]
)
def test_the_switch_step(last, max_steps, step):
    assert PrecisionSchedule(last).switch_step(max_steps) == step


def test_bad_schedules_are_errors(build, trainer):
    for last in (0, -0.1, 1.1):
        with pytest.raises(ValueError, match="in \\(0, 1\\]"):
            PrecisionSchedule(last)
    with pytest.raises(ValueError, match="known: all, forward"):
        PrecisionSchedule(0.1, "backward")
    with pytest.raises(ValueError, match="no converted linear layers"):
        trainer(build(), [PrecisionSchedule()]).train()


def test_training_stops_at_a_nan_with_the_layers_name(build, trainer, tmp_path):
    model = build("nvfp4")
    arguments = {"save_strategy": "steps", "save_steps": 2, "max_steps": 8}
    trainer(model, [StopOnNonFinite()], **arguments).train()
    model.model.layers[1].mlp.up_proj.weight.data[3, 4] = math.nan
    before = weights(model)
    with pytest.raises(FloatingPointError, match=r"model\.layers\.1\.mlp\.up_proj\.weight"):
        trainer(model, [StopOnNonFinite()], **arguments).train()
    after = weights(model)
    assert all(torch.equal(before[n].nan_to_num(7), after[n].nan_to_num(7)) for n in before)
    survivor = AutoModelForCausalLM.from_pretrained(tmp_path / "run/checkpoint-8")
    assert all(p.isfinite().all() for p in survivor.parameters())


def test_a_bad_weight_is_seen_at_logging_without_gradients_of_its_own(build, trainer):
    """FP16 leaves non-finite gradients to the loss scaler; a weight is looked at when the loss is logged."""
    model = build("nvfp4")
    model.model.norm.weight.requires_grad_(False)
    callback = StopOnNonFinite()
    run = trainer(model)
    callback.on_log(run.args, run.state, run.control, logs={"loss": 1.0}, model=model)
    model.model.norm.weight[0] = math.inf
    with pytest.raises(FloatingPointError, match=r"a weight is not finite.*model\.norm\.weight"):
        callback.on_log(run.args, run.state, run.control, logs={"loss": 1.0}, model=model)


def test_a_failing_diagnosis_does_not_hide_the_reason(build, trainer):
    model = build("nvfp4")
    run = trainer(model)
    without_labels = [{"input_ids": Tokens().tokens[:2]}]
    with pytest.raises(FloatingPointError, match=r"loss=nan.*the diagnostic pass failed"):
        StopOnNonFinite().on_log(
            run.args, run.state, run.control, logs={"loss": math.nan}, model=model, train_dataloader=without_labels
        )


def test_large_finite_weights_are_finite(build, trainer):
    model = build("nvfp4")
    run = trainer(model)
    model.model.norm.weight.data.fill_(1e30)
    StopOnNonFinite().on_log(run.args, run.state, run.control, logs={"loss": 1.0}, model=model)


def test_the_diagnosis_names_the_first_layer_whose_output_breaks(build):
    model = build("nvfp4")
    batch = {"input_ids": Tokens().tokens[:2], "labels": Tokens().tokens[:2]}
    assert "are finite on the first batch" in find_non_finite(model, batch)
    broken = model.model.layers[2].self_attn.v_proj
    hook = broken.register_forward_hook(lambda module, inputs, output: output * math.inf)
    assert "layer model.layers.2.self_attn.v_proj is not finite" in find_non_finite(model, batch)
    hook.remove()
    model.model.layers[1].mlp.down_proj.register_full_backward_pre_hook(lambda module, dy: (dy[0] * math.nan,))
    assert "gradient of model.layers.1.mlp.down_proj.weight is the first" in find_non_finite(model, batch)
