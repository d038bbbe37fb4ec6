"""What a training run leaves on disk, and how it survives a full disk or a killed process.

Checkpoints that are known to be whole, a model directory that is never half old and half new, run.json,
and the callbacks that measure a run. Knows Trainer; knows nothing of recipes or data.
"""

import dataclasses
import json
import os
import platform
import re
import shutil
import signal
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import Trainer, TrainerCallback
from transformers.trainer_callback import ExportableState

import hf_nvfp4
from hf_nvfp4.data import InputError

RUN_FILE = "run.json"
_STATE_FILE = "trainer_state.json"  # Trainer writes it last: its presence makes a checkpoint whole


class SaveError(RuntimeError):
    """A save failed. Its text says what is intact and how to go on."""


class Stopped(Exception):
    """SIGTERM ended training early, with a checkpoint to go on from."""


# ---- Checkpoints -----------------------------------------------------------------------------------------


def incomplete(checkpoint: Path) -> str | None:
    """Why a checkpoint folder cannot be resumed from; None if it can."""
    named = re.fullmatch(r"checkpoint-(\d+)", checkpoint.name)
    try:
        step = json.loads((checkpoint / _STATE_FILE).read_text(encoding="utf-8"))["global_step"]
    except OSError:
        return f"it has no readable {_STATE_FILE}, so its save did not finish"
    except (ValueError, KeyError, TypeError):
        return f"its {_STATE_FILE} is damaged, so its save did not finish"
    if named and step != int(named[1]):
        return f"its {_STATE_FILE} is of step {step}"
    return None


def checkpoints(output_dir: Path) -> list[Path]:
    """The checkpoint folders in output_dir, newest first, whole or not."""
    found = [path for path in output_dir.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    return sorted(found, key=lambda path: int(path.name.split("-")[1]), reverse=True)


def find_checkpoint(wanted: str | None, output_dir: Path) -> tuple[Path | None, list[str]]:
    """The checkpoint to resume from, and sentences about the ones passed over.

    wanted: None, "auto" for the newest whole one in output_dir (None if there is none), or a folder.
    """
    if wanted is None:
        return None, []
    if wanted != "auto":
        reason = incomplete(Path(wanted)) if Path(wanted).is_dir() else "there is no such folder"
        if reason:
            raise InputError(f"cannot resume from {wanted}: {reason}. Use --resume_from_checkpoint auto.")
        return Path(wanted), []
    ignored = []
    for checkpoint in checkpoints(output_dir):
        reason = incomplete(checkpoint)
        if reason is None:
            return checkpoint, ignored
        ignored.append(f"ignoring {checkpoint}: {reason}")
    return None, ignored


class SafeTrainer(Trainer):
    """Trainer whose failed checkpoint leaves a sentence, no debris, and the previous checkpoint.

    With FSDP2 gradients are summed over the ranks in FP32.
    """

    def create_accelerator_and_postprocess(self):
        super().create_accelerator_and_postprocess()
        plugin = getattr(self.accelerator.state, "fsdp_plugin", None)
        policy = getattr(plugin, "mixed_precision_policy", None)
        if policy is not None and plugin.fsdp_version == 2:
            # Accelerate sums them in the parameters' dtype, and rounds the loss to it.
            fp32 = dataclasses.replace(policy, reduce_dtype=torch.float32, output_dtype=None)
            plugin.mixed_precision_policy = fp32

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False):
        """As Trainer's; the whole model, whatever checkpoints have, and these with config and tokenizer."""
        if not self.is_fsdp_enabled:
            return super().save_model(output_dir, _internal_call)
        plugin, folder = self.accelerator.state.fsdp_plugin, Path(output_dir or self.args.output_dir)
        kind = plugin.state_dict_type
        if not _internal_call:
            plugin.set_state_dict_type("FULL_STATE_DICT")
        super().save_model(output_dir, _internal_call)
        plugin.set_state_dict_type(kind)
        if self.args.should_save and not (folder / "config.json").exists():
            self.model.config.save_pretrained(folder)
            if self.processing_class is not None:
                self.processing_class.save_pretrained(folder)

    def _save_checkpoint(self, model, trial):
        try:
            super()._save_checkpoint(model, trial)
        except (OSError, RuntimeError, SafetensorError) as error:
            failed = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
            message = _failed_save(failed, error)
            if incomplete(failed):
                shutil.rmtree(failed, ignore_errors=True)
            raise SaveError(message) from error


