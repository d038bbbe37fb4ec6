"""What scripts/bench.py times of layers: casts, a linear layer's forward and backward, the bare products.

And whether each is right: compared with backend `reference` from the same seed, at the shape that is timed. Knows
neither clocks nor tables. The yardstick for all is the plain PyTorch of yardstick.py.
"""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from hf_nvfp4 import yardstick
from hf_nvfp4.backends import BACKENDS, reference
from hf_nvfp4.casts import Cast
from hf_nvfp4.gemm import backend_name
from hf_nvfp4.language import Recipe
from hf_nvfp4.linear import NVFP4Linear, quantized_linears
from hf_nvfp4.recipes import get_recipe

SEED = 1
YARDSTICK = "inductor"
# Backends whose products run on FP8 tensor cores.
ON_FP8 = ("fp8", "fp8_rounded")


@dataclass(frozen=True)
class Variant:
    """A recipe on a backend (a key of BACKENDS), and the name that its rows have."""

    name: str
    recipe: Recipe
    backend: str

    @classmethod
    def parse(cls, text: str, backend: str, device: torch.device) -> "Variant":
        """text: "recipe" or "recipe@backend"; backend: where the text names none.

        Raises:
            ValueError: an unknown name, or a backend that does not run the recipe on the device.
        """
        name, _, own = text.partition("@")
        recipe = get_recipe(name)
        return cls(text, recipe, backend_name(own or backend, recipe, device))


# ---- Casts ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Call:
    """One call of a backend's `cast`."""

    row: Cast | None = None
    col: Cast | None = None
    keep_col: bool = False

    def __call__(self, backend, x: Tensor) -> tuple:
        return backend.cast(x, self.row, self.col, self.keep_col)

    def __str__(self) -> str:
        parts = [f"{side} {cast}" for side, cast in (("row", self.row), ("column", self.col)) if cast]
        return " + ".join(parts) + (" kept" if self.keep_col else "")

    @property
    def casts(self) -> list[Cast]:
        """Those asked for."""
        return [cast for cast in (self.row, self.col) if cast]

    @property
    def recipe(self) -> Recipe:
        """A recipe of these casts, for which a backend can be asked."""
        first, last = self.casts[0], self.casts[-1]
        return Recipe(str(self), (first, first), (first, first), (last, last))

    def traffic(self, x: Tensor, operands: tuple, amax_given: bool = False) -> tuple[int, int]:
        """Bytes that casting x reads (twice where a tensor scale needs an amax first) and writes."""
        reads = 2 if not amax_given and any(cast.block_format.tensor_scale for cast in self.casts) else 1
        tensors = [t for operand in operands if operand is not None for t in operand.tensors if t is not None]
        return reads * x.nbytes, sum(t.nbytes for t in tensors)


SR = {"rounding": "stochastic"}
CASTS = {
    "rne": Call(Cast()),
    "sr": Call(Cast(**SR)),
    "2d": Call(Cast(square=True)),
    "rht": Call(col=Cast(hadamard=16)),
    "rht_sr": Call(col=Cast(hadamard=16, **SR)),
    "rht_kept": Call(col=Cast(hadamard=16), keep_col=True),
    "col": Call(col=Cast()),
    "2d_col": Call(col=Cast(square=True)),
    "both": Call(Cast(), Cast()),
    "4over6": Call(Cast(scale_rule="4over6")),
    "2d_4over6": Call(Cast(square=True, scale_rule="4over6")),
    "best": Call(Cast(scale_rule="best")),
    "mxfp4": Call(Cast("mxfp4")),
    "mxfp4_sr": Call(Cast("mxfp4", headroom=4 / 3, **SR)),
    "mxfp8": Call(Cast("mxfp8", scale_rule="ceil")),
    "fp8": Call(Cast("fp8_e4m3_block")),
    "fp8_2d": Call(Cast("fp8_e4m3_block", square=True)),
    "fp8_tensor": Call(Cast("fp8_e4m3")),
}


def layer_calls(recipe: Recipe) -> dict[str, Call]:
    """The casts of one forward and backward of a linear layer (those that round to BF16 only left out)."""
    calls = {
        "x": Call(recipe.fprop.a, recipe.wgrad.b, keep_col=True),
        "w": Call(recipe.fprop.b),
        "dy": Call(recipe.dgrad.a, recipe.wgrad.a),
        "w in backward": Call(col=recipe.dgrad.b),
    }
    return {k: call for k, call in calls.items() if not all(c.block_format.high_precision for c in call.casts)}


# ---- Layers --------------------------------------------------------------------------------------------


