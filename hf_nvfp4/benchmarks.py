"""What scripts/bench.py times: casts, a linear layer's forward and backward, a model's training step.

And whether each is right: compared with backend `reference` from the same seed, at the shape that is timed. Knows
neither clocks nor tables. The yardstick for all is the plain PyTorch of yardstick.py.
"""

import argparse
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import hf_nvfp4
from hf_nvfp4 import yardstick
from hf_nvfp4.backends import BACKENDS, reference
from hf_nvfp4.gemm import backend_name
from hf_nvfp4.linear import NVFP4Linear, quantized_linears
from hf_nvfp4.recipes import Cast, Recipe
from hf_nvfp4.sizes import SIZES

SEED = 1
YARDSTICK = "inductor"


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

    def traffic(self, x: Tensor, operands: tuple) -> tuple[int, int]:
        """Bytes that casting x reads (twice where a tensor scale needs an amax first) and writes."""
        reads = 2 if any(cast.block_format.tensor_scale for cast in self.casts) else 1
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


# ---- Layers and models ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Step:
    """Forward and backward of one linear layer without bias."""

    layer: nn.Linear
    x: Tensor
    dy: Tensor

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
        return Step(layer, self.x, self.dy)

    def forward(self) -> Tensor:
        """y; under BF16 autocast if the weight is FP32."""
        autocast = self.layer.weight.dtype == torch.float32
        with torch.autocast(self.x.device.type, torch.bfloat16, enabled=autocast):
            return self.layer(self.x)

    def clear(self) -> None:
        """Drop the gradients."""
        self.x.grad = self.layer.weight.grad = None

    def __call__(self) -> None:
        self.clear()
        self.forward().backward(self.dy)

    def results(self) -> dict[str, Tensor]:
        """y, dx and dw from the seed of every check."""
        torch.manual_seed(SEED)
        self.clear()
        y = self.forward()
        y.backward(self.dy)
        return {"y": y.detach(), "dx": self.x.grad, "dw": self.layer.weight.grad}


class TrainingStep:
    """A step of a model of `SIZES`: FP32 weights, BF16 autocast, fused AdamW, random tokens."""

    def __init__(self, args: argparse.Namespace, recipe: Recipe | None):
        """args: bench.py's. recipe: None leaves every nn.Linear as it is."""
        from transformers import AutoModelForCausalLM

        size, self.device = SIZES[args.size], args.device
        torch.manual_seed(SEED)
        with args.device:
            config = size.config(size.vocabulary, args.sequence_length, {})
            self.network = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
            self.ids = torch.randint(size.vocabulary, (args.batch, args.sequence_length))
        if recipe:
            hf_nvfp4.quantize_model(self.network, hf_nvfp4.NVFP4TrainingConfig(recipe=recipe, backend=args.backend))
        self.optimizer = torch.optim.AdamW(self.network.parameters(), lr=1e-4, fused=self.device.type == "cuda")
        if args.compile:
            self.network.compile()

    def __call__(self) -> Tensor:
        """The loss, on the device."""
        with torch.autocast(self.device.type, torch.bfloat16):
            loss = self.network(input_ids=self.ids, labels=self.ids, use_cache=False).loss
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.detach()


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


def check_cast(backend, call: Call, x: Tensor) -> str:
    """How well a cast's operands agree with the reference's, from the same seed. Raises Wrong."""
    torch.manual_seed(SEED)
    found = call(backend, x)
    torch.manual_seed(SEED)
    expected = call(reference, x)
    exact, worst = backend.exactness(call.recipe).startswith("exact"), 0.0
    for side, mine, its in zip(("row", "column"), found, expected, strict=True):
        if its is None:
            continue
        if not hasattr(mine, "dequantize"):
            return "not compared: operands of this backend cannot be dequantized"
        mine, its = mine.dequantize(torch.float64), its.dequantize(torch.float64)
        if not exact:
            worst = max(worst, check_close(f"{side} operand", mine, its, 2**-8))
        elif differ := int((mine != its).sum()):
            raise Wrong(f"{side} operand: {differ:,} of {its.numel():,} values differ from backend reference")
    return "bit-exact" if exact else f"within {worst:.1e}"


def check_step(step: Step, expected: dict[str, Tensor]) -> dict:
    """The entries of a row that say how right a layer is, and which bytes its casts move. Raises Wrong.

    With exact operands only the order of summation differs, and where that moves a value across a rounding
    boundary; the yardstick has another code here and there. Another seed would be 1e-1.
    """
    recipe = step.layer.train_recipe
    name = backend_name(step.layer.backend, recipe, step.x.device)
    backend = BACKENDS[name]
    exact = backend.exactness(recipe).startswith("exact")
    tolerance = 2e-2 if backend is yardstick else 2e-3 if exact else 1e-2
    found = step.results()
    worst = max(check_close(key, found[key], expected[key], tolerance) for key in expected)
    row = {"backend": name, "error_norm": worst, "check": f"within {worst:.1e}"}
    if backend is yardstick:
        return row
    row["cast_bytes"], checks = 0, set()
    weight = step.layer.weight.detach().to(torch.bfloat16)
    for tensor, call in layer_calls(recipe).items():
        x = {"x": step.x.detach(), "dy": step.dy}.get(tensor, weight)
        checks.add(check_cast(backend, call, x))
        row["cast_bytes"] += sum(call.traffic(x, call(backend, x)))
    return row | {"check": row["check"] + (", casts bit-exact" if checks == {"bit-exact"} else "")}


def check_linears(network: nn.Module, device: torch.device, tokens: int) -> dict:
    """`check_step` of a model's layers, each different shape once; the worst one's entries. Raises Wrong."""
    linears = quantized_linears(network).values()
    rows = []
    for k, n, recipe, backend in {(m.in_features, m.out_features, m.train_recipe, m.backend) for m in linears}:
        base = Step.of_linear((tokens, k, n), device, torch.float32)
        rows.append(check_step(base.with_recipe(recipe, backend), base.with_recipe(recipe, "reference").results()))
    worst = max(rows, key=lambda row: row["error_norm"])
    return worst | {"check": f"{len(rows)} layer shapes {worst['check']}"}
