"""`QuantizationStats`: a TrainerCallback that measures, now and then in training, what casts do to each layer.

Knows Trainer, its batches and logs, and the file of numbers; what is measured is operand_stats.py's.
"""

import itertools
import json
import random
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import IterableDataset
from transformers import TrainerCallback
from transformers.trainer_callback import CallbackHandler
from transformers.utils import logging

from hf_nvfp4.captured import watch
from hf_nvfp4.linear import experts_left_out, quantized_linears
from hf_nvfp4.operand_stats import NOISE_THRESHOLD, layer_stats, noisy_groups, summary
from hf_nvfp4.scores import write_atomically

logger = logging.get_logger(__name__)

STATS_FILE = "quantization_stats.jsonl"


class QuantizationStats(TrainerCallback):
    """Measures underflow, saturation and SNR of each converted layer's operands, and its gradient's noise ratio.

    Every `interval` optimizer steps the model runs forward and backward once more, in eager mode, on a probe of at most
    `tokens` tokens, always the same ones, with the weights of that moment. `operand_stats.layer_stats` says what is
    measured of each layer. Means and extremes (`operand_stats.summary`) are logged as quantization/… into
    `state.log_history` and what the run reports to; numbers of each layer go to <output_dir>/quantization_stats.jsonl,
    a line for each step and layer. A resumed run drops the lines of later steps. Groups of layers whose noise ratio
    falls below √3 are warned about, once each.

    Training is the same to the bit: random states are put back, no gradient is accumulated, and the probe's rows are
    taken from the dataset with a generator of their own (of a streamed one, the first rows), not through the data
    loader. The probe's loss is the model's own, a mean over its tokens: gradients differ from those in training by a
    factor (accumulation), which changes none of the numbers but the underflow of FP32's own range.

    Cost: an eager forward and backward, and casts in plain PyTorch, of `tokens` tokens, every `interval` steps: a share
    of `tokens` · c / (`interval` · tokens of a step) of the time, c being how much slower a token is that way. On a CPU
    (tiny Llama, 4096 tokens) c is 2.3 for nvfp4 and 2.8 for quartet2, of an eager step; of a compiled one it is more.
    quantization/seconds says what one measurement took. In memory: the activations of `tokens` tokens.

    Every rank measures rows of its own, since sharded weights (FSDP2) are gathered by all; the first one reports its
    numbers. Not measured, with a sentence in the log: DeepSpeed, tensor and context parallelism, FSDP1, FP16 with loss
    scaling, reentrant checkpointing; and fused experts.

    Args:
        interval: optimizer steps between measurements.
        tokens: the most that a probe has; a longer batch is cut, first rows, then positions.
        batch: the probe itself, the model's keyword arguments with labels; by default made of the training data.

    Raises:
        ValueError: interval or tokens below 1; at training's begin, a model without converted layers.
    """

    def __init__(self, interval: int = 1000, tokens: int = 4096, batch: dict | None = None):
        for name, value in (("interval", interval), ("tokens", tokens)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}={value!r}: give a whole number, 1 or more")
        self.interval, self.tokens, self.batch = interval, tokens, batch
        self._probe = self._handler = None
        self._warned: set[str] = set()

    def on_train_begin(self, args, state, control, model=None, train_dataloader=None, **kwargs):
        """Takes the probe, and drops what a resumed run measured later; an unconverted model is an error."""
        quantized_linears(model)
        self._probe, self._handler = None, _calling_handler()
        reason = _unsupported(args, model)
        if reason is None:
            with _random_states(args.device):
                batch, reason = (self.batch, None) if self.batch else _batch_of(train_dataloader, args)
        if reason is None and "labels" not in batch:
            reason = "the probe has no labels, so the model gives no loss; pass batch= with them"
        if reason:
            if state.is_world_process_zero:
                logger.warning(f"QuantizationStats does nothing: {reason}")
            return
        self._probe = cut(batch, self.tokens)
        if state.is_world_process_zero:
            if left_out := experts_left_out(model):
                logger.warning(f"QuantizationStats: {left_out}")
            keep_until(Path(args.output_dir) / STATS_FILE, state.global_step)
            if self._handler is None:
                logger.warning(f"QuantizationStats found no Trainer to report through; numbers go to {STATS_FILE} only")

    def on_step_end(self, args, state, control, model=None, **kwargs):
        """Measures, logs and warns, at every `interval`-th step."""
        if self._probe is None or state.global_step % self.interval:
            return
        began = time.perf_counter()
        layers = measure(model, self._probe, args.device, torch.bfloat16 if args.bf16 else None)
        logs = {f"quantization/{name}": number for name, number in summary(layers).items()}
        logs["quantization/seconds"] = time.perf_counter() - began
        if state.is_world_process_zero:
            append(Path(args.output_dir) / STATS_FILE, state.global_step, layers)
            self._warn(state.global_step, layers)
        self._log(args, state, control, logs)

    def on_train_end(self, args, state, control, **kwargs):
        """Lets go of Trainer and the probe."""
        self._probe = self._handler = None

    def _log(self, args, state, control, logs: dict) -> None:
        """As Trainer.log. Every rank: other callbacks may talk to each other when they are told."""
        if state.epoch is not None:
            logs["epoch"] = state.epoch
        state.log_history.append(logs | {"step": state.global_step})
        if self._handler is not None:
            due = control.should_log
            self._handler.on_log(args, state, control, logs)
            control.should_log = due  # Trainer's own log of this step, which is still to come

    def _warn(self, step: int, layers: dict[str, dict]) -> None:
        found = {group: ratios for group, ratios in noisy_groups(layers).items() if group not in self._warned}
        if not found:
            return
        self._warned |= found.keys()
        ratios = "; ".join(
            f"{group}: {sum(ratio < NOISE_THRESHOLD for ratio in ratios)} of {len(ratios)}, lowest {min(ratios):.2f}"
            for group, ratios in found.items()
        )
        logger.warning(
            f"step {step}: weight gradients are below √3 times their quantization noise ({ratios}). Such layers may "
            "stop learning. If the loss stalls, train the rest in higher precision (hf_nvfp4.PrecisionSchedule), keep "
            "these layers in BF16 (skip=[...]), or use a recipe with less noise in wgrad."
        )


