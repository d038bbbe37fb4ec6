"""Linear layers for inference whose weights stay packed: 4-bit codes and their scales, 4.5 bits a weight.

Knows how a trained layer's weight becomes codes, and how those are multiplied: by activations in BF16 (W4A16), or by
activations cast as the layer's recipe says (W4A4). Knows nothing of files; a packed model is not trained.
"""

import os
from collections import defaultdict

import torch
from torch import Tensor, nn
from tqdm import tqdm

from hf_nvfp4.backends import bf16, fp4, fp4_triton
from hf_nvfp4.experts import restore
from hf_nvfp4.gemm import backend_for, cast, multiply
from hf_nvfp4.language import BY_KEY, Recipe
from hf_nvfp4.linear import NVFP4Layer, NVFP4Linear, quantized_linears
from hf_nvfp4.recipes import get_recipe
from hf_nvfp4.reference import QuantizedTensor
from hf_nvfp4.scores import markdown_table
from hf_nvfp4.weights import quantize_weight, why_not

# Elements of a weight that are in high precision at a time, where no kernel decodes them.
CHUNK = 2**22


class PackedLinear(nn.Module):
    """y = x Q(w)ᵀ + bias with Q(w) packed. Weights can't be trained any more; buffers:

    codes: uint8 [N, K/2], the even column in the low nibble. scales: float8_e4m3fn [N, K/16]. tensor_scale: FP32
    scalar. A weight is (code × scale) × tensor_scale.

    Activations are rounded to BF16, products added in FP32 and rounded once: by Triton kernels where those run (see
    `runs_kernel`), else in plain PyTorch. Of up to 64 tokens a kernel decodes the weight in registers; for more it is
    dequantized at each call, for cuBLAS (plain PyTorch does that always, part by part).

    Args:
        in_features, out_features, bias, device, dtype: as in `nn.Linear`; in_features a multiple of 16. dtype: the
            bias's. The buffers are zeros, to be loaded; `from_linear` fills them.
        recipe: a name in `RECIPES` or a `Recipe`, which the weight was trained with.
        activations: cast them too, as the layer did in eval mode: a scale for each token, on the backend that "auto"
            means, or exactly on `bf16` where that one takes no packed weight. The outputs are then the layer's.

    Raises:
        ValueError: a recipe whose forward does not multiply by an NVFP4 weight alone.
    """

    def __init__(
        self, in_features, out_features, bias=True, device=None, dtype=None, *, recipe="nvfp4", activations=False
    ):
        super().__init__()
        recipe = get_recipe(recipe).fitted(in_features, out_features)
        reason = why_not(recipe, activations)
        if in_features % 16:
            raise ValueError(f"in_features={in_features} is not a multiple of 16: such weights can't be packed")
        if reason:
            raise ValueError(f"{in_features}→{out_features}: no packed weight: recipe {recipe.name!r}: {reason}")
        self.in_features, self.out_features, self.activations = in_features, out_features, activations
        self.recipe_name, self.eval_key = recipe.name, recipe.per_token().key
        of = {"device": device}
        self.register_buffer("codes", torch.zeros(out_features, in_features // 2, dtype=torch.uint8, **of))
        self.register_buffer("scales", torch.zeros(out_features, in_features // 16, dtype=torch.float8_e4m3fn, **of))
        self.register_buffer("tensor_scale", torch.ones((), dtype=torch.float32, **of))
        values = torch.zeros(out_features, dtype=dtype, **of) if bias else None
        self.bias = None if values is None else nn.Parameter(values, requires_grad=False)
        self.eval()

    @classmethod
    def from_linear(
        cls, linear: NVFP4Linear, *, activations: bool = False, dtype: torch.dtype | None = None
    ) -> "PackedLinear":
        """The packed layer of a trained one: its codes are those that the training forward multiplied by.

        dtype: the compute dtype of training, to which weights are rounded before they are cast (autocast's, where it
            was on); None: the weight's own.

        Raises:
            ValueError: as the class; or a weight that is sharded or not there.
        """
        if reason := _why_not(linear, activations):
            raise ValueError(f"{linear.in_features}→{linear.out_features}: no packed weight: {reason}")
        weight = linear.weight.detach()
        q = quantize_weight(weight.to(dtype or weight.dtype), linear.train_recipe)
        return cls.holding(q, linear, activations)

    @classmethod
    def holding(cls, q: QuantizedTensor, linear: NVFP4Linear, activations: bool = False) -> "PackedLinear":
        """The packed layer in a trained one's place whose weight is q [N, K], kept as it is."""
        packed = cls(
            linear.in_features, linear.out_features, False, "meta", recipe=linear.train_recipe, activations=activations
        )
        packed.codes, packed.scales, packed.tensor_scale = q.tensors
        if linear.bias is not None:
            packed.bias = nn.Parameter(linear.bias.detach(), requires_grad=False)
        return packed

    @property
    def recipe(self) -> Recipe:
        """What eval mode of the trained layer computes with."""
        return BY_KEY[self.eval_key]

    @property
    def weight_bytes(self) -> int:
        """Of codes and scales."""
        return self.codes.nbytes + self.scales.nbytes + self.tensor_scale.nbytes

    def quantized(self) -> QuantizedTensor:
        """The weight [N, K]; `.dequantize(dtype)` gives its values."""
        return QuantizedTensor(self.codes, self.scales, self.tensor_scale, self.recipe.fprop.b)

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., in_features] -> [..., out_features] in autocast's dtype, where that is on, else x's.

        Raises:
            RuntimeError: where gradients would be needed. TypeError: x is not a floating-point tensor.
        """
        if torch.is_grad_enabled() and (self.training or x.requires_grad):
            raise RuntimeError(
                "a packed layer gives no gradients: its weight is 4-bit codes. Call model.eval() and run under "
                "torch.no_grad(); to train, load the checkpoint unpacked"
            )
        if not x.is_floating_point():
            raise TypeError(f"PackedLinear takes floating-point inputs, not {x.dtype}")
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        tokens = x.reshape(-1, x.shape[-1]).to(dtype)
        with torch.autocast(device, enabled=False):
            if not tokens.numel() or not self.activations:
                y = self._by_kernel(tokens) if runs_kernel(x.device) else self._by_torch(tokens)
            else:
                y = self._by_casts(tokens)
        return y.reshape(*x.shape[:-1], self.out_features)

    def _by_kernel(self, x: Tensor) -> Tensor:
        return bf16.kernels.ops.w4a16(x, self.codes, self.scales.view(torch.uint8), self.tensor_scale, self.bias)

    def _by_torch(self, x: Tensor) -> Tensor:
        """The same, `CHUNK` elements of the weight at a time."""
        rows, parts, wide = max(1, CHUNK // self.in_features), [], x.bfloat16().float()
        q = self.quantized()
        for first in range(0, self.out_features, rows):
            codes, scales = q.codes[first : first + rows], q.scales[first : first + rows]
            values = QuantizedTensor(codes, scales, q.tensor_scale, q.cast).values()
            parts.append(wide @ values.T * self.tensor_scale)
        y = torch.cat(parts, 1)
        return (y if self.bias is None else y + self.bias.float()).to(x.dtype)

    def _by_casts(self, x: Tensor) -> Tensor:
        recipe = self.recipe
        backend = _backend(recipe, x.device)
        a, _ = cast(x, backend, row=recipe.fprop.a)
        return multiply(a, backend.operand_of(self.quantized()), backend, x.dtype, self.bias)

    def _apply(self, fn, recurse=True):
        """Moves go through; a change of the floating-point type (`model.half()`) is the bias's alone."""
        before = {name: getattr(self, name) for name in ("scales", "tensor_scale")}
        super()._apply(fn, recurse)
        for name, tensor in before.items():
            after = getattr(self, name)
            if after.dtype != tensor.dtype:
                setattr(self, name, tensor.to(after.device))
        return self

    @property
    def arithmetic(self) -> str:
        """How it computes, in words."""
        device = self.codes.device
        parts = ["W4A4", f"activations {self.recipe.fprop.a}"] if self.activations else ["W4A16"]
        if device.type != "meta":
            name = _backend(self.recipe, device).__name__.rpartition(".")[2]
            kernel = "Triton kernel" if runs_kernel(device) else "plain PyTorch"
            parts.append(f"backend {name}" if self.activations else kernel)
        return ", ".join(parts)

    def extra_repr(self) -> str:
        bits = 8 * self.weight_bytes / (self.in_features * self.out_features)
        sizes = f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
        return f"{sizes}, {self.arithmetic}, {bits:.2f} bits a weight, recipe={self.recipe_name!r}"


def runs_kernel(device: torch.device) -> bool:
    """Whether W4A16 on a device is the operator's, `ops.w4a16`: NVIDIA GPUs since Ampere, with Triton installed."""
    if bf16.kernels is None or device.type not in bf16.KERNEL_DEVICES:
        return False
    return device.type != "cuda" or bool(torch.version.cuda) and torch.cuda.get_device_capability(device) >= (8, 0)


def _backend(recipe: Recipe, device: torch.device):
    """The backend of activations that are cast: "auto"'s if it takes packed weights, or the exact one."""
    chosen = backend_for("auto", recipe, device)
    return chosen if chosen in (fp4, fp4_triton) else bf16


# ---------------------------------------------------------------------------- packing


def _why_not(linear: NVFP4Layer, activations: bool = False, loaded: bool = True) -> str | None:
    """Why a layer can't be packed, or None. loaded: its weight has to be there by now."""
    if not isinstance(linear, NVFP4Linear):
        return f"{type(linear).__name__} holds its weight transposed; only NVFP4Linear can be packed"
    if reason := why_not(linear.train_recipe, activations):
        return f"recipe {linear.train_recipe.name!r}: {reason}"
    if loaded and linear.weight.device.type == "meta":
        return "the weight is not loaded (device meta)"
    if type(linear.weight) is not nn.Parameter or linear.weight.shape != (linear.out_features, linear.in_features):
        return "the weight is sharded; gather the model first"
    return "its forward is replaced on the instance (a hook of Accelerate's?)" if "forward" in vars(linear) else None


def pack_model(model: nn.Module, *, activations: bool = False, dtype: torch.dtype | None = None) -> nn.Module:
    """Replace the NVFP4Linears of a model by PackedLinears, one by one, each BF16 weight freed as it goes.

    The model is then for inference: in eval mode, its parameters frozen. Fused experts are plain ones again, as in an
    export: in high precision. Prints what was packed.

    Args:
        activations, dtype: as in `PackedLinear` and `PackedLinear.from_linear`.

    Returns:
        The model itself.

    Raises:
        ValueError: a model without converted layers, or with one that can't be packed; then nothing was changed.
    """
    linears = quantized_linears(model)
    check_packable(model, activations)
    for name in tqdm(list(linears), desc="packing", unit="layer", leave=False, disable=None):  # None: on terminals
        model.set_submodule(name, PackedLinear.from_linear(linears.pop(name), activations=activations, dtype=dtype))
    return for_inference(model)


def check_packable(model: nn.Module, activations: bool, loaded: bool = True) -> None:
    """ValueError if there is a converted layer that can't be packed. loaded: weights have to be there by now."""
    for name, linear in quantized_linears(model).items():
        if reason := _why_not(linear, activations, loaded):
            raise ValueError(f"{name} can't be packed: {reason}")


def for_inference(model: nn.Module) -> nn.Module:
    """A model whose layers are packed by now: in eval mode, frozen, not to be saved; prints what was packed.

    Fused experts that were converted are plain ones again.
    """
    model.eval().requires_grad_(False)
    experts = restore(model)
    if hasattr(model, "save_pretrained"):
        model.save_pretrained = model.push_to_hub = _not_saved
    if os.environ.get("RANK", "0") == "0":
        layers = [module for module in model.modules() if isinstance(module, PackedLinear)]
        left = f"; {experts} modules of experts run in high precision, no packed format for them" if experts else ""
        print(f"hf_nvfp4: packed {len(layers)} linears{left}; {layers[0].extra_repr()} …\n{table(layers)}", flush=True)
    return model


def _not_saved(*args, **kwargs):
    raise ValueError(
        "a packed model is not saved: the weights that it was made from are gone. To have a packed checkpoint, give "
        "hf_nvfp4.export the checkpoint that was trained"
    )


def table(layers: list[PackedLinear]) -> str:
    """A line for each shape of layers and one for all."""
    by_shape = defaultdict(list)
    for layer in layers:
        by_shape[f"{layer.in_features}→{layer.out_features}"].append(layer)
    lines = []
    for name, group in {**by_shape, "all": layers}.items():
        weights, size = sum(x.in_features * x.out_features for x in group), sum(x.weight_bytes for x in group)
        mib = [f"{count / 2**20:,.2f}" for count in (2 * weights, size)]
        lines.append([name, str(len(group)), f"{8 * size / weights:.2f}", *mib, f"{size / (2 * weights):.3f}"])
    return markdown_table(["in→out", "layers", "bits a weight", "MiB in BF16", "MiB packed", "ratio"], lines)
