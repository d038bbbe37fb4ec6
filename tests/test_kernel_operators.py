"""The kernels as operators of torch: in graphs and on backend bf16. Bits: test_kernels.py."""

from collections import Counter

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from hf_nvfp4 import RECIPES, Cast, NVFP4Linear, Recipe
from hf_nvfp4.backends import bf16
from hf_nvfp4.backends.operand import Operand
from hf_nvfp4.rounding import flip
from hf_nvfp4.timing import saved_bytes

cases = pytest.importorskip("kernel_cases", reason="the kernels need Triton")
ops, kernels = cases.ops, cases.kernels
NOTHING, VALUES, CODES, CODES_SWIZZLED, CODES_ACROSS = range(5)
SR, RN_2D, RN_H = Cast(rounding="stochastic"), Cast(square=True), Cast(hadamard=16)
SR_H, EDEN = Cast(rounding="stochastic", hadamard=16), Cast(rounding="eden")
NEAREST = Recipe("nearest", (Cast(), RN_2D), (Cast(), RN_2D), (RN_H, RN_H))

pytestmark = cases.MARKS


def _name(recipe):
    return getattr(recipe, "name", recipe)


@pytest.fixture
def on_kernels(monkeypatch, device):
    """Backend bf16 casts by kernels, on the CPU too."""
    monkeypatch.setattr(bf16, "KERNEL_DEVICES", {device.type})


@pytest.fixture
def gpu(device):
    if device.type != "cuda" or cases.INTERPRETED:
        pytest.skip("needs a GPU")
    return device


@pytest.fixture
def launches(monkeypatch):
    """The kernels launched, by name."""
    return cases.count_launches(monkeypatch)


def run(layer, x, dy, seed=3):
    """y, dx and dw of one forward and backward, the random draws always the same."""
    torch.manual_seed(seed)
    layer.zero_grad()
    x = x.clone().requires_grad_()
    y = layer(x)
    y.backward(dy)
    return y.detach(), x.grad, layer.weight.grad


def relative(a, b):
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


# ---------------------------------------------------------------------------- operators


def calls(device):
    """Arguments of operators by name: each output, both dtypes of scales, ragged and empty."""
    x, empty = torch.randn(37, 64, device=device), torch.empty(0, 64, device=device)
    seed, two = cases.random_seed(device), torch.ones(2, device=device)
    text = {c: kernels.spec(c) for c in (Cast(), SR, RN_2D, SR_H, EDEN, Cast("fp8_e4m3_block"), Cast("fp8_e5m2"))}
    per_row = kernels.spec(Cast(outer="row"))
    yield "amax", (x, True, -1)
    yield "amax", (x.bfloat16(), True, 0)
    yield "amax", (x.T.contiguous().T, False, 16)
    yield "amax", (empty, True, 16)
    yield "cast", (x, two, None, seed, text[Cast()], VALUES, text[SR_H], CODES_ACROSS)
    yield "cast", (x, two, seed, None, text[EDEN], CODES, None, NOTHING)
    yield "cast", (x[::2], two, seed, None, text[SR], CODES, text[RN_2D], VALUES)
    yield "cast", (x.half(), two, seed, None, text[SR], CODES_SWIZZLED, text[Cast()], CODES_SWIZZLED)
    fp8 = text[Cast("fp8_e4m3_block")], text[Cast("fp8_e5m2")]
    yield "cast", (x, two, None, None, fp8[0], CODES, fp8[1], CODES_ACROSS)
    yield "cast", (x, two, None, None, fp8[1], VALUES, fp8[0], CODES_ACROSS)
    yield "cast", (x, x.abs().amax(1), None, None, per_row, CODES, None, NOTHING)
    yield "cast", (empty, two, None, seed, text[Cast()], CODES, text[SR_H], VALUES)
    yield "rotate", (x, 32, seed, False)
    yield "rotate", (x[:, :40], 32, None, True)
    for cast in (Cast(), Cast("fp8_e4m3_block"), Cast("fp8_e5m2")):
        for out in (CODES, CODES_ACROSS):
            written = ops.cast(x, two, None, None, text[cast], out, None, NOTHING)
            scales = written[1] if len(written) == 3 else None
            yield "dequantize", (written[0], scales, text[cast], out == CODES_ACROSS)


