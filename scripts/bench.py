"""Time casts, linear layers and training steps of recipes beside BF16 and a measured copy.

    # Casts against a copy; forward + backward of a linear layer against nn.Linear in BF16
    python scripts/bench.py casts linear --json bench.json
    python scripts/bench.py casts --casts all --cast_shapes 16384x4096
    python scripts/bench.py linear --recipes nvfp4 fp8 --linear_shapes 16384x2048x8192 --kernels
    # A whole step of training: forward, backward, AdamW
    python scripts/bench.py model --size 350m --recipes nvfp4

Each variant is first compared with backend `reference`, at the shape that is timed; one that computes something
else is not timed. Variants take turns; a number is the median over the rounds, a ratio the median of the rounds'
ratios. A variant that fails is a row with its error, and the exit status is 1.
"""

import argparse
import contextlib
import math
import shlex
import sys
import time
import traceback
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from hf_nvfp4 import timing, yardstick
from hf_nvfp4.backends import BACKENDS
from hf_nvfp4.benchmarks import (
    CASTS,
    SEED,
    YARDSTICK,
    Step,
    TrainingStep,
    Wrong,
    check_cast,
    check_linears,
    check_step,
    layer_calls,
)
from hf_nvfp4.gemm import backend_name
from hf_nvfp4.recipes import get_recipe
from hf_nvfp4.runlog import describe_device, versions
from hf_nvfp4.scores import markdown_table, write_json
from hf_nvfp4.sizes import SIZES

SCHEMA = 1
BASE = "nn.Linear"  # in BF16; what ratios are taken to
MAIN_CASTS = ["rne", "sr", "2d", "rht", "rht_sr"]
DEFAULTS = {
    "cuda": {
        "cast_shapes": [(16384, 4096), (16384, 14336)],
        "linear_shapes": [(16384, 4096, 14336), (16384, 2048, 8192)],
        "size": "350m",
        "rounds": 30,
    },
    "cpu": {"cast_shapes": [(1024, 1024)], "linear_shapes": [(512, 512, 1024)], "size": "tiny", "rounds": 5},
}


# ---- Casts ---------------------------------------------------------------------------------------------


@contextlib.contextmanager
def recorded(row: dict):
    """An error inside is the row's, not the end."""
    try:
        yield
    except Exception as error:  # whatever a compiler, a kernel or the allocator raises
        row["error"] = f"{type(error).__name__}: {error}".splitlines()[0]
        row["traceback"] = traceback.format_exc()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def time_rows(rows: dict[str, dict], runs: dict, base: str, args: argparse.Namespace) -> None:
    """Time the runs against each other and enter what came out in their rows."""
    for name, result in (times := timing.interleave(runs, args.clock, args.rounds)).items():
        with recorded(rows[name]):
            if isinstance(result, Exception):
                raise result
            rows[name] |= {"time": result.to_dict(), "ratio": None}
            if isinstance(times.get(base), timing.Timing):
                rows[name]["ratio"] = result.ratio(times[base])
            if args.kernels:
                rows[name]["kernels"] = timing.kernel_seconds(runs[name], args.device)


def bench_casts(args: argparse.Namespace, shape: tuple[int, int]) -> tuple[dict, str]:
    """Casts of one shape against a copy of it: rows, table."""
    torch.manual_seed(SEED)
    x = torch.randn(shape, device=args.device, dtype=torch.bfloat16)
    rows = {"copy": {"what": "x to a buffer", "bytes_read": x.nbytes, "bytes_written": x.nbytes}}
    runs = {"copy": partial(torch.empty_like(x).copy_, x)}
    calls = {name: CASTS[name] for name in args.casts}
    for recipe in args.recipes:
        calls |= {f"{recipe.name} {tensor}": call for tensor, call in layer_calls(recipe).items()}
    for name, call in calls.items():
        rows[name] = {"what": str(call)}
        with recorded(rows[name]):
            rows[name]["backend"] = backend_name(args.backend, call.recipe, args.device)
            backend = BACKENDS[rows[name]["backend"]]
            rows[name]["check"] = check_cast(backend, call, x)
            rows[name]["bytes_read"], rows[name]["bytes_written"] = call.traffic(x, call(backend, x))
            runs[name] = partial(call, backend, x)
    time_rows(rows, runs, "copy", args)
    for row in rows.values():
        if "time" in row:
            moved = row["bytes_read"] + row["bytes_written"]
            row["bytes_per_second"] = moved / row["time"]["median_seconds"]
            row["share_of_copy"] = row["ratio"] and moved / (2 * x.nbytes) / row["ratio"]
    header = ["cast", "what", "ms", "launch ms", "MB read", "MB written", "GB/s", "of copy", "check"]
    lines = [
        [name, row["what"], *times(row), number(row.get("bytes_read"), 1e6), number(row.get("bytes_written"), 1e6),
         number(row.get("bytes_per_second"), 1e9), number(row.get("share_of_copy"), 1, 2), outcome(row)]
        for name, row in rows.items()
    ]  # fmt: skip
    note = "MB read: x for the amax, if there is a tensor scale, and x again. Of copy: of the copy's GB/s."
    return rows, f"{markdown_table(header, lines)}\n\n{note}"


