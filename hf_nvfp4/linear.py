"""A linear layer whose three GEMMs are those of a recipe. Any recipe: nothing here knows one by name."""

from contextlib import contextmanager
from types import ModuleType
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.optim.optimizer import register_optimizer_step_post_hook

from hf_nvfp4.casts import Cast
from hf_nvfp4.conditioning import conditioned
from hf_nvfp4.gemm import backend_for, backend_name, cast, check_backend, draw_signs, multiply
from hf_nvfp4.language import BY_KEY, Gemm, Recipe, RecipeMap, recipe_for
from hf_nvfp4.precast import CastWeight
from hf_nvfp4.recipes import get_recipe, get_recipes
from hf_nvfp4.sharing import Casts, WeightCasts, can_keep, casts_of_input
from hf_nvfp4.tensor_parallel import Shards, sharded, shards_of, unknown_shard


class Plan(NamedTuple):
    """How a layer computes, besides its tensors.

    dtype: the compute dtype: operands are rounded to it before they are cast, and y has it.
    wgrad: whether the weight's gradient will be asked for (inside a Function grad mode is off).
    weight_casts: where the weight's operands are kept for other micro-batches; None: nowhere.
    """

    recipe: Recipe
    backend: ModuleType
    dtype: torch.dtype
    wgrad: bool
    weight_casts: Casts | None

    def cast(
        self, casts: Casts | None, x: Tensor, row: Cast | None, col: Cast | None, keep_col: bool = False, **signs
    ) -> tuple:
        """As `gemm.cast`, of x rounded to the compute dtype; or what `casts`, or x itself, has of it already."""
        if isinstance(x, CastWeight):
            return x.operands(self.backend, self.dtype, row, col)

        def make():
            return cast(x.to(self.dtype), self.backend, row=row, col=col, keep_col=keep_col, **signs)

        return make() if casts is None else casts.once(x, (self.backend, self.dtype, row, col), make)

    @property
    def keeps_x(self) -> bool:
        """Whether x is kept for wgrad as it is: its cast there needs signs that are drawn in backward, or x's cast."""
        return self.wgrad and (self.recipe.wgrad.b.signs == "random" or self.recipe.from_forward)

    def for_backward(self, casts: Casts | None, x: Tensor, how: Cast) -> Tensor:
        """What backward casts of an operand that the forward cast as `how` says: x, or what that multiplied."""
        if not self.recipe.from_forward:
            return x
        # A backend's operand may have more columns, of zeros.
        return self.cast(casts, x, how, None)[0].dequantize(self.dtype)[:, : x.shape[1]]

    def draw_signs(self, gemm: Gemm, dy: Tensor) -> Tensor | None:
        """`gemm.draw_signs`, once in a compiled graph too."""
        signs = draw_signs(gemm, dy.device)
        return None if signs is None else not_before(dy, signs)


def not_before(after: Tensor, x: Tensor) -> Tensor:
    """x; in a compiled graph, made of x once `after` is there.

    A compiler would do in the forward what backward does to a weight alone, and keep the result until then; or do it
    twice, which for random numbers is not the same.
    """
    if not torch.compiler.is_compiling():
        return x
    return x * ~(after[0, 0] > torch.inf)  # 1, and NaN, inf and -0.0 stay: nobody knows before `after` is there


