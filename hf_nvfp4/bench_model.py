"""What scripts/bench.py times of models: steps of Transformers' own Trainer on random tokens.

Knows Trainer, and how a model is made and converted; nothing of tables. Models run one after the other, and each is
gone before the next.
"""

import argparse
import contextlib
import gc
import os
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable

import torch
import torch._functorch.config
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from hf_nvfp4 import timing
from hf_nvfp4.benchmarks import SEED, Variant, Wrong, check_linears, to_torchao
from hf_nvfp4.convert import decide
from hf_nvfp4.integration import NVFP4TrainingConfig, quantize_model
from hf_nvfp4.sizes import SIZES, TIMED

# Compiles, makes the optimizer's state, and settles the allocator.
WARMUP_STEPS = {"cuda": 5, "cpu": 1}


# ---- The model -----------------------------------------------------------------------------------------


def model_config(args: argparse.Namespace):
    """The configuration of args.model, of args.layers blocks if that is given. Raises ValueError, OSError."""
    shape = {**SIZES, **TIMED}.get(args.model)
    if shape:
        config = shape.config(shape.vocabulary, args.sequence_length, {})
    else:
        config = AutoConfig.from_pretrained(args.model)
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # of the model that the config was taken from
    if args.layers:
        if not 0 < args.layers <= getattr(config, "num_hidden_layers", 0):
            raise ValueError(f"--layers {args.layers}: {args.model} has {getattr(config, 'num_hidden_layers', 'no')}")
        config.num_hidden_layers = args.layers
        if getattr(config, "layer_types", None):
            config.layer_types = config.layer_types[: args.layers]
    return config


def choice_of(args: argparse.Namespace, variant: Variant | None) -> NVFP4TrainingConfig:
    """Which layers a variant converts. None: what is not said is converted, as by torchao."""
    first, last = args.keep_bf16_first, args.keep_bf16_last
    if variant is None:
        return NVFP4TrainingConfig("bf16", skip=args.skip, keep_bf16_first=first or 0, keep_bf16_last=last or 0)
    return NVFP4TrainingConfig(variant.recipe, variant.backend, args.skip, first, last)


def layer_shapes(args: argparse.Namespace) -> dict[tuple[int, int], list[str]]:
    """(in, out) features of every linear that some variant converts -> names within their blocks."""
    with torch.device("meta"):
        network = AutoModelForCausalLM.from_config(model_config(args))
    modules, shapes = dict(network.named_modules()), defaultdict(dict)
    for variant in args.variants or [None]:
        for decision in decide(network, choice_of(args, variant).choice()):
            if decision.converted and not decision.experts:
                linear = modules[decision.name]
                shapes[linear.in_features, linear.out_features][decision.name.rpartition(".")[2]] = None
    return {shape: list(names) for shape, names in shapes.items()}


# ---- Conversions: each takes a model and gives entries of its row --------------------------------------


def keep(network: nn.Module) -> dict:
    """The model as Transformers makes it."""
    return {}


def with_recipe(args: argparse.Namespace, variant: Variant) -> Callable[[nn.Module], dict]:
    """Converts a model to a variant, and compares its layers with backend `reference`."""

    def convert(network: nn.Module) -> dict:
        decisions = quantize_model(network, choice_of(args, variant))
        row = {"backend": variant.backend, "decisions": [vars(decision) for decision in decisions]}
        return row | check_linears(network, args.device, min(1024, args.batch * args.sequence_length))

    return convert


def with_torchao(args: argparse.Namespace, recipe: str) -> Callable[[nn.Module], dict]:
    """Converts the same layers to torchao's Float8Linear."""

    def convert(network: nn.Module) -> dict:
        decisions = decide(network, choice_of(args, None).choice())
        to_torchao(network, recipe, {decision.name for decision in decisions if decision.converted})
        return {"decisions": [vars(decision) for decision in decisions], "check": "torchao's own"}

    return convert


# ---- Training ------------------------------------------------------------------------------------------


class RandomTokens(torch.utils.data.Dataset):
    """Sequences whose tokens are as unevenly frequent as a text's; the same for every model."""

    def __init__(self, sequences: int, length: int, vocabulary: int):
        generator = torch.Generator().manual_seed(SEED)
        self.ids = (vocabulary * torch.rand(sequences, length, generator=generator) ** 3).long()

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.ids[index], "labels": self.ids[index]}


