"""Runs the benchmarks of scripts/bench.py: checks each variant, times those that are right, gives rows and a table.

A row is plain data for JSON. Whatever fails is its row's "error", and the others go on.
"""

import argparse
import contextlib
import traceback
from collections.abc import Callable
from functools import partial

import torch

from hf_nvfp4 import bench_tables as tables
from hf_nvfp4 import timing
from hf_nvfp4.backends import BACKENDS
from hf_nvfp4.bench_tables import BASE, COPY, FP8_PRODUCTS
from hf_nvfp4.benchmarks import (
    CASTS,
    ON_FP8,
    SEED,
    TORCHAO_TOLERANCE,
    YARDSTICK,
    Step,
    Variant,
    check_cast,
    check_replay,
    check_results,
    check_step,
    fp8_products,
    layer_calls,
)
from hf_nvfp4.gemm import backend_name

WEIGHTS = {"bfloat16": torch.bfloat16, "float32": torch.float32}


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


def time_rows(
    rows: dict[str, dict], runs: dict[str, Callable], base: str, args: argparse.Namespace, calls: dict[str, Callable]
) -> None:
    """Time the runs against each other and enter what came out in their rows.

    calls: those runs as they are launched, where a run replays a graph.
    """
    for name, result in timing.interleave(runs, args.clock, args.rounds, launches=calls).items():
        with recorded(rows[name]):
            if isinstance(result, Exception):
                raise result
            rows[name] |= {"time": result.to_dict(), "timing": result}
    times = {name: row.pop("timing") for name, row in rows.items() if "timing" in row}
    for name, result in times.items():
        rows[name]["ratio"] = result.ratio(times[base]) if base in times else None
        rows[name]["speed"] = 1 / rows[name]["ratio"] if base in times else None
        if args.kernels:
            with recorded(rows[name]):
                rows[name]["kernels"] = timing.kernel_seconds(calls.get(name, runs[name]), args.device)


# ---- Casts ---------------------------------------------------------------------------------------------


def bench_casts(args: argparse.Namespace, shape: tuple[int, int]) -> tuple[dict, str]:
    """Casts of one shape against a copy of it: rows, table."""
    torch.manual_seed(SEED)
    x = torch.randn(shape, device=args.device, dtype=torch.bfloat16)
    rows = {COPY: {"what": "x to a buffer", "bytes_read": x.nbytes, "bytes_written": x.nbytes}}
    runs = {COPY: partial(torch.empty_like(x).copy_, x)}
    calls = {name: (CASTS[name], None) for name in args.casts}
    for variant in args.variants:
        of_layer = layer_calls(variant.recipe).items()
        calls |= {f"{variant.name} {tensor}": (call, variant.backend) for tensor, call in of_layer}
    for name, (call, backend_of_recipe) in calls.items():
        rows[name] = {"what": str(call)}
        with recorded(rows[name]):
            rows[name]["backend"] = backend_of_recipe or backend_name(args.backend, call.recipe, args.device)
            backend = BACKENDS[rows[name]["backend"]]
            rows[name]["check"] = check_cast(backend, call, x)
            rows[name]["bytes_read"], rows[name]["bytes_written"] = call.traffic(x, call(backend, x))
            runs[name] = partial(call, backend, x)
    time_rows(rows, runs, COPY, args, {})
    for row in rows.values():
        if "time" in row:
            moved = row["bytes_read"] + row["bytes_written"]
            row["bytes_per_second"] = moved / row["time"]["median_seconds"]
            row["share_of_copy"] = row["ratio"] and moved / (2 * x.nbytes) / row["ratio"]
    return rows, tables.casts_table(rows)


# ---- Linear layers -------------------------------------------------------------------------------------


def linear_variants(args: argparse.Namespace, base: Step, variant: Variant, rows: dict, inductor: bool) -> dict:
    """name -> step of a recipe and its relatives, each right; their checks are entered in rows."""
    steps = {}
    with recorded(rows.setdefault(variant.name, {})):
        expected = base.with_recipe(variant.recipe, "reference").results()
        makers = {variant.name: partial(base.with_recipe, variant.recipe, variant.backend)}
        if args.amax == "given" and any(cast.block_format.tensor_scale for cast in variant.recipe.casts):
            makers[f"{variant.name}, amax given"] = lambda: makers[variant.name]().with_amax_given()
        if inductor and layer_calls(variant.recipe):
            makers[f"{variant.name}, {YARDSTICK}"] = partial(base.with_recipe, variant.recipe, YARDSTICK)
        for name, make in makers.items():
            with recorded(rows.setdefault(name, {})):
                step = make()
                rows[name] |= check_step(step, expected)
                rows[name]["products"] = FP8_PRODUCTS if rows[name]["backend"] in ON_FP8 else BASE
                steps[name] = step
    return steps


