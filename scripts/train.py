"""Train a causal language model in NVFP4, FP8 or BF16.

    # A tiny Llama from scratch, on the source of Python's own standard library
    python scripts/train.py --recipe nvfp4 --output_dir runs/nvfp4
    # Another size on your own text; any checkpoint on any dataset of the Hub
    python scripts/train.py --size 30m --train_file 'texts/*.parquet' --recipe fp8 --output_dir runs/fp8
    python scripts/train.py --model_name_or_path Qwen/Qwen3-0.6B --dataset_name roneneldan/TinyStories
    # A checkpoint's NVFP4 student learns from the checkpoint itself
    python scripts/train.py --teacher Qwen/Qwen3-0.6B --recipe nvfp4_qat --dataset_name roneneldan/TinyStories
    # Options from a file; flags override it
    python scripts/train.py --config scripts/configs/late_switch.yaml --seed 1

Every field of TrainingArguments is an option too: --learning_rate, --max_steps, --report_to tensorboard, …
SIGTERM ends a run of one process after the step that runs, with a checkpoint; exit status 143.
"""

import contextlib
import dataclasses
import functools
import json
import math
import os
import shlex
import signal
import sys
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, TrainingArguments, default_data_collator, set_seed

import hf_nvfp4
from hf_nvfp4 import packing, runlog
from hf_nvfp4.convert import set_high_precision, summary
from hf_nvfp4.data import InputError, load_corpus
from hf_nvfp4.gemm import backend_names
from hf_nvfp4.integration import QUANT_METHOD
from hf_nvfp4.losses import final_losses, losses_before, recovered
from hf_nvfp4.options import Arguments, ModelArguments, parse_arguments, read_recipe
from hf_nvfp4.scores import write_json
from hf_nvfp4.sizes import SIZES
from hf_nvfp4.stats import STATS_FILE

# ---- Model -----------------------------------------------------------------------------------------------


@contextlib.contextmanager
def input_errors():
    """What the package and Transformers reject with a ValueError or OSError is the user's to correct."""
    try:
        yield
    except (ValueError, OSError) as error:
        raise InputError(str(error)) from error


def quantization(model: ModelArguments):
    """The NVFP4TrainingConfig that the options ask for; None to use the one a checkpoint brings."""
    given = {name: getattr(model, name) for name in ("recipe", "backend", "skip")}
    given |= {name: count_or_fraction(name, getattr(model, name)) for name in ("keep_bf16_first", "keep_bf16_last")}
    given = {name: value for name, value in given.items() if value is not None}
    if model.recipe and model.recipe.endswith(".json"):
        given["recipe"] = read_recipe(Path(model.recipe))
    saved = saved_quantization(model)
    if saved and not given:
        return None
    return hf_nvfp4.NVFP4TrainingConfig(**((saved.to_dict() if saved else {}) | given))


def count_or_fraction(name: str, text: str | None) -> int | float | None:
    """ "2" is a count, "0.15" and "2.0" are fractions (or the package's error)."""
    try:
        return text if text is None else int(text) if text.isdigit() else float(text)
    except ValueError as error:
        raise InputError(f"--{name} {text}: give a number of blocks, or a fraction of them as 0.15.") from error


def saved_quantization(model: ModelArguments):
    """The NVFP4TrainingConfig of the checkpoint to go on from; None if it has none."""
    if not model.model_name_or_path:
        return None
    saved = getattr(AutoConfig.from_pretrained(model.model_name_or_path), "quantization_config", None)
    saved = saved.to_dict() if hasattr(saved, "to_dict") else saved
    if saved and saved.get("quant_method") != QUANT_METHOD:
        raise InputError(
            f"{model.model_name_or_path} is quantized with {saved.get('quant_method')!r}. Training needs "
            "high-precision weights: give the checkpoint that it was made from."
        )
    return hf_nvfp4.NVFP4TrainingConfig(**saved) if saved else None


def build_model(args: Arguments, tokenizer):
    """The model in FP32, converted. With the same seed it has the same weights, whatever the recipe."""
    model, config = args.model, quantization(args.model)
    set_seed(args.training.seed)
    if model.model_name_or_path:
        also = {"quantization_config": config} if config else {}
        if config and (saved := saved_quantization(model)) and saved.choice() != config.choice():
            args.say(f"the checkpoint was trained with recipe {saved.recipe.name}; this run's choices replace its own")
            also = {"config": AutoConfig.from_pretrained(model.model_name_or_path)}
            also["config"].quantization_config = config
        network = AutoModelForCausalLM.from_pretrained(model.model_name_or_path, dtype=torch.float32, **also)
        if network.config.quantization_config.high_precision:
            set_high_precision(network, None)
            args.say("the checkpoint was saved after a switch to BF16; this run starts in the recipe again")
    else:
        network = AutoModelForCausalLM.from_config(new_config(args, tokenizer), dtype=torch.float32)
    rows = network.get_input_embeddings().num_embeddings
    if len(tokenizer) > rows:
        raise InputError(
            f"the tokenizer has {len(tokenizer)} tokens, the model's embedding only {rows} rows. Give the model's "
            "own tokenizer as --tokenizer_name, or a smaller --vocabulary_size."
        )
    if not model.model_name_or_path:
        hf_nvfp4.quantize_model(network, config)
    return network