def _failed_save(path: Path, error: Exception) -> str:
    """What happened, what is left, what to do. torch.save does not say that a disk is full: the free space does."""
    free = shutil.disk_usage(path.parent).free / 2**20
    whole, _ = find_checkpoint("auto", path.parent)
    intact = f"{whole} is intact" if whole else "There is no earlier checkpoint"
    return (
        f"could not save {path} ({free:,.0f} MiB free): {error}. {intact}. "
        "Make room, then run the same command with --resume_from_checkpoint auto."
    )


# ---- The output folder -----------------------------------------------------------------------------------


def claim(output_dir: Path, resume: bool, overwrite: bool) -> None:
    """Make output_dir ready for a run, or refuse because it holds another's results."""
    output_dir.mkdir(parents=True, exist_ok=True)
    finished, started = (output_dir / RUN_FILE).exists(), bool(checkpoints(output_dir))
    if overwrite:
        (output_dir / RUN_FILE).unlink(missing_ok=True)
        for checkpoint in [] if resume else checkpoints(output_dir):
            shutil.rmtree(checkpoint)
    elif finished:
        raise InputError(
            f"{output_dir} holds a finished run ({RUN_FILE}). Choose another --output_dir, or train anew with "
            "--overwrite_output_dir (it deletes the old checkpoints, unless --resume_from_checkpoint is given)."
        )
    elif started and not resume:
        raise InputError(
            f"{output_dir} holds checkpoints of an unfinished run. Continue it with --resume_from_checkpoint auto, "
            "or delete them and train anew with --overwrite_output_dir."
        )


def publish_model(trainer: Trainer, output_dir: Path) -> None:
    """Make output_dir the model's directory: saved whole beside, then moved in, config.json last.

    Every rank calls it; the first one moves.
    """
    staging = output_dir / ".saving"
    if trainer.is_world_process_zero():
        shutil.rmtree(staging, ignore_errors=True)
    try:
        trainer.save_model(str(staging))
    except (OSError, RuntimeError, SafetensorError) as error:
        message = _failed_save(staging, error)
        shutil.rmtree(staging, ignore_errors=True)
        raise SaveError(message) from error
    if trainer.is_world_process_zero():
        _move_in(staging, output_dir)


def _move_in(staging: Path, output_dir: Path) -> None:
    new = sorted(staging.iterdir(), key=lambda path: (path.name == "config.json", path.name))
    names = {path.name for path in new}
    for path in new:
        os.replace(path, output_dir / path.name)
    for old in output_dir.glob("model*.safetensors*"):
        if old.name not in names:
            old.unlink()  # shards of an overwritten run
    staging.rmdir()


# ---- Measuring -------------------------------------------------------------------------------------------


class RunTimer(TrainerCallback, ExportableState):
    """Wall-clock seconds of training alone: evaluations and saves do not count.

    Throughput leaves out the first steps as well, in which caches fill and graphs compile. The device is
    synchronised only where a stretch of training begins or ends. `seconds` goes on after a resume.
    """

    def __init__(self, warmup_steps: int = 5):
        self.warmup_steps = warmup_steps
        self.seconds = 0.0
        self._steps = 0  # of this process
        self._began = None  # (time, step) of the running stretch
        self._steady = [0.0, 0]  # seconds and steps after warm-up

    def state(self) -> dict:
        return {"args": {"warmup_steps": self.warmup_steps}, "attributes": {"seconds": self.seconds}}

    def steps_per_second(self) -> float | None:
        """None before the first steps after warm-up."""
        seconds, steps = self._steady
        return steps / seconds if steps else None

    def on_train_begin(self, args, state, control, **kwargs):
        saved = state.stateful_callbacks.get(type(self).__name__, {})
        self.seconds = saved.get("attributes", {}).get("seconds", 0.0)

    def on_step_begin(self, args, state, control, **kwargs):
        if self._began is None:
            self._began = _now(), self._steps

    def on_step_end(self, args, state, control, **kwargs):
        self._steps += 1
        if self._steps == self.warmup_steps or control.should_evaluate or control.should_save:
            self._stop()

    def on_train_end(self, args, state, control, **kwargs):
        self._stop()

    def _stop(self):
        if self._began is None:
            return
        began, first = self._began
        seconds = _now() - began
        self.seconds += seconds
        if first >= self.warmup_steps:
            self._steady[0] += seconds
            self._steady[1] += self._steps - first
        self._began = None


