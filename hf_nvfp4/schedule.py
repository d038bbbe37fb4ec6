"""TrainerCallbacks: the late switch to high precision, weights cast once under gradient accumulation, and the stop at
numbers that are not finite."""

import math
from contextlib import ExitStack

import torch
from torch import nn
from transformers import TrainerCallback
from transformers.utils import logging

from hf_nvfp4.casts import unknown
from hf_nvfp4.convert import set_high_precision
from hf_nvfp4.language import GEMM_CHOICES
from hf_nvfp4.linear import cast_weights_once, converted_modules, experts_left_out, why_not_once

logger = logging.get_logger(__name__)


class PrecisionSchedule(TrainerCallback):
    """Train the last part in BF16 (arXiv 2509.25149, section 5: the last 18% recovers the gap to BF16).

    The precision of a step follows from its number alone, so a resumed run continues as it would have. A
    checkpoint says in which precision it was saved. Meant for `lr_scheduler_type="warmup_stable_decay"`,
    with the decay as long as `last` or a little shorter.

    Args:
        last: fraction of the training steps, in (0, 1], that run in high precision.
        gemms: "all", or "forward" for the fprop GEMM only.
    """

    def __init__(self, last: float = 0.18, gemms: str = "all"):
        if not 0 < last <= 1:
            raise ValueError(f"last={last!r}: give the fraction of training in high precision, in (0, 1]")
        if gemms not in GEMM_CHOICES:
            raise unknown("choice of GEMMs", gemms, GEMM_CHOICES)
        self.last, self.gemms = last, gemms

    def switch_step(self, max_steps: int) -> int:
        """The first optimizer step (counted from 0) that runs in high precision."""
        return max_steps - max(1, round(self.last * max_steps))

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        """Says when it will switch; an unconverted model is an error here, not at the switch."""
        converted_modules(model)
        if state.is_world_process_zero:
            logger.warning(
                f"PrecisionSchedule: {self.gemms} GEMMs in BF16 from step {self.switch_step(state.max_steps)} "
                f"of {state.max_steps}"
            )

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        """Sets the precision that belongs to this step."""
        wanted = self.gemms if state.global_step >= self.switch_step(state.max_steps) else None
        modules = converted_modules(model).values()
        if all(module.high_precision == wanted for module in modules):
            return
        set_high_precision(model, wanted)
        precision = next(iter(modules)).train_recipe.name
        state.log_history.append({"step": state.global_step, "precision": precision})
        if state.is_world_process_zero:
            logger.warning(f"step {state.global_step}: precision is now {precision}")


class CastWeightsOnce(TrainerCallback):
    """With gradient accumulation, cast a weight once an optimizer step and not at each micro-batch (eager mode).

    `cast_weights_once` around the micro-batches of each step: from the step's begin until just before the optimizer
    runs. Same bits; what it costs in memory stands there. Says at the beginning of training why it does nothing: no
    accumulation, a compiled model, sharded weights, fused experts only; and that it leaves those out.
    """

    def __init__(self):
        self._window = ExitStack()

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        """Says if there is nothing to do; an unconverted model is an error."""
        self._close()  # what an interrupted training left open
        self.idle = _why_idle(args, model)
        note = f"does nothing: {self.idle}" if self.idle else experts_left_out(model)
        if note and state.is_world_process_zero:
            logger.warning(f"CastWeightsOnce: {note}")

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        """Before the first micro-batch of an optimizer step."""
        self._close()
        if self.idle is None:
            self._window.enter_context(cast_weights_once(model))

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        """After the last micro-batch: the weights are about to change."""
        self._close()

    # Where training ends in the middle of a step. Evaluation's layers use nothing that is kept.
    on_train_end = on_evaluate = on_pre_optimizer_step

    def _close(self):
        self._window.close()


def _why_idle(args, model) -> str | None:
    """Why weights are not cast once a step, or None."""
    if args.gradient_accumulation_steps == 1:
        return "gradient_accumulation_steps is 1"
    compiled = getattr(model, "_compiled_call_impl", None) is not None or hasattr(model, "_orig_mod")
    if args.torch_compile or compiled:
        return "the model is compiled, and its graph casts weights at each micro-batch"
    return why_not_once(model)


