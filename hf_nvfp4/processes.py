"""Commands as child processes on GPUs: where each one goes, when it starts, how it ends, how all are stopped.

Knows processes, logs and signals; knows nothing of recipes or of what the commands do.
"""

import contextlib
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

# A progress bar of tqdm, not nested, without text before it.
_BAR = re.compile(r"(?:^|[\r\n])\s*\d+%\|[^|\r\n]*\|\s*(\d+)/(\d+) \[[^\]\r\n]*\](?!\x1b)")
PATIENCE = 60.0  # seconds that a child has to save and end after SIGTERM
_LONGEST_LINE = 400


class Signals:
    """Within its `with` block SIGINT and SIGTERM are counted rather than obeyed. first: the number of the first one."""

    def __init__(self):
        self.first, self.count, self._before = None, 0, {}

    def __enter__(self) -> "Signals":
        self._before = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_):
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number, frame):
        self.first, self.count = self.first or number, self.count + 1


# ---- Where ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Slot:
    """Room for one process at a time. gpu: what CUDA_VISIBLE_DEVICES calls it; None: nothing is changed."""

    gpu: str | None

    def __str__(self) -> str:
        return "the CPU" if self.gpu is None else f"GPU {self.gpu}"

    def environment(self) -> dict[str, str]:
        """The child's environment. Bars are redrawn every few seconds only: they end in a log."""
        calm = {"TQDM_MININTERVAL": "2", "PYTHONUNBUFFERED": "1"}
        return os.environ | calm | ({} if self.gpu is None else {"CUDA_VISIBLE_DEVICES": self.gpu})


def slots(cpu: bool, parallel: int = 1) -> list[Slot]:
    """`parallel` slots on each GPU that this process may use, every GPU once before any twice; one on a CPU."""
    count = 0 if cpu else torch.cuda.device_count()
    names = [name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    names = names[:count] if len(names) >= count else [str(i) for i in range(count)]
    return [Slot(name) for _ in range(parallel) for name in names] or [Slot(None)]


# ---- One process ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Job:
    """A command, and the file that its output is appended to."""

    name: str
    command: list[str]
    log: Path


class Process:
    """A job that was started, in a process group of its own."""

    def __init__(self, job: Job, slot: Slot):
        self.job, self.slot, self.began = job, slot, time.monotonic()
        self._bar: tuple[int, int] | None = None
        job.log.parent.mkdir(parents=True, exist_ok=True)
        with job.log.open("ab") as log:
            self._offset = self._read_to = log.tell()
            self._popen = subprocess.Popen(
                job.command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=slot.environment(),
                start_new_session=True,
                close_fds=False,  # what was made inheritable stays open
            )

    def status(self) -> int | None:
        """None while it runs, then the exit status; -n: killed by signal n."""
        return self._popen.poll()

    def seconds(self) -> float:
        """Since the start."""
        return time.monotonic() - self.began

    def _output(self, since: int) -> bytes:
        with self.job.log.open("rb") as log:
            log.seek(since)
            return log.read()

    def steps(self) -> tuple[int, int] | None:
        """(done, of all) by the first progress bar that it drew; None before that."""
        new = self._output(self._read_to)
        self._read_to += max(new.rfind(b"\r"), new.rfind(b"\n"), 0)  # what was cut off is read again
        for done, total in _BAR.findall(new.decode(errors="replace")):
            if self._bar is None or int(total) == self._bar[1] and int(done) > self._bar[0]:
                self._bar = int(done), int(total)
        return self._bar

    def last_lines(self, count: int = 6) -> str:
        """The end of its output, without progress bars."""
        lines = (line.rstrip() for line in re.split(r"[\r\n]+", self._output(self._offset).decode(errors="replace")))
        kept = [line[:_LONGEST_LINE] for line in lines if line and not re.search(r"\d+%\|", line)]
        return "\n".join(kept[-count:])

    def terminate(self) -> None:
        """SIGTERM to it alone: it needs its workers to save."""
        self._popen.terminate()

    def kill(self) -> None:
        """SIGKILL to it and all that it has started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._popen.pid, signal.SIGKILL)
        self._popen.wait()


# ---- All of them ---------------------------------------------------------------------------------------


class Pool:
    """Runs jobs in order, as many at once as there are slots; stop() ends what still runs.

    before: called with a job just before it starts. first_alone: the first one runs alone until it draws its
    progress bar; what it has prepared (token streams), the others find.
    """

    def __init__(self, jobs: list[Job], places: list[Slot], before: Callable[[Job], None] = lambda job: None):
        self._before = before
        self.waiting, self.running, self._free = list(jobs), [], list(places)
        self.first_alone = True

    def step(self) -> tuple[list[Process], list[Process]]:
        """Start what there is room for. Returns the processes that were started and those that have ended."""
        ended = [process for process in self.running if process.status() is not None]
        for process in ended:
            self.running.remove(process)
            self._free.append(process.slot)
        self.first_alone = self.first_alone and not ended and not any(process.steps() for process in self.running)
        started = []
        while self.waiting and self._free and not (self.first_alone and self.running):
            self._before(self.waiting[0])
            process = Process(self.waiting.pop(0), self._free.pop(0))
            self.running.append(process)
            started.append(process)
        return started, ended

    def stop(self, hurry: Callable[[], bool] = lambda: False) -> list[Process]:
        """SIGTERM to all, SIGKILL to what is left after PATIENCE, or as soon as there is a hurry.

        Returns the processes that were running.
        """
        self.waiting.clear()
        stopped, self.running = self.running, []
        until = time.monotonic() + PATIENCE
        try:
            for process in stopped:
                process.terminate()
            while any(process.status() is None for process in stopped) and time.monotonic() < until and not hurry():
                time.sleep(0.1)
        finally:
            for process in stopped:
                process.kill()
        return stopped