def load_teacher(args: Arguments):
    """The teacher that the options ask for, in high precision; None without one."""
    model = args.model
    if model.teacher is None:
        return None
    dtype = torch.bfloat16 if args.training.bf16 else torch.float32
    teacher = AutoModelForCausalLM.from_pretrained(model.teacher, dtype=dtype)
    if hasattr(teacher, "nvfp4_decisions"):
        set_high_precision(teacher, "all")
    args.say(f"teacher: {model.teacher}, {model.kd_ratio:g} of the loss, temperature {model.kd_temperature:g}")
    return teacher


def new_config(args: Arguments, tokenizer):
    """The architecture of a model from scratch."""
    if args.model.config_name:
        config = AutoConfig.from_pretrained(args.model.config_name)
        if hasattr(config, "quantization_config"):
            del config.quantization_config  # of the model that the config was taken from
        return config
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    return SIZES[args.model.size].config(len(tokenizer), args.data.sequence_length, ids)


# ---- Data ------------------------------------------------------------------------------------------------


def prepare_data(args: Arguments, resume: Path | None):
    """(tokenizer, PackedData). The tokenizer is the one given, the checkpoint's, or trained on the data."""
    corpus, data = load_corpus(args.data), args.data
    name = data.tokenizer_name or resume or args.model.model_name_or_path
    if name:
        tokenizer = packing.load_tokenizer(str(name))
    else:
        tokenizer = packing.train_tokenizer(corpus.train(), data.vocabulary_size)
    packed = packing.pack(corpus, tokenizer, data)
    given = data.tokenizer_name or args.model.model_name_or_path
    packed.about["tokenizer"] = (
        f"{given}, {len(tokenizer)}" if given else f"byte-level BPE, {len(tokenizer)}, trained on the data"
    )
    return tokenizer, packed


# ---- Training --------------------------------------------------------------------------------------------


def resolve_steps(training: TrainingArguments, train) -> None:
    """Turn epochs into max_steps, as Trainer would, so that schedules can be laid out before it starts."""
    if training.max_steps <= 0:
        batches = math.ceil(len(train) / (training.train_batch_size * training.world_size))
        updates = max(1, math.ceil(batches / training.gradient_accumulation_steps))
        training.max_steps = math.ceil(training.num_train_epochs * updates)


def lay_out_schedule(args: Arguments) -> list:
    """The precision switch and the resets asked for, as callbacks, and a decay that begins just after the switch.

    That is 1% of training after the switch, or, without a switch, a fifth before the end. What
    lr_scheduler_kwargs says comes first.
    """
    model, training = args.model, args.training
    steps, decays = training.max_steps, training.lr_scheduler_type == "warmup_stable_decay"
    switch = hf_nvfp4.PrecisionSchedule(model.switch_last, model.switch_gemms) if model.switch_last else None
    if decays and not training.lr_scheduler_kwargs:
        begin = switch.switch_step(steps) + math.ceil(0.01 * steps) if switch else math.floor(0.8 * steps)
        training.lr_scheduler_kwargs = {"num_decay_steps": max(1, steps - begin)}
    resets = [hf_nvfp4.OsciReset()] if model.osci_reset else []
    if not switch:
        return resets
    line = f"precision: {model.switch_gemms} GEMMs in BF16 from step {switch.switch_step(steps)} of {steps}"
    if decays:
        line += f", learning rate decays from step {steps - training.lr_scheduler_kwargs.get('num_decay_steps', 0)}"
    else:
        line += f"; meant for --lr_scheduler_type warmup_stable_decay, this is {training.lr_scheduler_type.value}"
    args.say(line)
    return [switch, *resets]


# ---- Results ---------------------------------------------------------------------------------------------