def torchao_variants(args: argparse.Namespace, base: Step, rows: dict) -> dict:
    """name -> step by torchao's Float8Linear, near BF16's results."""
    steps = {}
    for recipe in args.torchao:
        name = f"torchao {recipe}"
        with recorded(rows.setdefault(name, {})):
            step = base.with_torchao(recipe)
            worst = check_results(step.results(), base.results(), TORCHAO_TOLERANCE)
            rows[name] |= {"error_norm": worst, "check": f"within {worst:.1e} of BF16"}
            steps[name] = step
    return steps


def measured(args: argparse.Namespace, steps: dict[str, Step], rows: dict[str, dict]) -> dict[str, Callable]:
    """name -> what to time: the step, or its graph. Enters what a step holds in memory."""
    runs = {}
    for name, step in steps.items():
        with recorded(rows[name]):
            with step.around:
                rows[name]["saved_bytes"] = timing.saved_bytes(step.forward, step.owned)
            step()
            step.clear()
            rows[name]["peak_bytes"] = timing.peak_bytes(step, args.device)
            runs[name] = step
            if not args.eager and not step.loop:
                runs[name] = timing.captured(step, args.device)
                check_replay(step, runs[name])
    return {name: run for name, run in runs.items() if "error" not in rows[name]}


@torch._dynamo.config.patch(recompile_limit=1000)  # the yardstick and torchao's layers compile for each shape
def linear_rows(
    args: argparse.Namespace, shape: tuple[int, int, int], dtype: torch.dtype, inductor: bool = False
) -> dict[str, dict]:
    """Forward and backward of one layer by variant, against nn.Linear, a copy of x and the bare products."""
    base = Step.of_linear(shape, args.device, dtype)
    rows, steps = {BASE: {}}, {BASE: base}
    for variant in args.variants:
        steps |= linear_variants(args, base, variant, rows, inductor)
    steps |= torchao_variants(args, base, rows)
    base()  # takes cuBLAS's workspaces, which stay
    runs = measured(args, steps, rows)
    if any(row.get("products") == FP8_PRODUCTS for row in rows.values()):
        rows[FP8_PRODUCTS] = {"check": "no casts"}
        with recorded(rows[FP8_PRODUCTS]):
            steps[FP8_PRODUCTS] = products = fp8_products(shape, args.device)
            runs[FP8_PRODUCTS] = products if args.eager else timing.captured(products, args.device)
    rows[COPY] = {"bytes": 2 * base.x.nbytes}
    runs[COPY] = partial(torch.empty_like(base.x).copy_, base.x.detach())
    time_rows(rows, runs, BASE, args, {name: step for name, step in steps.items() if name in runs})
    return rows


def clocked(args: argparse.Namespace) -> str:
    """How layers are timed, in words."""
    return "as launched by the host" if args.eager else "a replayed CUDA graph: no time for launching"


def bench_linear(args: argparse.Namespace, shape: tuple[int, int, int]) -> tuple[dict, str]:
    """One layer: rows, table."""
    inductor = args.inductor == "all" or args.inductor == "first" and shape == args.linear_shapes[0]
    rows = linear_rows(args, shape, WEIGHTS[args.weights], inductor)
    return rows, tables.linear_table(shape, rows, clocked(args))


# ---- Models --------------------------------------------------------------------------------------------


def bench_model(args: argparse.Namespace) -> tuple[dict, str]:
    """Training steps of one model by variant, BF16 first and again last: rows, table."""
    # Not at the top: layers alone need no Transformers.
    from hf_nvfp4 import bench_model as models

    again, rows = f"{BASE}, again", {}
    conversions = {BASE: models.keep}
    conversions |= {variant.name: models.with_recipe(args, variant) for variant in args.variants}
    conversions |= {f"torchao {recipe}": models.with_torchao(args, recipe) for recipe in args.torchao}
    Step.of_linear((64, 64, 64), args.device, torch.bfloat16)()  # takes cuBLAS's workspaces, which stay
    for name, convert in {**conversions, again: models.keep}.items():
        rows[name] = {}
        with recorded(rows[name]):
            rows[name] |= models.train(args, convert)
    drift = models.set_speeds(rows, [BASE, again])
    return rows, tables.model_table(rows, drift, args.compile)


def bench_layers(args: argparse.Namespace) -> tuple[dict, str]:
    """Every shape of the model's layers that is converted, alone, at the model's tokens: rows, table."""
    from hf_nvfp4 import bench_model as models

    tokens, shapes = args.batch * args.sequence_length, models.layer_shapes(args)
    results = []
    for shape in shapes:
        models.free(args.device)
        results.append(linear_rows(args, (tokens, *shape), torch.float32))
    found = zip(shapes, results, strict=True)
    rows = {f"{k}x{n} {name}": row for (k, n), of_shape in found for name, row in of_shape.items()}
    return rows, f"{tables.layers_table(shapes, results, tokens)}\nTimed {clocked(args)}."