class GivenAmax(TorchDispatchMode):
    """Within it the kernels' operator `amax` runs once; later steps are given what it found.

    So a step's casts read their tensors once, as if each tensor scale were known beforehand. That is the most that
    scales from an earlier step's amax could save. A step asks in the same order each time, and so is answered.
    """

    def __init__(self):
        # Not at the top: the package imports where Triton is not installed.
        from hf_nvfp4.ops.spec import NAMESPACE

        super().__init__()
        self.operator, self.found, self.next = f"{NAMESPACE}::amax", [], 0

    def __enter__(self):
        self.next = 0
        return super().__enter__()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.name() != self.operator:
            return func(*args, **(kwargs or {}))
        if self.next == len(self.found):
            self.found.append(func(*args))
        self.next += 1
        return self.found[self.next - 1]


class ForwardBackward:
    """A step of a module that has forward(), clear(), gradients, dy and around, a context manager."""

    def __call__(self) -> Tensor:
        """y; what is trained and x have their gradients."""
        self.clear()
        with self.around:
            y = self.forward()
            y.backward(self.dy)
        return y.detach()

    def results(self) -> dict[str, Tensor]:
        """y and all gradients, from the seed of every check."""
        torch.manual_seed(SEED)
        return {"y": self()} | self.gradients


@dataclass(frozen=True)
class Step(ForwardBackward):
    """Forward and backward of one linear layer without bias, within a context."""

    layer: nn.Module
    x: Tensor
    dy: Tensor
    around: contextlib.AbstractContextManager = contextlib.nullcontext()
    loop = False  # nothing waits for the GPU

    @classmethod
    def of_linear(cls, shape: tuple[int, int, int], device: torch.device, dtype: torch.dtype) -> "Step":
        """An nn.Linear in `dtype` of in, out = shape[1:], on shape[0] tokens in BF16. All normal: x and dy with
        standard deviation 1, the weight with 1/sqrt(in)."""
        tokens, k, n = shape
        torch.manual_seed(SEED)
        layer = nn.Linear(k, n, bias=False, device=device, dtype=dtype)
        nn.init.normal_(layer.weight, std=k**-0.5)
        x = torch.randn(tokens, k, device=device, dtype=torch.bfloat16, requires_grad=True)
        return cls(layer, x, torch.randn(tokens, n, device=device, dtype=torch.bfloat16))

    def with_recipe(self, recipe: Recipe, backend: str) -> "Step":
        """The same by an NVFP4Linear with the same weight."""
        sizes = self.x.shape[1], self.dy.shape[1]
        layer = NVFP4Linear(*sizes, bias=False, device="meta", recipe=recipe, backend=backend)
        layer.weight = self.layer.weight
        return replace(self, layer=layer)

    def with_torchao(self, recipe: str) -> "Step":
        """The same by torchao's Float8Linear, compiled as it is meant to be, with the same weight."""
        return replace(self, layer=torch.compile(to_torchao(self.layer, recipe), dynamic=False))

    def with_amax_given(self) -> "Step":
        """The same with each tensor's amax known beforehand. Raises ValueError if no kernel is asked for one."""
        step = replace(self, around=GivenAmax())
        step()
        if not step.around.found:
            raise ValueError("this layer asks the kernels for no amax: none can be given")
        return step

    def forward(self) -> Tensor:
        """y; under BF16 autocast if the weight is FP32."""
        autocast = self.layer.weight.dtype == torch.float32
        with torch.autocast(self.x.device.type, torch.bfloat16, enabled=autocast):
            return self.layer(self.x)

    @property
    def owned(self) -> list[Tensor]:
        """What is there anyway."""
        return [self.layer.weight]

    def clear(self) -> None:
        """Drop the gradients."""
        self.x.grad = self.layer.weight.grad = None

    @property
    def gradients(self) -> dict[str, Tensor]:
        """dx and dw as the last step left them."""
        return {"dx": self.x.grad, "dw": self.layer.weight.grad}


def to_torchao(module: nn.Module, recipe: str, names: set[str] | None = None) -> nn.Module:
    """Linears become torchao's Float8Linear with the same weights; the module, or what replaces a single linear.

    recipe: one of torchao's, "tensorwise" or "rowwise". names: of the linears to convert; None: all.
    """
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    def chosen(_, name: str) -> bool:
        return names is None or name in names

    config = Float8LinearConfig.from_recipe_name(recipe)
    return convert_to_float8_training(module, module_filter_fn=chosen, config=config)


def fp8_products(shape: tuple[int, int, int], device: torch.device) -> Callable:
    """The three products of a layer of tokens, in, out = shape on FP8 tensor cores, their operands cast beforehand."""
    t, k, n = shape

    def operand(rows: int, columns: int) -> Tensor:
        return torch.randn(rows, columns, device=device).to(torch.float8_e4m3fn)

    # y = x wᵀ, dx = dy w, dw = dyᵀ x: every operand contiguous along what is summed over.
    pairs = [(operand(m, c), operand(o, c)) for m, o, c in ((t, n, k), (t, k, n), (n, k, t))]
    one = torch.ones((), device=device)

    def run() -> list[Tensor]:
        return [torch._scaled_mm(a, b.T, one, one, out_dtype=torch.bfloat16) for a, b in pairs]

    return run