class StepMarks(TrainerCallback):
    """A mark of the clock at the end of the warm-up and of every later step; nothing waits in between."""

    def __init__(self, clock: timing.HostClock | timing.CudaClock, warmup: int):
        self.clock, self.warmup, self.marks = clock, warmup, []
        self.warmup_seconds = 0.0

    def on_train_begin(self, args, state, control, **kwargs):
        self.clock.wait()
        self.began = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.warmup:
            self.clock.wait()
            self.warmup_seconds = time.perf_counter() - self.began
        if state.global_step >= self.warmup:
            self.marks.append(self.clock.mark())

    def seconds(self) -> tuple[float, ...]:
        """Of each step after the warm-up, from its predecessor's end to its own."""
        self.clock.wait()
        return tuple(map(self.clock.seconds, zip(self.marks, self.marks[1:], strict=False)))


class LossTrainer(Trainer):
    """Keeps the last step's loss, on the device: logging it would wait for the GPU."""

    def training_step(self, *args, **kwargs):
        self.last_loss = super().training_step(*args, **kwargs)
        return self.last_loss


def training_arguments(args: argparse.Namespace, folder: str, steps: int) -> TrainingArguments:
    """What Trainer does by default in BF16, with the fused AdamW; no saving, no logging."""
    return TrainingArguments(
        folder,
        max_steps=steps,
        per_device_train_batch_size=args.batch,
        bf16=True,
        optim="adamw_torch_fused",
        learning_rate=1e-4,
        lr_scheduler_type="constant",
        max_grad_norm=1.0,
        torch_compile=args.compile != "none",
        use_cpu=args.device.type == "cpu",
        save_strategy="no",
        logging_strategy="no",
        logging_nan_inf_filter=False,  # it waits for every step's loss
        disable_tqdm=True,
        report_to="none",
        seed=SEED,
    )


@contextlib.contextmanager
def compilation(kind: str, memory_budget: float):
    """Trainer compiles each decoder block by itself ("regional"), or the model as one ("whole")."""
    names = ("ACCELERATE_DYNAMO_USE_REGIONAL_COMPILATION", "ACCELERATE_DYNAMO_BACKEND", "ACCELERATE_DYNAMO_MODE")
    before = {name: os.environ.pop(name, None) for name in names}  # TrainingArguments sets the others
    os.environ[names[0]] = str(kind == "regional")
    try:
        with torch._functorch.config.patch(activation_memory_budget=memory_budget):
            yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


def free(device: torch.device) -> int:
    """Drop what the last model left behind; bytes that are held all the same."""
    torch._dynamo.reset()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return timing.held_bytes(device)


def train(args: argparse.Namespace, convert: Callable[[nn.Module], dict]) -> dict:
    """Make the model, convert it, train it; a row: step times, memory, loss. Raises Wrong: a loss is not a number.

    Peak memory is all that training allocates at once, beyond what was held before: weights, optimizer, activations.
    """
    row = {"held_bytes": free(args.device)}
    torch.manual_seed(SEED)
    with args.device:
        network = AutoModelForCausalLM.from_config(model_config(args), dtype=torch.float32)
    network.config.use_cache = False  # not all of Trainer's versions see to it
    row |= {"parameters": sum(p.numel() for p in network.parameters())} | convert(network)
    warmup = WARMUP_STEPS[args.device.type]
    steps, on_gpu = warmup + args.steps, args.device.type == "cuda"
    tokens = RandomTokens(steps * args.batch, args.sequence_length, network.config.vocab_size)
    marks = StepMarks(args.clock, warmup)
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(args.device)
    with tempfile.TemporaryDirectory() as folder, compilation(args.compile, args.memory_budget):
        trainer = LossTrainer(network, training_arguments(args, folder, steps), train_dataset=tokens, callbacks=[marks])
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    row["peak_bytes"] = torch.cuda.max_memory_allocated(args.device) - row["held_bytes"] if on_gpu else None
    found = timing.Timing(marks.seconds())
    row |= {"time": found.to_dict(), "loss": trainer.last_loss.item()}
    row["tokens_per_second"] = args.batch * args.sequence_length / found.median
    row["compile_seconds"] = max(0.0, marks.warmup_seconds - warmup * found.median)
    trainer.accelerator.free_memory()
    if not torch.isfinite(torch.tensor(row["loss"])):
        raise Wrong(f"the loss is {row['loss']}")
    return row


def set_speeds(rows: dict[str, dict], bases: list[str]) -> float | None:
    """Enter each row's time and speed as ratios to the mean of the bases'; how far the last base is from the first."""
    medians = [rows[name]["time"]["median_seconds"] for name in bases if "time" in rows[name]]
    if len(medians) < len(bases):
        return None
    for row in rows.values():
        if "time" in row:
            row["ratio"] = row["time"]["median_seconds"] / statistics.mean(medians)
            row["speed"] = 1 / row["ratio"]
    return medians[-1] / medians[0] - 1
