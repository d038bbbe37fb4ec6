"""Score checkpoints with lm-eval-harness, side by side.

    python scripts/evaluate.py runs/bf16 runs/fp8 runs/nvfp4
    python scripts/evaluate.py runs/* --precision as-trained bf16 --tasks python_stdlib,lambada_openai
    python scripts/evaluate.py runs/* --tasks my_task --include_path my_tasks --data_dir my_data

Writes DIR/eval-<precision>.json and DIR/eval-<precision>.samples.jsonl.gz for every model and precision,
prints the scores and, for several models, the paired differences to the first one.
"""

import argparse
import contextlib
import json
import logging
import shlex
import sys
import traceback
from importlib.metadata import version
from pathlib import Path

import torch

from hf_nvfp4 import evaluation
from hf_nvfp4.gemm import backend_names
from hf_nvfp4.recipes import get_recipes
from hf_nvfp4.runlog import describe_device, versions
from hf_nvfp4.scores import (
    AS_TRAINED,
    SCHEMA,
    Scores,
    paired_table,
    precision_lines,
    score_table,
    taken,
    write_scores,
)

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line; see --help."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add(
        "models",
        nargs="+",
        metavar="DIR",
        help="model folders (or org/name on the Hub); the first is the base",
    )
    add("--tasks", default="python_stdlib,python_stdlib_order", help="names or globs, separated by commas")
    add("--include_path", nargs="*", default=[], metavar="DIR", help="folders with further lm-eval task files")
    add("--data_dir", metavar="DIR", help="where relative data paths in task files start (default: here)")
    add(
        "--precision",
        nargs="+",
        default=[AS_TRAINED],
        metavar="P",
        help="as-trained, bf16 (what the NVFP4 paper scores in), or any recipe; several give several tables",
    )
    add(
        "--dtype",
        choices=DTYPES,
        default="bfloat16",
        help="of weights and of all layers that are not converted",
    )
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--batch_size", type=int, default=8)
    add("--limit", type=float, help="items a task; below 1 a fraction of them. For trying things out only")
    add("--num_fewshot", type=int, help="for tasks that do not set it themselves")
    add("--max_length", type=int, help="longest context, in tokens (default: the training's, or the model's)")
    add(
        "--output",
        type=Path,
        metavar="DIR",
        help="write to DIR/<model name>/ instead of into the model folders",
    )
    args = parser.parse_args(argv)
    folders = [folder(model, args).resolve() for model in args.models]
    if len(set(folders)) < len(folders):
        parser.error("two of the models would write to the same folder")
    if not args.output and (unknown := [model for model in args.models if not Path(model).is_dir()]):
        parser.error(f"no such folder: {', '.join(unknown)}. For models on the Hub, give --output.")
    return args


def main(argv: list[str] | None = None) -> int:
    """Run; returns the number of models and precisions that failed."""
    args = parse(argv)
    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # its warnings are about how we call it
    print(headline(args), flush=True)
    try:
        for name in set(args.precision) - {AS_TRAINED}:
            get_recipes(name)
        tasks = evaluation.load_tasks(args.tasks.split(","), args.include_path, args.data_dir)
    except (OSError, ValueError) as error:
        print(f"FAILED {error}")
        return 1
    failures: list[str] = []
    found = [scores for model in args.models for scores in evaluate(model, tasks, args, failures)]
    for precision in args.precision:
        if scores := [s for s in found if s.record["precision"] == precision]:
            print(f"\n{tables(precision, scores)}")
    for failure in failures:
        print(f"FAILED {failure}")
    return len(failures)


def headline(args: argparse.Namespace) -> str:
    """Device, and for every model the recipe and backend that its config names."""
    device = torch.device(args.device)
    info = describe_device(device, count=1)
    parts = [f"device {info['type']} ({info['name']}, {info['threads']} threads)", f"dtype {args.dtype}"]
    for model in args.models:
        try:
            recipe, backend = evaluation.stored_recipe(model) or (None, None)
            runs = recipe and f"recipe {recipe.name}, backend {backend_names(backend, recipe, device)}"
        except (OSError, ValueError):
            runs = "cannot be loaded"  # why: at the end
        parts.append(f"{model}: {runs or 'plain model'}")
    return " · ".join(parts)


def evaluate(name: str, tasks: list, args: argparse.Namespace, failures: list[str]) -> list[Scores]:
    """One model's scores in every precision, written to files; what fails goes to `failures`."""
    model, found = None, []
    with attempt(f"{name}: loading", failures):
        model, tokenizer = evaluation.load_model(name, DTYPES[args.dtype], torch.device(args.device))
        longest = context_length(name, args)
        settings = evaluation.Settings(args.batch_size, args.limit, args.num_fewshot, longest)
    for precision in args.precision if model is not None else ():
        with attempt(f"{name}, {precision}", failures), evaluation.precision(model, precision):
            detail = evaluation.precision_detail(model)
            print(f"\n{name}, {precision}: {detail}", flush=True)
            scored, samples = evaluation.score(model, tokenizer, tasks, settings)
            record = {**describe(name, args), "precision": precision, "precision_detail": detail, **scored}
            found.append(write_scores(folder(name, args) / f"eval-{precision}.json", record, samples))
    return found


@contextlib.contextmanager
def attempt(what: str, failures: list[str]):
    """Note an error in `failures` and go on: the other models are still worth their scores."""
    try:
        yield
    except Exception as error:
        failures.append(f"{what}: {error}")
        if not isinstance(error, OSError | ValueError):
            traceback.print_exc()


def folder(name: str, args: argparse.Namespace) -> Path:
    """Where a model's scores go."""
    return args.output / Path(name).name if args.output else Path(name)


def training_run(name: str) -> dict:
    """The run.json of a model trained with scripts/train.py; empty for others."""
    path = Path(name) / "run.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def context_length(name: str, args: argparse.Namespace) -> int | None:
    """Score in windows as long as the sequences that a model trained from scratch has seen, unless told."""
    run = training_run(name)
    from_scratch = run and not run["model"]["from_checkpoint"]
    return args.max_length or (run["data"]["sequence_length"] if from_scratch else None)


def describe(name: str, args: argparse.Namespace) -> dict:
    """What the JSON says beside the scores. The name is the training run's, or the folder's."""
    stored = evaluation.stored_recipe(name)
    return {
        "schema": SCHEMA,
        "model": name,
        "name": training_run(name).get("name") or Path(name).resolve().name,
        "recipe": stored[0].name if stored else None,
        "command": shlex.join(["python", *sys.argv]),
        "versions": {**versions(), "lm_eval": version("lm_eval")},
        "device": describe_device(torch.device(args.device), count=1),
        "dtype": args.dtype,
        "batch_size": args.batch_size,
        "limit": args.limit,
    }


def tables(precision: str, scores: list[Scores]) -> str:
    """Everything that is printed of the scores in one precision."""
    parts = [
        f"Scores taken {taken(precision)}; ± is the standard error over items.",
        *precision_lines(scores),
        *([f"- only {scores[0].record['limit']:g} items a task (--limit)"] if scores[0].record["limit"] else []),
        "",
        score_table(scores),
    ]
    if len(scores) > 1:
        base = scores[0].name
        parts += ["", f"Differences to {base} on the same items; ± is the paired standard error.", ""]
        parts.append(paired_table(scores))
    return "\n".join(parts)


if __name__ == "__main__":
    sys.exit(min(main(), 1))