def describe_run(args: Arguments, trainer, timer, packed, final: dict) -> dict:
    """Content of run.json."""
    model, training, steps = trainer.model, args.training, trainer.state.global_step
    config = model.config.quantization_config
    about_training = describe_training(args, steps)
    speed = timer.steps_per_second()
    return {
        "schema": 1,
        "status": "complete",
        "name": training.run_name or Path(training.output_dir).resolve().name,
        "command": shlex.join(["python", _from_here(sys.argv[0]), *sys.argv[1:]]),
        "recipe": config.recipe.name,
        "backend": backend_names(config.backend, config.recipe, training.device),
        "conversion": summary(model.nvfp4_decisions),
        "decisions": [vars(decision) for decision in model.nvfp4_decisions],
        "precision_schedule": describe_switch(args, trainer.state.max_steps),
        "model": {
            "size": None if args.model.model_name_or_path or args.model.config_name else args.model.size,
            "type": model.config.model_type,
            "parameters": model.num_parameters(),
            "config": json.loads(model.config.to_json_string(use_diff=False)),
            "from_checkpoint": args.model.model_name_or_path,
        },
        "data": packed.about,
        "training": about_training,
        "versions": runlog.versions(),
        "device": runlog.describe_device(training.device, max(training.world_size, training.n_gpu)),
        "losses": runlog.losses(trainer.state.log_history),
        "final": final,
        "speed": {
            "train_seconds": timer.seconds,
            "tokens_per_second": speed and speed * about_training["batch_sequences"] * args.data.sequence_length,
            **runlog.peak_memory(training.device),
        },
    }


def describe_training(args: Arguments, steps: int) -> dict:
    """The settings that a loss depends on."""
    training = args.training
    sequences = training.train_batch_size * training.world_size * training.gradient_accumulation_steps
    return {
        "seed": training.seed,
        "steps": steps,
        "tokens": steps * sequences * args.data.sequence_length,
        "batch_sequences": sequences,
        "learning_rate": training.learning_rate,
        "lr_scheduler": training.lr_scheduler_type.value,
        "lr_scheduler_kwargs": training.lr_scheduler_kwargs,
        "warmup": training.get_warmup_steps(training.max_steps),
        "weight_decay": training.weight_decay,
        "autocast": "bfloat16" if training.bf16 else "float16" if training.fp16 else None,
        "master_weights": "float32",
        "torch_compile": training.torch_compile,
        **({"teacher": describe_teacher(args.model)} if args.model.teacher else {}),
        **({"osci_reset": hf_nvfp4.OsciReset().settings} if args.model.osci_reset else {}),
    }


def describe_teacher(model: ModelArguments) -> dict:
    """What --teacher and its options asked for."""
    return {"checkpoint": model.teacher, "kd_ratio": model.kd_ratio, "temperature": model.kd_temperature}


def describe_switch(args: Arguments, steps: int) -> dict | None:
    """When --switch_last switches."""
    if not args.model.switch_last:
        return None
    schedule = hf_nvfp4.PrecisionSchedule(args.model.switch_last, args.model.switch_gemms)
    return {"last": schedule.last, "gemms": schedule.gemms, "switch_step": schedule.switch_step(steps)}


def table(run: dict) -> str:
    """The results, for the terminal."""
    final, speed, training = run["final"], run["speed"], run["training"]
    rate = f", {speed['tokens_per_second']:,.0f} tokens/s" if speed["tokens_per_second"] else ""
    rows = [
        ("parameters", f"{run['model']['parameters']:,}"),
        ("trained", f"{training['steps']:,} steps, {training['tokens']:,} tokens"),
        ("validation loss", f"{final['validation_loss']:.4f}   {final['validation_precision']}"),
        ("in BF16", f"{final['validation_loss_bf16']:.4f}"),
        ("bits per byte", f"{final['bits_per_byte']:.4f}"),
        ("training took", f"{speed['train_seconds']:,.1f} s{rate}"),
        ("peak memory", f"{speed['peak_memory_bytes'] / 2**30:.2f} GiB, {speed['peak_memory_kind']}"),
    ]  # fmt: skip
    if before := final.get("before"):
        share = recovered(before, final["validation_loss"])
        rest = "" if share is None else f"; {share:.0%} of the difference recovered"
        text = f"{before['validation_loss']:.4f}   in BF16 {before['validation_loss_bf16']:.4f}{rest}"
        rows.insert(2, ("before", text))
    return "\n".join([f"\n{run['name']}: {run['recipe']} on backend {run['backend']}, {run['device']['name']}",
                      *(f"  {name:<16} {value}" for name, value in rows)])  # fmt: skip


# ---- Main ------------------------------------------------------------------------------------------------


def announce(args: Arguments) -> None:
    """Device, backend and recipe: before anything else."""
    with input_errors():
        config = quantization(args.model) or saved_quantization(args.model)
        device = args.training.device
        backend = backend_names(config.backend, config.recipe, device)
    name = runlog.describe_device(device, 1)["name"]
    args.say(f"device {device} ({name}), backend {backend}, recipe {config.recipe.name}")
    if not args.training.bf16 and not args.training.fp16:
        args.say("autocast is off: what is not converted computes in FP32 (the default on a CPU without BF16; --bf16)")


