"""OsciReset: which weights are reset, where to and when; with Trainer; resumed, switched, sharded, refused."""

import copy
import logging
from types import SimpleNamespace

import pytest
import torch
from torch import distributed as dist
from torch import nn
from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback, TrainerState, TrainingArguments

from hf_nvfp4 import Cast, NVFP4Linear, OsciReset, PrecisionSchedule, Recipe, cast_weights_once, quantize
from hf_nvfp4.linear import quantized_linears
from hf_nvfp4.oscillation import Travel
from hf_nvfp4.recipes import RECIPES

# Rows of one block of 1×16. amax 6 is the tensor's and each row's: elements are on E2M1's own grid, 0.25 an edge of it.
EDGE = 0.25


@pytest.fixture
def layer(device):
    """A linear layer of 16 to 16, weights 1, the first of each row 6."""
    linear = NVFP4Linear(16, 16, bias=False, device=device, recipe="fp4_all_the_way")
    nn.init.ones_(linear.weight)
    linear.weight.detach()[:, 0] = 6.0
    return linear


def move(linear, values):
    """What an optimizer's step does."""
    with torch.no_grad():
        for (row, column), value in values.items():
            linear.weight[row, column] = value


def quantized(linear):
    cast = linear.train_recipe.fprop.b
    return quantize(linear.weight.detach(), cast).dequantize()


def watch(callback, linear, steps, max_steps=10, start=0, args=None):
    """The state after `steps`, each a dict of new weights, as Trainer calls a callback."""
    model = nn.Sequential(linear)
    args = args or SimpleNamespace(bf16=False, fp16=False)
    state = TrainerState(global_step=start, max_steps=max_steps)
    callback.on_train_begin(args, state, None, model=model)
    for values in steps:
        move(linear, values)
        state.global_step += 1
        callback.on_step_end(args, state, None, model=model)
    return state


def test_what_jumps_goes_to_the_centre_of_its_bin_and_what_travels_stays(layer):
    jumps, travels, rests = (0, 1), (0, 2), (3, 7)
    move(layer, {jumps: EDGE - 0.01, travels: 0.1})
    steps = [{jumps: EDGE + 0.01 * (-1) ** i, travels: 0.1 + 0.3 * (i + 1)} for i in range(4)]
    before, forward = layer.weight.detach().clone(), quantized(layer)
    state = watch(OsciReset(period=4, watch=4, last=1), layer, steps, max_steps=4)
    # The last step left it below the edge, whose bin's centre is 0.
    assert layer.weight[jumps] == 0 and before[jumps].item() == pytest.approx(EDGE - 0.01)
    assert layer.weight[travels].item() == pytest.approx(1.3) and layer.weight[rests] == 1
    assert state.log_history == [{"step": 4, "weights_reset": 1, "weights_watched": 256}]
    # What the forward multiplies is as it was, but for what travelled.
    now = quantized(layer)
    now[travels] = forward[travels]
    assert torch.equal(now, forward)


def test_distances_and_their_ratio_are_exact(layer):
    """0.25 + 1/32 is cast to 0.5 and 0.25 - 1/32 to 0: three jumps of 1/2 while w goes 3/16, a ratio of 8 exactly."""
    move(layer, {(0, 1): 0.25 - 1 / 32, (2, 3): 1.0})
    travel = Travel(layer)
    for value, other in ((0.25 + 1 / 32, 1.125), (0.25 - 1 / 32, 1.5), (0.25 + 1 / 32, 2.0)):
        move(layer, {(0, 1): value, (2, 3): other})
        travel.observe()
    assert travel.of_weight[0, 1] == 3 / 16 and travel.of_quantized[0, 1] == 1.5
    assert travel.of_weight[2, 3] == 1.0 and travel.of_quantized[2, 3] == 1.0
    assert travel.of_weight.count_nonzero() == 2 and travel.of_quantized.count_nonzero() == 2
    with torch.no_grad():
        assert travel.reset(8.0 + 1e-5) == 0 and layer.weight[0, 1] == 0.25 + 1 / 32
        assert travel.reset(8.0) == 1 and layer.weight[0, 1] == 0.5


def test_what_does_not_move_is_left_alone(layer):
    """Its Q(w) jumps with its block's scale, which another weight moves."""
    move(layer, {(0, 1): 0.26})
    travel = Travel(layer)
    with torch.no_grad():
        for largest in (5.0, 6.0):
            move(layer, {(0, 0): largest})
            travel.observe()
        assert travel.of_quantized[0, 1] > 0 and travel.of_weight[0, 1] == 0
        assert travel.reset(8.0) == 0 and layer.weight[0, 1] == 0.26