class LinearFunction(torch.autograd.Function):
    """y = Q(x) Q(w)ᵀ + bias, dx = Q(dy) Q(w), dw = Q(dyᵀ) Q(xᵀ)ᵀ.

    Keeps for backward x cast for wgrad and packed, and the weight itself: it is cast again for dgrad, so
    that nothing derived from it outlives the forward (FSDP frees it). x itself is kept where wgrad's operands are
    rotated with signs of their own each time, which are drawn in backward, and where x̂, what the forward multiplied, is
    cast for wgrad.
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None, plan: Plan, input_casts: Casts | None):
        """x: [T, K], weight: [N, K] and bias: [N] in any float dtype; returns [T, N] in the compute dtype.

        input_casts: what other layers cast from x. Not in the plan: that lives until backward, this must not.
        """
        recipe, backend = plan.recipe, plan.backend
        with torch.autocast(x.device.type, enabled=False):
            signs = draw_signs(recipe.fprop, x.device)
            col = recipe.wgrad.b if plan.wgrad and not plan.keeps_x else None
            x_row, x_col = plan.cast(input_casts, x, recipe.fprop.a, col, True, row_signs=signs)
            w_row, _ = plan.cast(plan.weight_casts, weight, recipe.fprop.b, None, row_signs=signs)
            y = multiply(x_row, w_row, backend, plan.dtype, bias)
        ctx.save_for_backward(weight, *((x,) if plan.keeps_x else x_col.tensors if plan.wgrad else ()))
        ctx.operand = type(x_col)
        ctx.plan, ctx.x_dtype = plan, x.dtype
        ctx.bias_dtype = None if bias is None else bias.dtype
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor):
        """dy: [T, N]; returns dx in x's dtype, dw and db in their parameters' dtypes."""
        weight, *x_col = ctx.saved_tensors
        plan = ctx.plan
        recipe, backend = plan.recipe, plan.backend
        needs_dgrad, needs_wgrad, needs_bias = ctx.needs_input_grad[:3]
        dx = dw = db = None
        with torch.autocast(dy.device.type, enabled=False):
            signs = plan.draw_signs(recipe.dgrad, dy) if needs_dgrad else None
            wgrad_signs = plan.draw_signs(recipe.wgrad, dy) if needs_wgrad else None
            dy_row, dy_col = cast(
                dy,
                backend,
                row=recipe.dgrad.a if needs_dgrad else None,
                col=recipe.wgrad.a if needs_wgrad else None,
                row_signs=signs,
                col_signs=wgrad_signs,
            )
            if needs_dgrad:
                w = plan.for_backward(plan.weight_casts, not_before(dy, weight), recipe.fprop.b)
                _, w_col = plan.cast(plan.weight_casts, w, None, recipe.dgrad.b, col_signs=signs)
                dx = multiply(dy_row, w_col, backend, plan.dtype)  # [T, N] @ [N, K]
                # Not `dx.to(dtype)` where it has that dtype: see backends.operand.rounded.
                dx = dx if dx.dtype == ctx.x_dtype else dx.to(ctx.x_dtype)
            if needs_wgrad:
                if plan.keeps_x:
                    x = plan.for_backward(None, *x_col, recipe.fprop.a)
                    _, x_col = plan.cast(None, x, None, recipe.wgrad.b, col_signs=wgrad_signs)
                else:
                    x_col = ctx.operand(*x_col, recipe.wgrad.b)
                dw = multiply(dy_col, x_col, backend, weight.dtype)  # [N, T] @ [T, K]
            if needs_bias:
                db = dy.sum(0, dtype=torch.float32).to(ctx.bias_dtype)
        return dx, dw, db, None, None


def quantized_linear(x: Tensor, weight: Tensor, bias: Tensor | None, plan: Plan, input_casts: Casts | None = None):
    """x [T, K], weight [N, K], bias [N] -> y [T, N] in the compute dtype, with its gradients, as the plan says.

    input_casts: as `LinearFunction` takes them. Where the recipe makes something else of x and w, casts are kept for
    nobody.
    """
    if x.numel() == 0:
        return F.linear(*(None if t is None else t.to(plan.dtype) for t in (x, weight, bias)))
    if not plan.recipe.conditions:
        return LinearFunction.apply(x, weight, bias, plan, input_casts)
    plan = plan._replace(weight_casts=None)

    def product(x: Tensor, weight: Tensor) -> Tensor:
        return LinearFunction.apply(x, weight, None, plan, None)

    y = conditioned(product, x.to(plan.dtype), weight, plan.recipe)
    return y if bias is None else y + bias.to(plan.dtype)


# Reductions over ranks are left out of compiled graphs.
_eager_linear = torch.compiler.disable(quantized_linear)


def compute_dtype(x: Tensor, module: nn.Module) -> torch.dtype:
    """Autocast's, where it is on, else the input's. TypeError for one that is not floating-point."""
    if not x.is_floating_point():
        raise TypeError(f"{type(module).__name__} takes floating-point inputs, not {x.dtype}")
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


class NVFP4Module:
    """What linear layers and fused experts have in common: a recipe, fitted to each matrix, that can be set anew."""

    # Native tensor parallelism in Transformers: hand us plain local tensors, not DTensors.
    _hf_quantized_needs_local_tp = True
    # in_features, out_features of each matrix, by its parameter's name; both multiples of 16.
    sizes: dict[str, tuple[int, int]]

    def set_recipe(self, recipe: str | Recipe, backend: str | None = None, high_precision: str | None = None) -> None:
        """Use another recipe (and backend) from now on; the parameters stay.

        high_precision: the GEMMs that run in BF16 all the same: "all", "forward", or None.
        """
        recipe = get_recipe(recipe)
        for in_features, out_features in self.sizes.values():
            if reason := unsuitable(in_features, out_features):
                raise ValueError(f"{in_features}→{out_features}: {reason}; use nn.Linear for this layer")
        if backend is not None:
            check_backend(backend)
            self.backend = backend
        self.recipe = recipe
        self.high_precision = high_precision
        self.fit({name: recipe.fitted(*sizes).active(high_precision) for name, sizes in self.sizes.items()})

    def fit(self, recipes: dict[str, Recipe]) -> None:
        """Train with these recipes, by the names of `sizes`; in eval mode with theirs per token."""
        raise NotImplementedError

    def split(self) -> None:
        """Compute with shards of the weights, if tensor parallelism has split them; ValueError if that can't be."""
        for name in self.sizes:
            # Dimension 0 is the experts': each rank has whole ones.
            if (shards := shards_of(getattr(self, name))) is not None and shards.dim:
                raise ValueError(
                    f"{name} of fused experts is split over {shards.count} ranks, each of which would have scales of "
                    "its own. Use expert parallelism, DistributedConfig(ep_size=...), or keep the experts in high "
                    "precision by skip=[...]."
                )

    @classmethod
    def convert(
        cls, module: nn.Module, recipe: str | Recipe, backend: str = "auto", high_precision: str | None = None
    ) -> "NVFP4Module":
        """Turn `module` into one of this class in place: same object, same Parameters, same hooks."""
        module.__class__ = cls
        module.set_recipe(recipe, backend, high_precision)
        return module

    def describe(self, device: torch.device) -> str:
        """Recipe and backend, for `extra_repr`; device: where the weights are."""
        backend = self.backend
        if backend == "auto" and device.type != "meta":
            backend = f"auto→{backend_name(backend, self.train_recipe, device)}"
        return f"recipe={self.train_recipe.name!r}, backend={backend!r}"


