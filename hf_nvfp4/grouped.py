"""The three GEMMs of all experts at once: linear.py's numbers for each expert, without asking the host how many tokens
each one has.

Knows where tokens lie, sorted by expert and padded; the casts and products are backends/grouped.py's.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from hf_nvfp4.backends.grouped import UNIT, Groups, amax, cast, multiply_columns, multiply_rows
from hf_nvfp4.linear import Plan, not_before


class Routing(NamedTuple):
    """Where each token's copies lie: S rows, those of an expert together, padded with zeros to a multiple of UNIT.

    rows: int64 [S], the place (token · k + j) that a row is a copy of; T · k for a row of zeros.
    places: int64 [T · k], the row of each place; S for one that is nobody's.
    experts: int32 [S / UNIT], the expert of as many rows, -1 for nobody's; bounds: int32 [E + 1], where an expert's
    rows begin, and the next one's; ends: int32 [E], where its padding begins; used: int32 [E], the expert itself, -1
    for one without tokens.
    """

    rows: Tensor
    places: Tensor
    experts: Tensor
    bounds: Tensor
    ends: Tensor
    used: Tensor


def route(ids: Tensor, count: int) -> Routing:
    """ids: integers [T, k], those from `count` on nobody's. S follows from the sizes alone: room for any choice."""
    places = ids.numel()
    length = UNIT * max(1, min(places, (places + count * (UNIT - 1)) // UNIT))
    ids, order = ids.reshape(-1).sort(stable=True)
    numbers = torch.arange(count + 1, device=ids.device, dtype=ids.dtype)
    begin = torch.searchsorted(ids, numbers)  # among sorted places
    padded = (begin.diff() + UNIT - 1) // UNIT * UNIT
    bounds = F.pad(padded.cumsum(0), (1, 0))
    known = ids.clamp(max=count).long()
    row = torch.arange(places, device=ids.device) + (bounds - begin)[known]
    row = row.where(ids < count, length)
    rows = torch.full((length + 1,), places, device=ids.device).scatter_(0, row, order)[:-1]
    first = torch.arange(0, length, UNIT, device=ids.device)
    experts = torch.searchsorted(bounds[1:], first, right=True)
    experts = experts.where(experts < count, -1)
    used = numbers[:-1].where(padded > 0, -1)
    of_experts = experts, bounds, bounds[:-1] + begin.diff(), used
    return Routing(rows, torch.empty_like(order).scatter_(0, order, row), *(t.int() for t in of_experts))


def grouped_linear(x: Tensor, weight: Tensor, bias: Tensor | None, plan: Plan, routing: Routing) -> Tensor:
    """x [S, K] as `routing` has it, weight [E, N, K], bias [E, N] -> y [S, N] in the compute dtype, with gradients.

    An expert's numbers are those of `quantized_linear` of its tokens, whose products are summed in another order, and
    whose random numbers are others: the matrices and the tokens of all experts are drawn for together. Rows of nobody
    and an expert's padding are zeros, and their gradients must be.
    """
    return GroupedFunction.apply(x, weight, bias, plan, *routing[2:])


class GroupedFunction(torch.autograd.Function):
    """`LinearFunction` for all experts at once. Keeps the same, and the matrices' largest magnitudes."""

    @staticmethod
    def forward(ctx, x, weight, bias, plan: Plan, experts, bounds, ends, used):
        """As `grouped_linear`; experts, bounds, ends, used: Routing's."""
        recipe, backend, (count, n, _) = plan.recipe, plan.backend, weight.shape
        with torch.autocast(x.device.type, enabled=False):
            tokens, matrices = Groups(experts, UNIT, count), Groups(used, n, count)
            col = recipe.wgrad.b if plan.wgrad else None
            x_row, x_col = cast(x.to(plan.dtype), tokens, backend, (recipe.fprop.a, col), True)
            w = flat(weight, plan.dtype)
            largest = amax(w, matrices, recipe.fprop.b, recipe.dgrad.b)
            w_row, _ = cast(w, matrices, backend, (recipe.fprop.b, None), largest=largest)
            y = multiply_rows(x_row, w_row, tokens, False, plan.dtype, (bias, ends))
        ctx.save_for_backward(weight, experts, bounds, used, largest, *(x_col.tensors if plan.wgrad else ()))
        ctx.plan, ctx.x_dtype, ctx.operand = plan, x.dtype, type(x_col)
        ctx.bias_dtype = None if bias is None else bias.dtype
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor):
        """dy: [S, N], zeros in rows of no token; returns dx [S, K], dw [E, N, K], db [E, N]."""
        weight, experts, bounds, used, largest, *x_col = ctx.saved_tensors
        recipe, backend, (count, n, _) = ctx.plan.recipe, ctx.plan.backend, weight.shape
        needs_dgrad, needs_wgrad, needs_bias = ctx.needs_input_grad[:3]
        dx = dw = db = None
        with torch.autocast(dy.device.type, enabled=False):
            tokens, matrices = Groups(experts, UNIT, count), Groups(not_before(dy, used), n, count)
            casts = recipe.dgrad.a if needs_dgrad else None, recipe.wgrad.a if needs_wgrad else None
            dy_row, dy_col = cast(dy.contiguous(), tokens, backend, casts)
            if needs_dgrad:
                w = flat(weight, ctx.plan.dtype)
                _, w_col = cast(w, matrices, backend, (None, recipe.dgrad.b), largest=largest)
                dx = multiply_rows(dy_row, w_col, tokens, True, ctx.x_dtype)
            if needs_wgrad:
                dw = multiply_columns(dy_col, ctx.operand(*x_col, recipe.wgrad.b), bounds, weight.dtype)
            if needs_bias:
                tiles = dy.unflatten(0, (-1, UNIT)).sum(1, dtype=torch.float32)
                of_expert = experts == torch.arange(count, device=dy.device)[:, None]
                db = (of_expert.float() @ tiles).to(ctx.bias_dtype)
        return dx, dw, db, None, None, None, None, None


def flat(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Matrices [E, N, K] as [E · N, K] in dtype, contiguous."""
    return weight.to(dtype).reshape(-1, weight.shape[2]).contiguous()


class Taken(torch.autograd.Function):
    """Rows of x [T, H], each of which stands `copies` times in a row, in the order of `rows`, zeros for T · copies.

    places: where each copy went. Backward adds a row's gradients in a fixed order, unlike those of an index.
    """

    @staticmethod
    def forward(ctx, x: Tensor, rows: Tensor, places: Tensor, copies: int) -> Tensor:
        ctx.save_for_backward(places)
        ctx.copies = copies
        return _with_zeros(x)[rows // copies]

    @staticmethod
    def backward(ctx, dy: Tensor):
        (places,) = ctx.saved_tensors
        dx = _with_zeros(dy)[places]
        return dx if ctx.copies == 1 else dx.unflatten(0, (-1, ctx.copies)).sum(1), None, None, None


def _with_zeros(x: Tensor) -> Tensor:
    """x with one more row."""
    return F.pad(x, (0, 0, 0, 1))
