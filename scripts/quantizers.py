"""The yardstick table of all casts: errors, biases, what the mean of many draws is, gradients against BF16.

    python scripts/quantizers.py
    python scripts/quantizers.py --model runs/nvfp4 --recipes nvfp4 nvfp4_hopper fp8 --output runs/quantizers
    python scripts/quantizers.py --model org/name --text book.txt --device cuda --draws 1024

Writes quantizers.md, quantizers.json, unbiasedness.png and, with --model, gradients.png into --output, and prints the
tables. With --model, casts are measured on operands of its linears too, captured in a forward and backward.
"""

import argparse
import os
import shlex
import sys
from pathlib import Path

import torch
from tqdm import tqdm

from hf_nvfp4 import model_study, plots, quantizer_study, quantizer_tables
from hf_nvfp4.captured import OPERANDS
from hf_nvfp4.data import InputError
from hf_nvfp4.gemm import backend_name
from hf_nvfp4.recipes import RECIPES, get_recipe
from hf_nvfp4.runlog import describe_device, versions
from hf_nvfp4.scores import write_atomically, write_json

SCHEMA = 1


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line; see --help."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add, usual = parser.add_argument, quantizer_study.Settings()
    add("--output", type=Path, default=Path("runs/quantizers"), metavar="DIR", help="where the results go")
    add("--recipes", nargs="+", default=list(RECIPES), metavar="R", help="their casts and, with --model, gradients")
    add("--model", metavar="DIR", help="a causal LM (a folder, or org/name on the Hub) to take tensors from")
    add("--text", metavar="FILE", help="what --model reads: .parquet .jsonl .json .txt (default: the standard library)")
    add("--sequences", type=int, default=2, help="of text, as one batch")
    add("--length", type=int, default=256, help="tokens a sequence, or as many as the model has positions for")
    add("--layers", type=int, default=4, help="linears whose tensors are cast, evenly spaced in the model")
    add("--size", type=int, default=usual.size, help="side of the square tensor from N(0, 1)")
    add("--tail_size", type=int, default=usual.tail_size, help="side of those with heavy tails")
    add("--rows", type=int, default=usual.rows, help="of the tensor of 1024 columns that is drawn again and again")
    add("--draws", type=int, default=usual.draws, help="of it, by each cast that draws random numbers")
    add("--seed", type=int, default=usual.seed)
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(argv)
    for name in ("sequences", "length", "layers", "size", "tail_size", "rows"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} {getattr(args, name)}: at least 1 is needed")
    for name in ("size", "tail_size", "rows"):
        if getattr(args, name) % 128:
            parser.error(f"--{name} {getattr(args, name)} is not a multiple of 128, which blocks and rotations need")
    if args.draws < 2:
        parser.error(f"--draws {args.draws}: at least 2 are needed to tell a bias from chance")
    try:
        torch.empty(1, device=args.device)
    except (RuntimeError, AssertionError) as error:
        parser.error(f"--device {args.device} can't be used here: {str(error).splitlines()[0]}")
    return args


def headline(args: argparse.Namespace, recipes: list) -> str:
    """Device, backend and recipes."""
    device = torch.device(args.device)
    info = describe_device(device, count=1)
    parts = [f"device {info['type']} ({info['name']}, {info['threads']} threads)", "casts: plain PyTorch"]
    if args.model:
        backends = ", ".join(f"{recipe.name} on {backend_name('auto', recipe, device)}" for recipe in recipes)
        parts.append(f"{args.model}: {backends}")
    else:
        parts.append(f"casts of {', '.join(recipe.name for recipe in recipes)}")
    return " · ".join([*parts, f"seed {args.seed}"])


def study_model(args: argparse.Namespace, recipes: list) -> tuple[dict, dict[str, list]]:
    """The model's part of the record, and the operands to be cast: {operand: tensors}."""
    model = model_study.load(args.model, torch.device(args.device))
    length = model_study.longest(model, args.length)
    tokens = model_study.token_batch(args.model, args.text, args.sequences, length)
    captured = model_study.capture(model, tokens, args.layers)
    with tqdm(total=len(recipes), desc="gradients", leave=False, disable=None) as bar:
        gradients = model_study.gradient_cosines(model, tokens, recipes, args.seed, bar.update)
    record = {
        "name": args.model,
        "text": args.text or "the standard library",
        "sequences": args.sequences,
        "length": length,
        "captured": list(captured),
        "gradients": gradients,
    }
    operands = [found.operands() for found in captured.values()]
    return record, {name: [found[name] for found in operands] for name in OPERANDS}


def study(args: argparse.Namespace, recipes: list) -> dict:
    """Everything that is measured, as it stands in quantizers.json."""
    settings = quantizer_study.Settings(args.size, args.tail_size, args.rows, args.draws, args.seed)
    model, operands = study_model(args, recipes) if args.model else (None, {})
    generator = torch.Generator(args.device).manual_seed(args.seed)
    made = quantizer_study.made_tensors(args.size, args.tail_size, generator)
    groups = {name: [tensor] for name, tensor in made.items()} | operands
    drawn = torch.randn(args.rows, 1024, generator=generator, device=args.device)
    casts, users = quantizer_study.named_casts(recipes), quantizer_study.users(recipes)
    with tqdm(total=len(casts), desc="casts", leave=False, disable=None) as bar:
        found = quantizer_study.study(casts, groups, drawn, settings, bar.update)
    for name, entry in found.items():
        entry["users"] = users.get(casts[name], [])
    return {
        "schema": SCHEMA,
        "command": shlex.join(["python", *sys.argv]),
        "versions": versions(),
        "device": describe_device(torch.device(args.device), count=1),
        "settings": vars(settings),
        "model": model,
        "casts": found,
    }


def main(argv: list[str] | None = None) -> int:
    """Run; returns the exit status."""
    args = parse(argv)
    try:
        recipes = [get_recipe(name) for name in dict.fromkeys(args.recipes)]
        line = headline(args, recipes)
        print(line, flush=True)
        record = study(args, recipes)
    except (InputError, ValueError) as error:
        print(f"quantizers: {error}", file=sys.stderr)
        return 1
    report = quantizer_tables.full_report(record)
    print(f"\n{report}")
    write_json(args.output / "quantizers.json", record)
    write_atomically(args.output / "unbiasedness.png", plots.unbiasedness_png(record["casts"]))
    if record["model"]:
        write_atomically(args.output / "gradients.png", plots.gradients_png(record["model"]["gradients"]))
    write_atomically(args.output / "quantizers.md", f"# Quantizers\n\n{line}\n\n{report}".encode())
    print(f"results: {os.path.join(args.output, 'quantizers.md')}, quantizers.json and plots beside it")
    return 0


if __name__ == "__main__":
    sys.exit(main())