def test_the_weight_is_rounded_to_the_compute_dtype_before_its_cast(layer):
    """In FP32 just above the edge; in BF16 on it, and ties go to 0."""
    move(layer, {(0, 1): EDGE + 1e-5})
    assert Travel(layer)._quantized[0, 1] == 0.5 and Travel(layer, torch.bfloat16)._quantized[0, 1] == 0
    assert Travel(layer)._weight[0, 1] == Travel(layer, torch.bfloat16)._weight[0, 1] == layer.weight[0, 1]


def test_kept_casts_of_a_weight_that_is_reset_are_made_anew(layer):
    """The write is one that torch counts."""
    x = torch.ones(3, 16, device=layer.weight.device)
    move(layer, {(0, 1): EDGE - 0.01})
    travel = Travel(layer)
    for value in (EDGE + 0.01, EDGE - 0.01, EDGE + 0.01):
        move(layer, {(0, 1): value})
        travel.observe()
    with cast_weights_once(layer), torch.no_grad():
        layer(x)
        operands, version = layer.weight_casts, layer.weight._version
        assert operands.knows(layer.weight)
        assert travel.reset(8.0) == 1
        assert layer.weight._version > version and not operands.knows(layer.weight)


@pytest.mark.parametrize(
    ("last", "max_steps", "begins"),
    [(0.2, 1000, [800]), (0.2, 10_000, [*range(8000, 10_000, 200)]), (1.0, 450, [0, 200, 400]), (0.2, 250, [200])],
)
def test_windows(last, max_steps, begins):
    assert [*OsciReset(last=last).windows(max_steps)] == begins


def test_only_in_the_last_part_and_memory_is_free_outside_of_windows(layer):
    callback, held = OsciReset(period=3, watch=2, last=0.5), []
    steps = [{(0, 1): EDGE + 0.01 * (-1) ** i} for i in range(10)]
    args, begin = SimpleNamespace(bf16=False, fp16=False), callback.on_step_end

    def on_step_end(*arguments, **named):
        begin(*arguments, **named)
        held.append(len(callback._travels))

    callback.on_step_end = on_step_end
    state = watch(callback, layer, steps, args=args)
    # Windows are steps 5 to 7 and 8 to 10.
    assert [entry["step"] for entry in state.log_history] == [7, 10]
    assert held == [0, 0, 0, 0, 1, 1, 0, 1, 1, 0]


def test_a_window_follows_upon_another(layer):
    state = watch(OsciReset(period=2, watch=2, last=1), layer, [{(0, 1): 0.1 * i} for i in range(6)], max_steps=6)
    assert [entry["step"] for entry in state.log_history] == [2, 4, 6]


def test_a_window_that_training_resumed_in_is_skipped_and_that_is_said(layer, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("hf_nvfp4"), "propagate", True)
    steps = [{(0, 1): EDGE + 0.01 * (-1) ** i} for i in range(10)]
    for start, resets, said in ((2, [4, 8], 0), (3, [8], 1), (4, [8], 0), (6, [8], 0), (7, [], 1), (8, [], 0)):
        caplog.clear()
        state = watch(OsciReset(4, 2, last=0.8), layer, steps[start:], start=start)
        assert [entry["step"] for entry in state.log_history] == resets, start
        assert sum("is skipped" in record.message for record in caplog.records) == said, start


def test_nothing_is_reset_once_the_forward_runs_in_bf16(layer):
    callback, model = OsciReset(4, 4, last=1), nn.Sequential(layer)
    args = SimpleNamespace(bf16=False, fp16=False)
    state = TrainerState(global_step=0, max_steps=8)
    callback.on_train_begin(args, state, None, model=model)
    for step in range(8):
        if step == 2:
            layer.set_recipe(layer.recipe, high_precision="forward")
        move(layer, {(0, 1): EDGE + 0.01 * (-1) ** step})
        state.global_step += 1
        callback.on_step_end(args, state, None, model=model)
        assert bool(callback._travels) == (step < 2)
    assert state.log_history == [] and layer.weight[0, 1].item() == pytest.approx(EDGE - 0.01)


# ---------------------------------------------------------------------------- Trainer


class Tokens(Dataset):
    """Random tokens: nothing to learn but their frequencies, so that weights wander."""

    def __init__(self):
        self.tokens = torch.randint(0, 250, (32, 16), generator=torch.Generator().manual_seed(0))

    def __len__(self):
        return len(self.tokens)

    def __getitem__(self, i):
        return {"input_ids": self.tokens[i], "labels": self.tokens[i]}


