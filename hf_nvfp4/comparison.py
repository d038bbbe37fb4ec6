"""A list of recipes trained over the same seeds: which runs there are, what is left to do of each, doing it.

Knows the options of scripts/train.py and what it leaves in a folder; processes.py runs the commands, gaps.py makes
the numbers. A run that is finished is not run again, one that was cut off goes on from its last checkpoint.
A finished run's folder is small: run.json, trainer_state.json, settings.json; checkpoints are deleted.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import re
import shlex
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from tqdm import tqdm

from hf_nvfp4 import report, runlog
from hf_nvfp4.data import InputError
from hf_nvfp4.gemm import backend_names
from hf_nvfp4.integration import NVFP4TrainingConfig
from hf_nvfp4.options import Arguments, parse_arguments, read_recipe
from hf_nvfp4.processes import Job, Pool, Process, Signals, Slot
from hf_nvfp4.scores import write_json

SETTINGS_FILE = "settings.json"  # in a run's folder: its line of the comparison, the options it was started with
# What compare.py sets itself, or what would let one run write into another's folder.
_TAKEN = {"recipe", "seed", "output_dir", "resume_from_checkpoint", "overwrite_output_dir", "run_name", "save_model"}
# Options that a result does not depend on.
_NO_MATTER = _TAKEN - {"recipe", "seed"} | {
    "cache_dir", "config", "disable_tqdm", "report_to", "save_steps", "save_strategy", "save_total_limit",
    "dataloader_num_workers", "dataloader_prefetch_factor", "log_level", "logging_dir",
}  # fmt: skip
_POLL_SECONDS = 0.5
_LINE_EVERY = 60.0  # seconds between lines on the progress, where there is no terminal


# ---- Recipes -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Entry:
    """One line of the comparison: "recipe[@backend][:option=value,...]", options being those of scripts/train.py.

    text: as given, but of a recipe's file the name alone.
    """

    text: str
    flags: tuple[str, ...]

    @property
    def folder(self) -> str:
        """The text as the beginning of a folder's name."""
        safe = re.sub(r"[^A-Za-z0-9._=-]+", "_", self.text).lstrip(".-")
        return safe if len(safe) <= 100 else f"{safe[:91]}_{hashlib.sha256(self.text.encode()).hexdigest()[:8]}"


def parse_entry(text: str) -> Entry:
    """The entry of a text such as "nvfp4@bf16:keep_bf16_last=0,switch_last=0.18". Raises InputError."""
    head, _, tail = text.partition(":")
    recipe, at, backend = head.partition("@")
    options = re.split(r",(?=\s*\w+=)", tail) if tail else []  # a comma within a value is followed by no name
    if not recipe or at and not backend or not all(re.match(r"\s*\w+=.", option) for option in options):
        raise InputError(f"recipe {text!r} is not of the form recipe[@backend][:option=value,...].")
    flags = [f"--recipe={recipe}"] + ([f"--backend={backend}"] if backend else [])
    names = [option.partition("=")[0].strip() for option in options]
    for name in names:
        if name in _TAKEN or backend and name == "backend" or names.count(name) > 1:
            raise InputError(f"recipe {text!r}: {name} stands elsewhere already; leave it out of the options.")
    shown = Path(recipe).name if recipe.endswith(".json") else recipe
    return Entry(shown + text[len(recipe) :], (*flags, *(f"--{option.strip()}" for option in options)))


def parse_entries(texts: list[str]) -> list[Entry]:
    """All entries. Raises InputError, also where two would share a folder."""
    entries: dict[str, Entry] = {}
    for entry in map(parse_entry, texts):
        other = entries.setdefault(entry.folder, entry)
        if other is not entry:
            raise InputError(
                f"recipes {other.text!r} and {entry.text!r} share the folder name {entry.folder!r}; "
                "of a recipe's file its name counts."
            )
    return list(entries.values())


def check_options(options: list[str]) -> None:
    """Refuse options for all runs that compare.py gives each run itself. Raises InputError."""
    given = {option.split("=")[0].lstrip("-").replace("-", "_") for option in options if option.startswith("--")}
    if taken := sorted(given & _TAKEN):
        raise InputError(
            f"--{taken[0]} cannot stand after --: compare.py sets it for each run. "
            "Recipes are given by --recipes, seeds by --seeds, the folder of all by --output; see --keep_models."
        )