class NVFP4Layer(NVFP4Module):
    """A linear layer that multiplies as a recipe says; mixed into modules that have the attributes of `nn.Linear`.

    Operands are rounded to the compute dtype first, as `F.linear` does: autocast's, where it is on, else the
    input's. In eval mode activations have a scale for each token, so that an output does not depend on the
    other tokens of the batch. Layers that are given the same tensor one after the other cast it once.
    """

    # Set by `cast_weights_once`.
    weight_casts: WeightCasts | None = None
    # Set by `split`.
    shards: Shards | None = None

    @property
    def matrix(self) -> Tensor:
        """The weight as [out_features, in_features], itself or a view."""
        return self.weight

    @property
    def sizes(self) -> dict[str, tuple[int, int]]:
        """in_features, out_features, by the weight's name."""
        return {"weight": (self.in_features, self.out_features)}

    def fit(self, recipes: dict[str, Recipe]) -> None:
        """Train with the recipe of "weight"; in eval mode with it per token."""
        self.train_recipe = recipes["weight"]
        self.eval_recipe = self.train_recipe.per_token()
        sizes = self.in_features, self.out_features
        self.matrix_shape = sizes[::-1]
        if self.shards is not None:
            self.matrix_shape = self.shards.local(*sizes)
            self.train_recipe, self.eval_recipe = (
                sharded(recipe, self.shards, *sizes) for recipe in (self.train_recipe, self.eval_recipe)
            )
        self.train_key, self.eval_key = self.train_recipe.key, self.eval_recipe.key

    def split(self) -> None:
        """Compute with a shard of the weight, if tensor parallelism has split it."""
        self.shards = shards_of(self.matrix)
        if self.shards is not None:
            if self.backend == "fp8_rounded":
                raise ValueError(
                    "backend 'fp8_rounded' rounds each row of an operand to FP8 under a factor of its own, which no "
                    "rank of tensor parallelism knows; use backend='auto'"
                )
            self.set_recipe(self.recipe, high_precision=self.high_precision)

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., in_features] of any rank and number of tokens -> [..., out_features]."""
        dtype = compute_dtype(x, self)
        recipe = BY_KEY[self.train_key if self.training else self.eval_key]
        wgrad = self.weight.requires_grad and torch.is_grad_enabled()
        backend = backend_for(self.backend, recipe, x.device)
        # A compiled graph merges equal casts by itself, and has to see each.
        eager = not torch.compiler.is_compiling()
        plan = Plan(recipe, backend, dtype, wgrad, self.weight_casts if eager and self.training else None)
        casts = casts_of_input(x, self) if eager and not recipe.conditions else None
        matrix = self.matrix
        if matrix.shape != self.matrix_shape:
            raise unknown_shard(self, matrix.shape)
        product = quantized_linear if self.shards is None else _eager_linear
        y = product(x.reshape(-1, x.shape[-1]), matrix, self.bias, plan, casts)
        return y.reshape(*x.shape[:-1], y.shape[-1])

    def extra_repr(self) -> str:
        return f"{nn.Linear.extra_repr(self)}, {self.describe(self.weight.device)}"


class NVFP4Linear(NVFP4Layer, nn.Linear):
    """An `nn.Linear` that multiplies as a recipe says. Same parameters, same names, same state dict.

    Args:
        in_features, out_features, bias, device, dtype: as in `nn.Linear`; both sizes multiples of 16.
        recipe: a name in `RECIPES` or a `Recipe`.
        backend: a name in `backends.BACKENDS`, or "auto".
    """

    def __init__(
        self, in_features, out_features, bias=True, device=None, dtype=None, *, recipe="nvfp4", backend="auto"
    ):
        super().__init__(in_features, out_features, bias, device=device, dtype=dtype)
        self.set_recipe(recipe, backend)


def unsuitable(in_features: int, out_features: int) -> str | None:
    """Why a linear layer's shape keeps it in high precision, or None."""
    for name, size in {"in_features": in_features, "out_features": out_features}.items():
        if size % 16 or size == 0:
            return f"{name}={size} is not a multiple of 16"
    return None


