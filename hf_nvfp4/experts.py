"""Fused experts, a matrix for each in one 3-D parameter, with the GEMMs of a recipe.

Knows Transformers' interface of experts (`use_experts_implementation`) and which tokens an expert gets; an expert's
numerics are linear.py's.
"""

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_nvfp4.gemm import backend_for
from hf_nvfp4.language import Recipe
from hf_nvfp4.linear import NVFP4Module, Plan, compute_dtype, quantized_linear

OTHER_EXPERTS = "experts that don't follow Transformers' experts interface"
# What Transformers' decorator sets on an experts class and its modules.
_INTERFACE = ("has_gate", "has_bias", "is_transposed", "_apply_gate")


def why_not(experts: nn.Module) -> str | None:
    """Why a module of fused experts can't be converted, whatever its sizes, or None."""
    if not all(hasattr(experts, name) for name in _INTERFACE):
        return OTHER_EXPERTS
    if any(getattr(experts, name, None) is None for name in _matrices(experts)):
        return f"experts without {' and '.join(_matrices(experts))}"
    return None


def _matrices(experts: nn.Module) -> tuple[str, str]:
    """The names of the parameters of both GEMMs."""
    return ("gate_up_proj" if experts.has_gate else "up_proj"), "down_proj"


def sizes_of(experts: nn.Module) -> dict[str, tuple[int, int]]:
    """in_features, out_features of an expert's matrices, by the name of their parameter."""
    sizes = {}
    for name in _matrices(experts):
        weight = getattr(experts, name)
        _, rows, columns = getattr(weight, "ds_shape", weight.shape)  # ZeRO-3 has emptied it
        sizes[name] = (rows, columns) if experts.is_transposed else (columns, rows)
    return sizes


class NVFP4Experts(NVFP4Module):
    """Experts that multiply as a recipe says; mixed into experts classes of Transformers by `experts_class`.

    Same parameters, same names, same state dict. Each expert is cast by itself, the tokens that it gets and its
    matrices: it has its own largest magnitudes, random numbers and signs. What stands around the GEMMs (bias, gate,
    norm, routing weights) is the class's own, in Transformers' order; `config._experts_implementation` has no say.
    The compute dtype and eval mode are as in `NVFP4Layer`.

    An expert without tokens costs nothing, its gradient is zero. Ids from the number of experts on are nobody's:
    expert parallelism marks tokens of other ranks so. The number of tokens of each expert is brought to the CPU, once
    in a forward. torch.compile leaves the module out of its graphs (`fullgraph=True` is an error of torch).
    """

    plain: type  # the class that this is mixed into

    @classmethod
    def convert(cls, module: nn.Module, *args, **kwargs) -> "NVFP4Experts":
        """As `NVFP4Module.convert`."""
        module.sizes = sizes_of(module)  # now: sharded, a parameter may have others
        return super().convert(module, *args, **kwargs)

    def fit(self, recipes: dict[str, Recipe]) -> None:
        """Train with these recipes, by the matrices' names; in eval mode with theirs per token."""
        self.train_recipes = recipes
        self.eval_recipes = {name: recipe.per_token() for name, recipe in recipes.items()}

    @property
    def train_recipe(self) -> Recipe:
        """That of the first matrix; the second's has the same name and may be fitted to other sizes."""
        return next(iter(self.train_recipes.values()))

    @property
    def eval_recipe(self) -> Recipe:
        """As `train_recipe`, in eval mode."""
        return next(iter(self.eval_recipes.values()))

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """hidden_states: [T, H], top_k_index, integers, and top_k_weights: [T, k] -> [T, H] in hidden_states' dtype."""
        dtype, count = compute_dtype(hidden_states, self), self.down_proj.shape[0]
        ids, order = top_k_index.reshape(-1).sort(stable=True)  # order: sorted place -> place
        places = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
        bounds = torch.searchsorted(ids, torch.arange(count + 1, device=ids.device, dtype=ids.dtype))
        tokens = bounds.diff().tolist()  # of each expert
        up, down = self.sizes
        x = _Taken.apply(hidden_states, order, places, top_k_index.shape[1])[: sum(tokens)]
        x = self._multiply(x, up, tokens, dtype)
        x = self._apply_gate(x) if self.has_gate else self.act_fn(x)
        x = self._multiply(x, down, tokens, dtype)
        if getattr(self, "has_post_expert_norm", False):
            x = self.post_expert_norm(x)
        if len(x) < len(order):
            x = F.pad(x, (0, 0, 0, len(order) - len(x)))  # what is nobody's
        y = _Taken.apply(x, places, order, 1) * top_k_weights.reshape(-1, 1)
        return y.unflatten(0, top_k_index.shape).sum(1).to(hidden_states.dtype)

    def _multiply(self, x: Tensor, name: str, tokens: list[int], dtype: torch.dtype) -> Tensor:
        """x [S, K], sorted by expert, times each one's matrix of that name -> [S, N] in dtype."""
        weight = getattr(self, name)
        if hasattr(weight, "full_tensor"):
            raise TypeError(
                f"{type(self).__name__}: {name} is a DTensor in the forward, and experts need plain tensors. Shard "
                "with FSDP2 (fully_shard), which gathers them first, or with Transformers' DistributedConfig."
            )
        # Sliced at once: backward makes one gradient of all.
        weights = (weight.transpose(1, 2) if self.is_transposed else weight).unbind()
        biases = getattr(self, f"{name}_bias").unbind() if self.has_bias else [None] * len(weights)
        recipe = (self.train_recipes if self.training else self.eval_recipes)[name]
        wgrad = weight.requires_grad and torch.is_grad_enabled()
        plan = Plan(recipe, backend_for(self.backend, recipe, x.device), dtype, wgrad, None)
        parts = [part for part in zip(x.split(tokens), weights, biases, strict=True) if len(part[0])]
        # Without any token, one expert multiplies none: there are gradients, of zeros.
        return torch.cat([quantized_linear(*part, plan) for part in parts or [(x, weights[0], biases[0])]])

    def extra_repr(self) -> str:
        matrices = ", ".join(f"{name}={k}→{n}" for name, (k, n) in self.sizes.items())
        return f"experts={self.down_proj.shape[0]}, {matrices}, {self.describe(self.down_proj.device)}"

    def __reduce__(self):
        """Pickles of modules name the class that there is in a file, not the one that is made here."""
        return _empty, (self.plain,), self.__dict__


