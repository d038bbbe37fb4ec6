"""Fused experts, a matrix for each in one 3-D parameter, with the GEMMs of a recipe.

Knows Transformers' interface of experts (`use_experts_implementation`) and which tokens an expert gets; an expert's
numerics are linear.py's.
"""

from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_nvfp4.backends.grouped import why_not as why_not_grouped
from hf_nvfp4.gemm import backend_for
from hf_nvfp4.grouped import Taken, grouped_linear, route
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

    All experts are multiplied at once where grouped.py can (`one_by_one` says why not): nothing waits for the GPU, so
    that it compiles and can be captured in a CUDA graph. Else one after the other, in the same numbers but for the
    order of sums and for the random numbers; then the number of tokens of each expert is brought to the CPU, once in a
    forward, and torch.compile leaves that out of its graphs (`fullgraph=True` is an error of torch).

    An expert without tokens costs nothing, its gradient is zero. Ids from the number of experts on are nobody's:
    expert parallelism marks tokens of other ranks so.
    """

    plain: type  # the class that this is mixed into

    @classmethod
    def convert(cls, module: nn.Module, *args, **kwargs) -> "NVFP4Experts":
        """As `NVFP4Module.convert`."""
        module.sizes = sizes_of(module)  # now: sharded, a parameter may have others
        width = next(iter(module.sizes.values()))[1]
        zeros = torch.zeros(1, width, device="cpu")
        module.keeps_zeros = not (module._apply_gate(zeros) if module.has_gate else module.act_fn(zeros)).any()
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
        if not hidden_states.numel() or self.one_by_one(hidden_states.device):
            return self.forward_one_by_one(hidden_states, top_k_index, top_k_weights)
        dtype = compute_dtype(hidden_states, self)
        routing = route(top_k_index, self.down_proj.shape[0])
        x = Taken.apply(hidden_states, routing.rows, routing.places, top_k_index.shape[1])

        def multiply(x: Tensor, name: str) -> Tensor:
            weight, biases, plan = self._parts(name, x.device, dtype)
            return grouped_linear(x, weight, biases, plan, routing)

        x = self._between(x, multiply)
        return self._weighted(Taken.apply(x, routing.places, routing.rows, 1), top_k_weights, hidden_states.dtype)

    def one_by_one(self, device: torch.device) -> str | None:
        """Why experts are multiplied one after the other on a device, None if at once."""
        if not self.keeps_zeros:
            return "the activation makes something of zeros, with which an expert's tokens would be padded"
        for name, (_, out_features) in self.sizes.items():
            recipe = self._recipe(name)
            if reason := why_not_grouped(recipe, backend_for(self.backend, recipe, device), device, out_features):
                return reason
        return None

    def forward_one_by_one(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """As `forward`, one expert after the other."""
        dtype = compute_dtype(hidden_states, self)
        count = self.down_proj.shape[0]
        ids, order = top_k_index.reshape(-1).sort(stable=True)  # order: sorted place -> place
        places = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
        bounds = torch.searchsorted(ids, torch.arange(count + 1, device=ids.device, dtype=ids.dtype))
        tokens = bounds.diff().tolist()  # of each expert
        x = Taken.apply(hidden_states, order, places, top_k_index.shape[1])[: sum(tokens)]

        def multiply(x: Tensor, name: str) -> Tensor:
            weight, biases, plan = self._parts(name, x.device, dtype)
            # Sliced at once: backward makes one gradient of all.
            each = weight.unbind(), [None] * count if biases is None else biases.unbind()
            parts = [part for part in zip(x.split(tokens), *each, strict=True) if len(part[0])]
            # Without any token, one expert multiplies none: there are gradients, of zeros.
            parts = parts or [(x, *(part[0] for part in each))]
            return torch.cat([quantized_linear(*part, plan) for part in parts])

        x = self._between(x, multiply)
        if len(x) < len(order):
            x = F.pad(x, (0, 0, 0, len(order) - len(x)))  # what is nobody's
        return self._weighted(Taken.apply(x, places, order, 1), top_k_weights, hidden_states.dtype)

    def _between(self, x: Tensor, multiply: Callable[[Tensor, str], Tensor]) -> Tensor:
        """x [S, H] through both GEMMs, by multiply(x, parameter's name), and what the class does between them."""
        up, down = self.sizes
        x = multiply(x, up)
        x = self._apply_gate(x) if self.has_gate else self.act_fn(x)
        x = multiply(x, down)
        return self.post_expert_norm(x) if getattr(self, "has_post_expert_norm", False) else x

    @staticmethod
    def _weighted(y: Tensor, weights: Tensor, dtype: torch.dtype) -> Tensor:
        """What each token's experts gave, y [T · k, H], times their weights [T, k], added up: [T, H]."""
        return (y * weights.reshape(-1, 1)).unflatten(0, weights.shape).sum(1).to(dtype)

    def _recipe(self, name: str) -> Recipe:
        return (self.train_recipes if self.training else self.eval_recipes)[name]

    def _parts(self, name: str, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor | None, Plan]:
        """Of the matrices of that name: [E, N, K], their biases [E, N] or None, and how they are multiplied."""
        weight = getattr(self, name)
        if hasattr(weight, "full_tensor"):
            raise TypeError(
                f"{type(self).__name__}: {name} is a DTensor in the forward, and experts need plain tensors. Shard "
                "with FSDP2 (fully_shard), which gathers them first, or with Transformers' DistributedConfig."
            )
        recipe, wgrad = self._recipe(name), weight.requires_grad and torch.is_grad_enabled()
        plan = Plan(recipe, backend_for(self.backend, recipe, device), dtype, wgrad, None)
        weight = weight.transpose(1, 2) if self.is_transposed else weight
        return weight, getattr(self, f"{name}_bias") if self.has_bias else None, plan

    def extra_repr(self) -> str:
        matrices = ", ".join(f"{name}={k}→{n}" for name, (k, n) in self.sizes.items())
        device = self.down_proj.device
        reason = "unknown yet" if device.type == "meta" else self.one_by_one(device)
        how = f"one by one ({reason})" if reason else "at once"
        return f"experts={self.down_proj.shape[0]}, {matrices}, {self.describe(device)}, {how}"

    def __reduce__(self):
        """Pickles of modules name the class that there is in a file, not the one that is made here."""
        return _empty, (self.plain,), self.__dict__


@cache
def experts_class(plain: type) -> type[NVFP4Experts]:
    """The class of `plain`'s experts that multiply as a recipe says."""
    # A loop over lists of tokens whose lengths differ each time would be compiled again and again.
    loop = torch.compiler.disable(NVFP4Experts.forward_one_by_one)
    attributes = {"plain": plain, "forward_one_by_one": loop, "__doc__": NVFP4Experts.__doc__}
    return type(f"NVFP4{plain.__name__}", (NVFP4Experts, plain), attributes)


def _empty(plain: type) -> NVFP4Experts:
    return (cls := experts_class(plain)).__new__(cls)


def restore(model: nn.Module) -> int:
    """Make converted experts again what they were, in place; returns how many modules of them there were."""
    found = [module for module in model.modules() if isinstance(module, NVFP4Experts)]
    for experts in found:
        experts.__class__ = experts.plain
        for name in ("sizes", "recipe", "backend", "high_precision", "train_recipes", "eval_recipes", "keeps_zeros"):
            delattr(experts, name)
    return len(found)