# ---- Runs ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Planned:
    """One run: an entry with a seed, in its folder."""

    entry: Entry
    seed: int
    folder: Path
    command: tuple[str, ...]
    settings: dict
    args: Arguments

    @property
    def name(self) -> str:
        """The folder's name."""
        return self.folder.name

    @property
    def steps(self) -> int | None:
        """Optimizer steps; None where they follow from epochs and the data."""
        return self.args.training.max_steps if self.args.training.max_steps > 0 else None


def plan(train: Path, entries: list[Entry], seeds: list[int], output: Path, options: list[str]) -> list[Planned]:
    """All runs, seed by seed, so that whole comparisons come first. Raises InputError for what can't work.

    train: the script of a single run; options: flags for all runs.
    """
    if len(set(seeds)) < len(seeds):
        raise InputError(f"a seed is given twice: {' '.join(map(str, seeds))}.")
    return [_planned(train, entry, seed, output, options) for seed in seeds for entry in entries]


def _planned(train: Path, entry: Entry, seed: int, output: Path, options: list[str]) -> Planned:
    folder = output / f"{entry.folder}-{seed}"
    flags = [*options, *entry.flags, f"--seed={seed}", f"--output_dir={folder}", "--disable_tqdm=False"]
    try:
        args = parse_arguments(flags, about="")
        if args.data.cache_dir is None and not args.data.streaming:
            flags.append(f"--cache_dir={output / 'cache'}")
        if not args.model.model_name_or_path:
            config = NVFP4TrainingConfig(recipe=_recipe(args), backend=args.model.backend or "auto")
            backend_names(config.backend, config.recipe, args.training.device)
    except ValueError as error:  # InputError is one
        raise InputError(f"recipe {entry.text!r}: {error}") from error
    command = (sys.executable, str(train), *flags)
    return Planned(entry, seed, folder, command, settings(args), args)


def _recipe(args: Arguments) -> str | dict:
    """A recipe's name, or what its file holds."""
    name = args.model.recipe
    return read_recipe(Path(name)) if name.endswith(".json") else name


def settings(args: Arguments) -> dict:
    """Every option that a result may depend on, as it reads back from JSON."""
    found = vars(args.model) | vars(args.data) | args.training.to_dict() | {"recipe": _recipe(args)}
    kept = {name: value for name, value in found.items() if name not in _NO_MATTER}
    return json.loads(json.dumps(kept, default=str))


# ---- What is left to do --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Todo:
    """What to do of a run. state: "finished", "cut off", "new" or "other settings"; difference: a few words."""

    run: Planned
    state: str
    difference: str = ""
    shared_by: int = 1  # runs at once on its GPU

    def job(self) -> Job:
        """The command that finishes the run, and its log beside the folder."""
        more = ["--resume_from_checkpoint=auto"] if self.state == "cut off" else []
        return Job(self.run.name, [*self.run.command, *more], log_of(self.run))

    def prepare(self) -> None:
        """Clear the folder of what is not to be gone on from, then note the settings: a kill leaves no wrong pair."""
        if self.state == "other settings":
            shutil.rmtree(self.run.folder)
        runlog.claim(self.run.folder, resume=self.state == "cut off", overwrite=True)
        content = {"label": self.run.entry.text, "shared_by": self.shared_by}
        content |= {"command": shlex.join(self.run.command), "settings": self.run.settings}
        write_json(self.run.folder / SETTINGS_FILE, content)


def log_of(run: Planned) -> Path:
    """The file that the run's output goes to."""
    return run.folder.parent / f"{run.name}.log"