def test_operators_keep_what_torch_asks_of_them(device):
    """Fake implementations, schemas, compilation, with static and dynamic sizes: torch.library.opcheck."""
    for name, arguments in calls(device):
        torch.library.opcheck(getattr(torch.ops.hf_nvfp4_ops, name).default, arguments)


def test_scaled_matmul_is_an_operator(gpu):
    a, b, one = (torch.ones(shape, device=gpu) for shape in ((16, 32), (48, 32), ()))
    a, b = a.bfloat16(), b.bfloat16()
    for arguments in ((a, b, one, one, None, torch.float32), (a, b, one, one, b[:, 0].contiguous(), torch.bfloat16)):
        torch.library.opcheck(torch.ops.hf_nvfp4_ops.scaled_matmul.default, arguments)


# ---------------------------------------------------------------------------- graphs


def compiled(module, device):
    """The module compiled whole, and a counter of its graphs: inductor on a GPU, eager after autograd on the CPU."""
    counter = CompileCounterWithBackend("inductor" if device.type == "cuda" else "aot_eager")
    torch._dynamo.reset()
    return torch.compile(module, fullgraph=True, backend=counter), counter


@pytest.mark.parametrize("recipe", [NEAREST, *RECIPES], ids=_name)
def test_a_layer_compiles_into_one_graph(device, on_kernels, launches, recipe):
    layer = NVFP4Linear(64, 48, recipe=recipe, backend="bf16", device=device)
    x, dy = torch.randn(37, 64, device=device), torch.randn(37, 48, device=device)
    expected = run(layer, x, dy)
    eager = sorted(launches)
    launches.clear()
    graph, counter = compiled(layer, device)
    results = run(graph, x, dy)
    # Inductor has random numbers of its own: other draws for the gradients.
    redrawn = device.type == "cuda" and any(cast.rounding == "stochastic" for cast in layer.recipe.casts)
    gradient = 0.5 if redrawn else 1e-6
    if device.type == "cuda" and layer.recipe.estimator == "dge":
        gradient = 2.0**-9  # eager mode keeps the slopes in BF16, inductor has them again in FP32
    for got, want, limit in zip(results, expected, (1e-6, gradient, gradient), strict=True):
        assert relative(got, want) < limit
    assert counter.frame_count == 1
    # In a graph plain operations find the amax of what is not rotated.
    found, wanted = Counter(launches), Counter(eager)
    assert found.pop("amax_kernel", 0) <= wanted.pop("amax_kernel", 0)
    # x is cast as in the forward once more where backward is made of that: in a graph that is one operator.
    x_cast = layer.recipe.fprop.a
    again = layer.recipe.from_forward and kernels.knows(x_cast) and not x_cast.block_format.high_precision
    assert wanted - found == Counter({"cast_kernel": again}) and not found - wanted
    known = [c for c in layer.recipe.casts if kernels.knows(c) and not c.block_format.high_precision]
    assert bool(known) == ("cast_kernel" in eager)


def test_layers_of_many_recipes_compile_one_after_the_other(device, on_kernels):
    """Their numbers stay constants: as attributes that change, torch made them variables."""
    torch._dynamo.reset()
    x = torch.randn(48, 64, device=device, requires_grad=True)
    for recipe in ("nvfp4", "nvfp4_unbiased", "nvfp4_hopper", "fp8_tensor"):
        layer = NVFP4Linear(64, 48, recipe=recipe, backend="bf16", device=device)
        y = torch.compile(layer, fullgraph=True, backend="aot_eager")(x)
        y.sum().backward()
        assert relative(y, layer(x)) < 1e-6


def test_a_graph_keeps_what_is_made_of_x_and_nothing_made_of_the_weight(device, on_kernels):
    layer = NVFP4Linear(256, 128, recipe=NEAREST, backend="bf16", device=device)
    x = torch.randn(16, 256, device=device, dtype=torch.bfloat16, requires_grad=True)
    graph, _ = compiled(layer, device)
    assert saved_bytes(lambda: graph(x), [*layer.parameters(), x]) == 256 * 16 * 9 // 16 + 4


