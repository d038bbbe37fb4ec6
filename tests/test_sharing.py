"""Casting a tensor once: the same bits as casting it each time, fewer launches, less memory, nothing stale."""

import contextlib
import copy
import threading
import weakref
from collections import Counter

import pytest
import torch
import torch.distributed as dist
from test_schedule import Tokens, equal, weights
from torch import nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts
from torch.utils.flop_counter import FlopCounterMode
from transformers import Trainer, TrainerCallback, TrainingArguments

from hf_nvfp4 import RECIPES, Cast, CastWeightsOnce, NVFP4Linear, Recipe, cast_weights_once, use_recipe
from hf_nvfp4 import linear as linear_module
from hf_nvfp4.backends import bf16
from hf_nvfp4.gemm import cast
from hf_nvfp4.timing import saved_bytes

SR, RN, RN_2D, RN_H = Cast(rounding="stochastic"), Cast(), Cast(square=True), Cast(hadamard=16)
NEAREST = Recipe("nearest", (RN, RN_2D), (RN, RN_2D), (RN_H, RN_H))
# What draws random numbers is cast each time: x in either of its casts, the weight.
DRAWS_X = [Recipe("draws_x", (SR, RN), (RN, RN), (RN, RN)), Recipe("keeps_x", (RN, RN), (RN, RN), (RN, SR))]
DRAWS_W = Recipe("draws_w", (RN, SR), (RN, SR), (RN, RN))
FORWARD_IN_BF16 = RECIPES["nvfp4"].in_bf16("forward")
T, K = 37, 64


class Triple(nn.Module):
    """Queries, keys and values of one input."""

    def __init__(self, recipe, device, backend):
        super().__init__()
        self.q, self.k, self.v = (
            NVFP4Linear(K, n, bias, device=device, recipe=recipe, backend=backend)
            for n, bias in ((96, True), (48, False), (48, False))
        )

    def forward(self, x):
        return torch.cat([layer(x) for layer in self.children()], -1)


@pytest.fixture
def triple(device):
    """triple(recipe, backend): the same weights each time."""

    def make(recipe=NEAREST, backend="auto"):
        torch.manual_seed(1)
        return Triple(recipe, device, backend)

    return make


class Recorded(list):
    """What was cast, a shape and two casts each; and the operands, for as long as somebody else holds them."""

    def __init__(self):
        super().__init__()
        self._row, self._col = [], []

    def __call__(self, x, backend, *, row=None, col=None, keep_col=False):
        operands = cast(x, backend, row=row, col=col, keep_col=keep_col)
        self.append((tuple(x.shape), row, col))
        for operand, references in zip(operands, (self._row, self._col), strict=True):
            references += [weakref.ref(t) for t in operand.tensors if t is not None] if operand else []
        return operands

    @property
    def alive(self):
        """Whether tensors of row and column operands are in memory."""
        return tuple(any(r() is not None for r in references) for references in (self._row, self._col))

    def of(self, *shape):
        """How many casts of tensors of this shape were made."""
        return sum(entry[0] == shape for entry in self)


@pytest.fixture
def casts(monkeypatch):
    recorded = Recorded()
    monkeypatch.setattr(linear_module, "cast", recorded)
    return recorded


@contextlib.contextmanager
def each_its_own(monkeypatch):
    """No layer shares its input's operands."""
    with monkeypatch.context() as patch:
        patch.setattr(linear_module, "casts_of_input", lambda x, layer: None)
        yield


