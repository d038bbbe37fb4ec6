"""A linear layer whose three GEMMs are those of a recipe. Any recipe: nothing here knows one by name."""

from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from hf_nvfp4.gemm import backend_for, backend_name, cast, check_backend, multiply
from hf_nvfp4.recipes import Recipe, get_recipe


class LinearFunction(torch.autograd.Function):
    """y = Q(x) Q(w)ᵀ + bias, dx = Q(dy) Q(w), dw = Q(dyᵀ) Q(xᵀ)ᵀ.

    Keeps for backward x cast for wgrad and packed, and the weight itself: it is cast again for dgrad, so
    that nothing derived from it outlives the forward (FSDP frees it).
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None, recipe: Recipe, backend: str, wgrad: bool):
        """x: [T, K] in the compute dtype, weight: [N, K] and bias: [N] in any; returns [T, N] in x's dtype.

        wgrad: whether the weight's gradient will be asked for (inside a Function grad mode is off).
        """
        module = backend_for(backend, recipe, x.device)
        with torch.autocast(x.device.type, enabled=False):
            x_row, x_col = cast(x, module, row=recipe.fprop.a, col=recipe.wgrad.b if wgrad else None, keep_col=True)
            w_row, _ = cast(weight.to(x.dtype), module, row=recipe.fprop.b)
            y = multiply(x_row, w_row, module, x.dtype, bias)
        ctx.save_for_backward(weight, *(x_col.tensors if wgrad else ()))
        ctx.operand = type(x_col)
        ctx.recipe, ctx.module, ctx.dtype = recipe, module, x.dtype
        ctx.bias_dtype = None if bias is None else bias.dtype
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor):
        """dy: [T, N]; returns dx in x's dtype, dw and db in their parameters' dtypes."""
        weight, *x_col = ctx.saved_tensors
        recipe, module = ctx.recipe, ctx.module
        needs_dgrad, needs_wgrad, needs_bias = ctx.needs_input_grad[:3]
        dx = dw = db = None
        with torch.autocast(dy.device.type, enabled=False):
            dy_row, dy_col = cast(
                dy, module, row=recipe.dgrad.a if needs_dgrad else None, col=recipe.wgrad.a if needs_wgrad else None
            )
            if needs_dgrad:
                _, w_col = cast(weight.to(ctx.dtype), module, col=recipe.dgrad.b)
                dx = multiply(dy_row, w_col, module, ctx.dtype)  # [T, N] @ [N, K]
            if needs_wgrad:
                x_col = ctx.operand(*x_col, recipe.wgrad.b)
                dw = multiply(dy_col, x_col, module, weight.dtype)  # [N, T] @ [T, K]
            if needs_bias:
                db = dy.sum(0, dtype=torch.float32).to(ctx.bias_dtype)
        return dx, dw, db, None, None, None


class NVFP4Linear(nn.Linear):
    """An `nn.Linear` that multiplies as a recipe says. Same parameters, same names, same state dict.

    Operands are rounded to the compute dtype first, as `F.linear` does: autocast's, where it is on, else the
    input's. In eval mode activations have a scale for each token, so that an output does not depend on the
    other tokens of the batch.

    Args:
        in_features, out_features, bias, device, dtype: as in `nn.Linear`; both sizes multiples of 16.
        recipe: a name in `RECIPES` or a `Recipe`.
        backend: a name in `backends.BACKENDS`, or "auto".
    """

    # Native tensor parallelism in Transformers: hand us plain local tensors, not DTensors.
    _hf_quantized_needs_local_tp = True

    def __init__(
        self, in_features, out_features, bias=True, device=None, dtype=None, *, recipe="nvfp4", backend="auto"
    ):
        super().__init__(in_features, out_features, bias, device=device, dtype=dtype)
        self.set_recipe(recipe, backend)

    def set_recipe(self, recipe: str | Recipe, backend: str | None = None, high_precision: str | None = None) -> None:
        """Use another recipe (and backend) from now on; the parameters stay.

        high_precision: the GEMMs that run in BF16 all the same: "all", "forward", or None.
        """
        recipe = get_recipe(recipe)
        if reason := unsuitable(self, recipe):
            raise ValueError(f"{self.in_features}→{self.out_features}: {reason}; use nn.Linear for this layer")
        if backend is not None:
            check_backend(backend)
            self.backend = backend
        self.recipe = recipe
        self.high_precision = high_precision
        self.train_recipe = recipe.active(high_precision)
        self.eval_recipe = self.train_recipe.per_token()

    @classmethod
    def convert(
        cls, linear: nn.Linear, recipe: str | Recipe, backend: str = "auto", high_precision: str | None = None
    ) -> "NVFP4Linear":
        """Turn `linear` into an NVFP4Linear in place: same object, same Parameters, same hooks."""
        linear.__class__ = cls
        linear.set_recipe(recipe, backend, high_precision)
        return linear

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., in_features] of any rank and number of tokens -> [..., out_features]."""
        device = x.device.type
        if not x.is_floating_point():
            raise TypeError(f"NVFP4Linear takes floating-point inputs, not {x.dtype}")
        if torch.is_autocast_enabled(device):
            x = x.to(torch.get_autocast_dtype(device))
        recipe = self.train_recipe if self.training else self.eval_recipe
        wgrad = self.weight.requires_grad and torch.is_grad_enabled()
        if x.numel() == 0:
            return F.linear(x, self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))
        tokens = x.reshape(-1, x.shape[-1])
        y = LinearFunction.apply(tokens, self.weight, self.bias, recipe, self.backend, wgrad)
        return y.reshape(*x.shape[:-1], y.shape[-1])

    def extra_repr(self) -> str:
        backend = self.backend
        if backend == "auto" and self.weight.device.type != "meta":
            backend = f"auto→{backend_name(backend, self.train_recipe, self.weight.device)}"
        return f"{super().extra_repr()}, recipe={self.train_recipe.name!r}, backend={backend!r}"


def unsuitable(linear: nn.Linear, recipe: Recipe) -> str | None:
    """Why a linear layer's shape keeps it in high precision under a recipe, or None."""
    sizes = {"in_features": (linear.in_features, recipe.fprop), "out_features": (linear.out_features, recipe.dgrad)}
    for name, (size, gemm) in sizes.items():
        if size % 16 or size == 0:
            return f"{name}={size} is not a multiple of 16"
        if gemm.a.hadamard and size % gemm.a.hadamard:
            return f"{name}={size} is not a multiple of the recipe's Hadamard size {gemm.a.hadamard}"
    return None


def quantized_linears(model: nn.Module) -> dict[str, NVFP4Linear]:
    """The converted layers of a model by name; ValueError if there is none."""
    found = {name: module for name, module in model.named_modules() if isinstance(module, NVFP4Linear)}
    if not found:
        raise ValueError(
            f"{type(model).__name__} has no converted linear layers; load it with "
            "quantization_config=NVFP4TrainingConfig(...) or call hf_nvfp4.quantize_model(model, config)"
        )
    return found


@contextmanager
def use_recipe(model: nn.Module, recipe: str | Recipe):
    """Run a converted model's layers with another recipe (say "bf16") inside a with block.

    Raises:
        ValueError: unknown recipe, or a model without converted layers.
    """
    recipe = get_recipe(recipe)
    before = [(linear, linear.recipe, linear.high_precision) for linear in quantized_linears(model).values()]
    try:
        for linear, *_ in before:
            linear.set_recipe(recipe)
        yield model
    finally:
        for linear, old, high_precision in before:
            linear.set_recipe(old, high_precision=high_precision)