# ---- Linear layers -------------------------------------------------------------------------------------


def bench_linear(args: argparse.Namespace, shape: tuple[int, int, int]) -> tuple[dict, str]:
    """Forward and backward of one layer by recipe, against nn.Linear and a copy of x: rows, table."""
    base = Step.of_linear(shape, args.device, WEIGHTS[args.weights])
    rows, steps = {BASE: {}}, {BASE: base}
    timed_too = args.inductor == "all" or args.inductor == "first" and shape == args.linear_shapes[0]
    for recipe in args.recipes:
        expected = {}
        with recorded(rows.setdefault(recipe.name, {})):
            expected = base.with_recipe(recipe, "reference").results()
        for name, backend in ((recipe.name, args.backend), (f"{recipe.name}, {YARDSTICK}", YARDSTICK)):
            if expected and (backend != YARDSTICK or timed_too and layer_calls(recipe)):
                with recorded(rows.setdefault(name, {})):
                    step = base.with_recipe(recipe, backend)
                    rows[name] |= check_step(step, expected)
                    steps[name] = step
    base()  # takes cuBLAS's workspaces, which stay
    for name, step in steps.items():
        with recorded(rows[name]):
            rows[name]["saved_bytes"] = timing.saved_bytes(step.forward, [step.layer.weight])
            step()
            step.clear()
            rows[name]["peak_bytes"] = timing.peak_bytes(step, args.device)
    copy = partial(torch.empty_like(base.x).copy_, base.x.detach())
    rows["copy"] = {"bytes": 2 * base.x.nbytes}
    sound = {name: step for name, step in steps.items() if "error" not in rows[name]}
    time_rows(rows, {"copy": copy} | sound, BASE, args)
    return rows, linear_table(shape, rows)


def linear_table(shape: tuple[int, int, int], rows: dict[str, dict]) -> str:
    """One line a variant, and what the columns mean."""
    copy, base, lines = rows["copy"], rows[BASE], []
    for name, row in rows.items():
        if "time" in row:
            row["flops_per_second"] = 6 * math.prod(shape) / row["time"]["median_seconds"]
        if row.get("cast_bytes") is not None and "time" in copy and "time" in base:
            cast_seconds = row["cast_bytes"] / copy["bytes"] * copy["time"]["median_seconds"]
            row["floor"] = 1 + cast_seconds / base["time"]["median_seconds"]
        if name == "copy":
            continue
        lines.append(
            [name, *times(row), number(row.get("ratio"), 1, 3), number(row.get("floor"), 1, 3),
             number(row.get("flops_per_second"), 1e12, 1), *memory(row, base, "saved_bytes"),
             *memory(row, base, "peak_bytes"), outcome(row)]
        )  # fmt: skip
    header = ["linear", "ms", "launch ms", "× BF16", "floor", "TFLOP/s", "saved MiB", "× BF16", "peak MiB", "× BF16"]
    speed = number(copy["bytes"] / copy["time"]["median_seconds"], 1e9) if "time" in copy else "—"
    notes = f"""
Floor: if the GEMMs took BF16's time and the casts' bytes moved as in a copy of x, {speed} GB/s in this run.
Saved: from forward to backward, the parameters left out. Peak: what a step allocates at most."""
    return f"{markdown_table([*header, 'check'], lines)}\n{notes}"


# ---- Models --------------------------------------------------------------------------------------------