def new_input(device, dtype=torch.float32, seed=2):
    return torch.randn(2, T, K, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def run(model, x, autocast=None, forward=None):
    """y, all gradients and the random number that comes next, of one forward and backward of something before it."""
    torch.manual_seed(3)
    model.zero_grad()
    leaf = x.clone().requires_grad_()
    with torch.autocast(x.device.type, autocast, enabled=autocast is not None):
        y = (model if forward is None else forward)(leaf * 1)
    y.backward(torch.linspace(-1, 1, y.numel(), device=y.device, dtype=y.dtype).reshape(y.shape))
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    return [y.detach(), leaf.grad, *gradients, torch.rand(1, device=x.device)]


def same(a, b):
    return len(a) == len(b) and all(torch.equal(*pair) for pair in zip(a, b, strict=True))


# ---------------------------------------------------------------------------- inputs


@pytest.mark.parametrize("kernels", [False, True])
@pytest.mark.parametrize("autocast", [None, torch.bfloat16], ids=str)
@pytest.mark.parametrize("recipe", [*RECIPES.values(), FORWARD_IN_BF16, *DRAWS_X], ids=lambda r: r.name)
def test_an_input_is_cast_once_and_no_bit_changes(monkeypatch, device, triple, casts, recipe, autocast, kernels):
    monkeypatch.setattr(bf16, "KERNEL_DEVICES", {device.type} if kernels else set())
    model, x = triple(recipe, "bf16"), new_input(device)
    with each_its_own(monkeypatch):
        expected = run(model, x, autocast)
    assert casts.of(2 * T, K) == 3
    casts.clear()
    assert same(run(model, x, autocast), expected)
    assert casts.of(2 * T, K) == (3 if recipe in DRAWS_X else 1)


def test_other_backends_share_too(monkeypatch, device, triple, casts):
    model, x = triple(backend="reference"), new_input(device)
    with each_its_own(monkeypatch):
        expected = run(model, x)
    casts.clear()
    assert same(run(model, x), expected) and casts.of(2 * T, K) == 1


def test_a_bf16_input_of_recipe_bf16_is_not_held(device, triple, casts):
    """There is nothing to cast: the operand is the input itself."""
    model, x = triple("bf16").bfloat16(), new_input(device, torch.bfloat16)
    held = weakref.ref(x)
    with torch.no_grad():
        model(x)
    del x
    assert held() is None and casts.of(2 * T, K) == 3


def test_what_is_saved_for_backward_is_saved_once(monkeypatch, device, triple):
    model, x = triple(), new_input(device)
    with each_its_own(monkeypatch):
        apart = saved_bytes(lambda: model(x), model.parameters())
    together = saved_bytes(lambda: model(x), model.parameters())
    tokens = -(-2 * T // 16) * 16
    assert apart == 3 * together and together == K * tokens * 9 // 16 + 4  # 4 bits, a byte for 16 of them, one scale


def test_kernels_are_launched_once(monkeypatch, device, triple):
    cases = pytest.importorskip("kernel_cases", reason="the kernels need Triton")
    if not cases.INTERPRETED and device.type == "cpu":
        pytest.skip("needs TRITON_INTERPRET=1 or a GPU")
    monkeypatch.setattr(bf16, "KERNEL_DEVICES", {device.type})
    launches = cases.count_launches(monkeypatch)
    model, x = triple(backend="bf16"), new_input(device)
    with each_its_own(monkeypatch):
        model(x)
    apart = Counter(launches)
    launches.clear()
    y = model(x)
    together = Counter(launches)
    assert apart == {"amax_kernel": 6, "cast_kernel": 6}  # three of x, three of weights
    assert together == {"amax_kernel": 4, "cast_kernel": 4}
    # A graph merges equal operators, and nothing that we keep is a part of it.
    launches.clear()
    torch._dynamo.reset()
    graph = torch.compile(model, fullgraph=True, backend="inductor" if device.type == "cuda" else "aot_eager")
    assert torch.allclose(graph(x), y, rtol=1e-5, atol=1e-5)
    assert Counter(launches)["cast_kernel"] == together["cast_kernel"]


def test_operands_go_with_the_input(device, triple, casts):
    model, x = triple(), new_input(device)
    y = model(x)
    assert casts.alive == (True, True)
    del x
    assert casts.alive == (False, True)  # backward needs the latter
    del y
    assert casts.alive == (False, False)
    x = new_input(device)
    with torch.no_grad():
        model(x)
    assert casts.alive == (True, False)
    del x
    assert casts.alive == (False, False)


def test_operands_go_when_another_input_comes(device, triple, casts):
    """Though the first one lives, and its graph."""
    model, x, other = triple(), new_input(device), torch.randn(7, K, device=device)
    graph = model(x)
    with torch.no_grad():
        model(other)
    assert casts.of(2 * T, K) == casts.of(7, K) == 1
    del other
    assert casts.alive == (False, True)
    del graph
    assert casts.alive == (False, False) and x is not None


@pytest.mark.parametrize(
    "change",
    [
        lambda x: x.mul_(2),
        lambda x: x.detach().neg_(),
        lambda x: x[1, 3].zero_(),
        lambda x: x.view(-1)[5:9].fill_(9),
        lambda x: setattr(x, "data", -2 * x.data),
        lambda x: setattr(x, "data", x.data[:1]),
        lambda x: x.resize_(1, 5, K),
    ],
)
def test_a_change_between_two_layers_is_seen(device, triple, change):
    model, x = triple(), new_input(device)
    model.q(x)
    change(x)
    assert torch.equal(model.k(x), model.k(x.clone()))


@pytest.mark.parametrize("view", [lambda x: x[:], lambda x: x[1:], lambda x: x.detach(), lambda x: x[:, :16]])
def test_a_view_is_another_input(device, triple, view):
    model, x = triple(), new_input(device)
    model.q(x)
    assert torch.equal(model.k(view(x)), model.k(view(x).clone()))


def test_an_input_that_is_not_contiguous_is_shared(device, triple, casts):
    model, x = triple(), new_input(device)[:, ::2]
    assert torch.equal(model(x), torch.cat([layer(x.clone()) for layer in model.children()], -1))
    assert casts.of(x.numel() // K, K) == 1 + 3


def other_recipe(model):
    model.k.set_recipe("fp8_tensor")


def other_backend(model):
    model.k.backend = "reference"


@pytest.mark.parametrize(
    "change",
    [
        other_recipe,
        other_backend,
        lambda model: model.k.eval(),
        lambda model: model.k.requires_grad_(False),
        lambda model: model.q.requires_grad_(False),
    ],
    ids=["recipe", "backend", "eval", "frozen", "frozen before"],
)
def test_a_layer_that_casts_otherwise_has_its_own_operands(monkeypatch, device, triple, casts, change):
    model, x = triple(), new_input(device)
    change(model)
    with each_its_own(monkeypatch):
        expected = run(model, x)
    casts.clear()
    assert same(run(model, x), expected)
    assert casts.of(2 * T, K) == 2  # the other two layers still share


def test_another_compute_dtype_or_grad_mode_is_another_cast(device, triple):
    model, x = triple(), new_input(device)
    model.q(x)
    with torch.autocast(device.type, torch.bfloat16):
        assert torch.equal(model.k(x), model.k(x.clone()))
    x = x.clone()
    with torch.no_grad():
        model.q(x)
    for _ in range(2):  # the second time on its own
        model.k.zero_grad()
        model.k(x).sum().backward()
        x, before = x.clone(), model.k.weight.grad
    assert torch.equal(model.k.weight.grad, before)
    with torch.inference_mode():
        model(x)
        model(x.clone())
    assert torch.equal(model.k(x), model.k(x.clone()))


def test_a_loop_over_one_input_casts_it_each_time(device, triple, casts):
    """A benchmark would otherwise time something else, a CUDA graph capture less than a step."""
    model, x = triple(), new_input(device)
    for _ in range(3):
        model.q(x)
    assert casts.of(2 * T, K) == 3


def test_modes_that_see_every_operation_see_every_cast(device, triple, casts):
    model, x = triple(), new_input(device)
    model.q(x)
    with FlopCounterMode(display=False):
        model.k(x)
        model.v(x)
    assert casts.of(2 * T, K) == 3


def test_each_thread_has_its_own(device, triple, casts):
    model, x = triple(), new_input(device)
    model.q(x)
    thread = threading.Thread(target=model.k, args=(x,))
    thread.start()
    thread.join()
    model.v(x)
    assert casts.of(2 * T, K) == 2


def selective():
    return create_selective_checkpoint_contexts([torch.ops.aten.mm.default, torch.ops.aten.addmm.default])


@pytest.mark.parametrize(
    "how", [{"use_reentrant": True}, {"use_reentrant": False}, {"use_reentrant": False, "context_fn": selective}]
)
@pytest.mark.parametrize("apart", [True, False], ids=["each layer", "all three"])
@pytest.mark.parametrize("recipe", ["nvfp4", "fp8_tensor"])
def test_recomputation_changes_nothing(device, triple, recipe, how, apart):
    model, x = triple(recipe), new_input(device)

    def forward(x):
        if apart:
            return torch.cat([checkpoint(layer, x, **how) for layer in model.children()], -1)
        return checkpoint(model, x, **how)

    assert same(run(model, x, forward=forward), run(model, x))


def test_a_cuda_graph_casts_its_inputs_itself(device, triple):
    if device.type != "cuda":
        pytest.skip("needs a GPU")
    model, x = triple(), new_input(device)
    with torch.no_grad():
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            model(x)
            model.q(x)  # a new beginning: k and v would share it
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=side):
            captured = model.k(x)
        x.normal_()
        graph.replay()
        assert torch.equal(captured, model.k(x.clone()))


# ---------------------------------------------------------------------------- weights


def accumulate(model, x, window=contextlib.nullcontext, autocast=None):
    """Gradients of three micro-batches, and the random number that comes next."""
    model.zero_grad()
    torch.manual_seed(3)
    with window(model), torch.autocast(x.device.type, autocast, enabled=autocast is not None):
        for factor in (1, 2, 3):
            model(x * factor).float().square().mean().backward()
    return [*(p.grad for p in model.parameters()), torch.rand(1, device=x.device)]


@pytest.mark.parametrize("autocast", [None, torch.bfloat16], ids=str)
@pytest.mark.parametrize("recipe", [*RECIPES.values(), FORWARD_IN_BF16, DRAWS_W], ids=lambda r: r.name)
def test_weights_are_cast_once_and_no_bit_changes(device, triple, casts, recipe, autocast):
    model, x = triple(recipe), new_input(device).requires_grad_()
    expected = accumulate(model, x, autocast=autocast)
    assert casts.of(96, K) == 6
    casts.clear()
    assert same(accumulate(model, x, cast_weights_once, autocast), expected)
    assert casts.of(96, K) == (6 if recipe is DRAWS_W else 2)
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
        ({"torch_compile": True, "torch_compile_backend": "aot_eager", "max_steps": 1}, "the model is compiled"),
    ],
)
def test_the_callback_says_when_it_does_nothing(monkeypatch, build, tmp_path, arguments, reason):
    said = []
    monkeypatch.setattr("hf_nvfp4.schedule.logger.warning", said.append)
    train(build("fp8_tensor"), tmp_path, [CastWeightsOnce()], **arguments)
    assert len(said) == 1 and reason in said[0]


def test_the_callback_refuses_a_model_that_is_not_converted(build, tmp_path):
    with pytest.raises(ValueError, match="no converted linear layers"):
        train(build(), tmp_path, [CastWeightsOnce()])