class Follow(TrainerCallback):
    """w and Q(w) of all layers before and after each step's resets: comes twice, around OsciReset."""

    def __init__(self):
        self.seen = []

    def on_step_end(self, args, state, control, model=None, **kwargs):
        layers = quantized_linears(model).values()
        weights = [linear.weight.detach().clone() for linear in layers]
        casts = [
            quantize(w.bfloat16(), linear.train_recipe.fprop.b).dequantize()
            for w, linear in zip(weights, layers, strict=True)
        ]
        self.seen.append((weights, casts))

    on_train_begin = on_step_end


def train(model, folder, callbacks, resume=None, **arguments):
    defaults = {
        "max_steps": 12,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-3,
        "bf16": True,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": model.device.type == "cpu",
        "full_determinism": model.device.type == "cuda",
        "dataloader_pin_memory": False,
    }
    given = TrainingArguments(str(folder), **(defaults | arguments))
    trainer = Trainer(model, given, train_dataset=Tokens(), callbacks=list(callbacks))
    trainer.train(resume_from_checkpoint=resume and str(resume))
    return trainer


def test_training(build, tmp_path):
    """What Trainer's optimizer does to weights, followed independently; ratio 4, since twelve steps are few."""
    before, after = Follow(), Follow()
    callback = OsciReset(period=6, watch=6, ratio=4, last=0.5)
    model = build("tetrajet2_base")
    trainer = train(model, tmp_path, [before, callback, after])
    (entry,) = [entry for entry in trainer.state.log_history if "weights_reset" in entry]
    total = 0
    for i, linear in enumerate(quantized_linears(model).values()):
        moved, jumped = (sum((a[k][i] - b[k][i]).abs() for a, b in _pairs(before.seen[6:13])) for k in (0, 1))
        oscillates = (moved > 0) & (jumped >= 4 * moved)
        (w, q), (w_after, _) = ([part[i] for part in seen] for seen in (before.seen[12], after.seen[12]))
        assert torch.equal(w_after, torch.where(oscillates, q, w)) and torch.equal(w_after, linear.weight)
        total += int(oscillates.sum())
    assert entry == {"step": 12, "weights_reset": total, "weights_watched": sum(w.numel() for w in after.seen[0][0])}
    assert 0 < total < entry["weights_watched"] / 2
    for step in range(12):  # and nothing else touches them
        assert all(map(torch.equal, before.seen[step][0], after.seen[step][0])), step


def _pairs(items):
    return list(zip(items[1:], items[:-1], strict=True))


def test_resume_outside_of_a_window_is_bit_exact_and_in_one_it_trains_on(build, tmp_path):
    def callbacks():
        return [OsciReset(period=4, watch=2, ratio=2, last=0.7), PrecisionSchedule(0.1)]

    saving = {"save_strategy": "steps", "save_steps": 1, "max_steps": 10}
    whole, without = build("nvfp4"), build("nvfp4")
    trainer = train(whole, tmp_path / "run", callbacks(), **saving)
    resets = [entry for entry in trainer.state.log_history if "weights_reset" in entry]
    assert [entry["step"] for entry in resets] == [5, 9] and all(entry["weights_reset"] for entry in resets)
    train(without, tmp_path / "without", [PrecisionSchedule(0.1)], max_steps=10)
    assert not _same(whole, without)
    for step, same in ((3, True), (5, True), (6, True), (8, False)):
        resumed = build("nvfp4")
        train(resumed, tmp_path / "run", callbacks(), resume=tmp_path / f"run/checkpoint-{step}", max_steps=10)
        assert _same(whole, resumed) == same, step


def _same(a, b):
    return all(map(torch.equal, a.parameters(), b.parameters()))


# ---------------------------------------------------------------------------- sharded weights


def _train_sharded(rank, folder, linear):
    """One of two processes: three steps, each of which changes this half's own weights; saves what became of them."""
    dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/store", 2), rank=rank, world_size=2)
    model = nn.Sequential(linear)
    dist.fsdp.fully_shard(model, mesh=dist.device_mesh.init_device_mesh("cpu", (2,)))
    state, args = TrainerState(max_steps=3), SimpleNamespace(bf16=False, fp16=False)
    callback = OsciReset(3, 3, last=1)
    callback.on_train_begin(args, state, None, model=model)
    for step in range(3):
        with torch.no_grad():
            model(torch.eye(16))  # after an evaluation the weights are still gathered
        model(torch.eye(16)).sum().backward()
        with torch.no_grad():
            half = linear.weight.to_local()
            half[rank, 1] = EDGE + 0.01 * (-1) ** step
            half[4, 5 + rank] += 0.5
        state.global_step += 1
        callback.on_step_end(args, state, None, model=model)
    half = linear.weight.to_local().detach().clone()
    torch.save((half, state.log_history, model(torch.eye(16)).detach()), f"{folder}/{rank}")
    dist.destroy_process_group()