# ---- The probe -----------------------------------------------------------------------------------------


def _batch_of(dataloader, args) -> tuple[dict | None, str | None]:
    """A batch of the data loader's dataset, collated as it does, or why there is none.

    Rows at random with a generator of its own: the loader's samplers, workers and place stay as they are.
    """
    dataset, collate = getattr(dataloader, "dataset", None), getattr(dataloader, "collate_fn", None)
    if dataset is None or collate is None:
        return None, f"{type(dataloader).__name__} has no dataset and collate_fn to take a probe from; pass batch="
    if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__getitem__"):
        rows = list(itertools.islice(iter(dataset), args.train_batch_size))
    else:
        generator = torch.Generator().manual_seed(args.seed + args.process_index)
        places = torch.randint(len(dataset), (args.train_batch_size,), generator=generator).tolist()
        rows = [dataset[place] for place in places]
    batch = collate(rows) if rows else {}
    if "input_ids" not in batch:
        return None, "a batch of the training data has no input_ids; pass batch="
    return dict(batch), None


def cut(batch: dict, tokens: int) -> dict:
    """At most `tokens` tokens of a batch: its first rows, and of a single row that is too long the first positions.

    Cuts every tensor that begins with the shape [rows, positions] of input_ids, or has as many rows.
    """
    rows, length = batch["input_ids"].shape[:2]
    kept_rows, kept_length = max(1, min(rows, tokens // length)), min(length, tokens)

    def part(value):
        if not torch.is_tensor(value) or value.dim() == 0 or len(value) != rows:
            return value
        value = value[:kept_rows]
        return value[:, :kept_length] if value.dim() > 1 and value.shape[1] == length else value

    return {name: part(value) for name, value in batch.items()}


@contextmanager
def _random_states(device: torch.device):
    """Random numbers drawn inside the block are not missed outside: Python's, NumPy's, torch's on CPU and device."""
    states = random.getstate(), np.random.get_state()
    devices = [] if device.type == "cpu" else [device]
    try:
        with torch.random.fork_rng(devices=devices, device_type="cuda" if device.type == "cpu" else device.type):
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])


