"""What a training run can be told: its options, their defaults, and where they come from.

Defaults, then a config file, then the command line; later ones win. Each layer is a list of flags, so that
every value passes the same checks wherever it comes from.
"""

import argparse
import difflib
import importlib.util
import json
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import torch
import yaml
from transformers import HfArgumentParser, TrainingArguments

from hf_nvfp4.data import DataArguments, InputError
from hf_nvfp4.sizes import SIZES


@dataclass
class ModelArguments:
    """Which model, and in which precision it trains."""

    size: str = field(default="tiny", metadata={"choices": list(SIZES), "help": "A model of this size, from scratch."})
    config_name: str | None = field(
        default=None, metadata={"help": "From scratch too, but this architecture: a config.json, folder or Hub name."}
    )
    model_name_or_path: str | None = field(default=None, metadata={"help": "A checkpoint to go on from, instead."})
    recipe: str | None = field(default=None, metadata={"help": "bf16, fp8, nvfp4, … or a .json file (default: nvfp4)."})
    backend: str | None = field(default=None, metadata={"help": "reference, bf16, … (default: auto)."})
    skip: list[str] | None = field(
        default=None, metadata={"help": "Names or patterns of linears to keep in high precision."}
    )
    keep_bf16_first: str | None = field(
        default=None, metadata={"help": "Blocks to keep in BF16 at the start: a count, or a fraction as 0.15."}
    )
    keep_bf16_last: str | None = field(
        default=None, metadata={"help": "The same at the end (default of both: as in the recipe's paper)."}
    )
    switch_last: float | None = field(
        default=None,
        metadata={
            "help": "Train the last fraction in BF16, as 0.18. Goes with --lr_scheduler_type "
            "warmup_stable_decay, whose decay then begins just after the switch."
        },
    )
    switch_gemms: str = field(
        default="all", metadata={"choices": ["all", "forward"], "help": "The GEMMs that --switch_last switches."}
    )
    osci_reset: bool = field(
        default=False,
        metadata={
            "help": "In the last fifth of training, put weights that jump between two quantized values at the centre "
            "of one (OsciReset of TetraJet-v2)."
        },
    )
    teacher: str | None = field(
        default=None,
        metadata={
            "help": "A checkpoint whose probabilities to learn (distillation; its GEMMs run in high precision). Also "
            "where the model starts, unless --model_name_or_path, --size or --config_name says otherwise."
        },
    )
    kd_ratio: float = field(default=1.0, metadata={"help": "The teacher's share of the loss; the text has the rest."})
    kd_temperature: float = field(default=1.0, metadata={"help": "What both models' logits are divided by."})
    quantization_stats: int | None = field(
        default=None,
        metadata={
            "help": "Measure every so many steps what quantization does to each layer (SNR, underflow, noise of its "
            "gradient): quantization_stats.jsonl, and into the logs. 1000 costs little (default: never)."
        },
    )
    overwrite_output_dir: bool = field(
        default=False, metadata={"help": "Train anew where a run has been; its checkpoints are deleted."}
    )
    save_model: bool = field(
        default=True, metadata={"help": "Save the trained model, not only what was measured (run.json)."}
    )


@dataclass(frozen=True)
class Arguments:
    """All options, in three parts."""

    model: ModelArguments
    data: DataArguments
    training: TrainingArguments

    def say(self, text: str) -> None:
        """Print, in the first process only."""
        if self.training.process_index == 0:
            print(text, flush=True)


DEFAULTS = {  # where those of TrainingArguments do not suit pretraining
    "adam_beta2": 0.95,
    "weight_decay": 0.1,
    "lr_scheduler_type": "cosine",
    "logging_steps": 10,
    "logging_nan_inf_filter": False,  # StopOnNonFinite must see them
    "eval_strategy": "steps",
    "eval_steps": 0.25,
    "save_steps": 0.25,
    "save_total_limit": 2,
    "report_to": "none",
}
CHECKPOINT_DEFAULTS = {
    "num_train_epochs": 1,
    "learning_rate": 2e-5,
    "warmup_steps": 0.1,
    "sequence_length": 1024,
}


def parse_arguments(argv: list[str], about: str) -> Arguments:
    """Arguments from a command line. Raises InputError for what can be known to fail before any work is done."""
    args = Arguments(*parse([ModelArguments, DataArguments, TrainingArguments], argv, default_options, about))
    for reporter in args.training.report_to:
        if reporter in ("tensorboard", "trackio", "wandb") and importlib.util.find_spec(reporter) is None:
            raise InputError(f"--report_to {reporter} needs a package that is not there: pip install {reporter}.")
    last = args.model.switch_last
    if last is not None and not 0 < last <= 1:
        raise InputError(f"--switch_last {last}: give a fraction of the training, above 0 and up to 1, as 0.18.")
    if args.model.quantization_stats is not None and args.model.quantization_stats < 1:
        raise InputError(f"--quantization_stats {args.model.quantization_stats}: give a number of steps, 1 or more.")
    model = args.model
    if model.teacher is None and (model.kd_ratio, model.kd_temperature) != (1, 1):
        raise InputError("--kd_ratio and --kd_temperature are for distillation: give --teacher.")
    if args.data.streaming and args.training.max_steps <= 0:
        raise InputError("--streaming cannot know how long the data is: give --max_steps.")
    return args