def test_weights_sharded_by_fsdp2(layer, tmp_path):
    """Each of two processes has half of the rows; square blocks, and one scale over all: the same as whole."""
    layer.cpu().set_recipe(Recipe("square", *[(Cast(), Cast(square=True))] * 3))
    move(layer, {(row, 0): 1.0 for row in range(16)} | {(0, 1): EDGE - 0.01, (9, 1): EDGE - 0.01, (12, 3): 6.0})
    whole = copy.deepcopy(layer)
    torch.multiprocessing.spawn(_train_sharded, (str(tmp_path), layer), nprocs=2)
    steps = [
        {(row, 1): EDGE + 0.01 * (-1) ** step for row in (0, 9)}
        | {(4 + 8 * rank, 5 + rank): 1.5 + 0.5 * step for rank in (0, 1)}
        for step in range(3)
    ]
    state = watch(OsciReset(3, 3, last=1), whole, steps, max_steps=3)
    halves, histories, outputs = zip(*(torch.load(tmp_path / str(rank)) for rank in (0, 1)), strict=True)
    assert torch.equal(torch.cat(halves), whole.weight)
    assert list(histories) == [state.log_history] * 2 and state.log_history[0]["weights_reset"] == 2
    assert all(torch.equal(y, whole(torch.eye(16))) for y in outputs)


# ---------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"watch": 300}, "watch=300 of every period=200"),
        ({"watch": 0}, "1 <= watch <= period"),
        ({"ratio": 0}, "ratio=0"),
        ({"last": 1.1}, r"last=1.1.*in \(0, 1\]"),
    ],
)
def test_bad_numbers(arguments, message):
    with pytest.raises(ValueError, match=message):
        OsciReset(**arguments)


RN, SR = Cast(), Cast(rounding="stochastic")


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ("bf16", r"no trained weight is quantized in the forward \(recipe bf16\)"),
        ("mxfp4", "no trained weight is quantized"),
        (Recipe("drawn", (RN, SR), (RN, RN), (RN, RN)), "'drawn' of 0 casts w with random numbers"),
        ("halo1", "'halo1' of 0 rotates w before its cast"),
        ("quartet", "'quartet' of 0 rotates w before its cast"),
        (Recipe("even", (RN, RN), (RN, RN), (RN, RN), smooth=True), "'even' of 0 scales w by the channels of x"),
    ],
)
def test_recipes_without_a_place_for_w_are_refused(layer, recipe, message):
    layer.set_recipe(recipe)
    with pytest.raises(ValueError, match=message):
        OsciReset(last=1).check(nn.Sequential(layer), 1000)


@pytest.mark.parametrize("name", ["nvfp4", "nvfp4_4over6", "quartet2", "tetrajet2_base", "averis", "fp4_dge", "fp8"])
def test_other_recipes_are_not(layer, name):
    layer.set_recipe(RECIPES[name])
    OsciReset().check(nn.Sequential(layer), 1000)
    Travel(layer).observe()


def test_models_and_trainings_it_cannot_work_on_are_errors(layer):
    with pytest.raises(ValueError, match="watches 50 steps, and the last 0.2 of 200 are 40"):
        OsciReset().check(nn.Sequential(layer), 200)
    with pytest.raises(ValueError, match="no converted linear layers"):
        OsciReset().check(nn.Sequential(nn.Linear(16, 16)), 1000)
    args = SimpleNamespace(bf16=False, fp16=False, deepspeed_plugin=object())
    with pytest.raises(ValueError, match="DeepSpeed keeps weights of its own"):
        watch(OsciReset(), layer, [], 1000, args=args)
    frozen = copy.deepcopy(layer).requires_grad_(False)
    with pytest.raises(ValueError, match="no trained weight"):
        OsciReset().check(nn.Sequential(frozen), 1000)
    layer.weight = nn.Parameter(layer.weight.detach().flatten()[:100])
    with pytest.raises(ValueError, match=r"0\.weight is sharded \(FSDP1"):
        OsciReset().check(nn.Sequential(layer), 1000)
