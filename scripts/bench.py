"""Time casts, linear layers and training steps of recipes, and packed weights, beside BF16, FP8 and a measured copy.

    # Casts against a copy; forward + backward of a linear layer against nn.Linear in BF16
    python scripts/bench.py casts linear --json bench.json
    python scripts/bench.py casts --casts all --cast_shapes 16384x4096
    python scripts/bench.py linear --recipes nvfp4_hopper nvfp4@bf16 fp8_tensor@fp8 --amax given --torchao tensorwise
    # Fused experts, forward + backward, against Transformers' grouped_mm in BF16
    python scripts/bench.py experts --recipes nvfp4@bf16 nvfp4_hopper@fp8
    # Your own model, on your own GPU: steps of Trainer, then each of its layers alone, and where BF16 is faster
    python scripts/bench.py --model Qwen/Qwen3-0.6B --recipes nvfp4_hopper --compile
    python scripts/bench.py --model 8b --layers 5 --keep_bf16_last 0 --compile --torchao tensorwise rowwise
    # Inference with a packed weight (W4A16) beside F.linear in BF16, with other tiles of the kernel too
    python scripts/bench.py inference --batches 1 4 16 --tiles 8x1x1x2x1x4 4x2x1x1x1x1
    python scripts/bench.py decode --model 8b --compile --batches 1  # tokens/s of a whole model, packed and in BF16

Each variant is first compared with backend `reference`, at the shape that is timed; one that computes something
else is not timed. Layers are timed as replayed CUDA graphs, without the host's launching, and take turns; a number
is the median over the rounds, a ratio the median of the rounds' ratios. Models train one after the other, BF16 first
and again last. A variant that fails is a row with its error, and the exit status is 1.
"""

import argparse
import importlib.util
import shlex
import sys
import time
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from hf_nvfp4 import timing, yardstick
from hf_nvfp4.backends import BACKENDS
from hf_nvfp4.bench_inference import bench_inference
from hf_nvfp4.bench_rows import WEIGHTS, bench_casts, bench_layers, bench_linear, bench_model, recorded
from hf_nvfp4.bench_tables import kernel_lines, outcome
from hf_nvfp4.benchmarks import CASTS, YARDSTICK, Variant
from hf_nvfp4.runlog import describe_device, versions
from hf_nvfp4.scores import write_json
from hf_nvfp4.sizes import SIZES, TIMED

SCHEMA = 2
BENCHMARKS = ["casts", "linear", "experts", "inference", "decode", "model"]
MAIN_CASTS = ["rne", "sr", "2d", "rht", "rht_sr"]
DEFAULTS = {
    "cuda": {
        "cast_shapes": [(16384, 4096), (16384, 14336)],
        "linear_shapes": [(16384, 4096, 14336), (16384, 2048, 8192), (16384, 2048, 2048)],
        "experts_shapes": [(16384, 2048, 5632, 8, 2)],
        "inference_shapes": [(4096, 14336), (14336, 4096)],
        "layers_in_a_row": 32,
        "model": "350m",
        "rounds": 30,
        "steps": 20,
    },
    "cpu": {
        "cast_shapes": [(1024, 1024)],
        "linear_shapes": [(512, 512, 1024)],
        "experts_shapes": [(64, 64, 96, 4, 2)],
        "inference_shapes": [(256, 512)],
        "layers_in_a_row": 2,
        "model": "tiny",
        "rounds": 5,
        "steps": 3,
    },
}
OWN_MODEL = {"batch": 8, "sequence_length": 2048}  # where --model is not one of ours


# ---- Main ----------------------------------------------------------------------------------------------


def shape_of(length: int):
    """A parser of so many sizes, as 16384x4096."""

    def parse_shape(text: str) -> tuple[int, ...]:
        sizes = tuple(int(size) for size in text.split("x") if size.isdigit())
        if len(sizes) != length or text.count("x") != length - 1 or 0 in sizes:
            raise argparse.ArgumentTypeError(f"{text!r} is not {length} sizes, as {'x'.join(['4096'] * length)}")
        return sizes

    return parse_shape


def count_or_fraction(text: str) -> int | float:
    """ "2" is a count of blocks, "0.15" a fraction of them."""
    return int(text) if text.isdigit() else float(text)


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line; see --help."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("what", nargs="*", metavar="WHAT", help=f"{' '.join(BENCHMARKS)} (casts linear, or model if --model is given)")
    add("--recipes", nargs="+", default=["nvfp4"], metavar="R[@B]", help="recipes, each on the backend named")
    add("--backend", default="auto", help="where a recipe names none")
    add("--torchao", nargs="+", default=[], choices=["tensorwise", "rowwise"], help="torchao's float8 too")
    add("--device", type=torch.device, default="cuda" if torch.cuda.is_available() else "cpu")
    add("--rounds", type=int, metavar="N", help="timings of each cast and layer (default: 30, on the CPU 5)")
    add("--kernels", action="store_true", help="also list the GPU kernels of each cast and layer, and their times")
    add("--json", type=Path, metavar="FILE", help="write everything there, after each table anew")
    casts = parser.add_argument_group("casts").add_argument
    casts("--casts", nargs="+", default=MAIN_CASTS, metavar="C", help=f"all, or of {', '.join(CASTS)}")
    casts("--cast_shapes", nargs="+", type=shape_of(2), metavar="MxK")
    add_inference_options(parser.add_argument_group("inference").add_argument)
    add_layer_options(parser.add_argument_group("linear, experts").add_argument)
    add_model_options(parser.add_argument_group("model").add_argument)
    args = parser.parse_args(argv)
    complete(args, parser)
    return args


