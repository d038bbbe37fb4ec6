"""What the tests of casting once share: three layers of one input, a record of casts, comparisons to the bit."""

import weakref

import torch
from torch import nn
from torch.utils.checkpoint import create_selective_checkpoint_contexts

from hf_nvfp4 import RECIPES, Cast, NVFP4Linear, Recipe
from hf_nvfp4 import linear as linear_module
from hf_nvfp4.gemm import cast

SR, RN, RN_2D, RN_H = Cast(rounding="stochastic"), Cast(), Cast(square=True), Cast(hadamard=16)
NEAREST = Recipe("nearest", (RN, RN_2D), (RN, RN_2D), (RN_H, RN_H))
# What draws random numbers is cast each time: x in either of its casts, the weight.
EDEN, REDRAWN = Cast(rounding="eden"), Cast(hadamard=16, signs="random")
DRAWS_X = [
    Recipe("draws_x", (SR, RN), (RN, RN), (RN, RN)),
    Recipe("keeps_x", (RN, RN), (RN, RN), (RN, SR)),
    Recipe("corrects_x", (EDEN, RN), (RN, RN), (RN, RN)),
]
REDRAWS_X = Recipe("redraws_x", (RN, RN), (RN, RN), (REDRAWN, REDRAWN))  # in backward, once more
DRAWS_W = Recipe("draws_w", (RN, SR), (RN, SR), (RN, RN))
REDRAWS_W = Recipe("redraws_w", (REDRAWN, REDRAWN), (REDRAWN, REDRAWN), (RN, RN))
# The others cast what they make of x and w.
RECIPES_THAT_SHARE = [recipe for recipe in RECIPES.values() if not recipe.conditions]
FORWARD_IN_BF16 = RECIPES["nvfp4"].in_bf16("forward")
T, K = 37, 64


class Triple(nn.Module):
    """Queries, keys and values of one input."""

    def __init__(self, recipe, device, backend):
        super().__init__()
        self.q, self.k, self.v = (
            NVFP4Linear(K, n, bias, device=device, recipe=recipe, backend=backend)
            for n, bias in ((96, True), (48, False), (48, False))
        )

    def forward(self, x):
        return torch.cat([layer(x) for layer in self.children()], -1)


def make_triple(device, recipe=NEAREST, backend="auto"):
    """A triple, the same weights each time."""
    torch.manual_seed(1)
    return Triple(recipe, device, backend)


class Recorded(list):
    """What was cast, a shape and two casts each; and the operands, for as long as somebody else holds them."""

    def __init__(self):
        super().__init__()
        self._row, self._col = [], []

    def __call__(self, x, backend, *, row=None, col=None, **options):
        operands = cast(x, backend, row=row, col=col, **options)
        self.append((tuple(x.shape), row, col))
        for operand, references in zip(operands, (self._row, self._col), strict=True):
            references += [weakref.ref(t) for t in operand.tensors if t is not None] if operand else []
        return operands

    @property
    def alive(self):
        """Whether tensors of row and column operands are in memory."""
        return tuple(any(r() is not None for r in references) for references in (self._row, self._col))

    def of(self, *shape):
        """How many casts of tensors of this shape were made."""
        return sum(entry[0] == shape for entry in self)


def record(monkeypatch):
    """What layers cast from now on."""
    recorded = Recorded()
    monkeypatch.setattr(linear_module, "cast", recorded)
    return recorded


def new_input(device, dtype=torch.float32, seed=2):
    return torch.randn(2, T, K, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def run(model, x, autocast=None, forward=None):
    """y, all gradients and the random number that comes next, of one forward and backward of something before it."""
    torch.manual_seed(3)
    model.zero_grad()
    leaf = x.clone().requires_grad_()
    with torch.autocast(x.device.type, autocast, enabled=autocast is not None):
        y = (model if forward is None else forward)(leaf * 1)
    y.backward(torch.linspace(-1, 1, y.numel(), device=y.device, dtype=y.dtype).reshape(y.shape))
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    return [y.detach(), leaf.grad, *gradients, torch.rand(1, device=x.device)]


def same(a, b):
    return len(a) == len(b) and all(torch.equal(*pair) for pair in zip(a, b, strict=True))


def selective():
    return create_selective_checkpoint_contexts([torch.ops.aten.mm.default, torch.ops.aten.addmm.default])