class StopOnNonFinite(TrainerCallback):
    """Stops training with the layer's name when gradients, the loss or the weights are not finite.

    Gradients are looked at before each optimizer step, while the weights are still those that produced them
    (not in FP16, where the loss scaler skips such steps); loss and weights at each logging step.
    """

    def on_pre_optimizer_step(self, args, state, control, model=None, train_dataloader=None, **kwargs):
        """Raises FloatingPointError rather than let the optimizer spread a NaN into every weight."""
        if args.fp16:
            return
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        if not _all_finite(gradients, args.device):
            self._stop("a gradient is not finite", args, state, model, train_dataloader)

    def on_log(self, args, state, control, logs=None, model=None, train_dataloader=None, **kwargs):
        """Raises FloatingPointError if what is being logged, or a weight, is not finite."""
        bad = [f"{key}={logs[key]}" for key in ("loss", "eval_loss") if not math.isfinite((logs or {}).get(key, 0.0))]
        weights = [p.detach() for p in model.parameters() if p.is_floating_point()]
        if not bad and not _all_finite(weights, args.device):
            bad = ["a weight is not finite"]
        if bad:
            self._stop(", ".join(bad), args, state, model, train_dataloader)

    def _stop(self, what, args, state, model, dataloader):
        try:
            where = find_non_finite(model, _first_batch(dataloader), torch.bfloat16 if args.bf16 else None)
        except Exception as error:  # whatever it is, it must not hide what happened
            where = f"the diagnostic pass failed ({type(error).__name__}: {error})"
        raise FloatingPointError(
            f"training stopped at step {state.global_step}: {what}. Diagnosis: {where}. The checkpoints saved so far "
            "are untouched; lower the learning rate, look at the data, or keep that layer in high precision (skip=...)."
        )


def _all_finite(tensors: list[torch.Tensor], device: torch.device) -> bool:
    """Whether all elements are finite, on every rank: all of them stop together or none does.

    device: where ranks talk to each other; a rank's own tensors may lie elsewhere, or be none at all.
    """
    local = [t.to_local() if hasattr(t, "to_local") else t for t in tensors]
    local = [t for t in local if t.numel()]
    # The largest magnitude: a sum of squares overflows on finite numbers.
    largest = torch._foreach_norm(local, float("inf")) if local else []
    finite = torch.stack([torch.zeros((), device=device), *(n.float().to(device) for n in largest)]).isfinite().all()
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        finite = finite.int()
        torch.distributed.all_reduce(finite, torch.distributed.ReduceOp.MIN)
    return bool(finite)


def _first_batch(dataloader):
    return None if dataloader is None else next(iter(dataloader), None)


def find_non_finite(model: nn.Module, batch: dict | None, autocast: torch.dtype | None = None) -> str:
    """Where numbers stop being finite: a weight, else the first layer whose output is not, else a gradient.

    batch: keyword arguments of the model, labels included; None looks at the weights only.
    """
    bad = [name for name, p in model.named_parameters() if not p.detach().isfinite().all()]
    if bad:
        total = sum(1 for _ in model.parameters())
        return f"{len(bad)} of {total} parameters hold NaN or inf, the first is {bad[0]}"
    if batch is None:
        return "all weights are finite, and there is no batch to look further with"
    found = []

    def look(name):
        def hook(module, inputs, output):
            outputs = output if isinstance(output, (tuple, list)) else (output,)
            tensors = [t for t in outputs if torch.is_tensor(t) and t.is_floating_point()]
            if not found and not all(t.isfinite().all() for t in tensors):
                found.append(name)

        return hook

    def look_at_gradient(name):
        def hook(parameter):
            if not found and not parameter.grad.isfinite().all():
                found.append(name)

        return hook

    # Leaves fire before the modules that contain them, so the first name is the innermost one.
    hooks = [m.register_forward_hook(look(name or type(m).__name__)) for name, m in model.named_modules()]
    device = next(model.parameters()).device
    batch = {key: value.to(device) if torch.is_tensor(value) else value for key, value in batch.items()}
    try:
        model.zero_grad()
        with torch.enable_grad(), torch.autocast(device.type, autocast, enabled=autocast is not None):
            loss = model(**batch)["loss"]
        if found:
            return f"the output of layer {found[0]} is not finite"
        trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        hooks += [p.register_post_accumulate_grad_hook(look_at_gradient(name)) for name, p in trained]
        loss.backward()
    finally:
        for hook in hooks:
            hook.remove()
    if found:
        return f"on the way back from the loss, the gradient of {found[0]} is the first that is not finite"
    return "weights, outputs and gradients are finite on the first batch; those of the step's own batch were not"