def bench_model(args: argparse.Namespace) -> tuple[dict, str]:
    """Training steps of one model by recipe, against the model as Transformers makes it: rows, table."""
    rows, steps, tokens = {}, {}, args.batch * args.sequence_length
    Step.of_linear((64, 64, 64), args.device, torch.bfloat16)()  # takes cuBLAS's workspaces, which stay
    for name, recipe in [(BASE, None), *((recipe.name, recipe) for recipe in args.recipes)]:
        rows[name] = {}
        with recorded(rows[name]):
            before = timing.held_bytes(args.device)
            step = TrainingStep(args, recipe)
            if recipe:
                rows[name]["decisions"] = [vars(decision) for decision in step.network.nvfp4_decisions]
                rows[name] |= check_linears(step.network, args.device, min(1024, tokens))
            step()  # makes the optimizer's state
            held = timing.held_bytes(args.device) - before
            peak = timing.peak_bytes(step, args.device)
            rows[name]["peak_bytes"] = peak and peak + held
            steps[name] = step
    time_rows(rows, steps, BASE, args)
    lines = []
    for name, row in rows.items():
        with recorded(row):
            if "time" in row:
                row["tokens_per_second"] = tokens / row["time"]["median_seconds"]
                row["loss"] = steps[name]().item()
                if not math.isfinite(row["loss"]):
                    raise Wrong(f"the loss is {row['loss']}")
        lines.append(
            [name, converted(row.get("decisions", [])), *times(row), number(row.get("ratio"), 1, 3),
             number(row.get("tokens_per_second")), *memory(row, rows[BASE], "peak_bytes"),
             number(row.get("loss"), 1, 4), outcome(row)]
        )  # fmt: skip
    header = ["model", "converted", "ms", "launch ms", "× BF16", "tokens/s", "peak MiB", "× BF16", "loss", "check"]
    return rows, markdown_table(header, lines)


# ---- Tables --------------------------------------------------------------------------------------------


def number(value: float | None, unit: float = 1, digits: int = 0) -> str:
    """value / unit, or a dash."""
    return "—" if value is None else f"{value / unit:,.{digits}f}"


def times(row: dict) -> list[str]:
    """Cells: median and launch time in ms."""
    found = row.get("time", {})
    return [number(found.get(key), 1e-3, 3) for key in ("median_seconds", "launch_seconds")]


def memory(row: dict, base: dict, key: str) -> list[str]:
    """Cells: MiB and the ratio to the base's."""
    both = row.get(key) is not None and base.get(key)
    return [number(row.get(key), 2**20, 1), number(row[key] / base[key], 1, 3) if both else "—"]


def converted(decisions: list[dict]) -> str:
    """A cell: how many of the linears."""
    return f"{sum(d['converted'] for d in decisions)} of {len(decisions)}" if decisions else "—"


def outcome(row: dict) -> str:
    """The error, or how the check came out."""
    return f"ERROR {row['error']}"[:160].replace("|", "/") if "error" in row else row.get("check", "the base")


def kernel_lines(rows: dict[str, dict]) -> str:
    """What --kernels adds: each variant's longest kernels."""
    lines = []
    for name, row in rows.items():
        lines += [f"  {name}"] if row.get("kernels") else []
        for kernel, seconds in list(row.get("kernels", {}).items())[:15]:
            lines.append(f"    {number(seconds, 1e-3, 4):>9} ms  {kernel[:100]}")
    return "\n".join(lines)


# ---- Main ----------------------------------------------------------------------------------------------


WEIGHTS = {"bfloat16": torch.bfloat16, "float32": torch.float32}


def shape_of(length: int):
    """A parser of so many sizes, as 16384x4096."""

    def parse_shape(text: str) -> tuple[int, ...]:
        sizes = tuple(int(size) for size in text.split("x") if size.isdigit())
        if len(sizes) != length or text.count("x") != length - 1 or 0 in sizes:
            raise argparse.ArgumentTypeError(f"{text!r} is not {length} sizes, as {'x'.join(['4096'] * length)}")
        return sizes

    return parse_shape


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line; see --help."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("what", nargs="*", metavar="casts|linear|model", help="what to time (default: casts linear)")
    add("--recipes", nargs="+", default=["nvfp4"], metavar="R", help="their casts, layers, models")
    add("--backend", default="auto")
    add("--device", type=torch.device, default="cuda" if torch.cuda.is_available() else "cpu")
    add("--rounds", type=int, metavar="N", help="timings of each variant (default: 30, on the CPU 5)")
    add("--casts", nargs="+", default=MAIN_CASTS, metavar="C", help=f"all, or of {', '.join(CASTS)}")
    add("--cast_shapes", nargs="+", type=shape_of(2), metavar="MxK")
    add("--linear_shapes", nargs="+", type=shape_of(3), metavar="TxKxN", help="tokens, in, out features")
    add("--weights", choices=WEIGHTS, default="bfloat16", help="of linear; float32 runs under BF16 autocast")
    add(
        "--inductor",
        choices=["none", "first", "all"],
        default="first",
        help="shapes of linear for which to time a plain-PyTorch emulation compiled by inductor too",
    )
    add("--size", choices=SIZES, help="of model (default: 350m, on the CPU tiny)")
    add("--batch", type=int, metavar="N", help="sequences a step of model (default: the size's)")
    add("--sequence_length", type=int, metavar="N", help="of model (default: the size's)")
    add("--compile", action="store_true", help="torch.compile the model, the BF16 one too")
    add("--kernels", action="store_true", help="also list each variant's GPU kernels and their times")
    add("--json", type=Path, metavar="FILE", help="write everything there, after each table anew")
    args = parser.parse_args(argv)
    complete(args, parser)
    return args