def find_start(args: Arguments) -> Path | None:
    """The checkpoint to resume from, and an output folder that is ours to write in."""
    training = args.training
    output_dir, resume = Path(training.output_dir), training.resume_from_checkpoint
    checkpoint, ignored = runlog.find_checkpoint(resume, output_dir)
    with training.main_process_first(local=False):
        runlog.claim(output_dir, resume is not None, args.model.overwrite_output_dir)
        if checkpoint is None:  # those of a run that was here before
            (output_dir / STATS_FILE).unlink(missing_ok=True)
    if resume:
        start = f"resuming from {checkpoint}" if checkpoint else f"no whole checkpoint in {output_dir}: starting anew"
        args.say("\n".join([*ignored, start]))
    return checkpoint


def check_same_recipe(checkpoint: Path, network) -> None:
    """A run goes on as it began: Trainer would load the weights and not notice another recipe."""
    saved = json.loads((checkpoint / "config.json").read_text(encoding="utf-8")).get("quantization_config")
    before = hf_nvfp4.NVFP4TrainingConfig(**saved).choice() if saved else None
    now = network.config.quantization_config.choice()
    if before is None or dataclasses.replace(before, backend=now.backend) != now:
        raise InputError(
            f"{checkpoint} was trained with recipe {before and before.recipe.name!r} and this run asks for "
            f"{now.recipe.name!r}, or they keep other layers in BF16. Give the options of the first run; to go on "
            "in another precision, start from its weights: --model_name_or_path."
        )


class SafeDistillationTrainer(hf_nvfp4.DistillationTrainer, runlog.SafeTrainer):
    """Both."""


def build_trainer(
    args: Arguments, network, tokenizer, packed, teacher=None, first: list = ()
) -> tuple[runlog.SafeTrainer, runlog.RunTimer]:
    """The Trainer, and the callback that times it. first: callbacks that come before the others."""
    timer = runlog.RunTimer()
    watch = [*first, timer, runlog.SameData(packed.about["fingerprint"]), hf_nvfp4.StopOnNonFinite()]
    if interval := args.model.quantization_stats:
        watch.append(hf_nvfp4.QuantizationStats(interval))
    resolve_steps(args.training, packed.train)
    schedule = lay_out_schedule(args)
    with input_errors():
        for callback in schedule:
            if isinstance(callback, hf_nvfp4.OsciReset):
                callback.check(network, args.training.max_steps)
    make = runlog.SafeTrainer
    if teacher is not None:
        distil = {"kd_ratio": args.model.kd_ratio, "temperature": args.model.kd_temperature}
        make = functools.partial(SafeDistillationTrainer, teacher=teacher, **distil)
    with input_errors():
        trainer = make(
            network,
            args.training,
            data_collator=default_data_collator,
            train_dataset=packed.train,
            eval_dataset=packed.validation,
            processing_class=tokenizer,
            callbacks=[*watch, *schedule],
        )
    return trainer, timer


def _from_here(path: str) -> str:
    """A path as it would be typed here: what lies below the current folder without the folders above."""
    relative = os.path.relpath(path)
    return path if relative.startswith("..") else relative


def main(argv: list[str]) -> None:
    """Train, evaluate, save, report."""
    args = parse_arguments(argv, about=__doc__)
    announce(args)
    checkpoint = find_start(args)
    with args.training.main_process_first():  # the others find its cache, if there is one
        tokenizer, packed = prepare_data(args, checkpoint)
    args.say(packed.describe())
    with input_errors():
        network = build_model(args, tokenizer)
        teacher = load_teacher(args)
    if checkpoint:
        check_same_recipe(checkpoint, network)
    with runlog.StopOnSignal(one_process=args.training.world_size == 1) as stop:
        trainer, timer = build_trainer(args, network, tokenizer, packed, teacher, first=[stop])
        before = losses_before(trainer) if args.model.teacher else {}
        trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))
        stop.check()
        run = describe_run(args, trainer, timer, packed, before | final_losses(trainer, packed.about))
        output_dir = Path(args.training.output_dir)
        trainer.save_state()
        if args.model.save_model:
            runlog.publish_model(trainer, output_dir)
        if trainer.is_world_process_zero():
            write_json(output_dir / runlog.RUN_FILE, run)
    args.say(f"{table(run)}\n  saved in         {output_dir}")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (InputError, runlog.SaveError, FloatingPointError, OSError) as error:
        sys.exit(f"train.py: {error}")
    except runlog.Stopped as stopped:
        print(f"train.py: {stopped}", file=sys.stderr)
        sys.exit(128 + signal.SIGTERM)