class SameData(TrainerCallback, ExportableState):
    """Stops a resume on other data than the checkpoint was trained on."""

    def __init__(self, fingerprint: str):
        self.fingerprint = fingerprint

    def state(self) -> dict:
        return {"args": {"fingerprint": self.fingerprint}, "attributes": {}}

    def on_train_begin(self, args, state, control, **kwargs):
        before = state.stateful_callbacks.get(type(self).__name__, self.state())["args"]["fingerprint"]
        if before != self.fingerprint:
            raise InputError(
                f"the checkpoint was trained on other data (fingerprint {before[:12]}…, now {self.fingerprint[:12]}…). "
                "Give the data, tokenizer and sequence options of the first run, or start in another --output_dir."
            )


class StopOnSignal(TrainerCallback):
    """Within its `with` block SIGTERM ends training after the step that runs, with a checkpoint.

    Once the last step is done, SIGTERM is held off: what follows (evaluation, saving) is short and not resumable.
    In a run of several processes nothing is changed: they would stop at different steps.
    Stands before RunTimer among the callbacks, so that the checkpoint knows the seconds up to it.
    """

    def __init__(self, one_process: bool = True):
        self._listens, self._asked, self._before, self._stopped = one_process, False, None, ""

    def __enter__(self) -> "StopOnSignal":
        if self._listens:
            self._before = signal.signal(signal.SIGTERM, self._ask)
        return self

    def __exit__(self, *_):
        if self._listens:
            signal.signal(signal.SIGTERM, self._before)

    def _ask(self, number, frame):
        self._asked = True

    def on_step_end(self, args, state, control, **kwargs):
        if self._asked and state.global_step < state.max_steps:
            control.should_save = control.should_training_stop = True
            self._stopped = f"step {state.global_step} of {state.max_steps}"

    def check(self) -> None:
        """Raise Stopped if training has ended because of the signal."""
        if self._stopped:
            raise Stopped(
                f"stopped by SIGTERM at {self._stopped}; a checkpoint is saved. "
                "The same command with --resume_from_checkpoint auto goes on."
            )


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def losses(history: list[dict]) -> dict[str, list]:
    """Trainer's log history as {"train": [[step, loss], …], "validation": …}, natural log a token."""
    return {
        "train": [[entry["step"], entry["loss"]] for entry in history if "loss" in entry],
        "validation": [[entry["step"], entry["eval_loss"]] for entry in history if "eval_loss" in entry],
    }


def peak_memory(device: torch.device) -> dict:
    """The most memory this process has held, in bytes, and what was counted."""
    if device.type == "cuda":
        return {
            "peak_memory_bytes": torch.cuda.max_memory_allocated(device),
            "peak_memory_kind": "cuda allocated",
        }
    import resource  # not on Windows

    unit = 1 if sys.platform == "darwin" else 1024
    return {
        "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit,
        "peak_memory_kind": "process resident",
    }


def describe_device(device: torch.device, count: int) -> dict:
    """{"type": "cpu" | "cuda", "name", "count", "threads"}."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name()
    return {"type": device.type, "name": name, "count": count, "threads": torch.get_num_threads()}


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*:\s*(.+)", cpuinfo.read_text()) if cpuinfo.exists() else None
    return found[1] if found else platform.processor() or platform.machine()


def versions() -> dict[str, str | None]:
    """Versions of what decides a result; None where a package is missing."""
    found = {"hf_nvfp4": hf_nvfp4.__version__, "python": platform.python_version()}
    for package in ("torch", "transformers", "accelerate", "tokenizers", "datasets"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found