def add_layer_options(add) -> None:
    """Those of linear and experts."""
    add("--linear_shapes", nargs="+", type=shape_of(3), metavar="TxKxN", help="tokens, in, out features")
    add(
        "--experts_shapes",
        nargs="+",
        type=shape_of(5),
        metavar="TxHxIxExK",
        help="tokens, hidden, intermediate, experts, experts a token",
    )
    add("--weights", choices=WEIGHTS, default="bfloat16", help="float32 runs under BF16 autocast")
    add("--eager", action="store_true", help="time calls as the host launches them, not as CUDA graphs")
    add(
        "--amax",
        choices=["current", "given"],
        default="current",
        help="given: rows too whose casts know each tensor's amax beforehand, the most that a delayed one could save",
    )
    add(
        "--inductor",
        choices=["none", "first", "all"],
        default="first",
        help="shapes for which to time a plain-PyTorch emulation compiled by inductor too",
    )


def add_inference_options(add) -> None:
    """Those of inference."""
    add("--inference_shapes", nargs="+", type=shape_of(2), metavar="KxN", help="in, out features")
    add("--batches", nargs="+", type=int, default=[1, 4, 16], metavar="M", help="rows of x (%(default)s)")
    add("--layers_in_a_row", type=int, metavar="L", help="weights that take turns (default: 32, on the CPU 2)")
    add(
        "--tiles",
        nargs="+",
        type=shape_of(6),
        default=[],
        metavar="WxTxOxDxCxS",
        help="of the kernel, besides its own choice: warps, tiles of 16 rows, of 8 tokens, steps read ahead, times 32 "
        "columns a thread, columns of a tile for each token",
    )


def add_model_options(add) -> None:
    """Those of model."""
    known = ", ".join([*SIZES, *TIMED])
    add("--model", "--size", metavar="CONFIG", help=f"a config.json, folder, Hub name, or of {known} (default: 350m)")
    add("--layers", type=int, metavar="N", help="cut the model to as many blocks")
    add("--batch", type=int, metavar="N", help="sequences a step (default: the size's, else 8)")
    add("--sequence_length", type=int, metavar="N", help="(default: the size's, else 2048)")
    add("--steps", type=int, metavar="N", help="to time, after a warm-up (default: 20, on the CPU 3)")
    add(
        "--compile",
        nargs="?",
        choices=["none", "regional", "whole"],
        const="regional",
        default="none",
        help="Trainer's torch_compile, of BF16 too; regional: each decoder block by itself, which compiles soonest",
    )
    add(
        "--memory_budget",
        type=float,
        default=1.0,
        metavar="F",
        help="the compiler's activation_memory_budget, for every model: below 1 it makes more anew in backward",
    )
    add("--skip", nargs="+", default=[], metavar="NAME", help="linears to keep in BF16")
    add("--keep_bf16_first", type=count_or_fraction, metavar="N", help="blocks to keep in BF16: a count or a fraction")
    add("--keep_bf16_last", type=count_or_fraction, metavar="N", help="(default of both: the recipe's)")


