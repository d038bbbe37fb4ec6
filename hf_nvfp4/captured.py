"""A linear's tensors in one forward and backward, as its six operands see them, and how they are caught.

Knows layers of ours; knows nothing of models, casts and what is measured.
"""

from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_nvfp4.linear import NVFP4Layer

# Tokens are padded with zeros to a multiple of this, so that any rotation along them fits.
_TOKEN_MULTIPLE = 128
# The six operands of the three GEMMs.
OPERANDS = ("fprop x", "fprop w", "dgrad dy", "dgrad w", "wgrad dy", "wgrad x")


@dataclass(frozen=True)
class Captured:
    """One linear's tensors of a forward and backward: x [T, K], w [N, K], dy [T, N], in one float dtype."""

    x: Tensor
    w: Tensor
    dy: Tensor

    def operands(self) -> dict[str, Tensor]:
        """Each of `OPERANDS` as its cast sees it, the contraction dimension last, tokens padded with zeros."""
        x, dy = (F.pad(t, (0, 0, 0, -len(t) % _TOKEN_MULTIPLE)) for t in (self.x, self.dy))
        w_col, dy_col, x_col = (t.T.contiguous() for t in (self.w, dy, x))
        return dict(zip(OPERANDS, (x, self.w, dy, w_col, dy_col, x_col), strict=True))


class _Watched(torch.autograd.Function):
    """The identity; `seen` is called with the gradient on its way back.

    A node of its own, not a tensor's hook: `torch.autograd.grad` towards the anchor runs all of backward, and no
    parameter's gradient is accumulated.
    """

    @staticmethod
    def forward(ctx, y: Tensor, anchor: Tensor, seen: Callable[[Tensor], None]) -> Tensor:
        ctx.seen = seen
        return y.view_as(y)

    @staticmethod
    def backward(ctx, dy: Tensor):
        # What it holds, the layer's input, goes as soon as it has been used.
        seen, ctx.seen = ctx.seen, None
        with torch.no_grad(), torch.autocast(dy.device.type, enabled=False):
            seen(dy)
        return dy, None, None


@contextmanager
def watch(linears: dict[str, NVFP4Layer], seen: Callable[[str, Tensor, Tensor], None]):
    """Inside the block, seen(name, x, dy) is called in each layer's backward: x [T, K] and dy [T, N], in no dtype's
    autocast and without gradients.

    dy has the layer's compute dtype; x.requires_grad says whether the layer runs dgrad. Gives an anchor, a scalar
    towards which `torch.autograd.grad(loss, anchor, allow_unused=True)` runs backward through all these layers. A layer
    that runs more than once is seen more than once; one whose output needs no gradient is not.
    """
    anchor = torch.zeros((), requires_grad=True)

    def hook(name: str, module: NVFP4Layer, inputs: tuple, y: Tensor) -> Tensor:
        if not y.requires_grad:
            return y
        x = inputs[0].detach().requires_grad_(inputs[0].requires_grad)

        def caught(dy: Tensor) -> None:
            seen(name, x.reshape(-1, module.in_features), dy.reshape(-1, module.out_features))

        return _Watched.apply(y, anchor.to(y.device), caught)

    handles = [linear.register_forward_hook(partial(hook, name)) for name, linear in linears.items()]
    try:
        yield anchor
    finally:
        for handle in handles:
            handle.remove()
