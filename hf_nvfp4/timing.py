"""Times several ways to do one thing side by side, and counts the memory that each one holds.

Round robin, medians over rounds, on a cache that holds other data. Knows torch; nothing of recipes or layers.
"""

import gc
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Timing:
    """Seconds of one variant.

    seconds: one a round; entry i of all variants of a run is from the same round.
    launch: what the host needs to launch it once on an idle GPU; where it exceeds the median, the GPU waits
        for the host. None on the CPU.
    """

    seconds: tuple[float, ...]
    launch: float | None = None

    @property
    def median(self) -> float:
        """Median over the rounds."""
        return statistics.median(self.seconds)

    def ratio(self, base: "Timing") -> float:
        """Median over the rounds of time / base's time in the same round: a drifting clock cancels."""
        return statistics.median(mine / its for mine, its in zip(self.seconds, base.seconds, strict=True))

    def to_dict(self) -> dict:
        """Plain data for JSON."""
        return {
            "median_seconds": self.median,
            "min_seconds": min(self.seconds),
            "max_seconds": max(self.seconds),
            "rounds": len(self.seconds),
            "launch_seconds": self.launch,
        }


# ---- Clocks --------------------------------------------------------------------------------------------


class HostClock:
    """Wall-clock time of what runs on the CPU. Its cache is not flushed."""

    cache = "CPU caches not flushed"

    def flush(self) -> None:
        """Nothing."""

    def mark(self) -> float:
        """Now."""
        return time.perf_counter()

    def seconds(self, marks: tuple[float, float]) -> float:
        """The time between two marks."""
        return marks[1] - marks[0]

    def wait(self) -> None:
        """Nothing: calls return when they are done."""

    def launch_seconds(self, run: Callable) -> None:
        """There is no launching."""
        return None


class CudaClock:
    """GPU time between two events, on an L2 cache filled by a copy of other data.

    A copy leaves L2 as any kernel that streams does: part of it is dirty, so that the timed work pays for
    some writes of its predecessor as its successor will for its own. Nothing waits for the GPU between two
    timings: the host runs ahead, as it does in training.
    """

    def __init__(self, device: torch.device):
        self.device = device
        size = torch.cuda.get_device_properties(device).L2_cache_size
        self.cache = f"L2 ({size / 2**20:.0f} MiB) filled with other data before each timing"
        self._buffers = torch.zeros(2, max(size, 2**25), dtype=torch.uint8, device=device)

    def flush(self) -> None:
        """Fill L2 with other data."""
        self._buffers[0].copy_(self._buffers[1])

    def mark(self) -> torch.cuda.Event:
        """An event after all that was launched so far."""
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, marks: tuple) -> float:
        """The time between two events, after `wait`."""
        return marks[0].elapsed_time(marks[1]) / 1000

    def wait(self) -> None:
        """Until the GPU has done everything."""
        torch.cuda.synchronize(self.device)

    def launch_seconds(self, run: Callable, times: int = 5) -> float:
        """Median host time of a call while the GPU has nothing else to do."""
        found = []
        for _ in range(times):
            self.wait()
            begin = time.perf_counter()
            run()
            found.append(time.perf_counter() - begin)
        self.wait()
        return statistics.median(found)


def clock_for(device: torch.device) -> HostClock | CudaClock:
    """The clock that fits the device."""
    return CudaClock(device) if device.type == "cuda" else HostClock()


def captured(run: Callable, device: torch.device) -> Callable:
    """All that a call launches as one CUDA graph; calling the result replays it, so that launches cost nothing.

    Tensors that the call makes are the graph's: each replay writes them anew.

    Raises:
        RuntimeError: what a graph can't hold, such as waiting for the GPU.
    """
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for _ in range(3):  # compiles, and takes the workspaces that outlive a call
            run()
    torch.cuda.current_stream(device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        run()
    return graph.replay


def interleave(
    variants: dict[str, Callable],
    clock: HostClock | CudaClock,
    rounds: int,
    warmup: int = 3,
    launches: dict[str, Callable] | None = None,
) -> dict[str, Timing | Exception]:
    """Time every variant once a round, each round beginning with another one.

    A variant that raises leaves the race: its entry is the exception. The others go on.
    launches: what to time the launch of instead, by name: a replayed graph's is not its call's.
    """
    results: dict[str, Timing | Exception] = {}
    running, launched = dict(variants), variants | (launches or {})

    def attempt(name: str, action: Callable, runs: dict[str, Callable] = variants):
        try:
            return action(runs[name])
        except Exception as error:  # whatever a kernel or a compiler raises
            results[name] = error
            del running[name]

    def warm(run):
        for _ in range(warmup):
            run()
        clock.wait()  # so that an asynchronous error is its own

    def timed(run):
        begin = clock.mark()
        run()
        return begin, clock.mark()

    for name in variants:
        attempt(name, warm)
    marks: dict[str, list] = {name: [] for name in variants}
    gc.collect()
    for turn in range(rounds):
        names = list(running)
        first = turn % max(1, len(names))
        for name in names[first:] + names[:first]:
            clock.flush()
            marks[name].append(attempt(name, timed))
    for name in list(running):
        launch = attempt(name, clock.launch_seconds, launched)  # waits for the GPU first
        if name in running:
            results[name] = Timing(tuple(map(clock.seconds, marks[name])), launch)
    return {name: results[name] for name in variants}


# ---- Memory --------------------------------------------------------------------------------------------


def saved_bytes(forward: Callable[[], Tensor], owned: Iterable[Tensor] = ()) -> int:
    """Bytes that autograd keeps between forward and backward, each storage once.

    owned: tensors that are there anyway, such as the parameters; they do not count.
    """
    ours = {tensor.untyped_storage().data_ptr() for tensor in owned}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in ours:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor.detach()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = forward()  # held until the count is done: an address is given out once
    total = sum(kept.values())
    del output
    return total


def held_bytes(device: torch.device) -> int:
    """GPU memory allocated now; 0 on the CPU."""
    gc.collect()
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def peak_bytes(run: Callable, device: torch.device) -> int | None:
    """The most GPU memory that a call allocates beyond what was held before it; None on the CPU."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    before = held_bytes(device)
    torch.cuda.reset_peak_memory_stats(device)
    run()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


# ---- Kernels -------------------------------------------------------------------------------------------


def kernel_seconds(run: Callable, device: torch.device, times: int = 5) -> dict[str, float]:
    """GPU seconds a call by kernel name, the longest first; empty on the CPU."""
    if device.type != "cuda":
        return {}
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(times):
            run()
        torch.cuda.synchronize(device)
    found = {event.key: event.self_device_time_total / 1e6 / times for event in profile.key_averages()}
    return dict(sorted(((k, s) for k, s in found.items() if s), key=lambda item: -item[1]))