def default_options(given: set[str], values) -> dict:
    """Defaults that suit the model asked for. given: names of the user's options; values: as parsed."""
    if "model_name_or_path" in given and given & {"size", "config_name"}:
        raise InputError("--model_name_or_path excludes --size and --config_name: from a checkpoint or from scratch?")
    start = values.model_name_or_path
    if values.teacher and not given & {"size", "config_name", "model_name_or_path"}:
        start = values.teacher
    model = CHECKPOINT_DEFAULTS if start else SIZES[values.size].training_defaults()
    on_cpu = values.use_cpu or not torch.accelerator.is_available()
    defaults = DEFAULTS | model | {"output_dir": f"runs/{Path(values.recipe or 'nvfp4').stem}"}
    defaults |= {"model_name_or_path": start} if start else {}
    defaults |= {"use_cpu": on_cpu, "bf16": not on_cpu or cpu_multiplies_bf16()}
    if "num_train_epochs" in given:
        defaults.pop("max_steps", None)
    return defaults


def cpu_multiplies_bf16() -> bool:
    """Whether the CPU has BF16 instructions. Without them BF16 autocast takes five times as long as FP32."""
    cpuinfo = Path("/proc/cpuinfo")
    return cpuinfo.exists() and bool(re.search(r"\b(avx512_bf16|amx_bf16|bf16)\b", cpuinfo.read_text()))


# ---- Layers of options -----------------------------------------------------------------------------------


class Parser(HfArgumentParser):
    """HfArgumentParser that answers with one sentence instead of pages of usage."""

    def error(self, message):
        raise InputError(f"{message}. See --help.")


def parse(dataclasses: list, argv: list[str], defaults: Callable[[set, argparse.Namespace], dict], about: str) -> tuple:
    """One instance of each dataclass, from defaults, the --config file among argv, and argv.

    defaults: called with the names that the user gave and the values as read so far; returns what to assume
        for the others. Raises InputError for unknown names and values that do not fit.
    """
    parser = Parser(
        dataclasses, allow_abbrev=False, description=about, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", help="a .yaml or .json file of these options, without the dashes")
    names = {action.dest for action in parser._actions}
    config = _parse_known(parser, argv, names).config
    if config:
        argv = [*read_config(Path(config), names), *argv]
    given = {flag.split("=")[0].lstrip("-").replace("-", "_") for flag in argv if flag.startswith("--")}
    argv = [*as_flags(defaults(given, _parse_known(parser, argv, names))), *argv]
    try:
        *instances, _ = parser.parse_args_into_dataclasses(argv, look_for_args_file=False)
    except (ValueError, TypeError) as error:  # some dataclasses check themselves
        raise InputError(str(error)) from error
    return tuple(instances)


def _parse_known(parser: Parser, argv: list[str], names: set[str]) -> argparse.Namespace:
    values, unknown = parser.parse_known_args(argv)
    if unknown:
        raise InputError(f"unknown argument {unknown[0]!r}.{_closest(unknown[0], [f'--{name}' for name in names])}")
    return values


def read_recipe(path: Path) -> dict:
    """A recipe of the user's own: `Recipe.to_dict()`, `RecipeMap.to_dict()` or {pattern: name} in a .json file."""
    if not path.is_file():
        raise InputError(f"no such recipe file: {path} (looked from {Path.cwd()}).")
    try:
        recipe = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise InputError(f"{path} cannot be read: {error}") from error
    if not isinstance(recipe, dict):
        raise InputError(f"{path} holds a {type(recipe).__name__}; a recipe is an object with fields.")
    return recipe


def read_config(path: Path, names: Iterable[str]) -> list[str]:
    """The flags that a .yaml or .json file stands for."""
    readers = {".json": json.loads, ".yaml": yaml.safe_load, ".yml": yaml.safe_load}
    if path.suffix not in readers:
        raise InputError(f"{path}: unknown extension. A config file is {', '.join(readers)}.")
    if not path.is_file():
        raise InputError(f"no such config file: {path} (looked from {Path.cwd()}).")
    try:
        options = readers[path.suffix](path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, yaml.YAMLError) as error:
        raise InputError(f"{path} cannot be read: {error}") from error
    if not isinstance(options, dict):
        raise InputError(f"{path} holds a {type(options).__name__}; it must map option names to values.")
    for name in options:
        if name not in names:
            raise InputError(f"{path}: unknown key {name!r}.{_closest(name, names)}")
    return as_flags(options)


def as_flags(options: dict) -> list[str]:
    """{"seed": 1, "skip": ["a", "b"], "size": None} -> ["--seed=1", "--skip", "a", "b"]."""
    flags = []
    for name, value in options.items():
        if isinstance(value, list):
            flags += [f"--{name}", *map(str, value)] if value else []
        elif value is not None:
            flags.append(f"--{name}={json.dumps(value) if isinstance(value, dict) else value}")
    return flags


def _closest(name: str, names: Iterable[str]) -> str:
    close = difflib.get_close_matches(name.split("=")[0], sorted(names), n=3)
    return f" Did you mean {' or '.join(close)}?" if close else " See --help for all."
