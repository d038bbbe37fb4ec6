"""Casting a weight once an optimizer step: the same bits as at each micro-batch, nothing stale, nothing left behind."""

import contextlib
import copy
import functools

import pytest
import torch
import torch.distributed as dist
from sharing_cases import (
    DRAWS_W,
    FORWARD_IN_BF16,
    RECIPES_THAT_SHARE,
    REDRAWS_W,
    RN_2D,
    K,
    make_triple,
    new_input,
    record,
    run,
    same,
    selective,
)
from test_schedule import Tokens, equal, weights
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import Trainer, TrainerCallback, TrainingArguments

from hf_nvfp4 import CastWeightsOnce, NVFP4Linear, cast_weights_once, use_recipe


@pytest.fixture
def triple(device):
    """triple(recipe, backend): the same weights each time."""
    return functools.partial(make_triple, device)


@pytest.fixture
def casts(monkeypatch):
    """What is cast from now on."""
    return record(monkeypatch)


def accumulate(model, x, window=contextlib.nullcontext, autocast=None):
    """Gradients of three micro-batches, and the random number that comes next."""
    model.zero_grad()
    torch.manual_seed(3)
    with window(model), torch.autocast(x.device.type, autocast, enabled=autocast is not None):
        for factor in (1, 2, 3):
            model(x * factor).float().square().mean().backward()
    return [*(p.grad for p in model.parameters()), torch.rand(1, device=x.device)]


@pytest.mark.parametrize("autocast", [None, torch.bfloat16], ids=str)
@pytest.mark.parametrize("recipe", [*RECIPES_THAT_SHARE, FORWARD_IN_BF16, DRAWS_W, REDRAWS_W], ids=lambda r: r.name)
def test_weights_are_cast_once_and_no_bit_changes(device, triple, casts, recipe, autocast):
    model, x = triple(recipe), new_input(device).requires_grad_()
    expected = accumulate(model, x, autocast=autocast)
    again = recipe.from_forward  # what dgrad casts is not the weight then, but made of fprop's operand
    assert casts.of(96, K) == 6 + 3 * again
    casts.clear()
    assert same(accumulate(model, x, cast_weights_once, autocast), expected)
    assert casts.of(96, K) == (3 if recipe.fprop.b.draws else 1) + (3 if recipe.dgrad.b.draws or again else 1)
    assert all(layer.weight_casts is None for layer in model.children())


def test_a_windows_operands_are_dropped_at_its_end(device, triple, casts):
    """Though a graph that used them lives."""
    model, x = triple(), new_input(device)
    with cast_weights_once(model):
        graph = model(x)
        del x
        assert casts.alive == (True, True)
    assert casts.alive == (False, True)  # x for backward
    del graph
    assert casts.alive == (False, False)


def test_a_backward_after_the_window_casts_for_itself(device, triple, casts):
    model, x = triple(), new_input(device).requires_grad_()
    with cast_weights_once(model):
        y = model(x)
        y.sum().backward(retain_graph=True)
    expected, x.grad = x.grad, None
    made = casts.of(96, K)
    y.sum().backward()
    assert torch.equal(x.grad, expected) and casts.of(96, K) == made + 1
    del x, y
    assert casts.alive == (False, False)


def replace_in_place(model):
    """A new weight where the old one lay, if memory is given out again so."""
    address, device = model.q.weight.data_ptr(), model.k.weight.device
    model.q.weight = None
    found = [torch.randn(96, K, device=device) for _ in range(50)]
    model.q.weight = nn.Parameter(next((t for t in found if t.data_ptr() == address), found[0]))


def fused_adamw(model):
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
    model(torch.ones(16, K, device=model.q.weight.device)).sum().backward()
    optimizer.step()


@pytest.mark.parametrize(
    "change",
    [
        lambda model: model.q.weight.detach().mul_(-2),
        lambda model: model.load_state_dict({name: -p for name, p in model.state_dict().items()}),
        lambda model: setattr(model.q.weight, "data", -model.q.weight.data),
        lambda model: setattr(model.q, "weight", nn.Parameter(-model.q.weight.detach())),
        lambda model: model.q.set_recipe("fp8"),
        lambda model: model.bfloat16(),
        replace_in_place,
        fused_adamw,  # torch does not count its writes
    ],
    ids=["in place", "load_state_dict", "data", "parameter", "recipe", "dtype", "address", "optimizer"],
)
def test_a_change_inside_the_window_is_seen(device, triple, change):
    model, x = triple(), new_input(device)
    model.q.weight = nn.Parameter(model.q.weight.detach().clone())
    with cast_weights_once(model):
        model(x)
        change(model)
        x = x.to(model.q.weight.dtype)
        inside = [run(model, x), run(model, x)]
    for found in inside:
        assert same(found, run(model, x))


def test_temporary_weights_are_not_taken_for_the_modules_own(device, triple):
    """One after another may lie at the same address."""
    model, x = triple(), new_input(device)
    with cast_weights_once(model), torch.no_grad():
        for factor in (1.0, 2.0, -3.0):
            own = {name: p * factor for name, p in model.named_parameters()}
            with use_recipe(model, "bf16"):
                expected = torch.func.functional_call(model, own, x)
            y = torch.func.functional_call(model, own, x)
            del own
            assert (y - expected).norm() < 0.3 * expected.norm()