def split(model: nn.Module) -> None:
    """Tell a converted model's layers how tensor parallelism has split their weights, if it has.

    Raises:
        ValueError: a layer's shards can't have the operands that one process has; or fused experts are split.
    """
    for name, module in model.named_modules():
        try:
            if isinstance(module, NVFP4Module):
                module.split()
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None


def converted_modules(model: nn.Module) -> dict[str, NVFP4Module]:
    """The converted layers and modules of fused experts by name; ValueError if there is none."""
    found = {name: module for name, module in model.named_modules() if isinstance(module, NVFP4Module)}
    if not found:
        raise ValueError(
            f"{type(model).__name__} has no converted linear layers; load it with "
            "quantization_config=NVFP4TrainingConfig(...) or call hf_nvfp4.quantize_model(model, config). (A model "
            "that was packed for inference has none: its recipe is fixed.)"
        )
    return found


def quantized_linears(model: nn.Module) -> dict[str, NVFP4Layer]:
    """The converted layers of a model by name, without fused experts; ValueError if there is none."""
    found = {name: module for name, module in converted_modules(model).items() if isinstance(module, NVFP4Layer)}
    if not found:
        raise ValueError(
            f"{type(model).__name__} has no converted linear layers, only fused experts, which are left out here"
        )
    return found


