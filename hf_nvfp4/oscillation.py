"""The TrainerCallback that stills weights which jump between two quantized values (OsciReset of TetraJet-v2).

Knows how far weights and their casts move from step to step; knows nothing of how a cast or a GEMM is computed.
"""

import torch
from torch import Tensor
from transformers import TrainerCallback
from transformers.utils import logging

from hf_nvfp4.language import Recipe
from hf_nvfp4.linear import NVFP4Layer, experts_left_out, is_whole, quantized_linears
from hf_nvfp4.reference import quantize_blocks

logger = logging.get_logger(__name__)


class OsciReset(TrainerCallback):
    """Put weights that oscillate at the centre of their quantization bin (arXiv 2510.27527, OsciReset).

    A weight near the edge of a bin moves little while its quantized value Q(w) jumps over the edge and back. Every
    `period` optimizer steps the next `watch` are watched; then each element of a converted layer's weight with
    Σ|ΔQ(w)| ≥ ratio · Σ|Δw| becomes Q(w): what the forward multiplies stays, and the edge is far again. An element
    that did not move is left alone. Q is the forward's cast of w, and nothing is done while the forward runs in BF16.

    Costs four FP32 tensors a weight and a cast a step, in a window only. Windows follow from the number of the step
    alone, but what was seen in one is not in checkpoints: training that is resumed in a window skips it.
    Under DDP all ranks have the same weights and reset the same ones; weights sharded by FSDP2 are gathered one at a
    time to be cast. `PrecisionSchedule` ends what is watched: give it a smaller `last`, by a window at least. Fused
    experts are left out.

    Args:
        period: optimizer steps from the beginning of a window to that of the next.
        watch: optimizer steps in a window, at most `period`.
        ratio: how many times as far as w its quantized value has gone when it counts as oscillating.
        last: fraction of the training steps, in (0, 1], at the end, in which there are windows: where the learning
            rate falls. The first one begins with it, the last one ends in it.

    Raises:
        ValueError: bad numbers; at the beginning of training what `check` says.
    """

    def __init__(self, period: int = 200, watch: int = 50, ratio: float = 8.0, last: float = 0.2):
        if not 1 <= watch <= period:
            raise ValueError(f"watch={watch!r} of every period={period!r} steps: give 1 <= watch <= period")
        if not ratio > 0:
            raise ValueError(f"ratio={ratio!r}: give a number above 0; the paper has 8")
        if not 0 < last <= 1:
            raise ValueError(f"last={last!r}: give the fraction of training in which weights are reset, in (0, 1]")
        self.period, self.watch, self.ratio, self.last = period, watch, ratio, last
        self._travels: list[Travel] = []
        self._end = None

    @property
    def settings(self) -> dict:
        """The arguments, for records of a run."""
        return {name: getattr(self, name) for name in ("period", "watch", "ratio", "last")}

    def windows(self, max_steps: int) -> range:
        """The optimizer steps (counted from 0) with which windows begin. ValueError if not even one fits."""
        part = max(1, round(self.last * max_steps))
        found = range(max_steps - part, max_steps - self.watch + 1, self.period)
        if not found:
            raise ValueError(
                f"OsciReset watches {self.watch} steps, and the last {self.last:g} of {max_steps} are {part}: "
                "train longer, give a larger last or a smaller watch, or leave it out"
            )
        return found

    def check(self, model, max_steps: int) -> None:
        """Raises ValueError for what can be known to fail before training.

        That is too few steps; a model without converted layers; a forward that quantizes no trained weight, or one
        whose Q(w) is not a value at w's own place: drawn at random, rotated, or smoothed with x; and weights
        sharded by anything but FSDP2.
        """
        self.windows(max_steps)
        trained = {name: linear for name, linear in quantized_linears(model).items() if linear.weight.requires_grad}
        if not any(_quantizes(linear.recipe) for linear in trained.values()):
            names = ", ".join(sorted({linear.recipe.name for linear in quantized_linears(model).values()}))
            raise ValueError(f"OsciReset: no trained weight is quantized in the forward (recipe {names}); leave it out")
        for name, linear in trained.items():
            if reason := _why_no_centre(linear):
                raise ValueError(f"OsciReset: recipe {linear.recipe.name!r} of {name} {reason}; leave it out")
            if not _is_readable(linear):
                raise ValueError(
                    f"OsciReset: {name}.weight is sharded (FSDP1, ZeRO-3, tensor parallelism), and a part of it does "
                    "not have whole blocks to cast; use FSDP2 or DDP, or leave it out"
                )

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        """Checks, says when weights are watched, and begins if training does in the right place."""
        self._travels = []  # what an interrupted training left
        if getattr(args, "deepspeed_plugin", None) is not None:
            raise ValueError("OsciReset: DeepSpeed keeps weights of its own that a reset would not reach; leave it out")
        self.check(model, state.max_steps)
        windows, step = self.windows(state.max_steps), state.global_step
        if state.is_world_process_zero:
            logger.warning(
                f"OsciReset: watches {self.watch} steps from step {windows[0]} of {state.max_steps}, "
                f"every {self.period}, {len(windows)} windows in all"
            )
            if left_out := experts_left_out(model):
                logger.warning(f"OsciReset: {left_out}")
            for begin in windows:
                if begin < step < begin + self.watch:
                    logger.warning(f"OsciReset: resumed at step {step}, so the window from step {begin} is skipped")
        self._begin(args, state, model)

    @torch.no_grad()
    def on_step_end(self, args, state, control, model=None, **kwargs):
        """After the optimizer: looks at the weights, and resets at a window's end. Before evaluation and saving."""
        # Between the step and here FSDP2 has all weights sharded, unlike after an evaluation.
        if self._travels:
            self._travels = [travel for travel in self._travels if _quantizes(travel.linear.train_recipe)]
            if not self._travels and state.is_world_process_zero:
                logger.warning(f"OsciReset: step {state.global_step} ran in BF16, what was watched is dropped")
        for travel in self._travels:
            travel.observe()
        if self._travels and state.global_step == self._end:
            self._reset(state)
        self._begin(args, state, model)

    def on_train_end(self, args, state, control, **kwargs):
        """Frees what an unfinished window holds."""
        self._travels = []

    @torch.no_grad()
    def _begin(self, args, state, model):
        if state.global_step not in self.windows(state.max_steps):
            return
        autocast = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None
        linears = [linear for linear in quantized_linears(model).values() if linear.weight.requires_grad]
        self._travels = [Travel(linear, autocast) for linear in linears if _quantizes(linear.train_recipe)]
        self._end = state.global_step + self.watch

    def _reset(self, state):
        reset = sum(int(travel.reset(self.ratio)) for travel in self._travels)
        watched = sum(travel.linear.weight.numel() for travel in self._travels)
        self._travels = []
        state.log_history.append({"step": state.global_step, "weights_reset": reset, "weights_watched": watched})
        if state.is_world_process_zero:
            logger.warning(
                f"step {state.global_step}: OsciReset put {reset:,} of {watched:,} weights ({reset / watched:.2%}) "
                "at the centre of their bins"
            )