# ---- Measuring -----------------------------------------------------------------------------------------


def measure(model: nn.Module, batch: dict, device: torch.device, autocast: torch.dtype | None) -> dict[str, dict]:
    """{layer: `layer_stats`} of one forward and backward of a model in training, in the model's order.

    Nothing but the caches of the device's allocator is left of it: no gradients, no random numbers drawn. Layers that
    the batch does not reach are left out; of one that runs several times, the last time counts.
    """
    linears, found = quantized_linears(model), {}

    def seen(name: str, x: Tensor, dy: Tensor) -> None:
        if name not in found:
            found[name] = layer_stats(linears[name], x, dy)

    batch = {name: value.to(device) if torch.is_tensor(value) else value for name, value in batch.items()}
    eager, rounded = torch.compiler.set_stance("force_eager"), autocast is not None
    with _random_states(device), eager, watch(linears, seen) as anchor, torch.enable_grad():
        with torch.autocast(device.type, autocast, enabled=rounded):
            loss = model(**batch)["loss"]
        torch.autograd.grad(loss, anchor, allow_unused=True)
    return {name: found[name] for name in linears if name in found}


def _unsupported(args, model: nn.Module) -> str | None:
    """Why nothing is measured, or None."""
    parallel = getattr(args, "parallelism_config", None)
    sizes = [getattr(parallel, name, None) or 1 for name in ("tp_size", "cp_size", "sp_size")]
    if args.deepspeed_plugin is not None:
        return "DeepSpeed's engine runs its own backward, and ZeRO-3 shares out the weights"
    if max(sizes) > 1 or (getattr(model, "tp_size", None) or 1) > 1:
        return "under tensor or context parallelism a rank has a part of each operand only"
    if any(type(module).__name__ == "FullyShardedDataParallel" for module in model.modules()):
        return "FSDP1 works with loss.backward() only; FSDP2 (fsdp_version 2) is measured"
    if args.fp16:
        return "FP16 scales the loss in a way it doesn't know; train with bf16"
    reentrant = args.gradient_checkpointing and (args.gradient_checkpointing_kwargs or {}).get("use_reentrant")
    return "reentrant checkpointing works with loss.backward() only; set use_reentrant=False" if reentrant else None


def _calling_handler() -> CallbackHandler | None:
    """Trainer's list of callbacks, which is calling us: what is logged through it reaches all of them.

    Trainer hands callbacks nothing to log with, and in `on_log` those that report have had their turn before us.
    """
    frame = sys._getframe(1)
    while frame is not None and not isinstance(frame.f_locals.get("self"), CallbackHandler):
        frame = frame.f_back
    return None if frame is None else frame.f_locals["self"]


# ---- The file ------------------------------------------------------------------------------------------


def append(path: Path, step: int, layers: dict[str, dict]) -> None:
    """A line {"step", "layer", …} for each layer, at the end of the file, in one write."""
    lines = [json.dumps({"step": step, "layer": name, **layer}) + "\n" for name, layer in layers.items()]
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write("".join(lines))


def keep_until(path: Path, step: int) -> None:
    """Drop the lines of later steps, and a last one that a killed process did not finish."""
    if not path.exists():
        return
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    kept = [line for line in lines if _step_of(line) <= step]
    if len(kept) < len(lines):
        write_atomically(path, "".join(kept).encode())


def _step_of(line: str) -> float:
    """The step of a line; inf for a broken one."""
    try:
        return json.loads(line)["step"] if line.endswith("\n") else float("inf")
    except (ValueError, KeyError, TypeError):
        return float("inf")