@cache
def experts_class(plain: type) -> type[NVFP4Experts]:
    """The class of `plain`'s experts that multiply as a recipe says."""
    # A loop over lists of tokens whose lengths differ each time would be compiled again and again.
    forward = torch.compiler.disable(NVFP4Experts.forward)
    attributes = {"plain": plain, "forward": forward, "__doc__": NVFP4Experts.__doc__}
    return type(f"NVFP4{plain.__name__}", (NVFP4Experts, plain), attributes)


def _empty(plain: type) -> NVFP4Experts:
    return (cls := experts_class(plain)).__new__(cls)


def restore(model: nn.Module) -> int:
    """Make converted experts again what they were, in place; returns how many modules of them there were."""
    found = [module for module in model.modules() if isinstance(module, NVFP4Experts)]
    for experts in found:
        experts.__class__ = experts.plain
        for name in ("sizes", "recipe", "backend", "high_precision", "train_recipes", "eval_recipes"):
            delattr(experts, name)
    return len(found)


class _Taken(torch.autograd.Function):
    """Rows of x [T, H], each of which stands `copies` times in a row, in the order of `rows` [T · copies].

    places: the inverse of rows. Backward adds a row's gradients in a fixed order, unlike those of an index.
    """

    @staticmethod
    def forward(ctx, x: Tensor, rows: Tensor, places: Tensor, copies: int) -> Tensor:
        ctx.save_for_backward(places)
        ctx.copies = copies
        return x[rows // copies]

    @staticmethod
    def backward(ctx, dy: Tensor):
        (places,) = ctx.saved_tensors
        dx = dy[places]
        return dx if ctx.copies == 1 else dx.unflatten(0, (-1, ctx.copies)).sum(1), None, None, None
