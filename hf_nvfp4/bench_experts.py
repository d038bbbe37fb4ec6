"""Forward and backward of a module of fused experts: each recipe at once and one expert after the other, beside
Transformers' own BF16 experts.
"""

import argparse
import contextlib
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from hf_nvfp4 import bench_tables as tables
from hf_nvfp4.bench_rows import WEIGHTS, clocked, measured, recorded, time_rows
from hf_nvfp4.bench_tables import EXPERTS
from hf_nvfp4.benchmarks import SEED, TOLERANCES, ForwardBackward, Variant, check_results
from hf_nvfp4.experts import experts_class
from hf_nvfp4.language import Gemm, Recipe

ONE_BY_ONE = "one by one"
# Relative errors of y and all gradients: of one expert after the other, whose layers `linear` checks; and how much more
# all at once may be off. Between the two GEMMs there is a cast: where the first one's sums differ in their last bits,
# BF16 values do here and there, and then codes. A wrong amax or another seed would be 1e-1.
TOLERANCE, MORE = 2e-2, 1.5


@dataclass(frozen=True)
class ExpertsStep(ForwardBackward):
    """Forward and backward of SwiGLU experts, in the words of `benchmarks.Step`.

    layer: the module; x: [T, H]; ids, weights: [T, k], which experts a token has, drawn evenly, and their weights.
    loop: one expert after the other.
    """

    layer: nn.Module
    x: Tensor
    ids: Tensor
    weights: Tensor
    dy: Tensor
    loop: bool = False
    around: contextlib.AbstractContextManager = contextlib.nullcontext()

    @classmethod
    def of(cls, shape: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> "ExpertsStep":
        """Transformers' MixtralExperts by `grouped_mm`. shape: tokens, hidden, intermediate, experts, experts a token.

        All normal: x and dy in BF16 with standard deviation 1, the matrices in `dtype` with 1/sqrt(their input).
        """
        tokens, hidden, intermediate, experts, chosen = shape
        torch.manual_seed(SEED)
        config = MixtralConfig(hidden_size=hidden, intermediate_size=intermediate, num_local_experts=experts)
        config._experts_implementation = "grouped_mm"
        with device:
            layer = MixtralExperts(config).to(dtype)
            for parameter in layer.parameters():
                nn.init.normal_(parameter, std=parameter.shape[2] ** -0.5)
            x, dy = (torch.randn(tokens, hidden, dtype=torch.bfloat16) for _ in range(2))
            weights, ids = torch.randn(tokens, experts).softmax(-1).topk(chosen)
        weights = weights.bfloat16().requires_grad_()
        return cls(layer, x.requires_grad_(), ids, weights, dy)

    def with_recipe(self, recipe: Recipe, backend: str, loop: bool = False) -> "ExpertsStep":
        """The same by experts of a recipe, with the same matrices."""
        layer = MixtralExperts.__new__(MixtralExperts)
        layer.__dict__ = self.layer.__dict__.copy()
        return replace(self, layer=experts_class(MixtralExperts).convert(layer, recipe, backend), loop=loop)

    @property
    def owned(self) -> list[Tensor]:
        """What is there anyway."""
        return list(self.layer.parameters())

    def forward(self) -> Tensor:
        """y; under BF16 autocast if the matrices are FP32."""
        with torch.autocast(self.x.device.type, torch.bfloat16, enabled=self.owned[0].dtype == torch.float32):
            run = self.layer.forward_one_by_one if self.loop else self.layer
            return run(self.x, self.ids, self.weights)

    def clear(self) -> None:
        """Drop the gradients."""
        for t in (self.x, self.weights, *self.owned):
            t.grad = None

    @property
    def gradients(self) -> dict[str, Tensor]:
        """As the last step left them."""
        named = {f"d{name}": p.grad for name, p in self.layer.named_parameters()}
        return {"dx": self.x.grad, "dweights": self.weights.grad} | named


def nearest(recipe: Recipe) -> Recipe:
    """The recipe with every cast rounded to nearest, so that two ways to compute it draw nothing."""
    gemms = {name: Gemm(*(replace(how, rounding="nearest") for how in gemm)) for name, gemm in recipe.gemms.items()}
    return replace(recipe, name=f"{recipe.name}, to nearest", **gemms)


def check(base: ExpertsStep, variant: Variant) -> str:
    """All experts at once against one after the other on backend `reference`, everything rounded to nearest.

    Raises Wrong; ValueError if the recipe's experts are multiplied one after the other.
    """
    recipe = nearest(variant.recipe)
    for timed in (variant.recipe, recipe):
        step = base.with_recipe(timed, variant.backend)
        if reason := step.layer.one_by_one(base.x.device):
            raise ValueError(f"the experts of {timed.name!r} are multiplied one by one: {reason}")
    expected = base.with_recipe(recipe, "reference", loop=True).results()
    alone = check_results(replace(step, loop=True).results(), expected, TOLERANCE)
    error = check_results(step.results(), expected, max(TOLERANCES["exact"][1], MORE * alone))
    return f"to nearest, from backend reference: {error:.1e}, {ONE_BY_ONE} {alone:.1e}"


def bench_experts(args: argparse.Namespace, shape: tuple[int, ...]) -> tuple[dict, str]:
    """Experts of one shape: rows, table."""
    base = ExpertsStep.of(shape, args.device, WEIGHTS[args.weights])
    rows, steps = {EXPERTS: {}}, {EXPERTS: base}
    for variant in args.variants:
        name = f"{variant.name}, {ONE_BY_ONE}"
        rows |= {variant.name: {"backend": variant.backend}, name: {"backend": variant.backend}}
        with recorded(rows[variant.name]):
            rows[variant.name]["check"] = check(base, variant)
            steps[variant.name] = base.with_recipe(variant.recipe, variant.backend)
        rows[name]["check"] = "as launched by the host"
        steps[name] = base.with_recipe(variant.recipe, variant.backend, loop=True)
    for step in steps.values():  # takes the libraries' workspaces, which stay
        step()
        step.clear()
    runs = measured(args, steps, rows)
    time_rows(rows, runs, EXPERTS, args, {name: step for name, step in steps.items() if name in runs})
    return rows, tables.experts_table(shape, rows, clocked(args))