def complete(args: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """Defaults that depend on other options, and names that argparse does not check."""
    for name, default in DEFAULTS["cuda" if args.device.type == "cuda" else "cpu"].items():
        if getattr(args, name) is None:
            setattr(args, name, default)
    size, args.what = SIZES[args.size], args.what or ["casts", "linear"]
    args.batch, args.sequence_length = args.batch or size.batch, args.sequence_length or size.sequence_length
    args.casts = list(CASTS) if args.casts == ["all"] else args.casts
    for kind, names, known in (("benchmark", args.what, ["casts", "linear", "model"]), ("cast", args.casts, CASTS)):
        for name in names:
            if name not in known:
                parser.error(f"unknown {kind} {name!r}; known: {', '.join(known)}")
    if min(args.rounds, args.batch, args.sequence_length) < 1:
        parser.error("--rounds, --batch and --sequence_length are at least 1")
    if args.device.type == "cuda" and not torch.cuda.is_available():
        parser.error("there is no CUDA device here; use --device cpu")
    if args.device.type == "cuda":
        args.device = torch.device("cuda", args.device.index or 0)
    try:
        args.recipes = [get_recipe(name) for name in args.recipes]
        args.backends = [backend_name(args.backend, recipe, args.device) for recipe in args.recipes]
    except ValueError as error:
        parser.error(str(error))


def announce(args: argparse.Namespace) -> dict:
    """Device, backend, recipe, versions: printed, and what the JSON file says of them."""
    if args.device.type == "cuda":
        torch.cuda.set_device(args.device)
    args.clock = timing.clock_for(args.device)
    device, found = describe_device(args.device, 1), versions()
    try:
        found["triton"] = version("triton")
    except PackageNotFoundError:
        found["triton"] = None
    backends, recipes = (", ".join(dict.fromkeys(names)) for names in (args.backends, [r.name for r in args.recipes]))
    named = ", ".join(f"{name} {found[name]}" for name in ("hf_nvfp4", "torch", "triton", "transformers", "python"))
    print(f"device {args.device} ({device['name']}), backend {backends}, recipe {recipes}, {named}")
    print(f"medians of {args.rounds} rounds; {args.clock.cache}", flush=True)
    return {
        "schema": SCHEMA,
        "command": shlex.join(["python", *sys.argv]),
        "device": device,
        "versions": found,
        "cache": args.clock.cache,
        "rounds": args.rounds,
        "weights": args.weights,
    }


def benchmarks(args: argparse.Namespace):
    """(kind, what is special about it, a function that does it) of all that was asked for."""
    for shape in args.cast_shapes if "casts" in args.what else ():
        yield "casts", {"shape": shape}, partial(bench_casts, args, shape)
    for shape in args.linear_shapes if "linear" in args.what else ():
        yield "linear", {"shape": shape}, partial(bench_linear, args, shape)
    if "model" in args.what:
        setting = {name: getattr(args, name) for name in ("size", "batch", "sequence_length", "compile")}
        yield "model", setting, partial(bench_model, args)


def result_of(kind: str, setting: dict, bench) -> dict:
    """Run one benchmark and print its table; its entry in the JSON file."""
    result, began, table = {"kind": kind, **setting, "rows": {}}, time.perf_counter(), ""
    with recorded(result):
        result["rows"], table = bench()
    result["seconds"] = time.perf_counter() - began
    title = ", ".join("×".join(map(str, v)) if name == "shape" else f"{name} {v}" for name, v in setting.items())
    print(f"\n## {kind} {title} (in {result['seconds']:.0f} s)\n\n{table or outcome(result)}", flush=True)
    if lines := kernel_lines(result["rows"]):
        print(f"\nGPU kernels, ms a call:\n{lines}", flush=True)
    return result


def main(argv: list[str] | None = None) -> int:
    """Run; returns the exit status."""
    args = parse(argv)
    report = announce(args) | {"results": []}
    BACKENDS.setdefault(YARDSTICK, yardstick)  # the last that "auto" would take
    torch._dynamo.config.recompile_limit = 1000  # the yardstick compiles for each shape
    for benchmark in benchmarks(args):
        report["results"].append(result_of(*benchmark))
        if args.json:
            write_json(args.json, report)
    failed = sum("error" in row for result in report["results"] for row in (result, *result["rows"].values()))
    if failed:
        print(f"bench.py: {failed} failed; {f'tracebacks are in {args.json}' if args.json else 'see --json'}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