def experts_left_out(model: nn.Module) -> str | None:
    """What to say where only linear layers are looked at, "fused experts are left out (2 modules)"; or None."""
    count = sum(not isinstance(module, NVFP4Layer) for module in converted_modules(model).values())
    return f"fused experts are left out ({count} modules)" if count else None


@contextmanager
def use_recipe(model: nn.Module, recipe: str | Recipe | RecipeMap):
    """Run a converted model's layers and experts with another recipe (say "bf16") inside a with block.

    recipe: as `NVFP4TrainingConfig` takes it; layers that a map has no recipe for run in BF16.

    Raises:
        ValueError: unknown recipe, or a model without converted layers.
    """
    recipe, modules = get_recipes(recipe), converted_modules(model)
    before = [(module, module.recipe, module.high_precision) for module in modules.values()]
    try:
        for name, module in modules.items():
            module.set_recipe(recipe_for(recipe, name) or "bf16")
        yield model
    finally:
        for module, old, high_precision in before:
            module.set_recipe(old, high_precision=high_precision)


@contextmanager
def cast_weights_once(model: nn.Module):
    """For gradient accumulation in eager mode: inside the block a weight is cast once, not at each micro-batch.

        with cast_weights_once(model):
            for batch in micro_batches:
                model(**batch).loss.backward()
        optimizer.step()

    Gradients are the same bits. Costs the operands of fprop and dgrad of every weight: 2 bytes a parameter on backend
    fp8, 4 on bf16, about 1.1 on fp4. They are dropped at the end, at any step of a torch optimizer, and not used once
    torch has counted a change of the weight; a write that it does not count (`weight.data`) inside the block is not
    seen. In training mode only; a compiled model casts at each micro-batch all the same, and so do fused experts.

    Raises:
        ValueError: a model without converted layers, or with sharded weights only (FSDP, ZeRO-3, tensor parallelism).
    """
    if reason := why_not_once(model):
        raise ValueError(f"{reason}. Leave cast_weights_once out")
    _keep_weight_casts(model, True)
    # Not every optimizer's writes are counted: those of fused AdamW, Trainer's default, are not.
    hook = register_optimizer_step_post_hook(lambda *_: _keep_weight_casts(model, True))
    try:
        yield model
    finally:
        hook.remove()
        _keep_weight_casts(model, False)


def why_not_once(model: nn.Module) -> str | None:
    """Why no operands of a converted model's weights can be kept, or None."""
    linears = [module for module in converted_modules(model).values() if isinstance(module, NVFP4Layer)]
    if any(map(is_whole, linears)):
        return None
    if not linears:
        return "only fused experts are converted, and those are cast at each micro-batch"
    return "the weights are sharded (FSDP, ZeRO-3, tensor parallelism); only operands of whole ones can be kept"


def is_whole(linear: NVFP4Layer) -> bool:
    """Whether the weight lies whole and still between two optimizer steps (`sharing.can_keep`)."""
    return linear.matrix.shape == (linear.out_features, linear.in_features) and can_keep(linear.weight)


def _keep_weight_casts(model: nn.Module, keep: bool) -> None:
    """Drop what is kept of each weight, and keep what will be cast from now on, or don't."""
    for linear in quantized_linears(model).values():
        if linear.weight_casts is not None:
            linear.weight_casts.drop()
        linear.weight_casts = WeightCasts(linear.matrix) if keep and is_whole(linear) else None