def look(run: Planned) -> Todo:
    """What an earlier call has left of a run."""
    before = _noted(run.folder).get("settings")
    finished, started = is_finished(run.folder), bool(runlog.checkpoints(run.folder))
    if before is None:
        if not started and not (run.folder / runlog.RUN_FILE).exists():
            return Todo(run, "new")
        return Todo(run, "other settings", f"nothing there says with which ({SETTINGS_FILE} is missing or broken)")
    differing = [name for name in run.settings if name in before and before[name] != run.settings[name]]
    if differing and (finished or started):
        said = [f"{name} {_short(before[name])} (now {_short(run.settings[name])})" for name in differing[:4]]
        return Todo(run, "other settings", ", ".join(said) + (", …" if len(differing) > 4 else ""))
    return Todo(run, "finished" if finished else "cut off" if started else "new")


def _short(value) -> str:
    text = str(value)
    return text if len(text) <= 60 else text[:57] + "…"


def is_finished(folder: Path) -> bool:
    """Whether train.py has written its results whole."""
    try:
        return report.read_run(folder).record["status"] == "complete"
    except ValueError:  # a ReportError or a ScoreError
        return False


def _noted(folder: Path) -> dict:
    """What prepare() has noted in a folder; {} if nothing."""
    try:
        found = json.loads((folder / SETTINGS_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def refuse_other_settings(todos: list[Todo]) -> None:
    """Raise InputError if a folder holds a run of other settings."""
    others = [f"{todo.run.folder}: {todo.difference}" for todo in todos if todo.state == "other settings"]
    if others:
        raise InputError(
            "made with other settings:\n  " + "\n  ".join(others) + "\nGive the options of the first call, another "
            "--output, or --overwrite to train these anew (it deletes their folders)."
        )


# ---- What is there -------------------------------------------------------------------------------------


def finished_runs(output: Path, recipes: list[str] | None = None, seeds: list[int] | None = None) -> dict:
    """Label -> folders of the finished runs in output; of these recipes and seeds alone, if given."""
    found: dict[str, list[Path]] = {recipe: [] for recipe in recipes or ()}
    for folder in sorted(path.parent for path in output.glob(f"*/{runlog.RUN_FILE}")):
        if not is_finished(folder) or seeds and report.read_run(folder).get("training.seed") not in seeds:
            continue
        label = _noted(folder).get("label") or re.sub(r"-\d+$", "", folder.name)
        if recipes is None or label in found:
            found.setdefault(label, []).append(folder)
    return found


def speed_note(folders: list[Path]) -> list[str]:
    """A sentence, if runs in these folders shared their GPU with others."""
    most = max((_noted(folder).get("shared_by", 1) for folder in folders), default=1)
    return [f"Up to {most} runs shared a GPU: tokens/s and seconds are not those of a GPU alone."] if most > 1 else []


@contextlib.contextmanager
def alone_in(output: Path) -> Iterator[None]:
    """Hold the folder of all runs, and let the runs hold it; InputError if others have it."""
    output.mkdir(parents=True, exist_ok=True)
    with (output / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise InputError(
                f"another compare.py, or a run that it has started, is at work in {output}. Wait for it or stop it "
                "(fuser names the process that holds .lock there), or give another --output."
            ) from error
        os.set_inheritable(lock.fileno(), True)
        yield


# ---- Doing it ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Failure:
    """A run that did not finish. why: one line; tail: the last lines of its log."""

    run: Planned
    why: str
    tail: str


class Progress:
    """One line for all runs: steps done of all steps. A bar on a terminal, now and then a line elsewhere."""

    def __init__(self, todos: list[Todo]):
        self._steps = {todo.run.name: todo.run.steps for todo in todos}
        self._done = {todo.run.name: 0 for todo in todos}
        self._whole = {todo.run.name for todo in todos if todo.state == "finished"}
        self._bar = tqdm(desc="all runs", unit="step", total=1, disable=None, smoothing=0.05)
        self._said = time.monotonic()
        self.update([])
        self._bar.initial = self._bar.n

    def say(self, text: str) -> None:
        """A line of its own."""
        self._bar.write(text) if not self._bar.disable else print(text, flush=True)

    def ended(self, name: str, finished: bool) -> None:
        """Count a run as whole; one that failed counts no longer, what it had to do is not going to be done."""
        if finished:
            self._whole.add(name)
        else:
            self._steps.pop(name)
            self._done.pop(name)

    def update(self, running: list[Process]) -> None:
        """Look at the logs of what runs."""
        for process in running:
            if bar := process.steps():
                self._done[process.job.name], self._steps[process.job.name] = bar
        longest = max((steps for steps in self._steps.values() if steps), default=1)
        all_steps = {name: steps or longest for name, steps in self._steps.items()}
        done = sum(all_steps[name] if name in self._whole else self._done[name] for name in all_steps)
        total = sum(all_steps.values())
        if not self._bar.disable:
            self._bar.total, self._bar.n = total, done
            self._bar.set_postfix_str(", ".join(process.job.name for process in running), refresh=True)
        elif running and time.monotonic() - self._said > _LINE_EVERY:
            self._said = time.monotonic()
            self.say(f"{done:,} of {total:,} steps; running: {', '.join(p.job.name for p in running)}")

    def close(self) -> None:
        """Leave the terminal in order."""
        self._bar.close()


@dataclass
class Outcome:
    """What has become of the runs of one call, of those that have not finished."""

    failures: list[Failure] = field(default_factory=list)
    unfinished: list[Planned] = field(default_factory=list)


def run_all(todos: list[Todo], places: list[Slot], signals: Signals, deadline: float) -> Outcome:
    """Finish all runs, or stop them at a signal or the deadline (by time.monotonic), with a checkpoint each."""
    left = {todo.run.name: todo for todo in todos if todo.state != "finished"}
    outcome, progress = Outcome(), Progress(todos)
    pool = Pool([todo.job() for todo in left.values()], places, before=lambda job: left[job.name].prepare())
    pool.first_alone = not any(todo.state in ("finished", "cut off") for todo in todos)
    try:
        for todo in todos:
            if todo.state == "finished":
                progress.say(f"{todo.run.name}: finished earlier")
        while (pool.waiting or pool.running) and time.monotonic() < deadline and not signals.count:
            started, ended = pool.step()
            for process in ended:
                _end(left[process.job.name].run, process, progress, outcome)
            for process in started:
                begins = _BEGINS[left[process.job.name].state]
                progress.say(f"{process.job.name}: {begins} on {process.slot}, log {process.job.log}")
            progress.update(pool.running)
            time.sleep(_POLL_SECONDS)
    finally:
        outcome.unfinished += [left[job.name].run for job in pool.waiting]
        if pool.running:
            progress.say(f"stopping {', '.join(process.job.name for process in pool.running)}")
        for process in pool.stop(hurry=lambda: signals.count > 1):
            _end(left[process.job.name].run, process, progress, outcome, stopped=True)
        progress.close()
    return outcome


_BEGINS = {"new": "starts", "cut off": "resumes", "other settings": "starts anew"}
_STOPPED = (-signal.SIGTERM, -signal.SIGKILL, 128 + signal.SIGTERM)


def _end(run: Planned, process: Process, progress: Progress, outcome: Outcome, stopped: bool = False) -> None:
    """Note how a run has ended. stopped: it was told to."""
    status, seconds = process.status(), process.seconds()
    finished = status == 0 and is_finished(run.folder)
    progress.ended(run.name, finished)
    if finished:
        for checkpoint in runlog.checkpoints(run.folder):
            shutil.rmtree(checkpoint)
        loss = report.read_run(run.folder).get("final.validation_loss")
        progress.say(f"{run.name}: finished in {seconds:,.0f} s, validation loss {loss:.4f}")
        return
    if stopped and status in _STOPPED:
        checkpoint, _ = runlog.find_checkpoint("auto", run.folder)
        outcome.unfinished.append(run)
        progress.say(f"{run.name}: stopped" + (f" with {checkpoint.name}" if checkpoint else ", no checkpoint yet"))
        return
    if status == 0:
        why = f"ended well, but left no whole {runlog.RUN_FILE}"
    elif status < 0:
        why = f"killed by signal {-status}" + (" (out of memory?)" if status == -signal.SIGKILL else "")
    else:
        why = f"failed with exit status {status}"
    outcome.failures.append(Failure(run, why, process.last_lines()))
    progress.say(f"{run.name}: {why} after {seconds:,.0f} s")