class Travel:
    """How far each element of a layer's weight, and of the weight as the forward casts it, has gone.

    linear: whose weight is watched: whole, or a DTensor, which all that is kept then is too.
    autocast: the dtype that the forward rounds weights to before it casts them; None: their own.
    """

    def __init__(self, linear: NVFP4Layer, autocast: torch.dtype | None = None):
        self.linear, self.autocast = linear, autocast
        self._weight, self._quantized = self._look()
        self.of_weight, self.of_quantized = torch.zeros_like(self._weight), torch.zeros_like(self._weight)

    def observe(self) -> None:
        """Add the distances from where both were when last looked at."""
        weight, quantized = self._look()
        self.of_weight += self._weight.sub_(weight).abs_()
        self.of_quantized += self._quantized.sub_(quantized).abs_()
        self._weight, self._quantized = weight, quantized

    def reset(self, ratio: float) -> Tensor:
        """w ← Q(w), as last looked at, where Q(w) has gone at least `ratio` times as far as w; how many, in all."""
        oscillating = (self.of_weight > 0) & (self.of_quantized >= ratio * self.of_weight)
        weight = self.linear.matrix
        weight.copy_(torch.where(oscillating, self._quantized, weight))  # a write that torch counts
        return _whole(oscillating.sum())

    def _look(self) -> tuple[Tensor, Tensor]:
        """w and Q(w), FP32 [N, K], in memory of their own."""
        weight = self.linear.matrix.detach()
        whole = _whole(weight)
        # The reference's: the codes of every backend, and not all of them give values back.
        blocks = quantize_blocks(whole.to(self.autocast or whole.dtype).contiguous(), self.linear.train_recipe.fprop.b)
        quantized = blocks.values() * blocks.tensor_scale
        return weight.to(torch.float32, copy=True), _laid_out_as(weight, quantized)


def _quantizes(recipe: Recipe) -> bool:
    """Whether the forward quantizes w."""
    return not recipe.fprop.b.block_format.high_precision


def _why_no_centre(linear: NVFP4Layer) -> str | None:
    """Why w has no value that its cast in the forward would leave where it is, or None."""
    recipe = linear.recipe
    if not _quantizes(recipe):
        return None
    if recipe.fprop.b.draws:
        return "casts w with random numbers in the forward: Q(w) jumps even where w rests"
    if recipe.fprop.b.hadamard or recipe.basis:
        return "rotates w before its cast in the forward: no element of w has a quantized value of its own"
    if recipe.smooth:
        return "scales w by the channels of x before its cast: Q(w) moves with x"
    return None


# ---------------------------------------------------------------------------- sharded weights


def _is_readable(linear: NVFP4Layer) -> bool:
    """Whether the weight lies whole here, or as a DTensor that can be gathered and cut again."""
    weight = linear.weight
    if not hasattr(weight, "full_tensor"):
        return is_whole(linear)
    from torch.distributed.tensor import Replicate, Shard

    return all(type(placement) in (Replicate, Shard) for placement in weight.placements)


def _whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def _laid_out_as(weight: Tensor, whole: Tensor) -> Tensor:
    """A tensor that every rank has, cut as the weight is; itself where that is whole."""
    if not hasattr(weight, "full_tensor"):
        return whole
    from torch.distributed.tensor import distribute_tensor

    # No source rank: each cuts its own part, nothing is sent.
    return distribute_tensor(whole, weight.device_mesh, weight.placements, src_data_rank=None)
