"""Casting an input once: the same bits as casting it in each layer, fewer launches, less memory, nothing stale."""

import contextlib
import functools
import threading
import weakref
from collections import Counter

import pytest
import torch
from sharing_cases import (
    DRAWS_X,
    FORWARD_IN_BF16,
    RECIPES_THAT_SHARE,
    REDRAWS_X,
    K,
    T,
    make_triple,
    new_input,
    record,
    run,
    same,
    selective,
)
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from hf_nvfp4 import RECIPES
from hf_nvfp4 import linear as linear_module
from hf_nvfp4.backends import bf16
from hf_nvfp4.timing import saved_bytes


@pytest.fixture
def triple(device):
    """triple(recipe, backend): the same weights each time."""
    return functools.partial(make_triple, device)


@pytest.fixture
def casts(monkeypatch):
    """What is cast from now on."""
    return record(monkeypatch)


def cast_by_kernels(monkeypatch, device):
    """Backend bf16 casts by kernels; kernel_cases."""
    cases = pytest.importorskip("kernel_cases", reason="the kernels need Triton")
    if not cases.INTERPRETED and device.type == "cpu":
        pytest.skip("needs TRITON_INTERPRET=1 or a GPU")
    monkeypatch.setattr(bf16, "KERNEL_DEVICES", {device.type})
    return cases


@contextlib.contextmanager
def each_its_own(monkeypatch):
    """No layer shares its input's operands."""
    with monkeypatch.context() as patch:
        patch.setattr(linear_module, "casts_of_input", lambda x, layer: None)
        yield


@pytest.mark.parametrize("autocast", [None, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("recipe", "kernels"),
    [(recipe, False) for recipe in (*RECIPES_THAT_SHARE, FORWARD_IN_BF16, *DRAWS_X, REDRAWS_X)]
    + [(RECIPES[name], True) for name in ("nvfp4", "quartet2", "fp8")],  # interpreted, one takes ten seconds
    ids=lambda value: getattr(value, "name", value),
)
def test_an_input_is_cast_once_and_no_bit_changes(monkeypatch, device, triple, casts, recipe, autocast, kernels):
    if kernels:
        cast_by_kernels(monkeypatch, device)
    else:
        monkeypatch.setattr(bf16, "KERNEL_DEVICES", set())
    model, x = triple(recipe, "bf16"), new_input(device)
    with each_its_own(monkeypatch):
        expected = run(model, x, autocast)
    in_backward = 3 * (recipe.wgrad.b.signs == "random" or recipe.from_forward) + 3 * recipe.from_forward
    assert casts.of(2 * T, K) == 3 + in_backward
    casts.clear()
    assert same(run(model, x, autocast), expected)
    draws = recipe.fprop.a.draws or recipe.wgrad.b.draws and not in_backward
    assert casts.of(2 * T, K) == (3 if draws else 1) + in_backward


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
    launches = cast_by_kernels(monkeypatch, device).count_launches(monkeypatch)
    model, x = triple(backend="bf16"), new_input(device)
    with each_its_own(monkeypatch):
        model(x)
    apart = Counter(launches)
    launches.clear()
    y = model(x)
    together = Counter(launches)
    for counted in (apart, together):
        counted.pop("factors_kernel", None)  # of the products, on a GPU
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