def test_only_whole_parameters_are_kept(device, triple):
    """Not what is made anew for each forward, as by a parametrization or FSDP's flat parameter."""
    model, x = triple(), new_input(device)
    nn.utils.parametrize.register_parametrization(model.q, "weight", nn.Dropout(0.5))
    with cast_weights_once(model), nn.utils.parametrize.cached():
        assert model.q.weight_casts is None and model.k.weight_casts is not None
    with cast_weights_once(model):
        first, second = model(x), model(x)
    assert not torch.equal(first[..., :96], second[..., :96]) and torch.equal(first[..., 96:], second[..., 96:])


def test_the_window_goes_with_recomputation_and_evaluation(device, triple, casts):
    model, x = triple(), new_input(device).requires_grad_()
    expected = accumulate(model, x)
    whole = model.forward
    for how in ({"use_reentrant": True}, {"use_reentrant": False}):
        model.forward = lambda x, how=how: checkpoint(whole, x, **how)
        casts.clear()
        assert same(accumulate(model, x, cast_weights_once), expected) and casts.of(96, K) == 2
    model.forward = lambda x: checkpoint(whole, x, use_reentrant=False, context_fn=selective)
    assert same(accumulate(model, x, cast_weights_once), expected)
    del model.forward
    with cast_weights_once(model):
        model(x)
        model.q.weight.data.mul_(2)  # torch does not count this
        assert torch.equal(model.eval()(x), copy.deepcopy(model)(x))


def test_a_model_can_be_copied_inside_the_window(device, triple):
    model, x = triple(), new_input(device)
    with cast_weights_once(model):
        y = model(x)
        copied = copy.deepcopy(model)
        assert torch.equal(copied(x.clone()), y) and copied.q.weight_casts is None


def test_a_compiled_model_takes_no_part(device, triple):
    model, x = triple(), new_input(device)
    torch._dynamo.reset()
    graph = torch.compile(model, fullgraph=True, backend="aot_eager")
    expected = run(model, x, forward=graph)
    with cast_weights_once(model):
        assert same(run(model, x, forward=graph), expected)
        assert not any(layer.weight_casts.operands for layer in model.children())


@pytest.fixture
def one_process(tmp_path):
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_sharded_weights_are_an_error_that_says_so(triple, one_process):
    model = triple().cpu()
    mesh = dist.device_mesh.init_device_mesh("cpu", (1,))
    dist.fsdp.fully_shard(model, mesh=mesh)
    with pytest.raises(ValueError, match="weights are sharded.*Leave cast_weights_once out"), cast_weights_once(model):
        pass
    model(new_input(torch.device("cpu"))).sum().backward()
    with pytest.raises(ValueError, match="no converted linear layers"), cast_weights_once(nn.Linear(2, 2)):
        pass


# ---------------------------------------------------------------------------- Trainer


def train(model, folder, callbacks=(), **arguments):
    defaults = {"max_steps": 3, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 2, "bf16": True}
    quiet = {"report_to": "none", "disable_tqdm": True, "save_strategy": "no", "dataloader_pin_memory": False}
    device = {"use_cpu": model.device.type == "cpu", "full_determinism": model.device.type == "cuda"}
    given = TrainingArguments(str(folder), **(defaults | quiet | device | arguments))
    trainer = Trainer(model, given, train_dataset=Tokens(), eval_dataset=Tokens(4), callbacks=list(callbacks))
    trainer.train()
    return trainer


class Watch(TrainerCallback):
    """Whether operands are kept after a micro-batch, and when the optimizer is about to run."""

    def __init__(self):
        self.kept = {"between": set(), "before the optimizer": set()}

    def _look(self, when, model):
        self.kept[when] |= {m.weight_casts is not None for m in model.modules() if isinstance(m, NVFP4Linear)}

    def on_substep_end(self, args, state, control, model=None, **kwargs):
        self._look("between", model)

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self._look("before the optimizer", model)


def test_trainer_casts_weights_once_a_step(build, tmp_path, casts):
    """With evaluations in between, and Trainer's fused AdamW."""
    made, trained = [], []
    watch = Watch()
    for callbacks in ([], [CastWeightsOnce(), watch]):
        model = build("nvfp4")
        casts.clear()
        train(model, tmp_path, callbacks, learning_rate=1e-2, eval_strategy="steps", eval_steps=1)
        made.append(sum(row == RN_2D or row is None for _, row, col in casts))
        trained.append(weights(model))
        assert all(m.weight_casts is None for m in model.modules() if isinstance(m, NVFP4Linear))
    assert equal(*trained) and watch.kept == {"between": {True}, "before the optimizer": {False}}
    linears, steps, batches = 21, 3, 1
    evaluated = linears * steps * batches
    assert made == [2 * linears * steps * 2 + evaluated, 2 * linears * steps + evaluated]


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"gradient_accumulation_steps": 1}, "gradient_accumulation_steps is 1"),
        ({"torch_compile": True, "torch_compile_backend": "eager", "max_steps": 1}, "the model is compiled"),
    ],
)
def test_the_callback_says_when_it_does_nothing(monkeypatch, llama_config, build, tmp_path, arguments, reason):
    said, llama_config.num_hidden_layers = [], 1
    monkeypatch.setattr("hf_nvfp4.schedule.logger.warning", said.append)
    train(build("fp8_tensor"), tmp_path, [CastWeightsOnce()], **arguments)
    assert len(said) == 1 and reason in said[0]


def test_the_callback_refuses_a_model_that_is_not_converted(build, tmp_path):
    with pytest.raises(ValueError, match="no converted linear layers"):
        train(build(), tmp_path, [CastWeightsOnce()])