# ---- Correct first -------------------------------------------------------------------------------------


class Wrong(Exception):
    """A variant computes something else than backend `reference`: it is not timed."""


def check_close(name: str, found: Tensor, expected: Tensor, tolerance: float) -> float:
    """The relative error in the 2-norm. Raises Wrong above the tolerance, or if it is not a number."""
    expected = expected.double()
    error = ((found.double() - expected).norm() / expected.norm()).item()
    if not error <= tolerance:
        raise Wrong(f"{name} is {error:.1e} from that of backend reference, more than {tolerance:.1e}")
    return error


# Relative errors in the 2-norm that are still right: operands, then y, dx and dw. Another seed would be 1e-1.
TOLERANCES = {
    "exact": (0.0, 2e-3),  # the order of summation differs, and where that moves a value across a rounding boundary
    "bf16": (2**-8, 1e-2),
    "fp8_rounded": (4e-2, 6e-2),  # E4M3 errs by up to 1/16
    "yardstick": (2e-2, 2e-2),  # another code here and there
}
# torchao's formats against BF16: two operands of E4M3 or E5M2 each.
TORCHAO_TOLERANCE = 1e-1


def tolerances(backend, exact: bool) -> tuple[float, float]:
    """Those of a backend's module."""
    return TOLERANCES["exact"] if exact else TOLERANCES.get(backend.__name__.rpartition(".")[2], TOLERANCES["bf16"])


def check_cast(backend, call: Call, x: Tensor) -> str:
    """How well a cast's operands agree with the reference's, from the same seed. Raises Wrong."""
    torch.manual_seed(SEED)
    found = call(backend, x)
    torch.manual_seed(SEED)
    expected = call(reference, x)
    exact, worst = backend.exactness(call.recipe).startswith("exact"), 0.0
    tolerance = tolerances(backend, exact)[0]
    for side, mine, its in zip(("row", "column"), found, expected, strict=True):
        if its is None:
            continue
        if not hasattr(mine, "dequantize"):
            return "not compared: operands of this backend cannot be dequantized"
        mine, its = mine.dequantize(torch.float64), its.dequantize(torch.float64)
        if not exact:
            worst = max(worst, check_close(f"{side} operand", mine, its, tolerance))
        elif differ := int((mine != its).sum()):
            raise Wrong(f"{side} operand: {differ:,} of {its.numel():,} values differ from backend reference")
    return "bit-exact" if exact else f"within {worst:.1e}"


def check_step(step: Step, expected: dict[str, Tensor]) -> dict:
    """The entries of a row that say how right a layer is, and which bytes its casts move. Raises Wrong."""
    recipe = step.layer.train_recipe
    name = backend_name(step.layer.backend, recipe, step.x.device)
    backend = BACKENDS[name]
    exact = backend is not yardstick and backend.exactness(recipe).startswith("exact")
    worst = check_results(step.results(), expected, tolerances(backend, exact)[1])
    row = {"backend": name, "error_norm": worst, "check": f"within {worst:.1e}"}
    if backend is yardstick:
        return row
    row["cast_bytes"], checks = 0, set()
    weight = step.layer.weight.detach().to(torch.bfloat16)
    amax_given = isinstance(step.around, GivenAmax)
    for tensor, call in layer_calls(recipe).items():
        x = {"x": step.x.detach(), "dy": step.dy}.get(tensor, weight)
        checks.add(check_cast(backend, call, x))
        row["cast_bytes"] += sum(call.traffic(x, call(backend, x), amax_given))
    return row | {"check": row["check"] + (", casts bit-exact" if checks == {"bit-exact"} else "")}


def check_results(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> float:
    """The largest of the results' relative errors. Raises Wrong."""
    return max(check_close(key, found[key], expected[key], tolerance) for key in found)


def check_replay(step: Step, replay: Callable) -> None:
    """Whether a captured step gives the gradients of the step itself, from the same seed. Raises Wrong.

    Right after the capture: it left the graph's own gradients in place.
    """
    captured = step.gradients
    torch.manual_seed(SEED)
    replay()
    found = {name: gradient.clone() for name, gradient in captured.items()}
    check_results(found, step.results(), TOLERANCES["exact"][1])


def check_linears(network: nn.Module, device: torch.device, tokens: int) -> dict:
    """`check_step` of a model's layers, each different shape once; the worst one's entries. Raises Wrong."""
    linears = quantized_linears(network).values()
    rows = []
    for k, n, recipe, backend in {(m.in_features, m.out_features, m.train_recipe, m.backend) for m in linears}:
        base = Step.of_linear((tokens, k, n), device, torch.float32)
        rows.append(check_step(base.with_recipe(recipe, backend), base.with_recipe(recipe, "reference").results()))
    worst = max(rows, key=lambda row: row["error_norm"])
    return worst | {"check": f"{len(rows)} layer shapes {worst['check']}"}