def test_a_compiled_layer_takes_any_number_of_tokens(device, on_kernels):
    layer = NVFP4Linear(64, 48, recipe=NEAREST, backend="bf16", device=device)
    graph, counter = compiled(layer, device)
    for tokens in (37, 64, 101):
        x, dy = torch.randn(tokens, 64, device=device), torch.randn(tokens, 48, device=device)
        for got, want in zip(run(graph, x, dy), run(layer, x, dy), strict=True):
            assert relative(got, want) < 1e-6
    assert counter.frame_count == 2  # for one size, for any


def test_a_whole_llama_compiles_into_one_graph(device, on_kernels, launches, llama_config, build):
    llama_config.num_hidden_layers = 1
    model = build(NEAREST, backend="bf16").to(device)
    ids = torch.randint(0, llama_config.vocab_size, (2, 19), device=device)
    results = []
    graph, counter = compiled(model, device)
    for forward in (model, graph):
        model.zero_grad()
        launches.clear()
        loss = forward(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        results.append((loss.item(), torch.cat([p.grad.flatten() for p in model.parameters()]), sorted(launches)))
    (loss, gradient, launched), (graph_loss, graph_gradient, graph_launched) = results
    assert counter.frame_count == 1
    # Four for each of the seven linears, but q, k and v share one of their x, gate and up too.
    assert launched.count("cast_kernel") == 4 * 7 - 3
    # A graph casts x once for q, k and v: the operators have no side effects.
    assert set(graph_launched) == set(launched) and len(graph_launched) < len(launched)
    # On a GPU inductor's sums have another order: an element of FP4 may then move by a step, rarely.
    assert graph_loss == pytest.approx(loss, rel=1e-4 if device.type == "cuda" else 1e-6)
    assert relative(graph_gradient, gradient) < (0.05 if device.type == "cuda" else 1e-5)


@pytest.mark.parametrize("recipe", [NEAREST, "fp8", "fp8_tensor"], ids=_name)
def test_a_cuda_graph_replays_forward_and_backward(gpu, recipe):
    layer = NVFP4Linear(64, 96, recipe=recipe, backend="bf16", device=gpu)
    x, dy = torch.randn(40, 64, device=gpu, requires_grad=True), torch.randn(40, 96, device=gpu)
    replay = captured(layer, x, dy)
    for _ in range(3):
        with torch.no_grad():
            x.normal_()
        expected = run(layer, x.detach(), dy)
        for got, want in zip(replay(), expected, strict=True):
            assert relative(got, want) < 1e-6


def test_every_replay_of_a_cuda_graph_draws_anew(gpu):
    layer = NVFP4Linear(64, 96, recipe="nvfp4", backend="bf16", device=gpu)
    x, dy = torch.randn(40, 64, device=gpu, requires_grad=True), torch.randn(40, 96, device=gpu)
    replay = captured(layer, x, dy)
    (y, dx, dw), (again, dx_again, dw_again) = replay(), replay()
    assert y.equal(again) and not dx.equal(dx_again) and not dw.equal(dw_again)
    assert relative(dw, dw_again) < 0.5


def captured(layer, x, dy):
    """A function that replays forward and backward from a CUDA graph and copies y, dx and dw."""

    def step():
        layer.zero_grad()
        x.grad = None
        y = layer(x)
        y.backward(dy)
        return y.detach(), x.grad, layer.weight.grad

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    layer.zero_grad()
    x.grad = None
    with torch.cuda.graph(graph):
        outputs = step()

    def replay():
        graph.replay()
        return [t.clone() for t in outputs]

    return replay


@pytest.mark.parametrize("recipe", list(RECIPES))
def test_a_step_never_waits_for_the_gpu(gpu, recipe):
    model = nn.Sequential(
        NVFP4Linear(64, 96, recipe=recipe, device=gpu), nn.GELU(), NVFP4Linear(96, 64, recipe=recipe, device=gpu)
    )
    optimizer = torch.optim.AdamW(model.parameters())
    x = torch.randn(40, 64, device=gpu)

    def step():
        optimizer.zero_grad()
        with torch.autocast("cuda", torch.bfloat16):
            model(x).float().square().mean().backward()
        optimizer.step()

    step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


# ---------------------------------------------------------------------------- backend bf16

# Beyond what today's recipes ask for: what the kernels leave to PyTorch, every format, scales of xᵀ's rows.
PAIRS = [
    (Cast(outer="row"), Cast(outer="row")),
    (Cast(hadamard=32), Cast(hadamard=128, rounding="stochastic")),
    (Cast("bf16", rounding="stochastic"), Cast("bf16", rounding="stochastic")),
    (Cast("bf16"), SR_H),
    (SR, Cast("bf16")),
    (Cast(scale_rule="best"), Cast(scale_rule="4over6", square=True)),
    (Cast("mxfp4", square=True), Cast("mxfp4", rounding="stochastic", headroom=4 / 3, hadamard=16)),
    (Cast("mxfp8", scale_rule="ceil"), Cast("fp8_e4m3_block", square=True)),
    (Cast("fp8_e4m3", outer="row"), Cast("fp8_e5m2", hadamard=8)),
    (Cast(square=True, rounding="stochastic"), Cast(square=True, rounding="stochastic")),
    (None, SR_H),
]


def assert_same_operands(monkeypatch, device, x, row, col, keep_col, signs=None):
    """With kernels and without: equal values, scales and draws; and an operand is what its tensors say."""
    both = []
    for devices in (set(), {device.type}):
        monkeypatch.setattr(bf16, "KERNEL_DEVICES", devices)
        torch.manual_seed(11)
        both.append([None if a is None else (a, bf16._unpacked(a)) for a in bf16.cast(x, row, col, keep_col, signs)])
    for cast, plain, ours in zip((row, col), *both, strict=True):
        assert (cast is None) == (ours is None) == (plain is None)
        if cast is None:
            continue
        operand, values = ours
        assert type(values) is Operand and operand.cast == cast
        rebuilt = bf16._unpacked(type(operand)(*operand.tensors, operand.cast))
        for want in (plain[1], rebuilt):
            assert values.values.dtype == want.values.dtype and values.values.equal(want.values), cast
            one = torch.ones((), device=device)  # what None says
            assert (one if values.scale is None else values.scale).equal(one if want.scale is None else want.scale)
        wide = operand.dequantize(torch.float64)
        rounded = not bf16._exact(cast.block_format) and not isinstance(operand, Operand)
        assert relative(wide, values.dequantize(torch.float64)) <= (2**-8 if rounded else 0)
        assert wide.shape == values.values.shape
    return [None if ours is None else ours[0] for ours in both[1]]


@pytest.mark.parametrize("recipe", [*RECIPES.values(), RECIPES["nvfp4"].in_bf16("forward")], ids=_name)
def test_a_layers_operands_are_the_same_with_kernels_and_without(monkeypatch, device, recipe):
    x, w, dy = (torch.randn(*s, device=device).bfloat16() for s in ((37, 64), (48, 64), (37, 48)))
    recipe = recipe.fitted(64, 48)
    evaluated = recipe.per_token()
    for tensor, row, col, keep in (
        (x, recipe.fprop.a, recipe.wgrad.b, True),
        (w, recipe.fprop.b, None, False),
        (dy, recipe.dgrad.a, recipe.wgrad.a, False),
        (w, None, recipe.dgrad.b, False),
        (x, evaluated.fprop.a, None, False),
    ):
        operands = assert_same_operands(monkeypatch, device, tensor, row, col, keep)
        if keep and col.format == "nvfp4":
            kept = sum(t.numel() * t.element_size() for t in operands[1].tensors)
            tokens = -(-37 // max(16, col.hadamard)) * max(16, col.hadamard)
            assert kept == tokens * 64 * 9 // 16 + 4  # half a byte, a scale for each 16, one FP32 number


@pytest.mark.parametrize("keep_col", [False, True])
@pytest.mark.parametrize(("row", "col"), PAIRS, ids=str)
def test_other_operands_are_the_same_with_kernels_and_without(monkeypatch, device, row, col, keep_col):
    assert_same_operands(monkeypatch, device, torch.randn(37, 128, device=device), row, col, keep_col)


@pytest.mark.parametrize(
    "cast",
    [
        Cast(rounding="eden", hadamard=128, signs="random"),
        Cast(hadamard=16, signs="random", rounding="stochastic", outer="bound"),
        Cast("mxfp4", hadamard=512, signs="random"),
        Cast("nvfp4_128", hadamard=32, signs="random"),
    ],
    ids=str,
)
def test_operands_with_drawn_signs_are_the_same_with_kernels_and_without(monkeypatch, device, cast):
    """And are those of a tensor that was flipped first."""
    x, signs = torch.randn(37, max(128, cast.hadamard), device=device).bfloat16(), cases.random_seed(device)
    for part, row, col, dim in ((x, cast, None, 1), (x[:, :32], None, cast, 0)):
        drawn = assert_same_operands(monkeypatch, device, part, row, col, dim == 0, signs)[dim == 0]
        torch.manual_seed(11)
        plain = bf16.cast(flip(part, signs, cast.hadamard, dim), row, col, dim == 0)[dim == 0]
        assert bf16._unpacked(drawn).values.equal(bf16._unpacked(plain).values)


@pytest.mark.parametrize("recipe", list(RECIPES))
def test_a_layer_is_the_same_with_kernels_and_without(monkeypatch, device, recipe):
    x, dy = torch.randn(37, 64, device=device), torch.randn(37, 48, device=device)
    layer = NVFP4Linear(64, 48, recipe=recipe, backend="bf16", device=device)
    results = []
    for devices in (set(), {device.type}):
        monkeypatch.setattr(bf16, "KERNEL_DEVICES", devices)
        results.append(run(layer, x, dy))
    for got, want in zip(*results, strict=True):
        assert relative(got, want) < 1e-6


@pytest.mark.parametrize("recipe", ["quartet2", "nvfp4_hopper_eden"])
def test_recipes_of_ms_eden_leave_no_cast_to_pytorch(monkeypatch, device, on_kernels, launches, recipe):
    def refuse(*arguments):
        raise AssertionError("a cast by plain PyTorch")

    monkeypatch.setattr(bf16, "_by_torch", refuse)
    layer = NVFP4Linear(128, 256, recipe=recipe, backend="bf16", device=device)
    run(layer, torch.randn(37, 128, device=device), torch.randn(37, 256, device=device))
    again = 2 * layer.recipe.from_forward  # x and w as the forward cast them
    rotations = {"rotate_kernel": 1, "rotate_transposed_kernel": 3}  # dy; w, dy and x
    launched = Counter(launches)
    launched.pop("factors_kernel", None)  # a GPU's product of two FP32 scales
    assert launched == {"cast_kernel": 6 + again, "amax_kernel": 6 + again, **rotations}


# ---------------------------------------------------------------------------- the GEMM


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("sizes", [(33, 96, 64), (256, 128, 512), (1, 48, 16)], ids=str)
def test_scaled_matmul_equals_float64_in_every_layout(gpu, sizes, dtype):
    m, n, k = sizes
    a, b = (torch.randn(rows, k, device=gpu).bfloat16() for rows in (m, n))
    scale_a, scale_b = torch.tensor(3e-5, device=gpu), torch.tensor(0.7, device=gpu)
    layouts = (lambda x: x, lambda x: x.T.contiguous().T, cases.LAYOUTS["wide rows"], cases.LAYOUTS["every other row"])
    product = (a.double() @ b.double().T) * (scale_a * scale_b).double()
    for bias in (None, torch.randn(n, device=gpu), torch.randn(n, device=gpu).bfloat16()):
        want = product if bias is None else product + bias.to(dtype).double()
        for lay_a in layouts:
            for lay_b in layouts:
                with cases.poisoned():
                    got = ops.scaled_matmul(lay_a(a), lay_b(b), scale_a, scale_b, bias, dtype)
                assert got.dtype == dtype and got.shape == (m, n)
                # FP32 sums, rounded once: half a unit in the last place of BF16 is 2^-8 at most.
                error = (got.double() - want).abs() - (2.0**-8 * want.abs() if dtype == torch.bfloat16 else 0)
                assert error.max() < 1e-6 * want.abs().max()


def test_scaled_matmul_keeps_nan_scales(gpu):
    a, one = torch.ones(16, 32, device=gpu).bfloat16(), torch.ones((), device=gpu)
    assert ops.scaled_matmul(a, a, one, one * float("nan"), None, torch.float32).isnan().all()