def complete(args: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """Defaults that depend on other options, and names that argparse does not check."""
    args.what = args.what or (["model"] if args.model else ["casts", "linear"])
    for name, default in DEFAULTS["cuda" if args.device.type == "cuda" else "cpu"].items():
        if getattr(args, name) is None:
            setattr(args, name, default)
    shape = {**SIZES, **TIMED}.get(args.model)
    for name, default in OWN_MODEL.items():
        if getattr(args, name) is None:
            setattr(args, name, getattr(shape, name, default))
    args.casts = list(CASTS) if args.casts == ["all"] else args.casts
    for kind, names, known in (("benchmark", args.what, BENCHMARKS), ("cast", args.casts, CASTS)):
        for name in names:
            if name not in known:
                parser.error(f"unknown {kind} {name!r}; known: {', '.join(known)}")
    counts = (args.rounds, args.batch, args.sequence_length, args.steps, args.layers_in_a_row, *args.batches)
    if min(counts) < 1:
        parser.error("--rounds, --batch, --sequence_length, --steps, --layers_in_a_row, --batches are at least 1")
    if any(h % 16 or i % 16 or k > e for _, h, i, e, k in args.experts_shapes):
        parser.error("--experts_shapes: sizes are multiples of 16, and a token has no more experts than there are")
    if any(size & (size - 1) for tiles in args.tiles for size in tiles[:1]):
        parser.error("--tiles: the number of warps is a power of two")
    if any(tiles[-1] not in (1, 2, 4) for tiles in args.tiles):
        parser.error("--tiles: each token has 1, 2 or 4 columns of a tile, the last number")
    if "decode" in args.what and args.sequence_length < 256:
        parser.error(f"--sequence_length {args.sequence_length}: decode needs at least 256")
    if "inference" in args.what and any(k % 16 for k, _ in args.inference_shapes):
        parser.error("--inference_shapes: in features are a multiple of 16")
    if not 0 <= args.memory_budget <= 1:
        parser.error(f"--memory_budget {args.memory_budget}: a fraction; 0 keeps next to nothing, 1 what saves time")
    if args.memory_budget < 1 and args.compile == "none":
        parser.error("--memory_budget is the compiler's: add --compile")
    if args.torchao and importlib.util.find_spec("torchao") is None:
        parser.error("--torchao needs torchao, which is not installed: pip install torchao")
    choose_device(args, parser)
    try:
        args.variants = [Variant.parse(text, args.backend, args.device) for text in dict.fromkeys(args.recipes)]
    except ValueError as error:
        parser.error(str(error))


def choose_device(args: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """The device with its number, and whether there are CUDA graphs."""
    if args.device.type != "cuda":
        args.eager = True
        return
    if not torch.cuda.is_available():
        parser.error("there is no CUDA device here; use --device cpu")
    if "model" in args.what and torch.cuda.device_count() > 1:
        parser.error("Trainer would spread the model over all GPUs: choose one by CUDA_VISIBLE_DEVICES")
    args.device = torch.device("cuda", args.device.index or 0)


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
    backends, recipes = (
        ", ".join(dict.fromkeys(names))
        for names in ([v.backend for v in args.variants], [v.recipe.name for v in args.variants])
    )
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
        "graphs": not args.eager,
    }


def decode(args: argparse.Namespace) -> tuple[dict, str]:
    """Decode steps of a model; see bench_decode."""
    from hf_nvfp4.bench_decode import bench_decode  # not at the top: layers alone need no Transformers

    return bench_decode(args)


def experts(args: argparse.Namespace, shape: tuple[int, ...]) -> tuple[dict, str]:
    """Fused experts; see bench_experts."""
    from hf_nvfp4.bench_experts import bench_experts  # as in `decode`

    return bench_experts(args, shape)


def benchmarks(args: argparse.Namespace):
    """(kind, what is special about it, a function that does it) of all that was asked for."""
    for shape in args.cast_shapes if "casts" in args.what else ():
        yield "casts", {"shape": shape}, partial(bench_casts, args, shape)
    for shape in args.linear_shapes if "linear" in args.what else ():
        yield "linear", {"shape": shape}, partial(bench_linear, args, shape)
    for shape in args.experts_shapes if "experts" in args.what else ():
        yield "experts", {"shape": shape}, partial(experts, args, shape)
    for shape in args.inference_shapes if "inference" in args.what else ():
        yield "inference", {"shape": shape}, partial(bench_inference, args, shape)
    if "decode" in args.what:
        names = ("model", "layers", "sequence_length", "compile")
        yield "decode", {name: v for name in names if (v := getattr(args, name)) is not None}, partial(decode, args)
    if "model" in args.what:
        names = ("model", "layers", "batch", "sequence_length", "compile", "memory_budget")
        setting = {name: getattr(args, name) for name in names}
        setting = {name: value for name, value in setting.items() if value is not None}
        yield "model", setting, partial(bench_model, args)
        yield "layers", setting, partial(bench_layers, args)


def result_of(kind: str, setting: dict, bench) -> dict:
    """Run one benchmark and print its table; its entry in the JSON file."""
    result, began, table = {"kind": kind, **setting, "rows": {}}, time.perf_counter(), ""
    with recorded(result):
        result["rows"], table = bench()
    result["seconds"] = time.perf_counter() - began
    named = {"shape": lambda shape: "×".join(map(str, shape)), "model": str}
    title = ", ".join(named[name](v) if name in named else f"{name} {v}" for name, v in setting.items())
    print(f"\n## {kind} {title} (in {result['seconds']:.0f} s)\n\n{table or outcome(result)}", flush=True)
    if lines := kernel_lines(result["rows"]):
        print(f"\nGPU kernels, ms a call:\n{lines}", flush=True)
    return result


def main(argv: list[str] | None = None) -> int:
    """Run; returns the exit status."""
    args = parse(argv)
    report = announce(args) | {"results": []}
    BACKENDS.setdefault(YARDSTICK, yardstick)  # the last that "auto" would take
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
